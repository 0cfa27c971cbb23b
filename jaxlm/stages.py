"""Stages of a run: up to given steps it trains with another batch or shorter rows than its own (`stages` of configs/default.py).

Rows are read once, in the run's one order, whatever the stages: a stage with rows of T' tokens reads each row of T in T / T'
pieces, one a step, so that a batch is the next piece of so many rows. What of them is not read when the stage ends is left out.
No JAX in this file.
"""

from typing import NamedTuple

from jaxlm.config import View, steps_of, tokens_in
from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean

KEYS = ("batch_size", "seq_len")


class Stage(NamedTuple):
    first: int  # steps completed before it
    end: int  # and after it
    batch_size: int
    seq_len: int
    first_row: int = 0  # of the run, in rows of the run's own seq_len
    pieces: int = 1  # in which each of those is read

    def place(self, step: int) -> tuple[int, int]:
        """Of the batch that takes the state from `step` to `step + 1` completed steps: its first row, and which piece of each."""
        turn, piece = divmod(step - self.first, self.pieces)
        return self.first_row + turn * self.batch_size, piece

    @property
    def end_row(self) -> int:
        return self.first_row + -(-(self.end - self.first) // self.pieces) * self.batch_size

    @property
    def tokens(self) -> int:
        """Of a step, where no row is padded."""
        return self.batch_size * self.seq_len

    def view(self, config):
        """`config` with the stage's batch and rows."""
        return View(config, {"batch_size": self.batch_size, "seq_len": self.seq_len})


def stages_of(config) -> tuple[Stage, ...]:
    """In order; the last has the run's own batch and rows, and is the only one where config.stages is empty.

    Raises UserError: a stage that is not (until, {key: value}), that ends before it begins or not before the run does, or that
    does not fit the run's own batch and rows."""
    B, T, stages, problems = config.batch_size, config.seq_len, [], []
    first = first_row = tokens = 0
    for until, keys in [as_stage(entry) for entry in config.stages]:
        name = f"stages: until {until}"
        if unknown := [key for key in keys if key not in KEYS]:
            raise UserError(*(f"{name}: unknown key {key!r}; {did_you_mean(key, KEYS)}" for key in unknown))
        shape = {"batch_size": B, "seq_len": T} | keys
        if not all(type(n) is int and n > 0 for n in shape.values()):
            raise UserError(f"{name}: {keys}: must be whole numbers of at least 1")
        of_step = shape["batch_size"] * shape["seq_len"]
        wanted = tokens_in(until)
        end = steps_of(until, config, "stages") if wanted is None else first + round((wanted - tokens) / of_step)
        if not first < end < config.steps:
            problems.append(f"{name} is step {end}: must come after step {first}, where the stage begins, and before the run's "
                            f"last, {config.steps}")
        if shape == {"batch_size": B, "seq_len": T}:
            problems.append(f"{name}: has the run's own batch_size={B} and seq_len={T}; remove it")
        if T % shape["seq_len"]:
            problems.append(f"{name}: seq_len={shape['seq_len']} does not divide the run's seq_len={T}; use "
                            f"{max(n for n in range(1, shape['seq_len']) if T % n == 0)}")
        if of_step > B * T:
            problems.append(f"{name}: {of_step:,} tokens a step are more than the run's own {B * T:,}; take fewer, or raise "
                            "batch_size of the run, which is its last stage")
        if shape["batch_size"] % config.grad_accum_steps:
            problems.append(f"{name}: batch_size={shape['batch_size']} is not divisible by grad_accum_steps="
                            f"{config.grad_accum_steps}")
        if problems:
            break
        stages.append(Stage(first, end, **shape, first_row=first_row, pieces=T // shape["seq_len"]))
        first, first_row, tokens = end, stages[-1].end_row, tokens + (end - first) * of_step
    if any(stage.pieces > 1 for stage in stages) and config.data.source != "synthetic" and (
            config.data.packing != "concat" or config.data.form != "text"):
        problems.append(f"stages: seq_len: rows of data.packing={config.data.packing}, data.form={config.data.form} are not cut "
                        "up; use data.packing=concat, data.form=text, or stages of batch_size alone")
    if problems:
        raise UserError(*problems)
    return (*stages, Stage(first, config.steps, B, T, first_row))


def as_stage(entry) -> tuple[object, dict]:
    try:
        until, keys = entry
        assert isinstance(until, int | str)
        return until, dict(keys)
    except (TypeError, ValueError, AssertionError):
        raise UserError(f"stages: {entry!r} is not a stage; give (until, what differs), such as ('10%', {{'batch_size': 4}})"
                        ) from None


def stage_at(stages, step: int) -> Stage:
    """Of the step that takes the state from `step` to `step + 1` completed steps. Batches made ahead go on after the run, in its
    last."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def tokens_before(stages, step: int) -> int:
    """Of the first `step` steps, where no row is padded."""
    return sum(max(0, min(step, stage.end) - stage.first) * stage.tokens for stage in stages)


def describe_stages(stages) -> tuple[str, ...]:
    """Lines for the start of the log."""
    if len(stages) == 1:
        return ()
    shapes = (f"steps {s.first + 1:,} to {s.end:,} with {s.batch_size} x {s.seq_len} tokens" for s in stages)
    return (f"stages: {', '.join(shapes)}; {tokens_before(stages, stages[-1].end):,} tokens in all",)
