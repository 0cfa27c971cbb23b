"""A rate for each optimizer of optimizers.py: three or four, until the best is not at an end, with a seed that it does not use.

    jaxlm sweep --config=configs/ablations/optimizer_rates.py --workdir=runs/optimizer_rates

Base and data: configs/ablations/base.py. One seed ranks rates, it proves nothing about them.
Found (one seed, 9; nats a character; benchmarks/results/ablations/optimizer_rates.json): adamw 2.221, 2.126, 2.139, 2.135 (7.5e-4
to 6e-3); muon 2.019, 2.006, 2.048 (1e-2 to 4e-2); lion 2.322, 2.231, 2.339, 2.563 (2.5e-4 to 2e-3); sgd 2.404, 2.375, 2.390,
2.476 (0.03 to 1).
"""

from configs.ablations.base import get_config as get_config

OPTIMIZERS = {  # keys, and the rates tried
    "adamw": ({}, (7.5e-4, 1.5e-3, 3e-3, 6e-3)),
    "muon": ({"optimizer.adam_lr_ratio": 0.3}, (1e-2, 2e-2, 4e-2)),
    "lion": ({"optimizer.b2": 0.99}, (2.5e-4, 5e-4, 1e-3, 2e-3)),
    "sgd": ({}, (0.03, 0.1, 0.3, 1.0)),
}


def sweep(add):
    for name, (keys, rates) in OPTIMIZERS.items():
        for rate in rates:
            add(f"{name} {rate}", seeds=[9], **{"optimizer.name": name, "optimizer.learning_rate": rate, **keys})
