"""Learning-rate schedules, all with the base's peak.

    jaxlm sweep --config=configs/ablations/schedules.py --workdir=runs/schedules

Base and data: configs/ablations/base.py.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("linear to 0")  # the baseline
    add("cosine to a tenth", **{"schedule.name": "cosine", "schedule.final_fraction": 0.1})
    add("wsd, the last fifth to 0", **{"schedule.name": "wsd"})
    add("constant", **{"schedule.name": "constant"})
    add("linear, no warm-up", **{"schedule.warmup_steps": 0})
