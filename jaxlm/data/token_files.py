"""Sources that are tokens already: nanoGPT's .bin, llm.c's .bin with its header, Megatron's .bin with .idx beside it.

They are read where they lie; the store only keeps where documents start.
"""

import os
import pathlib
import struct
from typing import NamedTuple

import numpy as np

from jaxlm.data.store import write_manifest
from jaxlm.data.tokenizers import build_tokenizer, learns
from jaxlm.errors import UserError

BLOCK = 2**24  # tokens looked through at once
LLM_C = 20240520  # first int32 of a header of 256
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class TokenFile(NamedTuple):
    file: str
    dtype: str
    offset: int  # bytes before the first id
    tokens: int
    starts: np.ndarray | None  # of documents, (documents,) int64, where the file tells; else they end with eos


def is_token_file(file: str) -> bool:
    return file.endswith((".bin", ".idx"))


def open_token_file(file: str) -> TokenFile:
    """Raises UserError: cut short, or of another kind."""
    index, size = pathlib.Path(file).with_suffix(".idx"), os.path.getsize(file)
    if index.exists():
        return open_megatron(file, index, size)
    with open(file, "rb") as source:
        head = source.read(12)
    magic, version, tokens = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    if magic == LLM_C and version == 1:
        found = TokenFile(file, "uint16", 1024, tokens, None)
    else:
        found = TokenFile(file, "uint16", 0, size // 2, None)
    if size != found.offset + 2 * found.tokens:
        raise UserError(f"{file}: {size:,} bytes are not the uint16 ids it should hold; it is cut short, or of another kind: "
                        "fetch it again, or give the .idx beside it")
    return found


def open_megatron(file: str, index: pathlib.Path, size: int) -> TokenFile:
    raw = np.memmap(index, np.uint8, "r")
    try:
        version, code, sequences, documents = struct.unpack("<QBQQ", bytes(raw[9:34]))
        if bytes(raw[:9]) != MEGATRON or version != 1 or code not in MEGATRON_DTYPES:
            raise ValueError("not an index of Megatron's, version 1, with integer ids")
        lengths = np.frombuffer(raw, "<i4", sequences, 34)
        pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
        borders = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    except (ValueError, struct.error) as error:
        raise UserError(f"{index}: cannot be read ({error}); fetch it again") from error
    dtype = np.dtype(MEGATRON_DTYPES[code])
    places = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=places[1:])
    if (pointers != places[:-1] * dtype.itemsize).any() or places[-1] * dtype.itemsize != size:
        raise UserError(f"{index}: does not belong to {file} ({size:,} bytes), or its sequences do not lie one after another; "
                        "give the pair as it was written")
    return TokenFile(file, dtype.name, 0, int(places[-1]), places[borders[:-1]])


def index_token_files(config, store: pathlib.Path, sources: dict) -> None:
    """Write tokenizer.json, the starts of documents and the manifest into `store`."""
    names = {split: [file for file in of if not file.endswith(".idx")] for split, of in sources.items()}
    problems = [f"{file}: is no .bin; token files and texts cannot be one source" for of in names.values() for file in of
                if not is_token_file(file)][:1]
    problems += [f"{file}: token files are read from local folders; copy it" for of in names.values() for file in of
                 if "://" in file][:1]
    if learns(config):
        problems.append(f"data.tokenizer={config.data.tokenizer}: is made of text, and {config.data.path} is tokens; name the "
                        "tokenizer they were made with")
    if problems:
        raise UserError(*problems)
    tokenizer = build_tokenizer(config, ())
    shards, splits, places = [], {}, {}
    for split, of in names.items():
        found = [open_token_file(os.path.abspath(file)) for file in of]
        ranges, total = [], 0
        with open(store / f"{split}-all", "wb") as out:
            for file in found:
                for starts in starts_of(file, tokenizer):
                    (starts + total).astype("<i8").tofile(out)
                ranges.append([len(shards), 0, file.tokens])
                shards.append({"file": file.file, "dtype": file.dtype, "offset": file.offset, "tokens": file.tokens,
                               "sha256": sources[split][of[found.index(file)]]["sha256"]})
                total += file.tokens
        if not total:
            raise UserError(f"data.path={config.data.path}: holds no tokens; give a file with tokens")
        places[split] = np.memmap(store / f"{split}-all", "<i8", "r")
        splits[split] = {"tokens": total, "documents": len(places[split]), "bytes": None, "ranges": ranges}
    if "valid" not in splits:
        cut_tokens(config, splits, places)
    for split, starts in places.items():
        out = np.lib.format.open_memmap(store / f"{split}-starts.npy", "w+", "<i8", starts.shape)
        for at in range(0, len(starts), BLOCK):
            out[at : at + BLOCK] = starts[at : at + BLOCK] - (starts[0] if split == "valid" else 0)
        out.flush()
    for split in names:
        (store / f"{split}-all").unlink()
    splits["valid"]["bytes"] = text_bytes(shards, splits["valid"]["ranges"], tokenizer)
    (store / "tokenizer.json").write_text(tokenizer.to_json())
    write_manifest(config, store, sources, shards, splits, tokenizer)


def ids_of(shard: dict, first: int, end: int):
    """Blocks of the ids [first, end) of a shard."""
    ids = np.memmap(shard["file"], shard["dtype"], "r", shard["offset"], (shard["tokens"],))
    for at in range(first, end, BLOCK):
        yield ids[at : min(end, at + BLOCK)]


def starts_of(file: TokenFile, tokenizer):
    """Where documents start, in blocks; every id is looked at. Raises UserError: an id that the tokenizer does not have."""
    if file.tokens and file.starts is None:
        yield np.zeros(1, np.int64)
    at = 0
    for ids in ids_of(file._asdict(), 0, file.tokens):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= tokenizer.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"{file.file}: id {wrong} at token {at + int(np.argmax(ids == wrong)):,} is not among the "
                            f"{tokenizer.vocab_size:,} of data.tokenizer; name the tokenizer that made the file")
        if file.starts is None and tokenizer.eos_id is not None:
            after = np.flatnonzero(ids == tokenizer.eos_id).astype(np.int64) + at + 1
            yield after[after < file.tokens]
        at += len(ids)
    if file.starts is not None:
        yield file.starts


def cut_tokens(config, splits, places) -> None:
    """The last data.valid_fraction of the documents, or of the tokens of the only one, become the validation split."""
    keep, train, starts = 1 - config.data.valid_fraction, splits["train"], places["train"]
    if len(starts) > 1:
        cut = min(len(starts) - 1, max(1, int(keep * len(starts))))
        border, places["train"], places["valid"] = int(starts[cut]), starts[:cut], starts[cut:]
    else:
        border = int(keep * train["tokens"])
        places["valid"] = np.array([border], np.int64)
    parts, base = {"train": [], "valid": []}, 0
    for shard, _, end in train["ranges"]:
        here = min(end, max(0, border - base))
        parts["train"] += [[shard, 0, here]] if here else []
        parts["valid"] += [[shard, here, end]] if here < end else []
        base += end
    for split, tokens in (("valid", train["tokens"] - border), ("train", border)):
        splits[split] = {"tokens": tokens, "documents": len(places[split]), "bytes": None, "ranges": parts[split]}


def text_bytes(shards, ranges, tokenizer) -> int:
    """Of the text that the tokens stand for, to tell bits per byte."""
    return sum(len(tokenizer.decode(ids[at : at + 2**20]).encode()) for shard, first, end in ranges
               for ids in ids_of(shards[shard], first, end) for at in range(0, len(ids), 2**20))
