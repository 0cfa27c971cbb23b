"""Designs of a sweep: which settings are tried. Each gives dicts of overrides, one an arm, for `add(**overrides)`.

    def sweep(add):
        add.seeds = 5  # paired: every arm runs with the same seeds, hence on the same rows in the same order
        for overrides in grid({"optimizer.name": ("adamw", "muon"), "model.norm": ("rms", "layer")}):
            add(**overrides)

No JAX in this file: a config file imports it.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError


class Uniform(NamedTuple):
    """A number between `low` and `high`; on a logarithmic scale if `log`. A whole one if both ends are."""

    low: float
    high: float
    log: bool = False

    def draw(self, generator: np.random.Generator):
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high + isinstance(self.low, int) * isinstance(self.high, int))
        return int(value) if isinstance(self.low, int) and isinstance(self.high, int) else float(f"{value:.4g}")


def grid(space: dict[str, tuple], only: dict[str, Callable[[dict], bool]] | None = None) -> Iterator[dict]:
    """Every combination of the values of each key; the last key changes fastest.

    only: key -> a condition on a combination; where it is false, the key is left to the config, and combinations that are then
    the same come once: `grid({"optimizer.name": ("adamw", "muon"), "optimizer.muon_steps": (4, 5)},
    only={"optimizer.muon_steps": lambda o: o["optimizer.name"] == "muon"})` is three arms.
    """
    require_values(space)
    return distinct(conditioned(dict(zip(space, values, strict=True)), only) for values in itertools.product(*space.values()))


def random(space: dict[str, tuple | Uniform], trials: int, seed: int = 0, only: dict[str, Callable[[dict], bool]] | None = None
           ) -> Iterator[dict]:
    """`trials` different combinations, each key drawn by itself: one of a tuple, or from a `Uniform`. The same seed draws the
    same, and more trials only add to them. Better than a grid where few of the keys matter (Bergstra & Bengio 2012, JMLR 13)."""
    require_values({key: values for key, values in space.items() if not isinstance(values, Uniform)})
    generator = np.random.default_rng(seed)

    def draws():
        for _ in range(100 * trials):  # a small space may have fewer combinations
            yield conditioned({key: values.draw(generator) if isinstance(values, Uniform)
                               else values[int(generator.integers(len(values)))] for key, values in space.items()}, only)

    return itertools.islice(distinct(draws()), trials)


def require_values(space: dict) -> None:
    if problems := [f"sweep: {key}={values!r}: give the values to try as a tuple, such as ({values!r},)"
                    for key, values in space.items() if not isinstance(values, (tuple, list, range)) or not len(values)]:
        raise UserError(*problems)


def conditioned(overrides: dict, only) -> dict:
    """Without the keys whose condition does not hold."""
    return {key: value for key, value in overrides.items() if not (only and key in only and not only[key](overrides))}


def distinct(all_overrides) -> Iterator[dict]:
    seen = []
    for overrides in all_overrides:
        if overrides not in seen:
            seen.append(overrides)
            yield overrides
