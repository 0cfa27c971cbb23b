"""Optimizers, each at the best of its rates of optimizer_rates.py.

    jaxlm sweep --config=configs/ablations/optimizers.py --workdir=runs/optimizers

Base and data: configs/ablations/base.py.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/optimizers.json): Muon is better than AdamW by 0.110
(0.089 to 0.130); worse are Lion by 0.189 (0.031 to 0.346: two seeds of five learn late, the rate is at its limit) and SGD with
momentum by 0.218 (0.202 to 0.233).
"""

from configs.ablations.base import get_config as get_config
from configs.ablations.optimizer_rates import OPTIMIZERS

RATES = {"adamw": 1.5e-3, "muon": 2e-2, "lion": 5e-4, "sgd": 0.1}


def sweep(add):
    add.seeds = 5
    for name, rate in RATES.items():  # the first is the baseline
        add(name, **{"optimizer.name": name, "optimizer.learning_rate": rate, **OPTIMIZERS[name][0]})
