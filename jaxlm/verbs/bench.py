"""`jaxlm bench`, `jaxlm doctor`: what this machine can do."""

import json
import sys
import time

from jaxlm.errors import UserError
from jaxlm.parallel import distributed
from jaxlm.verbs.start import start_jax


def add_bench(verb):
    verb.add_argument("--config", metavar="FILE[:ARG]", help="what to measure, such as configs/gpt2_124m.py")
    verb.add_argument("--warmup", type=int, default=0, metavar="N", help="steps before timing (15; on a CPU 3)")
    verb.add_argument("--blocks", type=int, default=0, metavar="N", help="blocks timed (7; on a CPU 5)")
    verb.add_argument("--block_steps", type=int, default=0, metavar="N", help="steps in a block (20; on a CPU 5)")
    verb.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    verb.add_argument("--profile", default="", metavar="DIR", help="after the timing, write an XProf trace of three steps there")
    verb.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results of --json side by side; measures nothing")


def run_bench(args):
    """How fast a config trains here: tokens/s, MFU, matmul ceiling, memory, compile time.

    Feeds random tokens where the config sets model.vocab_size, else the run's own data. Any key can be set, as for train.
    """
    from jaxlm.observe import scores

    if args.compare:
        print(scores.comparison(*args.compare))
        return
    if not args.config:
        raise UserError("bench: nothing to do; give --config=FILE to measure, or --compare A.json B.json")
    if problems := [f"--{name}={value}: must be at least 1, or left out" for name in ("warmup", "blocks", "block_steps")
                    if (value := getattr(args, name)) < 0]:
        raise UserError(*problems)
    from jaxlm.config import load

    config = load(args.config, args.overrides)
    start_jax(config)
    from jaxlm.train.bench import bench

    result = bench(config, args.warmup, args.blocks, args.block_steps, args.overrides, args.profile)
    if not distributed.is_main():
        return
    if args.json:
        print(json.dumps({key: result[key] for key in scores.KEYS}))
        return
    print(scores.table(result))
    if args.profile:
        print(scores.operations(args.profile))


def run_doctor(args):
    """Versions, devices, what each attention backend says of this machine, and a 10-second self-test."""
    import importlib.metadata

    from jaxlm.train.rundir import PACKAGES

    print("python", sys.version.split()[0], " ", "  ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES))
    start_jax()
    import jax
    import numpy as np

    from configs import default
    from jaxlm.kernels.attention import BACKENDS, attend, request_of

    print("devices", ", ".join(f"{d.device_kind} ({d.platform})" for d in jax.devices()))
    config = default.get_config()
    config.model.head_dim = 64
    config.model.compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    request = request_of(config, jax.default_backend())
    rng, results = np.random.default_rng(0), {}
    q, k, v = (jax.numpy.asarray(rng.standard_normal((2, 128, 4, 64)), config.model.compute_dtype) for _ in range(3))
    for name in BACKENDS:
        reason = BACKENDS[name].supports(request)
        if not reason:
            results[name] = np.asarray(jax.jit(lambda q, k, v, n=name: attend(q, k, v, backend=n))(q, k, v), np.float32)
        print(f"attention {name:8}", reason or f"ok, differs from plain by {abs(results[name] - results['plain']).max():.1e}")
    rows = []
    for _ in range(2):
        a = jax.random.normal(jax.random.key(0), (1024, 1024))
        began = time.perf_counter()
        jax.block_until_ready(jax.jit(lambda a: a @ a)(a))
        rows.append(time.perf_counter() - began)
    print(f"matmul 1024^3 float32: {2 * 1024**3 / rows[-1] / 1e9:.0f} GFLOP/s")
    print("self-test passed")
