"""jaxlm replay: a step once more has the run's own bits, its batch and its losses; what cannot be is said in a line."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from classified import classified, write_rows

from configs import default
from jaxlm.cli import main
from jaxlm.config import resolve
from jaxlm.data.inspect import inspect
from jaxlm.data.loader import build_data
from jaxlm.research import replay_page
from jaxlm.research.replay import replay, row_of
from jaxlm.train.loop import train


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of 6 steps with dropout; checkpoints at 2, 4, 6, a line of metrics at 3 and 6."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "a.txt").write_text("the cat sat on the mat, and then the dog sat on the cat.\n" * 40)
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 6, 4, 16
    c.data.path, c.data.store_dir, c.data.tokenizer = str(folder / "a.txt"), str(folder / "stores"), "char"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.dropout = 1, 16, 2, 0.1
    c.mesh.data, c.observe.progress, c.observe.report, c.observe.log_every = 1, "none", False, 3
    with c.ignore_type():
        c.checkpoint.every_steps, c.checkpoint.keep, c.eval.every_steps, c.eval.batches = 2, 5, 0, 1
    resolve(c)
    train(c, str(folder / "run"))
    return folder / "run"


def test_it_is_the_runs_step_with_its_batch_and_the_loss_of_each_token(ran, capsys):
    assert main(["replay", f"--workdir={ran}", "--step=5", "--rows=3"]) == 0
    said = capsys.readouterr().out
    assert "the same bit for bit: loss and grad_norm of step 6 from checkpoint 4" in said and "replay-5.html" in said
    found = json.loads((ran / "replay-5.json").read_text())
    assert found["step"] == 5 and found["from_checkpoint"] == 4 and found["difference"] is None and found["compared"] == [6]
    losses = [loss for row in found["rows"] for loss in row["losses"]]
    assert len(losses) == 4 * 16 and np.mean(losses) == pytest.approx(found["metrics"]["loss"], rel=1e-5)  # dropout included
    assert [row["loss"] for row in found["rows"]] == sorted((row["loss"] for row in found["rows"]), reverse=True)
    seen = {row["row"]: row for row in inspect(str(ran), "", 5, 0)["rows"]}
    for row in found["rows"]:
        assert "".join(span["text"] for span in row["spans"]) == "".join(p["text"] for p in seen[row["row"]]["pieces"])
        assert [span["loss"] for span in row["spans"] if span["loss"] is not None] == row["losses"]
    worst = found["worst"][0]
    assert worst["loss"] == max(losses) and worst["probability"] == pytest.approx(np.exp(-worst["loss"]))
    assert found["internals"]["layers/0/attention/grad_rms"] > 0
    page = (ran / "replay-5.html").read_text()
    assert page.count('class="row"') == 3 and "http" not in page.replace("http://www.w3.org", "")
    shown = found["rows"][0]["losses"]
    assert f'title="{max(shown):.3f} nats, place {shown.index(max(shown))}"' in page


def test_a_run_that_went_another_way_is_told_by_its_first_difference(ran, tmp_path, capsys):
    shutil.copytree(ran, tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    for line in lines:
        if line["split"] == "train" and line["step"] == 3:
            line["grad_norm"] = float(np.nextafter(np.float32(line["grad_norm"]), np.float32(9)))
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert main(["replay", f"--workdir={tmp_path / 'run'}", "--step=3"]) == 2
    assert "differs first at step 3: grad_norm is " in capsys.readouterr().err


def test_from_the_beginning_where_no_checkpoint_is_before(ran, capsys):
    assert main(["replay", f"--workdir={ran}", "--step=2"]) == 2
    assert "--step=2: no checkpoint is before it (there are 2, 4, 6); give a later step, or --from_start" in \
        capsys.readouterr().err
    found = replay(str(ran), 2, from_start=True)
    assert found["compared"] == [3] and found["verdict"].endswith("of step 3 from the beginning")


def test_what_cannot_be_replayed_is_said_in_a_line(ran, tmp_path, capsys):
    def refused(*arguments):
        assert main(["replay", *arguments]) == 2
        return capsys.readouterr().err

    assert "--step=7: the run has 6 steps" in refused(f"--workdir={ran}", "--step=7")
    assert "--step=0: must be at least 1" in refused(f"--workdir={ran}", "--step=0")
    assert "no config.json there" in refused(f"--workdir={tmp_path}", "--step=1")
    copy = tmp_path / "run"
    shutil.copytree(ran, copy)
    for step in ("4", "6"):
        shutil.rmtree(copy / "checkpoints" / step)
    (copy / "summary.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text(lines[0] + "\n")
    assert f"--step=5: the run in {copy} has come to step 3" in refused(f"--workdir={copy}", "--step=5")
    text = pathlib.Path(json.loads((ran / "config.json").read_text())["config"]["data"]["path"])
    kept = text.read_text()
    text.write_text(kept.replace("mat", "rug"))
    assert "its text is no longer what it was" in refused(f"--workdir={ran}", "--step=5")
    text.write_text(kept)


def test_a_classifier_shows_its_classes(tmp_path):
    for name, seed in (("train", 0), ("valid", 1)):
        write_rows(tmp_path / f"{name}.tsv", 60, seed=seed)
    config = classified(tmp_path, steps=2, checkpoint__every_steps=1, observe__log_every=1, mesh__data=1)
    train(config, str(tmp_path / "run"))
    found = replay(str(tmp_path / "run"), 2)
    assert found["difference"] is None and found["compared"] == [2]
    told = [span for row in found["rows"] for span in row["spans"] if "loss" in span and span["loss"] is not None]
    assert {span["text"] for span in told} == {"a", "b"} and len(told) == sum(row["told"] for row in found["rows"])
    assert np.mean([span["loss"] for span in told]) == pytest.approx(found["metrics"]["loss"], rel=1e-5)
    assert "<hr>" in replay_page.page(found, 2)


@pytest.mark.parametrize("form", ["pair", "encoder", "chat"])
def test_examples_are_read_token_by_token(form, config, tmp_path):
    if form == "chat":
        record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
        config.data.form, config.seq_len = "chat", 64
    else:
        record = {"prompt": "ab", "target": "yes"}
        config.data.form, config.seq_len, config.data.source_len = "pair", 16, 8
        if form == "encoder":
            config.model.family, config.objective.name = "encoder_decoder", "seq2seq"
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 20)
    config.data.path, config.data.tokenizer = "a.jsonl", "byte"
    resolve(config)
    data = build_data(config)
    batch = data.train.batch(0)
    row = {"row": 0, "index": 0, "epoch": 0, "pieces": [], **{name: a[0].tolist() for name, a in batch.items()}}
    losses = np.arange(config.seq_len, dtype=np.float32)
    found = row_of(row, losses, config, data.tokenizer)
    told_spans = [span for span in found["spans"] if "loss" in span and span["loss"] is not None]
    told = "".join(span["text"] for span in told_spans)
    plain = "".join(span["text"] for span in found["spans"] if "loss" in span and span["loss"] is None)
    assert told.startswith("yes") and ("hi" in plain if form == "chat" else plain.startswith("ab"))
    mask = np.asarray(row["loss_mask"]) > 0
    assert [span["place"] for span in told_spans] == np.flatnonzero(mask).tolist()
    assert found["loss"] == pytest.approx(losses[mask].mean())
