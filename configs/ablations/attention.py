"""Variants of attention: heads, norms, a window, sinks, value residuals.

    jaxlm sweep --config=configs/ablations/attention.py --workdir=runs/attention

Base and data: configs/ablations/base.py. What one key/value head saves goes into the feed-forward (mlp_dim 288 for 256), so that
all arms have the parameters of the base but for vectors (at most 0.4 % of them).
Found (five seeds, paired; nats a character; benchmarks/results/ablations/attention.json): no variant can be told from two heads
of 48, corrected for six: one key/value head 0.008 (-0.013 to 0.029), qk norm -0.036 (-0.067 to -0.005, p = 0.20), a window of 16
in the first layer -0.026 (-0.051 to -0.001, p = 0.23), four heads -0.016 (-0.041 to 0.010), sinks 0.007 (-0.026 to 0.040), a
value residual -0.007 (-0.041 to 0.027). True differences below 0.05 to 0.08 may have been missed.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("two heads of 48")  # the baseline
    add("one key/value head", **{"model.num_kv_heads": 1, "model.mlp_dim": 288})  # MQA
    add("qk norm", **{"model.qk_norm": True})
    add("window of 16 in the first layer", **{"model.window": 16, "model.window_pattern": "LG"})
    add("four heads of 24", **{"model.num_heads": 4})
    add("sinks", **{"model.attention_sinks": True})  # GPT-OSS
    add("value residual", **{"model.value_residual": True})
