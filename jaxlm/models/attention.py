"""Attention: queries, keys and values from x, then one of the kernels of `jaxlm.kernels.attention`."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.kernels.attention import Extras, attend
from jaxlm.kernels.matmul import dense_together, pays_together
from jaxlm.models.dense import Dense
from jaxlm.models.norms import build_norm
from jaxlm.models.parameter import constant, parameter
from jaxlm.models.parametrization import build_parametrization
from jaxlm.models.positions import rotate
from jaxlm.models.remat import named
from jaxlm.registry import Registry

ATTENTIONS = Registry("attention", key="model.attention")


def query_scale(m) -> float:
    """What multiplies queries, beside the 1/sqrt(head_dim) of `attend`."""
    scale = m.attention_score_factor * ((m.head_dim / m.attention_scale_dim) ** 0.5 if m.attention_scale_dim else 1.0)
    return scale * build_parametrization(m).queries


@ATTENTIONS.register("multihead")
class Attention(nnx.Module):
    """Multi-head attention; grouped-query with fewer key/value heads, multi-query with one (arXiv:2305.13245)."""

    def __init__(self, config, rngs, inits):
        m = config.model
        N, K, H = m.num_heads, m.num_kv_heads, m.head_dim
        self.softcap, self.fused = m.attention_softcap, config.kernels.fused_projections
        self.query_scale = query_scale(m)
        self.query = projection(config, rngs, "attention.query", N, inits)
        self.key = projection(config, rngs, "attention.key", K, inits)
        self.value = projection(config, rngs, "attention.value", K, inits)
        self.out = out_projection(config, rngs, "attention.out", inits)
        if m.attention_sinks:
            self.sink_bias = parameter(rngs, (N,), ("heads",), constant(0.0), m.param_dtype)
        if m.qk_norm:
            self.norm_heads = m.qk_norm_over == "head"
            sizes = (H, H) if self.norm_heads else (N * H, K * H)
            self.query_norm, self.key_norm = (build_norm(config, size, rngs) for size in sizes)
        if m.value_residual:
            self.mix = parameter(rngs, (), (), constant(0.5), m.param_dtype)

    @staticmethod
    def cache_shapes(m):
        """Of what a cache holds of a text, None being its length, last but one: keys and values KSH, heads first as the products
        of one token want them."""
        return ((m.num_kv_heads, None, m.head_dim),) * 2

    def __call__(self, x_BTD, context, kind, first_value=None, is_first=False, cache=None):
        """-> (x_BTD, v_BSKH of the first layer, cache with this step's keys and values written).

        context: what is the same for all layers (rope tables, positions, segment_ids, backend).
        kind: what is this layer's own (`block.LayerKind`).
        first_value: v_BSKH of the first layer, for value residuals; None in the first layer itself. In a pipeline, where
        one program is every layer, is_first (traced) says so instead.
        cache: (k_BKSH, v_BKSH) of decoding, written from `context.cache_index` on.
        """
        q_BTNH, k_BSKH, v_BSKH = self.project(x_BTD)
        if hasattr(self, "query_norm"):
            q_BTNH, k_BSKH = self.normalise(self.query_norm, q_BTNH), self.normalise(self.key_norm, k_BSKH)
        rope = context.rope.get(kind.rope)
        q_BTNH, k_BSKH = named("query", rotate(q_BTNH, rope)), named("key", rotate(k_BSKH, rope))
        if self.query_scale != 1.0:
            q_BTNH = q_BTNH * self.query_scale
        if first_value is None:
            first_value = v_BSKH
        elif hasattr(self, "mix"):
            first_value = jnp.where(is_first, v_BSKH, first_value) if is_first is not False else first_value
            mix = self.mix[...].astype(v_BSKH.dtype)
            v_BSKH = (1 - mix) * v_BSKH + mix * first_value
        v_BSKH = named("value", v_BSKH)
        if cache is not None:
            cache = write(cache[0], k_BSKH, context.cache_index), write(cache[1], v_BSKH, context.cache_index)
            k_BSKH, v_BSKH = (a.transpose(0, 2, 1, 3) for a in cache)
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, window=kind.window, softcap=self.softcap, backend=context.backend,
                          segment_ids_BT=context.segment_ids, first_query=context.cache_index,
                          context_method=context.context_method, extras=self.extras(context))
        return named("attention_out", self.out(out_BTNH)), first_value, cache

    def extras(self, context):
        sinks_N = self.sink_bias[...].astype(jnp.float32) if hasattr(self, "sink_bias") else None
        return Extras(sinks_N, context.causal, context.bias, prefix_BS=context.prefix)

    def normalise(self, norm, x_BTNH):
        return norm(x_BTNH) if self.norm_heads else norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)

    def project(self, x_BTD):
        """-> (q_BTNH, k_BSKH, v_BSKH)."""
        layers = self.query, self.key, self.value
        if any(layer.form != "none" for layer in layers) or not pays_together(self.fused):
            return [layer(x_BTD) for layer in layers]
        # By key head, (D, K, heads that share it, H): where a mesh cuts up heads, a group and its key and value are together.
        D, K, H = self.key.kernel.shape
        heads = dense_together(x_BTD, [layer.kernel[...].reshape(D, K, -1, H) for layer in layers])
        return [layer.add(x_BTD, y.reshape(*x_BTD.shape[:2], -1, H)) for layer, y in zip(layers, heads, strict=True)]


def write(cache_BKSH, new_BTKH, index):
    """-> the cache with T tokens from `index` on."""
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(cache_BKSH.dtype)
    if new_BKTH.shape[2] > 1:
        return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, index, 0))
    # Head by head: XLA on a CPU makes a slice that is written once more where it is read, and copies the cache for that.
    return cache_BKSH.at[:, jnp.arange(cache_BKSH.shape[1]), index].set(new_BKTH[:, :, 0])


def projection(config, rngs, module: str, heads: int, inits) -> Dense:
    """x_BTD -> heads BTNH."""
    m = config.model
    return Dense(config, rngs, module, (m.embed_dim,), (heads, m.head_dim), ("embed", "heads", None), inits.hidden(m.embed_dim),
                 m.attention_bias)


def out_projection(config, rngs, module: str, inits, size: int = 0) -> Dense:
    """Heads BTNH -> x_BTD. size: of a head, if it is not head_dim."""
    m, size = config.model, size or config.model.head_dim
    return Dense(config, rngs, module, (m.num_heads, size), (m.embed_dim,), ("heads", None, "embed"),
                 inits.output(m.num_heads * size), m.attention_bias and m.attention_out_bias)
