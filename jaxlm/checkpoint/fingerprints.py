"""What a checkpoint says of each leaf: its shape, its dtype and a number that one flipped bit changes, whatever the mesh."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.distributed import gather

PART_BYTES = 2**24  # of a shard, that one thread sums up
PIECE_BYTES = 2**18  # of words, that NumPy sums up at once: they stay in a core's cache


def describe(tree, prints=None) -> dict:
    """{path: {"shape", "dtype"[, "fingerprint"]}} for the leaves."""
    out = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        out[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if prints is not None:
            out[name]["fingerprint"] = int(prints[i])
    return out


def fingerprints(tree, frugal: bool = False) -> list[int]:
    """A uint32 per leaf: the sum of its words, each weighted by an odd number that depends on its place. Integer sums
    do not depend on their order, so every mesh gives the same; one flipped bit always changes it.

    frugal: by NumPy, a piece after the other, where otherwise XLA on a CPU takes as much work space as all leaves.
    """
    leaves = jax.tree.leaves(tree)
    if not frugal:
        return [int(x) for x in jax.device_get(_fingerprint(leaves))]
    here = [sum(fingerprint_of_shard(shard) for shard in leaf.addressable_shards) for leaf in leaves]
    return [sum(parts) % 2**32 for parts in zip(*gather(here, "fingerprints"), strict=True)]


def fingerprint_of_shard(shard) -> int:
    """What a shard adds to the fingerprint of its leaf; nothing if it is a copy of another shard."""
    if shard.replica_id:
        return 0
    data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
    first, *others = [s.start or 0 for s in shard.index] or [0]
    data = data.reshape(data.shape or 1)
    step = max(1, PART_BYTES * len(data) // max(1, data.nbytes))
    part = lambda at: fingerprint_of(np.asarray(data[at : at + step]), [first + at, *others])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return sum(pool.map(part, range(0, len(data), step)))


def fingerprint_of(part: np.ndarray, starts) -> int:
    """What a part of a leaf, which begins at the places `starts` of its axes, adds to its fingerprint."""
    if not part.ndim:
        part, starts = part[None], (0,)
    *others, weights = (_weights(*place, np) for place in zip(starts, part.shape, range(part.ndim), strict=True))
    weights_of_rows = functools.reduce(np.multiply.outer, others, np.uint32(1)).reshape(-1)
    words = part.astype(np.uint8) if part.dtype == bool else part.view(f"u{part.dtype.itemsize}")
    rows = words.reshape(len(weights_of_rows), len(weights))
    step = max(1, PIECE_BYTES // max(1, 4 * len(weights)))
    piece = lambda at: rows[at : at + step].astype(np.uint32, copy=False) @ weights @ weights_of_rows[at : at + step]
    return sum(int(piece(at)) for at in range(0, len(rows), step))


def _weights(first: int, size: int, axis: int, numpy):
    """Of the places first ... first + size along an axis."""
    place = numpy.uint32(first) + numpy.arange(size, dtype=numpy.uint32)
    return 2 * (place * numpy.uint32(2654435761 >> axis)) + 1


@jax.jit
def _fingerprint(leaves):
    return [_weighted_sum(x) for x in leaves]


def _weighted_sum(x):
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jnp.dtype(x.dtype).itemsize * 8
    words = jax.lax.bitcast_convert_type(x, {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]).astype(jnp.uint32)
    weight = jnp.uint32(1)
    for axis, size in enumerate(words.shape):  # mixed radix by broadcasting: no flattening, so shards stay in place
        shape = [1] * words.ndim
        shape[axis] = size
        weight = weight * _weights(0, size, axis, jnp).reshape(shape)
    return jnp.sum(words * weight, dtype=jnp.uint32)
