"""Optimised HLO, `compiled.as_text()`, as a list of operations, each with how often a step runs it and how many bytes of the
device's memory it moves."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
         "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
# Of no cost in memory: names for what is there already, and control flow, whose bodies are visited.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "iota", "opt-barrier", "custom-call-done"}
PRODUCTS = ("dot", "convolution")
# Of custom calls: kernels, which count as products, by how their names begin; and those that only name or reserve memory.
KERNELS = ("tpu_custom_call", "__cublas", "__cudnn", "__triton", "__onednn")
BOOKKEEPING = {"AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast"}
CALLS = re.compile(r"\b(?:body|to_apply|calls|branch_computations|true_computation|false_computation)="
                   r"(?:\{([^}]*)\}|%?([\w.\-]+))")


class Operation(NamedTuple):
    name: str
    kind: str  # all-gather, fusion, ...
    shape: str  # of the result on one device, as HLO writes it
    operands: tuple[str, ...]
    line: str

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.line)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        return [name.strip(" %") for several, one in CALLS.findall(self.line) for name in (several or one).split(",")]


class Program:
    """computations: {name: {operation's name: Operation}}, in the order they are written; entry: the name of the outermost."""

    def __init__(self, hlo: str):
        self.computations, self.entry, here = {}, "", None
        for line in hlo.splitlines():
            if match := re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$", line):
                here = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif here is not None and (operation := parse(line)):
                here[operation.name] = operation

    def walk(self, name: str = "", times: int = 1, in_loop: bool = False) -> Iterator[tuple[str, Operation, int, bool]]:
        """-> (computation, operation, how often a step runs it, in a loop) for all but what is inside fusions and reductions.
        Of a branch, all sides count; a loop that does not tell its trips counts once."""
        name = name or self.entry
        for operation in self.computations[name].values():
            yield name, operation, times, in_loop
            if operation.kind in ("while", "conditional", "call", "async-start"):
                loop = operation.kind == "while"
                for called in operation.called:
                    if called in self.computations:
                        yield from self.walk(called, times * (self.trips(operation) if loop else 1), in_loop or loop)

    def trips(self, loop: Operation) -> int:
        """XLA's own note, else the number that the condition compares with: loops that JAX makes count up from 0."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)[1]
        text = "\n".join(o.line for name in self.reached(condition) for o in self.computations[name].values())
        limits = re.findall(r"\bconstant\((\d+)\)", text)
        return max(map(int, limits)) if limits and "direction=LT" in text else 1

    def reached(self, name: str) -> list[str]:
        """The computation and those that it calls."""
        inner = [c for operation in self.computations[name].values() for c in operation.called if c in self.computations]
        return [name, *(other for c in inner for other in self.reached(c))]

    def has_product(self, operation: Operation) -> bool:
        """A matrix product, or a kernel, which is taken for one."""
        inside = [inner for name in operation.called if operation.kind == "fusion" and name in self.computations
                  for other in self.reached(name) for inner in self.computations[other].values()]
        return any(o.kind in PRODUCTS or o.target.startswith(KERNELS) for o in (operation, *inside))

    def moved(self, computation: str, operation: Operation) -> int:
        """Bytes of the device's memory that one run of the operation reads and writes: operands and results, but for what lies
        in another memory (a TPU's VMEM) and, of an array that is only sliced or updated in place, the slice alone."""
        if operation.kind in FREE or operation.kind.endswith("-done") or operation.target in BOOKKEEPING:
            return 0
        here = self.computations[computation]
        shapes = [here[name].shape for name in operation.operands if name in here]
        if operation.kind in ("copy-start", "slice-start"):  # the result names the source too: behind the copy, before the slice
            kind, dims, layout = arrays(operation.shape)[operation.kind == "slice-start"]
            copy = f"{kind}[{dims}]{layout}"
            return bytes_of(copy) * (bool(main_memory(shapes[0])) + bool(main_memory(copy)))
        if operation.kind in ("dynamic-slice", "slice", "gather"):
            return 2 * main_memory(operation.shape)
        if operation.kind == "dynamic-update-slice":
            return 2 * main_memory(shapes[1])
        if operation.kind == "fusion":
            return self.moved_by_fusion(operation, shapes)
        return sum(map(main_memory, shapes)) + main_memory(operation.shape)

    def moved_by_fusion(self, operation: Operation, shapes: list[str]) -> int:
        inner = self.computations[operation.called[0]]
        parameters = {int(re.search(r"parameter\((\d+)\)", o.line)[1]): o.name for o in inner.values() if o.kind == "parameter"}
        total, updated = 0, 0
        for i, shape in enumerate(shapes):
            users = [o for o in inner.values() if parameters[i] in o.operands]
            if main_memory(shape) and users and all(o.kind in ("dynamic-slice", "slice", "gather") for o in users):
                total += sum(bytes_of(o.shape) for o in users)
            elif users and all(o.kind == "dynamic-update-slice" and o.operands[0] == parameters[i] for o in users):
                updates = sum(bytes_of(inner[o.operands[1]].shape) for o in users)
                total, updated = total + 2 * updates, updated + main_memory(shape)
            else:
                total += main_memory(shape)
        return total + max(0, main_memory(operation.shape) - updated)


def parse(line: str) -> Operation | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][a-z\-]*)\((.*)", line)
    if not match:
        return None
    depth = list(itertools.accumulate(((letter == "(") - (letter == ")") for letter in match[4]), initial=1))
    end = depth.index(0) if 0 in depth else len(match[4])
    return Operation(match[1], match[3], match[2], tuple(re.findall(r"%([\w.\-]+)", match[4][:end])), line)


def arrays(shape: str) -> list[tuple[str, str, str]]:
    """ "(f32[8,128]{1,0}, ...)" -> [(type, dimensions, layout), ...]."""
    return re.findall(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?", shape)


def bytes_of(shape: str) -> int:
    """Of an array, or a tuple of them."""
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims, _ in arrays(shape) if kind in BYTES)


def main_memory(shape: str) -> int:
    """As `bytes_of`, without arrays in another memory space, which the layout names: S(1) and so on."""
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims, layout in arrays(shape)
               if kind in BYTES and "S(" not in layout)
