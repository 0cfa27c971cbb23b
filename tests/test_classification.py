"""Classification: probabilities in order, numbers as by hand, early stopping and the best checkpoint."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classified import CLASSES, classified, write_rows
from flax import nnx

from jaxlm.cli import main
from jaxlm.config import BALANCED, load
from jaxlm.errors import UserError
from jaxlm.evaluate.classification import class_probabilities, evaluate_classes, scores, table
from jaxlm.models.block import hide
from jaxlm.train.loop import train
from jaxlm.train.restore import open_run
from jaxlm.train.stop import Patience
from jaxlm.validation import validate

PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.65, 0.35], [0.2, 0.8], [0.3, 0.7], [0.55, 0.45]])
LABELS = np.array([0, 0, 1, 1, 1, 0])


def test_numbers_are_those_by_hand():
    found = scores(PROBABILITIES, LABELS, ("no", "yes"))
    assert found["accuracy"] == pytest.approx(4 / 6) and found["confusion_matrix"] == [[2, 1], [1, 2]]
    assert found["per_class"]["yes"]["f1"] == pytest.approx(2 / 3) and found["f1_macro"] == pytest.approx(2 / 3)
    assert found["log_loss"] == pytest.approx(-sum(math.log(PROBABILITIES[i, y]) for i, y in enumerate(LABELS)) / 6)
    pairs = [(p, q) for p, a in zip(PROBABILITIES[:, 1], LABELS, strict=True) if a for q, b in zip(PROBABILITIES[:, 1], LABELS,
                                                                                                   strict=True) if not b]
    assert found["auc_roc"] == pytest.approx(np.mean([p > q for p, q in pairs]))
    # Bins of a tenth: [0.5, 0.6) one, right; [0.6, 0.7) two, both wrong; [0.7, 0.8) one, [0.8, 0.9) one, [0.9, 1] one, right.
    gaps = [1 - 0.55, 2 * (0.6 + 0.65) / 2, 1 - 0.7, 1 - 0.8, 1 - 0.9]
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(sum(gaps) / 6)
    assert not found["not_computed"]


def test_of_three_classes_auc_is_one_against_the_rest():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(3), 60), rng.integers(0, 3, 60)
    found = scores(p, labels, "uvw")
    for i, name in enumerate("uvw"):
        inside, outside = p[labels == i, i], p[labels != i, i]
        area = np.mean((inside[:, None] > outside) + 0.5 * (inside[:, None] == outside))
        assert found["per_class"][name]["auc_roc"] == pytest.approx(area)
    assert found["auc_roc"] == pytest.approx(np.mean([of["auc_roc"] for of in found["per_class"].values()]))


def test_what_cannot_be_computed_is_said_and_the_rest_is_given():
    found = scores(PROBABILITIES[:2], np.array([0, 0]), ("no", "yes"))
    assert found["auc_roc"] is None and found["accuracy"] == 0.5 and found["log_loss"] > 0
    text = table({"split": "test", "step": 3, **found})
    assert "not computed: auc_roc of class 'yes': no example is of it" in text and "AUC-ROC                     n/a" in text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classified")
    write_rows(folder / "train.tsv", 64)
    write_rows(folder / "valid.tsv", 21, seed=1)
    config = classified(folder, optimizer__learning_rate=0.03, steps=60, eval__every_steps=2, eval__patience=3,
                        eval__metric="accuracy", model__token_dropout=0.1)
    summary = train(config, str(folder / "run"))
    return folder, config, summary


def test_probabilities_are_those_of_each_text_alone_in_order(run):
    folder, config, _ = run
    opened = open_run(str(folder / "run"))
    p_NC, labels_N = class_probabilities(opened, opened.data.valid)
    lines = [line.split("\t") for line in (folder / "valid.tsv").read_text().splitlines()]
    assert labels_N.tolist() == [CLASSES.index(name) for _, name in lines]

    @jax.jit
    def probabilities(params, ids_BT):
        model = nnx.merge(opened.model.graph, params)
        return jax.nn.softmax(model.classes(model.hidden(ids_BT, None, jnp.ones_like(ids_BT))[0].mean(1)))

    for (text, _), p_C in zip(lines, p_NC, strict=True):
        ids = np.array([list(opened.data.tokenizer.encode(text)) + [opened.data.tokenizer.eos_id]])
        np.testing.assert_allclose(p_C, probabilities(opened.params, ids)[0], atol=2e-5)


def test_early_stopping_keeps_the_best_and_the_same_command_changes_nothing(run):
    folder, config, summary = run
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    accuracies = {x["step"]: x["accuracy"] for x in lines if x["split"] == "valid/all"}
    assert not any("perplexity" in x for x in lines)  # the loss is of a whole text
    best = max(accuracies, key=accuracies.get)  # the first
    assert summary["status"] == "completed" and summary["stopped_early"] and summary["steps"] == best + 3 * 2 < 60
    assert summary["best"] == {"step": best, "accuracy": accuracies[best]} and accuracies[best] > 0.9
    assert open_run(str(folder / "run")).step == best
    assert open_run(str(folder / "run"), checkpoint="latest").step == summary["steps"]
    assert evaluate_classes(open_run(str(folder / "run"), checkpoint=str(best)), "valid")["accuracy"] == accuracies[best]
    with pytest.raises(UserError, match=f"no such checkpoint; give best, latest or one of {best}, {summary['steps']}"):
        open_run(str(folder / "run"), checkpoint="7")
    before = (folder / "run/metrics.jsonl").read_text()
    assert train(config, str(folder / "run")) == summary and (folder / "run/metrics.jsonl").read_text() == before
    (folder / "run/summary.json").unlink()  # killed after the last save: it still ends there
    assert train(config, str(folder / "run"))["steps"] == summary["steps"]


def test_a_run_without_early_stopping_uses_its_newest_checkpoint(run):
    folder, config, _ = run
    config = classified(folder, optimizer__learning_rate=0.0)
    summary = train(config, str(folder / "plain"))
    assert not summary["stopped_early"] and summary["best"]["step"] == 6
    assert open_run(str(folder / "plain")).step == 6
    assert open_run(str(folder / "plain"), checkpoint="best").step == 6  # none was kept as the best


def test_eval_prints_and_writes(run, capsys):
    folder, *_ = run
    assert main(["eval", f"--workdir={folder}/run"]) == 0
    text = capsys.readouterr().out
    assert "AUC-ROC" in text and "true \\ predicted" in text and "eval-valid.html" in text
    written = json.loads((folder / "run/eval-valid.json").read_text())
    assert main(["eval", f"--workdir={folder}/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written and written["examples"] == 21
    page = (folder / "run/eval-valid.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "")
    assert main(["eval", f"--workdir={folder}/run", "--split=test"]) == 2
    assert "--split=test: there is none" in capsys.readouterr().err


def test_patience_knows_what_came_before(tmp_path):
    line = lambda step, loss: {"split": "valid/all", "step": step, "loss": loss}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (
        line(1, 3.0), {"split": "train", "step": 1, "loss": 9.0}, line(2, 2.0), line(3, None), line(9, 1.0))) + "{half")
    patience = Patience("loss", 2, str(tmp_path), step=3)
    assert (patience.best_step, patience.best, patience.exhausted) == (2, 2.0, False)
    assert not patience.saw(line(4, 2.0)) and patience.exhausted  # as good is not better
    assert patience.saw(line(5, 1.5)) and not patience.exhausted
    assert not Patience("loss", 0, str(tmp_path / "none"), 0).exhausted
    with pytest.raises(UserError, match="eval.metric=accuracy: the evaluation has none"):
        Patience("accuracy", 2, str(tmp_path / "none"), 0).saw(line(1, 1.0))


def test_balanced_weights_are_counted_from_the_training_rows_alone(tmp_path):
    """Six of "a" and two of "b" among the rows to train on; the held-out ones are all "b"."""
    rows = "".join(f"{name}x\t{name}\n" for name in "aabaaaba")
    (tmp_path / "train.tsv").write_text(rows)
    (tmp_path / "valid.tsv").write_text("bx\tb\n" * 4)
    config = classified(tmp_path, objective__class_weights=BALANCED, steps=1)
    train(config, str(tmp_path / "run"))
    y = np.array([0] * 6 + [1] * 2)
    wanted = tuple(len(y) / (2 * np.bincount(y)))  # sklearn.utils.class_weight.compute_class_weight("balanced", ...)
    assert config.objective.class_weights == wanted == (8 / 12, 2.0)
    assert open_run(str(tmp_path / "run")).config.objective.class_weights == wanted
    (tmp_path / "train.tsv").write_text("ax\ta\n" * 8)
    with pytest.raises(UserError, match="class 'b' has no training examples"):
        train(classified(tmp_path, objective__class_weights=BALANCED), str(tmp_path / "none"))


@pytest.mark.parametrize("key, value, problem", [
    ("objective.class_weights", ("even", 1.0), "give one number, not negative"),
    ("eval.metric", "perplexity", "objective.name=classification tells none; use loss"),
    ("eval.patience", -1, "must not be negative"),
    ("eval.every_steps", 0, "eval.every_steps above 0"),
    ("eval.metric", "accurasy", "accuracy"),
    ("model.token_dropout", 1.0, "must be in"),
])
def test_bad_keys(tmp_path, key, value, problem):
    config = classified(tmp_path, eval__patience=1, eval__every_steps=2)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=problem):
        validate(config)


def test_a_label_outside_the_classes_is_named(tmp_path):
    write_rows(tmp_path / "train.tsv", 8, "ac")
    write_rows(tmp_path / "valid.tsv", 8)
    with pytest.raises(UserError, match="label 'c' is none of data.classes"):
        train(classified(tmp_path), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_hidden_tokens_are_zero_and_the_others_as_they_were():
    keys_BT = jax.random.split(jax.random.key(0), (4, 500))
    x_BTD = np.asarray(hide(np.ones((4, 500, 3), np.float32), 0.25, keys_BT))
    assert set(x_BTD.ravel()) == {0.0, 1.0} and (x_BTD.min(2) == x_BTD.max(2)).all()
    assert abs(x_BTD.mean() - 0.75) < 0.04
    assert hide(x_BTD, 0.25, None) is x_BTD


@pytest.mark.parametrize("name", ["sst2_sentiment", "chnsenticorp_sentiment_zh", "csl_category_zh"])
def test_recipes_are_of_classification(name):
    config = load(str(pathlib.Path("configs/tasks") / f"{name}.py"))
    assert config.objective.name == "classification" and len(config.data.classes) == config.model.num_classes
