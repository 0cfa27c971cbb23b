"""How well a classifier does on a split, beyond its loss: accuracy, F1, AUC-ROC, calibration and confusion matrix, from the
probabilities of each example, by scikit-learn."""

import json
import os

import jax
import numpy as np

from jaxlm.data.feed import Feed
from jaxlm.errors import UserError
from jaxlm.objectives.classification import POOLINGS, class_logits
from jaxlm.parallel.compile import jit
from jaxlm.parallel.distributed import is_main
from jaxlm.parallel.rules import batch_sharding, replicated

BINS = 10  # of confidence, for the calibration error


def evaluate_classes(run, split_name: str) -> dict:
    """`scores` of a split ("valid", "test") of a `restore.Run`. Raises UserError: it has no such split."""
    probabilities_NC, labels_N = class_probabilities(run, split_of(run, split_name))
    return {"split": split_name, "step": run.step, **scores(probabilities_NC, labels_N, run.config.data.classes)}


def split_of(run, name: str):
    """"valid" or "test" of a `restore.Run`, a `loader.HeldOut`. Raises UserError: there is none."""
    split = run.data.valid if name == "valid" else run.data.test
    if split is None:
        raise UserError(f"--split={name}: there is none; set --config.data.{name}_path=FILE")
    return split


def class_probabilities(run, split) -> tuple[np.ndarray, np.ndarray]:
    """-> (probabilities_NC float64, labels_N) of every example of a split of a `restore.Run`, in the order of the text; of a
    mixture, one source after the other. All processes call it alike, and have all of them."""
    config, pool = run.config, POOLINGS[run.config.model.pooling]

    def classify(params, batch):
        from flax import nnx

        logits_BTC, _ = class_logits(nnx.merge(run.model.graph, params), batch, pool)
        return logits_BTC, batch["targets"], batch["loss_mask"]

    classify = jit(run.mesh, classify, out_shardings=replicated(run.mesh))
    feed, parts = Feed(batch_sharding(run.mesh), (split.batch_size, config.seq_len)), []
    for part in split.parts.values():
        found = [jax.device_get(classify(run.params, feed.put(batch))) for batch in part.evaluation_batches(rows=feed.rows)]
        back_N = np.argsort(part.rows.order)  # rows are examples put together by their length
        parts.append([np.concatenate([out[i][out[2] > 0] for out in found])[back_N] for i in range(2)])
    logits_NC, labels_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    logits_NC = logits_NC.astype(np.float64)
    odds_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    return odds_NC / odds_NC.sum(1, keepdims=True), labels_N


# ---- Numbers ---------------------------------------------------------------------------------------------------------------


def scores(probabilities_NC, labels_N, classes) -> dict:
    """All the numbers, as JSON has them. What cannot be computed is None, and "not_computed" says why.

    "auc_roc" is of the second class where there are two, else the mean over classes, each against the rest. "per_class" has
    precision, recall, F1 and AUC-ROC of each; "roc" the points of its curve; "confusion_matrix"[true][predicted]; "calibration"
    the expected calibration error (Guo et al., arXiv:1706.04599), over bins of equal width of the predicted class's probability.
    Raises UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UserError("classification: needs scikit-learn; pip install 'jaxlm[tasks]'") from error
    numbers, predicted_N = np.arange(len(classes)), probabilities_NC.argmax(1)
    precision, recall, f1, counts = metrics.precision_recall_fscore_support(
        labels_N, predicted_N, labels=numbers, zero_division=0)
    matrix, missing, per_class, curves = metrics.confusion_matrix(labels_N, predicted_N, labels=numbers), {}, {}, {}
    for i, name in enumerate(classes):
        area = None
        if 0 < counts[i] < len(labels_N):
            area = float(metrics.roc_auc_score(labels_N == i, probabilities_NC[:, i]))
            false, true, _ = metrics.roc_curve(labels_N == i, probabilities_NC[:, i])
            curves[name] = {"false_positive_rate": false.round(5).tolist(), "true_positive_rate": true.round(5).tolist()}
        else:
            missing[f"auc_roc of class {name!r}"] = "no example is of it" if not counts[i] else "all examples are of it"
        if not counts[i] and not (predicted_N == i).any():
            missing[f"f1 of class {name!r}"] = "no example is of it, and none is taken for it; 0 in the mean"
        per_class[name] = {"examples": int(counts[i]), "precision": float(precision[i]), "recall": float(recall[i]),
                           "f1": float(f1[i]), "auc_roc": area}
    areas = [of["auc_roc"] for of in per_class.values()]
    if None in areas:
        missing["auc_roc"] = "it needs examples of every class, and more than one class"
    area = None if None in areas else areas[1] if len(areas) == 2 else float(np.mean(areas))
    return {"examples": len(labels_N), "accuracy": float(metrics.accuracy_score(labels_N, predicted_N)),
            "log_loss": float(metrics.log_loss(labels_N, probabilities_NC, labels=numbers)), "f1_macro": float(np.mean(f1)),
            "auc_roc": area, "calibration": calibration(probabilities_NC, labels_N), "per_class": per_class,
            "confusion_matrix": matrix.tolist(), "roc": curves, "not_computed": missing}


def calibration(probabilities_NC, labels_N, bins: int = BINS) -> dict:
    confidence_N, right_N = probabilities_NC.max(1), probabilities_NC.argmax(1) == labels_N
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    found = [{"examples": int(of.sum()), "confidence": float(confidence_N[of].mean()), "accuracy": float(right_N[of].mean())}
             for of in (bin_N == i for i in range(bins)) if of.any()]
    error = sum(of["examples"] * abs(of["confidence"] - of["accuracy"]) for of in found) / len(labels_N)
    return {"expected_calibration_error": error, "bins": found}


# ---- To read ---------------------------------------------------------------------------------------------------------------


def report_classes(run, split: str, workdir: str, as_json: bool) -> None:
    """Evaluates, prints, and writes eval-<split>.json and eval-<split>.html into the run directory, if there is one."""
    result = evaluate_classes(run, split)
    if is_main():
        tell(result, f"eval-{split}", workdir, as_json)


def tell(result: dict, name: str, workdir: str, as_json: bool, members=()) -> None:
    """name: of the files, without their endings; workdir: where they go, or empty: nowhere; members: of an ensemble, the rows of
    a table."""
    if workdir:
        from jaxlm.evaluate.pictures import classification_page

        title = f"{os.path.basename(os.path.abspath(workdir))}: {result['split']}"
        write(workdir, f"{name}.json", json.dumps(result, indent=1))
        write(workdir, f"{name}.html", classification_page(title, result, members))
    print(json.dumps(result) if as_json else "\n".join([table(result), *([""] if members else []), *aligned(members)]))
    if workdir and not as_json:
        print(f"{workdir}/{name}.html, {name}.json")


def write(folder: str, name: str, text: str) -> None:
    try:
        with open(os.path.join(folder, name), "w") as out:
            out.write(text)
    except OSError as error:
        raise UserError(f"--workdir={folder}: {name} cannot be written ({error.strerror}); free space, or make it "
                        "writable") from error


def table(result: dict) -> str:
    from rich.cells import cell_len  # a Chinese character is two wide

    padded = lambda text, width: text + " " * (width - cell_len(text))
    lines = [f"{result['split']}: {about(result)}",
             *(f"{label:28}{number(value)}" for label, value in headline(result).items()), ""]
    names = list(result["per_class"])
    width = max(map(cell_len, [*names, "true \\ predicted"])) + 2
    lines.append(padded("class", width) + "".join(f"{head:>11}" for head in ("examples", "precision", "recall", "f1", "auc_roc")))
    lines += [padded(name, width) + "".join(f"{of[key] if key == 'examples' else number(of[key]):>11}" for key in of)
              for name, of in result["per_class"].items()]
    column = max(8, *(cell_len(name) + 2 for name in names))
    lines += ["", padded("true \\ predicted", width) + "".join(" " * (column - cell_len(name)) + name for name in names)]
    lines += [padded(name, width) + "".join(f"{count:{column},}" for count in row)
              for name, row in zip(names, result["confusion_matrix"], strict=True)]
    lines += [f"not computed: {what}: {why}" for what, why in result["not_computed"].items()]
    return "\n".join(lines)


def about(result: dict) -> str:
    """Of how many examples, and of whose probabilities."""
    whose = f"mean of {len(result['members'])} runs" if "members" in result else f"checkpoint of step {result['step']:,}"
    return f"{result['examples']:,} examples, {whose}"


def aligned(rows) -> list[str]:
    """Lines of a table, the first column to the left. rows: of cells; the first is its head, and there may be none."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows]


def headline(result: dict) -> dict:
    """{label: value} of the numbers that stand for the whole."""
    return {"accuracy": result["accuracy"], "F1, mean of the classes": result["f1_macro"], "AUC-ROC": result["auc_roc"],
            "log-loss (nats)": result["log_loss"],
            "expected calibration error": result["calibration"]["expected_calibration_error"]}


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
