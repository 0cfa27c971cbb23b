"""Conversations as text: templates as transformers renders them, where the answers are, what ends them; `jaxlm chat`."""

import importlib.util
import io
import json
import os
import pathlib
import string
import types

import pytest
from test_generate import GREEDY, model_of
from test_step import tiny

from jaxlm.data.chat import PLAIN, ChatTemplate, encode_chat, ends_of_answers, open_chat_template
from jaxlm.data.tokenizers import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer
from jaxlm.errors import UserError
from jaxlm.generate.chat import Conversation, chat
from jaxlm.generate.decoding import Request
from jaxlm.train.restore import Run

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chat.json"  # what transformers 5.24 answered
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' -}}
{% endif %}
""",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
              "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
              "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}"
             "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
             "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
             "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + "
             "role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "qwen": """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content is string %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content if message.content is string else '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""",
    "marked": "{% for m in messages %}"
              "{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
              "\n{% else %}{{ m.role | upper }}: {{ m.content }}\n{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%Y') | length }}{{ messages | tojson(indent=2) }}{{ dict(a=1) | tojson }}{{ unk_token }}",
}
TURNS = [{"role": "user", "content": " Hi <b>\"there\"</b> & 你好 "}, {"role": "assistant", "content": "Hello!\n", "name": None},
         {"role": "user", "content": "Bye"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <two>", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
CALLS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
         {"role": "assistant", "content": None, "reasoning": "easy\n", "tool_calls": [
             {"function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}]},
         {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Thanks"}]
CASES = {
    **{f"{name} {prompt}": (name, TURNS, dict(add_generation_prompt=prompt)) for name in TEMPLATES for prompt in (False, True)},
    "qwen tools": ("qwen", CALLS, dict(tools=[TOOL], add_generation_prompt=True, enable_thinking=False)),
    "qwen system": ("qwen", CALLS, dict(add_generation_prompt=True, enable_thinking=True)),
    "mistral system": ("mistral", [CALLS[0], *TURNS], {}),
    "chatml system": ("chatml", [CALLS[0], *TURNS], {}),
}


def theirs():
    """A tokenizer of transformers, only to render."""
    import tokenizers
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **TOKENS)


@pytest.mark.parity
def test_templates_render_as_in_transformers():
    rendered = {}
    for case, (name, messages, options) in CASES.items():
        rendered[case] = ChatTemplate(TEMPLATES[name], TOKENS).render(messages, **options)
    if os.environ.get("JAXLM_UPDATE_GOLDEN") or importlib.util.find_spec("transformers"):
        answered = {case: theirs().apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
                    for case, (name, messages, options) in CASES.items()}
        if os.environ.get("JAXLM_UPDATE_GOLDEN"):
            GOLDEN.write_text(json.dumps(answered, indent=1, ensure_ascii=False) + "\n")
        assert rendered == answered
    assert rendered == json.loads(GOLDEN.read_text())


def test_what_a_template_refuses_is_told():
    for template, messages, said in (
            (TEMPLATES["gemma"], CALLS, "System role not supported"), (TEMPLATES["gemma"], [TURNS[1]], "must alternate"),
            (TEMPLATES["chatml"], [], "at least one"), (TEMPLATES["chatml"], ["Hi"], "message 0: must be an object"),
            (TEMPLATES["chatml"], [{"content": "Hi"}], "message 0"), (TEMPLATES["chatml"], [{"role": "user"}], "refuses"),
            ("{{ messages.append(1) }}", TURNS, "unsafe|not safely"),
            ("{{ ''.__class__.__mro__ }}", TURNS, "unsafe"), ("{% set n = namespace(_a=1) %}", TURNS, "may not set '_a'")):
        with pytest.raises(UserError, match=said):
            ChatTemplate(template, TOKENS).render(messages)
    with pytest.raises(UserError, match="not valid Jinja"):
        ChatTemplate("{% for %}", TOKENS)


def test_answers_are_found_by_their_mark_or_by_what_they_add():
    turns = [*TURNS, {"role": "assistant", "content": "So long"}]
    for name, expected in (("marked", ["Hello!\n</s>", "So long</s>"]),
                           ("chatml", ["Hello!\n<|im_end|>\n", "So long<|im_end|>\n"]),
                           ("llama3", ["Hello!<|eot_id|>", "So long<|eot_id|>"]), ("mistral", [" Hello!</s>", " So long</s>"])):
        template = ChatTemplate(TEMPLATES[name], TOKENS)
        text, spans = template.render_with_answers(turns)
        assert text == template.render(turns) and [text[a:b] for a, b in spans] == expected, name
    changing = "{% for m in messages %}{{ m.role }}{% if loop.last %} last{% endif %}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="message 1.*generation"):
        ChatTemplate(changing, TOKENS).render_with_answers(turns)


@pytest.mark.parity("transformers")
def test_marked_answers_are_those_of_transformers():
    tokenizer = theirs()
    turns = [*TURNS, {"role": "assistant", "content": "So long"}]
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template([turns], chat_template=TEMPLATES["marked"], return_assistant_tokens_mask=True,
                                         **tokenizer.special_tokens_map)
    assert ChatTemplate(TEMPLATES["marked"], TOKENS).render_with_answers(turns) == (texts[0], spans[0])


def words(*special):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in special])
    return inner


@pytest.mark.parametrize("form", ["config", "list", "jinja", "processor"])
def test_a_template_comes_with_its_tokenizer(tmp_path, form):
    words("</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eom|>").save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": True}
    if form == "config":
        config["chat_template"] = TEMPLATES["chatml"]
    if form == "list":
        config["chat_template"] = [{"name": "default", "template": TEMPLATES["chatml"]},
                                   {"name": "tool_use", "template": TEMPLATES["qwen"]}]
    if form == "jinja":
        config["chat_template"] = "old"
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    if form == "processor":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["chatml"]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [260, 256]}))
    name = str(tmp_path / "tokenizer.json")
    tokenizer = HuggingFaceTokenizer((tmp_path / "tokenizer.json").read_text())
    template = open_chat_template(tokenizer, name)
    assert template.text == TEMPLATES["chatml"] and template.tokens == TOKENS
    assert ("# Tools" in template.render(TURNS, tools=[TOOL])) == (form == "list")
    ids, strings = ends_of_answers(template, tokenizer, name)
    assert strings == () and {tokenizer.inner.id_to_token(i) for i in ids} == {"</s>", "<|im_end|>", "<|eom|>"}


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    turns = [*TURNS, {"role": "assistant", "content": "So long"}]
    template = open_chat_template(ByteTokenizer(), "byte")
    text, spans = template.render_with_answers(turns)
    assert text.startswith("User:\n Hi <b>") and [text[a:b] for a, b in spans] == [
        "Hello!\n<|endoftext|>\n", "So long<|endoftext|>\n"]
    ids = encode_chat(ByteTokenizer(), text)
    assert ids.count(256) == 2 and ByteTokenizer().decode(ids) == text.replace("<|endoftext|>", "")
    assert ends_of_answers(template, ByteTokenizer(), "byte") == (frozenset({256}), ())
    letters = CharTokenizer("".join(sorted(set("User:\nAssistant:\nQUESTIONANSWER hi"))))
    template = open_chat_template(letters, "char")
    assert template.text == PLAIN and template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True) == (
        "User:\nhi\nAssistant:\n")
    assert ends_of_answers(template, letters, "char") == (frozenset(), ("\nUser:",))


# ---- The conversation --------------------------------------------------------------------------------------------------------

LETTERS = CharTokenizer("".join(sorted("\n !,.:?" + string.ascii_letters)))


@pytest.fixture(scope="module")
def run():
    model, params = model_of(seq_len=96)
    return Run(tiny(seq_len=96), model, params, types.SimpleNamespace(tokenizer=LETTERS), None, 0)


def test_an_answer_goes_on_from_the_whole_conversation_and_the_oldest_is_left_out_when_it_is_full(run, capsys):
    talk = Conversation(run, 12, GREEDY, system="Be brief")
    prompts, add = [], talk.session.add
    talk.session.add = lambda texts: prompts.append(texts[0][1]) or add(texts)
    answers = ["".join(talk.answer(text)) for text in ("Hi", "Who?", "Why?")]
    texts = [LETTERS.decode(r.prompt) for r in prompts]
    assert texts[0] == "System:\nBe brief\nUser:\nHi\nAssistant:\n"
    assert texts[1] == texts[0] + answers[0] + "\nUser:\nWho?\nAssistant:\n"
    assert texts[2] == f"System:\nBe brief\nUser:\nWho?\nAssistant:\n{answers[1]}\nUser:\nWhy?\nAssistant:\n"
    assert "2 messages at the beginning are left out" in capsys.readouterr().err
    for request, answer in zip(prompts, answers, strict=True):
        alone = [t.id for t in talk.generator.stream(run.params, [Request(request.prompt, 12, GREEDY)])]
        assert LETTERS.decode(alone).startswith(answer) and answer
    before = talk.messages
    with pytest.raises(UserError, match="context is 96"):
        list(talk.answer("a" * 90))
    assert talk.messages == before
    pieces = talk.answer("Go on")
    first = next(pieces)
    talk.interrupted = True
    rest = list(pieces)
    assert len(rest) <= 1 and talk.messages[-1] == {"role": "assistant", "content": first + "".join(rest)}
    assert not talk.session.busy


def test_without_a_terminal_each_line_is_a_message(run, monkeypatch, capsys):
    said = []
    for lines in ("Hi\n\n/seed 3\nWho?\n/reset\nHi\n/quit\nnot read\n", "/system Be brief\nHi", "/help\n/seed x\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        chat(run, 8, GREEDY)
        out = capsys.readouterr()
        said.append(out.out)
        assert ("(seed 3)" in out.err) == ("/seed 3" in lines) and ("/reset" in out.err) == ("/help" in lines)
    talk = Conversation(run, 8, GREEDY)
    first = "".join(talk.answer("Hi")) + "\n"
    assert said[0] == first + "".join(talk.answer("Who?")) + "\n" + first
    assert said[1] == "".join(Conversation(run, 8, GREEDY, system="Be brief").answer("Hi")) + "\n" and said[2] == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 99))
    with pytest.raises(UserError, match="context"):
        chat(run, 8, GREEDY)
