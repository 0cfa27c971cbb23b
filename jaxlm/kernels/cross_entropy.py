"""Cross-entropy from the last hidden state: sums over tokens, log-sum-exp in float32."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.kernels.matmul import dense

# Above this many logits per device the head and the loss go over chunks of tokens (2 GiB in float32).
CHUNK_ABOVE = 2**29


def token_losses(logits_NV, targets_N, z_loss: float, label_smoothing: float):
    """-> (loss_N with the extras, plain cross-entropy nll_N), float32."""
    logits_NV = logits_NV.astype(jnp.float32)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    nll_N = lse_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    loss_N = nll_N
    if label_smoothing:
        uniform_N = lse_N - jnp.mean(logits_NV, axis=-1)
        loss_N = (1 - label_smoothing) * nll_N + label_smoothing * uniform_N
    if z_loss:  # keeps the log of the normaliser near zero (PaLM, arXiv:2204.02311)
        loss_N = loss_N + z_loss * jnp.square(lse_N)
    return loss_N, nll_N


def cross_entropy(x_BTD, kernel_DV, targets_BT, mask_BT, *, cap: float, z_loss: float, label_smoothing: float,
                  method: str):
    """-> (sum of loss, sum of plain negative log-likelihood) over the tokens where mask is 1.

    method: "plain" makes all logits at once, "chunked" a slice of the sequence at a time and again in the backward pass,
    "auto" chunks when there would be more than CHUNK_ABOVE logits.
    """
    B, T, _ = x_BTD.shape
    V = kernel_DV.shape[1]
    kernel_DV = kernel_DV.astype(x_BTD.dtype)

    def sums(x, targets, mask):
        logits = dense(x, kernel_DV)
        if cap:
            logits = cap * jnp.tanh(logits.astype(jnp.float32) / cap)
        loss, nll = token_losses(logits.reshape(-1, V), targets.reshape(-1), z_loss, label_smoothing)
        return jnp.vdot(loss, mask.reshape(-1)), jnp.vdot(nll, mask.reshape(-1))

    chunks = max(1, -(-B * T * V // CHUNK_ABOVE)) if method == "auto" else (8 if method == "chunked" else 1)
    while T % chunks:  # slices of equal length
        chunks += 1
    if chunks == 1:
        return sums(x_BTD, targets_BT, mask_BT)

    # Sliced along the sequence: the batch axis may be sharded, and cutting that would move data.
    cut = partial(jnp.split, indices_or_sections=chunks, axis=1)
    slices = [jnp.stack(cut(a)) for a in (x_BTD, targets_BT, mask_BT)]

    @jax.checkpoint
    def add(total, piece):
        loss, nll = sums(*piece)
        return (total[0] + loss, total[1] + nll), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), tuple(slices))[0]
