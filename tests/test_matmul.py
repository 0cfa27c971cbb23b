"""Products of several kernels at once."""

import jax
import numpy as np
import pytest
import test_collectives
from test_mesh import assert_same_run, reference
from test_mesh import tiny as tiny_run
from test_transformer import TOKENS, hidden, tiny

from jaxlm.kernels.matmul import dense, dense_together
from jaxlm.plan.collectives import summary


def test_together_as_one_by_one():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    kernels = [rng.standard_normal((8, 2, n, 4)).astype(np.float32) for n in (3, 1, 1)]
    together = jax.jit(dense_together)(x, kernels)
    for y, kernel in zip(together, kernels, strict=True):
        np.testing.assert_allclose(y, dense(x, kernel), atol=1e-5)
        np.testing.assert_allclose(y, np.einsum("BTD,DKNH->BTKNH", x.astype(np.float64), kernel), atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(num_kv_heads=1, attention_bias=True, mlp_bias=True, feedforward="geglu"),
                                     dict(feedforward="gelu", scan_layers=True)])
def test_fused_projections_are_the_same_model(options):
    config = tiny(**options)
    apart = hidden(config, TOKENS)
    config.kernels.fused_projections = "always"
    np.testing.assert_allclose(hidden(config, TOKENS), apart, atol=2e-5)


@pytest.mark.parametrize("asked", ["always", "never"])
def test_they_still_shard(asked):
    assert_same_run(tiny_run(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, kernels__fused_projections=asked), reference())


def test_and_sum_less_over_devices(monkeypatch):
    """The gradient of x comes from one product, not from two or three."""
    sent = {}
    for asked in ("auto", "never"):
        changes = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, kernels__fused_projections=asked)
        monkeypatch.setitem(test_collectives.CONFIGS, asked, tiny_run(**changes))
        sent[asked] = summary(test_collectives.compiled(asked)[5])["all-reduce tensor"]["bytes"]
    assert sent["auto"] < 0.65 * sent["never"]
