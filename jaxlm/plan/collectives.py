"""What a compiled program sends between devices, read from its optimised HLO: which collectives, along which mesh axes, how
often a step and how many bytes. Loops are counted with their trip counts."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxlm.plan.hlo import Operation, Program, arrays, bytes_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Collective(NamedTuple):
    """One collective of the program text."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which it communicates
    shape: str  # of the result on one device, as HLO writes it
    times: int  # a step
    sent_bytes: int  # by one device, each time
    in_loop: bool


def collectives_of(hlo: str | Program, mesh) -> list[Collective]:
    """hlo: `compiled.as_text()`, optimised and partitioned. Counts as sent what a ring needs: (g-1)/g of the result of an
    all-gather or the operand of a reduce-scatter among g devices, twice that for an all-reduce. Of a branch, all
    sides count."""
    program, found = Program(hlo) if isinstance(hlo, str) else hlo, []
    for _, operation, times, in_loop in program.walk():
        for kind, shape, line in communications(program, operation):
            groups = groups_of(line, mesh.size)
            found.append(Collective(kind, axes_of(groups, mesh), plain(shape), times, sent(kind, shape, groups), in_loop))
    return found


def communications(program: Program, operation: Operation) -> list[tuple[str, str, str]]:
    """-> (kind, shape of the result, line) of each collective that the operation begins. XLA for TPU puts them into fusions: an
    all-reduce with the slice of it that a device keeps, which is a reduce-scatter; or one collective in several fusions, of
    which the first starts it."""
    kind = operation.kind.removesuffix("-start")
    if kind in KINDS:
        return [(kind, result_of(operation), operation.line)]
    if operation.kind != "fusion":
        return []
    inner = [o for name in operation.called for o in program.computations.get(name, {}).values()]
    starts = any('"AsyncCollectiveStart"' in o.line for o in inner)
    found = []
    for o in inner:
        if o.kind not in KINDS or ("chain_id=" in o.line and not starts):
            continue
        scatters = o.kind == "all-reduce" and any(p.kind == "dynamic-slice" and o.name in p.operands for p in inner)
        found.append(("reduce-scatter", operation.shape, o.line) if scatters else (o.kind, o.shape, o.line))
    return found


def result_of(operation: Operation) -> str:
    """The shape of its results. One that only starts lists its operands first, and may list flags behind."""
    if not operation.kind.endswith("-start") or operation.kind == "all-reduce-start":
        return operation.shape
    found = [(kind, dims, layout) for kind, dims, layout in arrays(operation.shape) if dims or kind != "u32"]
    return "(" + ", ".join(f"{kind}[{dims}]{layout}" for kind, dims, layout in found[len(found) // 2 :]) + ")"


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


def plain(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def sent(kind: str, shape: str, groups: np.ndarray) -> int:
    members, size = groups.shape[-1], bytes_of(shape)
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
