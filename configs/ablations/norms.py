"""Which norm, and where it stands.

    jaxlm sweep --config=configs/ablations/norms.py --workdir=runs/norms

Base and data: configs/ablations/base.py. All arms have the parameters of the base but for the norms' own (at most 0.6 % of them).
Found (five seeds, paired; nats a character; benchmarks/results/ablations/norms.json): RMS, layer norm (-0.015, -0.040 to 0.010)
and RMS without a scale (-0.008, -0.028 to 0.012) cannot be told apart. Worse than before each block: of the sum by 0.082 (0.053
to 0.111), before and after by 0.136 (0.127 to 0.145). After alone (2.50) and none (2.49) are no better than counts of pairs of
characters (2.48): in 600 steps they have not begun to attend.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("rms, before")  # the baseline: Llama
    add("layer", **{"model.norm": "layer"})  # GPT-2
    add("rms without scale", **{"model.norm_scale": False})
    add("after", **{"model.norm_place": "post"})  # OLMo 2
    add("before and after", **{"model.norm_place": "both"})  # Gemma 2
    add("of the sum", **{"model.norm_place": "sum"})  # BERT
    add("none", **{"model.norm": "none"})
