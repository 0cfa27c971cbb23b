"""`mesh=auto`: the mesh that `jaxlm plan` finds the fastest of those that fit, and the reason for it."""

import os

import jax

from jaxlm.parallel.distributed import share


def choose_axes(config, vocab_size: int, devices) -> tuple[dict[str, int], str]:
    """-> ({"data": 4, ...}, why), for devices of this machine or run."""
    from jaxlm.config import plain
    from jaxlm.plan.devices import Target
    from jaxlm.plan.estimate import sizes_of
    from jaxlm.plan.hardware import chip_of
    from jaxlm.plan.search import best_mesh

    config, kind = plain(config), devices[0].device_kind  # a layout that is only thought of uses no key
    target = Target(f"{len(devices)} x {kind}", chip_of(kind), len(devices), 1, None, memory_limit(devices), "")
    best, why = best_mesh(config, target, sizes_of(config, vocab_size))
    return best.axes, why


def memory_limit(devices) -> float:
    """Bytes one device may use, as process 0 sees it (all must choose the same); of a CPU, its share of the machine's memory."""
    return share(lambda: memory_limit_here([d for d in devices if d.process_index == jax.process_index()]), "memory limit")


def memory_limit_here(devices) -> float:
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
