"""What tells the model where a token stands.

    jaxlm sweep --config=configs/ablations/positions.py --workdir=runs/positions

Base and data: configs/ablations/base.py. Learned positions add a vector for each place, relative ones 32
numbers a head; the other arms have the parameters of the base.
Found (three seeds, paired; nats a character; benchmarks/results/ablations/positions.json): rope of half a head cannot be told
from rope (0.004, -0.051 to 0.058). Worse: relative by 0.190 (0.128 to 0.253), none by 0.306 (0.243 to 0.369), learned by 0.348
(0.233 to 0.463), which after 600 steps are still no better than none.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("rope")  # the baseline
    add("rope of half a head", **{"model.rope_fraction": 0.5})
    add("relative", **{"model.position": "relative"})  # T5
    add("learned", **{"model.position": "learned"})  # GPT-2
    add("none", **{"model.position": "none"})
