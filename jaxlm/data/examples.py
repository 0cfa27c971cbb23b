"""Forms of documents: text to go on with, or examples of what to answer: prompts and targets, conversations, labelled texts,
preferences. A form makes of a record its parts, [(text or id, whether the model is to tell it)], and of these ids with marks.
"""

import functools
import json
import re
from collections.abc import Iterator

from jaxlm.data.chat import open_chat_template
from jaxlm.data.formats import Extent
from jaxlm.data.sources import Skipped, Unfit, read_items, read_texts
from jaxlm.errors import UserError
from jaxlm.registry import Registry

FORMS = Registry("form", key="data.form")


def build_form(settings, tokenizer=None):
    """settings: `sources.reading`. tokenizer: not needed to read what one is to be made of."""
    return FORMS[settings.data.form](settings, tokenizer)


@FORMS.register("text")
class Text:
    """Every token is to be told."""

    group = 1  # documents of an example
    marks = False  # whether some are given
    size = staticmethod(len)  # of an item, in characters

    def __init__(self, settings, tokenizer):
        self.settings, self.tokenizer = settings, tokenizer

    def read(self, extents, skipped: Skipped) -> Iterator[str]:
        return read_texts(self.settings, extents, skipped)

    @staticmethod
    def texts(item) -> list[str]:
        """What a tokenizer learns from."""
        return [item]

    def encode(self, items) -> Iterator[tuple]:
        """-> (ids, marks, bytes of text to be told) of each document."""
        for text, ids in zip(items, self.tokenizer.encode_batch(items), strict=True):
            yield ids, b"", len(text) if text.isascii() else len(text.encode())


class Example:
    """What the others share. An item is a list of `group` documents, each a list of (text or id, to be told)."""

    group, marks, starts = 1, True, True  # starts: with the ids that every text of the tokenizer begins with
    cut = "prompt_end"  # what an example that is too long loses: "prompt_end", "prompt_start" (`example_rows.fit_answers`), "end"

    def __init__(self, settings, tokenizer):
        self.settings, self.tokenizer = settings, tokenizer
        self.ending = [] if tokenizer is None or tokenizer.eos_id is None else [(tokenizer.eos_id, True)]

    def read(self, extents: list[Extent], skipped: Skipped) -> Iterator[list]:
        for extent in extents:
            for _, item in read_items(self.settings, extent, skipped, self.take):
                yield item

    def take(self, record) -> list:
        """The documents of a record. Raises `sources.Unfit`."""
        if isinstance(record, str):
            record = {self.settings.data.text_field: record}
        return self.documents(record)

    @staticmethod
    def size(item) -> int:
        return sum(len(part) for document in item for part, _ in document if isinstance(part, str))

    @staticmethod
    def texts(item) -> list[str]:
        return [part for document in item for part, _ in document if isinstance(part, str)]

    def encode(self, items) -> Iterator[tuple]:
        """-> (ids, marks, bytes of text to be told) of each document."""
        texts = iter(self.tokenizer.encode_batch([text for item in items for text in self.texts(item)]))
        skip = len(self.tokenizer.first)
        for document in (document for item in items for document in item):
            ids, marks, size = [], bytearray(), 0
            for place, (part, told) in enumerate(document):
                if isinstance(part, str):
                    size += len(part.encode()) * told
                    new = list(next(texts))[0 if self.starts and place == 0 else skip :]
                else:
                    new = [part]
                ids += new
                marks += bytes([told]) * len(new)
            yield ids, marks, size


def filled(template: str, record: dict, key: str) -> str:
    """ "{de} => " with the record's field. A list of strings is joined by blanks."""
    def value(match):
        if match[1] not in record:
            raise Unfit(f"no field {match[1]!r} for data.{key}={template!r} (it has: {', '.join(record)}); set data.{key}")
        field = record[match[1]]
        return " ".join(map(str, field)) if isinstance(field, list) else str(field)

    return re.sub(r"\{([^{}]+)\}", value, template)


def references(template: str, record: dict) -> list[str]:
    """All targets of a record: one for each string where a field is a list."""
    lists = [name for name, value in record.items() if isinstance(value, list) and "{" + name + "}" in template]
    if not lists:
        return [filled(template, record, "target")]
    return [filled(template, {**record, lists[0]: value}, "target") for value in record[lists[0]]]


@FORMS.register("pair")
class Pair(Example):
    """data.prompt is given, data.target to be told, and then the end."""

    def documents(self, record):
        data = self.settings.data
        targets = references(data.target, record)
        if not targets or not targets[0].strip():
            raise Unfit(f"data.target={data.target!r} is empty; mend it, or set data.on_error=skip")
        prompt = filled(data.prompt, record, "prompt")
        if not prompt:
            raise Unfit(f"data.prompt={data.prompt!r} is empty; mend it, or set data.on_error=skip")
        return [[(prompt, False), (targets[0], True), *self.ending]]


@FORMS.register("label")
class Label(Example):
    """data.prompt is given; to be told is the number of the class, whose name is in data.label_field."""

    def documents(self, record):
        data = self.settings.data
        if data.label_field not in record:
            raise Unfit(f"no label in field {data.label_field!r} (it has: {', '.join(record)}); set data.label_field")
        name = str(record[data.label_field])
        if name not in data.classes:
            raise Unfit(f"label {name!r} is none of data.classes={data.classes}; add it, or mend the record")
        return [[(filled(data.prompt, record, "prompt"), False), *((i, False) for i, _ in self.ending),
                 (data.classes.index(name), True)]]


@FORMS.register("chat")
class Chat(Example):
    """The assistant's messages are to be told, each with the token that ends it; the chat template makes the text."""

    starts, cut = False, "end"

    def documents(self, record):
        messages, tools = conversation(record)
        return [self.parts(messages, tools)]

    def parts(self, messages, tools, only_last: bool = False) -> list:
        if not any(message["role"] == "assistant" for message in messages):
            raise Unfit("a conversation without an answer; leave it out, or set data.on_error=skip")
        if self.tokenizer is None:  # to learn one
            return [(json.dumps(tools, ensure_ascii=False), False)] * bool(tools) + [
                (m["content"] if isinstance(m["content"], str) else str(m["content"]), False) for m in messages]
        try:
            text, spans = self.template.render_with_answers(messages, tools)
        except UserError as error:
            raise Unfit(str(error)) from error
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(answers):
            weights = [messages[i].get("weight", 1) for i in answers]
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
        spans = spans[-1:] if only_last else spans
        parts, at = [], 0
        for begin, end in spans:
            parts += [*self.split(text[at:begin], False), *self.split(text[begin:end], True)]
            at = end
        return [*parts, *self.split(text[at:], False)]

    @functools.cached_property
    def template(self):
        return open_chat_template(self.tokenizer, self.settings.data.tokenizer)

    @functools.cached_property
    def end(self) -> str | None:
        """The name of the end token, where the tokenizer would read it letter by letter (`chat.encode_chat`)."""
        end = self.tokenizer.eos_token
        return None if end is None or len(self.tokenizer.encode(end)) == len(self.tokenizer.first) + 1 else end

    def split(self, text: str, told: bool) -> list:
        first, *rest = text.split(self.end) if self.end else [text]
        parts = [(first, told)] + [part for text in rest for part in ((self.tokenizer.eos_id, told), (text, told))]
        return [part for part in parts if part[0] != ""]


@FORMS.register("preference")
class Preference(Chat):
    """Two documents: the conversation with the answer that was chosen, and with the one that was rejected. The last answer alone
    is to be told."""

    group, cut = 2, "prompt_start"

    def documents(self, record):
        out = []
        for kind in ("chosen", "rejected"):
            if kind not in record:
                raise Unfit(f"no field {kind!r} (it has: {', '.join(record)}); a preference has chosen and rejected")
            answer = record[kind]
            before = {name: value for name, value in record.items() if name not in ("chosen", "rejected")}
            if isinstance(answer, list) and not before:
                messages, tools = conversation({"messages": answer})
            else:
                messages, tools = conversation(before, open_=True)
                answer = answer if isinstance(answer, list) else [answer]
                answer = [a if isinstance(a, dict) else {"role": "assistant", "content": a} for a in answer]
                messages = messages + [message_of(turn) for turn in answer]
            out.append(self.parts(messages, tools, only_last=True))
        return out


# ---- Conversations ----------------------------------------------------------------------------------------------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
         "observation": "tool", "function_call": "assistant", "function": "tool", "bot": "assistant", "model": "assistant"}


def conversation(record: dict, open_: bool = False) -> tuple[list[dict], list | None]:
    """-> (messages, tools) of a record with "messages" (OpenAI), "conversations" (ShareGPT), "instruction" (Alpaca), or "prompt"
    and "completion". open_: what an answer is still to come to. Raises `sources.Unfit`."""
    tools = record["tools"] if "tools" in record and record["tools"] else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Unfit(f"field 'tools' is not JSON ({error}); mend it") from error
    first = [{"role": "system", "content": record["system"]}] if "system" in record and record["system"] else []
    turns = next((record[name] for name in ("messages", "conversations", "conversation") if name in record), None)
    if turns is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Unfit("the conversation is not a list of objects with role and content, or from and value; mend it")
        return first + [message_of(turn) for turn in turns], tools
    if "instruction" in record:
        question = "\n".join(record[name] for name in ("instruction", "input") if name in record and record[name])
        turns = [turn for pair in (record["history"] if "history" in record and record["history"] else ())
                 for turn in zip(("user", "assistant"), pair, strict=True)] + [("user", question)]
        answers = ("output", "response")
    elif "prompt" in record:
        prompt = record["prompt"]
        turns = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in map(message_of, prompt)]
        answers = ("completion", "response")
    else:
        raise Unfit(f"no conversation (it has: {', '.join(record)}); give messages, conversations, or instruction and output")
    answer = next((record[name] for name in answers if name in record), None)
    if not open_:
        if answer is None:
            raise Unfit(f"no answer in {' or '.join(answers)} (it has: {', '.join(record)})")
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        turns += [(m["role"], m["content"]) for m in map(message_of, answer)]
    return first + [{"role": role, "content": content} for role, content in turns], tools


def message_of(turn: dict) -> dict:
    """{"role", "content"}, "tool_calls" of a call, and "weight" where the record has one."""
    role = turn["role"] if "role" in turn else turn["from"] if "from" in turn else None
    if role not in ROLES:
        raise Unfit(f"a message of {role!r}; roles are {', '.join(ROLES)}")
    content = turn["content"] if "content" in turn else turn["value"] if "value" in turn else None
    if isinstance(content, list):  # parts: [{"type": "text", "text" or "value": ...}]
        if any("type" in part and part["type"] != "text" for part in content):
            raise Unfit("a message with parts that are not text; leave it out, or set data.on_error=skip")
        content = "".join(part["text"] if "text" in part else part["value"] for part in content)
    message = {**{name: turn[name] for name in ("tool_calls", "name", "tool_call_id", "reasoning_content") if name in turn},
               "role": ROLES[role], "content": content or ""}
    if role == "function_call":
        try:
            call = json.loads(content)
            message |= {"content": "", "tool_calls": [{"type": "function", "function": {
                "name": call["name"], "arguments": call["arguments"]}}]}
        except (ValueError, KeyError, TypeError) as error:
            raise Unfit(f"a function_call that is not JSON with name and arguments ({error!r}); mend it") from error
    weight = next((turn[name] for name in ("weight", "loss_weight") if name in turn), None)
    return message if weight is None else {**message, "weight": weight}
