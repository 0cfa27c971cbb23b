"""An encoder: the Transformer whose tokens see every other, with heads for masked words and for classes (BERT, Devlin et al.,
arXiv:1810.04805)."""

import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.models.dense import Dense
from jaxlm.models.feedforward import FORMS
from jaxlm.models.norms import build_norm
from jaxlm.models.parameter import constant, normal, parameter
from jaxlm.models.transformer import FAMILIES, Transformer


@FAMILIES.register("encoder")
class Encoder(Transformer):
    causal = False

    def __init__(self, config, vocab_size: int, attention_backend: str, rngs):
        super().__init__(config, vocab_size, attention_backend, rngs)
        m, init = config.model, normal(config.model.init_std)
        linear = lambda name, outputs: Dense(config, rngs, name, (m.embed_dim,), (outputs,), ("embed", None), init, m.mlp_bias)
        if m.masked_lm_head:
            self.activation, _ = FORMS[m.expert_form if m.feedforward == "moe" else m.feedforward]
            self.transform, self.transform_norm = linear("transform", m.embed_dim), build_norm(config, m.embed_dim, rngs)
            self.head_bias = parameter(rngs, (vocab_size,), ("vocab",), constant(0.0), m.param_dtype)
        if m.pooler:
            self.pooler = linear("pooler", m.embed_dim)

    def logits(self, x_BTD):
        """-> logits_BTV float32, of the word that stands at each place."""
        if not hasattr(self, "transform"):
            return super().logits(x_BTD)
        h_BTD = self.transform_norm(self.activation(self.transform(x_BTD)))
        return super().logits(h_BTD) + self.head_bias[...].astype(jnp.float32)

    def pooled(self, h):
        """(..., D) of a text's first token -> (..., D)."""
        return jnp.tanh(self.pooler(h))

    def classes(self, h):
        return super().classes(self.pooled(h) if hasattr(self, "pooler") else h)

    def init_cache(self, batch: int, length: int):
        raise UserError("model.family='encoder': writes no text token by token; use model.family=decoder")
