"""Which tensor is which parameter: a family's table, spelled out for one model, and checked against a checkpoint."""

import itertools
import re
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.huggingface.layout import Layout, sizes_of
from jaxlm.huggingface.tensors import copy_over
from jaxlm.models.families.family import Family

READ = ("F32", "F16", "BF16", "MXFP4", "FP8")  # kinds of tensors that parameters are made of


class Place(NamedTuple):
    """Where in the checkpoint a parameter lies: places [start, stop) along `axis` of the tensor `name`, whose axes are `whole`;
    one tensor for each layer and expert that the name tells."""

    name: str  # with {layer} and {expert}
    first_layer: int
    axis: int
    start: int
    stop: int
    whole: tuple[int, ...]
    layout: Layout

    @property
    def num_named(self) -> int:
        """Leading axes of the parameter that the name tells."""
        return self.name.count("{")

    def name_of(self, index: tuple[int, ...]) -> str:
        index = (index[0] + self.first_layer, *index[1:]) if index else ()
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of the tensor, its axes not joined."""
        return (*[slice(None)] * self.axis, slice(self.start, self.stop))


class Tensor(NamedTuple):
    """One tensor of the checkpoint: its shape, and for each part (parameter's path, index in its stacked axes, Place)."""

    shape: tuple[int, ...]
    parts: list

    def join(self, numbers) -> np.ndarray:
        """What it holds, its axes not joined; a view, where it is one parameter in the same order. numbers: (path, index) ->
        those of a parameter."""
        parts = [place.layout.to_there(numbers(path, index)) for path, index, place in self.parts]
        if len(parts) == 1:
            return parts[0]
        out = np.empty(self.parts[0][2].whole, parts[0].dtype)
        for part, (_, _, place) in zip(parts, self.parts, strict=True):
            copy_over(out[place.slices], part)
        return out


def places_of(family: Family, specs: dict, config, vocab_size: int) -> dict[str, Place]:
    """{parameter's path: Place}. specs: {path: ParamSpec}. Raises UserError: parameters that the family has not."""
    sizes, places = sizes_of(config, vocab_size), {}
    for tensor in family.tensors:
        if tensor.beside and tensor.beside not in specs:
            continue
        parts = [(path, Layout(text, sizes)) for path, text in tensor.parts if path in specs]
        ends = list(itertools.accumulate(layout.axes[tensor.axis] for _, layout in parts))
        name = tensor.name if family.is_outside(tensor.name) else family.prefix + tensor.name
        for (path, layout), stop in zip(parts, ends, strict=True):
            start, whole = stop - layout.axes[tensor.axis], list(layout.axes)
            whole[tensor.axis] = ends[-1]
            first = config.model.first_dense_layers if path.startswith("layers/") else 0
            places[path] = Place(name, first, tensor.axis, start, stop, tuple(whole), layout)
    for path, place in places.items():
        if place.layout.here != specs[path].shape[place.num_named:]:
            raise UserError(f"{path}: is {specs[path].shape} here, {family.model_type} has {place.layout.here}")
    if missing := [path for path in specs if path not in places]:
        raise UserError(*(f"{path}: {family.model_type} has no such parameter" for path in missing))
    return places


def tensors_of(places: dict[str, Place], specs: dict) -> dict[str, Tensor]:
    """{name: Tensor}: what a checkpoint of this model holds, layer by layer."""
    out = {}
    for path, place in places.items():
        shape = place.layout.joined(place.whole)
        for index in itertools.product(*(range(n) for n in specs[path].shape[: place.num_named])):
            out.setdefault(place.name_of(index), Tensor(shape, [])).parts.append((path, index, place))
    return out


def match_names(family: Family, wanted: dict[str, Tensor], found: dict, spare=frozenset()) -> dict:
    """{our name: tensor} of a checkpoint. Raises UserError: every tensor that is missing, unknown, misshapen or of a type that is
    not read, by its name."""
    for old, new in family.older:
        found = {re.sub(old, new, name): tensor for name, tensor in found.items()}
    bare = family.prefix if not any(name.startswith(family.prefix) for name in found) else ""
    found = {name if family.is_outside(name) else bare + name: tensor for name, tensor in found.items()}
    left_out = re.compile(f"({re.escape(family.prefix)})?({family.left_out})")
    found = {name: t for name, t in found.items() if name in wanted or not left_out.fullmatch(name)}
    names = {t.parts[0][0]: name for name, t in wanted.items()}
    for copy, path in family.copies.items():
        if copy in found and copy not in wanted and copy not in spare and path in names:
            check_copy(copy, found.pop(copy), names[path], found)
    problems = [f"{name}: is missing from the checkpoint" for name in wanted if name not in found]
    problems += [f"{name}: is in the checkpoint, and this {family.model_type} has no such tensor"
                 for name in found if name not in wanted and name not in spare]
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            problems.append(f"{name}: is {tensor.shape}, config.json says {wanted[name].shape}")
        if name in wanted and tensor.kind not in READ:
            problems.append(f"{name}: is of type {tensor.kind}; float32, float16 and bfloat16 are read")
    if problems:
        raise UserError(*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
    return found


def check_copy(name: str, copy, of: str, found: dict) -> None:
    """A tensor that is one parameter with another must be equal to it: transformers would not look at it."""
    same_rows = lambda *rows: np.array_equal(copy.rows(*rows), found[of].rows(*rows))
    if of not in found or copy.shape != found[of].shape or not all(
            same_rows(i, min(i + 1024, copy.shape[0])) for i in range(0, copy.shape[0], 1024)):
        raise UserError(f"{name}: differs from {of}, to which config.json ties it; for a head of its own, set "
                        "tie_word_embeddings to false there")
