"""Objectives: (model, batch, keys_B) -> (loss_sum, weight_sum, aux). Sums, never means: the mean is taken once, over the
global batch, so that accumulation, data parallelism and evaluation agree exactly."""

import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.registry import Registry

OBJECTIVES = Registry("objective", key="objective.name")


def build_objective(config):
    return OBJECTIVES[config.objective.name](config)


@OBJECTIVES.register("next_token")
def next_token(config):
    """Cross-entropy of the next token, in nats; aux["nll"] leaves out z-loss and label smoothing."""
    isolate = config.data.isolate_documents
    z_loss, smoothing, method = config.objective.z_loss, config.objective.label_smoothing, config.kernels.loss

    def objective(model, batch, keys_B=None):
        # One document a row, or none set apart: positions are 0, 1, 2, ...; the model makes constants of them.
        positions_BT = batch["positions"] if isolate else None
        x_BTD, _ = model.hidden(batch["tokens"], positions_BT, batch["segment_ids"], keys_B=keys_B)
        loss_sum, nll_sum = cross_entropy(
            x_BTD, model.head_kernel, batch["targets"], batch["loss_mask"], cap=model.final_softcap,
            z_loss=z_loss, label_smoothing=smoothing, method=method)
        return loss_sum, jnp.sum(batch["loss_mask"]), {"nll": nll_sum}

    return objective
