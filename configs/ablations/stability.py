"""What keeps logits and gradients small: z-loss, soft-caps, clipping; at the base's learning rate and at three times it.

    jaxlm sweep --config=configs/ablations/stability.py --workdir=runs/stability

Base and data: configs/ablations/base.py. All arms have the parameters of the base.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config

MEANS = {"z-loss": {"objective.z_loss": 1e-4}, "logits capped at 15": {"model.final_softcap": 15.0},
         "no clipping": {"optimizer.clip_norm": 0.0}}


def sweep(add):
    add.seeds = 3
    add("base")
    for name, keys in MEANS.items():
        add(name, **keys)
    high = {"optimizer.learning_rate": 3 * get_config().optimizer.learning_rate}
    add("three times the rate", **high)
    for name, keys in {**MEANS, "qk norm": {"model.qk_norm": True}}.items():
        add(f"three times the rate, {name}", **high, **keys)
