"""Sequence to sequence end to end, tiny: rows, objective, answers of both families, from Python and the command line."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from configs import default
from jaxlm import cli
from jaxlm.config import load, resolve
from jaxlm.data.loader import build_data
from jaxlm.errors import UserError
from jaxlm.evaluate.answers import Answers, read_split
from jaxlm.generate.beam import BeamSearch
from jaxlm.generate.decoding import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from jaxlm.objectives.build import build_objective
from jaxlm.train.loop import train
from jaxlm.train.restore import open_run
from jaxlm.train.state import build_model
from jaxlm.validation import validate

WORDS = "ab cd ef gh ij kl mn op".split()


def write_pairs(folder) -> None:
    """To learn: each word the other way round."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("val", 5), ("test", 7)):
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(count)]
        (folder / f"{name}.x").write_text("".join(text + "\n" for text in texts))
        (folder / f"{name}.y").write_text("".join(" ".join(word[::-1] for word in text.split()) + "\n" for text in texts))


def config_of(folder, family="encoder_decoder", **keys):
    c = default.get_config()
    c.data.root, c.data.store_dir = str(folder), str(folder / "stores")
    c.data.path, c.data.valid_path, c.data.test_path = "train", "val", "test"
    c.data.form, c.data.parallel = "pair", ("x", "y")
    c.data.prompt, c.data.target = "{x} = " if family == "decoder" else "{x}", "{y}"
    c.data.tokenizer, c.seq_len, c.batch_size, c.steps = "byte", 32, 4, 4
    c.mesh.data = 1
    c.model.family, c.objective.name = family, "seq2seq" if family == "encoder_decoder" else "next_token"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 16, 2
    c.eval.text_metrics, c.eval.max_new_tokens, c.eval.answers = ("bleu", "chrf"), 12, 3
    c.observe.progress, c.observe.report, c.observe.compile_cache = "none", False, False
    for key, value in keys.items():
        group, _, leaf = key.rpartition("__")
        setattr(c[group] if group else c, leaf, value)
    resolve(c)
    validate(c)
    return c


def losses(config):
    """(sums over all rows of the validation split, number of rows)."""
    data = build_data(config)
    model, objective = build_model(config, data.vocab_size, "plain"), build_objective(config)
    params = jax.tree.map(lambda a: a + 0.2 * np.cos(np.arange(a.size).reshape(a.shape)), model.init(jax.random.key(0)))
    batch = data.valid.rows.take(range(len(data.valid.rows)))
    loss, weight, aux = jax.jit(lambda params, batch: objective(nnx.merge(model.graph, params), batch))(params, batch)
    return np.array([loss, weight, aux["nll"]]), len(data.valid.rows)


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder"])
def test_rows_of_several_examples_give_the_loss_of_one_a_row(family, tmp_path):
    write_pairs(tmp_path)
    (packed, few), (alone, many) = (losses(config_of(tmp_path, family, data__packing=packing)) for packing in ("best_fit", "one"))
    assert few < many == 5
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_beams_side_by_side_are_those_of_each_alone_and_greedy_is_one_beam(tmp_path):
    """Past the growing of the cache (from 16 places), more requests than at once, of unequal length."""
    write_pairs(tmp_path)
    config = config_of(tmp_path, data__source_len=48)
    model = build_model(config, 257, "plain")
    params = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(1)))
    prompts, generator = Prompts(config, build_data(config).tokenizer), Generator(model, 257, 32, 48)
    requests = [prompts.request(text, Sampling(temperature=0.0))._replace(num_tokens=20)
                for text in ("ab cd ef", "x" * 40, "gh", "op mn kl ij gh", "ab")]
    search = BeamSearch(generator, 3, 0.7)
    together = search.search(params, requests, at_once=2)
    alone = [search.search(params, [request])[0] for request in requests]
    for ours, theirs in zip(together, alone, strict=True):
        assert [h.ids for h in ours] == [h.ids for h in theirs]
        np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], rtol=1e-4)

    @jax.jit
    def read(source, ids):
        module = nnx.merge(model.graph, params)
        return module.logits(module.hidden(ids, memory=module.encode(source))[0])

    for request, found in zip(requests, together, strict=True):  # the score is that of the whole text, read at once
        ids = np.array([request.prompt + found[0].ids])
        logits = np.asarray(read(np.array([request.source]), ids[:, :-1]))[0, :, :257]
        total = np.take_along_axis(log_softmax(logits, axis=-1), ids[0, 1:, None], 1).sum()
        np.testing.assert_allclose(found[0].score * 20**0.7, total, rtol=1e-4)


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder"])
def test_train_eval_and_generate(family, tmp_path, capsys):
    write_pairs(tmp_path)
    config, workdir = config_of(tmp_path, family), tmp_path / "run"
    train(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all({"bleu", "chrf", "loss"} <= set(line) for line in lines if line["split"] == "valid/all")
    capsys.readouterr()
    told = {}
    for beams in (1, 2):
        assert cli.main(["eval", f"--workdir={workdir}", "--split=test", "--json", f"--config.eval.beams={beams}"]) == 0
        told[beams] = json.loads(capsys.readouterr().out)
        kept = [json.loads(line) for line in (workdir / "predictions-test.jsonl").read_text().splitlines()]
        assert [one["references"] for one in kept] == [[y] for y in (tmp_path / "test.y").read_text().splitlines()]
        assert told[beams]["answers"] == 7 and told[beams]["cut_prompts"] == 0 and "version:" in told[beams]["bleu_signature"]
    import sacrebleu

    right = [one["references"][0] for one in kept]
    assert told[2]["chrf"] == sacrebleu.corpus_chrf([one["answer"] for one in kept], [right]).score
    text = (tmp_path / "test.x").read_text().splitlines()[0]
    assert cli.main(["generate", f"--workdir={workdir}", f"--prompt={text}", "--beams=2", "--tokens=12", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["prompt"] == text and out["text"].strip() == kept[0]["answer"]
    assert cli.main(["generate", f"--workdir={workdir}", f"--prompt={'ab ' * 40}", "--temperature=0"]) == 0
    assert "1 of 1 prompts lost their end" in capsys.readouterr().err


def test_an_answer_is_what_was_learned(tmp_path):
    """A model that has learnt its twelve examples by heart answers them right."""
    (tmp_path / "train.x").write_text("".join(f"{word}\n" for word in WORDS))
    (tmp_path / "train.y").write_text("".join(f"{word[::-1]}\n" for word in WORDS))
    for ending in "xy":
        (tmp_path / f"val.{ending}").write_text((tmp_path / f"train.{ending}").read_text())
    config = config_of(tmp_path, data__test_path="", steps=60, model__embed_dim=32, optimizer__learning_rate=1e-2,
                       optimizer__weight_decay=0.0, eval__every_steps=0, eval__beams=2)
    train(config, str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    answers = Answers(run.config, run.model, run.data, "valid")
    assert answers.write(run.params) == [word[::-1] for word in WORDS]
    assert answers.score(answers.write(run.params))["chrf"] == pytest.approx(100)


def test_the_examples_of_a_split_are_those_of_its_store(tmp_path):
    """Held out by share, by every n-th, by folds: what the store's rows hold, and lists have several right answers."""
    records = [{"s": f"source {i}", "t": [f"target {i}", f"other {i}"]} for i in range(20)]
    records[3]["t"] = [""]  # left out
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for keys in (dict(data__valid_fraction=0.2), dict(data__valid_every=4), dict(data__folds=3, data__fold=1)):
        config = config_of(tmp_path, data__path="all.jsonl", data__valid_path="", data__test_path="", data__parallel=(),
                           data__prompt="{s}", data__target="{t}", data__on_error="skip", **keys)
        data = build_data(config)
        asked = read_split(config, data, "valid")
        rows = data.valid.rows
        stored = [bytes(np.asarray(rows.document(i)[0][:-1], np.uint8).tolist()).decode() for i in rows.examples]
        assert stored == [one.prompt + one.references[0] for one in asked] and asked
        assert all(len(one.references) == 2 for one in asked)


# ---- What is wrong ----------------------------------------------------------------------------------------------------------


def test_a_source_that_is_too_long_is_cut_and_counted(tmp_path):
    write_pairs(tmp_path)
    config = config_of(tmp_path, data__source_len=10)
    prompts = Prompts(config, build_data(config).tokenizer)
    assert prompts.request("0123456789", Sampling()).source == [*b"012345678", 256] and prompts.num_cut == 1
    assert prompts.request("abc", Sampling()).source == [*b"abc", 256] and prompts.num_cut == 1
    assert "1 of 2 prompts" in prompts.about_cut(2) and "data.source_len" in prompts.about_cut(2)
    rows = build_data(config).test.rows
    cut, number = rows.take([0])["source_tokens"][0], int(rows.examples[rows.order[0]])
    text = (tmp_path / "test.x").read_text().splitlines()[number]
    assert prompts.request(text, Sampling()).source == cut[: int(np.argmax(cut == 256)) + 1].tolist()


def test_an_empty_prompt_is_refused(tmp_path):
    write_pairs(tmp_path)
    config = config_of(tmp_path)
    model = build_model(config, 257, "plain")
    with pytest.raises(UserError, match="prompt is empty"):
        Generator(model, 257, 32).check(Prompts(config, build_data(config).tokenizer).request("", Sampling()))
    (tmp_path / "bad.jsonl").write_text('{"s": "a", "t": "b"}\n{"s": "", "t": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: data.prompt='\{s\}' is empty"):
        build_data(config_of(tmp_path, data__path="bad.jsonl", data__parallel=(), data__prompt="{s}", data__target="{t}",
                             data__valid_path="", data__test_path=""))


@pytest.mark.parametrize("keys, said", [
    (dict(eval__text_metrics=("blue",)), "unknown 'blue'; did you mean bleu"), (dict(eval__beams=0), "eval.beams=0"),
    (dict(eval__text_metrics=()), "eval.answers=3"), (dict(eval__max_new_tokens=32), "must be below seq_len"),
    (dict(data__form="text", data__parallel=()), "need data.form=pair")])
def test_keys_that_do_not_fit(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        config_of(tmp_path, **keys)


@pytest.mark.parametrize("name", ["multi30k_translation", "scitldr_summary", "csl_summary_zh"])
def test_recipes_are_right(name):
    assert load(f"configs/tasks/{name}.py").data.form == "pair"
