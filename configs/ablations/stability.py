"""What keeps logits small: z-loss, a soft-cap. Does it cost anything where nothing is unstable?

    jaxlm sweep --config=configs/ablations/stability.py --workdir=runs/stability

Base and data: configs/ablations/base.py. All arms have the parameters of the base.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("base")
    add("z-loss", **{"objective.z_loss": 1e-4})
    add("logits capped at 15", **{"model.final_softcap": 15.0})
