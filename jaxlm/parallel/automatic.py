"""`mesh=auto`: the mesh that `jaxlm plan` finds the fastest of those that fit, and the reason for it."""

import os

import jax

from jaxlm.parallel.distributed import share


def choose_axes(config, vocab_size: int, devices) -> tuple[dict[str, int], str]:
    """-> ({"data": 4, ...}, why), by the model of `jaxlm.plan.estimate`; rematerialisation and accumulation are the config's."""
    from jaxlm.plan.devices import Target
    from jaxlm.plan.estimate import sizes_of
    from jaxlm.plan.hardware import UNKNOWN, chip_of
    from jaxlm.plan.search import candidates

    kind, limit = devices[0].device_kind, memory_limit(devices)
    chip = chip_of(kind)
    target = Target(f"{len(devices)} x {kind}", chip or UNKNOWN, len(devices), 1, None, limit, "")
    found = candidates(config, target, sizes_of(config, vocab_size), (config.model.remat,), (config.grad_accum_steps,), True)
    fitting = [c for c in found if c.fits]
    best = fitting[0] if fitting else min(found, key=lambda c: c.peak)
    room = f"{best.peak / 2**30:.2f} of {limit / 2**30:.2f} GiB a device"
    if not fitting:
        return best.axes, f"of {len(found)} meshes none fits by the estimate; this one needs least, {room}: it may not fit"
    speeds = "" if chip else ", going by an H100's speeds"
    return best.axes, f"the fastest by the estimate{speeds} of {len(fitting)} meshes that fit, {room}"


def memory_limit(devices) -> float:
    """Bytes one device may use, as process 0 sees it (all must choose the same); of a CPU, its share of the machine's memory."""
    return share(lambda: memory_limit_here([d for d in devices if d.process_index == jax.process_index()]), "memory limit")


def memory_limit_here(devices) -> float:
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
