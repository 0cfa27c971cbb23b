"""Which mesh, rematerialisation and accumulation: all that fit by the estimate, in the order of their estimated speed, the best
few compiled. The batch stays as it is: another would be another experiment."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxlm.models.remat import POLICIES
from jaxlm.parallel.mesh import mesh_problems
from jaxlm.plan.devices import Target
from jaxlm.plan.estimate import Sizes, estimate
from jaxlm.plan.plan import MARGIN, Plan, plan, time_of

REMATS = ("none", "minimal", "save_dots", "save_attention", "offload", "full")  # from fast to frugal
COMPILED = 4  # candidates compiled
LARGEST_TENSOR = 16  # devices that one layer's products are cut up over


class Candidate(NamedTuple):
    axes: dict[str, int]
    remat: str
    accum: int
    fits: bool
    peak: float  # bytes of one device, by the estimate
    seconds: float  # a step, by the estimate

    def config(self, config):
        """`config` with this layout."""
        c = config.copy_and_resolve_references()
        with c.unlocked():
            c.mesh.auto, c.model.remat, c.grad_accum_steps = False, self.remat, self.accum
            for axis, n in self.axes.items():
                setattr(c.mesh, axis, n)
        return c


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(config, count: int) -> Iterator[dict[str, int]]:
    """All meshes of `count` devices that the model and the batch can be dealt out over. A pipeline only where the config has one:
    it changes no memory that fsdp does not, and its bubbles cost time."""
    m = config.model
    stage = max(1, config.mesh.stage)
    experts = divisors(m.num_experts) if m.feedforward == "moe" else [1]
    for tensor in (t for t in divisors(count // stage) if t <= LARGEST_TENSOR):
        for context in divisors(count // stage // tensor):
            for expert in (e for e in experts if count // stage // tensor // context % e == 0):
                rows = count // stage // tensor // context // expert
                for fsdp in divisors(rows):
                    yield {"data": rows // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert,
                           "stage": stage}


def candidates(config, target: Target, sizes: Sizes, remats=REMATS, accumulations=None, all_too=False) -> list[Candidate]:
    """Those that fit by the estimate, the fastest first; of two as fast, the one that holds less. all_too: those too that do not
    fit."""
    found = []
    for axes in meshes(config, target.count):
        for accum in accumulations or [a for a in divisors(config.batch_size) if a <= 64]:
            trial = Candidate(axes, "full", accum, True, 0, 0).config(config)
            if mesh_problems(trial, axes, target.count):
                continue
            for remat in remats:
                trial.model.remat = remat
                guess = estimate(trial, sizes, axes, target.chip, target.slices)
                fits = target.limit is None or guess.peak <= MARGIN * target.limit
                if fits or all_too:
                    line = time_of(trial, target, axes, guess, None)
                    found.append(Candidate(axes, remat, accum, fits, guess.peak, line.step if line else 0.0))
    return sorted(found, key=lambda c: (c.seconds, c.peak))


class Search(NamedTuple):
    plans: list[Plan]  # the best first
    considered: int
    fitting: int


def search(config, target: Target, sizes: Sizes, cache: str = "", say: Callable[[str], None] = lambda line: None) -> Search:
    """say: takes a line of progress. Raises nothing where nothing fits: `plans` is empty then."""
    began = time.perf_counter()
    everything = sum(1 for _ in meshes(config, target.count))
    ranked = candidates(config, target, sizes)
    say(f"{everything} meshes x {len(REMATS)} rematerialisations x accumulations: {len(ranked)} fit by the estimate "
        f"({time.perf_counter() - began:.1f} s)")
    plans, spent = [], []
    for candidate in distinct(ranked):
        good = sum(p.fits is not False for p in plans)
        if good == COMPILED or len(plans) == 2 * COMPILED:
            break
        left = f", about {sum(spent) / len(spent) * (COMPILED - good):.0f} s left" if spent and target.devices else ""
        if target.devices:
            say(f"compiling {len(plans) + 1}: {words(candidate)}{left}")
        began = time.perf_counter()
        plans.append(plan(candidate.config(config), target, sizes, cache=cache))
        spent.append(time.perf_counter() - began)
    order = lambda p: (p.fits is False, p.roofline.step if p.roofline else 0.0, p.peak)
    return Search(sorted(plans, key=order), everything, len(ranked))


def distinct(ranked: list[Candidate]) -> Iterator[Candidate]:
    """One of those that differ in nothing that matters: at most two of one mesh."""
    seen = {}
    for candidate in ranked:
        key = tuple(candidate.axes.values())
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 2:
            yield candidate


def words(c: Candidate) -> str:
    mesh = " x ".join(f"{axis} {n}" for axis, n in c.axes.items() if n > 1) or "one device"
    return f"{mesh}, remat {c.remat}" + (f", {c.accum} micro-batches" if c.accum > 1 else "")


assert set(REMATS) == {"none", *POLICIES}
