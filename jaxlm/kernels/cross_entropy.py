"""Cross-entropy from the last hidden state: sums over tokens, log-sum-exp in float32."""

import jax
import jax.numpy as jnp

from jaxlm.config import is_off
from jaxlm.kernels.matmul import dense
from jaxlm.parallel.rules import constrain, mesh_size

# Above this many logits per device the head and the loss go over slices (2 GiB in float32), of at most so many logits. Each slice
# adds to the head's gradient in memory, so it should have some thousands of tokens.
CHUNK_ABOVE = 2**29


def chunk_tokens(rows: float, T: float, V: float, method: str) -> float:
    """Tokens of a slice, of `rows` x `T` tokens on one device, V logits each."""
    return rows * T / number_of_chunks(rows * T * V, method)


def number_of_chunks(logits: float, method: str) -> int:
    """logits: on one device."""
    return max(1, -(-int(logits) // CHUNK_ABOVE)) if method == "auto" else (8 if method == "chunked" else 1)


def token_losses(logits_BTV, targets_BT, z_loss: float, label_smoothing: float):
    """-> (loss_BT with the extras, plain cross-entropy nll_BT), float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    if mesh_size("tensor") > 1:  # each device finds the target in its share of the vocabulary, or not; a look-up would gather all
        hit = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
        target_BT = jnp.sum(jnp.where(hit, logits_BTV, 0), axis=-1)
    else:
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = lse_BT - target_BT
    loss_BT = nll_BT
    if not is_off(label_smoothing):
        uniform_BT = lse_BT - jnp.mean(logits_BTV, axis=-1)
        loss_BT = (1 - label_smoothing) * nll_BT + label_smoothing * uniform_BT
    if not is_off(z_loss):  # keeps the log of the normaliser near zero (PaLM, arXiv:2204.02311)
        loss_BT = loss_BT + z_loss * jnp.square(lse_BT)
    return loss_BT, nll_BT


def cross_entropy(x_BTD, kernel_DV, targets_BT, mask_BT, *, cap: float, z_loss: float, label_smoothing: float,
                  method: str):
    """-> (sum of loss, sum of plain negative log-likelihood) over the tokens where mask is 1.

    method: "plain" makes all logits at once; "chunked" a slice of the sequence at a time, and each slice's gradient in the
    same pass, while its logits are there (as Liger Kernel does, arXiv:2410.10989): they are never all in memory, and never
    computed twice; "auto" chunks when there would be more logits than `CHUNK_ABOVE`. Chunked, only the first sum has a gradient.
    """
    V = kernel_DV.shape[1]
    kernel_DV = kernel_DV.astype(x_BTD.dtype)

    def sums(x, kernel, targets, mask):
        loss, nll = token_losses(head_logits(x, kernel, cap), targets, z_loss, label_smoothing)
        return jnp.sum(loss * mask), jnp.sum(nll * mask)

    chunks = chunks_of(targets_BT.shape, V, method)
    if chunks == 1:
        return sums(x_BTD, kernel_DV, targets_BT, mask_BT)

    @jax.custom_vjp
    def chunked(x, kernel, targets, mask):
        def add(total, piece):
            loss, nll = sums(piece[0], kernel, *piece[1:])
            return (total[0] + loss, total[1] + nll), None

        return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), cut(chunks, x, targets, mask))[0]

    def forward(x, kernel, targets, mask):
        def add(total, piece):
            (loss, nll), pull = jax.vjp(lambda x, kernel: sums(x, kernel, *piece[1:]), piece[0], kernel)
            dx, dkernel = pull((jnp.ones(()), jnp.zeros(())))
            return (total[0] + loss, total[1] + nll, total[2] + dkernel.astype(jnp.float32)), dx

        zero = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32))
        (loss, nll, dkernel), dxs = jax.lax.scan(add, zero, cut(chunks, x, targets, mask))
        return (loss, nll), (join(dxs), dkernel)

    def backward(gradients, cotangents):
        dx, dkernel = gradients
        scale = cotangents[0]
        return (dx * scale).astype(dx.dtype), (dkernel * scale).astype(kernel_DV.dtype), None, None

    chunked.defvjp(forward, backward)
    return chunked(x_BTD, kernel_DV, targets_BT, mask_BT)


def token_nlls(x_BTD, kernel_DV, targets_BT, *, cap: float, method: str):
    """Plain negative log-likelihood of each token, (B, T) float32; method: as of `cross_entropy`."""
    nlls = lambda x, targets: token_losses(head_logits(x, kernel_DV, cap), targets, 0.0, 0.0)[1]
    return by_slices(nlls, kernel_DV.shape[1], method, x_BTD, targets_BT)


def by_slices(function, vocab_size: int, method: str, *arrays):
    """function(*arrays (B, T, ...)) -> tree of arrays (B, T), of a function that makes `vocab_size` logits of each token and has
    them in memory for a slice of the sequence only, where `cross_entropy` would; in the backward pass they are made again."""
    chunks = chunks_of(arrays[0].shape[:2], vocab_size, method)
    if chunks == 1:
        return function(*arrays)
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda piece: function(*piece)), cut(chunks, *arrays)))


def head_logits(x_BTD, kernel_DV, cap: float):
    logits_BTV = constrain(dense(x_BTD, kernel_DV.astype(x_BTD.dtype)), "batch", "seq", "vocab")
    return cap * jnp.tanh(logits_BTV.astype(jnp.float32) / cap) if cap else logits_BTV


def chunks_of(shape_BT: tuple[int, int], V: int, method: str) -> int:
    """Slices of equal length."""
    (B, T), devices = shape_BT, mesh_size("data", "fsdp", "expert", "context", "tensor")
    chunks = number_of_chunks(B * T * V / devices, method)
    while T // mesh_size("context") % chunks:
        chunks += 1
    return chunks


def cut(chunks: int, *arrays):
    """(B, T, ...) -> (chunks, B, T / chunks, ...), along the part of the sequence that each device holds: any other cut would
    move data."""
    B, context = arrays[0].shape[0], mesh_size("context")
    return tuple(a.reshape(B, context, chunks, -1, *a.shape[2:]).transpose(2, 0, 1, *range(3, a.ndim + 2))
                 .reshape(chunks, B, -1, *a.shape[2:]) for a in arrays)


def join(a_CBT):
    """The inverse of `cut`, of one array."""
    (C, B), rest = a_CBT.shape[:2], a_CBT.shape[3:]
    a = a_CBT.reshape(C, B, mesh_size("context"), -1, *rest)
    return a.transpose(1, 2, 0, 3, *range(4, a.ndim)).reshape(B, -1, *rest)
