"""Finished and unfinished runs, read from their folders, and put together as arms: runs that differ in nothing but the seed."""

import functools
import hashlib
import json
import math
import pathlib

from jaxlm.config import flatten, identity
from jaxlm.errors import UserError
from jaxlm.observe.report import field, read_json, read_lines
from jaxlm.registry import did_you_mean

HIGHER_IS_BETTER = ("accuracy", "tokens_per_second", "mfu", "mfu_palm")
# What a rerun does not give again: `metrics.jsonl` has the rest bit for bit.
TIMES = ("tokens_per_second", "step_seconds", "mfu", "mfu_palm", "data_wait_fraction", "elapsed_seconds")


class Run:
    """A run directory.

    arm: its name in sweep.json; "" outside a sweep.
    """

    def __init__(self, folder: pathlib.Path, arm: str = ""):
        self.folder, self.arm = folder, arm
        self.record = read_json(folder / "config.json")
        if "config" not in self.record:  # weights of Hugging Face have such a file too
            raise UserError(f"{folder}: no config.json there that is a run's; give run directories, or the folder of a sweep")
        self.config = self.record["config"]
        self.summary = read_json(folder / "summary.json")
        self.status = self.summary["status"] if self.summary else "running"
        self.seed = self.config["seed"]

    @functools.cached_property
    def lines(self) -> list[dict]:
        return read_lines(self.folder / "metrics.jsonl")

    @functools.cached_property
    def experiment(self) -> str:
        return experiment(self.config)

    def curve(self, split: str, name: str) -> list[tuple[int, float]]:
        """[(step, value)], the last of each step."""
        return list({line["step"]: line[name] for line in self.lines
                     if line["split"] == split and field(line, name) is not None}.items())

    def final(self, split: str, name: str) -> float | None:
        """The last value of a run that ended; None for others."""
        points = self.curve(split, name) if self.status == "completed" else []
        return points[-1][1] if points else None

    @functools.cached_property
    def train_seconds(self) -> float | None:
        """In steps: without start-up, compilation, evaluation and saving; those before a stop and those after it."""
        total, before = 0.0, 0
        for line in self.lines:
            if line["split"] == "train" and line["step_seconds"] is not None:
                total += line["step_seconds"] * (line["step"] - before)
                before = line["step"]
        return total or None

    def data_order(self) -> dict:
        """What decides which rows came in which order; equal for two runs that can be paired."""
        keys = {key: value for key, value in identity(self.config).items()
                if key in ("seed", "seq_len", "model.vocab_size") or key.startswith("data.")}
        return json.loads(json.dumps({**keys, "text": self.record["data"] if "data" in self.record else None}))


class Arm:
    """Runs of one experiment, by seed."""

    def __init__(self, name: str, runs: list[Run]):
        self.name, self.runs = name, sorted(runs, key=lambda run: run.seed)
        self.config = self.runs[0].config
        self.experiment = self.runs[0].experiment

    def finals(self, split: str, name: str) -> dict[int, float]:
        """seed -> last value, of the runs that ended."""
        return {run.seed: value for run in self.runs if (value := run.final(split, name)) is not None}

    def mean_of(self, name: str) -> float | None:
        """Of a number of summary.json, over the runs that ended and have it."""
        return mean(field(run.summary, name) for run in self.runs if run.status == "completed")

    def train_seconds(self) -> float | None:
        return mean(run.train_seconds for run in self.runs if run.status == "completed")


def mean(values) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def experiment(config) -> str:
    """16 hex digits of all that makes the experiment but the seed; `jaxlm.config.fingerprint` has the seed too."""
    values = {key: value for key, value in identity(config).items() if key != "seed"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_runs(paths: list[str]) -> list[Run]:
    """Of run directories, folders of sweeps, and folders that hold run directories. Raises UserError: none there."""
    runs, problems = [], []
    for path in map(pathlib.Path, paths):
        planned = field(read_json(path / "sweep.json"), "runs") or []
        names = {(path / run["workdir"]).resolve(): run["arm"] for run in planned}
        folders = [path] if (path / "config.json").is_file() else outermost(f.parent for f in path.rglob("config.json"))
        runs += [Run(folder, names[folder.resolve()] if folder.resolve() in names else "") for folder in folders
                 if not names or folder.resolve() in names]
        if not folders:
            problems.append(f"{path}: no runs there (no config.json); give run directories, or the folder of a sweep")
    if problems:
        raise UserError(*problems)
    return list({run.folder.resolve(): run for run in runs}.values())


def outermost(folders) -> list[pathlib.Path]:
    """Without those inside another: Hugging Face weights that a run was made of have a config.json too."""
    known = set(folders)
    return sorted(folder for folder in known if not known & set(folder.parents))


def arms_of(runs: list[Run], order: list[str] = ()) -> list[Arm]:
    """Runs that differ only in the seed together. order: names that come first. Raises UserError: one seed twice."""
    groups, problems = {}, []
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    arms, names = [], set()
    for group in groups.values():
        by_seed = {}
        for run in group:
            if run.seed in by_seed:
                problems.append(f"{by_seed[run.seed].folder} and {run.folder}: the same experiment with the same seed "
                                f"{run.seed}, which is no second observation; leave one out")
            by_seed[run.seed] = run
        name = group[0].arm or group[0].folder.name
        if name.startswith("seed-"):
            name = group[0].folder.parent.name
        arms.append(Arm(name if name not in names else str(group[0].folder), group))
        names.add(arms[-1].name)
    if problems:
        raise UserError(*problems)
    place = {name: i for i, name in enumerate(order)}
    return sorted(arms, key=lambda arm: place[arm.name] if arm.name in place else len(place))


UNEVALUATED = ("train", "internals")  # splits of metrics.jsonl that are no evaluation


def choose_metric(arms: list[Arm], wanted: str = "") -> tuple[str, str]:
    """-> (split, field) of metrics.jsonl. wanted: "loss", "bits_per_byte", "valid/web:loss"; empty: the validation loss, but
    bits per byte where arms cut text into other tokens, as a loss per token cannot be compared then; without validation the
    training loss. Raises UserError: no run has it."""
    splits = {line["split"] for arm in arms for run in arm.runs for line in run.lines}
    evaluated = sorted(splits.difference(UNEVALUATED), key=lambda split: (split != "valid/all", split))
    split, _, name = wanted.rpartition(":")
    split = split or (evaluated[0] if evaluated else "train")
    if not name:
        cut = {json.dumps([flatten(arm.config)[key] for key in ("data.tokenizer", "data.bpe_vocab_size")]) for arm in arms}
        name = "bits_per_byte" if len(cut) > 1 and split != "train" else "loss"
    names = sorted({n for arm in arms for run in arm.runs for line in run.lines if line["split"] == split
                    for n, value in line.items() if isinstance(value, (int, float)) and n != "step"})
    if not any(run.lines for arm in arms for run in arm.runs):
        raise UserError("no run has written metrics yet; report when some have")
    if name not in names:
        have = did_you_mean(name, names) if names else f"there are {', '.join(['train', *evaluated])}"
        raise UserError(f"--metric={wanted or name}: no run has it ({split}); {have}")
    return split, name


def order_differences(a: Run, b: Run) -> list[str]:
    """The keys in which the data order of two runs differs: such runs are no pair."""
    one, other = a.data_order(), b.data_order()
    return [f"{key}: {shown(one, key)} -> {shown(other, key)}" for key in sorted({*one, *other})
            if shown(one, key) != shown(other, key)]


def provenance(arms: list[Arm]) -> dict:
    """What the runs were made with; more than one value is worth a look."""
    runs = [run for arm in arms for run in arm.runs]
    tell = lambda values: sorted({str(value) for value in values if value is not None})
    return {"commit": tell(field(run.record, "commit") for run in runs),
            "jax": tell(field(run.summary, "jax_version") for run in runs),
            "device": tell(f"{run.summary['devices']} x {run.summary['device_kind']}" for run in runs if run.summary)}


def shown(values: dict, key: str):
    return values[key] if key in values else "(absent)"


def finite(value) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
