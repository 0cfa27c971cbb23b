"""What the ablations of this folder share: a Llama of 0.2 M parameters (AdamW, rope, SwiGLU, RMS norm) on Tiny Shakespeare, and a
run of seconds, so that an ablation with five seeds is a matter of minutes. What holds at this size and length need not at yours.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 600
    c.batch_size = 4
    c.seq_len = 64
    c.model.num_layers = 2
    c.model.embed_dim = 96
    c.model.num_heads = 2
    c.model.mlp_dim = 256
    c.data.jitter = True
    c.optimizer.learning_rate = 3e-3
    c.schedule.name = "linear"
    c.schedule.final_fraction = 0.0
    c.schedule.warmup_steps = "10%"
    c.checkpoint.every_steps = 0
    c.eval.every_steps = 0
    c.eval.batch_size = 64
    return default.debug(c) if arg == "debug" else c
