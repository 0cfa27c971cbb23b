"""What keeps logits small: z-loss, a soft-cap, qk norm; at the base's learning rate and at three times it.

    jaxlm sweep --config=configs/ablations/stability.py --workdir=runs/stability

Base and data: configs/ablations/base.py. All arms have the parameters of the base.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/stability.json): at the base's rate neither z-loss
(-0.001, -0.021 to 0.019) nor a cap at 15 (-0.004, -0.014 to 0.006) can be told from none. At three times the rate two seeds of
five go astray (2.42 and 2.45 for 2.18 to 2.21), with z-loss two or three (2.53, 2.33, 2.29), with qk norm none (2.14 to 2.23);
corrected for five, no arm can be told from the base (0.174, 0.028 to 0.320; 0.177, 0.006 to 0.348; 0.060, 0.018 to 0.101).
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("base")
    add("z-loss", **{"objective.z_loss": 1e-4})
    add("logits capped at 15", **{"model.final_softcap": 15.0})
    high = {"optimizer.learning_rate": 3 * get_config().optimizer.learning_rate}
    add("three times the rate", **high)
    add("three times the rate, z-loss", **high, **{"objective.z_loss": 1e-4})
    add("three times the rate, qk norm", **high, **{"model.qk_norm": True})
