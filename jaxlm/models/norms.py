"""Norms: x_BTD -> x_BTD, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.parameter import constant, parameter
from jaxlm.registry import Registry

NORMS = Registry("norm", key="model.norm")


def build_norm(config, size: int, rngs: nnx.Rngs) -> nnx.Module:
    return NORMS[config.model.norm](config, size, rngs)


@NORMS.register("rms")
class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang & Sennrich, arXiv:1910.07467)."""

    def __init__(self, config, size, rngs):
        self.eps, self.from_one = config.model.norm_eps, config.model.norm_scale_from_one
        if config.model.norm_scale:
            first = constant(0.0 if self.from_one else 1.0)
            self.scale = parameter(rngs, (size,), (None,), first, config.model.param_dtype)

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if hasattr(self, "scale"):
            y = y * (1 + self.scale[...].astype(jnp.float32) if self.from_one else self.scale[...])
        return y.astype(x.dtype)


@NORMS.register("layer")
class LayerNorm(nnx.Module):
    """Mean and variance norm with scale and bias (Ba et al., arXiv:1607.06450)."""

    def __init__(self, config, size, rngs):
        self.eps = config.model.norm_eps
        if config.model.norm_scale:
            self.scale = parameter(rngs, (size,), (None,), constant(1.0), config.model.param_dtype)
            self.bias = parameter(rngs, (size,), (None,), constant(0.0), config.model.param_dtype)

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        if hasattr(self, "scale"):
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


@NORMS.register("none")
class NoNorm(nnx.Module):
    def __init__(self, config=None, size=0, rngs=None):
        del config, size, rngs

    def __call__(self, x):
        return x
