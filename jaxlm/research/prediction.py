"""A scaling law of real runs, a prediction for a larger one that is written down before that run exists, and its score.

    DIR/scaling.json      the runs, the law with its intervals, IsoFLOP minima
    DIR/prediction.json   made once: the config's fingerprint, date, loss and interval, and a digest of all that
    DIR/score.json        inside the interval or not
    DIR/scaling.html      all of it as a page
"""

import datetime
import hashlib
import json
import math
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.config import fingerprint, identity
from jaxlm.errors import UserError
from jaxlm.observe.report import field, read_json
from jaxlm.research import law as laws
from jaxlm.research import law_page
from jaxlm.research.runs import Run, arms_of, choose_metric, read_runs
from jaxlm.research.scaling import SHAPE, inner_parameters, short
from jaxlm.train.rundir import git_commit, write_json, write_text

# What may differ between runs of one law: size, length, and what is tuned for each size. Anything else is another law.
MAY_DIFFER = ("seed", "steps", "batch_size", "eval.batch_size", "optimizer.learning_rate", "optimizer.weight_decay",
              "model.head_dim", *(f"model.{key}" for key in SHAPE))


class Point(NamedTuple):
    """A finished run."""

    name: str
    folder: str
    fingerprint: str
    seed: int
    parameters: int  # without embeddings
    tokens: int
    flops: float
    loss: float


# ---- The law of runs -----------------------------------------------------------------------------------------------------------


def fit_runs(paths: list[str], out: str, level: float = 0.95) -> dict:
    """-> what is in scaling.json, and "fit". Raises UserError: runs of several recipes, too few that ended well, or a prediction
    is in `out`."""
    if (old := pathlib.Path(out, "prediction.json")).exists():
        raise UserError(f"{old}: a prediction of {read_json(old)['created']} is there, which stays as it was made; give another "
                        "--out")
    runs = read_runs(paths)
    arms = arms_of(runs)
    metric = choose_metric(arms)
    require_one_recipe(runs)
    points, notes = [], []
    for arm in arms:
        for run in arm.runs:
            loss = run.final(*metric)
            if loss is None or not (math.isfinite(loss) and loss > 0):
                why = {"running": "has not ended", "completed": f"has no {metric[0]} {metric[1]}"}.get(run.status, run.status)
                notes.append(f"{run.folder}: {why}, and is left out" + (
                    ": the law is of runs that train well, and knows nothing of those that do not" if run.status == "diverged"
                    else ""))
                continue
            points.append(Point(arm.name, str(run.folder), run.record["fingerprint"], run.seed,
                                inner_parameters(ConfigDict(run.config)), tokens_of(run.config, run.summary["steps"]),
                                run.summary["flops"], loss))
    seen = laws.Observations.of([(p.parameters, p.tokens, p.loss) for p in points])
    try:
        fitted = laws.fit(seen)
    except UserError as error:
        raise UserError(*notes, *error.problems) from error
    law, found = fitted.law, laws.parabolas(seen, [p.flops for p in points])
    notes += [f"{name} ended at the edge of what is searched ({getattr(law, name):g}): these runs do not tell it"
              for name in law.undetermined]
    quantities = {**{name: lambda x, name=name: getattr(x, name) for name in laws.PARAMETERS},
                  "compute_exponent": lambda x: x.compute_exponent}
    ranked = laws.optimal_exponent(found, level)
    result = {
        "metric": {"split": metric[0], "name": metric[1]}, "level": level, "noise": fitted.noise, "notes": notes,
        "law": {name: {"value": of(law), "interval": fitted.interval(of, level)} for name, of in quantities.items()},
        "points": [{**p._asdict(), "log_residual": float(r)} for p, r in zip(points, laws.log_residuals(law, seen), strict=True)],
        "parabolas": [p._asdict() for p in found], "parabola_exponent": ranked and {"value": ranked[0], "interval": ranked[1]},
        "recipe": recipe(runs[0].config), "data": field(runs[0].record, "data")}
    write(out, "scaling.json", result)
    return {**result, "fit": fitted}


def tokens_of(config, steps: int) -> int:
    if "stages" in config and config["stages"]:
        raise UserError("stages: a scaling law's steps all have the same tokens; leave it empty")
    return steps * config["batch_size"] * config["seq_len"]


def recipe(config) -> dict:
    """All of a config that the runs of one law have in common; takes a ConfigDict or a nested dict."""
    plain = json.loads(json.dumps(identity(config)))
    return {key: value for key, value in plain.items() if key not in MAY_DIFFER}


def require_one_recipe(runs: list[Run]) -> None:
    problems = []
    first, data = recipe(runs[0].config), field(runs[0].record, "data")
    for run in runs[1:]:
        changes = differences(first, recipe(run.config))
        if not changes and field(run.record, "data") != data:
            changes = ["the text itself"]
        if changes:
            problems.append(f"{run.folder} and {runs[0].folder} differ in {'; '.join(changes)}: a law is of one recipe, in which "
                            "size and tokens vary; leave one out")
    if problems:
        raise UserError(*problems[:4], *([f"... and {len(problems) - 4} more"] if len(problems) > 4 else []))


def differences(old: dict, new: dict) -> list[str]:
    tell = lambda values, key: values[key] if key in values else "(absent)"
    return [f"{key}: {tell(old, key)} -> {tell(new, key)}" for key in sorted({*old, *new}) if tell(old, key) != tell(new, key)]


# ---- Before the run, and after it ----------------------------------------------------------------------------------------------


def predict(fitted: dict, config, workdir: str, out: str) -> dict:
    """-> what is in prediction.json: of the run that `config` will make in `workdir`.

    Raises UserError: that run has begun, the config is of another recipe or one of the fitted.
    """
    require_not_begun(workdir)
    same = [p["folder"] for p in fitted["points"] if p["fingerprint"] == fingerprint(config)]
    if same:
        raise UserError(f"--config: is that of {same[0]}, which is among the fitted runs; predict one that is not")
    values = json.loads(config.to_json())
    if changes := differences(fitted["recipe"], recipe(values)):
        raise UserError(f"--config: differs from the fitted runs in {'; '.join(changes)}; a law holds for one recipe")
    parameters, tokens = inner_parameters(config), tokens_of(config, config.steps)
    loss, low, high = fitted["fit"].predict(parameters, tokens, fitted["level"])
    beyond = {what: value / max(p[what] for p in fitted["points"])
              for what, value in (("parameters", parameters), ("tokens", tokens))}
    result = {
        "created": now().isoformat(timespec="seconds"), "fingerprint": fingerprint(config), "seed": config.seed,
        "workdir": str(workdir), "metric": fitted["metric"], "parameters": parameters, "tokens": tokens, "beyond": beyond,
        "loss": loss,
        "interval": [low, high], "level": fitted["level"], "law": fitted["law"], "noise": fitted["noise"],
        "fitted": [p["fingerprint"] for p in fitted["points"]], "data": fitted["data"], "commit": git_commit(),
        "config": values}
    result["digest"] = digest(result)
    write(out, "prediction.json", result)
    return result


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def require_not_begun(workdir: str) -> None:
    names = ("config.json", "metrics.jsonl", "summary.json", "checkpoints")
    if there := [name for name in names if pathlib.Path(workdir, name).exists()]:
        raise UserError(f"--workdir={workdir}: that run has begun (it has {', '.join(there)}), and what is foretold of it now "
                        "is no prediction; give the directory of a run that is still to come")


def digest(prediction: dict) -> str:
    """16 hex digits of all of it: told to others before the run, it shows later that nothing was changed."""
    rest = {key: value for key, value in prediction.items() if key != "digest"}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode()).hexdigest()[:16]


def words_of(prediction: dict) -> str:
    (low, high), metric, beyond = prediction["interval"], prediction["metric"], prediction["beyond"]
    return (f"predicted {metric['split']} {metric['name']} of {short(prediction['parameters'])} parameters and "
            f"{short(prediction['tokens'])} tokens: {prediction['loss']:.4f}, {prediction['level']:.0%} interval {low:.4f} to "
            f"{high:.4f} ({beyond['parameters']:.2g} times the largest fitted size, {beyond['tokens']:.2g} times the most "
            f"tokens); {prediction['created']}, digest {prediction['digest']}")


def score(out: str, workdir: str) -> dict:
    """-> what is in score.json: whether the run that was foretold ended inside the interval.

    Raises UserError: no prediction, one that was edited, a run of another config, of another text, begun before, or not ended.
    """
    prediction = read_json(pathlib.Path(out, "prediction.json"))
    if not prediction:
        raise UserError(f"--score={out}: no prediction.json there; jaxlm scale --fit RUN... --predict --out={out} makes one")
    if digest(prediction) != prediction["digest"]:
        raise UserError(f"{out}/prediction.json: was changed after it was made (digest {prediction['digest']} no longer fits); "
                        "it cannot be scored")
    run = Run(pathlib.Path(workdir))
    if run.record["fingerprint"] != prediction["fingerprint"]:
        plain = lambda config: json.loads(json.dumps(identity(config)))
        changes = differences(plain(prediction["config"]), plain(run.config))
        raise UserError(f"--workdir={workdir}: is not the run that was foretold ({'; '.join(changes)})")
    if prediction["data"] is not None and field(run.record, "data") != prediction["data"]:
        raise UserError(f"--workdir={workdir}: its text is not that of the fitted runs; a law holds for one text")
    started = run.record["started"]
    if datetime.datetime.fromisoformat(started) < datetime.datetime.fromisoformat(prediction["created"]):
        raise UserError(f"--workdir={workdir}: began at {started}, before the prediction of {prediction['created']}; that is no "
                        "prediction")
    split, name = prediction["metric"]["split"], prediction["metric"]["name"]
    measured, (low, high) = run.final(split, name), prediction["interval"]
    if measured is None and run.status != "diverged":
        raise UserError(f"--workdir={workdir}: has not ended ({run.status}); score it when it has")
    if measured is None:
        verdict, inside = "outside: the run diverged, and the law foretold a loss", False
    else:
        inside = low <= measured <= high
        verdict = (f"{'inside' if inside else 'outside'}: measured {measured:.4f}, predicted {prediction['loss']:.4f} "
                   f"({prediction['level']:.0%} interval {low:.4f} to {high:.4f}); it is {off(measured, prediction['loss'])}")
    result = {"verdict": verdict, "inside": inside, "measured": measured, "workdir": str(workdir), "started": started,
              "digest": prediction["digest"], "scored": now().isoformat(timespec="seconds")}
    write(out, "score.json", result)
    return result


def off(measured: float, predicted: float) -> str:
    share = measured / predicted - 1
    return f"{abs(share):.2%} {'above' if share > 0 else 'below'} what was predicted"


def write(out: str, name: str, value: dict) -> None:
    """DIR/name, and the page anew."""
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, value)
        parts = [read_json(folder / f"{part}.json") for part in ("scaling", "prediction", "score")]
        write_text(folder / "scaling.html", law_page.page(folder.resolve().name, *parts))
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); give a folder that can") from error


def summary(fitted: dict) -> str:
    """The law in a line for each parameter."""
    lines = [f"{law_page.NAMES[name]:<12} {entry['value']:10.4g}   {entry['interval'][0]:.4g} to {entry['interval'][1]:.4g}"
             for name, entry in fitted["law"].items()]
    head = (f"L(N, D) = E + A / N^alpha + B / D^beta of {len(fitted['points'])} runs; {fitted['level']:.0%} intervals; runs lie "
            f"{fitted['noise']:.2%} off it")
    minima = [f"{p['flops']:.3g} FLOPs: " + (f"best at {short(p['best_parameters'])} parameters, loss {p['best_loss']:.4f}"
                                             if p["best_parameters"] else p["words"]) for p in fitted["parabolas"]]
    return "\n".join([head, *lines, *minima, *fitted["notes"]])
