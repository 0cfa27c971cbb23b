"""Objectives: (model, batch, keys_B) -> (loss_sum, weight_sum, aux). Sums, never means: the mean is taken once, over the
global batch, so that accumulation, data parallelism and evaluation agree exactly. aux is a dict of sums too: "nll", what
evaluation calls the loss, and by choice "correct" and "examples", of which it makes the accuracy.
"""

from jaxlm.registry import Registry

OBJECTIVES = Registry("objective", key="objective.name")
