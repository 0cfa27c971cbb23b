"""The tensors of a Hugging Face folder, read a piece at a time: safetensors, alone or in shards with an index, or PyTorch's .bin
with its weights-only loader. No pickle is executed."""

import concurrent.futures
import json
import math
import os
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.checkpoint.files import write_at
from jaxlm.errors import UserError
from jaxlm.train.heap import Scratch

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
          "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8)}  # the last two: of `quantized`
OTHER_DTYPES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1, "F8_E5M2": 1}
LONGEST_HEADER = 100_000_000
PIECE_BYTES = 2**18  # of a tensor, brought into the order of axes of here at once: they stay in a core's cache
GATHERED_BYTES = 2**21  # of a parameter, brought into the order of there: the rows that they are taken from are then long
GROWN_BYTES = 2**27
THREADS = 2  # that read or write tensors: one waits for the disk, one changes the order of axes
LINE_BYTES = 64  # of a processor's cache


def as_bits(array: np.ndarray) -> np.ndarray:
    """A view of unsigned integers: NumPy moves bfloat16 one number at a time."""
    return array.view(f"u{array.dtype.itemsize}")


def copy_over(out: np.ndarray, array: np.ndarray) -> None:
    """out[...] = array, of one type. Where their axes lie in different orders in memory, a cache line of `out` at a time: three
    times as fast as by NumPy's own order."""
    out, array = as_bits(out), as_bits(array)
    nearest = lambda a: min((i for i, n in enumerate(a.shape) if n > 1), key=lambda i: a.strides[i], default=0)
    axis, step = nearest(out), max(1, LINE_BYTES // out.itemsize)
    if not out.ndim or axis == nearest(array):
        out[...] = array
        return
    for at in range(0, out.shape[axis], step):
        part = (*[slice(None)] * axis, slice(at, at + step))
        out[part] = array[part]


class SafeTensor(NamedTuple):
    """A tensor in a safetensors file: row-major, little-endian, from byte `begin` of the file on."""

    file: pathlib.Path
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Of its first axis."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Of its first axis from `start` on, as much as `out` holds, a contiguous array of any shape."""
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.begin + start * each)
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                if not (count := file.readinto(view[done:])):
                    raise UserError(f"{self.file}: ends too soon; copy it again")
                done += count


class TorchTensor(NamedTuple):
    """A tensor of a .bin file, memory-mapped."""

    tensor: object

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    @property
    def kind(self) -> str:
        name = str(self.tensor.dtype)
        return {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}.get(name, name)

    def rows(self, start: int, stop: int) -> np.ndarray:
        import torch

        rows = self.tensor[start:stop].contiguous()
        if self.kind == "BF16":
            return rows.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return rows.numpy()

    def read_into(self, out: np.ndarray, start: int) -> None:
        count = out.size // max(1, math.prod(self.shape[1:]))
        out[...] = self.rows(start, start + count).reshape(out.shape)


def open_tensors(folder: str) -> dict:
    """{name: SafeTensor or TorchTensor}. Raises UserError: no checkpoint, or a missing or truncated file."""
    root, found, problems = pathlib.Path(folder), {}, []
    for index, single, read in (("model.safetensors.index.json", "model.safetensors", read_safetensors),
                                ("pytorch_model.bin.index.json", "pytorch_model.bin", read_bin)):
        if (root / index).is_file():
            weight_map = parse_json(root / index, "weight_map")
            for name in sorted(set(weight_map.values())):
                if os.path.basename(name) != name or not (root / name).is_file():
                    problems.append(f"{root / index}: names {name}, which is not there; copy the whole checkpoint")
                    continue
                found.update(read(root / name))
            problems += [f"{root / index}: {name} is not in {file}" for name, file in weight_map.items()
                         if name not in found and (root / file).is_file()]
            break
        if (root / single).is_file():
            found = read(root / single)
            break
    else:
        raise UserError(f"{folder}: no model.safetensors, nor its index, nor pytorch_model.bin there; give the folder of a "
                        "Hugging Face checkpoint")
    if problems:
        raise UserError(*problems)
    return found


def parse_json(file: pathlib.Path, key: str = ""):
    try:
        value = json.loads(file.read_text())
        return value[key] if key else value
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error}); copy it again") from error


def read_safetensors(path: pathlib.Path) -> dict[str, SafeTensor]:
    """The header (https://github.com/huggingface/safetensors): 8 bytes of length, JSON, then the numbers."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise UserError(f"{path}: not a safetensors file, or cut off; copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            place = lambda t, end: 8 + length + int(t["data_offsets"][end])
            found = {name: (SafeTensor(path, str(t["dtype"]), tuple(map(int, t["shape"])), place(t, 0)), place(t, 1))
                     for name, t in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: its header cannot be read ({type(error).__name__}); copy it again") from error
    problems = []
    for name, (tensor, end) in found.items():
        itemsize = DTYPES[tensor.kind].itemsize if tensor.kind in DTYPES else OTHER_DTYPES.get(tensor.kind, 0)
        if itemsize and (end - tensor.begin != math.prod(tensor.shape) * itemsize or tensor.begin < 8 + length):
            problems.append(f"{path}: {name} has a wrong length in the header; copy it again")
        elif end > size:
            problems.append(f"{path}: cut off within {name}: {size} bytes of at least {end}; copy it again")
    if problems:
        raise UserError(*problems[:3])
    return {name: tensor for name, (tensor, _) in found.items()}


def read_bin(path: pathlib.Path) -> dict[str, TorchTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: PyTorch's format, which only PyTorch reads safely; pip install torch, or convert the "
                        "checkpoint to safetensors") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch says of a file that is not one, or holds more than weights
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: PyTorch's weights-only loader refuses it ({reason}); get the checkpoint as "
                        "safetensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path}: not a state dict of tensors; get the checkpoint as safetensors")
    return {name: TorchTensor(tensor.detach()) for name, tensor in tensors.items()}


# ---- Writing ---------------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: object  # () -> np.ndarray of this many numbers in this order; its axes may be cut up, its type another

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: pathlib.Path, planned: list[Planned], shard_bytes: int, threads: int = THREADS,
                 grown=lambda path: None) -> None:
    """model.safetensors, or shards of at most `shard_bytes` and their index. One thread makes them in the order of
    `planned`. grown: is told of a file that has GROWN_BYTES more, so that they go to the disk while the rest is made."""
    shards = [[]]
    for tensor in planned:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, threads, grown)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.bytes for t in planned)},
                 "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: pathlib.Path, shard: list[Planned], threads: int, grown=lambda path: None) -> None:
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for t in shard:
        header[t.name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    scratch, begin = Scratch(), 8 + len(text)
    with open(path, "wb") as file, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()

        def write(t):
            array, place = t.make(), begin + header[t.name]["data_offsets"][0]
            step = max(1, GATHERED_BYTES * len(array) // max(1, array.nbytes))
            for at in range(0, len(array), step):
                piece = array[at : at + step].astype(t.dtype, copy=False)
                if not piece.flags.c_contiguous:
                    numbers, piece = piece, scratch.array(piece.shape, t.dtype)
                    copy_over(piece, numbers)
                write_at(file.fileno(), piece, place)
                place += piece.nbytes

        for t, _ in zip(shard, pool.map(write, shard), strict=True):  # an error of a thread comes out here
            start, end = header[t.name]["data_offsets"]
            if start // GROWN_BYTES < end // GROWN_BYTES:
                grown(path)
