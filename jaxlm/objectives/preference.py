"""Which of two answers is preferred. A row holds pairs side by side: the chosen answer is in segment 2k + 1, the rejected one in
2k + 2, and loss_mask is on the answers alone. Weights are pairs."""

import jax
import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import token_nlls
from jaxlm.models.moe import build_router_loss
from jaxlm.objectives.objective import OBJECTIVES


@OBJECTIVES.register("dpo")
def dpo(config):
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290): -log sigmoid of beta times how much more the model
    prefers the chosen answer than the reference does. objective.label_smoothing is the share of pairs taken to be the wrong way
    round (conservative DPO, section 3 of Mitchell's note of 2023); objective.length_normalized makes of log-probabilities their
    means over the answer's tokens (Tulu 3, arXiv:2411.15124)."""
    o, answers = config.objective, build_answers(config)
    beta, smoothing, normalized = o.beta, o.label_smoothing, o.length_normalized

    def objective(model, batch, keys_B=None, frozen=None):
        log_prob_BP2, length_BP2, stats = answers(model, batch, keys_B)
        reward_BP2 = beta * (log_prob_BP2 - answers(frozen, batch)[0])
        margin_BP = difference(reward_BP2 / jnp.maximum(length_BP2, 1) if normalized else reward_BP2)
        loss_BP = -(1 - smoothing) * jax.nn.log_sigmoid(margin_BP) - smoothing * jax.nn.log_sigmoid(-margin_BP)
        return answers.sums(loss_BP, margin_BP, length_BP2, stats)

    objective.needs = "reference"
    return objective


@OBJECTIVES.register("orpo")
def orpo(config):
    """Odds-ratio preference optimisation (Hong et al., arXiv:2403.07691), without a reference: the mean cross-entropy of the
    chosen answer's tokens, and beta (their lambda) times -log sigmoid of the log odds ratio."""
    beta, answers = config.objective.beta, build_answers(config)

    def objective(model, batch, keys_B=None):
        log_prob_BP2, length_BP2, stats = answers(model, batch, keys_B)
        mean_BP2 = log_prob_BP2 / jnp.maximum(length_BP2, 1)
        margin_BP = difference(mean_BP2 - log_one_less_exp(mean_BP2))
        return answers.sums(-mean_BP2[..., 0] - beta * jax.nn.log_sigmoid(margin_BP), margin_BP, length_BP2, stats)

    return objective


@OBJECTIVES.register("simpo")
def simpo(config):
    """SimPO (Meng et al., arXiv:2405.14734), without a reference: -log sigmoid of beta times the difference of the mean
    log-probabilities, less objective.margin."""
    beta, target, answers = config.objective.beta, config.objective.margin, build_answers(config)

    def objective(model, batch, keys_B=None):
        log_prob_BP2, length_BP2, stats = answers(model, batch, keys_B)
        margin_BP = beta * difference(log_prob_BP2 / jnp.maximum(length_BP2, 1))
        return answers.sums(-jax.nn.log_sigmoid(margin_BP - target), margin_BP, length_BP2, stats)

    return objective


def build_answers(config):
    return Answers(config.kernels.loss, build_router_loss(config))


class Answers:
    """P = T // 2 pairs of a row, chosen and rejected last; of pairs that are not there all is zero."""

    def __init__(self, method: str, router_loss):
        self.method, self.router_loss = method, router_loss

    def __call__(self, model, batch, keys_B=None):
        """-> (log-probabilities of the answers (B, P, 2), their tokens (B, P, 2), stats of the feed-forwards)."""
        x_BTD, _, stats = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B=keys_B)
        mask_BT = batch["loss_mask"]
        nll_BT = token_nlls(x_BTD, model.head_kernel, batch["targets"], cap=model.final_softcap, method=self.method)
        return by_pair(-nll_BT * mask_BT, batch["segment_ids"]), by_pair(mask_BT, batch["segment_ids"]), stats

    def sums(self, loss_BP, margin_BP, length_BP2, stats):
        """What an objective returns."""
        there_BP = jnp.all(length_BP2 > 0, axis=-1).astype(jnp.float32)
        weight_B = jnp.sum(there_BP, axis=1)
        router_sum, aux = self.router_loss(stats, weight_B)
        loss_sum, pairs = jnp.sum(loss_BP * there_BP), jnp.sum(weight_B)
        return loss_sum + router_sum, pairs, {
            **aux, "nll": loss_sum, "examples": pairs, "correct": jnp.sum((margin_BP > 0) * there_BP),
            "reward_margin": jnp.sum(margin_BP * there_BP)}


def by_pair(values_BT, segment_ids_BT):
    """Sums over segments -> (B, P, 2)."""
    P = values_BT.shape[1] // 2
    at_BT = jnp.where(segment_ids_BT > 0, segment_ids_BT - 1, 2 * P)  # padding goes to a place of its own
    sums = jax.vmap(lambda values, at: jax.ops.segment_sum(values, at, 2 * P + 1, indices_are_sorted=True))(values_BT, at_BT)
    return sums[:, :-1].reshape(-1, P, 2)


def difference(values_BP2):
    return values_BP2[..., 0] - values_BP2[..., 1]


def log_one_less_exp(x):
    """log(1 - exp(x)) of x < 0, exact near both ends (Maechler 2012); of 0, that of the nearest float below."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
