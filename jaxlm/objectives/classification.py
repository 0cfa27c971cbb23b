"""Which class a text belongs to. A row holds several texts, each a segment; the label is the target of a text's last token."""

import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import cross_entropy, token_losses
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES
from jaxlm.registry import Registry

POOLINGS = Registry("pooling", key="model.pooling")


@OBJECTIVES.register("classification")
def classification(config):
    """Cross-entropy of the classes, in nats. Its mean is weighted by objective.class_weights; the accuracy in aux is not.

    objective.lm_weight > 0 adds, of a decoder, that much of the loss of each of the texts' next tokens, told by the embedding
    (Radford et al. 2018, eq. 5): a regulariser where there are few labels.
    """
    pool, router_loss = POOLINGS[config.model.pooling], build_router_loss(config)
    z_loss, smoothing, weights = config.objective.z_loss, config.objective.label_smoothing, config.objective.class_weights
    lm_weight, method = config.objective.lm_weight, config.kernels.loss

    def objective(model, batch, keys_B=None):
        mask_BT = batch["loss_mask"]
        x_BTD, stats = hidden(model, batch, keys_B)
        logits_BTC = model.classes(pool(x_BTD, batch))
        labels_BT = jnp.where(mask_BT > 0, batch["targets"], 0)
        loss_BT, nll_BT = token_losses(logits_BTC, labels_BT, z_loss, smoothing)
        weight_BT = mask_BT * jnp.asarray(weights)[labels_BT] if weights else mask_BT
        weight_B = jnp.sum(weight_BT, axis=1)
        router_sum, aux = router_loss(stats, weight_B)
        aux |= {"nll": jnp.sum(nll_BT * weight_BT), "examples": jnp.sum(mask_BT),
                "correct": jnp.sum(mask_BT * (jnp.argmax(logits_BTC, axis=-1) == labels_BT))}
        loss_sum = jnp.sum(loss_BT * weight_BT) + router_sum
        if lm_weight:
            token_BT = (batch["segment_ids"] > 0) * (1 - mask_BT)
            loss_sum += lm_weight * cross_entropy(x_BTD, model.head_kernel, batch["targets"], token_BT, cap=model.final_softcap,
                                                  z_loss=0.0, label_smoothing=0.0, method=method)[0]
        return loss_sum, jnp.sum(weight_B), aux

    return objective


def class_logits(model, batch, pool, keys_B=None):
    """-> (logits_BTC float32, which count where a text ends; stats of the feed-forwards)."""
    x_BTD, stats = hidden(model, batch, keys_B)
    return model.classes(pool(x_BTD, batch)), stats


def hidden(model, batch, keys_B=None):
    x_BTD, _, stats = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B)
    return x_BTD, stats


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

