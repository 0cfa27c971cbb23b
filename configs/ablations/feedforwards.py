"""Forms of the feed-forward, at equal parameters: those with a gate have three matrices of 256, the others two of 384.

    jaxlm sweep --config=configs/ablations/feedforwards.py --workdir=runs/feedforwards

Base and data: configs/ablations/base.py.
Found (three seeds, paired; nats a character; benchmarks/results/ablations/feedforwards.json): no form can be told from SwiGLU:
geglu 0.007 (-0.103 to 0.118), gelu 0.046 (-0.027 to 0.118), relu² -0.001 (-0.079 to 0.078). A true difference below 0.17 may have
been missed.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("swiglu")  # the baseline
    add("geglu", **{"model.feedforward": "geglu"})
    for form in ("gelu", "relu", "relu2"):
        add(form, **{"model.feedforward": form, "model.mlp_dim": 384})
