"""Text from a model: prefill a key/value cache, then one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(logits_V, key, temperature: float, top_k: int, top_p: float):
    """One token id. temperature 0 is greedy; top_k 0 and top_p 1 are off (nucleus: Holtzman et al., arXiv:1904.09751)."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    logits_V = logits_V / temperature
    if top_k:
        logits_V = jnp.where(logits_V < jax.lax.top_k(logits_V, top_k)[0][-1], -jnp.inf, logits_V)
    if top_p < 1:
        ordered = jnp.sort(logits_V)[::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    return jax.random.categorical(key, logits_V)


class Generator:
    """Two compiled programs, prefill of `seq_len` slots and decode of one token, for any number of texts.

    Args:
        model: `jaxlm.train.state.Model`. vocab_size: of the tokenizer; padding ids of the model are never sampled.
        seq_len: context; a longer text goes on from its last half.
    """

    def __init__(self, model, vocab_size: int, seq_len: int, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0):
        self.seq_len = seq_len

        def pick(module, x_1TD, index, key):
            logits_V = module.logits(x_1TD[:, index][:, None])[0, 0]
            logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < vocab_size, logits_V, -jnp.inf)
            key, now = jax.random.split(key)
            return sample(logits_V, now, temperature, min(top_k, vocab_size), top_p), key

        def prefill(params, tokens_1S, length, key):
            module = nnx.merge(model.graph, params)
            x, cache, _ = module.hidden(tokens_1S, cache=module.init_cache(1, seq_len))
            token, key = pick(module, x, length - 1, key)
            return token, cache, key

        def decode(params, token, cache, index, key):
            module = nnx.merge(model.graph, params)
            x, cache, _ = module.hidden(token.reshape(1, 1), cache=cache, cache_index=index)
            token, key = pick(module, x, 0, key)
            return token, cache, index + 1, key

        self.prefill = jax.jit(prefill)
        self.decode = jax.jit(decode, donate_argnums=2)

    def stream(self, params, prompt: list[int], num_tokens: int, seed: int = 0, stop: int | None = None):
        """Yields token ids after `prompt` (at least one id), until `num_tokens` or the id `stop`."""
        if not len(prompt):
            raise ValueError("the prompt is empty")
        text, key, done = list(prompt), jax.random.key(seed), 0
        while done < num_tokens:
            context = text[-self.seq_len:] if done == 0 else text[-(self.seq_len // 2 + 1):]
            context = context[-(self.seq_len - 1):] or context[-1:]
            padded = np.zeros((1, self.seq_len), np.int32)
            padded[0, : len(context)] = context
            token, cache, key = self.prefill(params, padded, len(context), key)
            index = jnp.int32(len(context))
            for used in range(len(context), self.seq_len + 1):
                text.append(int(token))
                done += 1
                yield text[-1]
                if done == num_tokens or text[-1] == stop:
                    return
                if used < self.seq_len:
                    token, cache, index, key = self.decode(params, token, cache, index, key)
