"""The token store: an immutable folder of memory-mapped tokens, made once from the text and found again by its fingerprint.

    <store_dir>/tokens/<fingerprint>/manifest.json tokenizer.json {00000,00001,...}.bin {train,valid}-starts.npy

A split is one long array of ids and the places where its documents start. It lies in ranges of shards; a shard is a file of ids,
in the folder or, where the source is tokens already, elsewhere. Where documents are examples (data.form), {00000,...}.marks has a
byte for each id: 1 where the model is to tell it, 0 where it is given.

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
from array import array
from typing import NamedTuple

import numpy as np

from jaxlm.data.contents import content_of, state_of
from jaxlm.data.examples import build_form
from jaxlm.data.formats import UNREADABLE, Broken, Extent, format_of
from jaxlm.data.sources import Skipped, find_all, reading, told
from jaxlm.data.splits import cut_splits, write_starts
from jaxlm.data.tokenizer_files import tokenizer_files
from jaxlm.data.tokenizers import build_tokenizer, closed, learns, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import is_main, main_first

VERSION = 2  # of what lies in the folder
SMALLEST, LARGEST, PIECES = 2**20, 2**27, 64  # bytes of a piece: a 64th of the sources, within these
BATCH = 2**17  # characters given to the tokenizer at once: more are slower, as their encodings leave the cache


class TokenStore:
    """One split, as one long array of token ids, with the places where documents start.

    manifest["shards"]: [{"file", "dtype", "offset" (bytes), "tokens", ...}]; manifest["splits"][split]: {"tokens", "documents",
    "bytes" (of text, UTF-8), "ranges": [[shard, first token, end]]}. Nothing is read before it is asked for.
    """

    def __init__(self, folder: pathlib.Path, split: str, manifest: dict):
        info = manifest["splits"][split]
        self.folder, self.split, self.num_tokens, self.num_bytes = folder, split, info["tokens"], info["bytes"]
        shards = manifest["shards"]
        # A plain view of a map is sliced faster.
        ids = {i: np.asarray(np.memmap(folder / shards[i]["file"], shards[i]["dtype"], "r", shards[i]["offset"],
                                       (shards[i]["tokens"],))) for i in {shard for shard, _, _ in info["ranges"]}}
        self._parts = [ids[shard][first:end] for shard, first, end in info["ranges"]]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self._marks = None
        if "marks" in manifest:
            marks = {i: np.asarray(np.memmap((folder / shards[i]["file"]).with_suffix(".marks"), np.uint8, "r")) for i in ids}
            self._marks = [marks[shard][first:end] for shard, first, end in info["ranges"]]
        self.document_starts = np.asarray(np.load(folder / f"{split}-starts.npy", mmap_mode="r"))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop), cut off at the end of the split."""
        return self._cut(self._parts, start, stop)

    def marks(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) uint8, as `tokens`: which of them the model is to tell."""
        return self._cut(self._marks, start, stop)

    def _cut(self, parts_of_split, start, stop):
        stop, parts = min(stop, self.num_tokens), []
        at = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            base = self._ends[at] - len(parts_of_split[at])
            take = min(stop, int(self._ends[at]))
            parts.append(parts_of_split[at][start - base : take - base])
            start, at = take, at + 1
        if len(parts) == 1:
            return np.asarray(parts[0])
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def open_store(config):
    """-> ({"train": TokenStore, "valid": TokenStore}, tokenizer), with "test" where there is data.test_path. Builds the store
    where it does not exist yet."""
    folder, sources = locate_store(config)
    workers = config.data.workers or len(os.sched_getaffinity(0))
    with main_first("token store"):
        if not (folder / "manifest.json").is_file():
            build_store(config, folder, sources, workers)
    manifest = read_manifest(folder)
    skipped = manifest["skipped"]
    if skipped["count"] and is_main():
        print(f"data: {skipped['count']:,} of {skipped['count'] + sum(s['documents'] for s in manifest['splits'].values()):,} "
              f"records were left out (data.on_error=skip), all told of in {folder / 'manifest.json'}; the first: "
              f"{skipped['first'][0]}", file=sys.stderr)
    stores = {split: TokenStore(folder, split, manifest) for split in manifest["splits"]}
    return stores, load_tokenizer((folder / "tokenizer.json").read_text())


def read_manifest(folder: pathlib.Path) -> dict:
    """manifest.json, its files checked to be there, whole: what the store's own name vouches for (a shard elsewhere: unchanged).
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        size = shard["offset"] + shard["tokens"] * np.dtype(shard["dtype"]).itemsize
        try:
            there = os.path.getsize(folder / shard["file"])
        except OSError:
            there = 0
        if there < size:
            raise UserError(f"{folder / shard['file']}: {there:,} of {size:,} bytes are there; remove {folder}, and it is made "
                            "again")
    return manifest


def store_root(config) -> pathlib.Path:
    root = config.data.store_dir or os.environ.get("JAXLM_CACHE") or os.path.expanduser("~/.cache/jaxlm")
    return pathlib.Path(root, "tokens")


# ---- Which store -----------------------------------------------------------------------------------------------------------


def locate_store(config) -> tuple[pathlib.Path, dict[str, dict[str, dict]]]:
    """-> its folder, {"train", "valid" or "test": {file: {"sha256", "bytes", "state"}}}. Its name is a fingerprint of the
    files' contents and every setting that changes the tokens."""
    d = config.data
    paths = {"train": ("data.path", d.path), "valid": ("data.valid_path", d.valid_path), "test": ("data.test_path", d.test_path)}
    paths = {split: of for split, of in paths.items() if split == "train" or of[1]}
    splits = dict(zip(paths, find_all(config, dict(paths.values())), strict=True))
    root = store_root(config)
    others = tokenizer_files(d.tokenizer)
    facts = content_of([file for files in splits.values() for file in files] + others, root)
    settings = [VERSION, d.valid_fraction, d.tokenizer if not others else "", d.bpe_vocab_size, list(d.special_tokens),
                told(config), *([d.valid_every] if d.valid_every else [])]
    contents = [[facts[file]["sha256"] for file in files] for files in (*splits.values(), others)]
    digest = hashlib.sha256(json.dumps([settings, contents], sort_keys=True).encode()).hexdigest()[:24]
    return root / digest, {split: {file: facts[file] for file in files} for split, files in splits.items()}


def fingerprint(config) -> str:
    return locate_store(config)[0].name


def changed_sources(config, old: str) -> list[str]:
    """Which of the config's files are others than those that the store `old` was made of, by their contents: the same contents
    may have lain elsewhere when the store was made."""
    folder, splits = locate_store(config)
    now = {file: fact["sha256"] for files in splits.values() for file, fact in files.items()}
    try:
        manifest = json.loads((store_root(config) / old / "manifest.json").read_text())
        before = {fact["sha256"] for fact in manifest["sources"].values()}
    except (OSError, ValueError):
        return [f"store {old} -> {folder.name}"]
    gone = " and ".join(sorted(digest[:12] for digest in before - set(now.values()))) or "(not there)"
    return [f"{file}: sha256 {gone} -> {digest[:12]}" for file, digest in sorted(now.items()) if digest not in before] or [
        f"sha256 {gone}: no longer there" if before - set(now.values()) else f"store {old} -> {folder.name}"]


# ---- Building it -----------------------------------------------------------------------------------------------------------


def build_store(config, folder: pathlib.Path, sources: dict, workers: int) -> None:
    """sources: of `locate_store`. Raises UserError: input that cannot be read, a disk that is full, sources that change."""
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


def make_from_text(config, store, work, sources, workers) -> None:
    from jaxlm.data.workers import make_shards

    settings = reading(config)
    pieces, form = {split: cut_into_pieces(settings, files) for split, files in sources.items()}, build_form(settings)
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


# ---- A piece of the text becomes a shard -----------------------------------------------------------------------------------


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


def cut_into_pieces(settings, files: dict[str, dict]) -> list[Piece]:
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
