"""Building a token store: documents -> tokens, in parallel over processes, from where an earlier try stopped.

The sources are cut into pieces by their sizes alone. What a piece becomes is a pure function of it, the tokenizer and the
reading settings (`make_shard`), so the bytes are the same with any number of workers, and a piece that is done is never done
again. All of it happens in `.<fingerprint>.build` beside the store, which gets its name when it is whole.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from array import array
from typing import NamedTuple

import numpy as np

from jaxlm.data.examples import build_form
from jaxlm.data.formats import UNREADABLE, Broken, Extent, format_of
from jaxlm.data.sources import Skipped, reading, told
from jaxlm.data.store import state_of
from jaxlm.data.tokenizers import build_tokenizer, closed, learns, load_tokenizer
from jaxlm.errors import UserError

SMALLEST, LARGEST, PIECES = 2**20, 2**27, 64  # bytes of a piece: a 64th of the sources, within these
ALONE = 2**22  # bytes of sources that no other process is started for
BATCH = 2**17  # characters given to the tokenizer at once: more are slower, as their encodings leave the cache


class Piece(NamedTuple):
    """What one shard is made of."""

    number: int
    extents: tuple[Extent, ...]
    text: str | None = None  # where the shard is a part of the only document

    @property
    def size(self) -> int:
        return sum(extent.size for extent in self.extents)


class Job(NamedTuple):
    """All that `make_shard` needs beside the piece."""

    settings: object  # `sources.reading`
    imports: tuple[str, ...]  # modules with out-of-tree formats and tokenizers
    folder: str  # shards
    work: str  # what is known of each shard, and of how far it is
    dtype: str
    end: tuple[int, ...]  # ids after each document


def build_store(config, folder: pathlib.Path, sources: dict, workers: int) -> None:
    """sources: `store.locate_store`. Raises UserError: input that cannot be read, a disk that is full, sources that change."""
    build = folder.parent / f".{folder.name}.build"
    store, work = build / "store", build / "work"
    try:
        store.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        with alone(build):
            if (folder / "manifest.json").is_file():  # another process made it meanwhile
                return
            from jaxlm.data.token_files import index_token_files, is_token_file

            files = [file for of in sources.values() for file in of]
            if any(map(is_token_file, files)):
                index_token_files(config, store, sources)
            else:
                make_from_text(config, store, work, sources, workers)
            for file, fact in ((file, fact) for of in sources.values() for file, fact in of.items()):
                if not os.path.exists(file) and "://" not in file or state_of(file)[0] != fact["state"]:
                    raise UserError(f"{file}: changed while its tokens were made; run the same command again")
            store.rename(folder)
            shutil.rmtree(build)
    except UserError:
        shutil.rmtree(build, ignore_errors=True)  # what mends the input makes another store
        raise
    except ChildProcessError as error:
        raise UserError(f"data.workers: {error}; run the same command again, with fewer data.workers if it was that") from error
    except OSError as error:
        raise UserError(f"data.store_dir={folder.parent}: cannot be written ({error.strerror or error}); free space, or set "
                        "data.store_dir or $JAXLM_CACHE; what is done is kept for the next try") from error


@contextlib.contextmanager
def alone(build: pathlib.Path):
    """One process at a time builds this store; the lock of a process that was killed is free."""
    with open(build / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"data: another process makes {build.name}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- From text to shards ---------------------------------------------------------------------------------------------------


def make_from_text(config, store, work, sources, workers) -> None:
    settings = reading(config)
    pieces, form = {split: plan(settings, files) for split, files in sources.items()}, build_form(settings)
    items = lambda pieces: itertools.chain(*(form.read(piece.extents, Skipped()) for piece in pieces))
    everything = [piece for of in pieces.values() for piece in of]
    only, count = None, 0
    for item in itertools.islice(items(everything), 3):  # up to two documents are not marked off from one another
        only, count = item if not count else None, count + 1
    if not count:
        raise UserError(f"data.path={config.data.path}: holds no text; give a file with text")
    seen = everything if closed(config) else [piece for split in ("train", "valid") if split in pieces for piece in pieces[split]]
    tokenizer = kept_tokenizer(config, store, lambda: (text for item in items(seen) for text in form.texts(item)))
    if isinstance(only, str) and "valid" not in pieces:  # one document: its last characters
        cut = int((1 - config.data.valid_fraction) * len(only))
        pieces |= {"train": [Piece(0, (), only[:cut])], "valid": [Piece(0, (), only[cut:])]}
    numbers = itertools.count()
    pieces = {split: [piece._replace(number=next(numbers)) for piece in of] for split, of in pieces.items()}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    end = (tokenizer.eos_id,) if count > 2 and tokenizer.eos_id is not None and not form.marks else ()
    job = Job(settings, tuple(config.imports), str(store), str(work), dtype.name, end)
    todo = [piece for of in pieces.values() for piece in of if not shard_done(job, piece)]
    shards = make_shards(job, tokenizer, todo, [p for of in pieces.values() for p in of], workers)
    ranges = {split: [(piece.number, 0, shards[piece.number]["documents"]) for piece in of] for split, of in pieces.items()}
    if "valid" not in ranges:
        ranges |= cut_splits(config, ranges["train"], form.group)
    splits = {split: write_starts(store / f"{split}-starts.npy", of, shards, work) for split, of in ranges.items()}
    if not sum(split["tokens" if form.marks else "bytes"] for split in splits.values()):
        raise UserError(f"data.path={config.data.path}: holds no text; give a file with text")
    write_manifest(config, store, sources, shards, splits, tokenizer)


def write_manifest(config, store, sources, shards, splits, tokenizer) -> None:
    skipped = [shard["skipped"] for shard in shards if "skipped" in shard]
    facts = {file: fact for of in sources.values() for file, fact in of.items()}
    write_durably(store / "manifest.json", json.dumps({
        "vocab_size": tokenizer.vocab_size, "tokenizer": config.data.tokenizer, "settings": told(config),
        "sources": {file: {key: fact[key] for key in ("sha256", "bytes")} for file, fact in facts.items()},
        "skipped": {"count": sum(s["count"] for s in skipped), "first": [p for s in skipped for p in s["first"]][:100]},
        "shards": [{key: shard[key] for key in ("file", "dtype", "offset", "tokens", "sha256")} for shard in shards],
        "splits": splits, **({"marks": True} if config.data.form != "text" else {})}, indent=1).encode())


def plan(settings, files: dict[str, dict]) -> list[Piece]:
    """Pieces of about equal size, whole files and parts of files, in the order of the documents."""
    about = min(LARGEST, max(SMALLEST, sum(fact["bytes"] for fact in files.values()) // PIECES))
    pieces, held = [], []
    for file, fact in files.items():
        try:
            extents = format_of(file, settings.data.parallel).cut(settings, file, fact["bytes"], about)
        except (Broken, *UNREADABLE):  # reading tells what is wrong, or counts it
            extents = [Extent(file, 0, None, fact["bytes"])]
        for extent in extents:
            held.append(extent)
            if sum(e.size for e in held) >= about:
                pieces, held = [*pieces, held], []
    return [Piece(0, tuple(extents)) for extents in ([*pieces, held] if held else pieces)]


def kept_tokenizer(config, store, texts):
    """Trained, or opened, once: a second try goes on with what the first one made."""
    file = store / "tokenizer.json"
    if file.exists():
        return load_tokenizer(file.read_text())
    if learns(config):
        print(f"data: training tokenizer {config.data.tokenizer}", file=sys.stderr, flush=True)
    tokenizer = build_tokenizer(config, texts())
    write_durably(file, tokenizer.to_json().encode())
    return tokenizer


def shard_files(job: Job, number: int) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """ids; tokens and bytes of each document, (2, documents) int64; what is known of the shard, written last."""
    return (pathlib.Path(job.folder, f"{number:05d}.bin"), pathlib.Path(job.work, f"{number:05d}.npy"),
            pathlib.Path(job.work, f"{number:05d}.json"))


def shard_done(job: Job, piece: Piece) -> dict | None:
    """What is known of a shard that an earlier try finished."""
    info = shard_files(job, piece.number)[2]
    return json.loads(info.read_text()) if info.exists() else None


def make_shard(job: Job, tokenizer, piece: Piece, progress=lambda documents: None) -> dict:
    """The ids of a piece's documents, in a file -> what is known of it. A pure function of job, tokenizer and piece."""
    ids_file, lengths_file, info_file = shard_files(job, piece.number)
    temporary, marks_file = ids_file.with_suffix(f".{os.getpid()}"), ids_file.with_suffix(".marks")
    skipped, digest, lengths, sizes, total = Skipped(), hashlib.sha256(), array("q"), array("q"), 0
    form = build_form(job.settings, tokenizer)
    items = [piece.text] if piece.text is not None else form.read(piece.extents, skipped)
    typecode = "H" if job.dtype == "uint16" else "I"
    try:
        with open(temporary, "wb") as out, open(marks_file, "wb") if form.marks else contextlib.nullcontext() as marks_out:
            for batch in batched(items, form.size):
                flat, marks = array(typecode), bytearray()
                for ids, mark, size in form.encode(batch):
                    before = len(flat)
                    if isinstance(ids, list):
                        flat.extend(ids)
                    else:
                        flat.frombytes(np.asarray(ids, job.dtype).tobytes())
                    flat.extend(job.end)
                    lengths.append(len(flat) - before)
                    sizes.append(size)
                    marks += mark
                out.write(flat)
                digest.update(flat)
                if form.marks:
                    marks_out.write(marks)
                    digest.update(marks)
                total += len(flat)
                progress(len(batch))
            for written in (out, marks_out) if form.marks else (out,):
                written.flush()
                os.fsync(written.fileno())
        with open(lengths_file, "wb") as out:
            np.save(out, np.array([lengths, sizes], np.int64))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(ids_file)
    finally:
        temporary.unlink(missing_ok=True)
    info = {"file": ids_file.name, "dtype": job.dtype, "offset": 0, "tokens": total, "documents": len(lengths),
            "sha256": digest.hexdigest(), "skipped": vars(skipped)}
    write_durably(info_file, json.dumps(info).encode())
    return info


def batched(items, size_of):
    """Lists of documents of about BATCH characters together: the tokenizer is called seldom, and memory stays small."""
    held, size = [], 0
    for item in items:
        held.append(item)
        size += size_of(item)
        if size >= BATCH or len(held) >= 4096:
            yield held
            held, size = [], 0
    if held:
        yield held


def write_durably(file: pathlib.Path, content: bytes) -> None:
    """There whole, or not at all, even if the machine stops."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def make_shards(job: Job, tokenizer, todo: list[Piece], pieces: list[Piece], workers: int) -> list[dict]:
    """What is known of the shards of all `pieces`; those of `todo` are made now, by up to `workers` processes."""
    from jaxlm.data.workers import here, in_processes

    meter = Meter(sum(p.size for p in pieces), sum(p.size for p in pieces) - sum(p.size for p in todo))
    if todo:
        run = here if workers == 1 or sum(piece.size for piece in todo) < ALONE else in_processes
        run(job, tokenizer, todo, workers, meter)
    meter.end()
    return [shard_done(job, piece) for piece in pieces]


class Meter:
    """Says every few seconds how far the tokens are."""

    def __init__(self, total: int, done: int, every: float = 5.0):
        self.total, self.done, self.before, self.every = total, done, done, every
        self.documents, self.began, self.spoke = 0, time.monotonic(), time.monotonic()

    def add(self, documents: int = 0, size: int = 0) -> None:
        self.documents, self.done = self.documents + documents, self.done + size
        if time.monotonic() - self.spoke >= self.every:
            self.say()

    def say(self) -> None:
        self.spoke = time.monotonic()
        spent, share = self.spoke - self.began, self.done / max(1, self.total)
        made = self.done - self.before
        left = f"{spent * (self.total - self.done) / made:,.0f} s left" if made else "time left not known yet"
        print(f"data: tokens of {self.documents:,} documents, {self.documents / max(spent, 1e-9):,.0f} documents/s, {share:.0%} "
              f"of the source, {left}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if time.monotonic() - self.began >= self.every:
            self.say()


# ---- From shards to splits -------------------------------------------------------------------------------------------------


def cut_splits(config, parts, group: int) -> dict[str, list[tuple[int, int, int]]]:
    """[(shard, first document, end)] -> the same for each split: the last data.valid_fraction of the documents are for
    validation, or every data.valid_every-th. group: documents that belong together."""
    total, every = sum(end for _, _, end in parts) // group, config.data.valid_every
    left = min(total - 1, max(1, int((1 - config.data.valid_fraction) * total)))
    out, at = {"train": [], "valid": []}, 0  # at: documents before the shard
    for shard, _, end in parts:
        if every:
            held = np.arange(at, at + end) // group % every == every - 1
            borders = [0, *(np.flatnonzero(np.diff(held)) + 1).tolist(), end] if end else []
        else:
            borders = sorted({0, min(end, max(0, left * group - at)), end})
        for first, stop in itertools.pairwise(borders):
            is_valid = held[first] if every else at + first >= left * group
            out["valid" if is_valid else "train"].append((shard, first, stop))
        at += end
    return out


def write_starts(file: pathlib.Path, parts, shards, work) -> dict:
    """Where each document starts in the split, (documents,) int64 -> the split's entry in the manifest."""
    count = sum(end - first for _, first, end in parts)
    info = {"tokens": 0, "documents": count, "bytes": 0, "ranges": []}
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        for number, first, end in parts:
            lengths, sizes = np.load(work / f"{number:05d}.npy", mmap_mode="r")
            before, tokens = int(lengths[:first].sum()), int(lengths[first:end].sum())
            out.write((np.cumsum(lengths[first:end]) - lengths[first:end] + info["tokens"]).astype("<i8").tobytes())
            if tokens:
                info["ranges"].append([number, before, before + tokens])
            info["tokens"], info["bytes"] = info["tokens"] + tokens, info["bytes"] + int(sizes[first:end].sum())
        out.flush()
        os.fsync(out.fileno())
    return info
