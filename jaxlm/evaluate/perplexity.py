"""Loss, perplexity and bits per byte over a validation split."""

import collections
import math

import jax

from jaxlm.objectives.objective import MEANS


def evaluate(eval_step, params, batches, put, num_bytes: float) -> dict:
    """-> {"loss" (nats per target token), "perplexity", "bits_per_byte", "tokens"}, and those of MEANS where the objective tells
    them. Where it tells what was right, "loss" is of a whole example, and there is "accuracy" in place of "perplexity".

    batches: iterable of host batches that covers the split; put: host batch -> device batch.
    num_bytes: UTF-8 bytes of the text whose tokens are the targets; 0: they are no text, and have no bits_per_byte.
    """
    return told(sums_over(eval_step, params, batches, put), num_bytes)


def evaluate_split(eval_step, params, split, feed, limit: int = 0) -> dict[str, dict]:
    """{"all": as of `evaluate`}, and with it {name: the same} for each source of a mixture. split: `loader.HeldOut`. limit:
    batches, 0 for all; of a mixture's sources each its part of them."""
    totals, num_bytes, out = collections.Counter(), 0, {}
    for name, part in split.parts.items():
        count = -(-limit * len(part) // len(split)) if limit else 0
        sums = sums_over(eval_step, params, part.evaluation_batches(count, feed.rows), feed.put)
        part_bytes = part.num_bytes * (min(1.0, count * part.batch_size / len(part)) if count else 1.0)
        out[name] = told(sums, part_bytes)
        totals.update(sums)
        num_bytes += part_bytes
    return {"all": told(totals, num_bytes), **(out if len(out) > 1 else {})}


def sums_over(eval_step, params, batches, put) -> collections.Counter:
    sums, totals = [eval_step(params, put(batch)) for batch in batches], collections.Counter()  # all dispatched, then read once
    for one in jax.device_get(sums):
        totals.update({name: float(value) for name, value in one.items()})
    return totals


def told(totals, num_bytes: float) -> dict:
    loss = totals["nll"] / totals["weight"]
    result = {"loss": loss}
    if "examples" not in totals:
        result["perplexity"] = math.exp(min(loss, 700.0))
    if num_bytes:
        result["bits_per_byte"] = totals["nll"] / math.log(2) / num_bytes
    if totals["examples"]:
        result |= {"accuracy": totals["correct"] / totals["examples"], "examples": int(totals["examples"])}
    result |= {name: totals[name] / totals["weight"] for name in MEANS if name in totals}
    return {**result, "tokens": int(totals["weight"])}
