"""Examples: what is told of each record, what is in which row, and that packed examples are as if each were alone."""

import json

import jax
import numpy as np
import pytest
from data_cases import shared, write
from flax import nnx
from tiny_config import make_config

from jaxlm.config import resolve
from jaxlm.data.examples import FORMS, build_form, conversation
from jaxlm.data.formats import Extent
from jaxlm.data.inspect import example_pieces
from jaxlm.data.loader import build_data, deal
from jaxlm.data.packing import build_rows
from jaxlm.data.sources import Skipped, find_files, reading, whole_files
from jaxlm.data.store import open_store
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.errors import UserError
from jaxlm.objectives.build import build_objective
from jaxlm.train.state import build_model
from jaxlm.validation import validate


def told_of(config, record, tokenizer=None):
    """[(what is told, what is given before it)] of a record's documents, as text."""
    tokenizer = tokenizer or ByteTokenizer()
    form = build_form(reading(config), tokenizer)
    out = []
    for ids, marks, _ in form.encode([form.take(record)]):
        assert len(ids) == len(marks)
        runs, borders = [], [0, *(np.flatnonzero(np.diff(np.frombuffer(marks, np.uint8))) + 1).tolist(), len(ids)]
        for a, b in zip(borders, borders[1:], strict=False):
            text = "".join("<end>" if i == tokenizer.eos_id else tokenizer.decode([i]) for i in ids[a:b])
            runs.append(text if marks[a] else f"[[{text}]]")
        out.append(" ".join(runs))
    return out


def test_a_pair_and_a_label(config):
    config.data.form, config.data.prompt, config.data.target = "pair", "{de} => ", "{en}"
    assert told_of(config, {"de": "ja", "en": ["yes", "yeah"]}) == ["[[ja => ]] yes<end>"]
    config.data.form, config.data.prompt, config.data.classes = "label", "{text}", ("bad", "good")
    form = build_form(reading(config), ByteTokenizer())
    (ids, marks, size), = form.encode([form.take({"text": "fine", "label": "good"})])
    assert (ids, list(marks), size) == ([*b"fine", 256, 1], [0, 0, 0, 0, 0, 1], 0)


def test_the_three_forms_of_conversations_are_the_same(config):
    config.data.form = "chat"
    records = [
        {"messages": [{"role": "user", "content": "Hi\nthere"},
                      {"role": "assistant", "content": [{"type": "text", "value": "Yo"}]}]},
        {"conversations": [{"from": "human", "value": "Hi\nthere"}, {"from": "gpt", "value": "Yo"}]},
        {"instruction": "Hi", "input": "there", "output": "Yo"},
        {"prompt": "Hi\nthere", "completion": "Yo"},
    ]
    for record in records:
        assert told_of(config, record) == ["[[User:\nHi\nthere\nAssistant:\n]] Yo<end>\n"], record


def test_of_a_conversation_each_answer_is_told_but_those_of_weight_0(config):
    config.data.form = "chat"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert told_of(config, {"messages": messages}) == [
        "[[User:\na\nAssistant:\n]] b<end>\n [[User:\nc\nAssistant:\n]] d<end>\n"]
    messages[1]["loss_weight"] = 0.0
    assert told_of(config, {"messages": messages}) == ["[[User:\na\nAssistant:\nb<end>\nUser:\nc\nAssistant:\n]] d<end>\n"]


def test_tool_calls_are_told_and_their_results_given(config):
    config.data.form = "chat"
    record = {"tools": '[{"name": "add"}]', "conversations": [
        {"from": "human", "value": "1+1?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two"}]}
    (text,) = told_of(config, record)
    assert text.startswith('[[Tools:\n[{"name": "add"}]\nUser:\n1+1?\nAssistant:\n]] {')
    assert json.loads(text.split("]] ")[1].split("<end>")[0]) == {"name": "add", "arguments": {"a": 1}}
    assert text.endswith("[[Tool:\n2\nAssistant:\n]] Two<end>\n")


def test_a_preference_is_two_documents_whose_last_answers_are_told(config):
    config.data.form = "preference"
    expected = ["[[User:\nq\nAssistant:\n]] good<end>\n", "[[User:\nq\nAssistant:\n]] bad<end>\n"]
    message = lambda text: {"from": "gpt", "value": text}
    question = {"role": "user", "content": "q"}
    for record in ({"conversations": [{"from": "human", "value": "q"}], "chosen": message("good"), "rejected": message("bad")},
                   {"prompt": "q", "chosen": "good", "rejected": "bad"},
                   {"chosen": [question, {"role": "assistant", "content": "good"}],
                    "rejected": [question, {"role": "assistant", "content": "bad"}]}):
        assert told_of(config, record) == expected


@pytest.mark.parametrize("form, record, word", [
    ("pair", {"prompt": "a"}, "no field 'target'"), ("pair", {"prompt": "a", "target": ""}, "is empty"),
    ("label", {"text": "a", "label": "meh"}, "label 'meh' is none of"), ("label", {"text": "a"}, "no label in field 'label'"),
    ("chat", {"text": "a"}, "no conversation"), ("chat", {"messages": [{"role": "user", "content": "a"}]}, "without an answer"),
    ("chat", {"messages": [{"role": "alien", "content": "a"}]}, "a message of 'alien'"),
    ("chat", {"messages": "a"}, "not a list of objects"), ("preference", {"prompt": "q", "chosen": "a"}, "no field 'rejected'")])
def test_a_record_that_does_not_fit_is_told_of_by_file_and_line(config, form, record, word):
    fine = {"pair": {"prompt": "a", "target": "b"}, "label": {"text": "a", "label": "x"},
            "chat": {"prompt": "a", "completion": "b"}, "preference": {"prompt": "q", "chosen": "a", "rejected": "b"}}[form]
    write(config, "a.jsonl", "".join(json.dumps(r) + "\n" for r in (fine, record, fine, fine)))
    config.data.form, config.data.tokenizer, config.data.classes = form, "byte", ("x", "y") if form == "label" else ()
    resolve(config)
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{word}"):
        open_store(config)
    config.data.on_error = "skip"
    stores, _ = open_store(config)
    assert sum(len(store.document_starts) for store in stores.values()) == 3 * FORMS[form].group


def test_real_conversations_and_preferences_are_read(config):
    config.data.form = "chat"
    counts = {}
    for name in ("alpaca_en_demo", "toolcall_en_demo", "messages_demo", "gpteacher_codegen"):
        form, skipped = build_form(reading(config), ByteTokenizer()), Skipped()
        config.data.on_error = "skip"
        form.settings = reading(config)
        items = list(form.read([Extent(str(shared("instruct", f"{name}.jsonl.gz")))], skipped))
        counts[name] = len(items), skipped.count
        assert all(sum(marks) for _, marks, _ in form.encode(items))
    assert counts == {"alpaca_en_demo": (999, 0), "toolcall_en_demo": (300, 0), "messages_demo": (500, 0),
                      "gpteacher_codegen": (4535, 0)}
    config.data.form = "preference"
    items = list(build_form(reading(config), ByteTokenizer()).read(
        [Extent(str(shared("preference", "dpo_en_demo.jsonl")))], Skipped()))
    assert len(items) == 300


# ---- Rows ---------------------------------------------------------------------------------------------------------------------


def pairs(config, count=60, **flags):
    rng = np.random.default_rng(0)
    word = lambda most: "".join(chr(97 + int(i)) for i in rng.integers(0, 26, rng.integers(1, most)))
    records = [{"prompt": word(12), "target": word(9), "label": "xy"[int(rng.integers(2))]} for _ in range(count)]
    write(config, "a.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    config.data.form, config.data.tokenizer, config.seq_len, config.data.source_len = "pair", "byte", 24, 0
    for key, value in flags.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    resolve(config)
    validate(config)
    return records


def texts_in(batch, row, name):
    """{segment: text} of a row."""
    segments = batch["source_segment_ids" if name.startswith("source") else "segment_ids"][row]
    return {int(s): bytes(int(i) for i in batch[name][row][segments == s] if i < 256).decode() for s in np.unique(segments) if s}


@pytest.mark.parametrize("packing", ["best_fit", "one"])
def test_each_pair_is_in_one_row_and_its_target_is_told(config, packing):
    records = pairs(config, data__packing=packing)
    stores, tokenizer = open_store(config)
    seen = []
    for split in ("train", "valid"):
        rows = build_rows(config, stores[split], split, tokenizer)
        batch = rows.take(range(len(rows)))
        assert batch["tokens"].shape == (len(rows), 24)
        for row in range(len(rows)):
            for segment in texts_in(batch, row, "tokens"):
                at = batch["segment_ids"][row] == segment
                np.testing.assert_array_equal(batch["positions"][row][at], np.arange(at.sum()))
                mask = batch["loss_mask"][row][at] > 0
                told, given = batch["targets"][row][at][mask], batch["tokens"][row][at][: int(np.argmax(mask)) + 1]
                assert told[-1] == tokenizer.eos_id
                seen.append((bytes(given.tolist()).decode(), bytes(told[:-1].tolist()).decode()))
            assert packing == "best_fit" or len(np.unique(batch["segment_ids"][row])) <= 2
            assert not batch["loss_mask"][row][batch["segment_ids"][row] == 0].any()
    assert sorted(seen) == sorted((r["prompt"], r["target"]) for r in records)


def test_an_encoder_decoder_gets_what_is_given_apart(config):
    records = pairs(config, data__source_len=16, model__family="encoder_decoder", objective__name="seq2seq")
    stores, tokenizer = open_store(config)
    rows = build_rows(config, stores["train"], "train", tokenizer)
    batch = rows.take(range(len(rows)))
    assert batch["source_tokens"].shape == (len(rows), 16)
    found = {}
    for row in range(len(rows)):
        sources = texts_in(batch, row, "source_tokens")
        for segment in texts_in(batch, row, "tokens"):
            at = batch["segment_ids"][row] == segment
            tokens, targets = batch["tokens"][row][at], batch["targets"][row][at]
            assert tokens[0] == tokenizer.eos_id == targets[-1] and batch["loss_mask"][row][at].all()
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            found[sources[segment]] = bytes(targets[:-1].tolist()).decode()
    assert found == {r["prompt"]: r["target"] for r in records[: len(found)]}


def test_what_is_too_long_is_cut_as_its_form_says(config):
    config.seq_len, config.data.tokenizer, config.data.valid_fraction = 8, "byte", 0.3
    resolve(config)
    write(config, "a.jsonl", "".join(json.dumps({"prompt": "p" * n, "target": "t" * m, "label": "x"}) + "\n"
                                     for n, m in ((20, 3), (3, 20), (1, 1))))
    config.data.form = "pair"
    resolve(config)
    stores, tokenizer = open_store(config)
    rows = build_rows(config, stores["train"], "train", tokenizer)
    batch = rows.take(range(len(rows)))
    assert rows.num_cut == 2 and "2 examples cut to fit" in rows.about()[0]
    assert {bytes(i for i in row if i < 256).decode() for row in batch["targets"].tolist()} == {"pppp" "ttt", "t" * 8}
    config.data.form, config.data.classes, config.data.prompt = "label", ("x",), "{prompt}"
    stores, tokenizer = open_store(config)
    rows = build_rows(config, stores["train"], "train", tokenizer)
    batch = rows.take(range(len(rows)))
    assert (batch["loss_mask"].sum(1) >= 1).all() and not batch["targets"][batch["loss_mask"] > 0].any()


def test_preferences_stay_side_by_side(config):
    config.seq_len, config.data.form, config.data.tokenizer = 96, "preference", "byte"
    resolve(config)
    write(config, "a.jsonl", "".join(json.dumps({"prompt": f"q{i}", "chosen": f"yes{i}", "rejected": f"no{i}"}) + "\n"
                                     for i in range(20)))
    stores, tokenizer = open_store(config)
    assert all(len(store.document_starts) % 2 == 0 for store in stores.values())
    rows = build_rows(config, stores["train"], "train", tokenizer)
    batch = rows.take(range(len(rows)))
    for row in range(len(rows)):
        texts = texts_in(batch, row, "tokens")
        assert len(texts) % 2 == 0
        for segment in range(1, len(texts), 2):
            assert texts[segment].replace("yes", "no") == texts[segment + 1]


def test_a_preference_that_is_too_long_loses_the_beginning_of_its_prompt_then_the_end_of_an_answer(config):
    """Half of a row of 40 has room for 21 tokens (20 targets): all of it, or 10 of a prompt and 11 of an answer."""
    config.seq_len, config.data.form, config.data.tokenizer, config.data.valid_fraction = 40, "preference", "byte", 0.2
    config.data.packing = "one"
    resolve(config)
    q = "0123456789abcdefghij"
    cases = [("q", "yes", "no"), (q, "yes", "no"), (q, "y" * 30, "n"), ("q", "y" * 30, "n" * 40), ("q", "a", "b")]
    write(config, "a.jsonl", "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), case, strict=True))) + "\n"
                                     for case in cases))
    stores, tokenizer = open_store(config)
    rows = build_rows(config, stores["train"], "train", tokenizer)
    store, starts = stores["train"], [*stores["train"].document_starts.tolist(), stores["train"].num_tokens]
    assert len(rows) == 4
    lost = np.zeros(2, int)
    for example in range(4):
        whole = [(store.tokens(*starts[i : i + 2]), store.marks(*starts[i : i + 2])) for i in (2 * example, 2 * example + 1)]
        given = [int(np.argmax(marks)) for _, marks in whole]
        longest = max(len(ids) - n for (ids, _), n in zip(whole, given, strict=True))
        keep = max(21 - longest, 10)  # of the prompt
        batch = rows.take([example])
        for segment, ((ids, marks), n) in enumerate(zip(whole, given, strict=True), 1):
            prompt, answer = ids[max(0, n - keep) : n], ids[n:][: 21 - min(n, keep)]
            at = batch["segment_ids"][0] == segment
            np.testing.assert_array_equal(batch["tokens"][0][at], np.concatenate([prompt, answer])[:-1])
            np.testing.assert_array_equal(batch["targets"][0][at][batch["loss_mask"][0][at] > 0],
                                          answer[marks[n:][: len(answer)] > 0])
        lost += [min(given) > keep, any(len(ids) - n > 21 - min(n, keep) for (ids, _), n in zip(whole, given, strict=True))]
    assert f"{lost[0]} lost the beginning of the prompt, {lost[1]} the end of an answer" in rows.about()[0] and lost.min() > 0


def test_every_nth_is_held_out_and_folds_have_each_class_evenly(config):
    records = pairs(config, count=57, data__form="label", data__classes=("x", "y"), data__valid_every=10,
                    data__prompt="{prompt}")
    stores, tokenizer = open_store(config)
    text = lambda store, i: bytes(store.tokens(*np.append(store.document_starts, store.num_tokens)[i : i + 2].tolist())[:-2]
                                  .tolist()).decode()
    assert [text(stores["valid"], i) for i in range(len(stores["valid"].document_starts))] == [
        r["prompt"] for i, r in enumerate(records) if i % 10 == 9]
    fold = deal(stores["train"], 3)
    labels = np.array([r["label"] for i, r in enumerate(records) if i % 10 != 9])
    for label in "xy":
        counts = np.bincount(fold[labels == label], minlength=3)
        assert counts.max() - counts.min() <= 1
    config.data.folds, seen = 3, []
    for config.data.fold in range(3):
        data = build_data(config)
        held, kept = (len(part.rows.examples) for part in (data.valid, data.train))
        assert held + kept == len(labels) and not set(data.valid.rows.examples) & set(data.train.rows.examples)
        seen += data.valid.rows.examples.tolist()
    assert sorted(seen) == list(range(len(labels)))


def test_inspect_shows_what_is_given_and_what_is_told(config):
    records = pairs(config, data__form="label", data__classes=("x", "y"), data__prompt="{prompt}")
    data = build_data(config)
    rows = {name: a[0] for name, a in data.train.rows.take([0]).items()}
    shown = example_pieces(rows, data.tokenizer, config.data.classes)
    known = {(r["prompt"], r["label"]) for r in records}
    documents = [(a["text"], b["text"]) for a, b in zip(shown, shown[1:], strict=False) if b["kind"] == "target"]
    assert set(documents) <= known and len(documents) == rows["loss_mask"].sum()
    config.data.form, config.data.classes, config.data.prompt = "pair", (), "{prompt}"
    config.model.family, config.objective.name = "encoder_decoder", "seq2seq"
    resolve(config)
    data = build_data(config)
    shown = example_pieces({name: a[0] for name, a in data.train.rows.take([0]).items()}, data.tokenizer)
    assert (shown[0]["text"], shown[2]["text"]) in {(r["prompt"], r["target"]) for r in records}


def test_parallel_files_are_read_together_and_unequal_ones_refused(config):
    write(config, "a.de", "eins\nzwei\n\ndrei\n" * 3)
    write(config, "a.en", "one\ntwo\n\nthree\n" * 3)
    config.data.path, config.data.form, config.data.parallel = "a", "pair", ("de", "en")
    config.data.prompt, config.data.target, config.data.tokenizer = "{de}", "{en}", "byte"
    config.data.on_error = "skip"
    settings = reading(config)
    form, skipped = build_form(settings, ByteTokenizer()), Skipped()
    files = find_files(config, "a", "data.path")
    items = list(form.read(whole_files(config, files), skipped))
    assert [item[0][0][0] + "=" + item[0][1][0] for item in items[:3]] == ["eins=one", "zwei=two", "drei=three"]
    assert len(items) == 9 and skipped.count == 3
    write(config, "a.en", "one\n")
    config.data.path, config.data.on_error = "a", "stop"
    resolve(config)
    with pytest.raises(UserError, match="more lines than"):
        open_store(config)


def test_the_test_split_teaches_the_tokenizer_nothing(config):
    write(config, "test.jsonl", json.dumps({"prompt": "zzzzzz zzzzzz zzzzzz", "target": "z"}) + "\n")
    pairs(config, data__tokenizer="bpe", data__bpe_vocab_size=300, data__test_path="test.jsonl")
    stores, with_test = open_store(config)
    assert len(stores["test"].document_starts) == 1
    config.data.test_path = ""
    assert open_store(config)[1].to_json() == with_test.to_json()


# ---- The loss -----------------------------------------------------------------------------------------------------------------


def losses(config, batch):
    """nll of each row."""
    objective, model = build_objective(config), build_model(config, 300, "plain")
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def total(batch):
        _, weight, aux = objective(nnx.merge(model.graph, params), batch)
        return aux["nll"], weight

    return [tuple(map(float, total({name: a[i : i + 1] for name, a in batch.items()}))) for i in range(len(batch["tokens"]))]


@pytest.mark.parametrize("flags", [
    dict(objective__name="next_token"), dict(objective__name="seq2seq", model__family="encoder_decoder"),
    *(dict(data__form="label", objective__name="classification", data__prompt="{prompt}", data__classes=("x", "y"),
           model__family=family, model__pooling=pooling) for family, pooling in (("decoder", "last"), ("encoder", "first"),
                                                                              ("encoder", "mean")))])
def test_packed_examples_have_the_loss_that_they_have_alone(config, flags):
    tiny = make_config(num_layers=2, embed_dim=16, num_heads=2)
    config.model.update(tiny.model)
    pairs(config, count=40, **flags)
    stores, tokenizer = open_store(config)
    sums = []
    for packing in ("best_fit", "one"):
        config.data.packing = packing
        rows = build_rows(config, stores["train"], "train", tokenizer)
        sums.append(np.sum(losses(config, rows.take(range(len(rows)))), axis=0))
    np.testing.assert_allclose(sums[0], sums[1], rtol=2e-6)


def test_class_weights_weigh_the_loss_and_not_the_accuracy(config):
    tiny = make_config(num_layers=1, embed_dim=16, num_heads=2)
    config.model.update(tiny.model)
    pairs(config, count=40, data__form="label", objective__name="classification", data__prompt="{prompt}",
          data__classes=("x", "y"))
    stores, tokenizer = open_store(config)
    rows = build_rows(config, stores["train"], "train", tokenizer)
    batch = rows.take(range(len(rows)))
    labels = batch["targets"][batch["loss_mask"] > 0]
    each = {}
    for weights in ((), (1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        config.objective.class_weights = weights
        each[weights] = np.sum(losses(config, batch), axis=0)
    np.testing.assert_allclose(each[(2.0, 3.0)], 2 * each[(1.0, 0.0)] + 3 * each[(0.0, 1.0)], rtol=1e-5)
    np.testing.assert_allclose(each[()], each[(1.0, 0.0)] + each[(0.0, 1.0)], rtol=1e-5)
    assert each[(1.0, 0.0)][1] == np.sum(labels == 0)


def test_conversation_needs_an_answer_or_is_open():
    assert conversation({"prompt": "q"}, open_=True)[0] == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("flags, word", [
    (dict(data__form="label"), "data.classes=()"), (dict(data__parallel=("de", "en")), "data.parallel"),
    (dict(data__folds=3), "data.folds=3"), (dict(objective__name="seq2seq"), "objective.name"),
    (dict(objective__class_weights=(1.0, 2.0)), "class_weights"), (dict(model__num_classes=2), "model.num_classes=2"),
    (dict(data__form="label", data__classes=("a", "b"), objective__name="classification", objective__class_weights=(1.0,)),
     "class_weights")])
def test_what_does_not_fit_together_is_named(config, flags, word):
    for key, value in flags.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    resolve(config)
    with pytest.raises(UserError) as error:
        validate(config)
    assert any(word in problem for problem in error.value.problems), error.value.problems
