"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1): keys and values of all heads are made of one short vector a
token, the latent, and a part of the key that is rotated and that all heads share. Only these two are kept in a cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import rotated_size
from jaxlm.kernels.attention import attend
from jaxlm.models.attention import ATTENTIONS, out_projection, query_scale
from jaxlm.models.dense import Dense
from jaxlm.models.norms import build_norm
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
        down = lambda name, rank: Dense(config, rngs, f"attention.{name}", (D,), (rank,), ("embed", None), inits.hidden(D),
                                        m.attention_bias)
        up = lambda name, inputs, size: Dense(config, rngs, f"attention.{name}", (inputs,), (N, size), ("embed", "heads", None),
                                              inits.hidden(inputs))

        def norm(size):
            norm = build_norm(config, size, rngs)
            norm.eps = m.latent_norm_eps or m.norm_eps
            return norm

        if m.query_rank:
            self.query_down = down("query_down", m.query_rank)
            self.query_norm = norm(m.query_rank)
        self.query = up("query", m.query_rank or D, H)
        self.latent = down("latent", self.rank + P)
        self.latent_norm = norm(self.rank)
        self.key = up("key", self.rank, H - P)
        self.value = up("value", self.rank, U)
        self.out = out_projection(config, rngs, "attention.out", inits, U)

    @staticmethod
    def cache_shapes(m):
        """Of a text, None being its length: the rotated part of the key, the latent."""
        return (None, rotated_size(m)), (None, m.kv_rank)

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
        q_BTNZ = jnp.einsum("BTNH,ZNH->BTNZ", q_BTNH[..., P:], self.key.weights().astype(q_BTNH.dtype))
        k_BS1X = jnp.concatenate([key_BSP, latent_BSZ], axis=-1)[:, :, None]
        rescale = (k_BS1X.shape[-1] / q_BTNH.shape[-1]) ** 0.5  # `attend` divides by the root of this key's length
        q_BTNX = jnp.concatenate([q_BTNH[..., :P], q_BTNZ], axis=-1) * rescale
        out_BTNZ = attend(q_BTNX, k_BS1X, k_BS1X, **options)[..., P:]
        return jnp.einsum("BTNZ,ZNU->BTNU", out_BTNZ, self.value.weights().astype(out_BTNZ.dtype))
