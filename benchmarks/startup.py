"""Seconds from the start of the process to the first finished step, and what the loop adds to the compiled step.

    python benchmarks/startup.py

First step: `jaxlm train` on the Shakespeare preset, each time a fresh process: three with an empty compile cache, three with a
warm one (the text is tokenised beforehand: that is once per text). Loop: seconds a step inside `train`, logging each ten steps as
always, against the same compiled step called bare on one batch with its metrics read one step late; a tiny model on real text,
in turns.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from record import check_idle, save

from configs import shakespeare
from jaxlm.config import resolve
from jaxlm.verbs.start import start_jax

ROOT = pathlib.Path(__file__).parent.parent


def first_step(folder: pathlib.Path, cache: pathlib.Path, store: pathlib.Path) -> dict:
    subprocess.run([sys.executable, "-m", "jaxlm.cli", "train", "--config=configs/shakespeare.py", f"--workdir={folder}",
                    "--config.steps=3", "--config.eval.batches=1", "--config.eval.sample_tokens=0",
                    "--config.observe.progress=none", f"--config.data.store_dir={store}"],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "JAXLM_CACHE": str(cache)})
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in ("seconds_to_first_step", "compile_seconds")}


def tiny_config(steps: int):
    c = shakespeare.get_config("debug")
    c.steps, c.observe.log_every, c.observe.progress, c.observe.report = steps, 10, "none", False
    c.eval.sample_tokens, c.eval.every_steps, c.eval.batches, c.checkpoint.every_steps = 0, 0, 1, 0
    c.data.source = "files"  # the road of a real run: text, permutation, moved grid
    c.observe.compile_cache = False
    resolve(c)
    return c


def seconds_in_train(folder: pathlib.Path, steps: int) -> float:
    from jaxlm.train.loop import train

    train(tiny_config(steps), str(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return statistics.median(line["step_seconds"] for line in lines[5:] if line["split"] == "train")


def seconds_bare(steps: int) -> float:
    from jaxlm.data.loader import build_data
    from jaxlm.kernels.attention import choose_backend
    from jaxlm.objectives.build import build_objective
    from jaxlm.optimizers.build import build_optimizer
    from jaxlm.optimizers.schedules import build_schedule
    from jaxlm.train.state import build_init, build_model
    from jaxlm.train.step import build_train_step

    c = tiny_config(steps)
    data = build_data(c)
    model = build_model(c, data.vocab_size, choose_backend(c, jax.default_backend())[0])
    optimizer = build_optimizer(c, model.specs)
    train_step = build_train_step(c, model, build_objective(c), optimizer, build_schedule(c))
    state, batch = jax.jit(build_init(c, model, optimizer))(0), jax.device_put(data.train.batch(0))
    hyper = jax.device_put({"learning_rate": np.float32(1e-3), "weight_decay": np.float32(0), "seed": np.int32(0)})
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, batch, hyper).compile()
    pending, laps = None, []
    for step in range(steps):
        if step % 10 == 0:
            began = time.perf_counter()
        state, metrics = compiled(state, batch, hyper)
        if pending is not None:
            jax.device_get(pending)
        pending = metrics
        if step % 10 == 9:
            laps.append((time.perf_counter() - began) / 10)
    return statistics.median(laps[5:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each loop measured")
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine all the same")
    args = parser.parse_args()
    check_idle()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        first_step(folder / "tokenise", folder / "other-cache", folder / "store")
        cold = [first_step(folder / f"cold{i}", folder / f"cache{i}", folder / "store") for i in range(3)]
        warm = [first_step(folder / f"warm{i}", folder / "cache0", folder / "store") for i in range(3)]
        start_jax(tiny_config(1))
        loops = [{"train": seconds_in_train(folder / f"loop{i}", args.steps), "bare": seconds_bare(args.steps)}
                 for i in range(9)]
    added = [1e3 * (loop["train"] - loop["bare"]) for loop in loops]
    save("startup", {"cold": cold, "warm": warm, "loop_seconds_per_step": loops,
                     "loop_adds_ms_median": statistics.median(added)})


if __name__ == "__main__":
    main()
