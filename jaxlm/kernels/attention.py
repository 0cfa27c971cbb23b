"""Attention backends. Each says what it supports, with a reason; `auto` takes the first that can serve."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.backend import Backend, choose
from jaxlm.kernels.matmul import einsum_float32
from jaxlm.kernels.online_softmax import Keys, Queries, Rule, Tiles, attend_tiles
from jaxlm.kernels.splash import splash, splash_supports
from jaxlm.models.remat import named
from jaxlm.parallel import target
from jaxlm.parallel.context import attend_on_mesh
from jaxlm.parallel.rules import mesh_size, on_a_mesh
from jaxlm.registry import Registry

BACKENDS = Registry("attention backend", key="kernels.attention")
# One kernel each. They name what rematerialisation keeps as "attention" themselves: a second name would be a second copy.
FUSED = ("splash", "cudnn")
LONG = 2048  # above this length `blockwise` goes by tiles
TILE = 256  # queries and keys of a tile: on 2 cores 0.7 of the time of 512, 0.4 of that of 1024


class Request(NamedTuple):
    """What a run asks of its attention."""

    platform: str  # cpu, gpu, tpu
    dtype: str
    head_dim: int
    softcap: bool
    segments: bool  # packed documents are isolated
    seq_len: int
    compute_capability: tuple = ()  # (major, minor) of an NVIDIA GPU
    sinks: bool = False
    causal: bool = True
    bias: bool = False
    prefix: bool = False


def request_of(config, platform: str) -> Request:
    m = config.model
    capability = getattr(target.device(), "compute_capability", "")  # "9.0"; an AMD GPU has a name here
    return Request(platform, m.compute_dtype, m.head_dim, m.attention_softcap > 0, config.data.isolate_documents, config.seq_len,
                   tuple(int(part) for part in capability.split(".") if part.isdecimal()), m.attention_sinks,
                   m.family not in ("encoder", "encoder_decoder"), m.position == "relative", m.prefix_attention)


def choose_backend(config, platform: str) -> tuple[str, str]:
    """-> (name, why). Raises UserError where the backend asked for by name cannot serve."""
    # On an accelerator `plain` is the faster of the two while its T x T scores are small.
    blockwise_pays = platform == "cpu" or config.seq_len > LONG
    preferred = ("splash", "cudnn", "blockwise", "plain") if blockwise_pays else ("splash", "cudnn", "plain")
    return choose(BACKENDS, config.kernels.attention, request_of(config, platform), preferred)


class Extras(NamedTuple):
    """What some models' attention has beside the usual."""

    sinks_N: Any = None  # a logit for each head that joins the softmax and brings no value (GPT-OSS)
    causal: bool = True  # else a query sees the keys after it too (encoders)
    bias_NTS: Any = None  # added to the scores (T5)
    key_segment_ids_BS: Any = None  # where keys are of another text than queries
    prefix_BS: Any = None  # bool: keys that the queries before them see too (prefix LM)


NO_EXTRAS = Extras()


def attend(q_BTNH, k_BSKH, v_BSKH, *, backend: str, window: int = 0, softcap: float = 0.0, segment_ids_BT=None,
           first_query=0, context_method: str = "ring", extras: Extras = NO_EXTRAS):
    """Attention -> out_BTNH, causal if `extras` say nothing else. Scores are scaled by 1/sqrt(H).

    window: a query sees its own position and the window-1 before it; 0: all before it.
    segment_ids_BT: a query sees keys of its own segment only.
    first_query: position of the first query among the keys, when decoding with a cache (S > T).
    extras: what the backend's `supports` was asked for.
    context_method: under a mesh that cuts the sequence up, see `jaxlm.parallel.context`.
    """
    if on_a_mesh():  # training and evaluation; decoding runs without one
        out_BTNH = attend_on_mesh(BACKENDS[backend].run, q_BTNH, k_BSKH, v_BSKH, window=window, softcap=softcap,
                                  segment_ids_BT=segment_ids_BT, method=context_method, extras=extras)
    else:
        out_BTNH = BACKENDS[backend].run(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras)
    return out_BTNH if backend in FUSED and mesh_size("context") == 1 else named("attention", out_BTNH)


def causal_mask(T: int, S: int, window: int, first_query, causal: bool = True):
    """-> bool TS; not causal: all of it."""
    if not causal:
        return jnp.full((T, S), True)
    q_T1, k_1S = first_query + jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    mask_TS = k_1S <= q_T1
    return mask_TS & (q_T1 - k_1S < window) if window else mask_TS


def softmax_with_sinks(scores, sinks):
    """Over the last axis, with one more column of logits that is left out of the result; `sinks` like scores, with a last axis
    of 1. Without sinks, a softmax."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def key_segments(segment_ids_BT, extras):
    return segment_ids_BT if extras.key_segment_ids_BS is None else extras.key_segment_ids_BS


def plain(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras=NO_EXTRAS):
    """The reference: materialises the scores, softmax in float32; any mask, any device."""
    B, T, N, H = q_BTNH.shape
    weights = plain_weights(q_BTNH, k_BSKH, window, softcap, segment_ids_BT, first_query, extras).astype(v_BSKH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BSKH.transpose(0, 2, 1, 3))
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def plain_weights(q_BTNH, k_BSKH, window, softcap, segment_ids_BT, first_query, extras=NO_EXTRAS):
    """-> how much of each key's value a query takes, BKGTS float32; with sinks they sum to less than 1.

    first_query: as in `attend`, or (T, 1), so that query t is the one of position first_query + t.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    # Heads before tokens: each score matrix is then one contiguous matrix product, twice as fast on a CPU.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    k_BKSH = k_BSKH.transpose(0, 2, 1, 3)
    if T == 1:  # decoding: right of the product, XLA on a CPU would turn round all keys for every token
        scores = einsum_float32("BKSH,BKGTH->BKSGT", k_BKSH, q_BKGTH).transpose(0, 1, 3, 4, 2)
    else:
        scores = einsum_float32("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if extras.bias_NTS is not None:
        scores = scores + extras.bias_NTS.reshape(K, N // K, T, S)
    mask = causal_mask(T, S, window, first_query, extras.causal)
    if extras.prefix_BS is not None:
        mask = mask | extras.prefix_BS[:, None, None, None, :]
    if segment_ids_BT is not None:
        mask = mask & (segment_ids_BT[:, :, None] == key_segments(segment_ids_BT, extras)[:, None, :])[:, None, None]
    sinks = None if extras.sinks_N is None else extras.sinks_N.reshape(K, N // K, 1, 1)
    return softmax_with_sinks(jnp.where(mask, scores, -1e30), sinks)


def blockwise(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras=NO_EXTRAS):
    """Any mask, any device, without the keys that no query of a block may see: by rows while T is short, and where it is long by
    tiles, with memory linear in T."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if max(T, S) > LONG and T > 1:
        return by_tiles(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras)
    if T != S:  # decoding, or keys of another text
        return plain(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras)
    return by_rows(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, extras)


def by_rows(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, extras):
    """The causal triangle in at most 8 blocks of queries, each against only the keys that it may see: half the products,
    and half the memory, of `plain`; not causal, or with a prefix, an eighth of the memory. Batch and heads are one axis, for
    which XLA on a CPU has matrix products in every order that the gradients need; with two it copies."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, block = N // K, max(64, -(-T // 8))
    # Queries that share a key head are rows of one matrix: row t*G + g.
    q_XRH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, T * G, H)
    k_XSH, v_XSH = (a.transpose(0, 2, 1, 3).reshape(B * K, S, H) for a in (k_BSKH, v_BSKH))
    sinks_XR1, outs = sinks_of_rows(extras.sinks_N, B, K, block), []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        first_key = max(0, begin - window + 1) if window else 0
        keys = slice(first_key, end) if extras.causal and extras.prefix_BS is None else slice(0, S)
        scores = einsum_float32("XRH,XSH->XRS", q_XRH[:, begin * G : end * G], k_XSH[:, keys])
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        if extras.bias_NTS is not None:
            bias_KGTS = extras.bias_NTS[:, begin:end, keys].reshape(K, G, end - begin, -1)
            scores = scores + jnp.tile(bias_KGTS.transpose(0, 2, 1, 3).reshape(K, (end - begin) * G, -1), (B, 1, 1))
        mask = causal_mask(end - begin, keys.stop - keys.start, window, begin - keys.start, extras.causal)
        if extras.prefix_BS is not None:
            mask = mask | extras.prefix_BS[:, None, :]
        if segment_ids_BT is not None:
            mask = mask & (segment_ids_BT[:, begin:end, None] == key_segments(segment_ids_BT, extras)[:, None, keys])
        mask = jnp.repeat(mask, K, axis=0) if mask.ndim == 3 else mask
        sinks = None if sinks_XR1 is None else sinks_XR1[:, : (end - begin) * G]
        weights = softmax_with_sinks(jnp.where(jnp.repeat(mask, G, axis=-2), scores, -1e30), sinks).astype(v_BSKH.dtype)
        outs.append(jnp.einsum("XRS,XSH->XRH", weights, v_XSH[:, keys]))
    out_XRH = jnp.concatenate(outs, axis=1)
    return out_XRH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def sinks_of_rows(sinks_N, B: int, K: int, T: int):
    """-> (B*K, T*G, 1), of the rows of T queries; None stays None."""
    if sinks_N is None:
        return None
    sinks_KTG = jnp.broadcast_to(sinks_N.reshape(K, 1, -1), (K, T, len(sinks_N) // K))
    return jnp.tile(sinks_KTG.reshape(K, -1, 1), (B, 1, 1))


def by_tiles(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras):
    """Running softmax over the tiles that are not wholly hidden. Batch and heads are one axis, and queries that share a key head
    are rows of one matrix, row t*G + g, as in `by_rows`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K

    def whole(a, fill=0):  # whole tiles; no causal query sees the keys that this adds, since they come after it
        return jnp.pad(a, ((0, 0), (0, -a.shape[1] % TILE), *((0, 0),) * (a.ndim - 2)), constant_values=fill)

    if not extras.causal and segment_ids_BT is None:
        segment_ids_BT, extras = jnp.zeros((B, T), int), extras._replace(key_segment_ids_BS=jnp.zeros((B, S), int))

    q_BTNH, k_BSKH, v_BSKH = whole(q_BTNH * H**-0.5), whole(k_BSKH), whole(v_BSKH)
    q_XR1H = q_BTNH.reshape(B, -1, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, -1, 1, H)
    k_XS1H, v_XS1H = (a.transpose(0, 2, 1, 3).reshape(B * K, -1, 1, H) for a in (k_BSKH, v_BSKH))
    row_ids_XR = key_ids_XS = None
    if segment_ids_BT is not None:
        key_ids_XS = jnp.repeat(whole(jnp.asarray(key_segments(segment_ids_BT, extras)), -1), K, axis=0)
        row_ids_XR = jnp.repeat(jnp.repeat(whole(jnp.asarray(segment_ids_BT)), K, axis=0), G, axis=1)
    positions_R = jnp.repeat(first_query + jnp.arange(q_BTNH.shape[1]), G)
    i, j = np.indices((q_BTNH.shape[1] // TILE, k_BSKH.shape[1] // TILE))
    if T == S and extras.causal:  # else only first_query, which may be traced, knows which tiles are seen
        seen = (j <= i) & ((i - j - 1) * TILE + 1 < (window or S))  # the first query of a tile less its last key
        i, j = i[seen], j[seen]
    tiles = Tiles(TILE * G, TILE, tuple(zip(i.ravel().tolist(), j.ravel().tolist(), strict=True)))
    out_XR1H = attend_tiles(Queries(q_XR1H, positions_R, row_ids_XR, sinks_of_rows(extras.sinks_N, B, K, q_BTNH.shape[1])),
                            Keys(k_XS1H, v_XS1H, jnp.arange(k_BSKH.shape[1]), key_ids_XS), Rule(window, softcap, extras.causal),
                            tiles)
    return out_XR1H.reshape(B, K, -1, G, H).transpose(0, 2, 1, 3, 4).reshape(B, -1, N, H)[:, :T]


def of_whole_sequences(kernel):
    """A backend of a kernel for as many queries as keys, without extras. Decoding goes through `plain`: its T is 1."""

    def run(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras=NO_EXTRAS):
        assert extras == NO_EXTRAS, "refused by `without_extras`"
        if q_BTNH.shape[1] != k_BSKH.shape[1]:
            return plain(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query)
        return kernel(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT)

    return run


def cudnn(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT):
    """cuDNN's fused attention through JAX; memory linear in T. `cudnn_supports` has seen to it that there is no soft-cap and are
    no segments, which would need a mask of T x T."""
    # local_window_size given as one number would be symmetric; (left, 0) without is_causal would see the future.
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=local,
                                        implementation="cudnn")


def cudnn_supports(request: Request) -> str:
    if request.platform != "gpu":
        return f"needs an NVIDIA GPU, this is {request.platform}"
    if request.dtype != "bfloat16":
        return f"needs model.compute_dtype=bfloat16, not {request.dtype}"
    if request.softcap:
        return "has no soft-cap (model.attention_softcap)"
    if request.segments:
        return "cannot isolate packed documents without a T x T mask (data.isolate_documents)"
    longest = 256 if request.compute_capability >= (9,) else 128  # Hopper and later
    if request.head_dim % 8 or request.head_dim > longest:
        return f"needs a head_dim that is a multiple of 8 and on this GPU at most {longest}, not {request.head_dim}"
    return ""


def without_extras(supports):
    """`supports` of a kernel that has none of what `Extras` are for."""

    def refuse(request: Request) -> str:
        if request.sinks:
            return "has no attention sinks (model.attention_sinks)"
        if not request.causal:
            return "sees only what comes before (model.family)"
        if request.bias:
            return "adds nothing to scores (model.position=relative)"
        if request.prefix:
            return "sees only what comes before (model.prefix_attention)"
        return supports(request)

    return refuse


def blockwise_supports(request: Request) -> str:
    if request.bias and request.seq_len > LONG:
        return f"adds nothing to scores (model.position=relative) above a seq_len of {LONG}, and this is {request.seq_len}"
    if request.prefix and request.seq_len > LONG:
        return f"sees no prefix (model.prefix_attention) above a seq_len of {LONG}, and this is {request.seq_len}"
    return ""


BACKENDS.register("plain")(Backend(lambda request: "", plain))
BACKENDS.register("blockwise")(Backend(blockwise_supports, blockwise))
BACKENDS.register("cudnn")(Backend(without_extras(cudnn_supports), of_whole_sequences(cudnn)))
BACKENDS.register("splash")(Backend(without_extras(splash_supports), of_whole_sequences(splash)))
