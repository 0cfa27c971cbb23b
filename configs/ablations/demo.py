"""Six arms, five seeds, Tiny Shakespeare: optimizer, positions, feed-forward, one change at a time and then two together.

    jaxlm sweep --config=configs/ablations/demo.py --workdir=runs/demo --mode=processes

The base is a small Llama (AdamW, rope, SwiGLU) of 0.6 M parameters. Learning rates are each optimizer's usual one, not tuned;
the feed-forwards have the same number of parameters. Found (benchmarks/results/ablation_demo): Muon is better by 0.178 nats a
character, learned positions worse by 0.367, lion worse by 0.051; relu² cannot be told from SwiGLU. 25 CPU-minutes.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 500
    c.batch_size = 8
    c.seq_len = 128
    c.model.num_layers = 3
    c.model.embed_dim = 128
    c.model.num_heads = 2
    c.model.mlp_dim = 344
    c.data.jitter = True
    c.optimizer.learning_rate = 3e-3
    c.schedule.name = "linear"
    c.schedule.final_fraction = 0.0
    c.schedule.warmup_steps = "5%"
    c.checkpoint.every_steps = 0
    c.eval.every_steps = "20%"
    c.eval.batch_size = 64
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
