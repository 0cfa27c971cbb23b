"""Cross-entropy from the last hidden state: sums over tokens, log-sum-exp in float32."""

import jax
import jax.numpy as jnp

from jaxlm.kernels.matmul import dense

# Above this many logits per device the head and the loss go over slices (2 GiB in float32).
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

    method: "plain" makes all logits at once; "chunked" a slice of the sequence at a time, and each slice's gradient in the
    same pass, while its logits are there (as Liger Kernel does, arXiv:2410.10989): they are never all in memory, and never
    computed twice; "auto" chunks when there would be more logits than `CHUNK_ABOVE`. Chunked, only the first sum has a gradient.
    """
    B, T, _ = x_BTD.shape
    V = kernel_DV.shape[1]
    kernel_DV = kernel_DV.astype(x_BTD.dtype)

    def sums(x, kernel, targets, mask):
        logits = dense(x, kernel)
        if cap:
            logits = cap * jnp.tanh(logits.astype(jnp.float32) / cap)
        loss, nll = token_losses(logits.reshape(-1, V), targets.reshape(-1), z_loss, label_smoothing)
        return jnp.vdot(loss, mask.reshape(-1)), jnp.vdot(nll, mask.reshape(-1))

    chunks = max(1, -(-B * T * V // CHUNK_ABOVE)) if method == "auto" else (8 if method == "chunked" else 1)
    while T % chunks:  # slices of equal length
        chunks += 1
    if chunks == 1:
        return sums(x_BTD, kernel_DV, targets_BT, mask_BT)

    def slices(*arrays):
        # Along the sequence: the batch axis may be sharded, and cutting that would move data.
        return tuple(jnp.stack(jnp.split(a, chunks, axis=1)) for a in arrays)

    @jax.custom_vjp
    def chunked(x, kernel, targets, mask):
        def add(total, piece):
            loss, nll = sums(piece[0], kernel, *piece[1:])
            return (total[0] + loss, total[1] + nll), None

        return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), slices(x, targets, mask))[0]

    def forward(x, kernel, targets, mask):
        def add(total, piece):
            (loss, nll), pull = jax.vjp(lambda x, kernel: sums(x, kernel, *piece[1:]), piece[0], kernel)
            dx, dkernel = pull((jnp.ones(()), jnp.zeros(())))
            return (total[0] + loss, total[1] + nll, total[2] + dkernel.astype(jnp.float32)), dx

        zero = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32))
        (loss, nll, dkernel), dxs = jax.lax.scan(add, zero, slices(x, targets, mask))
        return (loss, nll), (jnp.concatenate(list(dxs), axis=1), dkernel)

    def backward(gradients, cotangents):
        dx, dkernel = gradients
        scale = cotangents[0]
        return (dx * scale).astype(dx.dtype), (dkernel * scale).astype(kernel_DV.dtype), None, None

    chunked.defvjp(forward, backward)
    return chunked(x_BTD, kernel_DV, targets_BT, mask_BT)
