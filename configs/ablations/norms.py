"""Which norm, and where it stands.

    jaxlm sweep --config=configs/ablations/norms.py --workdir=runs/norms

Base and data: configs/ablations/base.py. All arms have the parameters of the base but for the norms' own (at most 0.6 % of them).
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("rms, before")  # the baseline: Llama
    add("layer", **{"model.norm": "layer"})  # GPT-2
    add("rms without scale", **{"model.norm_scale": False})
    add("after", **{"model.norm_place": "post"})  # OLMo 2
    add("before and after", **{"model.norm_place": "both"})  # Gemma 2
    add("of the sum", **{"model.norm_place": "sum"})  # BERT
    add("none", **{"model.norm": "none"})
