"""Stratified k-fold cross-validation: k runs, each with another part of the training split held out (data.folds, data.fold), and
what they say of a config. The split data.test_path is not looked at."""

import json
import math
import os

import numpy as np

from jaxlm.errors import UserError
from jaxlm.evaluate.classification import aligned, evaluate_classes, number, write

NUMBERS = {"accuracy": "accuracy", "f1_macro": "F1, mean of classes", "auc_roc": "AUC-ROC", "log_loss": "log-loss"}


def check_folds(config, folds: int) -> None:
    """Raises UserError: this config cannot be cross-validated so."""
    problems = []
    if folds < 2:
        problems.append(f"--crossval={folds}: must be at least 2")
    if config.objective.name != "classification":
        problems.append(f"--crossval: objective.name={config.objective.name} has no classes; it needs classification")
    if problems:
        raise UserError(*problems)


def cross_validate(configs: list, workdir: str, train, checkpoint: str = "", as_json: bool = False) -> None:
    """Trains and evaluates what is not done yet, one fold after the other; prints, and writes crossval.json and crossval.html.

    configs: of each fold. train: (config, workdir) -> None, as `jaxlm train` does it: a fold that is done stays as it is.
    checkpoint: as `restore.open_run` has it.
    """
    from jaxlm.evaluate.pictures import crossval_page
    from jaxlm.train.restore import open_run

    results = []
    for i, config in enumerate(configs):
        folder = os.path.join(workdir, f"fold-{i}")
        if not as_json:
            print(f"fold {i + 1} of {len(configs)}: {folder}", flush=True)
        train(config, folder)
        results.append(evaluate_classes(open_run(folder, checkpoint=checkpoint), "valid"))
        write(folder, "eval-valid.json", json.dumps(results[-1], indent=1))
    summary = summarise(results)
    write(workdir, "crossval.json", json.dumps(summary, indent=1))
    name = os.path.basename(os.path.abspath(workdir))
    write(workdir, "crossval.html", crossval_page(f"{name}: {len(configs)}-fold cross-validation", summary, mean_curves(results)))
    if as_json:
        print(json.dumps(summary))
    else:
        print(table(summary))
        print(f"{workdir}/crossval.html, crossval.json")


def summarise(results: list[dict]) -> dict:
    """results: of each fold. -> {"folds": [...], "summary": {number: {"mean", "deviation", "interval",
    "interval_uncorrected"}}}.

    Intervals are of 95 %, by Student's t with k - 1 degrees of freedom. Runs of different folds share most of their training
    text, so that their deviation says too little of the mean's; "interval" has the variance corrected for that,
    s^2 (1/k + 1/(k-1)) (Nadeau and Bengio 2003, "Inference for the Generalization Error"; 1/(k-1) is the ratio of test to
    training examples).
    """
    from scipy import stats

    k, found = len(results), {}
    for key in NUMBERS:
        values = [of[key] for of in results]
        if None in values:
            found[key] = None  # the fold's "not_computed" says why
            continue
        mean, deviation, t = float(np.mean(values)), float(np.std(values, ddof=1)), float(stats.t.ppf(0.975, k - 1))
        interval = lambda share: [mean - t * deviation * math.sqrt(share), mean + t * deviation * math.sqrt(share)]  # noqa: B023
        found[key] = {"mean": mean, "deviation": deviation, "interval": interval(1 / k + 1 / (k - 1)),
                      "interval_uncorrected": interval(1 / k)}
    folds = [{**{name: of[name] for name in ("examples", "step", *NUMBERS, "not_computed")},
              "expected_calibration_error": of["calibration"]["expected_calibration_error"]} for of in results]
    return {"folds": folds, "summary": found}


def mean_curves(results: list[dict], points: int = 201) -> list[dict]:
    """A ROC curve for each fold, of the second of two classes, or the mean over all; and last, the mean of these. The means are
    of the true positive rates at equal false positive rates. A fold without all classes has none."""
    grid, curves = np.linspace(0, 1, points), []
    for of in results:
        if of["auc_roc"] is None:
            continue
        parts = list(of["roc"].values())
        parts = parts[-1:] if len(parts) == 2 else parts
        heights = [np.interp(grid, part["false_positive_rate"], part["true_positive_rate"]) for part in parts]
        curves.append(np.concatenate([[0.0], np.mean(heights, 0)]))
    rates = [0.0, *grid.tolist()]
    means = [np.mean(curves, 0)] if curves else []
    return [{"false_positive_rate": rates, "true_positive_rate": curve.tolist()} for curve in [*curves, *means]]


def rows(summary: dict) -> list[tuple[str, ...]]:
    """Of a table: the folds, mean, deviation, interval; the first row is its head."""
    of = summary["summary"]
    line = lambda name, show: (name, "", *("n/a" if of[key] is None else show(of[key]) for key in NUMBERS))
    return [("fold", "examples", *NUMBERS.values()),
            *((str(i), f"{fold['examples']:,}", *(number(fold[key]) for key in NUMBERS))
              for i, fold in enumerate(summary["folds"])),
            line("mean", lambda one: number(one["mean"])), line("deviation", lambda one: number(one["deviation"])),
            line("95 % from", lambda one: number(one["interval"][0])), line("95 % to", lambda one: number(one["interval"][1]))]


NOTE = ("The folds share training text: the interval of the mean (Student's t) has the variance corrected for that by Nadeau and "
        "Bengio (2003).")


def table(summary: dict) -> str:
    text = aligned(rows(summary))
    text.insert(1 + len(summary["folds"]), "")
    text += ["", NOTE, *missing(summary)]
    return "\n".join(text)


def missing(summary: dict) -> list[str]:
    return [f"not computed, fold {i}: {what}: {why}" for i, fold in enumerate(summary["folds"])
            for what, why in fold["not_computed"].items()]
