"""What accelerators can do: the one table behind MFU, the roofline and the limits of memory. Figures are the vendors' own.

Sources: TPU v4, v5e, v5p, v6e: cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e) and jax-ml.github.io/scaling-book/tpus (links, PCIe,
network between slices; rounded). GPU: NVIDIA's data sheets of A100, H100, H200, B200 (dense bfloat16, never the sparse figure;
NVLink one way); between nodes 400 Gb/s for each GPU (A100: 200), PCIe 5 (4), as in DGX machines.
"""

import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    name: str
    kinds: tuple[str, ...]  # `device_kind`s of JAX
    peak_flops: float  # FLOP/s in bfloat16
    memory_bytes: float  # that a program can use
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s sent: by a TPU both ways round one dimension of its torus, by a GPU over NVLink
    slow_bandwidth: float  # bytes/s of one device to others out of its slice or node
    host_bandwidth: float  # bytes/s between one device and the host's memory
    torus: int = 0  # dimensions of a TPU's torus
    node: int = 0  # GPUs that NVLink joins
    # Share of the peak that large matrix products reach. Measured for H100 and H200 (790 of 989 TFLOP/s on random numbers), taken
    # to be so for other GPUs; of TPUs what the best published training runs come to, recomputation counted (MaxText, AXLearn).
    matmul_share: float = 0.8


# Memory of TPUs: what their compiler gives a program ("exceeds available HBM"), a little less than is on the chip.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 30.5 * GIB, 1.2e12, 2 * 45e9, 3e9, 15e9, torus=3, matmul_share=0.75),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 2 * 45e9, 3e9, 15e9, torus=2, matmul_share=0.85),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 2 * 90e9, 6e9, 15e9, torus=3, matmul_share=0.8),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1640e9, 2 * 90e9, 12e9, 15e9, torus=2, matmul_share=0.6),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 0.92 * 80e9, 2039e9, 300e9, 25e9, 25e9, node=8),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 0.92 * 40e9, 1555e9, 300e9, 25e9, 25e9, node=8),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 0.92 * 80e9, 3350e9, 450e9, 50e9, 50e9, node=8),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 0.92 * 80e9, 2000e9, 64e9, 50e9, 50e9, node=8),
    Chip("h100-nvl", ("NVIDIA H100 NVL",), 835e12, 0.92 * 94e9, 3900e9, 300e9, 50e9, 50e9, node=2),
    Chip("h200", ("NVIDIA H200",), 989e12, 0.92 * 141e9, 4800e9, 450e9, 50e9, 50e9, node=8),
    Chip("b200", ("NVIDIA B200",), 2250e12, 0.92 * 180e9, 7700e9, 900e9, 50e9, 50e9, node=8),
)
UNKNOWN = next(chip for chip in CHIPS if chip.name == "h100")  # to compare layouts by, where the device is not in the table


def chip_of(device_kind: str) -> Chip | None:
    """None for a device that is not in the table: never a guess."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def bandwidth(chip: Chip, size: int, devices: int) -> float:
    """Bytes/s that one device sends in a ring of `size` along one axis of a mesh of `devices`, all in one slice or node.

    A TPU's ring runs both ways round one dimension of the torus, or several where the axis is so long that it spans them.
    """
    if not chip.torus:
        return chip.link_bandwidth
    side = max(2.0, devices ** (1 / chip.torus))
    spanned, reach = 1, side
    while reach * 1.01 < size and spanned < chip.torus:
        spanned, reach = spanned + 1, reach * side
    return chip.link_bandwidth * spanned


def parse_topology(text: str) -> tuple[str, str]:
    """ "v5p:4x4x4" -> ("v5p", "4x4x4"); aliases by cores or chips too: "v5e-16" is 16 chips, "v5p-128" 128 cores, 64 chips.

    Raises ValueError where it is of neither form.
    """
    if match := re.fullmatch(r"(v\d+[a-z]?):(\d+(?:x\d+){1,2})", text):
        return match[1], match[2]
    if match := re.fullmatch(r"(v\d+[a-z]?)-(\d+)", text):
        return match[1], shape_of(match[1], int(match[2]))
    raise ValueError(text)


def shape_of(name: str, size: int) -> str:
    """The shape that Google rents out for a number: of chips for v5e and v6e, of cores, 2 a chip, for v4 and v5p."""
    flat = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    if name in ("v5e", "v6e"):
        if size not in flat:
            raise ValueError(f"{name}-{size}")
        return flat[size]
    chips, sides = size // 2, [2, 2, 1]
    if size % 2 or chips < 4 or chips & (chips - 1):
        raise ValueError(f"{name}-{size}")
    while sides[0] * sides[1] * sides[2] < chips:  # the shortest side doubles, the last first: 2x2x2, 2x2x4, 2x4x4, 4x4x4, ...
        i = min(range(3), key=lambda i: (sides[i], -i))
        sides[i] *= 2
    return "x".join(map(str, sorted(sides)))
