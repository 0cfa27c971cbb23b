"""A sweep: arms that a config file names beside `get_config`, each trained with several seeds, each run in a folder of its own.

    def sweep(add):
        add.seeds = 5  # of each arm: 0 ... 4; or a list of them
        add("adamw")  # the first arm is the baseline: the config as it is
        add("muon", **{"optimizer.name": "muon", "optimizer.learning_rate": 0.02})
        add("muon, longer", **{"optimizer.name": "muon"}, steps=2000, when=lambda loss: loss["muon"] < loss["adamw"])

    WORKDIR/sweep.json                 the plan, and how each run ended
    WORKDIR/<arm>/seed-<n>/            run directories as of `jaxlm train`

No JAX in this file: what is wrong with any arm is told before anything runs.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxlm.config import apply_overrides, call, diff, fingerprint, flatten, load, module_of, split_override
from jaxlm.errors import UserError
from jaxlm.observe.report import field, read_json
from jaxlm.registry import did_you_mean

ENDED = ("completed", "diverged")  # what running again would not change


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int
    overrides: list[str]  # of `jaxlm train`, the sweep's own included
    workdir: pathlib.Path
    config: object
    fingerprint: str

    def command(self, spec: str) -> list[str]:
        """The arguments of `jaxlm` that make this run."""
        return ["train", f"--config={spec}", f"--workdir={self.workdir}", *self.overrides]


class Arm(NamedTuple):
    name: str
    overrides: dict  # key -> value, as given to `add`
    seeds: list[int]
    when: Callable[[dict], bool] | None  # of the mean final losses of the arms before it, by name


class Add:
    """What `sweep` is called with. Arms are kept in the order in which they are added.

    seeds: of arms that do not name their own; a number n is 0 ... n - 1.
    """

    def __init__(self):
        self.seeds: int | Iterable[int] = 1
        self.arms: list[Arm] = []

    def __call__(self, name: str = "", /, *, seeds=None, when=None, **overrides):
        overrides = {key: value.item() if hasattr(value, "item") else value for key, value in overrides.items()}  # of NumPy's
        self.arms.append(Arm(name or name_of(overrides), overrides, seeds, when))


class Sweep(NamedTuple):
    spec: str  # of --config
    overrides: list[str]  # of the command line, for all arms
    workdir: pathlib.Path
    arms: list[Arm]
    runs: list[Run]  # by arm, then by seed

    def waves(self) -> Iterable[list[Arm]]:
        """Arms that may run at the same time: one with a condition waits for all before it."""
        wave = []
        for arm in self.arms:
            if arm.when and wave and not wave[-1].when:
                yield wave
                wave = []
            wave.append(arm)
        yield wave

    def runs_of(self, arms: list[Arm]) -> list[Run]:
        names = {arm.name for arm in arms}
        return [run for run in self.runs if run.arm in names]


def plan(spec: str, overrides: list[str], workdir: str, seeds: int = 0, repeats: int = 0) -> Sweep:
    """Every run of the sweep in the config file `spec`, checked.

    seeds: only the first so many of each arm; 0: all. repeats: no arms: the config itself with so many seeds.
    Raises UserError with all that is wrong, by arm: before anything runs.
    """
    path = spec.partition(":")[0]
    module, add = module_of(path), Add()
    if repeats:
        add.seeds = repeats
        add(pathlib.Path(path).stem)
    elif not hasattr(module, "sweep"):
        raise UserError(f"{path}: has no sweep(add); write one beside get_config (docs/research.md), or give --repeats=N")
    else:
        call(path, module.sweep, add)
    if not add.arms:
        raise UserError(f"{path}: sweep(add) added no arm; call add(...) in it")
    arms = [arm._replace(seeds=seeds_of(arm, add.seeds)[: seeds or None]) for arm in add.arms]
    return Sweep(spec, list(overrides), pathlib.Path(workdir), arms, runs_of(spec, overrides, pathlib.Path(workdir), arms))


def runs_of(spec: str, overrides: list[str], workdir: pathlib.Path, arms: list[Arm]) -> list[Run]:
    """The runs of `arms`. Raises UserError: a wrong key or value, equal arms, a folder of another experiment."""
    given, base = {split_override(o)[0] for o in overrides}, flatten(load(spec, list(overrides)))
    problems, runs, folders = [], [], {}
    for arm in arms:
        folder = workdir / slug(arm.name)
        if folder in folders:
            problems.append(f"arm {arm.name!r}: has the name of arm {folders[folder]!r}, or one too like it; rename one")
        folders[folder] = arm.name
        if twice := sorted(given & {*arm.overrides, "seed"}):
            problems += [f"arm {arm.name!r} sets {key}, and so does the command line; leave --config.{key} out"
                         for key in twice]
            continue
        try:
            unknown = [f"{key}: unknown key; {did_you_mean(key, base)}" for key in arm.overrides if key not in base]
            if unknown:
                raise UserError(*unknown)
            mine = [*overrides, *(f"--config.{key}={as_text(value)}" for key, value in arm.overrides.items())]
            config = load(spec, mine)
        except UserError as error:
            problems += [f"arm {arm.name!r}: {problem}" for problem in error.problems]
            continue
        for seed in arm.seeds if "seed" not in arm.overrides else [arm.overrides["seed"]]:
            with_seed = [o for o in mine if not o.startswith("--config.seed=")] + [f"--config.seed={seed}"]
            own = config.copy_and_resolve_references()
            apply_overrides(own, with_seed[-1:])
            runs.append(Run(arm.name, seed, with_seed, folder / f"seed-{seed}", own, fingerprint(own)))
    problems += equal_arms(runs) + foreign(runs)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return runs


def equal_arms(runs: list[Run]) -> list[str]:
    first, problems = {}, []
    for run in runs:
        other = first.setdefault(run.fingerprint, run)
        if other is not run:
            what = "gives this seed twice" if other.arm == run.arm else f"is the same experiment as arm {other.arm!r}"
            problems.append(f"arm {run.arm!r} {what} (seed {run.seed}, fingerprint {run.fingerprint}); remove one, or let a key "
                            "differ that makes the experiment")
    return problems


def foreign(runs: list[Run]) -> list[str]:
    """Folders where another experiment already is: the sweep was edited since."""
    problems = []
    for run in runs:
        there = read_json(run.workdir / "config.json")
        if there and there["fingerprint"] != run.fingerprint:
            changes = "; ".join(diff(there["config"], json.loads(run.config.to_json())))
            problems.append(f"arm {run.arm!r}: {run.workdir} has a run of another config ({changes}); use another --workdir, "
                            "another name for the arm, or remove that folder")
    return problems


def seeds_of(arm: Arm, default) -> list[int]:
    seeds = default if arm.seeds is None else arm.seeds
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"arm {arm.name!r}: seeds={seeds}: give a number of seeds, at least 1, or a list of them, none negative")
    return seeds


def name_of(overrides: dict) -> str:
    """`{"optimizer.name": "muon", "steps": 50}` -> "optimizer=muon steps=50"."""
    short = lambda key: (key.removesuffix(".name") if key.endswith(".name") else key).rpartition(".")[2]
    return " ".join(f"{short(key)}={as_text(value)}" for key, value in overrides.items()) or "base"


def slug(name: str) -> str:
    """A folder's name of an arm's."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.") or "arm"


def as_text(value) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else repr(value)


# ---- What has been done: on disk --------------------------------------------------------------------------------------------


def status_of(run: Run) -> str:
    """completed, diverged, preempted; "" if it has not ended, or not run."""
    summary = read_json(run.workdir / "summary.json")
    same = field(read_json(run.workdir / "config.json"), "fingerprint") == run.fingerprint
    return summary["status"] if summary and same else ""


def todo(runs: list[Run]) -> list[Run]:
    """The runs that are not done; a finished one is known by the fingerprint of its config."""
    return [run for run in runs if status_of(run) not in ENDED]


def loss_of(run: Run) -> float | None:
    """The final validation loss, or where there is none the training loss; None if it did not end well."""
    if status_of(run) != "completed":
        return None
    summary = read_json(run.workdir / "summary.json")
    return summary["train_loss"] if summary["valid_loss"] is None else summary["valid_loss"]


def mean_losses(runs: list[Run]) -> dict[str, float]:
    """By arm, of the runs that completed; what a condition of `add(when=...)` sees. An arm of which none did is infinite."""
    losses = {run.arm: [] for run in runs}
    for run in runs:
        if (loss := loss_of(run)) is not None:
            losses[run.arm].append(loss)
    return {arm: sum(values) / len(values) if values else float("inf") for arm, values in losses.items()}
