"""Attention a tile at a time: a running softmax (Milakov & Gimelshein, arXiv:1805.02867), as in flash attention (Dao et al.,
arXiv:2205.14135), in plain JAX. A tile is any set of queries against any set of keys; positions say what may be seen, so
that tiles may come in any order and from anywhere (the ring of `jaxlm.parallel.context`)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.matmul import einsum_float32

BLOCK = 1024  # queries at a time


class Rule(NamedTuple):
    """Which keys a query sees: of those not after it (`causal`; else of all) the ones within `window` (0: any); and squashing
    of the scores."""

    window: int
    softcap: float
    causal: bool = True


class Keys(NamedTuple):
    """Keys and values with what the mask needs of them."""

    k_BSKH: Any
    v_BSKH: Any
    positions_S: Any
    segment_ids_BS: Any  # or None


class Queries(NamedTuple):
    q_BTNH: Any  # scaled
    positions_T: Any
    segment_ids_BT: Any  # or None
    sinks_BTN: Any = None  # a logit that joins the softmax and brings no value, or None


class Running(NamedTuple):
    """Softmax over the keys seen so far: their unnormalised sum, its normaliser, and the maximum both are relative to."""

    out_BTNH: Any  # float32
    sum_BTN: Any
    max_BTN: Any


def scores(queries: Queries, keys: Keys, rule: Rule):
    """-> scores_BKGTS float32, -1e30 where unseen."""
    B, T, N, H = queries.q_BTNH.shape
    K = keys.k_BSKH.shape[2]
    q_BTKGH = queries.q_BTNH.reshape(B, T, K, N // K, H)
    s = einsum_float32("BTKGH,BSKH->BKGTS", q_BTKGH, keys.k_BSKH)
    if rule.softcap:
        s = rule.softcap * jnp.tanh(s / rule.softcap)
    distance_TS = queries.positions_T[:, None] - keys.positions_S[None, :]
    mask = distance_TS >= 0 if rule.causal else jnp.full(distance_TS.shape, True)
    if rule.window:
        mask &= distance_TS < rule.window
    if keys.segment_ids_BS is not None:
        mask = mask & (queries.segment_ids_BT[:, :, None] == keys.segment_ids_BS[:, None, :])[:, None, None]
    return jnp.where(mask, s, -1e30)


def begin(q_BTNH, sinks_BTN=None) -> Running:
    """Nothing seen yet but the sinks."""
    B, T, N, _ = q_BTNH.shape
    nothing = jnp.zeros(q_BTNH.shape, jnp.float32)
    if sinks_BTN is not None:
        return Running(nothing, jnp.ones((B, T, N)), sinks_BTN.astype(jnp.float32))
    return Running(nothing, jnp.zeros((B, T, N)), jnp.full((B, T, N), -1e30))


def add(running: Running, queries: Queries, keys: Keys, rule: Rule) -> Running:
    """See these keys too; a block of queries at a time, so that memory is linear in T."""

    def one_block(args):
        running, queries = args
        s = scores(queries, keys, rule)
        shape = running.max_BTN.shape
        new_max = jnp.maximum(running.max_BTN, jnp.max(s, -1).transpose(0, 3, 1, 2).reshape(shape))
        # A query that has seen nothing yet has maximum -1e30: exp(0) = 1 must not count there.
        p = jnp.where(s > -1e29, jnp.exp(s - heads_first(new_max, s)), 0.0)
        shrink = jnp.exp(running.max_BTN - new_max)
        return Running(running.out_BTNH * shrink[..., None] + weigh(p, keys.v_BSKH),
                       running.sum_BTN * shrink + jnp.sum(p, -1).transpose(0, 3, 1, 2).reshape(shape), new_max)

    return join(jax.lax.map(one_block, (split(running), split(queries))))


def weigh(p_BKGTS, v_BSKH):
    """-> out_BTNH float32."""
    out_BTKGH = einsum_float32("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    B, T, K, G, H = out_BTKGH.shape
    return out_BTKGH.reshape(B, T, K * G, H)


def split(tree):
    """Arrays over queries, (B, T, ...) or positions (T,) -> stacked blocks of at most BLOCK queries."""

    def blocks(a):
        axis = min(1, a.ndim - 1)
        T = a.shape[axis]
        count = T // BLOCK if T % BLOCK == 0 else 1
        return jnp.stack(jnp.split(a, count, axis))

    return jax.tree.map(blocks, tree)


def join(tree):
    return jax.tree.map(lambda a: jnp.concatenate(list(a), axis=1), tree)


def heads_first(x_BTN, s_BKGTS):
    """(B, T, N) -> (B, K, G, T, 1), beside scores."""
    B, K, G, T, _ = s_BKGTS.shape
    return x_BTN.reshape(B, T, K, G).transpose(0, 2, 3, 1)[..., None]


def finish(running: Running):
    """-> (out_BTNH float32, log of the normaliser lse_BTN)."""
    total = jnp.maximum(running.sum_BTN, 1e-30)
    return running.out_BTNH / total[..., None], running.max_BTN + jnp.log(total)


def tile_gradients(queries: Queries, keys: Keys, rule: Rule, lse_BTN, delta_BTN, d_out_BTNH):
    """-> (dq_BTNH, dk_BSKH, dv_BSKH) float32 of one tile, given the log-normaliser over all keys and delta = sum(d_out * out).

    The gradient of p = exp(s - lse) with respect to s is p * (d_out . v - delta): that of the number below with lse fixed.
    """

    def one_block(total, args):
        queries, lse, delta, d_out = args

        def number(q, k, v):
            s = scores(queries._replace(q_BTNH=q), keys._replace(k_BSKH=k, v_BSKH=v), rule)
            p = jnp.exp(s - heads_first(lse, s))
            return jnp.sum(weigh(p, v) * d_out) - jnp.sum(p * heads_first(delta, s))

        dq, dk, dv = jax.grad(number, (0, 1, 2))(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH)
        return (total[0] + dk, total[1] + dv), dq.astype(jnp.float32)

    zeros = (jnp.zeros(keys.k_BSKH.shape, jnp.float32), jnp.zeros(keys.v_BSKH.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(one_block, zeros, split((queries, lse_BTN, delta_BTN, d_out_BTNH)))
    return join(dq), dk, dv


def sink_gradients(queries: Queries, lse_BTN, delta_BTN):
    """A sink is one more p = exp(s - lse), whose value is zero; see `tile_gradients`."""
    if queries.sinks_BTN is None:
        return None
    return (-jnp.exp(queries.sinks_BTN - lse_BTN) * delta_BTN).astype(queries.sinks_BTN.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend_online(queries: Queries, keys: Keys, rule: Rule):
    """Attention of these queries over these keys -> out_BTNH; memory linear in both, forward and backward."""
    return _forward(queries, keys, rule)[0]


def _forward(queries, keys, rule):
    out, lse = finish(add(begin(queries.q_BTNH, queries.sinks_BTN), queries, keys, rule))
    out, lse = (checkpoint_name(a, "attention") for a in (out.astype(keys.v_BSKH.dtype), lse))  # for `jaxlm.models.remat`
    return out, (queries, keys, out, lse)


def _backward(rule, saved, d_out):
    queries, keys, out, lse = saved
    d_out = d_out.astype(jnp.float32)
    delta = jnp.sum(d_out * out, -1)
    grads = tile_gradients(queries, keys, rule, lse, delta, d_out)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH), strict=True))
    return Queries(dq, None, None, sink_gradients(queries, lse, delta)), Keys(dk, dv, None, None)


attend_online.defvjp(_forward, _backward)


# ---- Tile by tile ---------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Which tiles to go over, one after the other."""

    rows: int  # of queries
    columns: int  # of keys
    pairs: tuple  # (block of rows, block of columns), ...


def block(tree, index, size: int):
    """Block `index` of arrays over tokens, (B, T, ...) or positions (T,)."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * size, size, min(1, a.ndim - 1)), tree)


def put_block(tree, blocks, index, size: int):
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, index * size, 1), tree, blocks)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend_tiles(queries: Queries, keys: Keys, rule: Rule, tiles: Tiles):
    """`attend_online` over these tiles only, where a mask leaves no others. No more than one is ever in memory."""
    return _tiles_forward(queries, keys, rule, tiles)[0]


def _tiles_forward(queries, keys, rule, tiles):
    def visit(running, pair):
        i, j = pair
        seen = add(block(running, i, tiles.rows), block(queries, i, tiles.rows), block(keys, j, tiles.columns), rule)
        return put_block(running, seen, i, tiles.rows), None

    out, lse = finish(jax.lax.scan(visit, begin(queries.q_BTNH, queries.sinks_BTN), np.array(tiles.pairs, np.int32))[0])
    out, lse = (checkpoint_name(a, "attention") for a in (out.astype(keys.v_BSKH.dtype), lse))  # for `jaxlm.models.remat`
    return out, (queries, keys, out, lse)


def _tiles_backward(rule, tiles, saved, d_out):
    queries, keys, out, lse = saved
    sides = (lse, jnp.sum(d_out.astype(jnp.float32) * out, -1), d_out)
    arrays = (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH)

    def visit(grads, pair):
        i, j = pair
        lse, delta, d_out = block(sides, i, tiles.rows)
        new = tile_gradients(block(queries, i, tiles.rows), block(keys, j, tiles.columns), rule, lse, delta,
                             d_out.astype(jnp.float32))
        places = ((i, tiles.rows), (j, tiles.columns), (j, tiles.columns))
        return tuple(put_block(total, block(total, *place) + g, *place)
                     for total, g, place in zip(grads, new, places, strict=True)), None

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in arrays)
    grads = jax.lax.scan(visit, zeros, np.array(tiles.pairs, np.int32))[0]
    dq, dk, dv = (g.astype(a.dtype) for g, a in zip(grads, arrays, strict=True))
    return Queries(dq, None, None, sink_gradients(queries, lse, sides[1])), Keys(dk, dv, None, None)


attend_tiles.defvjp(_tiles_forward, _tiles_backward)
