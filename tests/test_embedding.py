"""Gradients of the embedding table against float64, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh import assert_same_run, reference, tiny

from configs import default
from jaxlm.errors import UserError
from jaxlm.kernels import embedding
from jaxlm.kernels.embedding import BACKENDS, choose_embedding_gradient, look_up


@pytest.mark.parametrize("entries", [40, 2**27])  # of a one-hot matrix: chunks of 2 tokens, or one
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_equals_float64(backend, dtype, entries, monkeypatch):
    monkeypatch.setattr(embedding, "ONEHOT_ENTRIES", entries)
    rng, V, D = np.random.default_rng(0), 19, 6
    ids = np.minimum(rng.zipf(1.3, (3, 35)) - 1, V - 3)  # many repeats, and two rows of no token
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    d = jnp.asarray(rng.standard_normal((3, 35, D)), dtype)

    def run(table, ids):
        out, pull = jax.vjp(lambda t: look_up(t, ids, backend=backend, cotangent_dtype=dtype).astype(dtype), table)
        return out, pull(d)[0]

    out, found = jax.jit(run)(table, ids)
    np.testing.assert_array_equal(out, table.astype(dtype)[ids])
    wanted, size = np.zeros((V, D)), np.zeros((V, D))
    np.add.at(wanted, ids, np.asarray(d, np.float64))
    np.add.at(size, ids, np.abs(np.asarray(d, np.float64)))
    assert found.dtype == jnp.float32 and not wanted[-2:].any()
    assert (np.abs(found - wanted) <= 1e-6 * size).all()  # a bfloat16 anywhere would be 4e-3


@pytest.mark.parametrize("backend", ["onehot", "sort"])
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(stage=2, context=2, tensor=2), dict(data=4, expert=2)])
def test_mesh_gives_the_same_run(mesh, backend):
    c = tiny(**{f"mesh__{axis}": size for axis, size in mesh.items()}, kernels__embedding_gradient=backend)
    assert_same_run(c, reference())


def test_ngram_tables_take_the_same_gradient_on_a_mesh():
    changes = dict(model__ngram_max=3, model__ngram_buckets=64)
    c = tiny(**changes, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, kernels__embedding_gradient="onehot")
    assert_same_run(c, reference(**changes))


def test_a_name_that_is_none_is_an_error():
    c = default.get_config()
    assert choose_embedding_gradient(c, "gpu")[0] == "scatter"
    c.kernels.embedding_gradient = "one_hot"
    with pytest.raises(UserError, match="kernels.embedding_gradient='one_hot'.*did you mean onehot"):
        choose_embedding_gradient(c, "cpu")
