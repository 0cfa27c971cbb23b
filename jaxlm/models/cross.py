"""Cross-attention: queries of one text, keys and values of another (Vaswani et al., arXiv:1706.03762, 3.2.3)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxlm.kernels.attention import Extras, attend
from jaxlm.models.attention import out_projection, projection, query_scale


class Memory(NamedTuple):
    """An encoded text: what a decoder looks at."""

    x_BSD: Any
    segment_ids_BS: Any = None  # 0 is padding; with packed documents, as those of the queries; None: all is one text


class CrossAttention(nnx.Module):
    def __init__(self, config, rngs, inits):
        m = config.model
        self.scale = query_scale(m)
        self.query = projection(config, rngs, "attention.cross.query", m.num_heads, inits)
        self.key = projection(config, rngs, "attention.cross.key", m.num_kv_heads, inits)
        self.value = projection(config, rngs, "attention.cross.value", m.num_kv_heads, inits)
        self.out = out_projection(config, rngs, "attention.cross.out", inits)

    def keys_values(self, x_BSD):
        """-> (k_BSKH, v_BSKH) of the memory, the same for every token that is decoded."""
        return self.key(x_BSD), self.value(x_BSD)

    def __call__(self, x_BTD, context, cache=None):
        """-> x_BTD. cache: `keys_values`, where they are known."""
        memory = context.memory
        k_BSKH, v_BSKH = self.keys_values(memory.x_BSD) if cache is None else cache
        ids_BT = None
        if memory.segment_ids_BS is not None:
            ids_BT = context.segment_ids if context.segment_ids is not None else jnp.ones(x_BTD.shape[:2], jnp.int32)
        out_BTNH = attend(self.query(x_BTD) * self.scale, k_BSKH, v_BSKH, backend=context.backend, segment_ids_BT=ids_BT,
                          extras=Extras(causal=False, key_segment_ids_BS=memory.segment_ids_BS))
        return self.out(out_BTNH)
