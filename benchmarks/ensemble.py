"""Tokens/s of an ensemble of small models, against the same runs one after another: the step of one member, interleaved in blocks
with that of M members `together` and `in_turn` (`jaxlm/research/members.py`).

    python benchmarks/ensemble.py [--members 8]
"""

import argparse
import statistics
import time

from record import check_idle, save

from configs import default
from jaxlm.config import resolve
from jaxlm.validation import validate
from jaxlm.verbs.start import start_jax

SIZES = {  # layers, width, heads, T, B: the first two leave a device idle most of the time
    "2x32": (2, 32, 2, 32, 4),
    "2x64": (2, 64, 2, 64, 8),
    "4x128": (4, 128, 2, 128, 8),
}


def configs_of(size, members: int):
    layers, width, heads, length, rows = SIZES[size]
    for m in range(members):
        c = default.get_config()
        c.steps, c.seq_len, c.batch_size, c.seed = 1000, length, rows, m
        c.model.num_layers, c.model.embed_dim, c.model.num_heads = layers, width, heads
        c.optimizer.learning_rate = 1e-3 * (1 + m)
        c.data.source, c.model.vocab_size = "synthetic", 64
        c.observe.compile_cache = False
        resolve(c)
        validate(c)
        yield c


def arm(size: str, members: int, execution: str):
    """-> (run(steps), seconds of compilation, tokens of a step)"""
    import jax

    from jaxlm.research.members import Members

    group = Members(list(configs_of(size, members)), execution=execution)
    states = group.join(group.init())
    step, seconds = group.compile()
    batches = group.batches(0)

    def run(steps):
        nonlocal states
        for _ in range(steps):
            states, metrics = step(states, next(batches))
        jax.block_until_ready((states, metrics))

    return run, seconds, members * group.base.seq_len * group.base.batch_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--block_seconds", type=float, default=1.0)
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine all the same")
    args = parser.parse_args()
    check_idle()
    config = default.get_config()
    config.observe.compile_cache = False
    start_jax(config)
    result = {}
    for size in args.sizes:
        arms = {"serial": arm(size, 1, "in_turn"), "in_turn": arm(size, args.members, "in_turn"),
                "together": arm(size, args.members, "together")}
        steps = {}
        for name, (run, _, _) in arms.items():
            run(3)  # warm up
            began = time.perf_counter()
            run(3)
            steps[name] = max(1, round(args.block_seconds * 3 / (time.perf_counter() - began)))
        speeds = {name: [] for name in arms}
        for _ in range(args.blocks):
            for name, (run, _, tokens) in arms.items():
                began = time.perf_counter()
                run(steps[name])
                speeds[name].append(steps[name] * tokens / (time.perf_counter() - began))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        result[size] = {name: {
            "tokens_per_second_median": median[name], "tokens_per_second_min": min(speeds[name]),
            "tokens_per_second_max": max(speeds[name]), "of_serial": median[name] / median["serial"],
            "compile_seconds": arms[name][1]} for name in arms}
    save("ensemble", {"members": args.members, "sizes": result})


if __name__ == "__main__":
    main()
