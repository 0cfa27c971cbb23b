"""Learning-rate schedules, all with the base's peak.

    jaxlm sweep --config=configs/ablations/schedules.py --workdir=runs/schedules

Base and data: configs/ablations/base.py.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/schedules.json): constant is worse than linear to 0 by
0.076 (0.058 to 0.093). Cosine to a tenth (0.002, -0.014 to 0.017) and wsd (-0.001, -0.017 to 0.014) cannot be told from it.
Without warm-up 0.141 (0.034 to 0.247), corrected for four not significant (p = 0.07).
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("linear to 0")  # the baseline
    add("cosine to a tenth", **{"schedule.name": "cosine", "schedule.final_fraction": 0.1})
    add("wsd, the last fifth to 0", **{"schedule.name": "wsd"})
    add("constant", **{"schedule.name": "constant"})
    add("linear, no warm-up", **{"schedule.warmup_steps": 0})
