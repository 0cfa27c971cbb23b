"""Which tensor is which parameter: a family's table, spelled out for one model, and checked against a checkpoint."""

import itertools
import re
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.huggingface.layout import Layout, sizes_of
from jaxlm.models.families.family import Family

HEAD = "lm_head.weight"


class Place(NamedTuple):
    """Where in the checkpoint a parameter lies: rows [start, stop) along `axis` of the tensor `name`, one for each layer and
    expert."""

    name: str  # with {layer} and {expert}
    axis: int
    start: int
    stop: int
    layout: Layout

    def name_of(self, index: tuple[int, ...]) -> str:
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))


class Tensor(NamedTuple):
    """One tensor of the checkpoint: its shape, and for each part (parameter's path, index in its stacked axes, Place)."""

    shape: tuple[int, ...]
    parts: list


def places_of(family: Family, specs: dict, config, vocab_size: int) -> dict[str, Place]:
    """{parameter's path: Place}. specs: {path: ParamSpec}. Raises UserError: parameters that the family has not."""
    sizes, places = sizes_of(config, vocab_size), {}
    for tensor in family.tensors:
        start = 0
        for path, text in tensor.parts:
            if path not in specs:
                continue
            layout = Layout(text, sizes)
            stop = start + layout.there[tensor.axis]
            prefix = "" if tensor.name == HEAD else family.prefix
            places[path] = Place(prefix + tensor.name, tensor.axis, start, stop, layout)
            start = stop
            if layout.here != specs[path].shape[specs[path].num_stacked:]:
                raise UserError(f"{path}: is {specs[path].shape} here, {family.model_type} has {layout.here}")
    if missing := [path for path in specs if path not in places]:
        raise UserError(*(f"{path}: {family.model_type} has no such parameter" for path in missing))
    return places


def tensors_of(places: dict[str, Place], specs: dict) -> dict[str, Tensor]:
    """{name: Tensor}: what a checkpoint of this model holds, layer by layer."""
    out = {}
    for path, place in places.items():
        for index in itertools.product(*(range(n) for n in specs[path].shape[: specs[path].num_stacked])):
            shape = list(place.layout.there)
            name = place.name_of(index)
            if name in out:
                shape[place.axis] += out[name].shape[place.axis]
            out[name] = Tensor(tuple(shape), [*(out[name].parts if name in out else []), (path, index, place)])
    return out


def match_names(family: Family, wanted: dict[str, Tensor], found: dict, tied: bool, spare=frozenset()) -> dict:
    """{our name: tensor} of a checkpoint. Raises UserError: every tensor that is missing, unknown, misshapen or of a type that is
    not read, by its name."""
    bare = family.prefix if not any(name.startswith(family.prefix) for name in found) else ""
    found = {name if name == HEAD else bare + name: tensor for name, tensor in found.items()}
    found = {name: t for name, t in found.items() if not re.fullmatch(re.escape(family.prefix) + f"({family.buffers})", name)}
    if tied and HEAD in found and HEAD not in spare:
        check_tied(found.pop(HEAD), found, next(name for name, t in wanted.items() if t.parts[0][0] == "embedding"))
    problems = [f"{name}: is missing from the checkpoint" for name in wanted if name not in found]
    problems += [f"{name}: is in the checkpoint, and this {family.model_type} has no such tensor"
                 for name in found if name not in wanted and name not in spare]
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            problems.append(f"{name}: is {tensor.shape}, config.json says {wanted[name].shape}")
        if name in wanted and tensor.kind not in ("F32", "F16", "BF16"):
            problems.append(f"{name}: is of type {tensor.kind}; float32, float16 and bfloat16 are read")
    if problems:
        raise UserError(*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
    return found


def check_tied(head, found: dict, embedding: str) -> None:
    """A head beside tie_word_embeddings must be the embedding: transformers would not look at it."""
    same_rows = lambda *rows: np.array_equal(head.rows(*rows), found[embedding].rows(*rows))
    if embedding not in found or head.shape != found[embedding].shape or not all(
            same_rows(i, min(i + 1024, head.shape[0])) for i in range(0, head.shape[0], 1024)):
        raise UserError(f"{HEAD}: differs from {embedding}, though config.json says tie_word_embeddings; set that to false")
