"""The named mesh, and the one table that maps a parameter's logical axes to it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")

RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}


def build_mesh(config, devices=None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config.mesh, axis) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    shape = [len(devices) // known if size == -1 else size for size in shape]
    used = math.prod(shape)
    if not 0 < used <= len(devices) or (used < len(devices) and -1 in [getattr(config.mesh, a) for a in AXES]):
        raise UserError(f"mesh {dict(zip(AXES, shape, strict=True))} does not fit {len(devices)} devices; "
                        "set one axis to -1 (the rest)")
    rows = shape[0] * shape[1]
    micro = config.batch_size // config.grad_accum_steps
    problems = [f"{name}={size} is not divisible by mesh data x fsdp = {rows}; use a multiple of {rows}, "
                f"or --config.mesh.data=1"
                for name, size in (("batch_size / grad_accum_steps", micro), ("eval.batch_size", config.eval.batch_size))
                if size % rows]
    if problems:
        raise UserError(*problems)
    return Mesh(np.array(devices[:used]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding_of(mesh: Mesh, axes: tuple, shape: tuple) -> NamedSharding:
    """Logical axes -> NamedSharding. An unknown axis is an error; an axis that the mesh cannot divide is not sharded."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in RULES")
        name = RULES[axis]
        spec.append(name if name is None or size % math.prod(mesh.shape[n] for n in np.atleast_1d(name)) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
