"""The noise floor of an experiment: how far runs that differ in nothing but the seed lie apart.

    <sweep>/noise.json                      of its arms
    $JAXLM_CACHE/noise/<experiment>.json    by the config's fingerprint without its seed; found again for any later report
    configs/noise/<preset>.json             of presets, shipped: the noise.json of `jaxlm sweep --config=<preset> --repeats=K`
"""

import math
import os
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats

from configs import default
from jaxlm.config import flatten, identity
from jaxlm.errors import UserError
from jaxlm.observe.report import field, read_json
from jaxlm.research.runs import UNEVALUATED, Arm, choose_metric, experiment, provenance
from jaxlm.train.rundir import write_json

SHIPPED = pathlib.Path(default.__file__).parent / "noise"
FEWEST = 3  # seeds from which a standard deviation is worth keeping


class Noise(NamedTuple):
    """Of one metric of one experiment."""

    runs: int
    mean: float
    std: float  # over seeds, ddof=1
    source: str  # where it was measured

    @property
    def between_two(self) -> float:
        """Two runs of this experiment with other seeds lie farther apart than this in 5 % of cases: t * std * sqrt(2)."""
        return float(stats.t.isf(0.025, self.runs - 1) * self.std * math.sqrt(2))


def measure(arm: Arm) -> dict | None:
    """{"experiment", "name", "seeds", "about", "metrics": {"valid/all:loss": {"runs", "mean", "std", "std_by_step"}}, "config":
    what makes the experiment}; None with fewer than FEWEST finished runs."""
    finished = [run for run in arm.runs if run.status == "completed"]
    if len(finished) < FEWEST:
        return None
    metrics = {}
    splits = {line["split"] for line in finished[0].lines if line["split"] not in UNEVALUATED} or {"train"}
    for split in sorted(splits):
        names = {name for line in finished[0].lines if line["split"] == split for name in line}
        for name in sorted(names & {"loss", "perplexity", "bits_per_byte", "accuracy"}):
            curves = [dict(run.curve(split, name)) for run in finished]
            steps = sorted(set.intersection(*map(set, curves)))
            by_step = {str(s): float(np.std([curve[s] for curve in curves], ddof=1)) for s in steps}
            finals = list(arm.finals(split, name).values())
            if len(finals) >= FEWEST:
                metrics[f"{split}:{name}"] = {"runs": len(finals), "mean": float(np.mean(finals)),
                                               "std": float(np.std(finals, ddof=1)), "std_by_step": by_step}
    return {"experiment": arm.experiment, "name": arm.name, "seeds": [run.seed for run in finished], "about": provenance([arm]),
            "metrics": metrics, "config": identity(arm.config)}


def store(arms: list[Arm], folder: str, cache: str) -> list[dict]:
    """Measures each arm and keeps what it finds in `folder` and in the cache, where more runs replace fewer."""
    measured = [found for arm in arms if (found := measure(arm))]
    if measured:
        write_json(os.path.join(folder, "noise.json"), measured)
    for found in measured:
        file = pathlib.Path(cache, "noise", f"{found['experiment']}.json")
        old = read_json(file)
        if not old or len(old["seeds"]) <= len(found["seeds"]):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
    return measured


def lookup(arm: Arm, metric: tuple[str, str], cache: str) -> Noise | None:
    """Of the arm's own runs, or of those stored of the same experiment, whichever are more; None where there are neither."""
    earlier = read_json(pathlib.Path(cache, "noise", f"{arm.experiment}.json"))
    records = {"of these runs": measure(arm), "of earlier runs": earlier, "shipped with the preset": shipped(arm)}
    known = [noise for source, record in records.items() if record and (noise := noise_of(record, metric, source))]
    return max(known, key=lambda noise: noise.runs, default=None)


def noise_of(record: dict, metric: tuple[str, str], source: str) -> Noise | None:
    numbers = field(record["metrics"], ":".join(metric))
    return Noise(numbers["runs"], numbers["mean"], numbers["std"], source) if numbers else None


def shipped(arm: Arm) -> dict | None:
    """The record of a preset that is the same experiment. A key that came after it was measured had its default then."""
    defaults = flatten(default.get_config())
    records = (record for file in sorted(SHIPPED.rglob("*.json")) for record in read_json(file))
    return next((record for record in records if experiment(defaults | record["config"]) == arm.experiment), None)


def sentence(arm: Arm) -> str:
    """What a person is told after `jaxlm sweep --repeats=K`. Raises UserError: too few runs."""
    split, name = choose_metric([arm])
    if (measured := measure(arm)) is None:
        ended = sum(run.status == "completed" for run in arm.runs)
        raise UserError(f"noise of {arm.name}: {ended} finished runs; at least {FEWEST} are needed, better 5")
    noise = noise_of(measured, (split, name), "of these runs")
    return (f"noise of {arm.name}: {split} {name} {noise.mean:.4f}, standard deviation {noise.std:.2g} over {noise.runs} seeds; "
            f"two single runs must differ by more than {noise.between_two:.2g} to mean anything")
