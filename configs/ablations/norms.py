"""Which norm, and where it stands.

    jaxlm sweep --config=configs/ablations/norms.py --workdir=runs/norms

Base and data: configs/ablations/base.py. All arms have the parameters of the base but for the norms' own (at most 0.6 % of them).
Found (three seeds, paired; nats a character; benchmarks/results/ablations/norms.json): RMS, layer norm and RMS without a scale
cannot be told apart (differences -0.009 and -0.001, intervals within ±0.07). Worse than before each block: of the sum by 0.091
(0.048 to 0.134), before and after by 0.137 (0.127 to 0.147). After alone (2.51) and none (2.50) are no better than counts of
pairs of characters (2.48): in 600 steps they have not begun to attend.
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
