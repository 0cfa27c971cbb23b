"""Which mesh, rematerialisation and accumulation: all that fit by the estimate, in the order of their estimated speed, the best
few compiled. The batch stays as it is: another would be another experiment."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.parallel.mesh import mesh_problems
from jaxlm.plan.devices import Target
from jaxlm.plan.estimate import Sizes, estimate
from jaxlm.plan.hardware import UNKNOWN
from jaxlm.plan.plan import MARGIN, Plan, plan, slow_factors, time_of

REMATS = ("none", "minimal", "save_dots", "save_attention", "offload", "full")  # from fast to frugal
COMPILED = 4  # candidates compiled
MOST_MICRO_BATCHES = 64
LARGEST_TENSOR = 16  # devices that one layer's products are cut up over


class Candidate(NamedTuple):
    axes: dict[str, int]
    slow: dict[str, int]  # factors of axes that go over slices
    remat: str
    accum: int
    fits: bool
    peak: float  # bytes of one device, by the estimate
    seconds: float  # a step, by the estimate

    def config(self, config):
        """`config` with this layout."""
        return laid_out(config, self.axes, self.slow, self.remat, self.accum)


def laid_out(config, axes, slow, remat: str, accum: int):
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.mesh.auto, c.model.remat, c.grad_accum_steps = False, remat, accum
        for axis, n in axes.items():
            setattr(c.mesh, axis, n)
        for axis, n in slow.items():
            setattr(c.mesh, f"dcn_{axis}", n)
    return c


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(config, target: Target) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """-> (axes, slow factors): all meshes that use every device. Over slices goes what the config says, else data, or fsdp where
    data is too short. A pipeline only where the config has one: fsdp saves the same memory, and bubbles cost time."""
    m, given, stage = config.model, slow_factors(config), max(1, config.mesh.stage)
    experts = divisors(m.num_experts) if m.feedforward == "moe" else [1]
    for tensor in (t for t in divisors(target.count // stage) if t <= LARGEST_TENSOR):
        for context in divisors(target.count // stage // tensor):
            for expert in (e for e in experts if target.count // stage // tensor // context % e == 0):
                rows = target.count // stage // tensor // context // expert
                for fsdp in divisors(rows):
                    axes = {"data": rows // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert,
                            "stage": stage}
                    longest = next((axis for axis in ("data", "fsdp") if axes[axis] % target.slices == 0), None)
                    if target.slices == 1 or max(given.values()) > 1:
                        yield axes, given
                    elif longest:
                        yield axes, given | {longest: target.slices}


def candidates(config, target: Target, sizes: Sizes, remats, accumulations, all_too: bool = False) -> list[Candidate]:
    """Those that fit by the estimate, the fastest first; of two as fast, the one that holds less. all_too: those too that do not
    fit."""
    found = []
    for axes, slow in meshes(config, target):
        for accum in accumulations:
            trial = laid_out(config, axes, slow, "full", accum)
            if mesh_problems(trial, axes, target.count):
                continue
            for remat in remats:
                trial.model.remat = remat
                guess = estimate(trial, sizes, axes, target.chip, target.slices)
                fits = target.limit is None or guess.peak <= MARGIN * target.limit
                if fits or all_too:
                    line = time_of(trial, target, axes, guess, None)
                    found.append(Candidate(axes, slow, remat, accum, fits, guess.peak, line.step if line else 0.0))
    return sorted(found, key=lambda c: (c.seconds, c.peak))


def everything(config, target: Target, sizes: Sizes) -> list[Candidate]:
    """With all rematerialisations, the config's own too, and all ways to cut the batch up."""
    remats = dict.fromkeys((*REMATS, config.model.remat))
    return candidates(config, target, sizes, remats, [a for a in divisors(config.batch_size) if a <= MOST_MICRO_BATCHES])


def best_mesh(config, target: Target, sizes: Sizes) -> tuple[Candidate, str]:
    """-> (the mesh for `mesh.auto`, why): the fastest that fits by the estimate, with the config's own rematerialisation and
    accumulation. A target whose speeds are not known is compared by an H100's."""
    known = target if target.chip else target._replace(chip=UNKNOWN)
    found = candidates(config, known, sizes, (config.model.remat,), (config.grad_accum_steps,), all_too=True)
    if not found:
        raise UserError(f"mesh=auto: no mesh of {target.count} devices divides the batch and the model; change batch_size")
    fitting = [c for c in found if c.fits]
    best = fitting[0] if fitting else min(found, key=lambda c: c.peak)
    room = f"{best.peak / 2**30:.2f} of {target.limit / 2**30:.2f} GiB a device"
    if not fitting:
        return best, f"of {len(found)} meshes none fits by the estimate; this one needs least, {room}: it may not fit"
    speeds = "" if target.chip else ", going by an H100's speeds"
    return best, f"the fastest by the estimate{speeds} of {len(fitting)} meshes that fit, {room}"


def search(config, target: Target, sizes: Sizes, cache: str = "", say: Callable[[str], None] = lambda line: None) -> list[Plan]:
    """-> plans, the best first; none where nothing fits by the estimate. say: takes a line of progress."""
    began = time.perf_counter()
    ranked = everything(config, target, sizes)
    say(f"{len(ranked)} layouts (mesh, rematerialisation, micro-batches) fit by the estimate, found in "
        f"{time.perf_counter() - began:.1f} s")
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
    return sorted(plans, key=lambda p: (p.fits is False, p.roofline.step if p.roofline else 0.0, p.peak))


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
