"""N-gram embeddings: a learned vector for the last n tokens, added to the token's own embedding."""

import jax.numpy as jnp
from flax import nnx

from jaxlm.kernels.embedding import choose_embedding_gradient, look_up
from jaxlm.models.parameter import constant, parameter
from jaxlm.parallel import target

HASH = 0x9E3779B1  # an odd number near 2^32 / golden ratio: multiplicative hashing (Knuth, TAOCP 6.4)


class NgramEmbedding(nnx.Module):
    """One table of `ngram_buckets` vectors for each n = 2 ... `ngram_max`, indexed by the hash of the last n tokens
    (Pagnoni et al., arXiv:2412.09871, 3.2.1; Huang et al., arXiv:2501.16975). Costs a look-up, and no matrix product."""

    def __init__(self, config, vocab_size: int, rngs: nnx.Rngs):
        m = config.model
        self.vocab_size, self.buckets, self.orders = vocab_size, m.ngram_buckets, range(2, m.ngram_max + 1)
        self.gradient, _ = choose_embedding_gradient(config, target.platform())
        self.compute_dtype = jnp.dtype(m.compute_dtype)
        self.embedding = parameter(rngs, (len(self.orders), self.buckets, m.embed_dim), (None, "vocab", "embed"),
                                   constant(0.0), m.param_dtype)

    def __call__(self, history_BS, first, num_tokens: int, segment_ids_BS=None):
        """-> x_BTD for the `num_tokens` tokens from `first` on. Tokens before the text or of another segment count as none."""
        history_BS, at_T = jnp.asarray(history_BS), first + jnp.arange(num_tokens)
        segment_ids_BS = None if segment_ids_BS is None else jnp.asarray(segment_ids_BS)
        hash_BT, table_ids = jnp.zeros((), jnp.uint32), []
        for back in range(self.orders[-1]):
            from_T = jnp.maximum(at_T - back, 0)
            there = (at_T >= back)[None]
            if segment_ids_BS is not None:
                there &= segment_ids_BS[:, from_T] == segment_ids_BS[:, at_T]
            code_BT = jnp.where(there, history_BS[:, from_T] + 1, 0).astype(jnp.uint32)
            # Exact, so free of collisions, while (vocab_size + 1)^n fits in the buckets.
            hash_BT = hash_BT * jnp.uint32(self.vocab_size + 1) + code_BT
            if back:
                mixed = hash_BT if (self.vocab_size + 1) ** (back + 1) <= self.buckets else (hash_BT * jnp.uint32(HASH)) >> 7
                table_ids.append((mixed % self.buckets).astype(jnp.int32))
        tables = self.embedding[...]
        return sum(look_up(tables[i], ids_BT, backend=self.gradient, cotangent_dtype=self.compute_dtype)
                   for i, ids_BT in enumerate(table_ids))
