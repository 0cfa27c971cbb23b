"""Conversations as text: a model's chat template, rendered as transformers does.

A message is a dict with "role" ("system", "user", "assistant", "tool") and "content". The template comes with the tokenizer, in
chat_template.jinja or tokenizer_config.json; a tokenizer without one gets PLAIN.
"""

import datetime
import functools
import json
import pathlib
import secrets

import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxlm.errors import UserError

# "User:", a line with what the user says, "Assistant:", a line with the answer, whose end is the end token where there is one.
PLAIN = """\
{%- if tools %}{{ 'Tools:\\n' + tools | tojson + '\\n' }}{% endif %}
{%- for message in messages %}
    {{- message.role | capitalize + ':\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}
        {%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ eos_token + '\\n' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}
"""
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same, as transformers fills them in
BEGIN, END = (f"\x02{secrets.token_hex(8)}{side}" for side in "[]")  # round an answer while it is looked for; in no text


class ChatTemplate:
    """
    Args:
        text: Jinja.
        tokens: special tokens that it may name: {"bos_token": "<s>", ...}.
        tool_text: the template for conversations with tools, where it is another one.
    """

    def __init__(self, text: str, tokens: dict[str, str], tool_text: str | None = None):
        self.tokens = tokens
        self.text, self.tool_text = text, text if tool_text is None else tool_text
        try:
            self.compiled = {t: environment().from_string(t) for t in (self.text, self.tool_text)}
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja ({error}); mend chat_template in the tokenizer's folder"
                            ) from error

    def render(self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False,
               **options) -> str:
        """add_generation_prompt: end with what an answer begins with. options: what this template knows, such as
        enable_thinking. Raises UserError: messages that the template refuses."""
        return self._render(messages, tools, add_generation_prompt, mark=False, options=options)

    def render_with_answers(self, messages: list[dict], tools: list[dict] | None = None, **options):
        """-> (text, [(begin, end) of each answer in it, with the token that ends it]), by the template's `{% generation %}`.

        Where it has none, an answer is what comes to the text by the assistant's message, after the generation prompt.
        """
        if "endgeneration" in (self.text if tools is None else self.tool_text):
            text, spans = "", []
            for piece in self._render(messages, tools, False, mark=True, options=options).split(BEGIN):
                answer, end, rest = piece.partition(END)
                if end:
                    spans.append((len(text), len(text) + len(answer)))
                text += answer + rest
            return text, spans
        text, spans = self.render(messages, tools, **options), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:i], tools, add_generation_prompt=True, **options)
                after = self.render(messages[: i + 1], tools, **options)
                if not (text.startswith(after) and after.startswith(before)):
                    raise UserError(f"message {i}: the chat template writes an answer otherwise once the conversation goes on, "
                                    "so its place cannot be told; mark answers in the template by {% generation %}, or let "
                                    "each conversation end with its only answer")
                spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages, tools, add_generation_prompt, mark, options) -> str:
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"message {i}: must be an object with role and content, such as "
                                '{"role": "user", "content": "Hello"}')
        if not messages:
            raise UserError("a conversation must have at least one message")
        names = {**self.tokens, **options, "tools": tools, "documents": None, "mark_answers": mark,
                 "add_generation_prompt": add_generation_prompt, "messages": [with_reasoning(m) for m in messages]}
        try:
            names = json.loads(json.dumps(names))  # plain data only: the template may come from anywhere
            return self.compiled[self.text if tools is None else self.tool_text].render(names)
        except Exception as error:  # whatever the template's code raises
            raise UserError(f"the chat template refuses the conversation: {error}") from error


def with_reasoning(message: dict) -> dict:
    """Without what is None, and with the reasoning under the names that templates look for."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class Answers(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which transformers has for what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context, caller):
        return f"{BEGIN}{caller()}{END}" if context["mark_answers"] else caller()


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that lead to Python's own parts."""

    def __init__(*args, **kwargs):
        self, *args = args
        values = dict(*args, **kwargs)
        for name in values:
            Namespace.check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        Namespace.check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} in a namespace")


@functools.cache
def environment() -> jinja2.Environment:
    """What transformers (`utils/chat_template_utils.py`) gives a template."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=[Answers, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, namespace=Namespace, dict=lambda *a, **k: dict(*a, **k),
                        strftime_now=lambda form: datetime.datetime.now().strftime(form))
    return made


# ---- With a tokenizer --------------------------------------------------------------------------------------------------------


def open_chat_template(tokenizer, name: str) -> ChatTemplate:
    """Of the tokenizer that `data.tokenizer` = name: what lies in the folder of its tokenizer.json, or PLAIN."""
    place = pathlib.Path(name)
    folder = place if place.is_dir() else place.parent if place.is_file() else None
    texts = texts_in(folder) if folder else {}
    if not texts:
        return ChatTemplate(PLAIN, {"eos_token": tokenizer.eos_token or ""})
    if "default" not in texts:
        raise UserError(f"{folder}: its chat templates are named {', '.join(sorted(texts))}; name one of them default")
    return ChatTemplate(texts["default"], tokens_in(folder), texts.get("tool_use"))


def texts_in(folder: pathlib.Path) -> dict[str, str]:
    """{name: template}; {} where there is none."""
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        found = file.read_text(encoding="utf-8")
    found = found or read_json(folder / "chat_template.json").get("chat_template")  # of processors
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {"default": found} if found else {}


def tokens_in(folder: pathlib.Path) -> dict[str, str]:
    """{"eos_token": "</s>", ...}, each written as a string or as an object with its content."""
    values = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    values = {name: v["content"] if isinstance(v, dict) and "content" in v else v for name, v in values.items()}
    return {name: v for name, v in values.items() if name.endswith("_token") and isinstance(v, str)}


def read_json(file: pathlib.Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); fetch it again") from error


def encode_chat(tokenizer, text: str) -> list[int]:
    """Ids of a rendered conversation: what it begins with is the template's to say. The end token counts by its name, also where
    a tokenizer reads it letter by letter."""
    ids = lambda part: [int(i) for i in tokenizer.encode(part)[len(tokenizer.first):]]
    end = tokenizer.eos_token
    if end is None or len(ids(end)) == 1:
        return ids(text)
    first, *rest = (ids(part) for part in text.split(end))
    return first + [i for part in rest for i in (tokenizer.eos_id, *part)]


def ends_of_answers(template: ChatTemplate, tokenizer, name: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """-> (ids, strings) that end an answer: the tokenizer's end, those of generation_config.json, and what the template writes
    between an answer and the next question."""
    ids, strings = {tokenizer.eos_id} - {None}, ()
    folder = pathlib.Path(name).parent
    if pathlib.Path(name).is_file():
        listed = read_json(folder / "generation_config.json").get("eos_token_id")
        ids |= {listed} if isinstance(listed, int) else set(listed or ())
        ids |= {tokenizer.token_id(tokens_in(folder).get("eos_token", ""))} - {None}
    question, answer = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
    between = template.render([question, answer, question]).partition("ANSWER")[2].partition("QUESTION")[0]
    following = encode_chat(tokenizer, between.lstrip())
    if following and not tokenizer.decode(following[:1]):  # a special token has no text
        ids.add(following[0])
    elif between.strip():
        strings = (between.rstrip(),)
    return frozenset(ids), strings
