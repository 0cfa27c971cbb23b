"""Grouped matrix products: each run of rows times the kernel of its expert. A backend is (rows_XD, kernels_EDF, sizes_E) ->
rows_XF, whatever it likes in the rows of no group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.kernels.backend import Backend, choose, only_on_cpu
from jaxlm.registry import Registry

BACKENDS = Registry("grouped matmul backend", key="kernels.grouped_matmul")
TILE = 128  # of gmm: rows are padded to whole tiles, and the other sizes must be whole tiles
BLOCK = 64  # rows of one expert that `blocked` multiplies at once


class Request(NamedTuple):
    """What a run asks of its grouped products."""

    platform: str  # cpu, gpu, tpu
    embed_dim: int
    mlp_dim: int


def choose_grouped_matmul(config, platform: str) -> tuple[str, str]:
    """-> (name, why). Raises UserError where the backend asked for by name cannot serve."""
    request = Request(platform, config.model.embed_dim, config.model.mlp_dim)
    return choose(BACKENDS, config.kernels.grouped_matmul, request, ("gmm", "blocked", "ragged_dot"))


def grouped_matmul(rows_XD, kernels_EDF, sizes_E, *, backend: str):
    """The first sizes_E[0] rows times kernel 0, the next sizes_E[1] times kernel 1, ... -> rows_XF.

    Rows past the sum of the sizes belong to no group: zeros come out, and no gradient comes back, whatever they hold.
    """
    belongs_X1 = (jnp.arange(len(rows_XD)) < jnp.sum(sizes_E))[:, None]
    rows_XD = jnp.where(belongs_X1, rows_XD, 0)
    return jnp.where(belongs_X1, BACKENDS[backend].run(rows_XD, kernels_EDF.astype(rows_XD.dtype), sizes_E), 0)


def plain(rows_XD, kernels_EDF, sizes_E):
    """The reference: every expert on every row, of which one is kept."""
    ends_E = jnp.cumsum(sizes_E)
    at_X = jnp.arange(len(rows_XD))
    out = 0
    for kernel_DF, size, end in zip(kernels_EDF, sizes_E, ends_E, strict=True):
        out = out + jnp.where(((at_X >= end - size) & (at_X < end))[:, None], rows_XD @ kernel_DF, 0)
    return out


def ragged_dot(rows_XD, kernels_EDF, sizes_E):
    """XLA's own. A kernel on GPU and newer TPUs; on a CPU it multiplies every row by every expert."""
    return jax.lax.ragged_dot(rows_XD, kernels_EDF, sizes_E)


def blocked(rows_XD, kernels_EDF, sizes_E):
    """Each group padded to whole blocks of rows, then one batched product, block by kernel: E/2 blocks too many on average."""
    X, E = len(rows_XD), len(kernels_EDF)
    at_X, blocks_E = jnp.arange(X), -(-sizes_E // BLOCK)
    row_ends_E, block_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)
    # Where the rows of each group begin: among the rows, and among those of the blocks.
    begin_E, padded_begin_E = row_ends_E - sizes_E, (block_ends_E - blocks_E) * BLOCK
    number_of_blocks = -(-X // BLOCK) + E  # enough for any sizes
    expert_Z = jnp.minimum(jnp.searchsorted(block_ends_E, jnp.arange(number_of_blocks), side="right"), E - 1)
    inside_ZR = jnp.arange(number_of_blocks * BLOCK).reshape(-1, BLOCK) - padded_begin_E[expert_Z][:, None]
    from_ZR = jnp.where(inside_ZR < sizes_E[expert_Z][:, None], begin_E[expert_Z][:, None] + inside_ZR, X)
    rows_ZRD = rows_XD.at[from_ZR].get(mode="fill", fill_value=0)
    out_ZRF = jnp.einsum("ZRD,ZDF->ZRF", rows_ZRD, kernels_EDF[expert_Z])
    expert_X = jnp.minimum(jnp.searchsorted(row_ends_E, at_X, side="right"), E - 1)
    to_X = padded_begin_E[expert_X] + at_X - begin_E[expert_X]
    return out_ZRF.reshape(-1, out_ZRF.shape[-1]).at[to_X].get(mode="fill", fill_value=0)


def gmm(rows_XD, kernels_EDF, sizes_E, interpret: bool = False):
    """Megablox (Gale et al., arXiv:2211.15841), JAX's Pallas kernel for TPU."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm as megablox

    (X, D), F = rows_XD.shape, kernels_EDF.shape[-1]
    tile = lambda size: max(t for t in (TILE, 2 * TILE, 4 * TILE) if size % t == 0)
    padded = jnp.pad(rows_XD, ((0, -X % TILE), (0, 0)))
    tiling = (tile(len(padded)), tile(D), tile(F))
    return megablox(padded, kernels_EDF, sizes_E.astype(jnp.int32), rows_XD.dtype, tiling, interpret=interpret)[:X]


def gmm_supports(request: Request) -> str:
    if request.platform != "tpu":
        return f"needs a TPU, this is {request.platform}"
    for name, size in (("embed_dim", request.embed_dim), ("mlp_dim", request.mlp_dim)):
        if size % TILE:
            return f"needs a model.{name} that is a multiple of {TILE}, not {size}"
    return ""


BACKENDS.register("plain")(Backend(lambda request: "", plain))
BACKENDS.register("ragged_dot")(Backend(lambda request: "", ragged_dot))
BACKENDS.register("blocked")(Backend(only_on_cpu, blocked))
BACKENDS.register("gmm")(Backend(gmm_supports, gmm))
