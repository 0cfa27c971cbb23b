"""The token store: an immutable folder of memory-mapped tokens, made once and found again by its fingerprint.

    <store_dir>/tokens/<fingerprint>/manifest.json tokenizer.json {00000,00001,...}.bin {train,valid}-starts.npy

A split is one long array of ids and the places where its documents start. It lies in ranges of shards; a shard is a file of ids,
in the folder or, where the source is tokens already, elsewhere. Where documents are examples (data.form), {00000,...}.marks has a
byte for each id: 1 where the model is to tell it, 0 where it is given.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
import time

import numpy as np

from jaxlm.data.formats import open_binary
from jaxlm.data.sources import find_all, told
from jaxlm.data.tokenizer_files import tokenizer_files
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import is_main, main_first

VERSION = 2  # of what lies in the folder


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
            from jaxlm.data.building import build_store

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


def content_of(files: list[str], root: pathlib.Path) -> dict[str, dict]:
    """{file: {"sha256", "bytes", "state"}}. What was hashed once is not read again while size, times and inode (elsewhere: what
    the file system says of the object) stay the same; a file that was touched just now is, as it may change unseen."""
    memory = root / f"hashes-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    began, states = time.time(), {file: state_of(file) for file in files}
    facts = {file: known[file] for file, (state, _) in states.items() if file in known and known[file]["state"] == state}
    new = [file for file in states if file not in facts]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for file, (digest, size) in zip(new, pool.map(hash_file, new), strict=True):
            facts[file] = {"sha256": digest, "bytes": size, "state": states[file][0]}
    lasting = {file: fact for file, fact in facts.items() if states[file][1] < began - 2}
    if lasting != known:
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(lasting))
            temporary.replace(memory)
        except OSError:
            pass  # then they are hashed again next time
    return facts


def state_of(file: str) -> tuple[str, float]:
    """(what is another if the file is another, when it was last changed)."""
    if "://" not in file:
        found = os.stat(file)
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}", max(found.st_mtime, found.st_ctime)
    from fsspec.core import url_to_fs

    system, path = url_to_fs(file)
    return str(system.ukey(path)), 0.0


def hash_file(file: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open_binary(file) as source:
        while block := source.read(2**20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
