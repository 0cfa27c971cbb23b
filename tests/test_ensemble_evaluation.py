"""Runs evaluated as one: the mean of their probabilities, beside each alone."""

import json
import shutil

import jax
import numpy as np
import pytest
from classified import CLASSES, classified, write_rows
from flax import nnx

from configs import default
from jaxlm.cli import main
from jaxlm.config import resolve
from jaxlm.evaluate.classification import class_probabilities, evaluate_classes, scores
from jaxlm.evaluate.ensemble import evaluate_ensemble
from jaxlm.research.ensemble import train_ensemble
from jaxlm.train.restore import open_run


def train_two(config, folder):
    """-> two run directories in `folder`, of seeds 0 and 1."""
    configs, folders = [config, config.copy_and_resolve_references()], [str(folder / f"seed={seed}") for seed in range(2)]
    configs[1].seed = 1
    train_ensemble(configs, folders, execution="in_turn", devices=jax.devices()[:1])
    return folders


def edited(workdir, other, change):
    """A copy of a run directory, as if it had been trained with another config."""
    shutil.copytree(workdir, other)
    record = json.loads((other / "config.json").read_text())
    change(record["config"])
    (other / "config.json").write_text(json.dumps(record))
    return other


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    write_rows(folder / "train.tsv", 16)
    write_rows(folder / "valid.tsv", 21, seed=1)
    return train_two(classified(folder, steps=2), folder / "runs")


def test_the_mean_of_a_run_with_itself_is_the_run_bit_for_bit(classifiers):
    one = evaluate_classes(open_run(classifiers[0]), "valid")
    found = evaluate_ensemble([classifiers[0]] * 2, "valid")
    assert {name: found[name] for name in one if name != "step"} == {name: one[name] for name in one if name != "step"}
    for member in found["members"]:
        assert member["step"] == one["step"] and all(member[name] == one[name] for name in ("accuracy", "auc_roc", "log_loss"))


def test_the_command_takes_the_mean_of_the_runs_in_a_folder(classifiers, tmp_path, capsys):
    folder = classifiers[0].rpartition("/")[0]
    assert main(["eval", f"--ensemble={folder}"]) == 0
    text, found = capsys.readouterr().out, json.loads(open(f"{folder}/ensemble-valid.json").read())
    runs = [open_run(name) for name in classifiers]
    (p, labels), (q, _) = (class_probabilities(run, run.data.valid) for run in runs)
    assert abs(p - q).max() > 1e-3  # or the mean would show nothing
    wanted = scores((p + q) / 2, labels, CLASSES)
    assert {name: found[name] for name in wanted} == wanted
    assert "21 examples, mean of 2 runs" in text and all(name in text for name in (*classifiers, "mean of the probabilities"))
    page = open(f"{folder}/ensemble-valid.html").read()
    assert page.count("<svg") == 3 and all(name in page for name in classifiers)
    # Named one by one: nowhere unless told.
    assert main(["eval", f"--ensemble={','.join(classifiers)}", f"--workdir={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found == json.loads((tmp_path / "ensemble-valid.json").read_text())


@pytest.mark.parametrize("key, value, problem", [
    ("classes", ["b", "a"], r"has another data.classes than .*seed=0 (('b', 'a'), not ('a', 'b'))"),
    ("valid_every", 3, "has another text, split or tokenizer (its fingerprint) than"),
    ("folds", 2, "has another fold held out (data.fold) than"),
])
def test_runs_that_are_not_asked_the_same_are_refused(classifiers, tmp_path, capsys, key, value, problem):
    values = {key: value} | ({"valid_path": ""} if key == "valid_every" else {})
    other = edited(classifiers[1], tmp_path / "other", lambda config: config["data"].update(values))
    assert main(["eval", f"--ensemble={classifiers[0]},{other}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in problem.split(".*")), said


def test_weights_of_hugging_face_are_no_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["eval", f"--ensemble={tmp_path}"]) == 2
    assert f"{tmp_path}: no config.json there that is a run's" in capsys.readouterr().err


@pytest.mark.parametrize("args, problem", [
    (["--tasks=lambada:x.jsonl"], "--ensemble: scores a split; leave --tasks and --lm_eval out"),
    (["--split=test"], "--split=test: there is none"),
])
def test_bad_calls(classifiers, capsys, args, problem):
    assert main(["eval", f"--ensemble={','.join(classifiers)}", *args]) == 2
    assert problem in capsys.readouterr().err


def test_of_language_models_each_tokens_probability_is_the_mean(tmp_path, capsys):
    c = default.get_config()
    (tmp_path / "text.txt").write_text("".join(f"Line {i} has {i * i} words.\n" for i in range(60)))
    c.data.path, c.data.store_dir, c.data.tokenizer = str(tmp_path / "text.txt"), str(tmp_path / "stores"), "byte"
    c.data.document, c.data.packing = "line", "concat"
    c.steps, c.batch_size, c.seq_len, c.eval.batch_size = 2, 4, 16, 4
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 16, 2
    c.model.final_softcap, c.model.init_std, c.optimizer.learning_rate = 5.0, 0.3, 1e-2
    c.observe.progress, c.observe.report, c.checkpoint.every_steps, c.eval.every_steps = "none", False, 0, 0
    resolve(c)
    folders = train_two(c, tmp_path / "runs")
    command = lambda *args: json.loads((main(["eval", *args, "--json"]), capsys.readouterr().out)[1])
    found, alone = command(f"--ensemble={tmp_path}/runs"), command(f"--workdir={folders[0]}")
    assert all(found["members"][0][name] == pytest.approx(alone[name], rel=1e-6) for name in ("step", "loss", "bits_per_byte"))
    assert alone["tokens"] == found["tokens"]
    runs = [open_run(folder) for folder in folders]
    valid, graph = runs[0].data.valid.rows, runs[0].model.graph
    batch = valid.take(list(range(len(valid))))

    @jax.jit
    def probabilities(params):
        model = nnx.merge(graph, params)
        return jax.nn.softmax(model.logits(model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[0]))

    p_RBT = [np.take_along_axis(np.asarray(probabilities(run.params)), batch["targets"][..., None], 2)[..., 0] for run in runs]
    wanted = -np.log(np.mean(p_RBT, 0)[batch["loss_mask"] > 0]).mean()
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert wanted < np.mean([member["loss"] for member in found["members"]]) - 1e-3  # log is concave
    assert evaluate_ensemble([folders[1]] * 2, "valid")["loss"] == found["members"][1]["loss"]
    other = edited(folders[1], tmp_path / "other", lambda config: config["data"].update(packing="best_fit"))
    assert main(["eval", f"--ensemble={folders[0]},{other}"]) == 2
    assert "has the text in another order than" in capsys.readouterr().err
