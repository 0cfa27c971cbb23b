"""The one Registry class: a named choice of a config is looked up here and nowhere else."""

import difflib
from collections.abc import Callable, Iterator

from jaxlm.errors import UserError


class Registry:
    """Names to functions or classes of one kind (norm, optimizer, source, ...).

    >>> NORMS = Registry("norm", key="model.norm")
    >>> @NORMS.register("rms")
    ... class RMSNorm: ...
    """

    def __init__(self, kind: str, key: str):
        self.kind = kind
        self.key = key  # the config key that chooses among the names, for error messages
        self._entries: dict[str, Callable] = {}

    def register(self, name: str) -> Callable:
        def add(entry):
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> Callable:
        if name not in self._entries:
            raise UserError(f"{self.key}={name!r}: unknown {self.kind}; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def did_you_mean(name: str, valid) -> str:
    """The remedy half of an error line: the nearest valid name, or all of them."""
    near = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(map(str, valid)))}"
