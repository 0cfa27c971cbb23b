"""What a larger model thinks of the next token: a frozen teacher beside the text itself (Hinton et al., arXiv:1503.02531)."""

import jax
import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import by_slices, head_logits, token_losses
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES


@OBJECTIVES.register("distillation")
def distillation(config):
    """(1 - w) cross-entropy + w t^2 KL, with w = objective.teacher_weight and both distributions softened by the temperature t.
    objective.kl: forward is KL(teacher || student), reverse KL(student || teacher) (Gu et al., arXiv:2306.08543).
    aux["nll"] is the plain cross-entropy of the text, comparable with any other run; aux["teacher_kl"] the sum of the KL."""
    o, isolate, method = config.objective, config.data.isolate_documents, config.kernels.loss
    weight, temperature, reverse = o.teacher_weight, o.temperature, o.kl == "reverse"
    z_loss, smoothing, router_loss = o.z_loss, o.label_smoothing, build_router_loss(config)

    def objective(model, batch, keys_B=None, frozen=None):
        positions_BT = batch["positions"] if isolate else None
        x_BTD, _, stats = model.hidden(batch["tokens"], positions_BT, batch["segment_ids"], keys_B=keys_B)
        teacher_BTE = frozen.hidden(batch["tokens"], positions_BT, batch["segment_ids"])[0]
        kernel, teacher_kernel = model.head_kernel, frozen.head_kernel

        def of_tokens(x, teacher, targets):
            logits = head_logits(x, kernel, model.final_softcap)
            teacher_logits = head_logits(teacher, teacher_kernel, frozen.final_softcap)
            return *token_losses(logits, targets, z_loss, smoothing), divergence(logits, teacher_logits, temperature, reverse)

        loss_BT, nll_BT, kl_BT = by_slices(of_tokens, 2 * kernel.shape[1], method, x_BTD, teacher_BTE, batch["targets"])
        mask_BT = batch["loss_mask"]
        weight_B, kl_sum = jnp.sum(mask_BT, axis=1), jnp.sum(kl_BT * mask_BT)
        router_sum, aux = router_loss(stats, weight_B)
        loss_sum = (1 - weight) * jnp.sum(loss_BT * mask_BT) + weight * temperature**2 * kl_sum
        return loss_sum + router_sum, jnp.sum(weight_B), {"nll": jnp.sum(nll_BT * mask_BT), "teacher_kl": kl_sum, **aux}

    objective.needs = "teacher"
    return objective


def divergence(logits_BTV, teacher_BTV, temperature: float, reverse: bool):
    """KL_BT of the softened distributions, float32."""
    student, teacher = (jax.nn.log_softmax(a.astype(jnp.float32) / temperature) for a in (logits_BTV, teacher_BTV))
    p, q = (student, teacher) if reverse else (teacher, student)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
