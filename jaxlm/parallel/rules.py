"""The one table that maps logical axes to mesh axes, and what follows from it: shardings of parameters, and constraints
on activations. Model code names logical axes only; outside `under_mesh` a constraint does nothing."""

import functools
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MEMBER = "member"  # the mesh axis of an ensemble: each member has a whole model on one device, and sees no mesh
BATCH = ("data", "fsdp", "expert")  # expert parallelism spreads rows too: only the experts differ between its devices

RULES = {
    # Parameters.
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "layers": "stage",
    # Activations.
    "batch": BATCH,
    "seq": "context",
    "norm_seq": ("context", "tensor"),  # the residual stream and its norms: Megatron's sequence parallelism (arXiv:2205.05198)
    "expert_batch": ("data", "fsdp"),  # rows of arrays that are cut up over experts
    "stage": "stage",
    None: None,
}


def rules_of_parameters(zero_stage: int) -> dict:
    """ZeRO-3 cuts parameters up over fsdp, ZeRO-1 only the optimizer state (Rajbhandari et al., arXiv:1910.02054)."""
    return {**RULES, "embed": None} if zero_stage == 1 else RULES


def spec_of_axes(axes: tuple, rules: dict = RULES) -> PartitionSpec:
    """Logical axes -> PartitionSpec. Raises ValueError: an axis without a rule, or two that want one mesh axis."""
    used, spec = set(), []
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"logical axis {axis!r} is not in RULES")
        names = rules[axis]
        for name in (names,) if isinstance(names, str) else names or ():
            if name in used:
                raise ValueError(f"logical axes {axes} would use mesh axis {name!r} twice")
            used.add(name)
        spec.append(names)
    return PartitionSpec(*spec)


def sharding_of(mesh: Mesh, axes: tuple, shape: tuple, rules: dict = RULES) -> NamedSharding:
    """The sharding of a parameter. A dimension that the mesh cannot divide (a vocabulary of 65) is not sharded."""
    return NamedSharding(mesh, fit(spec_of_axes(axes, rules), shape, mesh))


def fit(spec: PartitionSpec, shape: tuple, mesh) -> PartitionSpec:
    """The spec without the dimensions that the mesh cannot divide."""
    return PartitionSpec(*(
        names if names is None or size % math.prod(mesh.shape[n] for n in np.atleast_1d(names)) == 0 else None
        for names, size in zip(spec, shape, strict=True)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the arrays (B, T) of a batch."""
    return NamedSharding(mesh, spec_of_axes(("batch", "seq")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def under_mesh(mesh: Mesh, function):
    """`function`, traced with `mesh` as the ambient one. To be jitted; a mesh of one device changes nothing."""
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def mesh_size(*names: str) -> int:
    """Devices of the ambient mesh along these axes; 1 without one. Known while tracing."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names) if mesh.axis_names not in ((), (MEMBER,)) else 1


def on_a_mesh() -> bool:
    """There is an ambient mesh of more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and mesh.axis_names != (MEMBER,)


def constrain(x, *axes):
    """Lay `x` out by its logical axes on the ambient mesh. It changes where numbers are, never what they are."""
    if not on_a_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec_of_axes(axes), x.shape, jax.sharding.get_abstract_mesh()))
