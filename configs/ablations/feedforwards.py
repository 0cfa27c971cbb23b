"""Forms of the feed-forward, at equal parameters: those with a gate have three matrices of 256, the others two of 384.

    jaxlm sweep --config=configs/ablations/feedforwards.py --workdir=runs/feedforwards

Base and data: configs/ablations/base.py.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/feedforwards.json): no form can be told from SwiGLU,
corrected for four: GeGLU -0.004 (-0.049 to 0.041), GELU 0.044 (0.012 to 0.076, p = 0.08), ReLU 0.003 (-0.024 to 0.030), ReLU²
-0.003 (-0.032 to 0.027). True differences below 0.05 to 0.09 may have been missed.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("swiglu")  # the baseline
    add("geglu", **{"model.feedforward": "geglu"})
    for form in ("gelu", "relu", "relu2"):
        add(form, **{"model.feedforward": form, "model.mlp_dim": 384})
