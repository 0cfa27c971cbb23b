"""How long a step should take, and what limits it (the roofline of Williams, Waterman and Patterson, 2009, over a whole step)."""

from typing import NamedTuple

from jaxlm.plan.hardware import Chip

IGNORES = ("latencies and the time to launch kernels", "what kernels read more than once", "collectives that cannot run beside "
           "computation, or compete for links", "the host: data, evaluation, checkpoints")
EXPOSED = 0.1  # of what could run beside the longest part and does not. An assumption, not measured


class Roofline(NamedTuple):
    """Seconds of a step on one device."""

    compute: float  # the FLOPs, at what large matrix products reach
    memory: float  # all bytes, at the memory's bandwidth
    network: float  # all bytes sent, at the links'
    host: float  # what goes to the host's memory and back
    step: float
    limited_by: str  # compute, memory, network, host


def roofline(chip: Chip, flops: float, product_bytes: float, other_bytes: float, network_seconds: float,
             host_bytes: float) -> Roofline:
    """Matrix products take the longer of their computation and their memory traffic, everything else that of its memory traffic;
    collectives and the way to the host run beside both, but for `EXPOSED`."""
    compute = flops / (chip.peak_flops * chip.matmul_share)
    products, others = product_bytes / chip.memory_bandwidth, other_bytes / chip.memory_bandwidth
    local = max(compute, products) + others
    host = host_bytes / chip.host_bandwidth
    local_limit = "compute" if compute > products and compute > others else "memory"
    longest, limited_by = max((local, local_limit), (network_seconds, "network"), (host, "host"))
    step = longest + EXPOSED * (local + network_seconds + host - longest)
    return Roofline(compute, products + others, network_seconds, host, step, limited_by)
