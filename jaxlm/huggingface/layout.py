"""How the axes of a tensor lie there and here: "(N H) D -> D N H" is there one axis of heads times head_dim, then embed; here
three axes. Letters are those of `jaxlm.models`."""

import math

import numpy as np


def sizes_of(config, vocab_size: int) -> dict[str, int]:
    """Of each letter; the config is resolved."""
    m = config.model
    return {"V": vocab_size, "D": m.embed_dim, "N": m.num_heads, "K": m.num_kv_heads, "H": m.head_dim, "F": m.mlp_dim,
            "E": m.num_experts, "T": config.seq_len}


class Layout:
    """
    Attributes:
        there, here: shapes of the tensor and of the parameter.
    """

    def __init__(self, text: str, sizes: dict[str, int]):
        there, here = (side.strip() for side in text.split("->"))
        self.letters = [letter for letter in there if letter.isalpha()]
        here_letters = [letter for letter in here if letter.isalpha()]
        self.there, self.here = (self.shape(side, sizes) for side in (there, here))
        self.split_here = tuple(sizes[letter] for letter in here_letters)
        self.order = [here_letters.index(letter) for letter in self.letters]

    @staticmethod
    def shape(side: str, sizes) -> tuple[int, ...]:
        groups, inside = [], False
        for letter in side:
            if letter == "(":
                groups.append([])
            if letter in "()":
                inside = letter == "("
            elif letter.isalpha():
                groups[-1].append(letter) if inside else groups.append([letter])
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)

    def as_there(self, array_here: np.ndarray) -> np.ndarray:
        """A parameter, its axes in the order that they have there but not yet joined: a view."""
        return array_here.reshape(self.split_here).transpose(self.order)

    def to_there(self, array_here: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.as_there(array_here)).reshape(self.there)
