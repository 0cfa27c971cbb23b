"""Variants of attention: heads, norms, a window, sinks, value residuals.

    jaxlm sweep --config=configs/ablations/attention.py --workdir=runs/attention

Base and data: configs/ablations/base.py. What one key/value head saves goes into the feed-forward (mlp_dim 288 for 256), so that
all arms have the parameters of the base but for vectors (at most 0.4 % of them).
Found (three seeds, paired; nats a character; benchmarks/results/ablations/attention.json): no variant can be told from two heads
of 48: one key/value head 0.014 (-0.035 to 0.062), qk norm -0.023 (-0.081 to 0.035), a window of 16 in the first layer -0.019
(-0.050 to 0.012), four heads -0.017 (-0.076 to 0.042), sinks 0.016 (-0.038 to 0.070), a value residual 0.009 (-0.004 to 0.022).
Of most a true difference below 0.19 may have been missed.
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
