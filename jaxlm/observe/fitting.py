"""Over- or under-fitting: what the curves of training and validation loss say of a run, in plain words and with the evidence.

Differences count only above the noise, which is told from the validation losses themselves: how far neighbours lie from a
smooth curve. Where the gap to the training loss grew beyond all noise, a third of that is enough to call a rise a rise. All
losses are means over the same validation text, so what moves them is the model alone.
"""

import bisect
import json
import math
import pathlib
import statistics
from typing import NamedTuple

LEAST = 4  # evaluations without which nothing is said
SIGMAS = 3.0  # a difference of fewer of its own standard deviations is none,
SHARE = 0.005  # nor is one of less than this share of the loss
CLOSE = 0.03  # training and validation loss that differ by less than this share of it are close together


class Verdict(NamedTuple):
    kind: str  # over-fitting, worsening, still learning, under-fitting, fitted, unknown
    text: str  # one line: what, evidence, remedy
    since: int | None = None  # the step from which on validation loss rose


def judge(train, valid) -> Verdict:
    """train, valid: (step, loss) of a run's training lines and evaluations, by step."""
    train, valid = (sorted((s, y) for s, y in dict(points).items() if math.isfinite(y)) for points in (train, valid))
    if len(valid) < LEAST:
        return Verdict("unknown", f"too few evaluations to tell over- from under-fitting: {len(valid)}; give at least {LEAST} "
                                  "(eval.every_steps)")
    losses = [loss for _, loss in valid]
    best, (end, last) = losses.index(min(losses)), valid[-1]
    since, lowest = valid[best]
    least = max(SIGMAS * math.sqrt(2) * noise(valid), SHARE * abs(lowest))
    now, then = train_loss(train, valid, len(valid) - 1), train_loss(train, valid, best)
    chance = noise(valid) * math.sqrt(2 * math.log(len(valid)))  # by which the lowest of so many lies below the curve anyway
    grew = 0.0 if now is None else (last - now) - (lowest - then)  # the gap, since then
    if last - lowest > (least if grew < least + chance else least / SIGMAS) + chance:
        rose = f"validation loss was lowest there, {lowest:.4f}, and ended at {last:.4f}"
        if now is not None and now > then + least:
            return Verdict("worsening", f"worse since step {since:,}: {rose}, and training loss rose too, from {then:.4f} to "
                           f"{now:.4f}: this is no over-fitting; lower optimizer.learning_rate", since)
        fell = "" if now is None else f", while training loss went from {then:.4f} to {now:.4f}"
        return Verdict("over-fitting", f"over-fitting since step {since:,}: {rose}{fell}; stop there or keep its checkpoint "
                       "(checkpoint.keep_best), or use more data, model.dropout, optimizer.weight_decay, a smaller model", since)
    quarter = max(i for i, (step, _) in enumerate(valid) if i == 0 or step <= valid[0][0] + 0.75 * (end - valid[0][0]))
    quarter = min(quarter, len(valid) - 2)
    if losses[quarter] - last > least:
        return Verdict("still learning", f"still learning: validation loss fell from {losses[quarter]:.4f} to {last:.4f} "
                       f"since step {valid[quarter][0]:,}; train longer")
    rest = f"validation loss came to rest at {last:.4f} (no fall above {least:.4f} since step {valid[quarter][0]:,})"
    if now is not None and last - now < CLOSE * abs(last):
        return Verdict("under-fitting", f"under-fitting, or as good as this data allows: {rest}, and training loss, {now:.4f}, "
                       "is hardly lower; a larger model, a higher learning rate or less regularisation tells which")
    gap = "" if now is None else f", training loss is {last - now:.4f} lower"
    return Verdict("fitted", f"fitted: {rest}{gap}, and it did not rise above its noise; more data, or a larger model with more "
                   "regularisation, may get lower")


def noise(valid) -> float:
    """Standard deviation of a validation loss about the curve: median distance of four neighbours from any parabola, as normal
    noise has it."""
    off = []
    for four in zip(valid, valid[1:], valid[2:], valid[3:], strict=False):
        weights = [1 / math.prod(x - other for other, _ in four if other != x) for x, _ in four]
        off.append(abs(sum(w * y for w, (_, y) in zip(weights, four, strict=True))) / math.hypot(*weights))
    return statistics.median(off) / 0.6745


def train_loss(train, valid, i: int) -> float | None:
    """Mean of the training losses of the second half of the steps before evaluation i since the one before; None: none there."""
    end, before = valid[i][0], valid[i - 1][0] if i else 0
    steps = [step for step, _ in train]
    first, last = bisect.bisect_right(steps, (before + end) // 2), bisect.bisect_right(steps, end)
    return statistics.fmean(loss for _, loss in train[first:last]) if first < last else None


def judge_run(workdir: str) -> Verdict:
    """From its metrics.jsonl."""
    train, valid = [], []
    file = pathlib.Path(workdir, "metrics.jsonl")
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the run was killed in the middle of a line
            continue
        points = train if record["split"] == "train" else valid if record["split"] == "valid/all" else None
        if points is not None and record["loss"] is not None:
            points.append((record["step"], record["loss"]))
    return judge(train, valid)
