"""Matrix products in 8 bits, scaled anew for each product: nothing to calibrate and nothing to keep.

int8: the forward product of integers, one scale a row of the input and one an output (Dettmers et al., arXiv:2208.07339, without
its outliers); the gradients are products in the compute type, past the rounding (straight-through).
fp8: all three products, e4m3 forward and e5m2 for the incoming gradient (Micikevicius et al., arXiv:2209.05433), one scale a
tensor, as the matrix units of a Hopper GPU take it. What is kept for the gradients is in 8 bits too.

Scales are of the array as a whole, so that a mesh does not change them; micro-batches do, in the last bits that 8 have.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError

MODULES = ("attention.query", "attention.key", "attention.value", "attention.out", "feedforward.up", "feedforward.gate",
           "feedforward.down")


def form_of(config, module: str) -> str:
    """In which form the products of `module`, one of MODULES, are. Raises UserError where the filter names no module."""
    k = config.kernels
    try:
        re.compile(k.quantized_modules)
    except re.error as error:
        raise UserError(f"kernels.quantized_modules={k.quantized_modules!r} is no regex: {error}") from error
    if not any(re.fullmatch(k.quantized_modules, name) for name in MODULES):
        raise UserError(f"kernels.quantized_modules={k.quantized_modules!r} matches none of {', '.join(MODULES)}")
    return k.quantization if re.fullmatch(k.quantized_modules, module) else "none"


def quantize(x, axes, dtype):
    """-> (codes of `dtype`, scale float32 with `axes` kept as 1): x is about codes * scale, exact at the largest."""
    most = jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    # Neither an integer nor, on a CPU, XLA's maximum holds a NaN: the scale does.
    finite = jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
    scale = jnp.where(finite, jnp.where(largest > 0, largest / most, 1.0), jnp.nan)
    codes = x.astype(jnp.float32) / scale
    return (jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else jnp.clip(codes, -most, most)).astype(dtype), scale


def contract(a, b, a_axes, b_axes, preferred):
    """The product of two arrays over these axes."""
    return jax.lax.dot_general(a, b, ((tuple(a_axes), tuple(b_axes)), ((), ())), preferred_element_type=preferred)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, kernel, num_inputs: int, form: str):
    """x (..., *inputs) times kernel (*inputs, *outputs) -> (..., *outputs) in x's type."""
    return _forward(x, kernel, num_inputs, form)[0]


def _forward(x, kernel, n, form):
    inputs = range(x.ndim - n, x.ndim)
    if form == "int8":
        (x_codes, x_scale), (k_codes, k_scale) = quantize(x, tuple(inputs), jnp.int8), quantize(kernel, tuple(range(n)), jnp.int8)
        y = contract(x_codes, k_codes, inputs, range(n), jnp.int32).astype(jnp.float32)
        y = y * x_scale.reshape(*x.shape[: x.ndim - n], *(1,) * (kernel.ndim - n)) * k_scale.reshape(kernel.shape[n:])
        return y.astype(x.dtype), (x, kernel)
    (x_codes, x_scale), (k_codes, k_scale) = (quantize(a, None, jnp.float8_e4m3fn) for a in (x, kernel))
    x_scale, k_scale = x_scale.reshape(()), k_scale.reshape(())
    y = contract(x_codes, k_codes, inputs, range(n), jnp.float32) * (x_scale * k_scale)
    like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
    return y.astype(x.dtype), (x_codes, x_scale, k_codes, k_scale, like)


def _backward(n, form, saved, dy):
    if form == "int8":
        x, kernel = saved
        dy_scaled, scale, x_scale, k_scale, kernel_codes, x_codes = dy, 1.0, 1.0, 1.0, kernel.astype(dy.dtype), x
        x_type, k_type = x.dtype, kernel.dtype
    else:
        x_codes, x_scale, kernel_codes, k_scale, (x_like, k_like) = saved
        dy_scaled, scale = quantize(dy, None, jnp.float8_e5m2)
        scale, x_type, k_type = scale.reshape(()), x_like.dtype, k_like.dtype
    rows, outputs = range(x_codes.ndim - n), kernel_codes.ndim - n
    dx = contract(dy_scaled, kernel_codes, range(dy.ndim - outputs, dy.ndim), range(n, kernel_codes.ndim), jnp.float32)
    dk = contract(x_codes, dy_scaled, rows, rows, jnp.float32)
    return (dx * (scale * k_scale)).astype(x_type), (dk * (scale * x_scale)).astype(k_type)


product.defvjp(_forward, _backward)


def describe_quantization(config) -> list[str]:
    """A line for the start of a run; none where nothing is quantised."""
    form = config.kernels.quantization
    if form == "none":
        return []
    dense = config.model.feedforward != "moe" or config.model.shared_experts  # else all of the feed-forward is routed experts
    modules = [name for name in MODULES if form_of(config, name) == form and (dense or name.startswith("attention"))]
    return [f"quantised to {form}: {', '.join(modules)}; no MFU, since the peak is another"]
