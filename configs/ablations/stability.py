"""What keeps logits small: z-loss, a soft-cap, qk norm; at the base's learning rate and at three times it.

    jaxlm sweep --config=configs/ablations/stability.py --workdir=runs/stability

Base and data: configs/ablations/base.py. All arms have the parameters of the base.
Found (three seeds, paired; nats a character; benchmarks/results/ablations/stability.json): at the base's rate neither z-loss
(-0.005, -0.036 to 0.026) nor a cap at 15 (-0.001, -0.025 to 0.023) can be told from none. At three times the rate one seed of
three goes astray without qk norm (2.18, 2.18, 2.42), two with z-loss (2.17, 2.29, 2.53), none with qk norm (2.14, 2.18, 2.15);
three seeds of such a spread prove nothing (the rate alone: 0.154, -0.136 to 0.443).
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
