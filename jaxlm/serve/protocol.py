"""OpenAI's completions and chat completions as JSON: what a request may say, and how an answer is written.

https://platform.openai.com/docs/api-reference/completions and .../chat. What is not implemented is refused by its name.
"""

import json
import math
import secrets
import time
from typing import Any, NamedTuple

from jaxlm.data.chat import encode_chat
from jaxlm.errors import UserError
from jaxlm.generate.decoding import Request
from jaxlm.generate.sampling import Sampling
from jaxlm.registry import did_you_mean

KIND_NAMES = {str: "string", list: "array", dict: "object", bool: "boolean", int: "integer", float: "number"}
MOST_STOPS, MOST_CHOICES = 16, 128


class Refused(Exception):
    """A request that is answered by an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict:
        kind = ("server_error" if self.status >= 500 else "authentication_error" if self.status == 401 else
                "rate_limit_error" if self.status == 429 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Ask(NamedTuple):
    """A request that was understood."""

    chat: bool
    requests: list[Request]  # of each prompt its n answers, one after the other
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    log_probabilities: bool

    @property
    def prompt_tokens(self) -> int:
        return sum({id(r.prompt): len(r.prompt) for r in self.requests}.values())


# Fields that change no answer, and those that may only have a value under which they do nothing.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
ONLY = {"frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "echo": (False, None),
        "suffix": (None, ""), "best_of": (1, None), "top_logprobs": (0, None), "tools": ([], None), "functions": ([], None),
        "tool_choice": ("none", "auto", None), "function_call": ("none", "auto", None), "modalities": (["text"], None),
        "response_format": ({"type": "text"}, None)}
BOTH = {"model", "n", "stop", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "seed", "logprobs"}
KNOWN = {False: BOTH | {"prompt"}, True: BOTH | {"messages", "max_completion_tokens", "chat_template_kwargs"}}


def read_json(body: bytes) -> dict:
    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise Refused(400, "the body must be a JSON object")
    return values


class Protocol:
    """
    Args:
        name: of the model.
        generator: jaxlm.generate.decoding.Generator, whose limits requests must keep.
        template, ends: of jaxlm.data.chat; ends = (ids, strings) of an answer in a chat.
        max_tokens: of one answer; 0: as many as the context has room for.
        most: answers that one request may ask for.
    """

    def __init__(self, name: str, tokenizer, generator, template, ends, template_options: dict, max_tokens: int, most: int):
        self.name, self.tokenizer, self.generator, self.template = name, tokenizer, generator, template
        self.ends, self.template_options, self.max_tokens, self.most = ends, template_options, max_tokens, most
        self.created = int(time.time())

    # ---- What is asked -----------------------------------------------------------------------------------------------------

    def read(self, body: bytes, chat: bool) -> Ask:
        """Raises Refused."""
        values = read_json(body)
        self.check_names(values, chat)
        value = lambda name, *kinds: typed(values, name, *kinds)
        if value("model", str) not in (None, self.name):
            raise Refused(404, f"the model {values['model']!r} is not here; {self.name!r} is", "model", "model_not_found")
        number = lambda name, default: default if value(name, int, float) is None else values[name]
        vocab_size = self.generator.vocab_size
        options = Sampling(float(number("repetition_penalty", 1.0)), float(number("temperature", 1.0)),
                           min(value("top_k", int) or 0, vocab_size), float(number("top_p", 1.0)), float(number("min_p", 0.0)))
        n = 1 if value("n", int) is None else values["n"]
        if not 1 <= n <= MOST_CHOICES:
            raise Refused(400, f"n={n}: must be 1 to {MOST_CHOICES}", "n")
        prompts = [self.chat_prompt(values)] if chat else self.prompts(values)
        if len(prompts) * n > self.most:
            raise Refused(400, f"{len(prompts)} prompts with n={n} are {len(prompts) * n} answers; this server takes at most "
                               f"{self.most} in a request", "n")
        stop_ids, stop = self.ends if chat else (frozenset({self.tokenizer.eos_id} - {None}), ())
        seed = secrets.randbits(31) if value("seed", int) is None else values["seed"]
        requests = []
        for prompt in prompts:
            room = self.room(prompt, values, chat)
            requests += [Request(prompt, room, options, seed + len(requests) + i, stop_ids) for i in range(n)]
        try:
            for request in requests[::n]:
                self.generator.check(request, room_for_all=True)
        except UserError as error:
            raise Refused(400, str(error)) from error
        stream_options = value("stream_options", dict) or {}
        return Ask(chat, requests, stop + self.stops(values), bool(value("stream", bool)),
                   typed(stream_options, "include_usage", bool) or False, self.wants_log_probabilities(values, chat))

    def check_names(self, values: dict, chat: bool) -> None:
        for name, given in values.items():
            if name in ONLY:
                if not any(given == neutral and isinstance(given, bool) == isinstance(neutral, bool) for neutral in ONLY[name]):
                    raise Refused(400, f"{name}: is not implemented here; leave it out", name, "unsupported_parameter")
            elif name not in KNOWN[chat] and name not in IGNORED:
                raise Refused(400, f"{name}: unknown field; {did_you_mean(name, KNOWN[chat])}", name, "unknown_parameter")

    def room(self, prompt: list[int], values: dict, chat: bool) -> int:
        """Tokens of an answer."""
        name = "max_completion_tokens" if chat and values.get("max_completion_tokens") is not None else "max_tokens"
        asked, most = typed(values, name, int), max(1, self.generator.seq_len - len(prompt))
        most = min(most, self.max_tokens or most)
        if asked is None:
            return most if chat else min(16, most)  # OpenAI's defaults
        if asked < 1:
            raise Refused(400, f"{name}={asked}: must be at least 1", name)
        if asked > most and len(prompt) < self.generator.seq_len:
            raise Refused(400, f"{name}={asked}: with a prompt of {len(prompt)} tokens, an answer has at most {most} (context "
                               f"{self.generator.seq_len}, --max_tokens={self.max_tokens})", name, "context_length_exceeded")
        return asked

    def prompts(self, values: dict) -> list[list[int]]:
        """A text, a list of them, or the same as token ids."""
        given = values["prompt"] if "prompt" in values else None
        if isinstance(given, str) or (isinstance(given, list) and given and all(type(i) is int for i in given)):
            given = [given]
        if not isinstance(given, list) or not given:
            raise Refused(400, "prompt: must be a text, a list of texts, or of token ids", "prompt")
        out = []
        for prompt in given:
            if isinstance(prompt, str):
                prompt = self.encode(prompt, "prompt")
            elif not isinstance(prompt, list) or not all(type(i) is int and 0 <= i < self.generator.vocab_size for i in prompt):
                raise Refused(400, f"prompt: token ids must be whole numbers from 0 to {self.generator.vocab_size - 1}", "prompt")
            out.append(prompt)
        return out

    def chat_prompt(self, values: dict) -> list[int]:
        messages = typed(values, "messages", list)
        if not messages:
            raise Refused(400, "messages: must be a list with at least one message", "messages")
        messages = [with_text(i, message) for i, message in enumerate(messages)]
        options = {**self.template_options, **(typed(values, "chat_template_kwargs", dict) or {})}
        if taken := {"messages", "tools", "add_generation_prompt"} & set(options):
            raise Refused(400, f"chat_template_kwargs: {sorted(taken)[0]} has its own field", "chat_template_kwargs")
        try:
            text = self.template.render(messages, add_generation_prompt=True, **options)
        except UserError as error:
            raise Refused(400, str(error), "messages") from error
        return self.encode(text, "messages", chat=True)

    def encode(self, text: str, param: str, chat: bool = False) -> list[int]:
        try:
            text.encode("utf-8")
            return encode_chat(self.tokenizer, text) if chat else [int(i) for i in self.tokenizer.encode(text)]
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise Refused(400, f"{param}: is not valid Unicode ({error})", param) from error
        except UserError as error:
            raise Refused(400, f"{param}: {error}", param) from error

    def stops(self, values: dict) -> tuple[str, ...]:
        given = typed(values, "stop", str, list)
        given = [given] if isinstance(given, str) else given or []
        if len(given) > MOST_STOPS or not all(isinstance(s, str) and s for s in given):
            raise Refused(400, f"stop: must be a text that is not empty, or a list of at most {MOST_STOPS}", "stop")
        return tuple(given)

    def wants_log_probabilities(self, values: dict, chat: bool) -> bool:
        if chat:
            return bool(typed(values, "logprobs", bool))
        if (asked := typed(values, "logprobs", int)) not in (None, 0):
            raise Refused(400, f"logprobs={asked}: those of other tokens are not implemented; 0 gives the chosen tokens'",
                          "logprobs", "unsupported_parameter")
        return asked == 0

    # ---- What is answered --------------------------------------------------------------------------------------------------

    def models(self) -> dict:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": self.created, "owned_by": "jaxlm",
                                            "max_model_len": self.generator.seq_len}]}

    def head(self, ask: Ask) -> dict:
        """What all parts of one answer begin with."""
        kind = ("chat.completion" + ".chunk" * ask.stream) if ask.chat else "text_completion"
        return {"id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind,
                "created": int(time.time()), "model": self.name}

    def choice(self, ask: Ask, index: int, text: str, tokens: list, finish: str | None, offset: int = 0, **delta) -> dict:
        """Of a whole answer, or of a piece of one that is streamed; tokens: those that `text` adds, after `offset` letters."""
        out: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        if ask.log_probabilities:
            words = [self.tokenizer.decode([token.id]) for token in tokens]
            values = [max(token.log_probability, -9999.0) for token in tokens]
            out["logprobs"] = {"content": [
                {"token": word, "logprob": value, "bytes": None, "top_logprobs": []}
                for word, value in zip(words, values, strict=True)]} if ask.chat else {
                    "tokens": words, "token_logprobs": values, "top_logprobs": None,
                    "text_offset": [offset + sum(map(len, words[:i])) for i in range(len(words))]}
        if not ask.chat:
            return {**out, "text": text}
        return {**out, "delta": {**delta, "content": text}} if ask.stream else {
            **out, "message": {"role": "assistant", "content": text}}

    def usage(self, ask: Ask, completion_tokens: int) -> dict:
        return {"prompt_tokens": ask.prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": ask.prompt_tokens + completion_tokens}


def typed(values: dict, name: str, *kinds: type):
    """values[name], or None where it is left out or null. Raises Refused: another type, or no finite number."""
    given = values[name] if name in values else None
    if given is None:
        return None
    if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
        raise Refused(400, f"{name}: must be of type {' or '.join(KIND_NAMES[kind] for kind in kinds)}", name)
    if isinstance(given, (int, float)) and not (abs(given) < 2**63 and math.isfinite(given)):
        raise Refused(400, f"{name}: is out of range", name)
    return given


def with_text(i: int, message) -> dict:
    """A message whose content is one text, of parts too."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(400, f"messages[{i}]: must be an object with role and content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
                   for part in content):
            raise Refused(400, f"messages[{i}].content: only parts of type text are implemented", "messages")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise Refused(400, f"messages[{i}].content: must be a text", "messages")
    return {**message, "content": content}
