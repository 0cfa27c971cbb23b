"""Loss, perplexity and bits per byte over a validation split."""

import collections
import math

import jax

from jaxlm.objectives.objective import MEANS


def evaluate(eval_step, params, batches, put, num_bytes: int) -> dict:
    """-> {"loss" (nats per target token), "perplexity", "bits_per_byte", "tokens"}, and "accuracy" and those of
    MEANS where the objective tells them.

    batches: iterable of host batches that covers the split; put: host batch -> device batch.
    num_bytes: UTF-8 bytes of the text whose tokens are the targets; 0: they are no text, and have no bits_per_byte.
    """
    sums = [eval_step(params, put(batch)) for batch in batches]  # all dispatched, then read once
    totals = collections.Counter()
    for one in jax.device_get(sums):
        totals.update({name: float(value) for name, value in one.items()})
    loss = totals["nll"] / totals["weight"]
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if num_bytes:
        result["bits_per_byte"] = totals["nll"] / math.log(2) / num_bytes
    if totals["examples"]:
        result |= {"accuracy": totals["correct"] / totals["examples"], "examples": int(totals["examples"])}
    result |= {name: totals[name] / totals["weight"] for name in MEANS if name in totals}
    return {**result, "tokens": int(totals["weight"])}
