"""Gradients of the embedding table against float64, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh import run, tiny

from configs import default
from jaxlm.errors import UserError
from jaxlm.kernels import embedding
from jaxlm.kernels.embedding import BACKENDS, choose_embedding_gradient, look_up
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import constrain, replicated


@pytest.mark.parametrize("entries", [40, 2**27])  # of a one-hot matrix: chunks of 2 tokens, or one
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_gradient_equals_float64(backend, dtype, entries, monkeypatch):
    monkeypatch.setattr(embedding, "ONEHOT_ENTRIES", entries)
    rng, V, D = np.random.default_rng(0), 19, 6
    ids = np.minimum(rng.zipf(1.3, (3, 35)) - 1, V - 3)  # many repeats, and two rows of no token
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    d = jnp.asarray(rng.standard_normal((3, 35, D)), dtype)

    def both(table, ids):
        out, pull = jax.vjp(lambda t: look_up(t, ids, backend=backend, cotangent_dtype=dtype).astype(dtype), table)
        return out, pull(d)[0]

    out, found = jax.jit(both)(table, ids)
    np.testing.assert_array_equal(out, table.astype(dtype)[ids])
    wanted, size = np.zeros((V, D)), np.zeros((V, D))
    np.add.at(wanted, ids, np.asarray(d, np.float64))
    np.add.at(size, ids, np.abs(np.asarray(d, np.float64)))
    assert found.dtype == jnp.float32 and not wanted[-2:].any()
    assert (np.abs(found - wanted) <= 1e-6 * size).all()  # a bfloat16 anywhere would be 4e-3


@pytest.mark.parametrize("backend", ["onehot", "sort"])
@pytest.mark.parametrize("axes, V", [(dict(data=2, fsdp=2, tensor=2), 20), (dict(data=2, fsdp=2, tensor=2), 19),
                                     (dict(stage=2, context=2, tensor=2), 20)])  # 19 rows do not divide, so nothing cuts them up
def test_gradient_on_a_mesh_equals_one_device(axes, V, backend):
    mesh, rng = build_mesh(tiny(**{f"mesh__{axis}": size for axis, size in axes.items()})), np.random.default_rng(0)
    ids, d = rng.integers(0, V, (8, 6)).astype(np.int32), rng.standard_normal((8, 6, 4)).astype(np.float32)

    def gradient(table, ids, d):
        return jax.vjp(lambda t: look_up(constrain(t, "vocab", None), ids, backend=backend), table)[1](d)[0]

    inputs = np.zeros((V, 4), np.float32), ids, d
    on_mesh = jit(mesh, gradient)(*jax.device_put(inputs, replicated(mesh)))
    np.testing.assert_allclose(on_mesh, jax.jit(gradient)(*inputs), rtol=1e-6, atol=1e-6)


def test_whole_step_in_a_pipeline_with_ngrams_gives_the_same_run():
    changes = dict(model__ngram_max=2, model__ngram_buckets=64)
    expected = run(tiny(**changes), steps=3)[0]
    c = tiny(**changes, mesh__stage=2, mesh__tensor=2, mesh__data=2, kernels__embedding_gradient="onehot")
    np.testing.assert_allclose(run(c, steps=3)[0], expected, rtol=1e-5)


def test_a_name_that_is_none_is_an_error():
    c = default.get_config()
    assert choose_embedding_gradient(c, "gpu")[0] == "scatter"
    c.kernels.embedding_gradient = "one_hot"
    with pytest.raises(UserError, match="kernels.embedding_gradient='one_hot'.*did you mean onehot"):
        choose_embedding_gradient(c, "cpu")
