"""The token store: an immutable folder of memory-mapped tokens, made once and found again by its fingerprint.

    <store_dir>/tokens/<fingerprint>/manifest.json tokenizer.json {train,valid}-00000.bin ... {train,valid}-starts.npy
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

from jaxlm.data.sources import find_files, read_splits
from jaxlm.data.tokenizers import build_tokenizer, load_tokenizer, settings_beside
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import main_first

SHARD_TOKENS = 2**28


class TokenStore:
    """One split, as one long array of token ids, with the places where documents start."""

    def __init__(self, folder: pathlib.Path, split: str, manifest: dict):
        info = manifest["splits"][split]
        self.split, self.num_tokens, self.num_bytes = split, info["tokens"], info["bytes"]
        self._shards = [np.memmap(folder / name, manifest["dtype"], mode="r") for name in info["shards"]]
        self._ends = np.cumsum([len(s) for s in self._shards])
        self.document_starts = np.load(folder / f"{split}-starts.npy", mmap_mode="r")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop), cut off at the end of the split."""
        stop, parts = min(stop, self.num_tokens), []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            base = self._ends[shard] - len(self._shards[shard])
            take = min(stop, int(self._ends[shard]))
            parts.append(self._shards[shard][start - base : take - base])
            start, shard = take, shard + 1
        return np.concatenate(parts) if len(parts) != 1 else np.asarray(parts[0])


def open_store(config):
    """-> ({"train": TokenStore, "valid": TokenStore}, tokenizer). Builds the store where it does not exist yet."""
    root = config.data.store_dir or os.environ.get("JAXLM_CACHE") or os.path.expanduser("~/.cache/jaxlm")
    folder = pathlib.Path(root, "tokens", fingerprint(config))
    with main_first("token store"):
        if not (folder / "manifest.json").is_file():
            build_store(config, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    stores = {split: TokenStore(folder, split, manifest) for split in manifest["splits"]}
    return stores, load_tokenizer((folder / "tokenizer.json").read_text())


def fingerprint(config) -> str:
    """Of the files' contents and every setting that changes the tokens."""
    d = config.data
    settings = [d.valid_fraction, d.document, d.text_field, d.errors, d.tokenizer, d.bpe_vocab_size]
    digest = hashlib.sha256(json.dumps(settings).encode())
    files = find_files(config, d.path, "data.path")
    files += find_files(config, d.valid_path, "data.valid_path") if d.valid_path else []
    if os.path.isfile(d.tokenizer):
        digest.update(json.dumps(["first ids", settings_beside(d.tokenizer)]).encode())
        files.append(d.tokenizer)
    for file in files:
        with open(file, "rb") as source:
            digest.update(b"\0" + hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()[:24]


def build_store(config, folder: pathlib.Path) -> None:
    splits = read_splits(config)
    tokenizer = build_tokenizer(config, splits["train"] + splits["valid"])
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    several = sum(map(len, splits.values())) > 2
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"data.store_dir={folder.parent}: cannot be written ({error.strerror}); set data.store_dir or "
                        "$JAXLM_CACHE") from error
    try:
        manifest = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "splits": {}}
        for split, documents in splits.items():
            manifest["splits"][split] = write_split(temporary, split, documents, tokenizer, dtype, several)
        (temporary / "tokenizer.json").write_text(tokenizer.to_json())
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        try:
            temporary.rename(folder)
        except OSError:  # another process made the same store first
            if not (folder / "manifest.json").is_file():
                raise
    except OSError as error:
        raise UserError(f"data.store_dir={folder.parent}: writing failed ({error.strerror}); free space or set "
                        "data.store_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_split(folder, split, documents, tokenizer, dtype, several) -> dict:
    """Shards of at most SHARD_TOKENS ids; documents end with eos where there are several and the tokenizer has one."""
    starts, total, shards, digest, out = [], 0, [], hashlib.sha256(), None
    end = [tokenizer.eos_id] if several and tokenizer.eos_id is not None else []
    for document in documents:
        ids = np.concatenate([tokenizer.encode(document), end]).astype(dtype)
        starts.append(total)
        while len(ids):
            if total % SHARD_TOKENS == 0:
                if out:
                    out.close()
                shards.append(f"{split}-{len(shards):05d}.bin")
                out = open(folder / shards[-1], "wb")
            piece = ids[: SHARD_TOKENS - total % SHARD_TOKENS]
            out.write(piece.tobytes())
            digest.update(piece.tobytes())
            total, ids = total + len(piece), ids[len(piece):]
    if out:
        out.close()
    np.save(folder / f"{split}-starts.npy", np.array(starts, np.int64))
    return {"tokens": total, "documents": len(starts), "shards": shards, "sha256": digest.hexdigest(),
            "bytes": sum(len(d.encode("utf-8", "surrogatepass")) for d in documents)}
