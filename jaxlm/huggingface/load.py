"""Hugging Face -> jaxlm: tensors are streamed from the files straight into arrays on the mesh, or into a checkpoint."""

import concurrent.futures
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.checkpoint.chunks import StepWriter
from jaxlm.checkpoint.fingerprints import fingerprint_of
from jaxlm.config import apply_overrides, import_parts, resolve
from jaxlm.errors import UserError
from jaxlm.huggingface.hub import local_folder
from jaxlm.huggingface.mapping import match_names, places_of, tensors_of
from jaxlm.huggingface.quantized import dequantized
from jaxlm.huggingface.tensors import GATHERED_BYTES, PIECE_BYTES, THREADS, as_bits, copy_over, open_tensors, parse_json
from jaxlm.models.families.family import Family, apply, read_config
from jaxlm.parallel.distributed import gather, num_processes, process_id
from jaxlm.train.heap import Scratch, empty, give_back_freed_memory
from jaxlm.train.state import Model, flatten_paths, is_spec, parameter_shardings, size_of
from jaxlm.validation import validate


class Source(NamedTuple):
    """A Hugging Face folder, opened: nothing but headers has been read."""

    folder: str  # where it is here, also of one from the Hub
    values: dict  # config.json
    family: Family
    config: ConfigDict  # of jaxlm: defaults, what config.json says, and the overrides
    tensors: dict  # {name: tensor}


def open_source(folder: str, overrides=()) -> Source:
    """Raises UserError: no such folder, or a model that jaxlm has not."""
    from configs import default

    folder = local_folder(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint, or org/name of the Hub")
    config = default.get_config()
    apply_overrides(config, [o for o in overrides if o.startswith("--config.imports=")])
    if problems := import_parts(config.imports):
        raise UserError(*problems)
    values = parse_json(pathlib.Path(folder, "config.json"))
    family, keys = read_config(values)
    tensors = open_tensors(folder)
    if "quantization_config" in values:
        tensors = dequantized(tensors, values["quantization_config"])
    apply(config, keys)
    narrow = all(t.kind not in ("F32", "F16") for name, t in tensors.items() if not family.is_router(name))
    config.model.param_dtype = "bfloat16" if narrow else "float32"
    if (file := pathlib.Path(folder, "tokenizer.json")).is_file():
        config.data.tokenizer = str(file)
    config.lock()
    apply_overrides(config, overrides)
    resolve(config)
    validate(config)
    return Source(folder, values, family, config, tensors)


def is_hugging_face(folder: str) -> bool:
    """Whether there is a config.json of Hugging Face's, not of a jaxlm run."""
    file = pathlib.Path(folder, "config.json")
    try:
        return "model_type" in json.loads(file.read_text())
    except (OSError, ValueError):
        return False


def load_params(source: Source, model: Model, mesh, vocab_size: int = 0, spare=frozenset(), instead_of: Any = None) -> Any:
    """The parameters, each born on its devices. In host memory there is at most one of them, all its layers together, beside
    those that are done: none, where they stay in host memory.

    instead_of: parameters of the same tree, each of which is deleted before its successor is read.
    Raises UserError: tensors that are missing, unknown or misshapen, all by name.
    """
    specs, old = flatten_paths(model.specs), flatten_paths(instead_of or {})
    places, found = find(source, specs, vocab_size, spare)
    shardings = flatten_paths(parameter_shardings(mesh, model, source.config.mesh.zero_stage))

    def load(path):
        spec, pieces = specs[path], {}  # a piece that several devices hold is read once
        if path in old:
            old[path].delete()

        def piece(index):
            key = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
            if key not in pieces:
                pieces[key] = read_piece(places[path], spec, index, found)
            return pieces[key]

        array = jax.make_array_from_callback(spec.shape, shardings[path], piece)
        return jax.block_until_ready(array)

    # The largest first: what a parameter takes beside its own place is then least where the most is there already.
    loaded = {path: load(path) for path in sorted(specs, key=lambda path: -size_of(specs[path]))}
    return jax.tree.structure(model.specs, is_leaf=is_spec).unflatten(loaded[path] for path in specs)


def write_params(specs: dict, places: dict, found: dict, step: StepWriter) -> dict[str, int]:
    """The parameters, of which `find` told, into a checkpoint; several processes share them out. -> {path: fingerprint}. In host
    memory there is one layer's part of a parameter for each of THREADS."""
    mine = sorted(specs, key=lambda path: -size_of(specs[path]))[process_id() :: num_processes()]
    scratch, prints = Scratch(), {}

    def write(path, leaf, number, at):
        place, here = places[path], scratch.array(places[path].layout.here, specs[path].dtype)
        fill(place, found[place.name_of(at)], here)
        leaf.write(here, number * here.nbytes)
        return fingerprint_of(here[(None,) * len(at)], (*at, *[0] * here.ndim))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, concurrent.futures.ThreadPoolExecutor(1) as disk:
        parts, synced = {}, []
        for path in mine:
            leaf = step.leaf(("params", *path.split("/")), specs[path].shape, specs[path].dtype)
            each = np.ndindex(*specs[path].shape[: places[path].num_named])
            parts[path] = leaf, [pool.submit(write, path, leaf, number, at) for number, at in enumerate(each)]
        for path, (leaf, futures) in parts.items():
            prints[path] = sum(future.result() for future in futures) % 2**32
            synced.append(disk.submit(leaf.sync))  # while the others are written
        for future in synced:
            future.result()
    return {path: number for of in gather(prints, "parameters written") for path, number in of.items()}


def find(source: Source, specs: dict, vocab_size: int = 0, spare=frozenset()) -> tuple[dict, dict]:
    """-> ({path: Place}, {name: tensor}) of the parameters `specs`."""
    places = places_of(source.family, specs, source.config, vocab_size or specs["embedding"].shape[0])
    return places, match_names(source.family, tensors_of(places, specs), source.tensors, spare)


def has_params(source: Source, model: Model, numbers, threads: int = THREADS) -> bool:
    """Whether `load_params` would give, bit for bit, the parameters of which `numbers` tells: (path, index in its stacked axes)
    -> an array. With one thread it is asked for all of them, always in the same order."""
    specs, scratch = flatten_paths(model.specs), Scratch()
    places, found = find(source, specs)
    each = ((path, at) for path, place in places.items() for at in np.ndindex(*specs[path].shape[: place.num_named]))

    def is_same(path, at):
        return is_filled(places[path], found[places[path].name_of(at)], numbers(path, at), scratch)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return all(list(pool.map(is_same, *zip(*each, strict=True))))


def read_piece(place, spec, index: tuple[slice, ...], found: dict) -> np.ndarray:
    """The part `index` of a parameter, from one tensor for each layer (and expert)."""
    n = place.num_named
    ranges = [range(*s.indices(size)) for s, size in zip(index, spec.shape, strict=True)]
    out = empty([len(r) for r in ranges], np.dtype(spec.dtype))
    inner = tuple(slice(r.start, r.stop) for r in ranges[n:])
    whole = all(len(r) == size for r, size in zip(ranges[n:], spec.shape[n:], strict=True))

    def read(at):
        tensor = found[place.name_of(tuple(r[i] for r, i in zip(ranges, at, strict=False)))]
        here = out[at] if whole else np.empty(spec.shape[n:], spec.dtype)
        fill(place, tensor, here)
        if not whole:
            out[at] = here[inner]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, np.ndindex(*out.shape[:n])):
            pass  # an error of a thread comes out here
    give_back_freed_memory()
    return out


def fill(place, tensor, here: np.ndarray) -> None:
    """One tensor (or the part of it that `place` tells) -> a parameter of one layer, a piece at a time."""
    there = place.layout.as_there(here)  # a view, whose first axes may be several that are one in the tensor
    inner = tensor.shape[0] // place.whole[0]
    if place.axis == 0 and there.flags.c_contiguous and place.layout.keeps_order and tensor.dtype == here.dtype:
        tensor.read_into(there, place.start * inner)
        return
    for at, piece in pieces(place, tensor, here.dtype):
        if place.layout.keeps_order:
            copy_over(there[at[0]], piece)
        else:
            as_bits(there)[at] = as_bits(piece)


def is_filled(place, tensor, here: np.ndarray, scratch: Scratch) -> bool:
    """Whether `here` is, bit for bit, what `fill` would make it."""
    there = place.layout.as_there(here)
    for at, piece in pieces(place, tensor, here.dtype, GATHERED_BYTES):
        live = scratch.array(piece.shape, piece.dtype)
        copy_over(live, as_bits(there)[at].view(piece.dtype))
        if not np.array_equal(as_bits(live), as_bits(piece)):
            return False
    return True


def pieces(place, tensor, dtype: np.dtype, size: int = PIECE_BYTES):
    """Of the part of a tensor that `place` tells: (index among its axes as they are there, numbers)."""
    first_places, *others = place.layout.places
    count, inner = place.layout.axes[0], tensor.shape[0] // place.whole[0]  # rows of the tensor in one step along the first axis
    skipped = place.start if place.axis == 0 else 0
    step = max(1, size // max(1, math.prod(place.whole[1:]) * tensor.dtype.itemsize))
    for first in range(0, count, step):
        last = min(first + step, count)
        piece = tensor.rows((skipped + first) * inner, (skipped + last) * inner).reshape(-1, *place.whole[1:])
        piece = piece if place.axis == 0 else piece[place.slices]
        at = slice(first, last) if isinstance(first_places, slice) else first_places[first:last]
        yield (at, *others), piece.astype(dtype, copy=False)
