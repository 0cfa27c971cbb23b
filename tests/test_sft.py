"""Fine-tuning on conversations: the loss is on the answers alone, whatever form and template they come in."""

import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from data_cases import shared
from flax import nnx
from test_preference import train
from test_step import tiny

from configs import default
from jaxlm.config import resolve
from jaxlm.data.chat import open_chat_template
from jaxlm.data.examples import conversation
from jaxlm.data.loader import build_data
from jaxlm.data.store import open_store
from jaxlm.objectives.build import build_objective
from jaxlm.train.restore import open_run
from jaxlm.train.state import build_model, flatten_paths

END = "<|im_end|>"
RECORDS = 25


def told_of(store, tokenizer):
    """Of each conversation (text, [what is told, run by run])."""
    edges = [*store.document_starts.tolist(), store.num_tokens]
    for start, stop in itertools.pairwise(edges):
        ids, marks = store.tokens(start, stop), store.marks(start, stop)
        runs = [list(run) for told, run in itertools.groupby(zip(ids, marks, strict=True), lambda pair: bool(pair[1])) if told]
        yield tokenizer.decode(ids, special=True), [tokenizer.decode([i for i, _ in run], special=True) for run in runs]


@pytest.mark.parametrize("tokenizer_name", ["minimind", "qwen2.5"])
@pytest.mark.parametrize("name", ["alpaca_en_demo", "messages_demo", "toolcall_en_demo"])
def test_what_is_told_of_real_conversations_is_their_answers(name, tokenizer_name, tmp_path):
    """Message by message, tool calls too: the answer, its end, and nothing of what the user or a tool says."""
    with gzip.open(shared("instruct", f"{name}.jsonl.gz"), "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, RECORDS)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    c = default.get_config()
    c.data.path, c.data.valid_path, c.data.form = f"{tmp_path}/chat.jsonl", f"{tmp_path}/chat.jsonl", "chat"
    c.data.store_dir, c.data.tokenizer, c.data.workers = str(tmp_path / "stores"), str(shared("tokenizers", tokenizer_name)), 1
    resolve(c)
    stores, tokenizer = open_store(c)
    template = open_chat_template(tokenizer, c.data.tokenizer)
    seen = list(told_of(stores["train"], tokenizer))
    assert len(seen) == RECORDS
    calls = 0
    for record, (text, told) in zip(records, seen, strict=True):
        messages, tools = conversation(record)
        assert text == template.render(messages, tools)
        answers = [m for m in messages if m["role"] == "assistant"]
        assert len(told) == len(answers)
        for message, run in zip(answers, told, strict=True):
            body, end, rest = run.partition(END)
            assert end == END and not rest.strip()
            assert message["content"].strip() in body
            for call in message.get("tool_calls", ()):
                calls += 1
                assert call["function"]["name"] in body and all(k in body for k in call["function"]["arguments"])
        others = [m["content"] for m in messages if m["role"] != "assistant" and len(m["content"]) > 40]
        assert not any(other in run for other in others for run in told)
    assert (calls > 5) == (name == "toolcall_en_demo")


# ---- The loss ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    rng, words = np.random.default_rng(0), "red green blue white black one two three four five".split()
    word = lambda: str(rng.choice(words))
    chats = [{"messages": [{"role": r, "content": f"{word()} {word()}"} for r in ("user", "assistant") * int(rng.integers(1, 4))]}
             for _ in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    train(folder, "run", *chatting(folder), "--config.steps=3")
    return folder


def chatting(folder):
    return ["--config.data.form=chat", f"--config.data.path={folder}/chat.jsonl", "--config.data.tokenizer=byte",
            "--config.optimizer.learning_rate=1e-2", "--config.observe.log_every=1"]


def test_gradients_come_from_the_answers_alone(folder):
    """What the other targets are makes no difference to the gradient; what the answers are does."""
    c = tiny(data__form="chat", data__path=f"{folder}/chat.jsonl", data__store_dir=f"{folder}/stores", data__tokenizer="byte",
             seq_len=96)
    data = build_data(c)
    batch, model, objective = data.train.batch(0), build_model(c, data.vocab_size, "plain"), build_objective(c)
    params = model.init(jax.random.key(0))

    @jax.jit
    def gradient(batch):
        return jax.value_and_grad(lambda p: objective(nnx.merge(model.graph, p), batch)[0])(params)

    told = batch["loss_mask"] > 0
    assert 0.1 < told.mean() < 0.6 and not told[batch["segment_ids"] == 0].any()
    other = np.where(told, batch["targets"], 7)
    (loss, grads), (same, same_grads) = gradient(batch), gradient({**batch, "targets": other})
    assert loss == same
    jax.tree.map(np.testing.assert_array_equal, grads, same_grads)
    another, _ = gradient({**batch, "targets": np.where(told, 7, batch["targets"])})
    assert abs(another - loss) > 0.1


@pytest.mark.parametrize("more", [[], ["--config.model.lora_rank=8", r"--config.model.lora_modules=(attention|feedforward)\..*"]])
def test_a_run_goes_on_from_a_model_with_adapters_or_without(folder, more):
    name = "lora" if more else "full"
    lines = train(folder, name, *chatting(folder), f"--config.model.from_pretrained={folder}/run", "--config.steps=12", *more)
    base = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert lines[-1]["loss"] < base["loss"] - 0.02 and lines[-1]["bits_per_byte"] > 0
    before, after = (flatten_paths(open_run(f"{folder}/{run}").params) for run in ("run", name))
    moved = {path for path in after if path not in before or not np.array_equal(before[path], after[path])}
    assert moved == ({path for path in after if "lora" in path} if more else set(after))

