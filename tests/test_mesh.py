"""The mesh changes speed, never the loss: one curve and one gradient for every mesh, with ragged masks and packed documents."""

import functools

import jax
import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.kernels.attention import attend
from jaxlm.objectives.next_token import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.context import zigzag_order
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding, replicated, under_mesh
from jaxlm.train.state import build_init, build_model, flatten_paths, state_shardings
from jaxlm.train.step import build_train_step

STEPS, VOCAB = 20, 48


def tiny(**changes):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = STEPS, 64, 32
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.num_kv_heads = 4, 32, 4, 2
    c.model.scan_layers, c.data.isolate_documents, c.mesh.data = True, True, 1
    for key, value in changes.items():
        group, name = key.split("__") if "__" in key else (None, key)
        setattr(c[group] if group else c, name, value)
    resolve(c)
    return c


def packed_batch(c, seed):
    """Two or three documents a row, of which the last is padding; targets that cross documents or are padding do not count."""
    rng, shape = np.random.default_rng(seed), (c.batch_size, c.seq_len)
    cuts = np.sort(rng.integers(1, c.seq_len, (c.batch_size, 2)), axis=1)
    at = np.arange(c.seq_len)
    segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    live = (segments < 3) | (rng.random((c.batch_size, 1)) < 0.5)
    mask = live & (np.roll(segments, -1, 1) == segments)
    return {"tokens": rng.integers(0, VOCAB, shape, np.int32), "targets": rng.integers(0, VOCAB, shape, np.int32),
            "segment_ids": np.where(live, segments, 0).astype(np.int32), "positions": (at - starts).astype(np.int32),
            "loss_mask": mask.astype(np.float32)}


HYPER = {"learning_rate": np.float32(3e-3), "weight_decay": np.float32(0.1), "seed": np.int32(0)}


def build(c):
    """-> (mesh, model, init, shardings of the state, jitted step)."""
    mesh = build_mesh(c)
    model = build_model(c, VOCAB, "plain")
    optimizer = build_optimizer(c, model.specs)
    step = under_mesh(mesh, build_train_step(c, model, build_objective(c), optimizer, build_schedule(c)))
    init = build_init(c, model, optimizer)
    shardings = state_shardings(mesh, model, jax.eval_shape(init, 0), c.mesh.zero_stage)
    return mesh, model, init, shardings, jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def run(c, steps=STEPS):
    """-> (losses, first gradient as Adam's first moment, the state)."""
    mesh, _, init, shardings, step = build(c)
    state = jax.jit(init, out_shardings=shardings)(3)
    losses, gradient = [], None
    for i in range(steps):
        state, metrics = step(state, jax.device_put(packed_batch(c, i), batch_sharding(mesh)), HYPER)
        losses.append(float(metrics["loss"]))
        gradient = jax.device_get(state["opt_state"]["mu"]) if gradient is None else gradient
    return losses, gradient, state


@functools.cache
def reference(**changes):
    return run(tiny(**changes))[:2]


def assert_same_run(c, expected):
    losses, gradient, state = run(c)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    wanted = flatten_paths(expected[1])
    for path, g in flatten_paths(gradient).items():
        assert np.abs(g - wanted[path]).max() <= 1e-5 * np.abs(wanted[path]).max() + 1e-9, path
    return state


MESHES = {
    "data=8": dict(mesh__data=8),
    "fsdp=8": dict(mesh__fsdp=8),
    "fsdp=8, ZeRO-1": dict(mesh__fsdp=8, mesh__zero_stage=1),
    "data=2,fsdp=2,tensor=2": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
    "fsdp=2,context=4 ring": dict(mesh__fsdp=2, mesh__context=4),
    "fsdp=2,context=4 all_gather": dict(mesh__fsdp=2, mesh__context=4, kernels__context="all_gather"),
    "stage=2,fsdp=4": dict(mesh__stage=2, mesh__fsdp=4),
    "stage=2,tensor=2,data=2": dict(mesh__stage=2, mesh__tensor=2, mesh__data=2),
    "stage=2,data=4 circular": dict(mesh__stage=2, mesh__data=4, mesh__pipeline_repeats=2),
    "context=2,tensor=2,data=2": dict(mesh__context=2, mesh__tensor=2, mesh__data=2),
}


@pytest.mark.parametrize("accum", [1, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_curve_and_gradient(mesh, accum):
    assert_same_run(tiny(**MESHES[mesh], grad_accum_steps=accum), reference())


@pytest.mark.parametrize("options", [dict(), dict(window=5), dict(softcap=3.0), dict(segments=True, window=9)])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_context_parallel_attention_equals_plain(method, options):
    c = tiny(mesh__context=4, mesh__tensor=2)
    mesh, rng = build_mesh(c), np.random.default_rng(0)
    B, T = 2, 32
    q, k, v, d = (rng.standard_normal((B, T, n, 8)).astype(np.float32) for n in (4, 2, 2, 4))
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32) if options.pop("segments", False) else None

    def weighted(q, k, v, order=slice(None)):
        keep = None if segments is None else segments[:, order]
        q, k, v = q[:, order], k[:, order], v[:, order]
        out = attend(q, k, v, backend="plain", segment_ids_BT=keep, context_method=method, **options)
        return (out * d[:, order]).sum()

    def on_mesh(q, k, v):
        return weighted(q, k, v, zigzag_order(T) if method == "ring" else slice(None))

    expected = jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))(q, k, v)
    found = jax.jit(jax.value_and_grad(under_mesh(mesh, on_mesh), (0, 1, 2)))(*jax.device_put((q, k, v), replicated(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
