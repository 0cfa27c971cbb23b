"""Checkpoints whose weights are quantised in blocks, read as the numbers that the blocks stand for, a piece at a time.

    mxfp4   GPT-OSS (OCP Microscaling Formats 1.0): <name>_blocks, uint8 (experts, outputs, groups, 16), two numbers of four bits
            each, the lower bits first; <name>_scales, uint8 (experts, outputs, groups), of each group of 32 inputs
    fp8     DeepSeek-V3 (arXiv:2412.19437, 3.3): <name>, float8_e4m3fn (outputs, inputs); <name>_scale_inv, a factor for each
            block of 128 x 128
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError
from jaxlm.huggingface.tensors import SafeTensor

FOUR_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([np.tile(FOUR_BITS, 16), np.repeat(FOUR_BITS, 16)], axis=1)  # of each byte: (256, 2)
BYTES = np.arange(256, dtype=np.uint8)
POWERS = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)  # what each byte of a scale says: 2^(byte - 127)
EIGHT_BITS = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Mxfp4(NamedTuple):
    """(experts, inputs, outputs), as transformers has it: an expert's two last axes lie the other way round in the blocks."""

    blocks: SafeTensor
    scales: SafeTensor
    kind = "MXFP4"
    dtype = np.dtype(np.float32)  # of what is read

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, size = self.blocks.shape
        return experts, 2 * groups * size, outputs

    def rows(self, start: int, stop: int) -> np.ndarray:
        numbers = PAIRS[self.blocks.rows(start, stop)].reshape(stop - start, *self.scales.shape[1:], -1)
        numbers *= POWERS[self.scales.rows(start, stop)][..., None]
        return numbers.reshape(stop - start, self.shape[2], self.shape[1]).transpose(0, 2, 1)


class Fp8(NamedTuple):
    codes: SafeTensor
    scales: SafeTensor
    block: tuple[int, int]
    kind = "FP8"
    dtype = np.dtype(np.float32)  # of what is read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        height, width = self.block
        numbers = EIGHT_BITS[self.codes.rows(start, stop).view(np.uint8)]
        first = start // height
        scales = self.scales.rows(first, -(-stop // height)).astype(np.float32)
        scales = np.repeat(scales, width, axis=1)[:, : self.shape[1]]
        numbers *= scales[np.arange(start, stop) // height - first]
        return numbers

    def read_into(self, out: np.ndarray, start: int) -> None:
        count = out.size // self.shape[1]
        out[...] = self.rows(start, start + count).reshape(out.shape)


def dequantized(found: dict, values: dict) -> dict:
    """{name: tensor} of a checkpoint, with one tensor in place of each pair. values: its quantization_config, which
    `read_config` has seen. Raises UserError: one of a pair is missing, or they do not fit."""
    found, problems = dict(found), []
    mxfp4 = values["quant_method"] == "mxfp4"
    of_scales, of_codes = ("_scales", "_blocks") if mxfp4 else ("_scale_inv", "")
    codes_kind = "U8" if mxfp4 else "F8_E4M3"
    for scales_name in [name for name in found if name.endswith(of_scales)]:
        name = scales_name.removesuffix(of_scales)
        codes = found.pop(name + of_codes) if name + of_codes in found else None
        scales = found.pop(scales_name)
        if codes is None:
            problems.append(f"{name + of_codes}: is missing, and {scales_name} is there; copy the whole checkpoint")
            continue
        block = None if mxfp4 else tuple(values["weight_block_size"])
        wanted = codes.shape[:-1] if mxfp4 else tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=False))
        if codes.kind != codes_kind or len(codes.shape) != (4 if mxfp4 else 2) or scales.shape != wanted:
            problems.append(f"{name + of_codes}: is {codes.kind}{codes.shape} and {scales_name} is {scales.shape}, of "
                            f"{values['quant_method']} that would be {codes_kind} and {wanted}")
            continue
        found[name] = Mxfp4(codes, scales) if mxfp4 else Fp8(codes, scales, block)
    if problems:
        raise UserError(*problems[:20])
    return found
