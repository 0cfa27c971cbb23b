"""Objectives: (model, batch, keys_B) -> (loss_sum, weight_sum, aux). Sums, never means: the mean is taken once, over the
global batch, so that accumulation, data parallelism and evaluation agree exactly. aux is a dict of sums too: "nll", what
evaluation calls the loss, and by choice "correct" and "examples", of which it makes the accuracy, and those of MEANS.

An objective that looks at a second model, which does not train, takes it as `frozen` and has an attribute `needs` that says
which: "reference" or "teacher" (`jaxlm.train.frozen`).
"""

from jaxlm.registry import Registry

OBJECTIVES = Registry("objective", key="objective.name")

MEANS = ("reward_margin", "teacher_kl")  # told as means over the weights in metrics.jsonl, of training and of evaluation
