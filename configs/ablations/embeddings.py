"""The embedding and the head: one matrix or two, scaled.

    jaxlm sweep --config=configs/ablations/embeddings.py --workdir=runs/embeddings

Base and data: configs/ablations/base.py. A head of its own is 3 % more parameters.
Found (three seeds, paired; nats a character; benchmarks/results/ablations/embeddings.json): neither can be told from the tied
embedding: a head of its own 0.061 (-0.035 to 0.158), scaled 0.063 (-0.006 to 0.132). A true difference below 0.18 may have been
missed.
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("tied")  # the baseline
    add("untied", **{"model.tie_embeddings": False})
    add("scaled by sqrt(width)", **{"model.embed_scale": 96**0.5})  # Gemma
