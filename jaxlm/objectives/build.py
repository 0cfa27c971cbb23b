"""The objective that a config names."""

from jaxlm.objectives import classification, distillation, next_token, preference, seq2seq  # noqa: F401  register themselves
from jaxlm.objectives.objective import OBJECTIVES


def build_objective(config):
    return OBJECTIVES[config.objective.name](config)
