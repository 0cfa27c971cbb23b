"""Tiny Shakespeare, character level: under five minutes on two CPU cores.

    jaxlm train --config=configs/shakespeare.py --workdir=runs/shakespeare
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 3100
    c.batch_size = 8  # many small steps: a CPU is as fast with few rows as with many
    c.seq_len = 128
    c.model.num_layers = 4
    c.model.embed_dim = 128
    c.model.num_heads = 2  # wide heads: half the score matrices, which is what a CPU waits for
    c.model.feedforward = "relu2"
    c.model.qk_norm = True
    c.model.zero_init_proj = True
    c.model.value_residual = True
    c.model.ngram_max = 3  # what the last two and three characters say costs a look-up, not a layer
    c.data.jitter = True
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.02
    c.optimizer.adam_lr_ratio = 0.3
    c.optimizer.muon_steps = 4  # one iteration fewer: at this size they are a good part of a step
    c.optimizer.weight_decay = 0.1
    c.schedule.name = "linear"
    c.schedule.final_fraction = 0.0
    c.eval.batch_size = 64
    c.eval.sample_tokens = 400
    return default.debug(c) if arg == "debug" else c
