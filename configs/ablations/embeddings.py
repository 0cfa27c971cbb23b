"""The embedding and the head: one matrix or two, scaled, with what the last tokens say.

    jaxlm sweep --config=configs/ablations/embeddings.py --workdir=runs/embeddings

Base and data: configs/ablations/base.py. A head of its own is 3 % more parameters; hashed pairs of characters (8,192 vectors of
96) are four times as many as the rest, but no more work: look-ups.
Found: not run yet.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 3
    add("tied")  # the baseline
    add("untied", **{"model.tie_embeddings": False})
    add("scaled by sqrt(width)", **{"model.embed_scale": 96**0.5})  # Gemma
    add("pairs of characters", **{"model.ngram_max": 2})  # arXiv:2412.09871
