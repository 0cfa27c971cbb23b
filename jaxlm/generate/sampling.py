"""From the logits of the next token to a token: temperature, top-k, top-p, min-p, repetition penalty; options of each text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError


class Sampling(NamedTuple):
    """How one text is sampled, in the order in which it is done; as arrays with an axis of rows where there are several."""

    repetition_penalty: Any = 1.0  # logits of tokens the text has: divided by it if positive, else times it (CTRL, 1909.05858)
    temperature: Any = 1.0  # 0: the likeliest token
    top_k: Any = 0  # among the k likeliest; 0: all
    top_p: Any = 1.0  # among the likeliest that together have this probability (Holtzman et al., arXiv:1904.09751)
    min_p: Any = 0.0  # among those with this share of the likeliest one's probability (Nguyen et al., arXiv:2407.01082)

    def check(self) -> "Sampling":
        """Raises UserError: an option out of its range."""
        problems = []
        for name, ok, need in (("temperature", self.temperature >= 0, "0 (greedy) or more"),
                               ("top_k", self.top_k >= 0, "0 (all) or more"), ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                               ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
                               ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off")):
            if not ok:
                problems.append(f"{name}={getattr(self, name)}: must be {need}")
        if problems:
            raise UserError(*problems)
        return self

    @property
    def is_plain(self) -> bool:
        """No tokens are ruled out or penalised: nothing has to be sorted or remembered."""
        return self[0] == 1 and self[2:] == Sampling()[2:]


def pick(logits_V, options: Sampling, seen_V, key):
    """-> (token, its log-probability under the model). seen_V: bool, tokens that the text has; None: the options are plain."""
    log_probabilities_V = jax.nn.log_softmax(logits_V)
    if seen_V is not None:
        penalised = jnp.where(logits_V > 0, logits_V / options.repetition_penalty, logits_V * options.repetition_penalty)
        logits_V = jnp.where(seen_V, penalised, logits_V)
    greedy = likeliest(logits_V)
    logits_V = logits_V / jnp.maximum(options.temperature, 1e-6)
    if seen_V is not None:
        logits_V = rule_out(logits_V, options)
    token = jnp.where(options.temperature == 0, greedy, draw(logits_V, key)).astype(jnp.int32)
    return token, log_probabilities_V[token]


def likeliest(logits_V):
    """The first of the largest. `argmax`, for which XLA on a CPU has no vector code, takes ten times as long."""
    return jnp.min(jnp.where(logits_V < jnp.max(logits_V), len(logits_V), jnp.arange(len(logits_V))))


def draw(logits_V, key, block: int = 256):
    """A token with the probability that its logit gives it: first its block of the vocabulary, then itself, which takes a
    random number for each block and each of one block's tokens. For all V of them they took longer than the head does."""
    blocks_GN = jnp.pad(logits_V, (0, -len(logits_V) % block), constant_values=-jnp.inf).reshape(-1, block)
    key_of_block, key_in_block = jax.random.split(key)
    at = jax.random.categorical(key_of_block, jax.nn.logsumexp(blocks_GN, axis=1))
    return at * block + jax.random.categorical(key_in_block, blocks_GN[at])


def rule_out(logits_V, options: Sampling):
    """Logits, with -inf for the tokens that top-k, top-p and min-p leave out, each of those that the one before left. Equals of
    the last one kept are kept too.

    No sorting, which takes longer than the model does: each rule keeps the logits from some value on, which is found by halving.
    """
    places_V = in_order(logits_V)
    k = jnp.where(options.top_k == 0, len(logits_V), options.top_k)
    least = first_place(lambda place: jnp.sum(places_V > place) < k)
    logits_V = jnp.where(places_V >= least, logits_V, -jnp.inf)
    probabilities_V = jax.nn.softmax(logits_V)
    above = lambda place: jnp.sum(jnp.where(places_V > place, probabilities_V, 0))
    least = first_place(lambda place: (above(place) < options.top_p) | (options.top_p >= 1))
    kept_V = (places_V >= least) & (probabilities_V >= options.min_p * jnp.max(probabilities_V))
    return jnp.where(kept_V, logits_V, -jnp.inf)


def in_order(x):
    """float32 -> int32 that compare alike."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def first_place(holds):
    """The least int32 for which `holds`, which does for all above it."""
    low, high = jnp.int32(-(2**31)), jnp.int32(2**31 - 1)

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        return jax.lax.cond(holds(middle), lambda: (low, middle), lambda: (middle + 1, high))

    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]
