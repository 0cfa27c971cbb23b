"""What the compiler of the hardware makes of the run's own step: memory, traffic, and an executable that a run can start from."""

import math
import re
from typing import Any, NamedTuple

import jax

from jaxlm.errors import UserError
from jaxlm.kernels.attention import FUSED
from jaxlm.plan.collectives import collectives_of, summary
from jaxlm.plan.facts import flops, memory
from jaxlm.plan.hlo import Program as Hlo
from jaxlm.train.step import Program

# On a CPU what counts is the process: Python, JAX and its compiler; and a save, which goes on beside the next steps, with a copy
# of the state, the work space of its fingerprints and the buffers of its writing. Of the last two it depends on the moment how
# much is there at once: runs of 0.03 to 1.4 GiB of state took 2 to 3 times the state beside it.
CPU_PROCESS, COPIES_OF_A_SAVE = 0.4 * 2**30, 2.5


class Compiled(NamedTuple):
    """All of one device, a step."""

    peak_bytes: int  # arguments and temporaries at the worst moment
    argument_bytes: int
    flops: float  # of matrix products and kernels, what rematerialisation does again included
    product_bytes: int  # read and written by those
    other_bytes: int  # by everything else
    network: dict[str, int]  # {"all-gather fsdp": bytes sent, ...}
    compile_seconds: float
    program: Any = None  # jaxlm.train.step.Program, and what was made of it: None where only the facts were kept
    executable: Any = None


class OutOfMemory(Exception):
    """The compiler refused. needed: bytes on one device, as it says; limit: what there is."""

    def __init__(self, needed: float, limit: float):
        super().__init__(f"needs {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB")
        self.needed, self.limit = needed, limit


def compile_step(program: Program, attention_flops: float) -> Compiled:
    """attention_flops: of all devices, for a fused kernel, whose own count would be of its whole grid.

    Raises OutOfMemory where the step does not fit the hardware."""
    try:
        executable, seconds = program.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error)) or re.search(
            r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not found:
            raise UserError(f"the compiler is out of memory: {str(error).splitlines()[0][:200]}") from error
        # What it names are the temporaries; the state lies beside them.
        state = sum(bytes_on_device(a) for a in jax.tree.leaves(program.state))
        raise OutOfMemory(float(found[1]) * 2**30 + state, float(found[2]) * 2**30) from error
    m, hlo = memory(executable), Hlo(executable.as_text())
    product_bytes = other_bytes = 0
    for computation, operation, times, _ in hlo.walk():
        moved = hlo.moved(computation, operation) * times
        if hlo.has_product(operation):
            product_bytes += moved
        else:
            other_bytes += moved
    sent = {name: line["bytes"] for name, line in summary(collectives_of(hlo, program.mesh)).items()}
    peak = m.peak
    if program.mesh.devices.flat[0].platform == "cpu":
        peak = CPU_PROCESS / program.mesh.size + (1 + COPIES_OF_A_SAVE) * m.arguments + m.results - m.aliased + m.temporary
    fused = program.backend in FUSED
    work = (flops(program.jaxpr(), kernels=not fused) + attention_flops * fused) / program.mesh.size
    return Compiled(peak, m.arguments, work, product_bytes, other_bytes, sent, seconds, program, executable)


def bytes_on_device(a) -> int:
    return math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
