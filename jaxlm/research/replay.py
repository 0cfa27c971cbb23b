"""A step of a run once more: the same bits, with a look at what went in and what it did, to explain a spike."""

import contextlib
import json
import math
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.data.feed import put_everywhere
from jaxlm.data.inspect import inspect
from jaxlm.data.loader import build_data
from jaxlm.errors import UserError
from jaxlm.kernels.cross_entropy import token_losses
from jaxlm.objectives.classification import POOLINGS, class_logits
from jaxlm.objectives.next_token import target_nlls
from jaxlm.observe.internals import build_internals, internals_line
from jaxlm.observe.report import read_json, read_lines
from jaxlm.parallel.compile import jit
from jaxlm.parallel.rules import replicated
from jaxlm.stages import stage_at
from jaxlm.train.frozen import check_frozen, read_frozen
from jaxlm.train.pretrained import pretrained_params
from jaxlm.train.restore import config_of_run
from jaxlm.train.step import batches_of, build_programs, keys_of_rows

COMPARED = ("loss", "grad_norm")
WORST = 50  # tokens that are listed
BEFORE = 20  # lines of metrics.jsonl whose median says what was usual before the step


def replay(workdir: str, step: int, overrides=(), from_start: bool = False) -> dict:
    """-> {"step", "from_checkpoint", "verdict", "difference" (None: the same, or nothing to compare with), "compared" (steps),
    "metrics" (of the step), "usual" (their medians before it), "rows" (by loss, the highest first), "worst" (tokens),
    "internals" (name: value), "usual_internals"}.

    A row has what `inspect` tells of it, "loss" (mean over what is told), "losses" (T, None where nothing is) and "spans", what
    can be read: [{"text", "loss", "place"}]. Loss of a token: -log of its probability, or its class's, in nats, with the dropout
    of the step. Raises UserError: no such step, no checkpoint before it, or the text has changed.
    """
    seen = inspect(workdir, "", step, 0, overrides)
    config = config_of_run(workdir, overrides)
    lines = {kind: [x for x in read_lines(pathlib.Path(workdir, "metrics.jsonl")) if x["split"] == kind]
             for kind in ("train", "internals")}
    checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), config.checkpoint.keep, 0, False, create=False)
    first = first_step(workdir, step, checkpoints.steps(), lines["train"], from_start)
    data = build_data(config)
    programs = build_programs(config, data.vocab_size)
    program = next(iter(programs.values()))
    frozen = read_frozen(program, config)
    if first:
        first, state, meta = checkpoints.restore(program.state, before=step)
        check_frozen(meta, frozen, config)
    else:
        state = jax.jit(program.init, out_shardings=program.shardings)(config.seed)
        if config.model.from_pretrained:
            state["params"], _ = pretrained_params(program, config, state["params"])
    checkpoints.close()
    logged = {x["step"]: x for x in lines["train"]}
    last = min((s for s in logged if s >= step), default=step)  # a line after the step tells of its outcome too
    found = run_to(config, programs, data, frozen, state, first, step, last)
    difference, compared = compare(found["metrics"], logged)
    if difference:
        difference += other_versions(workdir)
    begin = f"checkpoint {first}" if first else "the beginning"
    verdict = (difference or f"the same bit for bit: loss and grad_norm of {words_of(compared)} from {begin}"
               if compared else f"nothing to compare with: metrics.jsonl has no line since {begin}")
    rows = [row_of(row, losses, config, data.tokenizer) for row, losses in zip(seen["rows"], found["losses"], strict=True)]
    rows.sort(key=lambda row: -(row["loss"] if row["loss"] is not None else -1.0))
    before = [x for x in lines["train"] if x["step"] < step][-BEFORE:]
    usual = {name: statistics.median(values) for name in COMPARED if (values := [x[name] for x in before if x[name] is not None])}
    return {"step": step, "epoch": seen["epoch"], "from_checkpoint": first, "verdict": verdict, "difference": difference,
            "compared": compared, "metrics": {k: number(v) for k, v in found["metrics"][step].items()}, "usual": usual,
            "worst": worst_of(rows), "rows": rows, "internals": found["internals"],
            "usual_internals": medians([x for x in lines["internals"] if x["step"] < step][-BEFORE:])}


def first_step(workdir: str, step: int, steps: list[int], train_lines: list[dict], from_start: bool) -> int:
    """Of the checkpoint to start from; 0: of none. Raises UserError."""
    summary = read_json(pathlib.Path(workdir, "summary.json"))
    reached = max([*steps, *(x["step"] for x in train_lines), summary["steps"] if summary else 0], default=0)
    if step > reached:
        raise UserError(f"--step={step}: the run in {workdir} has come to step {reached}; give one up to that")
    earlier = [s for s in steps if s < step]
    if not earlier and not from_start:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"--step={step}: no checkpoint is before it ({there}); give a later step, or --from_start to run "
                        f"it again from its beginning, {step} steps")
    return max(earlier, default=0)


def run_to(config, programs, data, frozen, state, first: int, step: int, last: int) -> dict:
    """Steps first + 1 ... last by the run's own executables, with a look at `step` -> {"metrics": {step: {name: number}},
    "internals", "losses" (B, T)}."""
    some = next(iter(programs.values()))
    hyper, batches = put_everywhere(some.hyper, replicated(some.mesh)), batches_of(data.train, programs, first)
    metrics, found, step_fns = {}, {}, {}
    with contextlib.closing(batches):
        for number in range(first + 1, last + 1):
            batch, stage = next(batches), stage_at(tuple(programs), number - 1)
            program = programs[stage]
            if stage not in step_fns:
                step_fns[stage], _ = program.compile()
            if number == step:
                line = internals_line(step, jax.device_get(build_internals(config, program)(state, batch, hyper, *frozen)))
                found["internals"] = {k: v if math.isfinite(v) else None for k, v in line.items() if k not in ("split", "step")}
                losses = jit(program.mesh, build_losses(config, program), out_shardings=replicated(program.mesh))
                found["losses"] = jax.device_get(losses(state, batch, hyper))
            state, on_device = step_fns[stage](state, batch, hyper, *frozen)
            metrics[number] = {k: v.item() for k, v in jax.device_get(on_device).items()}
    return {"metrics": metrics, **found}


def build_losses(config, program):
    """-> losses(state, batch, hyper) -> nll_BT, of what the targets are, with the step's own dropout."""
    m = config.model

    def losses(state, batch, hyper):
        model = nnx.merge(program.model.graph, state["params"])
        rows = batch["tokens"].shape[0]
        keys_B = keys_of_rows(hyper["seed"], state["step"], rows) if m.dropout or m.token_dropout else None
        if m.num_classes:
            targets_BT = jnp.where(batch["loss_mask"] > 0, batch["targets"], 0)
            return token_losses(class_logits(model, batch, POOLINGS[m.pooling], keys_B)[0], targets_BT, 0.0, 0.0)[1]
        return target_nlls(config, model, batch, keys_B)

    return losses


# ---- Is it the same? ---------------------------------------------------------------------------------------------------------


def compare(metrics: dict[int, dict], logged: dict[int, dict]) -> tuple[str | None, list[int]]:
    """-> (the first difference, steps that both have)."""
    steps = [step for step in metrics if step in logged]
    for step in steps:
        for name in COMPARED:
            here, there = number(metrics[step][name]), logged[step][name]
            if here != there:
                return f"differs first at step {step}: {name} is {here!r} here and {there!r} in metrics.jsonl", steps
    return None, steps


def number(value):
    """As metrics.jsonl has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def other_versions(workdir: str) -> str:
    """Why that may be."""
    known = json.loads(pathlib.Path(workdir, "config.json").read_text())["packages"]
    reasons = [f"jax {known['jax']} then, {jax.__version__} now"] if known["jax"] != jax.__version__ else []
    summary = read_json(pathlib.Path(workdir, "summary.json"))
    device = jax.devices()[0].device_kind
    if summary and summary["device_kind"] != device:
        reasons.append(f"{summary['device_kind']} then, {device} now")
    return f" ({'; '.join(reasons)})" if reasons else ""


def words_of(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"


# ---- What was in the batch ---------------------------------------------------------------------------------------------------


def row_of(row: dict, losses_T, config, tokenizer) -> dict:
    """row: of `inspect`."""
    told = np.asarray(row["loss_mask"]) > 0
    losses = [number(float(loss)) if is_told else None for loss, is_told in zip(losses_T, told, strict=True)]
    known = [loss for loss in losses if loss is not None]
    return {**{k: row[k] for k in ("row", "index", "source", "epoch", "tokens", "targets", "segment_ids", "pieces") if k in row},
            "loss": statistics.fmean(known) if known else None, "told": int(told.sum()), "losses": losses,
            "spans": spans_of(row, losses, config, tokenizer)}


def spans_of(row: dict, losses: list, config, tokenizer) -> list[dict]:
    """The row token by token, segment by segment: [{"text", "loss" (None: not told), "place" (of the target; -1: none)}], and
    {"text": "", "border": True} between segments. An encoder's text comes before what is told of it."""
    classes, is_text = config.data.classes, config.data.form == "text"
    segments, out = np.asarray(row["segment_ids"]), []
    decode = lambda ids: tokenizer.decode([int(i) for i in ids], special=True)
    span = lambda text, loss=None, place=-1: {"text": text, "loss": loss, "place": place}
    last = int(segments.max(initial=0))
    for segment in range(1, last + 1):
        places = np.flatnonzero(segments == segment)
        if not len(places):
            continue
        out += [{"text": "", "border": True}] if out else []
        if "source_tokens" in row:
            out.append(span(decode(np.asarray(row["source_tokens"])[np.asarray(row["source_segment_ids"]) == segment]) + " "))
        begins = places[0] == 0 or not is_text or losses[places[0] - 1] is None  # else it was the target before
        out += [span(decode([row["tokens"][places[0]]]))] if begins else []
        for place in places.tolist():
            told = losses[place] is not None or row["loss_mask"][place] > 0
            if not told and is_text and place == places[-1] and segment < last:  # the first of the next document
                continue
            text = classes[row["targets"][place]] if classes and told else decode([row["targets"][place]])
            out.append(span(text, losses[place], place))
    return out


def worst_of(rows: list[dict]) -> list[dict]:
    """[{"row", "place", "loss", "probability", "before", "text"}], the highest loss first."""
    found = [(span["loss"], row["row"], i, row) for row in rows for i, span in enumerate(row["spans"])
             if "loss" in span and span["loss"] is not None]
    found.sort(key=lambda item: (-item[0], *item[1:3]))
    return [{"row": number, "place": row["spans"][i]["place"], "loss": loss, "probability": math.exp(-loss),
             "before": "".join(span["text"] for span in row["spans"][max(0, i - 24) : i]), "text": row["spans"][i]["text"]}
            for loss, number, i, row in found[:WORST]]


def medians(lines: list[dict]) -> dict:
    names = [name for name in (lines[-1] if lines else {}) if name not in ("split", "step")]
    return {name: statistics.median(values) for name in names
            if (values := [x[name] for x in lines if name in x and x[name] is not None])}
