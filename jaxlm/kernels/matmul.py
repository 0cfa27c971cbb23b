"""Matrix products, written so that XLA makes the fast one of each and of its gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.quantized import product
from jaxlm.parallel.rules import mesh_size


def dense(x, kernel, num_inputs: int = 1, form: str = "none"):
    """A layer's product: x (..., *inputs) times kernel (*inputs, *outputs) -> (..., *outputs); `num_inputs` axes are contracted.
    form: in 8 bits, see `jaxlm.kernels.quantized`.

    As one product of two matrices: given the axes B and T apart, XLA on a CPU copies the activations into another order
    for the kernel's gradient and multiplies there at a third of the speed. Elsewhere the reshapes cost nothing, but where
    the sequence is cut up over devices they would gather it.
    """
    if form != "none":
        return product(x, kernel, num_inputs, form)
    if mesh_size("context", "tensor", "stage") > 1:
        return jnp.tensordot(x, kernel.astype(x.dtype), num_inputs)
    rows, inputs = x.shape[: x.ndim - num_inputs], math.prod(kernel.shape[:num_inputs])
    y = x.reshape(-1, inputs) @ kernel.astype(x.dtype).reshape(inputs, -1)
    return y.reshape(*rows, *kernel.shape[num_inputs:])


def dense_together(x_BTD, kernels: list) -> list:
    """`dense` of several kernels (D, ...), as one product: [(B, T, ...), ...]. They are laid side by side along the axis before
    the last, in which alone they may differ and which no mesh cuts up: what is on one device stays there, and the gradient of
    x, which a tensor-parallel mesh sums over devices, is one sum instead of one for each kernel.
    """
    ends = np.cumsum([kernel.shape[-2] for kernel in kernels])[:-1]
    return jnp.split(dense(x_BTD, jnp.concatenate(kernels, axis=-2)), ends, axis=-2)


def pays_together(asked: str) -> bool:
    """Whether `kernels.fused_projections`, of which `auto` is for tensor-parallel meshes, asks for `dense_together` here."""
    return asked == "always" or asked == "auto" and mesh_size("tensor") > 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(axes: str, a, b):
    """`jnp.einsum(axes, a, b)` of two arrays of one type, summed and given out in float32.

    Its gradients are products in the type of `a` and `b`, as in flash attention: JAX's own would multiply the float32 gradient of
    the result by bfloat16 arrays, which accelerators do as a product of float32.
    """
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _backward(axes, operands, d):
    a, b = operands
    d = d.astype(a.dtype)
    return (*jax.linear_transpose(lambda a: jnp.einsum(axes, a, b), a)(d),
            *jax.linear_transpose(lambda b: jnp.einsum(axes, a, b), b)(d))


einsum_float32.defvjp(lambda axes, a, b: (einsum_float32(axes, a, b), (a, b)), _backward)
