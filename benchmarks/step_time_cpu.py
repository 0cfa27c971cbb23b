"""Tokens/s of one optimizer step on a CPU: jaxlm against PyTorch eager and torch.compile, interleaved in blocks.

    python benchmarks/step_time_cpu.py

Sizes: the Shakespeare model, and 8 layers x 256 wide x T=256 x batch 8 (swiglu, vocabulary 8,192, untied), float32.
Every arm: forward, backward, clip at 1.0, AdamW. Minimum and median over blocks, wall and CPU seconds.
"""

import argparse
import statistics
import time

import numpy as np
from record import check_idle, save

from configs import default
from jaxlm.verbs.start import start_jax

SIZES = {
    "shakespeare": dict(layers=4, dim=128, heads=4, mlp=512, vocab=65, T=128, B=32, gated=False, tied=True),
    "8x256": dict(layers=8, dim=256, heads=4, mlp=1024, vocab=8192, T=256, B=8, gated=True, tied=False),
}


def jaxlm_arm(s):
    import jax

    from jaxlm.config import resolve
    from jaxlm.kernels.attention import choose_backend
    from jaxlm.objectives.build import build_objective
    from jaxlm.optimizers.build import build_optimizer
    from jaxlm.optimizers.schedules import build_schedule
    from jaxlm.train.state import build_init, build_model
    from jaxlm.train.step import build_train_step

    c = default.get_config()
    c.batch_size, c.seq_len = s["B"], s["T"]
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = s["layers"], s["dim"], s["heads"]
    c.model.mlp_dim, c.model.tie_embeddings = s["mlp"], s["tied"]
    c.model.feedforward = "swiglu" if s["gated"] else "gelu"
    resolve(c)
    model = build_model(c, s["vocab"], choose_backend(c, "cpu")[0])
    optimizer = build_optimizer(c, model.specs)
    step = build_train_step(c, model, build_objective(c), optimizer, build_schedule(c))
    state = jax.jit(build_init(c, model, optimizer))(0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, s["vocab"], (s["B"], s["T"] + 1)).astype(np.int32)
    ones = np.ones((s["B"], s["T"]), np.int32)
    batch = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones,
                            "positions": np.arange(s["T"], dtype=np.int32) * ones, "loss_mask": ones.astype(np.float32)})
    hyper = {"learning_rate": np.float32(1e-3), "weight_decay": np.float32(0.1), "seed": np.int32(0)}
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, hyper).compile()

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch, hyper)
        jax.block_until_ready(state)

    return run


def torch_arm(s, compiled):
    import torch
    from torch_gpt import GPT

    torch.set_num_threads(2)
    model = GPT(s["vocab"], s["layers"], s["dim"], s["heads"], s["T"], s["mlp"], llama=s["gated"], tied=s["tied"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, s["vocab"], (s["B"], s["T"] + 1))
    forward = torch.compile(model) if compiled else model

    def run(steps):
        for _ in range(steps):
            loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def main():
    config = default.get_config()
    config.observe.compile_cache = False
    start_jax(config)  # as `jaxlm train` does; one process, so PyTorch's arms get the same malloc
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine all the same")
    args = parser.parse_args()
    check_idle()
    result = {}
    for name in args.sizes:
        s = SIZES[name]
        steps = 20 if name == "shakespeare" else 4
        arms = {"jaxlm": jaxlm_arm(s), "torch_eager": torch_arm(s, False), "torch_compile": torch_arm(s, True)}
        for run in arms.values():
            run(3)  # compile and warm up
        times = {arm: [] for arm in arms}
        for _ in range(args.blocks):
            for arm, run in arms.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run(steps)
                times[arm].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
        tokens = s["B"] * s["T"]
        result[name] = {arm: {
            "tokens_per_second_best": tokens / min(w for w, _ in t),
            "tokens_per_second_median": tokens / statistics.median(w for w, _ in t),
            "step_seconds_median": statistics.median(w for w, _ in t),
            "step_cpu_seconds_median": statistics.median(c for _, c in t)} for arm, t in times.items()}
    save("step_time_cpu", {"sizes": result})


if __name__ == "__main__":
    main()
