"""What a run saw at a step, by the very code that made its batch; and what a token store holds."""

import functools
import json
import pathlib

import numpy as np

from jaxlm.config import load
from jaxlm.data.loader import build_data
from jaxlm.data.mixture import open_sources
from jaxlm.data.store import changed_sources, read_manifest
from jaxlm.errors import UserError
from jaxlm.stages import stage_at


def inspect(workdir: str, config_file: str, step: int, rows: int, overrides=()) -> dict:
    """-> {"step", "epoch", "batch_size", "rows": [{"row", "index", "tokens", "targets", "segment_ids", "positions",
    "loss_mask", "pieces"}]} of the first `rows` rows (0: all) of the batch that took the state to `step` completed steps.

    pieces: runs of targets as the model was asked for them, [{"kind", "text"}], kind "target" (in the loss), "masked" (not),
    "padding" or "border" (what comes next does not see what was before).
    """
    if workdir:
        from jaxlm.train.restore import config_of_run

        config = config_of_run(workdir, overrides)
    else:
        config = load(config_file, overrides)
    data = build_data(config)
    if workdir:
        stored = json.loads(pathlib.Path(workdir, "config.json").read_text())
        if "data" in stored and stored["data"] not in (None, data.fingerprint):
            changes = changed_sources(config, stored["data"])
            raise UserError(f"{workdir}: its text is no longer what it was ({'; '.join(changes)}); put the old text back")
    if step > config.steps:
        raise UserError(f"--step={step}: the run has {config.steps} steps")
    batches, stage = data.train, stage_at(data.train.stages, step - 1)
    count, (first, piece) = min(rows or stage.batch_size, stage.batch_size), stage.place(step - 1)
    batch = batches.batch(step - 1, range(count))
    read = pieces if config.data.form == "text" else functools.partial(example_pieces, classes=config.data.classes)
    shown = [{"row": row, **batches.where(first + row, stage.pieces, piece),
              **{name: a[row].tolist() for name, a in batch.items()},
              "pieces": read({name: a[row] for name, a in batch.items()}, data.tokenizer)} for row in range(count)]
    return {"step": step, "epoch": shown[0]["epoch"], "batch_size": stage.batch_size, "rows": shown}


def pieces(row: dict[str, np.ndarray], tokenizer) -> list[dict]:
    """The row as it is read: its first token, then the targets (T,), cut where the mask or the document changes."""
    segment, mask = row["segment_ids"], row["loss_mask"] > 0
    # Target t is the token after t: in t's document if it is a target at all, else the first of the next.
    following = np.append(segment[1:], segment[-1])
    kinds = ["padding" if segment[0] == 0 else "masked",
             *np.where(mask, "target", np.where(segment == 0, "padding", "masked")).tolist()]
    border = np.append(False, (segment > 0) & (following != segment) & (following > 0))
    ids, out, run = [int(row["tokens"][0]), *map(int, row["targets"])], [], []
    for i, (token, kind) in enumerate(zip(ids, kinds, strict=True)):
        if border[i] or (i and kind != kinds[i - 1]):
            out.append({"kind": kinds[i - 1], "text": tokenizer.decode(run, special=True)})
            run = []
        if border[i]:
            out.append({"kind": "border", "text": ""})
        run.append(token)
    return [*out, {"kind": kinds[-1], "text": tokenizer.decode(run, special=True)}]


def example_pieces(row: dict[str, np.ndarray], tokenizer, classes=()) -> list[dict]:
    """The same of a row of `example_rows.ExampleRows`. An encoder's text comes before what is told of it."""
    out, segments, decode = [], row["segment_ids"], lambda ids: tokenizer.decode(ids.tolist(), special=True)
    for segment in range(1, int(segments.max(initial=0)) + 1):
        out += [{"kind": "border", "text": ""}] if out else []
        if "source_tokens" in row:
            out.append({"kind": "masked", "text": decode(row["source_tokens"][row["source_segment_ids"] == segment])})
        at = segments == segment
        ids, told = np.append(row["tokens"][at][:1], row["targets"][at]), np.append(False, row["loss_mask"][at] > 0)
        borders = [0, *(np.flatnonzero(np.diff(told)) + 1).tolist(), len(ids)]
        for first, end in zip(borders[:-1], borders[1:], strict=True):
            text = classes[ids[first]] if classes and told[first] else decode(ids[first:end])
            out.append({"kind": "target" if told[first] else "masked", "text": text})
    return out + [{"kind": "padding", "text": ""}] * bool((segments == 0).any())


def as_text(seen: dict) -> str:
    form = {"target": "{}", "masked": "[[{}]]", "border": "\n" + "-" * 40 + "\n"}
    lines = [f"step {seen['step']}, epoch {seen['epoch']}: {len(seen['rows'])} of {seen['batch_size']} rows"]
    for row in seen["rows"]:
        targets = sum(m > 0 for m in row["loss_mask"])
        documents = len(set(row["segment_ids"]) - {0})
        source = row["source"] if "source" in row else "the data"
        lines.append(f"\n=== row {row['row']} (row {row['index']} of {source}): {targets} targets, {documents} "
                     f"{'document' if documents == 1 else 'documents'} ===")
        lines.append("".join("____" if p["kind"] == "padding" else form[p["kind"]].format(p["text"]) for p in row["pieces"]))
    return "\n".join(lines)


def about_store(config) -> str:
    """Builds the store if it is not there."""
    sources, tokenizer = open_sources(config)
    lines = []
    for name, stores in sources.items():
        folder = stores["train"].folder
        manifest = read_manifest(folder)
        lines += [f"{name + ': ' if name else ''}{folder}: {len(manifest['sources']):,} sources, {len(manifest['shards']):,} "
                  f"shards, vocabulary {tokenizer.vocab_size:,}"]
        lines += [f"{split}: {info['tokens']:,} tokens, {info['documents']:,} documents" for split, info in
                  manifest["splits"].items()]
    return "\n".join(lines)
