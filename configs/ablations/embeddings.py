"""The embedding and the head: one matrix or two, scaled, with what the last character says.

    jaxlm sweep --config=configs/ablations/embeddings.py --workdir=runs/embeddings

Base and data: configs/ablations/base.py. A head of its own is 3 % more parameters; hashed pairs of characters (8,192 vectors of
96) are 3.5 times as many, but no more work: look-ups.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/embeddings.json): worse than tied are a head of its own
by 0.057 (0.017 to 0.096) and scaled by 0.063 (0.035 to 0.090); pairs of characters are better by 0.107 (0.080 to 0.135).
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    add.seeds = 5
    add("tied")  # the baseline
    add("untied", **{"model.tie_embeddings": False})
    add("pairs of characters", **{"model.ngram_max": 2})  # arXiv:2412.09871
    add("scaled by sqrt(width)", **{"model.embed_scale": 96**0.5})  # Gemma
