"""`jaxlm data prepare`: sources -> clean shards, in stages whose units are independent of one another.

    read            sources -> shards of documents
    clean-0         the steps up to the first of the whole corpus, and a sketch of each document
    match-0         buckets of similar sketches, in parts of the key space; cluster-0: which documents go
    clean-1 ...     without those, the next steps; the last one writes the shards of the outcome

A unit reads files and writes files under a name that depends on nothing but its number, last of all its result; so it may be
done anywhere, killed, and done again, and the bytes are the same. All is in <out>.partial until it is renamed.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from typing import NamedTuple

from configs import default
from jaxlm.config import flatten
from jaxlm.data.cleaning import matching
from jaxlm.data.cleaning.card import write_card
from jaxlm.data.cleaning.decontamination import evaluation_files, write_index
from jaxlm.data.cleaning.reading import file_of, group, name_of, read_sources
from jaxlm.data.cleaning.shards import SketchWriter, line_writer, read_lines, read_rows, read_shard, write_json
from jaxlm.data.cleaning.step import CORPUS_STEPS, STEPS, Context, Removed, register_all
from jaxlm.data.contents import state_of
from jaxlm.data.sources import READING, find_files
from jaxlm.data.tokenizers import build_tokenizer
from jaxlm.errors import UserError
from jaxlm.observe.progress import compact, duration
from jaxlm.registry import did_you_mean

EXCERPT = 400  # characters of a removed document that are kept to look at


class Segment(NamedTuple):
    """Steps of one document each, and the step of all documents that follows (None: the end)."""

    steps: tuple[str, ...]
    corpus_step: str | None


class Job(NamedTuple):
    """All that a unit needs beside its item; goes to other processes and machines."""

    config: object
    folder: pathlib.Path

    def path(self, *parts) -> pathlib.Path:
        return self.folder.joinpath(*parts)

    def result(self, stage: str, number: int) -> pathlib.Path:
        return self.path("results", stage, f"{number:06d}.json")

    def shard(self, stage: int, number: int) -> pathlib.Path:
        return self.path(f"clean-{stage}", f"{number:06d}.jsonl.zst")


def prepare(config, out: str, runner, overrides: list[str] = ()) -> dict:
    """-> the data card. Raises UserError. Goes on where an earlier call with the same config and sources was stopped."""
    target = pathlib.Path(out)
    if "://" in out:
        raise UserError(f"--out={out}: must be a folder of a file system; mount the bucket, or copy the outcome there")
    files = find_files(config, config.data.path, "data.path")
    segments = plan_segments(config, overrides)
    plan = plan_of(config, files)
    if target.exists():
        if (target / "plan.json").is_file() and json.loads((target / "plan.json").read_text()) == plan:
            return json.loads((target / "card.json").read_text())
        raise UserError(f"--out={out}: exists, and was not made by this config from these sources; remove it, or choose "
                        "another folder")
    job = Job(config, target.with_name(target.name + ".partial"))
    try:
        claim(job, plan)
        work(job, files, segments, runner)
        for name in ("card.json", "plan.json"):
            os.replace(job.path(name), job.path("out", name))
        os.replace(job.path("out"), target)
        shutil.rmtree(job.folder)
    except OSError as error:
        raise UserError(f"--out={out}: {error.filename or 'writing'} failed ({error.strerror}); mend it, and run the same "
                        "command again: it goes on from there") from error
    return json.loads((target / "card.json").read_text())


def plan_segments(config, overrides=()) -> list[Segment]:
    """Also finds what is wrong with config.prepare, all at once."""
    register_all(config)
    p, problems = config.prepare, []
    valid = [*STEPS, *CORPUS_STEPS]
    for name in p.steps:
        if name not in valid:
            problems.append(f"prepare.steps: {name!r} is no cleaning step; {did_you_mean(name, valid)}")
    if repeated := [name for name, times in Counter(p.steps).items() if times > 1]:
        problems.append(f"prepare.steps: {', '.join(repeated)}: named more than once; each step runs once")
    if p.shard_characters < 1:
        problems.append(f"prepare.shard_characters={p.shard_characters}: must be at least 1")
    if p.samples < 0:
        problems.append(f"prepare.samples={p.samples}: must not be negative")
    if p.format not in ("jsonl", "jsonl.zst"):
        problems.append(f"prepare.format={p.format!r}: {did_you_mean(p.format, ('jsonl', 'jsonl.zst'))}")
    if p.count_tokens not in ("", "byte") and not os.path.isfile(p.count_tokens):
        problems.append(f"prepare.count_tokens={p.count_tokens!r}: no such file; give byte, or a tokenizer.json")
    try:
        re.compile(p.split_at)
    except re.error as error:
        problems.append(f"prepare.split_at={p.split_at!r}: not a regular expression ({error})")
    problems += unused(config, valid, {override.removeprefix("--config.").partition("=")[0] for override in overrides})
    if problems:
        raise UserError(*problems)
    for name in p.steps:  # built once here to see what is wrong with their options, before any work
        try:
            if name in CORPUS_STEPS:
                CORPUS_STEPS[name](options_of(config, name))
            elif name == "decontaminate":  # reads what `work` makes first
                evaluation_files(config)
            else:
                STEPS[name](options_of(config, name), Context(config, "", Counter()))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    segments, steps = [], []
    for name in p.steps:
        if name in CORPUS_STEPS:
            segments.append(Segment(tuple(steps), name))
            steps = []
        else:
            steps.append(name)
    return [*segments, Segment(tuple(steps), None)]


def unused(config, steps, given: set[str]) -> list[str]:
    """Keys that were set, of steps that do not run. Other steps on the command line excuse what the config file set."""
    mine, base = flatten(config.prepare), flatten(default.get_config().prepare)
    return [f"prepare.{key}={value!r}: is set, but {name!r} is not among prepare.steps; add it there, or remove the key"
            for key, value in mine.items() if (name := key.partition(".")[0]) in steps and name not in config.prepare.steps
            and (f"prepare.{key}" in given or "prepare.steps" not in given and (key not in base or value != base[key]))]


def plan_of(config, files) -> dict:
    """What decides every byte of the outcome."""
    reading = {f"data.{key}" for key in READING}
    keys = {key: value for key, value in flatten(config).items() if key.startswith("prepare.") or key in reading}
    evaluation = evaluation_files(config) if "decontaminate" in config.prepare.steps else []
    states = [[name_of(config, file), state_of(file)[0]] for file in [*files, *evaluation]]
    return json.loads(json.dumps({"keys": keys, "files": states}))


def claim(job: Job, plan: dict) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.path("plan.json").is_file() and json.loads(job.path("plan.json").read_text()) != plan:
        if any(job.path("results").glob("*.json")):  # a stage was done: not ours to throw away
            raise UserError(f"{job.folder}: holds the unfinished work of another config, or of sources that have changed since; "
                            "remove it, or choose another --out")
        shutil.rmtree(job.folder)
    if not job.path("plan.json").is_file():
        write_json(job.path("plan.json"), plan)


def work(job: Job, files, segments, runner) -> None:
    p = job.config.prepare
    if "decontaminate" in p.steps and not job.path("decontaminate.npz").exists():
        write_index(job.config, job.path("decontaminate.npz"))
    read = run_stage(job, runner, "read", read_sources, list(enumerate(group(job.config, files))))
    shards = [shard for result in read for shard in result["shards"]]
    results, sources = {"read": read}, list(enumerate(shards))
    for number, segment in enumerate(segments):
        stage = functools.partial(clean, segments, number)
        cleaned = results[f"clean-{number}"] = run_stage(job, runner, f"clean-{number}", stage, sources)
        shutil.rmtree(job.path(f"clean-{number - 1}" if number else "read"), ignore_errors=True)
        sources = [(i, os.fspath(job.shard(number, i).relative_to(job.folder))) for i in range(len(shards))]
        if segment.corpus_step:
            parts = matching.parts_of(sketcher_of(job, segment).num_keys, sum(r["documents"] for r in cleaned))
            results[f"match-{number}"] = run_stage(job, runner, f"match-{number}", functools.partial(
                match, segment, number, len(shards)), list(enumerate(parts)))
            run_stage(job, runner, f"cluster-{number}", functools.partial(cluster, segment, number, len(parts)), [(0, None)])
    write_removed(job, results, segments)
    write_card(job, results, segments)
    for leftover in job.path("out").rglob("*.tmp"):  # of a process that was killed
        leftover.unlink()


def run_stage(job: Job, runner, stage: str, function, items) -> list[dict]:
    """Does those of `items`, (number, ...), that have no result yet. -> the results of all, in order."""
    whole = job.path("results", f"{stage}.json")
    if whole.is_file():
        return json.loads(whole.read_text())
    todo = [item for item in items if not job.result(stage, item[0]).is_file()]
    began, shown, finished = time.monotonic(), time.monotonic(), 0
    for result in runner.map(functools.partial(attempt, job, stage, function), todo):
        finished += 1
        now = time.monotonic()
        if now - shown > 2 and finished < len(todo):
            shown, rate = now, finished / (now - began)
            print(f"{stage}: {finished + len(items) - len(todo)}/{len(items)}  {compact(rate * (result or 0))} documents/s  "
                  f"{duration((len(todo) - finished) / rate)} left", file=sys.stderr, flush=True)
    results = [json.loads(job.result(stage, item[0]).read_text()) for item in items]
    if problems := [problem for result in results if "problems" in result for problem in result["problems"]]:
        shutil.rmtree(job.path("results", stage))
        raise UserError(*dict.fromkeys(problems))
    documents = sum(result["documents"] for result in results if "documents" in result)
    print(f"{stage}: {len(items)}/{len(items)} done" + (f", {documents:,} documents left" if documents else "")
          + f", {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    write_json(whole, results)
    return results


def attempt(job: Job, stage: str, function, item) -> int:
    """One unit, wherever it runs. What the user can mend goes back as its result, for no engine keeps exceptions whole."""
    try:
        result = function(job, *item)
    except UserError as error:
        result = {"problems": list(error.problems)}
    write_json(job.result(stage, item[0]), result)
    return result["documents"] if "documents" in result else 0


def sketcher_of(job: Job, segment: Segment):
    return CORPUS_STEPS[segment.corpus_step](options_of(job.config, segment.corpus_step))


def options_of(config, step: str):
    """A step from elsewhere (config.imports) may have none."""
    return config.prepare[step] if step in config.prepare else None


def clean(segments: list[Segment], stage: int, job: Job, number: int, source: str) -> dict:
    """One shard through the steps of segment `stage`, without the documents that the segment before dropped."""
    config, segment, last = job.config, segments[stage], stage == len(segments) - 1
    register_all(config)
    stats = {name: Counter(seconds=0.0) for name in segment.steps}
    counts, reasons = {name: Counter() for name in segment.steps}, {name: Counter() for name in segment.steps}
    steps = {name: STEPS[name](options_of(config, name), Context(config, os.fspath(job.folder), counts[name]))
             for name in segment.steps}
    sketcher = None if last else sketcher_of(job, segment)
    sketches, samples = SketchWriter(), []
    dropped = matching.dropped_rows(job.path(f"clean-{stage - 1}", "dropped.npy"), number) if stage else ()
    before = segments[stage - 1].corpus_step if stage else None
    if before:
        stats[before], counts[before], reasons[before] = Counter(), Counter(), Counter()
    outcome, out = Outcome(config), job.shard(stage, number)
    if last:
        out = job.path("out", f"shard-{number:06d}.{config.prepare.format}")
    sketch_seconds = 0.0
    with line_writer(out) as write:
        for row, record in enumerate(read_shard(job.path(source))):
            if before:
                stats[before].update(documents_in=1, characters_in=len(record.text))
                if row in dropped:
                    reasons[before][REASONS[before]] += 1
                    continue
                stats[before].update(documents_out=1, characters_out=len(record.text))
            for name, step in steps.items():
                began = time.perf_counter()
                after = step(record)
                stats[name]["seconds"] += time.perf_counter() - began
                stats[name].update(documents_in=1, characters_in=len(record.text))
                if isinstance(after, Removed):
                    reasons[name][after.reason] += 1
                    if name == "decontaminate" or reasons[name][after.reason] <= config.prepare.samples:
                        samples.append(removed_line(name, after, record))
                    break
                record = after
                stats[name].update(documents_out=1, characters_out=len(record.text))
            else:
                if last:
                    outcome.add(record)
                    write({config.data.text_field: record.text, **record.fields})
                else:
                    outcome.documents += 1
                    write(record)
                    began = time.perf_counter()
                    sketches.add(*sketcher.sketch(record.text))
                    sketch_seconds += time.perf_counter() - began
    if not last:
        sketches.write(out)
    elif not outcome.documents:
        out.unlink()
    with line_writer(job.path("results", f"clean-{stage}", f"{number:06d}.removed")) as write:
        for line in samples:
            write(line)
    return {"documents": outcome.documents, "stats": stats, "counts": counts, "reasons": reasons,
            "sketch_seconds": sketch_seconds, "outcome": outcome.as_json()}


REASONS = {"exact_duplicates": "same as an earlier document", "near_duplicates": "nearly the same as an earlier document"}


def removed_line(step: str, removed: Removed, record) -> dict:
    return {"step": step, "reason": removed.reason, "detail": removed.detail, "source": record.where,
            "characters": len(record.text), "excerpt": record.text[:EXCERPT]}


class Outcome:
    """Counts of what is written in the end."""

    def __init__(self, config):
        self.documents = self.characters = self.bytes = self.tokens = 0
        self.lengths, self.languages, self.sources = Counter(), defaultdict(Counter), defaultdict(Counter)
        self.tokenizer = tokenizer_of(config) if config.prepare.count_tokens else None

    def add(self, record) -> None:
        size = len(record.text)
        self.documents += 1
        self.characters += size
        self.bytes += len(record.text.encode("utf-8", "surrogatepass"))
        self.tokens += len(self.tokenizer.encode(record.text)) if self.tokenizer else 0
        self.lengths[size.bit_length()] += 1
        if "language" in record.fields:
            self.languages[record.fields["language"]].update(documents=1, characters=size)
        self.sources[file_of(record.where)].update(documents=1, characters=size)

    def as_json(self) -> dict:
        return {"documents": self.documents, "characters": self.characters, "bytes": self.bytes, "tokens": self.tokens,
                "lengths": self.lengths, "languages": self.languages, "sources": self.sources}


def tokenizer_of(config):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.tokenizer = config.prepare.count_tokens
    return build_tokenizer(config, [])


def match(segment: Segment, stage: int, shards: int, job: Job, number: int, part) -> dict:
    register_all(job.config)
    began = time.perf_counter()
    sketches = [job.shard(stage, i) for i in range(shards)]
    pairs = matching.match(sketches, sketcher_of(job, segment).threshold, *part)
    matching.write_array(job.path(f"clean-{stage}", f"pairs-{number:06d}.npy"), pairs)
    return {"pairs": len(pairs), "seconds": time.perf_counter() - began}


def cluster(segment: Segment, stage: int, parts: int, job: Job, number: int, _) -> dict:
    """Which documents go; and, to look at, the first of them beside what they are duplicates of."""
    import numpy as np

    dropped = matching.clusters(np.concatenate([np.load(job.path(f"clean-{stage}", f"pairs-{i:06d}.npy"))
                                                for i in range(parts)]))
    matching.write_array(job.path(f"clean-{stage}", "dropped.npy"), dropped)
    shown = dropped[: job.config.prepare.samples]
    wanted = defaultdict(set)
    for document in shown.ravel().tolist():
        wanted[document >> 32].add(document & 0xFFFFFFFF)
    found = {shard: read_rows(job.shard(stage, shard), rows) for shard, rows in sorted(wanted.items())}
    with line_writer(job.path("results", f"cluster-{stage}", f"{number:06d}.removed")) as write:
        for pair in shown.tolist():
            record, kept = (found[document >> 32][document & 0xFFFFFFFF] for document in pair)
            name = segment.corpus_step
            line = removed_line(name, Removed(REASONS[name], f"kept: {kept.where}"), record)
            write({**line, "kept_excerpt": kept.text[:EXCERPT]})
    return {"dropped": len(dropped)}


def write_removed(job: Job, results: dict, segments) -> None:
    """removed/<step>.jsonl: the first `prepare.samples` of each reason, and all that decontamination removed."""
    parts = [part for stage in range(len(segments)) for name in (f"clean-{stage}", f"cluster-{stage}")
             for part in sorted(job.path("results", name).glob("*.removed"))]
    taken = Counter()
    with contextlib.ExitStack() as stack:
        writers = {}
        for line in (line for part in parts for line in read_lines(part)):
            step, key = line.pop("step"), (line["reason"],)
            taken[step, key] += 1
            if step != "decontaminate" and taken[step, key] > job.config.prepare.samples:
                continue
            if step not in writers:
                writers[step] = stack.enter_context(line_writer(job.path("out", "removed", f"{step}.jsonl")))
            writers[step](line)
