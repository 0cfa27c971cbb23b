"""How long a step should take, and what limits it (the roofline of Williams, Waterman and Patterson, 2009, over a whole step)."""

from typing import NamedTuple

from jaxlm.plan.hardware import Chip

IGNORES = ("latencies and the time to launch kernels", "what kernels read more than once", "collectives that cannot run beside "
           "computation, or compete for links", "the host: data, evaluation, checkpoints")


class Roofline(NamedTuple):
    """Seconds of a step on one device."""

    compute: float  # the FLOPs, at what large matrix products reach
    memory: float  # all bytes, at the memory's bandwidth
    network: float  # all bytes sent, at the links'
    step: float
    limited_by: str  # compute, memory, network


def roofline(chip: Chip, flops: float, product_bytes: float, other_bytes: float, network_seconds: float) -> Roofline:
    """Matrix products take the longer of their computation and their memory traffic, everything else that of its memory traffic;
    collectives run beside both."""
    compute = flops / (chip.peak_flops * chip.matmul_share)
    products, others = product_bytes / chip.memory_bandwidth, other_bytes / chip.memory_bandwidth
    local = max(compute, products) + others
    if network_seconds > local:
        limited_by = "network"
    else:
        limited_by = "compute" if compute > products and compute > others else "memory"
    return Roofline(compute, products + others, network_seconds, max(local, network_seconds), limited_by)
