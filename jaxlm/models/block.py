"""One Transformer block: attention and feed-forward round a residual stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import is_off, layer_period
from jaxlm.models import latent, moe  # noqa: F401  register themselves
from jaxlm.models.attention import ATTENTIONS
from jaxlm.models.cross import CrossAttention
from jaxlm.models.feedforward import FEEDFORWARDS, FeedForward
from jaxlm.models.norms import NoNorm, build_norm
from jaxlm.models.parameter import constant, normal
from jaxlm.models.parametrization import build_parametrization
from jaxlm.parallel.rules import constrain


class LayerKind(NamedTuple):
    """What differs from layer to layer; known while tracing."""

    window: int  # sliding-window length, 0 for none
    rope: str  # one of the tables in Context.rope; another name: none


def layer_kinds(m) -> tuple[LayerKind, ...]:
    """Of one period of layers."""
    local = "local_rope" if m.rope_theta_local else "rope"
    letters = ((m.window_pattern[i % len(m.window_pattern)], m.rope_pattern[i % len(m.rope_pattern)])
               for i in range(layer_period(m)))
    return tuple(LayerKind(m.window if reach == "L" else 0, "none" if turn == "N" else local if reach == "L" else "rope")
                 for reach, turn in letters)


class Context(NamedTuple):
    """What is the same for all layers of one forward pass."""

    rope: Any  # Rope.tables: what each kind of layer rotates by
    segment_ids: Any  # (B, T) int32, or None where attention is causal only
    backend: str  # attention backend
    dropout: float
    cache_index: Any = 0  # where this call's first token stands, when decoding
    context_method: str = "ring"  # how attention sees keys on other devices
    decoding: bool = False  # with a cache
    live: Any = None  # (B, T) bool: not padding; None: all
    causal: bool = True  # a token sees no later one
    bias: Any = None  # (N, T, S), added to scores
    prefix: Any = None  # (B, S) bool: keys that the tokens before them see too
    memory: Any = None  # `jaxlm.models.cross.Memory`
    order: Any = None  # (T,) places of the tokens in the sequence, where they stand in another order than their own


class Inits(NamedTuple):
    """Initialisers by role; `fan_in` is the number of contracted inputs."""

    std: float
    use_fan_in: bool
    zero_output: bool
    num_layers: int
    width: float = 1.0  # of `Parametrization`

    def size(self, fan_in):
        return fan_in**-0.5 if self.use_fan_in else self.std / self.width**0.5

    def hidden(self, fan_in):
        return normal(self.size(fan_in))

    def output(self, fan_in):
        """Into the residual stream: zero, or shrunk by the number of branches (GPT-2)."""
        if self.zero_output:
            return constant(0.0)
        return normal(self.size(fan_in) / (2 * self.num_layers) ** 0.5)


class Block(nnx.Module):
    """dense: with one feed-forward, as the first layers of some mixtures of experts have. cross: with cross-attention after
    attention."""

    def __init__(self, config, rngs, dense: bool = False, cross: bool = False):
        m = config.model
        scaling = build_parametrization(m)
        inits = Inits(m.init_std, m.init_fan_in, m.zero_init_proj, m.num_layers / scaling.depth, scaling.width)
        self.branch = scaling.branch
        self.parallel = m.block == "parallel"
        places = ("pre", "post") if m.norm_place == "both" else (m.norm_place,)
        norm = lambda where: build_norm(config, m.embed_dim, rngs) if where in places else NoNorm()
        self.norm1 = norm("pre")
        self.attention = ATTENTIONS[m.attention](config, rngs, inits)
        self.post_norm1, self.sum_norm1 = norm("post"), norm("sum")
        if cross:
            self.cross_norm, self.cross = norm("pre"), CrossAttention(config, rngs, inits)
        if not self.parallel:
            self.norm2 = norm("pre")
        if dense:
            self.feedforward = FeedForward(config, rngs, inits, m.expert_form, m.dense_mlp_dim or m.mlp_dim)
        else:
            self.feedforward = FEEDFORWARDS[m.feedforward](config, rngs, inits)
        self.post_norm2, self.sum_norm2 = norm("post"), norm("sum")

    def __call__(self, x_BTD, context: Context, kind: LayerKind, first_value=None, is_first=False, cache=None, keys_BT=None):
        """-> (x_BTD, v_BSKH of the first layer, cache, stats of the feed-forward). A serial block is attention, then
        feed-forward; a parallel one adds both at once."""
        cache, known = cache if cache is not None and hasattr(self, "cross") else (cache, None)
        h_BTD = constrain(self.norm1(x_BTD), "batch", "seq", None)
        a_BTD, value, cache = self.attention(h_BTD, context, kind, first_value, is_first, cache)
        x_BTD = self.sum_norm1(x_BTD + drop(residual(self.scaled(self.post_norm1(a_BTD))), context.dropout, fold_in(keys_BT, 0)))
        if hasattr(self, "cross"):
            c_BTD = self.cross(constrain(self.cross_norm(x_BTD), "batch", "seq", None), context, known)
            x_BTD = x_BTD + drop(residual(self.scaled(c_BTD)), context.dropout, fold_in(keys_BT, 2))
            cache = None if cache is None else (cache, known)
        if not self.parallel:
            h_BTD = constrain(self.norm2(x_BTD), "batch", "seq", None)
        f_BTD, stats = self.feedforward(h_BTD, context)
        x_BTD = self.sum_norm2(x_BTD + drop(residual(self.scaled(self.post_norm2(f_BTD))), context.dropout, fold_in(keys_BT, 1)))
        return x_BTD, value, cache, stats

    def scaled(self, x_BTD):
        return x_BTD if self.branch == 1.0 else x_BTD * self.branch


def residual(x_BTD):
    """As the residual stream lies on the mesh."""
    return constrain(x_BTD, "batch", "norm_seq", None)


def fold_in(keys, number):
    """`jax.random.fold_in` for an array of keys; None stays None."""
    if keys is None:
        return None
    fold = lambda key: jax.random.fold_in(key, number)
    for _ in keys.shape:
        fold = jax.vmap(fold)
    return fold(keys)


def drop(x_BTD, rate: float, keys_BT):
    """Dropout; off where there are no keys (evaluation). A key for each token, so that the same numbers are dropped however
    rows and sequence are cut up."""
    if keys_BT is None or is_off(rate):
        return x_BTD
    kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[2:])))(keys_BT)
    return jnp.where(kept, x_BTD / (1 - rate), 0)


def hide(x_BTD, rate: float, keys_BT):
    """Whole tokens set to zero; off as `drop` is. The others stay as they are: a text with fewer words is a text too."""
    if keys_BT is None or rate == 0.0:
        return x_BTD
    kept_BT = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate)))(keys_BT)
    return jnp.where(kept_BT[..., None], x_BTD, 0)
