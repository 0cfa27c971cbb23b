"""The next token of a text."""

import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.kernels.cross_entropy import cross_entropy, token_nlls
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES


@OBJECTIVES.register("next_token")
def next_token(config):
    """Cross-entropy of the next token, in nats; aux["nll"] leaves out z-loss, label smoothing and the routers' losses."""
    if config.model.family in ("encoder", "encoder_decoder"):
        raise UserError(f"objective.name='next_token': model.family={config.model.family!r} does not tell the next token from "
                        "those before; use model.family=decoder, or objective.name=seq2seq for an encoder_decoder")
    isolate, loss_of_targets = config.data.isolate_documents, build_loss_of_targets(config)

    def objective(model, batch, keys_B=None):
        # One document a row, or none set apart: positions are 0, 1, 2, ...; the model makes constants of them.
        positions_BT = batch["positions"] if isolate else None
        x_BTD, _, stats = model.hidden(batch["tokens"], positions_BT, batch["segment_ids"], keys_B=keys_B,
                                       prefix_BS=model.given(batch))
        return loss_of_targets(model, batch, x_BTD, stats)

    return objective


def build_loss_of_targets(config):
    """-> (model, batch, x_BTD, stats of the feed-forwards) -> what an objective gives: of the batch's targets, from the last
    hidden state."""
    z_loss, smoothing, method = config.objective.z_loss, config.objective.label_smoothing, config.kernels.loss
    router_loss = build_router_loss(config)

    def loss_of_targets(model, batch, x_BTD, stats):
        loss_sum, nll_sum = cross_entropy(
            x_BTD, model.head_kernel, batch["targets"], batch["loss_mask"], cap=model.final_softcap,
            z_loss=z_loss, label_smoothing=smoothing, method=method)
        weight_B = jnp.sum(batch["loss_mask"], axis=1)
        router_sum, aux = router_loss(stats, weight_B)
        return loss_sum + router_sum, jnp.sum(weight_B), {"nll": nll_sum, **aux}

    return loss_of_targets


def target_nlls(config, model, batch, keys_B=None):
    """-> nll_BT float32: of each of the batch's targets by itself, which a decoder or an encoder_decoder tells."""
    memory = None
    if model.cross:
        memory = model.encode(batch["source_tokens"], batch["source_positions"], batch["source_segment_ids"], keys_B=keys_B)
    x_BTD, _, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B, memory=memory,
                               prefix_BS=model.given(batch))
    targets_BT = jnp.where(batch["loss_mask"] > 0, batch["targets"], 0)
    return token_nlls(x_BTD, model.head_kernel, targets_BT, cap=model.final_softcap, method=config.kernels.loss)
