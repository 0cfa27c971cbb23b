"""Warming up the batch and the rows by `stages`, at equal tokens: a tenth of them in quarter batches or rows, a tenth in halves.

    jaxlm sweep --config=configs/ablations/warmups.py --workdir=runs/warmups

Base and data: configs/ablations/base.py. The learning rate follows the steps, as ever: it is not scaled with the batch, and small
steps take more of its schedule. All arms see the same number of tokens and are evaluated in whole rows.
Found (five seeds, paired; nats a character; benchmarks/results/ablations/warmups.json): batch warm-up is worse by 0.062 (0.024 to
0.100). Rows of the same batch (0.027, -0.018 to 0.072) and half the batch throughout (0.001, -0.039 to 0.041) cannot be told from
none; nor, corrected for four, rows of which there are more, so that a step has the same tokens: -0.023 (-0.040 to -0.007, p =
0.055).
"""

from configs.ablations.base import get_config as get_config


def sweep(add):
    c = get_config()
    B, T, tokens = c.batch_size, c.seq_len, c.steps * c.batch_size * c.seq_len
    tenth, fifth = f"{tokens // 10} tokens", f"{tokens // 5} tokens"
    small = {"steps": c.steps // 10 * 14}  # 4 + 2 + 8 tenths
    add.seeds = 5
    add("none")  # the baseline
    add("batch", **small, stages=((tenth, {"batch_size": B // 4}), (fifth, {"batch_size": B // 2})))
    add("rows", **small, stages=((tenth, {"seq_len": T // 4}), (fifth, {"seq_len": T // 2})))
    add("rows, more of them", stages=((tenth, {"seq_len": T // 4, "batch_size": 4 * B}),
                                      (fifth, {"seq_len": T // 2, "batch_size": 2 * B})))
    add("half the batch throughout", steps=2 * c.steps, batch_size=B // 2)  # are small steps all there is to it?
