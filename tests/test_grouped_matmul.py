"""Grouped matrix products: every backend, with empty groups and rows of no group, against float64."""

from functools import partial

import jax
import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.errors import UserError
from jaxlm.kernels.grouped_matmul import BACKENDS, Backend, choose_grouped_matmul, gmm, grouped_matmul

BACKENDS.register("gmm interpreted")(Backend(lambda request: "", partial(gmm, interpret=True)))
SIZES = {"uneven": (0, 70, 3, 0, 100, 64, 23, 0), "one": (0, 0, 0, 0, 0, 0, 0, 300), "none": (0,) * 8,
         "all": (40, 60) * 2 + (25,) * 4}


@pytest.mark.parametrize("backend", ["plain", "ragged_dot", "blocked", "gmm interpreted"])
def test_product_and_gradients_equal_float64(backend):
    rng, X, D, F = np.random.default_rng(0), 300, 128, 128
    rows, kernels, d = (rng.standard_normal(shape).astype(np.float32) for shape in ((X, D), (8, D, F), (X, F)))

    @jax.jit
    def both(rows, kernels, sizes):
        out, pull = jax.vjp(lambda r, k: grouped_matmul(r, k, sizes, backend=backend), rows, kernels)
        return out, *pull(d)

    for sizes in SIZES.values():
        live = sum(sizes)
        spoiled = np.where(np.arange(X)[:, None] < live, rows, np.nan)
        expert = np.repeat(np.arange(8), sizes)
        r, k, g = (a.astype(np.float64) for a in (rows[:live], kernels, d[:live]))
        expected = np.zeros((X, F)), np.zeros((X, D)), np.zeros((8, D, F))
        for x in range(live):
            expected[0][x] = r[x] @ k[expert[x]]
            expected[1][x] = k[expert[x]] @ g[x]
            expected[2][expert[x]] += np.outer(r[x], g[x])
        for found, wanted in zip(both(spoiled, kernels, np.array(sizes, np.int32)), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_a_backend_says_why_it_cannot_serve():
    c = default.get_config()
    c.model.feedforward, c.model.mlp_dim = "moe", 200
    resolve(c)
    chosen = [choose_grouped_matmul(c, platform)[0] for platform in ("cpu", "gpu", "tpu")]
    assert chosen == ["blocked", "ragged_dot", "ragged_dot"]
    c.kernels.grouped_matmul = "gmm"
    with pytest.raises(UserError, match="multiple of 128, not 200"):
        choose_grouped_matmul(c, "tpu")
    c.model.mlp_dim = 256
    assert choose_grouped_matmul(c, "tpu") == ("gmm", "asked for")
