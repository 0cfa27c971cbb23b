"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1): keys and values of all heads are made of one short vector a
token, the latent, and a part of the key that is rotated and that all heads share. Only these two are kept in a cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import rotated_size
from jaxlm.kernels.attention import attend
from jaxlm.kernels.matmul import dense
from jaxlm.kernels.quantized import form_of
from jaxlm.models.attention import ATTENTIONS, OutProjection, query_scale
from jaxlm.models.norms import build_norm
from jaxlm.models.parameter import constant, parameter
from jaxlm.models.positions import rotate
from jaxlm.models.remat import named


@ATTENTIONS.register("latent")
class LatentAttention(nnx.Module):
    """The first `rotated_size` of a head's head_dim numbers are rotated. Z is the latent's size (kv_rank), P the rotated part's,
    U a value's."""

    def __init__(self, config, rngs, inits):
        m = config.model
        N, H, D, P, self.rank = m.num_heads, m.head_dim, m.embed_dim, rotated_size(m), m.kv_rank
        U = m.value_head_dim or H
        self.softcap, self.scale = m.attention_softcap, query_scale(m)
        form = lambda name: form_of(config, f"attention.{name}")
        if m.query_rank:
            self.query_down = Down(m, rngs, m.query_rank, inits.hidden(D), form("query_down"))
            self.query_norm = build_norm(config, m.query_rank, rngs)
        inputs = m.query_rank or D
        self.query = Up(m, rngs, inputs, H, inits.hidden(inputs), form("query"))
        self.latent = Down(m, rngs, self.rank + P, inits.hidden(D), form("latent"))
        self.latent_norm = build_norm(config, self.rank, rngs)
        self.key = Up(m, rngs, self.rank, H - P, inits.hidden(self.rank), form("key"))
        self.value = Up(m, rngs, self.rank, U, inits.hidden(self.rank), form("value"))
        self.out = OutProjection(m, rngs, inits.output(N * U), form("out"), size=U)

    @staticmethod
    def cache_shapes(m):
        """Of a token: the rotated part of the key, the latent."""
        return (rotated_size(m),), (m.kv_rank,)

    def __call__(self, x_BTD, context, kind, first_value=None, is_first=False, cache=None):
        """As `jaxlm.models.attention.Attention`; without value residuals. cache: (key_BSP, latent_BSZ)."""
        rope = context.rope.get(kind.rope)
        q_BTD = self.query_norm(self.query_down(x_BTD)) if hasattr(self, "query_norm") else x_BTD
        q_BTNH = named("query", rotate(self.query(q_BTD), rope) * self.scale)
        latent_BSZ, key_BSP = jnp.split(self.latent(x_BTD), [self.rank], axis=-1)
        latent_BSZ, key_BSP = self.latent_norm(latent_BSZ), rotate(key_BSP[:, :, None], rope)[:, :, 0]
        if cache is not None:
            at = (0, context.cache_index, 0)
            key_BSP = jax.lax.dynamic_update_slice(cache[0], key_BSP.astype(cache[0].dtype), at)
            latent_BSZ = jax.lax.dynamic_update_slice(cache[1], latent_BSZ.astype(cache[1].dtype), at)
            cache = (key_BSP, latent_BSZ)
        by_latent = cache is not None and x_BTD.shape[1] == 1
        out_BTNU = (self.over_latents if by_latent else self.over_heads)(
            q_BTNH, key_BSP, latent_BSZ, window=kind.window, softcap=self.softcap, backend=context.backend,
            segment_ids_BT=context.segment_ids, first_query=context.cache_index, context_method=context.context_method)
        return named("attention_out", self.out(out_BTNU)), None, cache

    def over_heads(self, q_BTNH, key_BSP, latent_BSZ, **options):
        """Keys and values of every head. Values are filled up to the length of keys, which every kernel takes."""
        key_BSNP = jnp.broadcast_to(key_BSP[:, :, None], (*key_BSP.shape[:2], q_BTNH.shape[2], key_BSP.shape[-1]))
        k_BSNH = named("key", jnp.concatenate([key_BSNP, self.key(latent_BSZ)], axis=-1))
        v_BSNU = named("value", self.value(latent_BSZ))
        U = v_BSNU.shape[-1]
        v_BSNH = jnp.pad(v_BSNU, ((0, 0), (0, 0), (0, 0), (0, k_BSNH.shape[-1] - U)))
        return attend(q_BTNH, k_BSNH, v_BSNH, **options)[..., :U]

    def over_latents(self, q_BTNH, key_BSP, latent_BSZ, **options):
        """The same for one query, with the products that make keys and values moved over to the query and to the result: one key
        head, which is the value too, and nothing is made for each token of the cache."""
        P = key_BSP.shape[-1]
        q_BTNZ = jnp.einsum("BTNH,ZNH->BTNZ", q_BTNH[..., P:], self.key.kernel[...].astype(q_BTNH.dtype))
        k_BS1X = jnp.concatenate([key_BSP, latent_BSZ], axis=-1)[:, :, None]
        rescale = (k_BS1X.shape[-1] / q_BTNH.shape[-1]) ** 0.5  # `attend` divides by the root of this key's length
        q_BTNX = jnp.concatenate([q_BTNH[..., :P], q_BTNZ], axis=-1) * rescale
        out_BTNZ = attend(q_BTNX, k_BS1X, k_BS1X, **options)[..., P:]
        return jnp.einsum("BTNZ,ZNU->BTNU", out_BTNZ, self.value.kernel[...].astype(out_BTNZ.dtype))


class Down(nnx.Module):
    """x_BTD -> (B, T, rank)."""

    def __init__(self, m, rngs, rank, init, form: str):
        self.form = form
        self.kernel = parameter(rngs, (m.embed_dim, rank), ("embed", None), init, m.param_dtype, num_inputs=1)
        if m.attention_bias:
            self.bias = parameter(rngs, (rank,), (None,), constant(0.0), m.param_dtype)

    def __call__(self, x_BTD):
        y = dense(x_BTD, self.kernel[...], form=self.form)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class Up(nnx.Module):
    """(B, T, inputs) -> (B, T, heads, size)."""

    def __init__(self, m, rngs, inputs, size, init, form: str):
        self.form = form
        self.kernel = parameter(rngs, (inputs, m.num_heads, size), ("embed", "heads", None), init, m.param_dtype, num_inputs=1)

    def __call__(self, x):
        return dense(x, self.kernel[...], form=self.form)
