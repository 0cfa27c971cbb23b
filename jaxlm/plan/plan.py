"""`jaxlm plan`: will this config fit these devices, how fast will a step be, and what limits it?"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
from typing import NamedTuple

import jax

from jaxlm.errors import UserError
from jaxlm.kernels.attention import choose_backend
from jaxlm.parallel.compile import empty_compile_cache
from jaxlm.parallel.mesh import SLOW, axis_sizes, mesh_problems
from jaxlm.plan.compiled import Compiled, OutOfMemory, compile_step
from jaxlm.plan.devices import Target
from jaxlm.plan.estimate import FROZEN, STATE, Estimate, Sizes, attention_work, estimate, network_seconds
from jaxlm.plan.roofline import Roofline, roofline

MARGIN = 0.95  # of the limit: an estimate above this share of it is said not to fit
FACTS = ("peak_bytes", "argument_bytes", "flops", "product_bytes", "other_bytes", "network", "compile_seconds")


class Plan(NamedTuple):
    config: object
    target: Target
    axes: dict[str, int]
    attention: str  # the backend that training would take there
    estimate: Estimate
    compiled: Compiled | None  # None: estimated only, or it does not fit
    refused: OutOfMemory | None
    limit: float | None  # bytes of one device; None: not known
    roofline: Roofline | None  # None: the hardware's speed is not known

    @property
    def peak(self) -> float:
        """Bytes on one device at the worst moment, as the compiler says, or as estimated."""
        return self.compiled.peak_bytes if self.compiled else self.refused.needed if self.refused else self.estimate.peak

    @property
    def fits(self) -> bool | None:
        if self.compiled or self.refused:
            return self.limit is None or (self.compiled is not None and self.peak <= self.limit)
        return None if self.limit is None else self.peak <= MARGIN * self.limit

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part, in all `peak`. The state's and a frozen model's are exact. What the compiler holds beyond the parts that
        can be told from sizes is "temporaries"; where it holds less than those, it found room for them in one another: they are
        told smaller."""
        state = {part: size for part, size in self.estimate.memory.items() if part in (*STATE, FROZEN)}
        rest = {part: size for part, size in self.estimate.memory.items() if part not in (*STATE, FROZEN, "temporaries")}
        if not (self.compiled or self.refused):
            return self.estimate.memory
        room, told = self.peak - sum(state.values()), sum(rest.values())
        shrink = min(1.0, room / told) if told else 1.0
        return state | {part: size * shrink for part, size in rest.items()} | {"temporaries": max(0.0, room - told)}

    @property
    def tokens_per_second(self) -> float | None:
        return self.config.batch_size * self.config.seq_len / self.roofline.step if self.roofline else None

    @property
    def mfu(self) -> float | None:
        """Of the roofline's step, causal attention; of 8-bit products None, for want of their peak."""
        if not self.roofline or self.config.kernels.quantization != "none":
            return None
        return self.estimate.model_flops / (self.roofline.step * self.target.chip.peak_flops)


def plan(config, target: Target, sizes: Sizes, compiles: bool = True, cache: str = "", keep: bool = False) -> Plan:
    """Args:
        compiles: ask the compiler too, where there is one for the target.
        cache: a directory where the compiler's answers are kept, by all that they depend on; empty: none.
        keep: the executable is wanted, so it must be compiled now.

    Raises UserError: what of the config does not fit the devices' number or kind.
    """
    axes = axis_sizes(config, target.count)
    problems, slow = mesh_problems(config, axes, target.count), math.prod(slow_factors(config).values())
    if target.slices > 1 and slow != target.slices:
        problems.append(f"--slices={target.slices}: mesh.dcn_data x dcn_fsdp x dcn_stage is {slow}; set the factor of an axis "
                        f"that goes over slices, such as --config.mesh.dcn_data={target.slices}, or --search for the best")
    if problems:
        raise UserError(*problems)
    attention = config.kernels.context if axes["context"] > 1 else choose_backend(config, target.platform)[0]
    guess = estimate(config, sizes, axes, target.chip, target.slices)
    compiled = refused = None
    if compiles and target.devices is not None:
        compiled, refused = ask_compiler(config, target, sizes, cache, keep)
    limit = refused.limit if refused else target.limit
    return Plan(config, target, axes, attention, guess, compiled, refused, limit, time_of(config, target, axes, guess, compiled))


def slow_factors(config) -> dict[str, int]:
    """{"data": 2, ...}: of each axis that may, the factor that goes over slices or nodes."""
    return {axis: getattr(config.mesh, f"dcn_{axis}") for axis in SLOW}


def time_of(config, target: Target, axes, guess: Estimate, compiled: Compiled | None) -> Roofline | None:
    if target.chip is None:
        return None
    if compiled:
        seconds = network_seconds(config, compiled.network, axes, target.chip, target.slices)
        return roofline(target.chip, compiled.flops, compiled.product_bytes, compiled.other_bytes, seconds,
                        guess.host_bytes)
    return roofline(target.chip, guess.flops, guess.product_bytes, guess.bytes - guess.product_bytes,
                    guess.network_seconds, guess.host_bytes)


# ---- The compiler, and what it said before ----------------------------------------------------------------------------------


def ask_compiler(config, target: Target, sizes: Sizes, cache: str, keep: bool) -> tuple[Compiled | None, OutOfMemory | None]:
    file = pathlib.Path(cache, f"{key_of(config, target, sizes)}.json") if cache else None
    if file and file.exists() and not keep:
        stored = json.loads(file.read_text())
        return (None, OutOfMemory(*stored["refused"])) if "refused" in stored else (Compiled(**stored), None)
    from jaxlm.train.step import build_program

    # JAX's own cache could not load a program for devices that are not there, and one that it loaded for a CPU cannot be saved.
    with contextlib.nullcontext() if target.devices[0] in jax.devices() and not keep else empty_compile_cache():
        program = build_program(config, sizes.vocab_size, target.devices)
        try:
            compiled, refused = compile_step(program, attention_work(config, sizes)), None
        except OutOfMemory as error:
            compiled, refused = None, error
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"refused": [refused.needed, refused.limit]} if refused else {name: getattr(compiled, name) for name in FACTS}
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(facts))
        temporary.replace(file)
    return compiled, refused


def key_of(config, target: Target, sizes: Sizes) -> str:
    """Of everything that the compiler's answer depends on: config, devices, versions, and the code of jaxlm itself."""
    import importlib.metadata

    versions = {}
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    source = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    facts = [config.to_json(), target.name, target.count, sizes.vocab_size, versions, source.hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


# ---- Advice -----------------------------------------------------------------------------------------------------------------


def what_would_fit(config, target: Target, sizes: Sizes) -> str:
    """By the estimate: how many such devices, or what batch, would hold this config with everything computed again; as words."""
    def fits(count, **changes):
        c = config.copy_and_resolve_references()
        c.model.remat, c.mesh.data, c.mesh.fsdp = "full", 1, -1
        for key, value in changes.items():
            setattr(c, key, value)
        axes = axis_sizes(c, count)
        if not min(axes.values()) or mesh_problems(c, axes, count):
            return False
        return estimate(c, sizes, axes, target.chip, target.slices).peak <= MARGIN * target.limit

    advice = []
    for factor in (2**i for i in range(1, 11)):
        batch = max(config.batch_size, target.count * factor)
        if fits(target.count * factor, batch_size=batch):
            more = f" with batch_size={batch}" if batch > config.batch_size else ""
            advice.append(f"{target.count * factor} such devices{more}")
            break
    accumulations = [n for n in range(config.grad_accum_steps + 1, config.batch_size + 1) if config.batch_size % n == 0]
    if n := next((n for n in accumulations if fits(target.count, grad_accum_steps=n)), None):
        advice.append(f"grad_accum_steps={n} (the same batch in {n} parts)")
    batches = [config.batch_size // n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0]
    if n := next((n for n in batches if fits(target.count, batch_size=n, grad_accum_steps=1)), None):
        advice.append(f"batch_size={n}")
    if not advice:
        return "not even 1,024 times as many devices would hold it with model.remat=full: cut it up over mesh.tensor"
    return "with model.remat=full and mesh.fsdp over all devices, these would hold it by the estimate: " + "; or ".join(advice)


# ---- Words ------------------------------------------------------------------------------------------------------------------


def command(p: Plan, spec: str, overrides=()) -> str:
    """The command that trains as planned."""
    mesh = [f"--config.mesh.{axis}={n}" for axis, n in p.axes.items() if n > 1 or axis in ("data", "fsdp")]
    mesh += [f"--config.mesh.dcn_{axis}={n}" for axis, n in slow_factors(p.config).items() if n > 1]
    chosen = [*mesh, f"--config.model.remat={p.config.model.remat}", f"--config.grad_accum_steps={p.config.grad_accum_steps}"]
    keys = {part.partition("=")[0] for part in chosen} | {"--config.mesh", "--config.mesh.auto"}
    kept = [o for o in overrides if o.partition("=")[0] not in keys]
    return " ".join(["jaxlm train", f"--config={spec}", *kept, *chosen, "--workdir=runs/NAME"])


def as_json(p: Plan, spec: str, overrides=()) -> dict:
    r, chip = p.roofline, p.target.chip
    source = p.compiled or p.estimate
    moved = p.compiled.product_bytes + p.compiled.other_bytes if p.compiled else p.estimate.bytes
    return {
        "fits": p.fits, "peak_bytes_per_device": p.peak, "limit_bytes": p.limit, "bytes": p.memory,
        "flops_per_step": source.flops * math.prod(p.axes.values()), "step_seconds": r.step if r else None,
        "tokens_per_second": p.tokens_per_second, "mfu": p.mfu, "limited_by": r.limited_by if r else None,
        "mesh": p.axes, "remat": p.config.model.remat, "command": command(p, spec, overrides),
        "grad_accum_steps": p.config.grad_accum_steps, "source": "compiled" if p.compiled or p.refused else "estimated",
        "devices": p.target.count, "topology": p.target.name, "attention": p.attention,
        "hbm_bytes": moved, "network_bytes": source.network,
        "seconds": {"compute": r.compute, "memory": r.memory, "network": r.network, "host": r.host} if r else None,
        "hardware": chip._asdict() if chip else None,
        "compile_seconds": p.compiled.compile_seconds if p.compiled else None,
    }
