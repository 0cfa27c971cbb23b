"""Shards: the files that documents lie in between two stages, and the sketches that lie beside them."""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxlm.data.sources import Record


@contextlib.contextmanager
def written_whole(path: pathlib.Path):
    """A file that is there complete or not at all, whenever the process is killed. Yields a binary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            yield out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value) -> None:
    with written_whole(path) as out:
        out.write(json.dumps(value, ensure_ascii=False, indent=1).encode())


@contextlib.contextmanager
def line_writer(path: pathlib.Path):
    """Yields write(object): one line of JSON each, compressed by zstandard where the name ends in .zst."""
    import zstandard

    encode = json.JSONEncoder(ensure_ascii=False).encode
    with written_whole(path) as raw:
        zst = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) if path.suffix == ".zst" else None
        out = zst or raw
        yield lambda value: out.write(encode(value).encode("utf-8", "surrogatepass") + b"\n")
        if zst:
            zst.close()


def read_lines(path: pathlib.Path) -> Iterator:
    import zstandard

    with open(path, "rb") as raw:
        binary = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        for line in io.TextIOWrapper(binary, encoding="utf-8", errors="surrogatepass", newline="\n"):
            yield json.loads(line)


def read_shard(path: pathlib.Path) -> Iterator[Record]:
    return (Record(*line) for line in read_lines(path))


def read_rows(path: pathlib.Path, rows) -> dict[int, Record]:
    """Some documents of a shard, by their place in it."""
    wanted = set(rows)
    return {row: record for row, record in enumerate(read_shard(path)) if row in wanted}


class SketchWriter:
    """Keys (rows, num_keys) of a shard, each column sorted so that a range of keys is one slice; and signatures."""

    def __init__(self):
        self.keys, self.signatures = [], []

    def add(self, keys: np.ndarray, signature: np.ndarray) -> None:
        self.keys.append(keys)
        self.signatures.append(signature)

    def write(self, path: pathlib.Path) -> None:
        keys = np.array(self.keys, np.uint64).T if self.keys else np.empty((0, 0), np.uint64)
        rows = np.argsort(keys, axis=1, kind="stable")
        for name, array in (("keys", np.take_along_axis(keys, rows, 1)), ("rows", rows.astype(np.uint32)),
                            ("signatures", np.array(self.signatures))):
            with written_whole(path.with_name(f"{path.name}.{name}.npy")) as out:
                np.save(out, array)


def open_sketch(path: pathlib.Path, name: str) -> np.ndarray:
    return np.load(path.with_name(f"{path.name}.{name}.npy"), mmap_mode="r")
