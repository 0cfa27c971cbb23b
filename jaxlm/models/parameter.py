"""A parameter: its shape, its logical axes and its initial value, declared together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class ParamSpec(NamedTuple):
    """What the rest of jaxlm (sharding rules, optimizers, plan) knows of one parameter."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]  # logical axes, one per dimension; "layers" first where stacked
    num_inputs: int  # leading axes (after "layers" and "expert") contracted with the input; 0: a vector or an embedding
    stacked: bool  # has a leading "layers" axis
    share: float = 1.0  # of it that one token uses: experts_per_token / num_experts in a mixture of experts

    @property
    def num_stacked(self) -> int:
        """Leading axes that number separate parameters: layers, experts."""
        return sum(axis in ("layers", "expert") for axis in self.axes)


def normal(std: float):
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def constant(value: float):
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def parameter(rngs: nnx.Rngs, shape, axes, init, dtype="float32", num_inputs: int = 0, share: float = 1.0) -> nnx.Param:
    """An `nnx.Param` that carries its logical axes (our own metadata key: flax's would need a mesh at build time)."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not match shape {shape}")
    value = init(rngs.params(), tuple(shape), jnp.dtype(dtype))
    return nnx.Param(value, axes=tuple(axes), num_inputs=num_inputs, share=share)


def spec_of(variable: nnx.Variable) -> ParamSpec:
    """The spec of an (abstract) variable; `nnx.vmap` adds a leading axis that the metadata does not know."""
    value, axes = variable.get_value(), variable.get_metadata("axes")
    stacked = len(value.shape) == len(axes) + 1
    axes = ("layers", *axes) if stacked else tuple(axes)
    return ParamSpec(tuple(value.shape), value.dtype, axes, variable.get_metadata("num_inputs"), stacked,
                     variable.get_metadata("share"))
