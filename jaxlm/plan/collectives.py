"""What a compiled program sends between devices, read from its optimised HLO: which collectives, along which mesh axes, how
often a step and how many bytes. Loops are counted with their trip counts."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
         "f64": 8}
CALLS = re.compile(r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")


class Collective(NamedTuple):
    """One collective of the program text."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which it communicates
    shape: str  # of the result on one device, as HLO writes it
    times: int  # a step
    sent_bytes: int  # by one device, each time
    in_loop: bool


def collectives_of(hlo: str, mesh) -> list[Collective]:
    """hlo: `compiled.as_text()`, optimised and partitioned. Counts as sent what a ring needs: (g-1)/g of the result of an
    all-gather or the operand of a reduce-scatter among g devices, twice that for an all-reduce. Of a branch, all
    sides count."""
    bodies, entry = split_computations(hlo)
    found = []

    def visit(name: str, times: int, in_loop: bool):
        for line in bodies[name]:
            operation = re.search(r"=\s+(\S.*?)\s+([a-z0-9-]+)\(", line)
            if not operation:
                continue
            shape, kind = operation[1], operation[2].removesuffix("-start")
            if kind in KINDS:
                groups = groups_of(line, mesh.size)
                found.append(Collective(kind, axes_of(groups, mesh), plain(shape), times, sent(kind, shape, groups), in_loop))
                continue
            loop, known = kind == "while", re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
            called = [name.strip(" %") for several, one in CALLS.findall(line) for name in (several or one).split(",")]
            for name in called:
                if name in bodies:
                    visit(name, times * (int(known[1]) if loop and known else 1), in_loop or loop)

    visit(entry, 1, False)
    return found


def split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, name = {}, "", ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$", line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def groups_of(line: str, devices: int) -> np.ndarray:
    """Devices that talk to one another: one row a group (or a pair, of a permute)."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return np.array([[int(i) for i in pair] for pair in re.findall(r"(\d+),(\d+)", match[1])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return iota(match[2], match[3]).reshape(numbers(match[1]))
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{(.*?)\}", line):
        return groups_of_named(*match.groups())
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return np.array([[int(i) for i in group.split(",")] for group in match[1].split("},{")])
    return np.arange(devices)[None]


def numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def iota(dims: str, order: str | None) -> np.ndarray:
    """ "4,2", "1,0" -> the devices in the order of HLO's [4,2]T(1,0)."""
    devices = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return devices.transpose(numbers(order)) if order else devices


def groups_of_named(sizes: str, dims: str | None, order: str | None, named: str) -> np.ndarray:
    """HLO's mesh['a'=4,'b'=2] {'b'}, or of a part of an axis, {'a':(2)2}: the inner 2 after an outer 2."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
    devices = np.arange(math.prod(sizes.values())) if dims is None else iota(dims, order).reshape(-1)
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    wanted = {name: (int(before or 1), int(n or sizes[name])) for name, before, n in parts}
    shape, inside = [], []
    for name, size in sizes.items():
        before, n = wanted[name] if name in wanted else (size, 1)
        inside.append(len(shape) + 1)
        shape += [before, n, size // before // n]
    outside = [i for i in range(len(shape)) if i not in inside]
    return devices.reshape(shape).transpose(outside + inside).reshape(-1, math.prod(shape[i] for i in inside))


def axes_of(groups: np.ndarray, mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), axis=-1)  # partition ids follow the mesh's order
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, yes in zip(mesh.shape, differs, strict=True) if yes)


def size_of(shape: str) -> int:
    """Bytes of "f32[8,128]{1,0}" or a tuple of such."""
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
               for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape) if kind in BYTES)


def plain(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def sent(kind: str, shape: str, groups: np.ndarray) -> int:
    members, size = groups.shape[-1], size_of(shape)
    share = {"all-gather": (members - 1) / members, "reduce-scatter": members - 1, "all-reduce": 2 * (members - 1) / members,
             "all-to-all": (members - 1) / members, "ragged-all-to-all": 1, "collective-permute": 1}[kind]
    return round(size * share)


def summary(collectives: list[Collective]) -> dict:
    """{"all-gather fsdp": {"times", "bytes"}, ...}: a step, on one device."""
    out = {}
    for c in collectives:
        line = out.setdefault(f"{c.kind} {'+'.join(c.axes) or 'none'}", {"times": 0, "bytes": 0})
        line["times"] += c.times
        line["bytes"] += c.times * c.sent_bytes
    return dict(sorted(out.items()))
