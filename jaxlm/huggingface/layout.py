"""How the axes of a tensor lie there and here: "(N H) D -> D N H" is there one axis of heads times head_dim, then embed; here
three axes. Letters are those of `jaxlm.models` and below; 1 is an axis of one, which is not here. `H~`: the rotated numbers of
that axis are there neighbours that turn together; here one lies in the first half of them, the other in the second."""

import math

import numpy as np

from jaxlm.config import rotated_size
from jaxlm.huggingface.tensors import as_bits


def sizes_of(config, vocab_size: int) -> dict[str, int]:
    """Of each letter; the config is resolved. M is embed too, where an axis of it is
    both input and output; C classes, B buckets of distances, Y kinds of tokens; F is the hidden size of an
    expert, G of the first dense layers, S of the shared experts together. Of latent attention: Q and Z are the sizes of the
    vectors that queries, keys and values are made of, P rotated and O other numbers of a head, W = Z + P, U of a value."""
    m = config.model
    P = rotated_size(m)
    return {
        "1": 1, "V": vocab_size, "D": m.embed_dim, "M": m.embed_dim, "N": m.num_heads, "K": m.num_kv_heads, "H": m.head_dim,
        "F": m.mlp_dim, "E": m.num_experts, "T": config.seq_len, "C": m.num_classes, "B": m.relative_buckets, "Y": m.token_types,
        "G": m.dense_mlp_dim or m.mlp_dim, "S": m.shared_experts * m.mlp_dim, "Q": m.query_rank, "Z": m.kv_rank, "P": P,
        "O": m.head_dim - P, "W": m.kv_rank + P, "U": m.value_head_dim or m.head_dim}


def halves(sizes: dict[str, int], letter: str) -> np.ndarray:
    """-> for each place of a `letter~` there, the one here. Rotated numbers come last there; of a head, first here."""
    size, P = sizes[letter], sizes["P"]
    rotated = np.arange(P) // 2 + np.arange(P) % 2 * (P // 2)
    others = np.arange(size - P)
    return np.concatenate([others + P, rotated] if letter == "H" else [others, rotated + size - P])


class Layout:
    """
    Attributes:
        axes: sizes of the tensor's axes, each by itself. here: shape of the parameter.
        places: of each axis, where its numbers are here; a slice: the same.
    """

    def __init__(self, text: str, sizes: dict[str, int]):
        there, here = (side.strip() for side in text.split("->"))
        ordered = {there[i - 1] for i, mark in enumerate(there) if mark == "~"}
        self.groups = self.split(there)
        letters, here_letters = sum(self.groups, []), sum(self.split(here), [])
        self.axes = tuple(sizes[letter] for letter in letters)
        self.here = tuple(math.prod(sizes[letter] for letter in group) for group in self.split(here))
        self.places = tuple(halves(sizes, letter) if letter in ordered else slice(None) for letter in letters)
        self.split_here = tuple(sizes[letter] for letter in here_letters)
        self.order = [here_letters.index(letter) for letter in letters if letter != "1"]
        self.ones = [i for i, letter in enumerate(letters) if letter == "1"]

    @staticmethod
    def split(side: str) -> list[list[str]]:
        groups, inside = [], False
        for letter in side:
            if letter == "(":
                groups.append([])
            if letter in "()":
                inside = letter == "("
            elif letter.isalnum():
                groups[-1].append(letter) if inside else groups.append([letter])
        return groups

    @property
    def keeps_order(self) -> bool:
        """Of the numbers along each axis."""
        return all(isinstance(place, slice) for place in self.places)

    def joined(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor with these `axes`."""
        sizes = iter(axes)
        return tuple(math.prod(next(sizes) for _ in group) for group in self.groups)

    def as_there(self, array_here: np.ndarray) -> np.ndarray:
        """A parameter, its axes as they are there, but not yet joined and in the order of here: a view."""
        return np.expand_dims(array_here.reshape(self.split_here).transpose(self.order), self.ones)

    def to_there(self, array_here: np.ndarray) -> np.ndarray:
        """The same, in the order of there."""
        return as_bits(self.as_there(array_here))[self.places].view(array_here.dtype)
