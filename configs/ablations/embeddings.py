"""The embedding and the head: one matrix or two, scaled, with what the last character says.

    jaxlm sweep --config=configs/ablations/embeddings.py --workdir=runs/embeddings

Base and data: configs/ablations/base.py. A head of its own is 3 % more parameters; hashed pairs of
characters (8,192 vectors of 96) are four times as many, but no more work: look-ups.
Found (three seeds, paired; nats a character; benchmarks/results/ablations/embeddings.json): neither can be told from the tied
embedding: a head of its own 0.061 (-0.035 to 0.158), scaled 0.063 (-0.006 to 0.132). A true difference below 0.18 may have been
missed.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("tied")  # the baseline
    add("untied", **{"model.tie_embeddings": False})
    add("pairs of characters", **{"model.ngram_max": 2})  # arXiv:2412.09871
    add("scaled by sqrt(width)", **{"model.embed_scale": 96**0.5})  # Gemma
