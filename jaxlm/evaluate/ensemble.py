"""Several runs as one model: the mean of the probabilities that they give to the classes, or to each next token (deep ensembles,
Lakshminarayanan et al., arXiv:1612.01474), beside what each of them gives alone."""

import collections
import json

import jax
import numpy as np
from flax import nnx

from jaxlm.data.feed import Feed
from jaxlm.errors import UserError
from jaxlm.evaluate.classification import aligned, class_probabilities, number, scores, split_of, tell
from jaxlm.evaluate.perplexity import told
from jaxlm.objectives.next_token import target_nlls
from jaxlm.parallel.compile import jit
from jaxlm.parallel.distributed import is_main
from jaxlm.parallel.rules import batch_sharding, replicated
from jaxlm.train.restore import open_run

NUMBERS = ("accuracy", "f1_macro", "auc_roc", "log_loss", "expected_calibration_error", "loss", "perplexity", "bits_per_byte")


def report_ensemble(folders: list[str], split: str, workdir: str, as_json: bool, overrides=(), checkpoint: str = "") -> None:
    """Evaluates and prints; of classifiers it also writes ensemble-<split>.json and .html into `workdir`, if given."""
    result = evaluate_ensemble(folders, split, overrides, checkpoint)
    if not is_main():
        return
    if "confusion_matrix" in result:
        tell(result, f"ensemble-{split}", workdir, as_json, member_rows(result))
    else:
        print(json.dumps(result) if as_json else "\n".join(aligned(member_rows(result))))


def evaluate_ensemble(folders: list[str], split: str, overrides=(), checkpoint: str = "") -> dict:
    """What `jaxlm eval` tells of a run's split ("valid", "test"), of the mean of all; with it "members": [{"run", "step", and the
    same in short} of each]. One run is in memory at a time. overrides, checkpoint: as `open_run` has them.

    Raises UserError: runs that are not asked the same: other data, tokenizer, classes or rows.
    """
    total, members, asked, right = 0.0, [], None, None
    for folder in folders:
        run = open_run(folder, overrides, checkpoint=checkpoint)
        mine = asked_of(run, split)
        asked = asked or mine
        for what, value in mine.items():
            if value != asked[what]:
                raise UserError(f"--ensemble: {folder} has another {what} than {folders[0]} ({value}, not {asked[what]}); give "
                                "runs that agree on it")
        probabilities, answers, judge = probabilities_of(run, split)
        right = answers if right is None else right
        if not np.array_equal(answers, right):
            raise UserError(f"--ensemble: {folder} has the text in another order than {folders[0]}; give runs that agree on "
                            "data.packing and seq_len, or set them here, as --config.data.packing=concat")
        total = total + probabilities
        members.append({"run": folder, "step": run.step, **short(judge(probabilities))})
    return {"split": split, "members": members, **judge(total / len(folders))}


def asked_of(run, split: str) -> dict:
    """What must be the same in all runs for the mean of what they answer to mean anything."""
    config = run.config
    return {"objective.name": config.objective.name, "data.classes": config.data.classes,
            "fold held out (data.fold)": (config.data.folds, config.data.fold) if split == "valid" else None,
            "text, split or tokenizer (its fingerprint)": run.data.fingerprint}


def probabilities_of(run, split: str):
    """-> (probabilities float64 of all that is asked, what is right, what makes the numbers of such probabilities)."""
    held_out, classes = split_of(run, split), run.config.data.classes
    if run.config.objective.name == "classification":
        p_NC, labels_N = class_probabilities(run, held_out)
        return p_NC, labels_N, lambda p_NC: scores(p_NC, labels_N, classes)
    num_bytes = sum(part.num_bytes for part in held_out.parts.values())
    judge = lambda p_N: told(collections.Counter(nll=float(-np.log(p_N).sum()), weight=len(p_N)), num_bytes)
    return *target_probabilities(run, held_out), judge


def target_probabilities(run, split) -> tuple[np.ndarray, np.ndarray]:
    """-> (p_N float64, ids_N) of each token of a split that the model is to tell, in the order of its rows."""
    if run.config.data.form == "preference":
        raise UserError("--ensemble: data.form=preference: pairs of answers have no probabilities to take the mean of")

    def look(params, batch):
        return target_nlls(run.config, nnx.merge(run.model.graph, params), batch), batch["targets"], batch["loss_mask"]

    look = jit(run.mesh, look, out_shardings=replicated(run.mesh))
    feed, found = Feed(batch_sharding(run.mesh), (split.batch_size, run.config.seq_len)), []
    for part in split.parts.values():
        for batch in part.evaluation_batches(rows=feed.rows):
            nll_BT, ids_BT, mask_BT = jax.device_get(look(run.params, feed.put(batch)))
            found.append((np.exp(-nll_BT[mask_BT > 0].astype(np.float64)), ids_BT[mask_BT > 0]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def short(result: dict) -> dict:
    """Of a member: the numbers that it is compared by."""
    if "calibration" in result:
        result = result | {"expected_calibration_error": result["calibration"]["expected_calibration_error"]}
    return {name: result[name] for name in NUMBERS if name in result}


def member_rows(result: dict) -> list[tuple[str, ...]]:
    """Of a table: each run, and all together; the first row is its head."""
    together = short(result)
    line = lambda name, step, of: (name, step, *(number(of[key]) for key in together))
    return [("run", "step", *together), *(line(of["run"], f"{of['step']:,}", of) for of in result["members"]),
            line("mean of the probabilities", "", together)]
