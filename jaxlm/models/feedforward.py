"""Feed-forward layers: x_BTD -> x_BTD through a wider hidden layer F."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.kernels.matmul import dense
from jaxlm.models.parameter import constant, parameter
from jaxlm.parallel.rules import constrain
from jaxlm.registry import Registry

FEEDFORWARDS = Registry("feed-forward", key="model.feedforward")


class FeedForward(nnx.Module):
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config, rngs, inits, activation, gated):
        m = config.model
        self.activation = activation
        self.up = Linear(m, rngs, m.embed_dim, m.mlp_dim, ("embed", "mlp"), inits.hidden(m.embed_dim))
        if gated:
            self.gate = Linear(m, rngs, m.embed_dim, m.mlp_dim, ("embed", "mlp"), inits.hidden(m.embed_dim))
        self.down = Linear(m, rngs, m.mlp_dim, m.embed_dim, ("mlp", "embed"), inits.output(m.mlp_dim))

    def __call__(self, x_BTD):
        inner = (self.gate, self.up) if hasattr(self, "gate") else (self.up,)
        return self.down(self._activate(*(constrain(layer(x_BTD), "batch", "seq", "mlp") for layer in inner)))

    @partial(jax.checkpoint, static_argnums=0)
    def _activate(self, h_BTF, up_BTF=None):
        """The gradient starts from the products again: cheaper than to keep what lies between."""
        a_BTF = self.activation(h_BTF)
        return a_BTF if up_BTF is None else a_BTF * up_BTF


class Linear(nnx.Module):
    def __init__(self, m, rngs, inputs, outputs, axes, init):
        self.kernel = parameter(rngs, (inputs, outputs), axes, init, m.param_dtype, num_inputs=1)
        if m.mlp_bias:
            self.bias = parameter(rngs, (outputs,), axes[1:], constant(0.0), m.param_dtype)

    def __call__(self, x):
        y = dense(x, self.kernel[...])
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


@FEEDFORWARDS.register("swiglu")
def swiglu(config, rngs, inits):
    return FeedForward(config, rngs, inits, jax.nn.silu, gated=True)


@FEEDFORWARDS.register("geglu")
def geglu(config, rngs, inits):
    return FeedForward(config, rngs, inits, jax.nn.gelu, gated=True)


@FEEDFORWARDS.register("gelu")
def gelu(config, rngs, inits):
    return FeedForward(config, rngs, inits, jax.nn.gelu, gated=False)


@FEEDFORWARDS.register("relu2")
def relu2(config, rngs, inits):
    """Squared ReLU (So et al., arXiv:2109.08668)."""
    return FeedForward(config, rngs, inits, lambda x: jnp.square(jax.nn.relu(x)), gated=False)
