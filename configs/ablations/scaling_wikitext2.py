"""A scaling law of five sizes on WikiText-2 (a BPE of 2,048 tokens), and whether it foretells the largest, which is held back.

    jaxlm sweep --config=configs/ablations/scaling_wikitext2.py --workdir=runs/scaling --config.data.root=DATA
    jaxlm scale --fit runs/scaling --predict --config=configs/ablations/scaling_wikitext2.py:largest --workdir=runs/largest \\
        --out=runs/prediction --config.data.root=DATA
    jaxlm train --config=configs/ablations/scaling_wikitext2.py:largest --workdir=runs/largest --config.data.root=DATA
    jaxlm scale --score runs/prediction --workdir=runs/largest

DATA has wikitext-2/train.txt and valid.txt. Four sizes, 0.05 to 0.44 M parameters without embeddings, each for 1, 2 and 4 tokens
per parameter; held back is 0.8 M for 2. No run sees text twice. Width by μP, so that one learning rate serves all sizes; it is
not tuned. Found (benchmarks/results/scaling_wikitext2, one seed): validation loss 3.820, inside what was predicted before it was
trained, 3.908 (95 % interval 3.700 to 4.125). Runs as short as these are told by their tokens alone: the exponent of the
parameters lies at its bound, and nothing is learnt of it. 40 minutes and 8 on two CPU cores that other work shared.
"""

from configs import default
from jaxlm.research.scaling import fixed_ratio

PARAMETERS = (5e4, 1e5, 2e5, 4e5)
TOKENS_PER_PARAMETER = (1, 2, 4)
LARGEST = 8e5, 2  # parameters, tokens for each


def get_config(arg: str = ""):
    c = base()
    if arg == "largest":
        (_, overrides), = fixed_ratio(c, LARGEST[:1], LARGEST[1:])
        c.update_from_flattened_dict(overrides)
    return default.debug(c) if arg == "debug" else c


def base():
    c = default.get_config()
    c.batch_size = 8  # short runs: many small steps
    c.seq_len = 128
    c.model.num_layers = 4
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.mlp_dim = 344
    c.model.parametrization = "mup"
    c.model.base_embed_dim = 128
    c.data.path = "wikitext-2/train.txt"
    c.data.valid_path = "wikitext-2/valid.txt"
    c.data.tokenizer = "bpe"
    c.data.bpe_vocab_size = 2048
    c.optimizer.learning_rate = 3e-3
    c.schedule.name = "linear"
    c.schedule.final_fraction = 0.0
    c.schedule.warmup_steps = "10%"
    c.checkpoint.every_steps = 0
    c.eval.every_steps = 0
    c.eval.batch_size = 64
    return c


def sweep(add):
    for name, overrides in fixed_ratio(base(), PARAMETERS, TOKENS_PER_PARAMETER):
        add(name, **overrides)
