"""`bench`: how fast a config trains here. The program is the run's own (`build_program`), fed as the loop feeds it.

Protocol: warm-up, then blocks of steps with the device waited for only at the end of each; no profiler and no other work in
between. Figures are of the block, so a reader sees the spread.
"""

import contextlib
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Tracked, fingerprint, flatten, settle_class_weights
from jaxlm.data.feed import put_everywhere
from jaxlm.data.loader import build_data
from jaxlm.errors import Diverged, UserError
from jaxlm.observe.throughput import flops_per_token, peak_flops, peak_memory_bytes
from jaxlm.parallel.compile import empty_compile_cache
from jaxlm.parallel.distributed import is_main
from jaxlm.parallel.rules import replicated
from jaxlm.train.frozen import read_frozen
from jaxlm.train.rundir import git_commit
from jaxlm.train.step import build_program

ELSEWHERE = ("data.", "checkpoint.", "eval.", "observe.")  # keys of what a benchmark leaves out: they may stand unread


def bench(config, warmup: int = 0, blocks: int = 0, block_steps: int = 0, overrides: list[str] = (), profile: str = "") -> dict:
    """Train on this machine for a while and measure. All processes of a run call it alike; all get a result.

    Args:
        config: as for `train`. Its data is replaced by random tokens where model.vocab_size says of how many kinds.
        warmup, blocks, block_steps: steps before timing, blocks timed, steps in each; 0: 15, 7, 20 (3, 5, 5 on a CPU).
        overrides: those already in `config`, for `Tracked.unread`.
        profile: a directory for an XProf trace of three steps, made after the timing; empty: none.

    Returns seconds, tokens per second over all devices at the median block; mfu, mfu_palm (None on an unknown device); of the
    first device matmul_ceiling_tflops and peak memory; compile_seconds cold, and warm where observe.compile_cache is on.

    Raises UserError; Diverged if the last step's loss or gradient is not finite: the speed of such steps is no speed.
    """
    on_cpu = jax.default_backend() == "cpu"
    usual = (3, 5, 5) if on_cpu else (15, 7, 20)
    warmup, blocks, block_steps = (given or own for given, own in zip((warmup, blocks, block_steps), usual, strict=True))
    name = fingerprint(config)
    config = config.copy_and_resolve_references()
    config.stages = ()  # the run's own batch and rows: of all stages the largest
    if config.model.vocab_size and config.data.source != "synthetic":
        config.data.source = "synthetic"
    data, program, config = build(config, overrides)
    hyper, frozen = put_everywhere(program.hyper, replicated(program.mesh)), read_frozen(program, config)

    # ---- Compile, with and without what the cache keeps ----------------------------------------------------------------
    with empty_compile_cache():
        step_fn, cold = program.compile()
        warm = None
        if config.observe.compile_cache:
            jax.clear_caches()  # else the second is the first again, from memory
            _, warm = program.compile()

    # ---- Time ----------------------------------------------------------------------------------------------------------
    state = jax.jit(program.init, out_shardings=program.shardings)(config.seed)
    batches = data.train.prefetched(0, program.feed.put, program.feed.rows)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step_fn(state, next(batches), hyper, *frozen)
        jax.block_until_ready((state, metrics))
        return metrics

    seconds = []
    with contextlib.closing(batches), jax.transfer_guard("disallow"):
        run(warmup)
        for _ in range(blocks):
            began = time.perf_counter()
            metrics = run(block_steps)
            seconds.append((time.perf_counter() - began) / block_steps)
        peak_memory = peak_memory_bytes()
        last = {name: jax.device_get(metrics[name]).item() for name in ("loss", "finite")}
        if not last["finite"]:
            raise Diverged(f"non-finite loss or gradient at step {warmup + blocks * block_steps} of the benchmark; lower "
                           "optimizer.learning_rate")
        if profile:
            with jax.transfer_guard("allow"), jax.profiler.trace(profile) if is_main() else contextlib.nullcontext():
                run(3)
    model = program.model
    devices, tokens = program.mesh.size, config.batch_size * config.seq_len
    del state  # room for the matrices
    ceiling = matmul_flops(program.mesh.devices.flatten())

    # ---- Sum up --------------------------------------------------------------------------------------------------------
    kind = jax.devices()[0].device_kind
    causal, palm = flops_per_token(config, model.num_matmul_parameters, model.num_trained_matmul_parameters, program.frozen)
    speed, peak = tokens / statistics.median(seconds), peak_flops(kind, config.kernels.quantization)
    return {
        "tokens_per_second": speed,
        "step_seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
        "mfu": speed * causal / (devices * peak) if peak else None,
        "mfu_palm": speed * palm / (devices * peak) if peak else None,
        "matmul_ceiling_tflops": ceiling / 1e12, "peak_memory_bytes": peak_memory, "compile_seconds": cold,
        "device": f"{devices} x {kind}" + "".join(f", {a}={n}" for a, n in program.mesh.shape.items() if n > 1),
        "config_fingerprint": name, "commit": git_commit(),
        # For the table alone.
        "compile_seconds_warm": warm, "share_of_ceiling": speed * causal / (devices * ceiling), "loss": last["loss"],
        "parameters": model.num_parameters, "tokens": tokens, "data": config.data.source, "attention": program.backend,
        "warmup": warmup, "blocks": blocks, "block_steps": block_steps,
    }


def build(config, overrides, devices=None):
    """-> (data, program, config as a read-only view). Raises UserError also for keys set that the program does not read."""
    from configs import default

    tracked = Tracked(config)
    data = build_data(tracked)
    settle_class_weights(config, data.class_counts)
    program = build_program(tracked, data.vocab_size, devices)
    # What the loop reads beside the program, and what says how it watches and writes.
    tracked.reads.update(k for k in flatten(config) if k.startswith(ELSEWHERE))
    tracked.reads.update(("steps", "imports", "optimizer.nonfinite", "model.from_pretrained"))
    if unread := tracked.unread(default.get_config(), overrides):
        raise UserError(*unread)
    return data, program, tracked


def matmul_flops(devices) -> float:
    """FLOP/s of each of `devices` in one large matrix product, all at it at once: what a step's own products could reach.

    bfloat16 8192^3, on a CPU float32 2048^3; random normal numbers, since constants draw less power and read high. The best of
    several, so nothing passing on the machine counts.
    """
    on_cpu = devices[0].platform == "cpu"
    size, dtype, repeats = (2048, jnp.float32, 1) if on_cpu else (8192, jnp.bfloat16, 20)
    mesh = Mesh(np.asarray(devices), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    shape = (len(devices), size, size)

    @functools.partial(jax.jit, out_shardings=sharding)
    def make(seed):
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("device"), out_specs=PartitionSpec("device"))
    def product(a, b):
        return (a[0] @ b[0])[None]

    a, b = make(0), make(1)
    best = math.inf
    for _ in range(6):  # the first compiles
        began = time.perf_counter()
        for _ in range(repeats):
            out = product(a, b)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * size**3 / best
