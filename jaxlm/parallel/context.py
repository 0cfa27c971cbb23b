"""Context parallelism: the sequence cut up over the mesh axis `context`.

all_gather: each device gathers all keys and values (as Llama 3 was trained, arXiv:2407.21783, 3.3.2); memory T per device.
ring: keys and values go round the devices (Liu et al., arXiv:2310.01889); memory T/c. A causal mask would leave the first
devices idle, so each holds one chunk from either end: of 2c chunks, device i has i and 2c-1-i ("zig-zag"). Every step
of the ring is then two tiles of one chunk by one chunk, wholly visible, on every device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.online_softmax import Keys, Queries, Rule, add, attend_online, begin, finish, tile_gradients
from jaxlm.parallel.rules import mesh_size, spec_of_axes

AXIS = "context"


def attend_on_mesh(local, q_BTNH, k_BSKH, v_BSKH, *, window: int, softcap: float, segment_ids_BT, method: str,
                   extras):
    """Attention under the ambient mesh: rows, heads and sequence stay where they are.

    local: (q, k, v, window, softcap, segment_ids, first_query, extras) -> out, a backend, used where each device has whole
    sequences. method: "ring" (the sequence in the order of `zigzag`) or "all_gather" (in its own order).
    extras: `jaxlm.kernels.attention.Extras`; the ring has none, and `all_gather` no bias, no keys of another text and no prefix.
    """

    def run(q, k, v, segment_ids, sinks, bias, key_segment_ids, prefix):
        if mesh_size(AXIS) == 1:
            here = extras._replace(sinks_N=sinks, bias_NTS=bias, key_segment_ids_BS=key_segment_ids, prefix_BS=prefix)
            return local(q, k, v, window, softcap, segment_ids, 0, here)
        q, rule = q * q.shape[-1] ** -0.5, Rule(window, softcap, extras.causal)
        return ring(q, k, v, segment_ids, rule) if method == "ring" else gathered(q, k, v, segment_ids, rule, sinks)

    heads, rows = spec_of_axes(("batch", "seq", "heads", None)), spec_of_axes(("batch", "seq"))
    of_heads = spec_of_axes(("heads",))
    specs = (heads, heads, heads, rows, of_heads, of_heads, rows, rows)
    return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, extras.sinks_N, extras.bias_NTS, extras.key_segment_ids_BS, extras.prefix_BS)


def gathered(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, rule, sinks_N):
    T = q_BTNH.shape[1]
    whole = lambda a: None if a is None else jax.lax.all_gather(a, AXIS, axis=1, tiled=True)
    mine = jax.lax.axis_index(AXIS) * T + jnp.arange(T)
    keys = Keys(whole(k_BSKH), whole(v_BSKH), jnp.arange(T * mesh_size(AXIS)), whole(segment_ids_BT))
    sinks_BTN = None if sinks_N is None else jnp.broadcast_to(sinks_N, q_BTNH.shape[:-1])
    return attend_online(Queries(q_BTNH, mine, segment_ids_BT, sinks_BTN), keys, rule)


# ---- Zig-zag order --------------------------------------------------------------------------------------------------------


def zigzag_order(length: int) -> np.ndarray:
    """Places 0 ... length-1 in the order in which the ring holds them."""
    count = mesh_size(AXIS)
    chunks = np.arange(length).reshape(2 * count, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * count - 1 - i]]) for i in range(count)])


def zigzag(x_BTD, back: bool = False):
    """Activations from the sequence's own order into the ring's, or `back`: each device sends its two half chunks on."""
    count = mesh_size(AXIS)
    home = [i if i < count else 2 * count - 1 - i for i in range(2 * count)]  # of each chunk in the ring
    routes = [[(i, home[2 * i + half]) for i in range(count)] for half in (0, 1)]

    def run(x):
        odd = jax.lax.axis_index(AXIS) % 2 == 1
        first, second = jnp.split(x, 2, axis=1)
        if back:  # the chunk that came over route 0 is the first one on even devices
            first, second = jnp.where(odd, second, first), jnp.where(odd, first, second)
            first, second = (jax.lax.ppermute(a, AXIS, [(to, at) for at, to in route])
                             for a, route in zip((first, second), routes, strict=True))
        else:
            first, second = (jax.lax.ppermute(a, AXIS, route) for a, route in zip((first, second), routes, strict=True))
            first, second = jnp.where(odd, second, first), jnp.where(odd, first, second)
        return jnp.concatenate([first, second], axis=1)

    spec = spec_of_axes(("batch", "seq", None))
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(x_BTD)


# ---- Ring -----------------------------------------------------------------------------------------------------------------


def chunk_positions(device, half_length: int, count: int):
    """Positions of the two chunks of a device."""
    low, high = device * half_length, (2 * count - 1 - device) * half_length
    return low + jnp.arange(half_length), high + jnp.arange(half_length)


def pair(tree):
    """(B, 2t, ...) leaves -> two trees, the low and the high chunk."""
    return (jax.tree.map(lambda a, i=i: jnp.split(a, 2, axis=1)[i], tree) for i in (0, 1))


def segments_of_all(segment_ids_BT):
    """(c, B, T) or None: those of every device, gathered at once. Sent round the ring, they would make a loop of their own, which
    XLA runs beside the one of keys and values; a CPU with fewer threads than collectives may then wait for ever."""
    return None if segment_ids_BT is None else jax.lax.all_gather(segment_ids_BT, AXIS)


def rotate(tree):
    count = mesh_size(AXIS)
    route = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, route), tree)


def select(where, a, b):
    return jax.tree.map(lambda x, y: jnp.where(where, x, y), a, b)


def tiles_of(q, keys, segments, step, count, half_length):
    """The low and high chunks of queries and keys at this step of the ring, with positions; and whether the keys come
    from a device before this one (then its low chunk is seen by both of ours), after (then our high chunk sees both of its)."""
    me = jax.lax.axis_index(AXIS)
    source = (me - step) % count
    mine, theirs = chunk_positions(me, half_length, count), chunk_positions(source, half_length, count)
    q_segments, k_segments = (None, None) if segments is None else (segments[me], segments[source])
    q_low, q_high = (Queries(a, at, s) for (a, s), at in zip(pair((q, q_segments)), mine, strict=True))
    k_low, k_high = (Keys(a, b, at, s) for (a, b, s), at in zip(pair((*keys, k_segments)), theirs, strict=True))
    return q_low, q_high, k_low, k_high, source < me


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, rule: Rule):
    """Local arrays in zig-zag order, queries scaled -> out_BTNH."""
    return _ring_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, rule)[0]


def _ring_forward(q, k, v, segment_ids, rule):
    count, half_length, segments = mesh_size(AXIS), q.shape[1] // 2, segments_of_all(segment_ids)

    def tiles(step, keys):
        return tiles_of(q, keys, segments, step, count, half_length)

    q_low, q_high, k_low, k_high, _ = tiles(0, (k, v))  # own keys: two triangles and a square
    low = add(begin(q_low.q_BTNH), q_low, k_low, rule)
    high = add(add(begin(q_high.q_BTNH), q_high, k_low, rule), q_high, k_high, rule)

    def visit(carry, step):
        low, high, keys = carry
        keys = rotate(keys)
        q_low, q_high, k_low, k_high, before = tiles(step, keys)
        high = add(high, q_high, k_low, rule)  # always seen
        busy = add(select(before, low, high), select(before, q_low, q_high), select(before, k_low, k_high), rule)
        return (select(before, busy, low), select(before, high, busy), keys), None

    (low, high, _), _ = jax.lax.scan(visit, (low, high, (k, v)), jnp.arange(1, count))
    (out_low, lse_low), (out_high, lse_high) = finish(low), finish(high)
    out = jnp.concatenate([out_low, out_high], axis=1).astype(v.dtype)
    return out, (q, k, v, segment_ids, out, jnp.concatenate([lse_low, lse_high], axis=1))


def _ring_backward(rule, saved, d_out):
    """The same round; the gradients of keys and values travel with them, and come home with the last step."""
    q, k, v, segment_ids, out, lse = saved
    count, half_length, segments = mesh_size(AXIS), q.shape[1] // 2, segments_of_all(segment_ids)
    d_out = d_out.astype(jnp.float32)
    low_side, high_side = pair((lse, jnp.sum(d_out * out, -1), d_out))

    def tiles(step, keys):
        return tiles_of(q, keys, segments, step, count, half_length)

    def gradients(queries, keys, side):
        return tile_gradients(queries, keys, rule, *side)

    q_low, q_high, k_low, k_high, _ = tiles(0, (k, v))
    dq_low, dk_low, dv_low = gradients(q_low, k_low, low_side)
    square, corner = gradients(q_high, k_low, high_side), gradients(q_high, k_high, high_side)
    dq_high = square[0] + corner[0]
    dk, dv = (jnp.concatenate([a + b, c], axis=1) for a, b, c in ((dk_low, square[1], corner[1]), (dv_low, square[2], corner[2])))

    def visit(carry, step):
        dq_low, dq_high, dkv, keys = carry
        keys, (dk, dv) = rotate((keys, dkv))
        q_low, q_high, k_low, k_high, before = tiles(step, keys)
        dq_seen, dk_seen, dv_seen = gradients(q_high, k_low, high_side)
        dq_busy, dk_busy, dv_busy = gradients(select(before, q_low, q_high), select(before, k_low, k_high),
                                              select(before, low_side, high_side))
        dq_low, dq_high = dq_low + jnp.where(before, dq_busy, 0), dq_high + dq_seen + jnp.where(before, 0, dq_busy)
        dk, dv = (total + jnp.concatenate([seen + jnp.where(before, busy, 0), jnp.where(before, 0, busy)], axis=1)
                  for total, seen, busy in ((dk, dk_seen, dk_busy), (dv, dv_seen, dv_busy)))
        return (dq_low, dq_high, (dk, dv), keys), None

    start = (dq_low, dq_high, (dk, dv), (k, v))
    (dq_low, dq_high, dkv, _), _ = jax.lax.scan(visit, start, jnp.arange(1, count))
    dk, dv = rotate(dkv)
    return jnp.concatenate([dq_low, dq_high], axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring.defvjp(_ring_forward, _ring_backward)
