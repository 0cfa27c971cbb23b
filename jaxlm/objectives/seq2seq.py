"""A text about another: the decoder's next token, given what the encoder has read (Sutskever et al., arXiv:1409.3215)."""

import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES


@OBJECTIVES.register("seq2seq")
def seq2seq(config):
    """Cross-entropy of the decoder's tokens, in nats; aux["nll"] leaves out what that of `next_token` does. Segment k of
    a row looks at segment k of its source."""
    o, method, router_loss = config.objective, config.kernels.loss, build_router_loss(config)
    z_loss, smoothing = o.z_loss, o.label_smoothing

    def objective(model, batch, keys_B=None):
        memory = model.encode(batch["source_tokens"], batch["source_positions"], batch["source_segment_ids"], keys_B=keys_B)
        x_BTD, _, stats = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B, memory=memory)
        loss_sum, nll_sum = cross_entropy(
            x_BTD, model.head_kernel, batch["targets"], batch["loss_mask"], cap=model.final_softcap,
            z_loss=z_loss, label_smoothing=smoothing, method=method)
        weight_B = jnp.sum(batch["loss_mask"], axis=1)
        router_sum, aux = router_loss(stats, weight_B)
        return loss_sum + router_sum, jnp.sum(weight_B), {"nll": nll_sum, **aux}

    return objective
