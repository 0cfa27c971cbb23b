"""What other text in place of a part of one's own does to the loss on one's own: Shakespeare and WikiText-2, as bytes.

    jaxlm sweep --config=configs/ablations/mixture.py --workdir=runs/mixture --config.data.root=DATA
    jaxlm report runs/mixture --metric=valid/shakespeare:loss

DATA has wikitext-2/valid.txt (1.1 MB, about as much as Tiny Shakespeare, which ships). Base: configs/ablations/base.py, but with
bytes for characters; all arms see the same number of bytes, none of them twice.
Found (five seeds, Welch's t-test; nats a byte of Shakespeare; benchmarks/results/ablations/mixture.json): half of articles is
worse by 0.096 (0.048 to 0.144); articles in the first half cannot be told from Shakespeare alone (0.028, -0.006 to 0.061), though
both halve the Shakespeare that is seen. On articles the loss goes from 3.27 to 2.07 and 2.68.
"""

from configs.ablations import base

OWN, OTHER = ("shakespeare", "shakespeare"), ("articles", "wikitext-2/valid.txt")


def get_config(arg: str = ""):
    c = base.get_config(arg)
    if arg == "debug":  # random tokens are no mixture
        return c
    c.data.tokenizer = "byte"
    c.data.mixture = ((*OWN, 1.0), (*OTHER, 0.0))
    return c


def sweep(add):
    add.seeds = 5
    add("Shakespeare alone")  # the baseline
    add("half of articles", **{"data.mixture": ((*OWN, 0.5), (*OTHER, 0.5))})
    first_half = get_config().steps // 2
    add("articles in the first half", **{"data.mixture": ((*OWN, 0.0), (*OTHER, 1.0)),
                                         "data.mixture_stages": ((first_half, {"shakespeare": 1.0}),)})
