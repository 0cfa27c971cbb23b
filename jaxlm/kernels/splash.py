"""Splash attention, JAX's Pallas kernel for TPU: a running softmax (FlashAttention-2, Dao, arXiv:2307.08691) over only those
blocks of the T x T scores that the mask does not wholly hide. Memory is linear in T."""

import math

import jax

LANES = 128  # of a TPU's vector unit: blocks are whole multiples, and VMEM holds shorter heads as if they were this long

# (bytes of a head's vector, block): the largest block with which the forward and both backward kernels fit the VMEM of a v4,
# 16 MiB, the least of v4 to v6e. Found by compiling for it: in each row the next larger block, 2x, does not fit.
BLOCKS = ((256, 1024), (1024, 512), (2048, 256))
# Queries that see n blocks of keys pay for about one more, which the diagonal halves; smaller blocks pay for more steps of the
# grid. 512 is MaxText's default, and its fast recipes for long sequences take 1024 and more. Not timed here: for want of a TPU.
LONG, MIDDLE = 8192, 512


def block_size(seq_len: int, window: int, head_dim: int, itemsize: int) -> int:
    """Queries, and keys, of a block: divides seq_len, which is a multiple of LANES."""
    head_bytes = max(head_dim, LANES) * itemsize
    block = next(block for limit, block in BLOCKS if head_bytes <= limit)
    if min(seq_len, window or seq_len) < LONG:
        block = min(block, MIDDLE)
    return math.gcd(seq_len, block)  # blocks are powers of 2


def splash(q_BTNH, k_BTKH, v_BTKH, window, softcap, segment_ids_BT, interpret: bool = False):
    """Causal attention of whole sequences. interpret: run the kernel's arithmetic on any device, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q_BTNH.shape[1:]
    block = block_size(T, window, H, q_BTNH.dtype.itemsize)
    part = min(block, MIDDLE)  # of the keys of a block, multiplied at once: with 1024 a v4 runs out of VMEM
    blocks = kernels.BlockSizes(block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block, block_kv_dkv=block,
                                block_kv_dkv_compute=part, block_q_dq=block, block_kv_dq=block)
    # The window's other side, 0, is what makes it causal; both masks are computed in the kernel, not stored.
    mask = masks.LocalMask((T, T), (window - 1, 0), offset=0) if window else masks.CausalMask((T, T))
    attend = kernels.make_splash_mha(masks.MultiHeadMask([mask] * N), block_sizes=blocks, attn_logits_soft_cap=softcap or None,
                                     head_shards=1, q_seq_shards=1, interpret=interpret,
                                     residual_checkpoint_name="attention")  # for `jaxlm.models.remat`
    segments = None if segment_ids_BT is None else kernels.SegmentIds(segment_ids_BT, segment_ids_BT)
    q_BNTH, k_BKTH, v_BKTH = (a.transpose(0, 2, 1, 3) for a in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
    return jax.vmap(attend)(q_BNTH, k_BKTH, v_BKTH, segments).transpose(0, 2, 1, 3)


def splash_supports(request) -> str:
    if request.platform != "tpu":
        return f"needs a TPU, this is {request.platform}"
    if request.head_dim > 512:
        return f"needs a head_dim of at most 512, not {request.head_dim}"
    if request.seq_len % LANES:
        return f"needs a seq_len that is a multiple of {LANES}, not {request.seq_len}"
    return ""
