"""GPT-OSS: attention sinks, experts with biases and a clamped form. `test_huggingface` compares the whole with transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
import test_moe

from jaxlm.errors import UserError
from jaxlm.kernels import attention
from jaxlm.kernels.attention import Extras, attend, choose_backend
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems
from jaxlm.parallel.rules import replicated

# ---- Sinks ------------------------------------------------------------------------------------------------------------------


def exact(q, k, v, sinks, window, segment_ids):
    """A query at a time, float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if (not window or t - s < window) and segment_ids[b, s] == segment_ids[b, t]]
        scores = np.exp(k[b, seen, n // 2] @ q[b, t, n] / np.sqrt(q.shape[-1]))
        out[b, t, n] = scores / (scores.sum() + np.exp(sinks[n])) @ v[b, seen, n // 2]
    return out


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("backend, tile", [("plain", 0), ("blockwise", 0), ("blockwise", 16)])
def test_sinks_equal_float64(backend, tile, window, monkeypatch):
    if tile:
        monkeypatch.setattr(attention, "LONG", 0)
        monkeypatch.setattr(attention, "TILE", tile)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 75, heads, 8)) for heads in (4, 2, 2)] + [rng.standard_normal(4)]
    segment_ids, weights = np.sort(rng.integers(0, 3, (2, 75)), axis=1), rng.standard_normal((2, 75, 4, 8)).astype(np.float32)

    def loss(q, k, v, sinks):
        out = attend(q, k, v, backend=backend, window=window, segment_ids_BT=segment_ids, extras=Extras(sinks_N=sinks))
        return jnp.vdot(out, weights), out

    gradient, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*(a.astype(np.float32) for a in arrays))
    np.testing.assert_allclose(out, exact(*arrays, window, segment_ids), atol=2e-5)
    for i in range(4):  # the slope along a random direction
        direction = rng.standard_normal(arrays[i].shape)
        ends = [exact(*arrays[:i], arrays[i] + side * direction, *arrays[i + 1 :], window, segment_ids) for side in (1e-5, -1e-5)]
        np.testing.assert_allclose(np.vdot(gradient[i], direction), np.vdot((ends[0] - ends[1]) / 2e-5, weights), rtol=1e-3)


def test_sinks_over_a_cut_up_sequence():
    """`all_gather` has its own softmax, a block at a time."""
    config = test_mesh.tiny(mesh__context=4, mesh__tensor=2, kernels__context="all_gather")
    mesh, rng = build_mesh(config), np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    arrays.append(rng.standard_normal(4).astype(np.float32))

    def run(*arrays):
        def loss(q, k, v, sinks):
            out = attend(q, k, v, backend="plain", context_method="all_gather", extras=Extras(sinks_N=sinks))
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)

    over, alone = jit(mesh, run)(*jax.device_put(arrays, replicated(mesh))), jax.jit(run)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), over, alone)


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_backends_without_sinks_refuse(backend):
    config = test_mesh.tiny(model__attention_sinks=True, kernels__attention=backend)
    with pytest.raises(UserError, match="attention_sinks"):
        choose_backend(config, {"cudnn": "gpu", "splash": "tpu"}[backend])
    ring = test_mesh.tiny(model__attention_sinks=True, mesh__context=2)
    assert any("use kernels.context=all_gather" in p for p in mesh_problems(ring, axis_sizes(ring, 2), 2))


# ---- Over devices -----------------------------------------------------------------------------------------------------------

STEPS = test_mesh.STEPS
MODEL = dict(model__attention_sinks=True, model__mlp_bias=True, model__router_bias=True, model__expert_form="clamped_swiglu")


@functools.cache
def reference():
    return test_mesh.run(test_moe.tiny(**MODEL), STEPS)[:2]


@pytest.mark.parametrize("mesh", [dict(mesh__expert=2, mesh__tensor=2, mesh__data=2),
                                  dict(mesh__fsdp=2, mesh__context=2, kernels__context="all_gather")])
def test_every_mesh_gives_the_same_curve_and_gradient(mesh):
    losses, gradient, _ = test_mesh.run(test_moe.tiny(**MODEL, **mesh), STEPS)
    np.testing.assert_allclose(losses, reference()[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max()), gradient, reference()[1])
