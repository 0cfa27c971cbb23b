"""Tiny Shakespeare, character level: five minutes on two CPU cores.

    jaxlm train --config=configs/shakespeare.py --workdir=runs/shakespeare
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 700
    c.batch_size = 16
    c.seq_len = 128
    c.model.num_layers = 4
    c.model.embed_dim = 128
    c.model.num_heads = 2  # wide heads: half the score matrices, which is what a CPU waits for
    c.model.feedforward = "relu2"
    c.model.qk_norm = True
    c.model.zero_init_proj = True
    c.data.jitter = True
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.02
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "linear"
    c.schedule.final_fraction = 0.0
    c.eval.sample_tokens = 400
    return default.debug(c) if arg == "debug" else c
