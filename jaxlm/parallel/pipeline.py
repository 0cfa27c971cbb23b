"""Pipeline parallelism: the layers cut up over the mesh axis `stage`, micro-batches passed from one to the next.

All stages run one program on arrays with a leading axis S over `stage` (GSPMD pipelining: Xu et al., arXiv:2105.04663, 3.3): a
tick runs every stage at once on the micro-batch that it holds, then rolls the axis, which moves each result to the next stage.

GPipe (repeats=1; Huang et al., arXiv:1811.06965): a stage holds one run of L/S layers; bubble (S-1) / (M+S-1) of the ticks for M
micro-batches. Circular (repeats=R; the interleaved schedule of Narayanan et al., arXiv:2104.04473, 2.2): it holds R runs of
L/(SR) layers and each micro-batch goes round R times; bubble (S-1) / (MR+S-1), for R times the transfers. Parameters are stored
in layer order on every mesh, so the circular schedule moves them between stages once a step. Gradients follow by differentiation:
all forward ticks, then all backward ones; 1F1B is not here, so keep memory down with model.remat.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel.rules import BATCH, constrain, mesh_size

AXIS = "stage"


def microbatches(rows: int, stages: int, asked: int) -> int:
    """How many parts `rows` rows (of one row of devices) are cut into: as asked, or the most up to 2 a stage that divide.
    0 if that cannot be: a micro-batch comes round again only after `stages` ticks, so there must be as many."""
    choices = (asked,) if asked else range(2 * stages, stages - 1, -1)
    return next((m for m in choices if m >= stages and rows % m == 0), 0)


def run_pipeline(stage, stacked, x, rows, *, asked: int, repeats: int):
    """All layers over all rows -> (tree like x, what each layer tells of each row, (L, B, ...)).

    stage: (parameters of a run of layers, index of its first layer, x, rows) -> (x, tree of (L/(SR), b, ...)), on one
    micro-batch of b rows.
    stacked: parameters (L, ...). x: tree of activations (B, T, ...), changed by each stage. rows: tree of arrays (B, ...) that
    belong to the same rows and do not change. asked: micro-batches, 0 for a choice.
    """
    S, R = mesh_size(AXIS), repeats
    layers = len(jax.tree.leaves(stacked)[0])
    run_length = layers // (S * R)
    M = microbatches(len(jax.tree.leaves(x)[0]) // mesh_size(*BATCH), S, asked)
    stage_ids = jnp.arange(S)

    def by_stage(p):  # (L, ...) -> (S, R, L/(SR), ...)
        p = p.reshape(R, S, run_length, *p.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(p, PartitionSpec(AXIS, *[PartitionSpec.UNCONSTRAINED] * (p.ndim - 1)))

    def deal(a):  # rows in turn, as in accumulation: each micro-batch keeps the sharding of the whole
        return a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1)

    params, rows = jax.tree.map(by_stage, stacked), jax.tree.map(deal, rows)
    # What waits for stage 0, (S, M, b, T, ...): inputs, then what came round. Only the first stage's copy is ever used, and
    # an axis over stages lets each keep what the roll brings without asking the others.
    waiting = jax.tree.map(lambda a: lay_out(jnp.broadcast_to(deal(a)[None], (S, M, *deal(a).shape[1:])), 2), x)
    held = jax.tree.map(lambda w: jnp.zeros_like(w[:, 0]), waiting)

    def tick(carry, t):
        held, waiting = carry
        item = t - stage_ids  # micro-batch and round that each stage works on
        micro, turn = item % M, jnp.clip(item // M, 0, R - 1)
        incoming = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, t % M, 1, keepdims=False), waiting)
        held = jax.tree.map(lambda new, old: lay_out(jnp.where(over(stage_ids, old) == 0, new, old), 1), incoming, held)
        mine = jax.tree.map(lambda p: jax.vmap(lambda q, r: q[r])(p, turn) if R > 1 else p[:, 0], params)
        first_layer = (turn * S + stage_ids) * run_length
        out, told = jax.vmap(stage, spmd_axis_name=AXIS)(mine, first_layer, held, jax.tree.map(lambda a: a[micro], rows))
        held = jax.tree.map(lambda o: lay_out(jnp.roll(o, 1, axis=0), 1), out)

        def keep(w, new):  # what the last stage finished, now at the first; nothing arrives in the first S-1 ticks
            slot = (t - S + 1) % M
            old = jax.lax.dynamic_index_in_dim(w, slot, 1, keepdims=False)
            return lay_out(jax.lax.dynamic_update_index_in_dim(w, jnp.where(t >= S - 1, new, old), slot, 1), 2)

        return (held, jax.tree.map(keep, waiting, held)), told

    (_, done), told = jax.lax.scan(tick, (held, waiting), jnp.arange(M * R + S - 1))

    def collect(w):  # from the first stage to all: one sum over stages
        first = jnp.sum(jnp.where(over(stage_ids, w) == 0, w, 0), axis=0)
        return first.swapaxes(0, 1).reshape(-1, *first.shape[2:])

    turn, stage_id, micro = np.ogrid[:R, :S, :M]

    def in_order(a):  # (ticks, S, L/(SR), b, ...) -> (L, B, ...): stage s works on micro-batch m of turn r at tick rM + m + s
        a = jnp.moveaxis(a[turn * M + micro + stage_id, stage_id], 2, 4)  # (R, S, L/(SR), b, M, ...)
        return a.reshape(layers, -1, *a.shape[5:])

    return jax.tree.map(collect, done), jax.tree.map(in_order, told)


def over(stage_ids, a):
    """(S,) beside an array (S, ...)."""
    return stage_ids.reshape(-1, *[1] * (a.ndim - 1))


def lay_out(a, batch_axis: int):
    """Activations with leading axes (S[, M]), then (b, T, ...)."""
    rest = (None,) * (a.ndim - batch_axis - 2)
    return constrain(a, "stage", *(None,) * (batch_axis - 1), "batch", "norm_seq", *rest)
