"""The embedding and the head: one matrix or two, scaled.

    jaxlm sweep --config=configs/ablations/embeddings.py --workdir=runs/embeddings

Base and data: configs/ablations/base.py. A head of its own is 3 % more parameters.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("tied")  # the baseline
    add("untied", **{"model.tie_embeddings": False})
    add("scaled by sqrt(width)", **{"model.embed_scale": 96**0.5})  # Gemma
