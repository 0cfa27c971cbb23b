"""XLA's options for the step, by hardware. They go to the compiler with the program, not through XLA_FLAGS, where a name that
this version does not know would end the process: here it is left out, with a warning.
"""

import re
import sys
from typing import NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from jaxlm.errors import UserError


class Row(NamedTuple):
    """Options of the hardware whose kind, "platform device_kind", matches; jaxlib versions differ in which they know."""

    kind: str  # regex
    applies: object  # (config, number of devices) -> bool
    options: dict
    why: str


TABLE = (
    Row("gpu .*", lambda config, devices: devices > 1,
        {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_gather": True,
         "xla_gpu_enable_pipelined_all_reduce": True, "xla_gpu_enable_pipelined_reduce_scatter": True},
        "computes while collectives run (NVIDIA's JAX toolbox; off by default up to jaxlib 0.10, later ones always pipeline)"),
    Row("gpu .*", lambda config, devices: devices > 1 and config.model.scan_layers,
        {"xla_gpu_enable_while_loop_double_buffering": True}, "the next layer's parameters are gathered during this one"),
    Row("gpu .*", lambda config, devices: config.observe.deterministic, {"xla_gpu_exclude_nondeterministic_ops": True},
        "observe.deterministic"),
    Row("tpu .*", lambda config, devices: devices > 1,
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6},
        "no products in a ring of windows, which add up in memory: a step of Llama 1B on 16 v5e moves 258 GiB through memory "
        "instead of 1,309, one of 70B on 128 v5p 3,378 instead of 24,416; a fifth less is sent (counted in compiled programs)"),
    Row("tpu TPU v6.*", lambda config, devices: config.model.feedforward != "moe", {"xla_tpu_scoped_vmem_limit_kib": 98304},
        "larger fusions (MaxText's figure for dense models)"),
    Row("tpu TPU v6.*", lambda config, devices: config.model.feedforward == "moe", {"xla_tpu_scoped_vmem_limit_kib": 81920},
        "larger fusions (MaxText's figure for mixtures of experts)"),
)


def parse_options(text: str) -> dict:
    """ "xla_a=true,xla_b=3" -> {"xla_a": True, "xla_b": 3}; "xla_a=" takes the table's away: None. Raises UserError."""
    options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"xla_\w+", name):
            raise UserError(f"kernels.compiler_options: {part!r} is not of the form xla_name=value")
        words = {"": None, "true": True, "false": False}
        options[name] = words[value.lower()] if value.lower() in words else int(value) if re.fullmatch(r"-?\d+", value) else value
    return options


def compiler_options(config, device, devices: int) -> dict:
    """What the step is compiled with on `devices` such devices: the table's, then `kernels.compiler_options`.

    Raises UserError: not of the form, or a value that the compiler refuses.
    """
    wanted, kind = {}, f"{device.platform} {device.device_kind}"
    for row in TABLE:
        if row.applies(config, devices) and re.fullmatch(row.kind, kind):  # in this order, so that every key counts as read
            wanted |= row.options
    wanted |= parse_options(config.kernels.compiler_options)
    return known({name: value for name, value in wanted.items() if value is not None}, device)


def known(options: dict, device) -> dict:
    """Those that the device's compiler knows. Found out by compiling next to nothing."""
    found, nothing = {}, jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    for name, value in options.items():
        try:
            jax.jit(lambda x: x).lower(nothing).compile(compiler_options={name: value})
            found[name] = value
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                refusal = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
                raise UserError(f"kernels.compiler_options: {refusal}") from error
            print(f"jaxlm: this XLA has no option {name}; left out", file=sys.stderr)
    return found
