"""An encoder and a decoder of the same blocks: the decoder's have cross-attention to what the encoder makes of its text (T5,
Raffel et al., arXiv:1910.10683)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.errors import UserError
from jaxlm.models.block import Block, Context, drop, fold_in, hide, residual
from jaxlm.models.cross import Memory
from jaxlm.models.norms import build_norm
from jaxlm.models.positions import build_position
from jaxlm.models.transformer import FAMILIES, Transformer, stack_blocks
from jaxlm.parallel.rules import constrain


@FAMILIES.register("encoder_decoder")
class EncoderDecoder(Transformer):
    """The Transformer itself is the decoder. Both texts share one embedding."""

    cross = True

    def __init__(self, config, vocab_size: int, attention_backend: str, rngs):
        super().__init__(config, vocab_size, attention_backend, rngs)
        self.encoder_position = build_position(config, rngs)
        self.encoder_layers = stack_blocks(config.model.encoder_layers or self.num_layers, lambda r: Block(config, r), rngs)
        self.encoder_norm = build_norm(config, config.model.embed_dim, rngs)

    def encode(self, tokens_BS, positions_BS=None, segment_ids_BS=None, keys_B=None) -> Memory:
        """The `memory` of `hidden`. segment_ids_BS: 0 is padding; with packed documents, as those of the decoder's text."""
        if positions_BS is None:
            positions_BS = np.arange(tokens_BS.shape[1])[None]
        keys_BS = fold_in(self.token_keys(keys_B, tokens_BS.shape[1]), self.num_layers + 1)  # not the decoder's
        x_BSD = self.embed(tokens_BS).astype(self.compute_dtype) * self.embed_scale
        x_BSD = self.encoder_position.embed(hide(x_BSD, self.token_dropout, fold_in(keys_BS, self.num_layers + 2)), positions_BS)
        live_BS = None if segment_ids_BS is None else jnp.asarray(segment_ids_BS) > 0
        if live_BS is not None and not self.isolate:
            segment_ids_BS = live_BS.astype(jnp.int32)
        S = tokens_BS.shape[1]
        context = Context(rope=self.encoder_position.tables(positions_BS), segment_ids=segment_ids_BS, backend=self.backend,
                          dropout=self.dropout, live=live_BS, causal=False, bias=self.encoder_position.bias(S, S, 0, False))
        graph, stacked = nnx.split(self.encoder_layers)
        x_BSD = residual(drop(x_BSD, self.dropout, keys_BS))
        _, x_BSD, _, _ = self._run_some(graph, stacked, 0, x_BSD, None, context, keys_BS, None)
        return Memory(constrain(self.encoder_norm(x_BSD), "batch", "seq", None), segment_ids_BS)

    def init_cache(self, batch: int, length: int, memory: Memory | None = None):
        """As of a decoder, with the keys and values of the memory beside those of each layer."""
        if memory is None:
            raise UserError("model.family='encoder_decoder': writes about a text that must be given; use model.family=decoder")
        graph, stacked = nnx.split(self.layers)
        known = jax.vmap(lambda layer: nnx.merge(graph, layer).cross.keys_values(memory.x_BSD))(stacked)
        tokens, cache = super().init_cache(batch, length)
        return tokens, {"layers": (cache["layers"], known)}
