"""Quantised Hugging Face checkpoints: the numbers that blocks of MXFP4 and FP8 stand for, alone and as parameters of a model.

What transformers makes of the blocks is stored; `JAXLM_UPDATE_GOLDEN=1` writes it anew, where transformers is."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_models import UPDATE
from test_huggingface import copy_of, exported, opened, rewrite

from jaxlm.errors import UserError
from jaxlm.huggingface.quantized import dequantized
from jaxlm.huggingface.tensors import Planned, open_tensors, write_shards
from jaxlm.models.families.family import quantization_problems

STORED = pathlib.Path(__file__).parent / "golden" / "quantized.npz"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}


def mxfp4(rng, *shape):
    """-> (blocks, scales) of `shape`, the last axis of which is cut into groups of 32. Scales as far as bfloat16 goes."""
    groups = (*shape[:-1], shape[-1] // 32)
    return rng.integers(0, 256, (*groups, 16), np.uint8), rng.integers(1, 250, groups, np.uint8)


def fp8(rng, rows, columns, height=16, width=24):
    """-> (codes, scales)"""
    codes = (64 * rng.standard_normal((rows, columns))).astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp(rng.standard_normal((-(-rows // height), -(-columns // width)))).astype(np.float32)
    return codes, scales


def mxfp4_by_hand(blocks, scales):
    """(experts, inputs, outputs) by another table than ours."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * np.exp2(scales[..., None].astype(np.float32) - 127)
    return numbers.reshape(*scales.shape[:2], -1).swapaxes(1, 2)


def fp8_by_hand(codes, scales, height=16, width=24):
    """A number at a time."""
    out = np.empty(codes.shape, np.float32)
    for i, j in np.ndindex(codes.shape):
        out[i, j] = np.float32(codes[i, j]) * scales[i // height, j // width]
    return out


def written(folder, arrays: dict) -> dict:
    """The tensors of a file with these."""
    write_shards(folder, [Planned(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()], 10**9)
    return open_tensors(str(folder))


@pytest.fixture(scope="module")
def blocks():
    rng = np.random.default_rng(0)
    return {"mxfp4": mxfp4(rng, 3, 10, 64), "fp8": fp8(rng, 48, 72)}


def by_transformers(blocks) -> dict:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, scales = blocks["fp8"]
    codes = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    fp8 = Fp8Dequantize(None)._dequantize_one(codes, torch.from_numpy(scales))
    mxfp4 = convert_moe_packed_tensors(*map(torch.from_numpy, blocks["mxfp4"]))
    return {"mxfp4": mxfp4.float().numpy(), "fp8": fp8.numpy()}


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_blocks_are_the_numbers_that_transformers_reads(method, blocks, tmp_path):
    if UPDATE:
        np.savez_compressed(STORED, **by_transformers(blocks))
    (codes, scales), wanted = blocks[method], np.load(STORED)[method]
    names = {"mxfp4": ("x_blocks", "x_scales"), "fp8": ("x", "x_scale_inv")}[method]
    config = {"mxfp4": MXFP4, "fp8": FP8}[method]
    found = dequantized(written(tmp_path, dict(zip(names, (codes, scales), strict=True))), config)
    assert list(found) == ["x"] and found["x"].shape == wanted.shape
    np.testing.assert_array_equal(found["x"].rows(0, wanted.shape[0]), wanted)
    np.testing.assert_array_equal(found["x"].rows(1, 3), wanted[1:3])
    assert len(np.unique(np.abs(wanted))) > 100


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_the_stored_numbers_are_those_of_transformers(method, blocks):
    np.testing.assert_array_equal(by_transformers(blocks)[method], np.load(STORED)[method])


def test_a_block_that_ends_with_the_tensor_is_cut_off(tmp_path):
    codes, scales = fp8(np.random.default_rng(1), 40, 50)
    found = dequantized(written(tmp_path, {"x": codes, "x_scale_inv": scales}), FP8)["x"]
    np.testing.assert_array_equal(found.rows(0, 40), fp8_by_hand(codes, scales))
    np.testing.assert_array_equal(found.rows(17, 35), fp8_by_hand(codes, scales)[17:35])


def test_gpt_oss_comes_in_mxfp4_and_goes_out_in_bfloat16(tmp_path):
    folder = copy_of(tmp_path, "gpt_oss", intermediate_size=64, quantization_config=MXFP4)
    rng, wanted = np.random.default_rng(0), {}

    def quantise(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
            if name.endswith("gate_up_proj_bias"):
                tensors[name] = np.resize(tensors[name], (6, 128))
            if name.endswith(("gate_up_proj", "down_proj")):
                del tensors[name]
                codes, scales = mxfp4(rng, 6, *((128, 32) if "gate" in name else (32, 64)))
                scales = scales // 64 + 122  # as a model's are
                tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
                wanted[name] = mxfp4_by_hand(codes, scales)

    rewrite(folder, quantise)
    source, *_, params = opened(folder)
    assert source.config.model.param_dtype == "bfloat16"
    over_a_mesh = opened(folder, *(f"--config.mesh.{axis}=2" for axis in ("fsdp", "tensor", "expert")), devices=8)[-1]
    for found in (params, over_a_mesh):
        experts = found["layers"]["feedforward"]["experts"]
        for i in (0, 1):
            name = f"model.layers.{i}.mlp.experts"
            np.testing.assert_array_equal(experts["gate"]["kernel"][i], wanted[f"{name}.gate_up_proj"][..., 0::2])
            np.testing.assert_array_equal(experts["up"]["kernel"][i], wanted[f"{name}.gate_up_proj"][..., 1::2])
            np.testing.assert_array_equal(experts["down"]["kernel"][i], wanted[f"{name}.down_proj"])
    exported(folder, tmp_path / "out")
    out = open_tensors(str(tmp_path / "out"))
    assert {tensor.kind for tensor in out.values()} == {"BF16"}
    for name, numbers in wanted.items():
        np.testing.assert_array_equal(out[name].rows(0, 6), numbers)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_deepseek_comes_in_fp8(tmp_path):
    folder, plain = copy_of(tmp_path, "deepseek_v3", quantization_config=FP8), copy_of(tmp_path / "plain", "deepseek_v3")
    rng, wanted = np.random.default_rng(0), {}

    def quantise(tensors):
        for name in [name for name in tensors if "_proj" in name and name.endswith(".weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(rng, *tensors[name].shape)
            wanted[name] = fp8_by_hand(tensors[name], tensors[f"{name}_scale_inv"])

    rewrite(folder, quantise)
    rewrite(plain, lambda tensors: tensors.update(wanted))
    assert len(wanted) > 40
    jax.tree.map(np.testing.assert_array_equal, opened(folder)[-1], opened(plain)[-1])


def test_what_is_not_a_quantised_checkpoint_is_refused(tmp_path):
    codes, scales = fp8(np.random.default_rng(1), 40, 50)
    blocks, powers = mxfp4(np.random.default_rng(1), 2, 3, 64)
    for arrays, config, said in (
            ({"x_scale_inv": scales}, FP8, "x: is missing, and x_scale_inv is there"),
            ({"x_scales": powers}, MXFP4, "x_blocks: is missing"),
            ({"x": codes, "x_scale_inv": scales[1:]}, FP8, r"x_scale_inv is \(2, 3\), of fp8 that would be F8_E4M3 and \(3, 3\)"),
            ({"x": scales, "x_scale_inv": scales}, FP8, r"x: is F32\(3, 3\)"),
            ({"x_blocks": blocks, "x_scales": powers[:1]}, MXFP4, r"x_scales is \(1, 3, 2\)")):
        with pytest.raises(UserError, match=said):
            dequantized(written(tmp_path, arrays), config)
    for config, said in (({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not implemented"),
                         ({"bits": 4}, "quant_method=None"), ({"quant_method": "fp8"}, "fp8' without weight_block_size")):
        assert said in quantization_problems(config)[0]
    assert not quantization_problems(None) and not quantization_problems(FP8) and not quantization_problems(MXFP4)
