"""Products in 8 bits against float64: how far off, and that gradients go past the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_mesh import reference, run
from test_mesh import tiny as tiny_run

from jaxlm.errors import UserError
from jaxlm.kernels.quantized import MODULES, describe_quantization, form_of, product, quantize
from jaxlm.observe.throughput import peak_flops
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import build_mesh


def inputs(seed=0, outputs=(3, 8)):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 16, 4, 32)), rng.standard_normal((4, 32, *outputs))
    return (a.astype(np.float32) for a in (x, kernel, rng.standard_normal((2, 16, *outputs))))


def off(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("form, forward, backward", [("int8", 0.012, 1e-6), ("fp8", 0.05, 0.08)])
def test_product_and_gradients(form, forward, backward):
    """e4m3 has 3 bits after the first (rounding errors to 6 %), e5m2 2 (12 %); over a sum they average out."""
    x, kernel, d = inputs()
    y, pull = jax.vjp(lambda x, k: product(x, k, 2, form), x, kernel)
    dx, dk = pull(d)
    wide = [a.astype(np.float64) for a in (x, kernel, d)]
    errors = [off(y, np.einsum("BTNH,NHKG->BTKG", *wide[:2])), off(dx, np.einsum("BTKG,NHKG->BTNH", wide[2], wide[1])),
              off(dk, np.einsum("BTNH,BTKG->NHKG", wide[0], wide[2]))]
    assert errors[0] < forward and max(errors[1:]) < backward
    assert errors[0] > forward / 5  # it was quantised


def test_scales():
    x = np.array([[1.0, -4.0], [0.0, 0.0]], np.float32)
    codes, scale = quantize(x, (1,), jnp.int8)
    assert codes.tolist() == [[32, -127], [0, 0]] and scale.shape == (2, 1)
    np.testing.assert_allclose(codes[0, 1] * scale[0, 0], -4.0)
    codes, scale = quantize(x * 1e30, None, jnp.float8_e4m3fn)
    assert np.isfinite(np.asarray(codes, np.float32)).all() and float(scale.squeeze()) == pytest.approx(4e30 / 448)


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(form, bad):
    """Else a run would go on over it."""
    x, kernel, _ = inputs()
    x[0, 0, 0, 0] = bad
    assert not np.isfinite(product(x, kernel, 2, form)[0, 0]).any()


def test_the_compiled_product_is_of_8_bits():
    x, kernel, d = inputs()
    for form, types in (("int8", ["xi8>"]), ("fp8", ["xf8E4M3FN>", "xf8E5M2>"])):
        number = lambda x, k, form=form: jnp.sum(product(x, k, 2, form) * d)
        text = jax.jit(jax.value_and_grad(number, (0, 1))).lower(x, kernel).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert all(any(t in line for line in dots) for t in types), dots


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_model_learns_as_it_does_in_full(form):
    losses = run(tiny_run(mesh__data=8, kernels__quantization=form))[0]
    np.testing.assert_allclose(losses, reference()[0], rtol=0.01)
    assert losses != reference()[0]


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_mesh_does_not_change_it(form):
    """Inputs, contracted axis and outputs cut up: a scale for each device's part would be off by a percent."""
    mesh, (x, kernel, d) = build_mesh(tiny_run(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)), inputs()

    def both(x, kernel, d):
        y, pull = jax.vjp(lambda *a: product(*a, 2, form), x, kernel)
        return y, *pull(d)

    parts = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec))) for a, spec in (
        (x, ("data", None, "tensor")), (kernel, ("tensor", None, None, "fsdp")), (d, ("data", None, None, "fsdp")))]
    for found, wanted in zip(jit(mesh, both)(*parts), jax.jit(both)(x, kernel, d), strict=True):
        assert off(found, wanted) < 1e-5


def test_modules_by_name():
    config = tiny_run(kernels__quantization="int8", kernels__quantized_modules=r"feedforward\.(up|gate)")
    assert [name for name in MODULES if form_of(config, name) == "int8"] == ["feedforward.up", "feedforward.gate"]
    assert describe_quantization(config)[0].startswith("quantised to int8: feedforward.up, feedforward.gate;")
    config.model.feedforward, config.kernels.quantized_modules = "moe", ".*"
    assert "feedforward" not in describe_quantization(config)[0]
    with pytest.raises(UserError, match="matches none of attention.query"):
        form_of(tiny_run(kernels__quantized_modules="mlp"), "feedforward.up")
    with pytest.raises(UserError, match="is no regex"):
        form_of(tiny_run(kernels__quantized_modules="("), "feedforward.up")


def test_no_mfu_against_the_peak_of_another_type():
    assert peak_flops("NVIDIA H200") and peak_flops("NVIDIA H200", "fp8") is None
