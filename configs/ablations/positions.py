"""What tells the model where a token stands.

    jaxlm sweep --config=configs/ablations/positions.py --workdir=runs/positions

Base and data: configs/ablations/base.py. Learned positions add a vector for each place, relative ones 32
numbers a head; the other arms have the parameters of the base.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("rope")  # the baseline
    add("rope of half a head", **{"model.rope_fraction": 0.5})
    add("relative", **{"model.position": "relative"})  # T5
    add("learned", **{"model.position": "learned"})  # GPT-2
    add("none", **{"model.position": "none"})
