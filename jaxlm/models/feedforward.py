"""Feed-forward layers: (x_BTD, context) -> (x_BTD, stats); stats is None but for a mixture of experts (`jaxlm.models.moe`)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.kernels.matmul import dense_together, pays_together
from jaxlm.models.dense import Dense
from jaxlm.models.remat import named
from jaxlm.parallel.rules import constrain
from jaxlm.registry import Registry

FEEDFORWARDS = Registry("feed-forward", key="model.feedforward")


def relu2(x):
    """Squared ReLU (So et al., arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ALPHA, LIMIT = 1.702, 7.0  # of GPT-OSS: its gate is x * sigmoid(ALPHA * x), with products cut off at LIMIT


def clamped_silu(x):
    x = jnp.minimum(x, LIMIT)
    return x * jax.nn.sigmoid(ALPHA * x)


def clamped_up(x):
    return jnp.clip(x, -LIMIT, LIMIT) + 1


def gelu_exact(x):
    """By the normal distribution's own function, not its approximation by tanh, which `gelu` is (BERT)."""
    return jax.nn.gelu(x, approximate=False)


FORMS = {"swiglu": (jax.nn.silu, True), "geglu": (jax.nn.gelu, True), "gelu": (jax.nn.gelu, False), "relu2": (relu2, False),
         "clamped_swiglu": (clamped_silu, True), "relu": (jax.nn.relu, False), "gelu_exact": (gelu_exact, False)}
UPS = {clamped_silu: clamped_up}  # of activations whose other factor is not `up` itself


class FeedForward(nnx.Module):
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config, rngs, inits, form: str, mlp_dim: int):
        m, F = config.model, mlp_dim
        (self.activation, gated), self.fused = FORMS[form], config.kernels.fused_projections
        layer = lambda name, inputs, outputs, axes, init: Dense(config, rngs, f"feedforward.{name}", (inputs,), (outputs,), axes,
                                                                init, m.mlp_bias)
        self.up = layer("up", m.embed_dim, F, ("embed", "mlp"), inits.hidden(m.embed_dim))
        if gated:
            self.gate = layer("gate", m.embed_dim, F, ("embed", "mlp"), inits.hidden(m.embed_dim))
        self.down = layer("down", F, m.embed_dim, ("mlp", "embed"), inits.output(F))

    def __call__(self, x_BTD, context=None):
        names = ("gate", "up") if hasattr(self, "gate") else ("up",)
        layers = [getattr(self, name) for name in names]
        if len(layers) > 1 and all(layer.form == "none" for layer in layers) and pays_together(self.fused):
            outs = dense_together(x_BTD, [layer.kernel[...][:, None] for layer in layers])
            outs = [layer.add(x_BTD, y[..., 0, :]) for layer, y in zip(layers, outs, strict=True)]
        else:
            outs = [layer(x_BTD) for layer in layers]
        h_BTF = activate(self.activation,
                         *(named(name, constrain(y, "batch", "seq", "mlp")) for name, y in zip(names, outs, strict=True)))
        return named("down", self.down(h_BTF)), None


@partial(jax.checkpoint, static_argnums=0)
def activate(activation, h_BTF, up_BTF=None):
    """The gradient starts from the products again: cheaper than to keep what lies between."""
    a_BTF = activation(h_BTF)
    if up_BTF is None:
        return a_BTF
    return a_BTF * (UPS[activation](up_BTF) if activation in UPS else up_BTF)


def build_dense(form: str, config, rngs, inits):
    return FeedForward(config, rngs, inits, form, config.model.mlp_dim)


for _form in FORMS:
    FEEDFORWARDS.register(_form)(partial(build_dense, _form))
