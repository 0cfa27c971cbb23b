"""Loss, perplexity and bits per byte over a validation split."""

import math

import jax


def evaluate(eval_step, params, batches, put, num_bytes: int) -> dict:
    """-> {"loss" (nats per target token), "perplexity", "bits_per_byte", "tokens"}.

    batches: iterable of host batches that covers the split; put: host batch -> device batch.
    num_bytes: UTF-8 bytes of the text whose tokens are the targets.
    """
    sums = [eval_step(params, put(batch)) for batch in batches]  # all dispatched, then read once
    sums = jax.device_get(sums)
    return scores(sum(float(n) for n, _ in sums), sum(float(w) for _, w in sums), num_bytes)


def scores(nll: float, tokens: float, num_bytes: float) -> dict:
    """What `evaluate` gives out, of the sum of losses over so many tokens."""
    loss = nll / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": nll / math.log(2) / num_bytes,
            "tokens": int(tokens)}
