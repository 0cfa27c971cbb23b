"""What keeps logits small: z-loss, a soft-cap, qk norm; at the base's learning rate and at three times it.

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
    high = {"optimizer.learning_rate": 3 * get_config().optimizer.learning_rate}
    add("three times the rate", **high)
    add("three times the rate, z-loss", **high, **{"objective.z_loss": 1e-4})
    add("three times the rate, qk norm", **high, **{"model.qk_norm": True})
