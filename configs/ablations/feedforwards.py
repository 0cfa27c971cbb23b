"""Forms of the feed-forward, at equal parameters: those with a gate have three matrices of 256, the others two of 384.

    jaxlm sweep --config=configs/ablations/feedforwards.py --workdir=runs/feedforwards

Base and data: configs/ablations/base.py.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("swiglu")  # the baseline
    add("geglu", **{"model.feedforward": "geglu"})
    for form in ("gelu", "relu2"):
        add(form, **{"model.feedforward": form, "model.mlp_dim": 384})
