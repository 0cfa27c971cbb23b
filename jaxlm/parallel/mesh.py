"""The named mesh of a run: which device stands where."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm.config import layer_period
from jaxlm.errors import UserError
from jaxlm.parallel.pipeline import microbatches
from jaxlm.parallel.rules import BATCH

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
SLOW = ("data", "fsdp", "stage")  # axes that may reach over the slow network between slices or nodes


def build_mesh(config, devices=None, sizes: dict | None = None) -> Mesh:
    """The mesh of `config.mesh`, its axes in the order AXES, all `AxisType.Auto`.

    sizes: of the axes, in place of the config's (`automatic.choose_axes`). With a `dcn_` factor the outer part of that axis goes
    over slices (TPU) or processes. Raises UserError with everything that does not fit, each with the nearest values that do.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes or axis_sizes(config, len(devices))
    if problems := mesh_problems(config, sizes, len(devices)):
        raise UserError(*problems)
    slow = {axis: getattr(config.mesh, f"dcn_{axis}") if axis in SLOW else 1 for axis in AXES}
    used = devices[: math.prod(sizes.values())]
    if len({d.process_index for d in used}) < len({d.process_index for d in devices}):
        raise UserError(f"mesh of {len(used)} devices: leaves some of the processes without a device; start fewer processes, or "
                        f"make the mesh one of {len(devices)} devices")
    if math.prod(slow.values()) > 1:
        grid = hybrid_grid(used, sizes, slow)
    elif used[0].platform == "tpu":
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), used)  # follows the torus
    else:
        grid = np.array(used).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def hybrid_grid(devices, sizes: dict, slow: dict) -> np.ndarray:
    """Devices such that along each axis the outer `slow` part changes slice (or process) and the inner part stays in one."""
    group_of = lambda d: getattr(d, "slice_index", d.process_index)
    groups = {}
    for device in devices:
        groups.setdefault(group_of(device), []).append(device)
    count, inner = math.prod(slow.values()), [sizes[a] // slow[a] for a in AXES]
    if len(groups) != count or any(len(g) != len(devices) // count for g in groups.values()):
        sizes_found = sorted({len(g) for g in groups.values()})
        raise UserError(f"mesh.dcn_*: their product is {count}, but the devices form {len(groups)} groups (slices or processes) "
                        f"of {sizes_found}; make the product {len(groups)}")
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        return mesh_utils.create_hybrid_device_mesh(inner, tuple(slow.values()), devices)
    outer = np.array([np.array(groups[g]).reshape(inner) for g in sorted(groups)], object)
    outer = outer.reshape(*slow.values(), *inner)
    order = [place for i in range(len(AXES)) for place in (i, i + len(AXES))]  # each slow part beside its fast part
    return outer.transpose(order).reshape(tuple(sizes.values()))


def axis_sizes(config, num_devices: int) -> dict[str, int]:
    """{"data": 4, ...}, with -1 (the rest of the devices) filled in; 0 where the others already ask for too many."""
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    return {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}


def mesh_problems(config, sizes: dict, num_devices: int) -> list[str]:
    """Every way in which this mesh does not fit the devices or the model, one line each with the nearest values that do."""
    problems, m = [], config.model
    open_axes = [axis for axis in AXES if getattr(config.mesh, axis) == -1]
    used = math.prod(sizes.values())
    if not 0 < used <= num_devices or (used < num_devices and open_axes):
        fixed = {axis: n for axis, n in sizes.items() if n > 1 and axis not in open_axes}
        known = math.prod(fixed.values())
        problems.append(f"mesh {fixed or sizes} takes {known} devices or a multiple, and there are {num_devices}; choose sizes "
                        f"whose product divides {num_devices}, such as {nearest_divisors(known, num_devices)}")
        sizes = {axis: max(1, n) for axis, n in sizes.items()}
    for axis in SLOW:
        slow = getattr(config.mesh, f"dcn_{axis}")
        if slow < 1 or sizes[axis] % slow:
            problems.append(f"mesh.dcn_{axis}={slow}: must divide mesh.{axis}={sizes[axis]}; "
                            f"use {nearest_divisors(max(1, slow), sizes[axis])}")

    def divides(value, name, axes):
        """`value` things are dealt out over the product of these mesh axes."""
        product = math.prod(sizes[a] for a in axes)
        if product > 1 and value % product:
            by = " x ".join(axes)
            problems.append(f"{name}={value} is not divisible by mesh {by} = {product}; use {name}="
                            f"{nearest_multiples(value, product)}, or mesh {by} = {nearest_divisors(product, value)}")

    micro = config.batch_size // config.grad_accum_steps
    divides(micro, "batch_size / grad_accum_steps", BATCH)
    divides(config.eval.batch_size, "eval.batch_size", BATCH)
    divides(m.num_heads, "model.num_heads", ("tensor",))
    if m.num_heads % sizes["tensor"] == 0:
        divides(m.num_kv_heads, "model.num_kv_heads", ("tensor",))
    divides(m.mlp_dim, "model.mlp_dim", ("tensor",))
    divides(m.dense_mlp_dim, "model.dense_mlp_dim", ("tensor",))
    if m.feedforward == "moe":
        divides(m.num_experts, "model.num_experts", ("expert",))
    divides(m.embed_dim, "model.embed_dim", ("fsdp",))
    divides(config.seq_len, "seq_len", ("context", "tensor"))
    if sizes["context"] > 1 and config.kernels.attention != "auto":
        problems.append(f"kernels.attention={config.kernels.attention!r}: mesh.context={sizes['context']} attends by its own "
                        "tiles (kernels.context), not by a backend; use kernels.attention=auto")
    for axis in ("context", "stage"):
        for key, value in (("position", "relative"), ("family", "encoder_decoder"), ("prefix_attention", True)):
            if sizes[axis] > 1 and getattr(m, key) == value:
                problems.append(f"model.{key}={value!r}: cannot be cut up over mesh.{axis}={sizes[axis]}; use mesh.{axis}=1")
    if sizes["context"] > 1 and config.kernels.context == "ring":
        if m.attention_sinks:
            problems.append("model.attention_sinks=True: the ring has no attention sinks; use kernels.context=all_gather")
        if m.family == "encoder":
            problems.append("model.family='encoder': the ring sees only what comes before; use kernels.context=all_gather")
    chunks = 2 * sizes["context"]
    if sizes["context"] > 1 and config.kernels.context == "ring" and config.seq_len % chunks:
        problems.append(f"seq_len={config.seq_len} is not divisible by 2 x mesh context = {chunks} (the ring deals two chunks to "
                        f"each device); use seq_len={nearest_multiples(config.seq_len, chunks)}, or kernels.context=all_gather")
    return problems + (pipeline_problems(config, sizes, micro) if sizes["stage"] > 1 else [])


def pipeline_problems(config, sizes: dict, micro: int) -> list[str]:
    problems, m = [], config.model
    runs, period = sizes["stage"] * config.mesh.pipeline_repeats, layer_period(m)
    if config.mesh.pipeline_repeats < 1 or m.num_layers % (runs * period):
        each = f" x length of model.window_pattern and rope_pattern = {runs * period}" if period > 1 else f" = {runs}"
        problems.append(f"model.num_layers={m.num_layers} is not divisible by mesh stage x mesh.pipeline_repeats{each}; "
                        f"use model.num_layers={nearest_multiples(m.num_layers, runs * period)}")
    if m.first_dense_layers:
        problems.append(f"model.first_dense_layers={m.first_dense_layers}: a pipeline's layers must be alike; use mesh.stage=1")
    asked, stages = config.mesh.pipeline_microbatches, sizes["stage"]
    for name, rows in (("batch_size / grad_accum_steps", micro), ("eval.batch_size", config.eval.batch_size)):
        over = math.prod(sizes[a] for a in BATCH)
        if rows % over == 0 and not microbatches(rows // over, stages, asked):
            parts = asked or f"{stages} to {2 * stages}"
            problems.append(f"{name}: {rows // over} rows a device cannot be cut into {parts} micro-batches, one or more for "
                            f"each of {stages} stages (mesh.pipeline_microbatches={asked}); use a multiple of "
                            f"{max(asked, stages)}")
    return problems


def nearest_divisors(value: int, whole: int) -> str:
    """The divisors of `whole` next to `value`, as words: '2 or 4'."""
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = max((d for d in divisors if d <= value), default=1)
    above = min((d for d in divisors if d > value), default=None)
    return f"{below}" if above is None or below == value else f"{below} or {above}"


def nearest_multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    return f"{low} or {low + factor}" if low else f"{factor}"
