"""Six arms, five seeds, Tiny Shakespeare: optimizer, positions, feed-forward, one change at a time and then two together.

    jaxlm sweep --config=configs/ablations/demo.py --workdir=runs/demo --mode=processes

The base is that of this folder, larger: a Llama (AdamW, rope, SwiGLU) of 0.6 M parameters. Learning rates are each optimizer's
usual one, not tuned; the feed-forwards have the same number of parameters. Found (benchmarks/results/ablation_demo): Muon is
better by 0.177 nats a character, learned positions worse by 0.366, lion worse by 0.048; relu² cannot be told from SwiGLU.
12 CPU-minutes, 6 on two cores.
"""

from configs import default
from configs.ablations import base


def get_config(arg: str = ""):
    c = base.get_config()
    c.steps, c.batch_size, c.seq_len = 500, 8, 128
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 3, 128, 344
    c.schedule.warmup_steps, c.eval.every_steps = "5%", "20%"
    return default.debug(c) if arg == "debug" else c


def sweep(add):
    muon = {"optimizer.name": "muon", "optimizer.learning_rate": 0.02, "optimizer.adam_lr_ratio": 0.3}
    relu2 = {"model.feedforward": "relu2", "model.mlp_dim": 516}  # two matrices for three
    add.seeds = 5
    add("adamw")  # the baseline: adamw, rope, swiglu
    add("muon", **muon)
    add("lion", **{"optimizer.name": "lion", "optimizer.learning_rate": 1e-3, "optimizer.b2": 0.99})
    add("learned positions", **{"model.position": "learned"})
    add("relu²", **relu2)
    add("muon + relu²", **muon, **relu2)
