"""Which class a text belongs to. A row holds several texts, each a segment; the label is the target of a text's last token."""

import jax.numpy as jnp

from jaxlm.config import BALANCED
from jaxlm.kernels.cross_entropy import token_losses
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES
from jaxlm.registry import Registry

POOLINGS = Registry("pooling", key="model.pooling")


@OBJECTIVES.register("classification")
def classification(config):
    """Cross-entropy of the classes, in nats. Its mean is weighted by objective.class_weights; the accuracy in aux is not."""
    pool, router_loss = POOLINGS[config.model.pooling], build_router_loss(config)
    z_loss, smoothing, weights = config.objective.z_loss, config.objective.label_smoothing, config.objective.class_weights
    if weights == BALANCED:  # no text was counted (`jaxlm plan`): the program is the same with any numbers
        weights = (1.0,) * config.model.num_classes

    def objective(model, batch, keys_B=None):
        mask_BT = batch["loss_mask"]
        logits_BTC, stats = class_logits(model, batch, pool, keys_B)
        labels_BT = jnp.where(mask_BT > 0, batch["targets"], 0)
        loss_BT, nll_BT = token_losses(logits_BTC, labels_BT, z_loss, smoothing)
        weight_BT = mask_BT * jnp.asarray(weights)[labels_BT] if weights else mask_BT
        weight_B = jnp.sum(weight_BT, axis=1)
        router_sum, aux = router_loss(stats, weight_B)
        aux |= {"nll": jnp.sum(nll_BT * weight_BT), "examples": jnp.sum(mask_BT),
                "correct": jnp.sum(mask_BT * (jnp.argmax(logits_BTC, axis=-1) == labels_BT))}
        return jnp.sum(loss_BT * weight_BT) + router_sum, jnp.sum(weight_B), aux

    return objective


def class_logits(model, batch, pool, keys_B=None):
    """-> (logits_BTC float32, which count where a text ends; stats of the feed-forwards)."""
    x_BTD, _, stats = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B)
    return model.classes(pool(x_BTD, batch)), stats


@POOLINGS.register("last")
def last(x_BTD, batch):
    return x_BTD


@POOLINGS.register("first")
def first(x_BTD, batch):
    start_BT = jnp.arange(x_BTD.shape[1]) - batch["positions"]
    return jnp.take_along_axis(x_BTD, start_BT[..., None], axis=1)


@POOLINGS.register("mean")
def mean(x_BTD, batch):
    segment_BT = batch["segment_ids"]
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None, :]).astype(x_BTD.dtype)
    return jnp.einsum("BTS,BSD->BTD", same_BTS, x_BTD) / jnp.sum(same_BTS, axis=2, keepdims=True)
