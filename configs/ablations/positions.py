"""What tells the model where a token stands.

    jaxlm sweep --config=configs/ablations/positions.py --workdir=runs/positions

Base and data: configs/ablations/base.py. Learned positions add a vector for each place, relative ones 32
numbers a head; the other arms have the parameters of the base.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/positions.json): rope of half a head cannot be told from
rope (0.000, -0.020 to 0.020). Worse: relative by 0.187 (0.157 to 0.216), none by 0.302 (0.275 to 0.329), learned by 0.379 (0.311
to 0.447), which in 600 steps are no better than none.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("rope")  # the baseline
    add("rope of half a head", **{"model.rope_fraction": 0.5})
    add("relative", **{"model.position": "relative"})  # T5
    add("learned", **{"model.position": "learned"})  # GPT-2
    add("none", **{"model.position": "none"})
