"""Every policy gives the same gradient; what it computes again is counted in the program, what it keeps in its memory."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from test_transformer import noisy, tiny

from jaxlm.errors import UserError
from jaxlm.kernels.attention import LONG
from jaxlm.models.remat import POLICIES
from jaxlm.train.state import build_model

TOKENS = np.random.default_rng(0).integers(0, 32, (8, 128)).astype(np.int32)


@functools.cache
def compiled(remat, **options):
    """-> (matrix products in the program, its temporary bytes, gradient). A scan, since XLA on a CPU undoes remat elsewhere."""
    model = build_model(tiny(remat=remat, scan_layers=True, **options), 32, "plain")
    params = noisy(jax.jit(model.init)(jax.random.key(0)))
    loss = lambda p: (nnx.merge(model.graph, p).hidden(TOKENS)[0] ** 2).sum()
    lowered = jax.jit(jax.grad(loss)).lower(params)
    program = lowered.compile()
    return lowered.as_text(), program.memory_analysis().temp_size_in_bytes, program(params)


def products(remat):
    return compiled(remat)[0].count("stablehlo.dot_general")


@pytest.mark.parametrize("remat", [*POLICIES, "attention,offload:up"])
def test_the_gradient_is_the_same(remat):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), compiled(remat)[2], compiled("none")[2])


@pytest.mark.parametrize("options", [dict(feedforward="moe", num_experts=4, shared_experts=1), dict(scan_unroll=2),
                                     dict(value_residual=True, window=3, window_pattern="LG", feedforward="gelu")])
def test_so_it_is_in_other_blocks(options):
    for remat in ("minimal", "save_attention"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), compiled(remat, **options)[2],
                     compiled("none")[2] if options == dict(scan_unroll=2) else compiled("none", **options)[2])


def test_what_is_computed_again():
    """Of a block's 9 products (7 of layers, 2 of attention): the 2 of attention less its last, which only its output needs; the
    7 less the last, whose output no gradient needs."""
    again = {remat: products(remat) - products("none") for remat in POLICIES}
    assert again["minimal"] == again["offload"] == 1  # the scores
    assert again["save_dots"] == 2  # and their product with the values
    assert again["save_attention"] == 7  # the scores, and six products of layers
    assert again["full"] == 8


def test_flash_attention_is_not_run_twice():
    """Beyond LONG tokens blockwise attention is a loop over tiles, which only its log-sum-exp saves from being run again."""
    loops = {}
    for remat in ("none", "save_attention", "full"):
        model = build_model(tiny(remat=remat, scan_layers=True), 32, "blockwise")
        tokens = np.zeros((1, LONG + 1), np.int32)
        loss = lambda p, model=model, tokens=tokens: nnx.merge(model.graph, p).hidden(tokens)[0].sum()
        text = jax.jit(jax.grad(loss)).lower(jax.eval_shape(model.init, jax.random.key(0))).as_text()
        loops[remat] = text.count("stablehlo.while")
    assert loops["none"] == loops["save_attention"] < loops["full"]


def test_what_is_kept():
    memory = {remat: compiled(remat)[1] for remat in ("none", "minimal", "save_dots", "full")}
    assert memory["none"] > memory["minimal"] > memory["save_dots"] > memory["full"]
    kept = TOKENS.size * 16 * 4 * 4  # one (B, T, D) of four layers in float32
    assert memory["minimal"] - memory["save_dots"] == pytest.approx(kept, rel=0.25)


def test_offloaded_tensors_travel():
    """To the host and back; a CPU, whose memory is the host's, leaves it out of its program."""
    model = build_model(tiny(remat="attention,offload:up", scan_layers=True), 32, "plain")
    params = jax.eval_shape(model.init, jax.random.key(0))
    loss = lambda p: (nnx.merge(model.graph, p).hidden(TOKENS)[0] ** 2).sum()
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "f32<host>[8,128,64]" in program and "f32<host>[8,128,2,8]" not in program


def test_a_tensor_that_is_not_there_is_refused():
    for remat in ("fully", "attention,ups", "offload:"):
        with pytest.raises(UserError, match="use none, full.*query"):
            build_model(tiny(remat=remat), 32, "plain")
