"""Which parameter lies where: the table at the start of a run and of `jaxlm plan --table`."""

import math

import jax

from jaxlm.parallel.rules import rules_of_parameters, sharding_of


def sharding_table(mesh, specs: dict, zero_stage: int) -> list[str]:
    """Lines: parameter, shape, spec, bytes of it on one device. specs: {path: ParamSpec}."""
    rows, total = [("parameter", "shape", "axes of the mesh", "bytes a device")], 0
    for path, spec in specs.items():
        sharding = sharding_of(mesh, spec.axes, spec.shape, rules_of_parameters(zero_stage))
        size = math.prod(sharding.shard_shape(spec.shape)) * spec.dtype.itemsize
        total += size
        used = [None if names is None or mesh_product(mesh, names) == 1 else names for names in sharding.spec]
        rows.append((path, "x".join(map(str, spec.shape)), ", ".join(words(names) for names in used) or "-", f"{size:,}"))
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]


def mesh_product(mesh: jax.sharding.Mesh, names) -> int:
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def words(names) -> str:
    return "-" if names is None else names if isinstance(names, str) else "+".join(names)
