"""The devices that a plan is for, which need not be there: TPU slices as libtpu describes them, CPU devices, GPUs by name."""

import importlib.util
import os
import re
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.parallel.automatic import memory_limit_here
from jaxlm.plan.hardware import CHIPS, Chip, chip_of, parse_topology
from jaxlm.registry import did_you_mean

SIZES = {"v4": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), "v5p": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
         "v5e": (1, 4, 8, 16, 32, 64, 128, 256), "v6e": (1, 4, 8, 16, 32, 64, 128, 256)}


class Target(NamedTuple):
    name: str  # "v5p:4x4x4", "h200x8", "8 x cpu"
    chip: Chip | None  # None: its speed and memory are not known
    count: int
    slices: int
    devices: list | None  # to compile for; None where no compiler is at hand
    limit: float | None  # bytes of memory that a program can use on one device; None: not known
    missing: str  # then: what would bring one

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.devices[0].platform if self.devices else "tpu" if self.chip and self.chip.torus else "gpu"


def find(topology: str, slices: int = 1, devices: int = 0) -> Target:
    """topology: "v5p:4x4x4", "v5p-128", "h200x8"; empty for this machine's own devices. devices: so many of them.

    Raises UserError: unknown, with those that are near.
    """
    if not topology:
        import jax

        found = jax.devices()
        if devices > len(found):
            raise UserError(f"--devices={devices}: this machine has {len(found)}; give --topology for others")
        found = found[: devices or len(found)]
        kind = found[0].device_kind
        chip = chip_of(kind)
        limit = chip.memory_bytes if chip else memory_limit_here(found)
        return Target(f"{len(found)} x {kind}", chip, len(found), 1, found, limit, "")
    if match := re.fullmatch(r"([a-z]+\d+[a-z0-9-]*)x(\d+)", topology):
        chip = next((chip for chip in CHIPS if chip.name == match[1] and chip.node), None)
        if chip and int(match[2]) > 0:
            count = int(match[2]) * slices
            if count > chip.node and count % chip.node:
                raise UserError(f"--topology={topology}: nodes have {chip.node} of them; use {chip.name}x"
                                f"{count // chip.node * chip.node} or {chip.name}x{-(-count // chip.node) * chip.node}")
            devices = gpu_devices(chip, count)
            missing = "" if devices else ("XLA's compiler for GPUs is not installed: pip install 'jaxlm[gpu-plan]' (5 GB); these "
                                          "figures are of jaxlm.plan.estimate")
            return Target(topology, chip, count, slices, devices, chip.memory_bytes, missing)
    try:
        name, shape = parse_topology(topology)
        chip = next(chip for chip in CHIPS if chip.name == name and chip.torus)
    except (ValueError, StopIteration):
        raise UserError(f"--topology={topology}: unknown; {near(topology)}, or a shape such as v5p:4x4x4") from None
    count = slices
    for side in shape.split("x"):
        count *= int(side)
    if importlib.util.find_spec("libtpu") is None:
        return Target(f"{name}:{shape}", chip, count, slices, None, chip.memory_bytes,
                      "libtpu, TPU's compiler, is not installed: pip install 'jaxlm[tpu-plan]'; these figures are of "
                      "jaxlm.plan.estimate")
    return Target(f"{name}:{shape}" + (f" x {slices}" if slices > 1 else ""), chip, count, slices,
                  tpu_devices(name, shape, slices), chip.memory_bytes, "")


# What XLA asks of a GPU: multiprocessors, shared memory of each, L2 cache, clock in GHz, compute capability. From NVIDIA's data
# sheets and CUDA programming guide.
GPUS = {"a100": (108, 167936, 40 * 2**20, 1.41, (8, 0)), "a100-40gb": (108, 167936, 40 * 2**20, 1.41, (8, 0)),
        "h100": (132, 233472, 50 * 2**20, 1.98, (9, 0)), "h100-pcie": (114, 233472, 50 * 2**20, 1.755, (9, 0)),
        "h100-nvl": (132, 233472, 50 * 2**20, 1.785, (9, 0)), "h200": (132, 233472, 50 * 2**20, 1.98, (9, 0)),
        "b200": (148, 233472, 126 * 2**20, 1.965, (10, 0))}


def gpu_devices(chip: Chip, count: int) -> list | None:
    """GPUs that are not there, for XLA to compile for; None without JAX's CUDA plugin."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return None
    from jax.experimental import topologies

    cores, shared, cache, clock, (major, minor) = GPUS[chip.name]
    description = f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {round(chip.memory_bandwidth)} l2_cache_size: {cache} clock_rate_ghz: {clock}
      device_memory_size: {round(chip.memory_bytes / 0.92)} shared_memory_per_block_optin: {shared - 1024}
      cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
      registers_per_block_limit: 65536 }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{chip.kinds[0]}"
      runtime_version {{ major: 13 }}"""
    node = min(chip.node, count)
    shape = f"1x{count // node}x{node}"  # partitions, hosts, GPUs of each
    return topologies.get_topology_desc(platform="cuda", topology_name=shape, target_config=description, topology=shape).devices


def near(topology: str) -> str:
    """The remedy half of an error line."""
    name, _, size = topology.partition("-")
    if name in SIZES and size.isdecimal():
        below, above = [n for n in SIZES[name] if n < int(size)], [n for n in SIZES[name] if n > int(size)]
        return "use " + " or ".join(f"{name}-{n}" for n in (*below[-1:], *above[:1]))
    names = [*(f"{name}-{n}" for name, sizes in SIZES.items() for n in sizes), *(f"{c.name}x8" for c in CHIPS if c.node)]
    return did_you_mean(topology, names)


def tpu_devices(name: str, shape: str, slices: int) -> list:
    """As libtpu describes them. It takes a lock and asks a cloud's metadata, unless told not to."""
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(variable, "1")
    import jax
    from jax.experimental import topologies

    if name in ("v4", "v5p") and shape.count("x") == 1:
        shape += "x1"
    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # as it runs: the two cores of a chip are one device
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology={name}:{shape}: libtpu refuses it: {str(error).splitlines()[0][:200]}") from error
