"""A scaling law of five sizes on WikiText-2 (a BPE of 2,048 tokens), and whether it foretells the largest, which is held back.

    jaxlm sweep --config=configs/ablations/scaling_wikitext2.py --workdir=runs/scaling --config.data.root=DATA
    jaxlm scale --fit runs/scaling --predict --config=configs/ablations/scaling_wikitext2.py:largest --workdir=runs/largest \\
        --out=runs/prediction --config.data.root=DATA
    jaxlm train --config=configs/ablations/scaling_wikitext2.py:largest --workdir=runs/largest --config.data.root=DATA
    jaxlm scale --score runs/prediction --workdir=runs/largest

DATA has wikitext-2/train.txt and valid.txt. Four sizes, 0.1 to 0.8 M parameters without embeddings, each for 1, 2 and 4 tokens
per parameter; held back is 1.6 M for 2. No run sees text twice: it is 3.52 M tokens. Width by μP, so that one learning rate
serves all sizes; it is not tuned. The twelve runs are 5.5e13 FLOPs and the largest is 3.7e13: at 40 GFLOP/s (two idle CPU cores)
an estimated 25 and 16 minutes. Not run in full yet.
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
