"""What a step computes and holds, read from its two forms: the jaxpr (what was asked for, the same on every machine) and the
compiled program (what XLA made of it).

FLOPs are counted in the jaxpr: XLA's own count takes the body of a loop once, and its products may end up in custom calls that it
does not count at all. Bytes, memory and operations are of the compiled program, on one device.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.lax import Precision

PRODUCTS = ("dot_general", "ragged_dot_general")
OPERATIONS = ("dot", "convolution", "custom-call", "fusion", "while", "conditional", "copy", "convert", "transpose", "gather",
              "scatter", "sort", "reduce")
HOST = ("callback", "debug_print", "infeed", "outfeed")  # in the names of primitives that call the host


# ---- The jaxpr --------------------------------------------------------------------------------------------------------------


def equations(jaxpr: Jaxpr | ClosedJaxpr, times: int = 1, kernels: bool = True) -> Iterator[tuple]:
    """-> (equation, how often all devices together run it), those inside loops, branches and kernels too. Of a branch, all sides
    count; a `while` that does not know its trips counts once. kernels: False leaves out what is in Pallas kernels."""
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        yield equation, times
        params, inside = equation.params, times
        if equation.primitive.name == "scan":
            inside *= params["length"]
        elif equation.primitive.name == "shard_map":
            inside *= params["mesh"].size
        elif equation.primitive.name == "pallas_call":
            if not kernels:
                continue
            inside *= math.prod(params["grid_mapping"].grid)
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from equations(inner, inside, kernels)


def flops(jaxpr, kernels: bool = True) -> int:
    """Of all matrix products, over all devices, what rematerialisation does again included. A grouped product counts each row
    once, with its own kernel. kernels: those in Pallas kernels too, which may skip parts of their grid that count here."""
    return sum(times * product_flops(equation) for equation, times in equations(jaxpr, kernels=kernels)
               if equation.primitive.name in PRODUCTS)


def product_flops(equation) -> int:
    """2 FLOPs for each multiplication and addition."""
    left, result, params = equation.invars[0].aval, equation.outvars[0].aval, equation.params
    grouped = equation.primitive.name == "ragged_dot_general"
    dims = params["ragged_dot_dimension_numbers"] if grouped else None
    (contracted, _), _ = dims.dot_dimension_numbers if grouped else params["dimension_numbers"]
    size = 2 * result.size * math.prod(left.shape[i] for i in contracted)
    if grouped and set(dims.lhs_ragged_dimensions) & set(contracted):  # a result for each group, of its rows alone
        size //= equation.invars[2].aval.shape[-1]
    return size


def wide_products(jaxpr) -> list[str]:
    """Matrix products with a float32 operand, where a bfloat16 model should have none: accelerators do them at a fraction of the
    speed, or with fewer bits than they seem to have.

    Those that ask for the highest precision do not count, for they are so on purpose: a router's scores, whose ties and near
    ties decide where a token goes.
    """
    return [str(equation) for equation, _ in equations(jaxpr)
            if equation.primitive.name in PRODUCTS and any(v.aval.dtype == jnp.float32 for v in equation.invars[:2])
            and not is_highest(equation.params["precision"])]


def is_highest(precision) -> bool:
    return precision == Precision.HIGHEST or precision == (Precision.HIGHEST, Precision.HIGHEST)


def types(jaxpr) -> set[str]:
    """Of all inputs and results: {"float32", "int32", ...}."""
    return {str(v.aval.dtype) for equation, _ in equations(jaxpr) for v in (*equation.invars, *equation.outvars)
            if hasattr(v.aval, "dtype")}


def host_calls(jaxpr) -> list[str]:
    """Primitives that wait for the host: callbacks, prints left behind."""
    names = {equation.primitive.name for equation, _ in equations(jaxpr)}
    return sorted(name for name in names if any(word in name for word in HOST))


# ---- The compiled program ---------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: int
    results: int
    aliased: int  # of the results, those that take the place of arguments
    temporary: int
    peak: int  # all of it at the worst moment; on a CPU without the temporary


def memory(compiled) -> Memory:
    """compiled: of `jax.stages.Compiled`."""
    m = compiled.memory_analysis()
    return Memory(m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes,
                  m.peak_memory_in_bytes)


def bytes_accessed(compiled) -> int:
    """XLA's estimate for one device, the body of each loop once."""
    return int(compiled.cost_analysis()["bytes accessed"])


def operations(hlo: str) -> dict[str, int]:
    """How often each of OPERATIONS stands in `compiled.as_text()`, in loops and fusions too, however often it runs; without the
    starts and ends of a TPU's collectives that run beside other work, which its compiler made 30 of here and 39 there."""
    lines = "\n".join(line for line in hlo.splitlines() if 'custom_call_target="AsyncCollective' not in line)
    found = Counter(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\])}] ([a-z][a-z\-]*)\(", lines, re.MULTILINE))
    return {name: found[name] for name in OPERATIONS if found[name]}
