"""Cross-validation: every training example held out once, resumable, with an honest interval."""

import json
import re

import numpy as np
import pytest
from classified import classified, write_rows
from scipy import stats

from jaxlm.cli import main
from jaxlm.data.loader import build_data
from jaxlm.errors import UserError
from jaxlm.evaluate.crossval import mean_curves, summarise, table

CONFIG = """
import pathlib
from classified import classified

def get_config(arg=""):
    return classified(pathlib.Path(__file__).parent, steps=3)
"""


def test_folds_are_trained_evaluated_told_and_not_trained_again(tmp_path, capsys):
    write_rows(tmp_path / "train.tsv", 31)
    write_rows(tmp_path / "valid.tsv", 4)
    (tmp_path / "config.py").write_text(CONFIG)
    command = ["eval", f"--config={tmp_path}/config.py", "--crossval=2", f"--workdir={tmp_path}/cv"]
    assert main(command) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "cv/crossval.json").read_text())
    assert sum(fold["examples"] for fold in found["folds"]) == 31
    for i, fold in enumerate(found["folds"]):
        assert re.search(rf"^{i} +{fold['examples']} +{fold['accuracy']:.4f}", text, re.M), text
    assert "Nadeau" in text and (tmp_path / "cv/crossval.html").read_text().count("<path") == 3  # two folds and the mean
    before = {i: (tmp_path / f"cv/fold-{i}/summary.json").stat().st_mtime_ns for i in range(2)}
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert before == {i: (tmp_path / f"cv/fold-{i}/summary.json").stat().st_mtime_ns for i in range(2)}


def test_each_class_is_spread_evenly_and_each_example_is_held_out_once(tmp_path):
    write_rows(tmp_path / "train.tsv", 31)
    write_rows(tmp_path / "valid.tsv", 4)
    held = []
    for i in range(3):
        data = build_data(classified(tmp_path, data__folds=3, data__fold=i))
        examples = data.valid.rows.examples
        assert not set(examples) & set(data.train.rows.examples)
        assert len(examples) + len(data.train.rows.examples) == 31
        assert sorted(np.bincount(examples % 2)) in ([5, 5], [5, 6])  # 16 of one class, 15 of the other
        held += examples.tolist()
    assert sorted(held) == list(range(31))


@pytest.mark.parametrize("args, problem", [
    (["--crossval=5"], "class 'b' has 4 training examples, fewer than folds; use at most 4"),
    (["--crossval=1"], "--crossval=1: must be at least 2"),
    (["--crossval=2", "--config.objective.name=next_token"], "it needs classification|model.family"),
    ([], "--crossval=K: give --config=FILE and --workdir=DIR"),
])
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, capsys, args, problem):
    write_rows(tmp_path / "train.tsv", 9)
    write_rows(tmp_path / "valid.tsv", 4)
    (tmp_path / "config.py").write_text(CONFIG)
    assert main(["eval", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/cv", *args]) == 2
    assert re.search(problem, capsys.readouterr().err) and not (tmp_path / "cv").exists()


def test_too_few_rows_of_a_class_is_found_by_train_too(tmp_path):
    write_rows(tmp_path / "train.tsv", 9)
    write_rows(tmp_path / "valid.tsv", 4)
    with pytest.raises(UserError, match="data.folds=5: class 'b' has 4"):
        build_data(classified(tmp_path, data__folds=5))


def fold(accuracy, auc=0.8):
    return {"examples": 10, "step": 3, "accuracy": accuracy, "f1_macro": accuracy, "auc_roc": auc, "log_loss": 0.5,
            "not_computed": {} if auc else {"auc_roc": "it needs examples of every class"},
            "calibration": {"expected_calibration_error": 0.1},
            "roc": {"n": {}, "y": {"false_positive_rate": [0.0, 0.0, 1.0], "true_positive_rate": [0.0, auc or 0, 1.0]}}}


def test_interval_is_corrected_for_shared_training_text():
    values = [0.7, 0.8, 0.9, 0.8, 0.7]
    found = summarise([fold(v) for v in values])["summary"]["accuracy"]
    s = np.std(values, ddof=1)
    assert found["mean"] == pytest.approx(0.78) and found["deviation"] == pytest.approx(s)
    plain = stats.t.interval(0.95, 4, 0.78, stats.sem(values))
    assert found["interval_uncorrected"] == pytest.approx(plain)
    # With n_test / n_train = 1/4: the variance of the mean is (1/5 + 1/4) / (1/5) = 2.25 times the plain one.
    assert np.subtract(found["interval"], 0.78) == pytest.approx(1.5 * np.subtract(plain, 0.78))


def test_a_fold_without_a_number_leaves_the_others():
    results = [fold(0.7), fold(0.9, auc=None)]
    found = summarise(results)
    assert found["summary"]["auc_roc"] is None and found["summary"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert "not computed, fold 1: auc_roc" in table(found)
    one, mean = mean_curves(results)
    assert one == mean and one["true_positive_rate"][:2] == [0.0, 0.8] and one["true_positive_rate"][-1] == 1.0
