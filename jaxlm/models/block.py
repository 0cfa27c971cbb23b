"""One Transformer block: attention and feed-forward round a residual stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.attention import ATTENTIONS
from jaxlm.models.feedforward import FEEDFORWARDS
from jaxlm.models.norms import build_norm
from jaxlm.models.parameter import constant, normal


class Context(NamedTuple):
    """What is the same for all layers of one forward pass."""

    rope: Any  # Rope.tables or None
    segment_ids: Any  # (B, T) int32, or None where attention is causal only
    backend: str  # attention backend
    dropout: float
    cache_index: Any = 0  # where this call's first token stands, when decoding


class Inits(NamedTuple):
    """Initialisers by role; `fan_in` is the number of contracted inputs."""

    std: float
    use_fan_in: bool
    zero_output: bool
    num_layers: int

    def hidden(self, fan_in):
        return normal(fan_in**-0.5 if self.use_fan_in else self.std)

    def output(self, fan_in):
        """Into the residual stream: zero, or shrunk by the number of branches (GPT-2)."""
        if self.zero_output:
            return constant(0.0)
        return normal((fan_in**-0.5 if self.use_fan_in else self.std) / (2 * self.num_layers) ** 0.5)


class Block(nnx.Module):
    def __init__(self, config, rngs):
        m = config.model
        inits = Inits(m.init_std, m.init_fan_in, m.zero_init_proj, m.num_layers)
        self.parallel = m.block == "parallel"
        self.norm1 = build_norm(config, m.embed_dim, rngs)
        self.attention = ATTENTIONS[m.attention](config, rngs, inits)
        if not self.parallel:
            self.norm2 = build_norm(config, m.embed_dim, rngs)
        self.feedforward = FEEDFORWARDS[m.feedforward](config, rngs, inits)

    def __call__(self, x_BTD, context: Context, window, first_value=None, cache=None, key=None):
        """-> (x_BTD, v_BSKH, cache). A serial block is attention, then feed-forward; a parallel one adds both at once."""
        keys = (None, None) if key is None else jax.random.split(key)
        h_BTD = self.norm1(x_BTD)
        a_BTD, value, cache = self.attention(h_BTD, context, window, first_value, cache)
        x_BTD = x_BTD + drop(a_BTD, context.dropout, keys[0])
        if not self.parallel:
            h_BTD = self.norm2(x_BTD)
        return x_BTD + drop(self.feedforward(h_BTD), context.dropout, keys[1]), value, cache


def drop(x, rate: float, key):
    """Dropout; off where there is no key (evaluation)."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
