"""Checkpoints as files of plain numbers: written a part at a time, and read without a copy.

    <step>/state/<leaf>/.zarray   a Zarr 2 array without compression: shape, dtype, and the shape of its chunks
    <step>/state/<leaf>/0.0 ...   the chunks, row-major and little-endian: one, or several along the first axis
    <step>/state/_METADATA        the names of the leaves; with this and those, Orbax restores it as its own
    <step>/meta/metadata          what jaxlm says of them, see `Checkpoints`
"""

import functools
import gc
import json
import math
import mmap
import os
import pathlib

import jax
import numpy as np

from jaxlm.checkpoint.files import sync, write_at
from jaxlm.parallel.distributed import is_main, share

CHUNK_BYTES = 2**30  # at most, where a row is not more: who restores a part of a leaf reads whole chunks


class LeafWriter:
    """A leaf in the making, whose parts may come in any order and from several threads.

    folder: there must be none yet.
    """

    def __init__(self, folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype):
        self.folder, rows = folder, shape[0] if shape else 1
        self.bytes = math.prod(shape) * dtype.itemsize
        chunks = next(n for n in range(1, rows + 1) if rows % n == 0 and (self.bytes <= n * CHUNK_BYTES or n == rows))
        self.chunk_bytes, self.ndim = self.bytes // chunks, len(shape)
        folder.mkdir()
        about = {"zarr_format": 2, "shape": shape, "chunks": (rows // chunks, *shape[1:]) if shape else (), "order": "C",
                 "dtype": dtype.name if dtype.kind == "V" else dtype.str, "fill_value": None, "dimension_separator": ".",
                 "compressor": None, "filters": None}
        (folder / ".zarray").write_text(json.dumps(about))

    def write(self, numbers: np.ndarray, at: int) -> None:
        """A contiguous array, from byte `at` of the leaf on."""
        left = numbers.reshape(-1).view(np.uint8)
        while len(left):
            chunk, start = divmod(at, self.chunk_bytes)
            part = left[: self.chunk_bytes - start]
            file = os.open(self.folder / ".".join([str(chunk), *"0" * (self.ndim - 1)]), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                write_at(file, part, start)
            finally:
                os.close(file)
            left, at = left[len(part) :], at + len(part)

    def sync(self) -> None:
        """Until it is on the disk."""
        for name in os.listdir(self.folder):
            sync(self.folder / name)


class StepWriter:
    """`<directory>/<step>/` in the making: it gets its name once all is on the disk.

    Several processes may write, each its own leaves; the directory is made and named by the first one.
    """

    def __init__(self, directory: str, step: int):
        self.target = pathlib.Path(directory, str(step))
        self.temporary = self.target.with_name(f"{step}.orbax-checkpoint-tmp")  # which Orbax clears away, should we be killed
        self.state = self.temporary / "state"
        share(lambda: self.state.mkdir(parents=True), "checkpoint directory")

    def leaf(self, keys: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype) -> LeafWriter:
        return LeafWriter(self.state / ".".join(keys), shape, dtype)

    def publish(self, meta: dict) -> None:
        """meta: as `Checkpoints` has it; its "leaves" are all there are, whoever wrote them."""
        if is_main():
            leaves = [tuple(name.split("/")) for name in meta["leaves"]]
            entry = lambda keys: {"key_metadata": [{"key": key, "key_type": 2} for key in keys],
                                  "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False}}
            tree = {"tree_metadata": {str(keys): entry(keys) for keys in leaves}, "use_ocdbt": False, "use_zarr3": False,
                    "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
            (self.temporary / "meta").mkdir()
            for file, value in (("state/_METADATA", tree), ("meta/metadata", meta)):
                (self.temporary / file).write_text(json.dumps(value))
                sync(self.temporary / file)
            self.temporary.rename(self.target)


# ---- Reading -----------------------------------------------------------------------------------------------------------------


def read_one_by_one(read, folder: pathlib.Path, abstract):
    """A tree of nested dicts, each leaf by itself: by `map_chunk`, or `read(tree with it alone, partial=True)`. The largest
    first: what reading takes beside a leaf's own place is then least where the most is there already."""
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract)
    found = {}
    for i in sorted(range(len(paths)), key=lambda i: -math.prod(paths[i][1].shape)):
        keys, leaf = paths[i]
        found[i] = map_chunk(folder / ".".join(key.key for key in keys), leaf)
        if found[i] is None:
            alone = functools.reduce(lambda inner, key: {key.key: inner}, reversed(keys), leaf)
            found[i] = jax.block_until_ready(jax.tree.leaves(read(alone, partial=True))[0])
            gc.collect()  # Orbax's futures hold what they have read in cycles
    return tree.unflatten(found[i] for i in range(len(paths)))


def map_chunk(folder: pathlib.Path, leaf):
    """A leaf that lies there as one chunk, as it is in memory: on a CPU the file's pages are the array, without a copy; it must
    not be donated. None: it lies there otherwise."""
    chunk, shape = folder / ".".join("0" for _ in leaf.shape or "0"), list(leaf.shape)
    plain = {"zarr_format": 2, "shape": shape, "chunks": shape, "order": "C", "compressor": None, "filters": None}
    try:
        about = json.loads((folder / ".zarray").read_text())
        if any(about[name] != value for name, value in plain.items()):
            return None
        if not 0 < chunk.stat().st_size == math.prod(shape) * leaf.dtype.itemsize:
            return None
    except (OSError, ValueError, KeyError):
        return None
    with open(chunk, "rb") as file:
        at_once = getattr(mmap, "MAP_POPULATE", 0)  # of Linux
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | at_once, mmap.PROT_READ)
    array = np.frombuffer(memory, leaf.dtype).reshape(shape)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
