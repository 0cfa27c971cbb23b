"""Families: the published sizes have the published parameter counts, and each config.json says the same after a round trip."""

import pytest

from configs import default
from jaxlm.config import load, resolve
from jaxlm.errors import UserError
from jaxlm.models.families import MODEL_TYPES, apply, read_config
from jaxlm.models.families.family import differences, family_of, write_config
from jaxlm.models.families.sizes import SIZES
from jaxlm.train.state import build_model

COUNTS = {  # each is what transformers counts too (`test_transformers_counts_the_same`)
    "gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192, "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496, "llama3_1_8b": 8_030_261_248, "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800, "llama3_2_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824, "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552, "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352, "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264, "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560, "mixtral_8x7b": 46_702_792_704, "mixtral_8x22b": 140_620_634_112,
    "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320, "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952, "olmo2_1b": 1_484_916_736, "olmo2_7b": 7_298_617_344, "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936, "phi3_mini": 3_821_079_552, "phi4": 14_659_507_200, "smollm3_3b": 3_075_098_624,
    "gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672, "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v2": 235_741_434_880, "deepseek_v3": 671_026_419_200, "bert_base_uncased": 109_514_298,
    "bert_large_uncased": 335_174_458, "bert_base_cased": 108_340_804, "bert_large_cased": 333_610_308, "t5_small": 60_506_624,
    "t5_base": 222_903_552, "t5_large": 737_668_096, "t5_3b": 2_851_598_336, "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152, "t5_v1_1_base": 247_577_856, "t5_v1_1_large": 783_150_080, "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
}


def config_of(values):
    config = default.get_config()
    family, keys = read_config(values)
    apply(config, keys)
    resolve(config)
    return family, config


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    _, config = config_of(SIZES[size])
    assert build_model(config, config.model.vocab_size, "plain").num_parameters == COUNTS[size]


def test_what_a_task_asks_for_stays_and_what_another_model_was_goes():
    config = default.get_config()
    asked = {"pooling": "mean", "token_dropout": 0.1, "prefix_attention": True, "num_classes": 3, "dropout": 0.2}
    config.model.update({**asked, "value_residual": True, "mlp_dim": 7})
    apply(config, read_config(SIZES["qwen3_0_6b"])[1])
    assert {key: config.model[key] for key in asked} == asked
    assert not config.model.value_residual and config.model.mlp_dim == 3072


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("size", ["gpt2", "llama3_1_8b", "mistral_7b", "qwen2_5_7b", "qwen3_8b", "qwen3_30b_a3b", "mixtral_8x7b",
                                  "gemma2_9b", "gemma3_1b", "olmo2_7b", "phi4", "smollm3_3b", "gpt_oss_20b", "deepseek_v2_lite",
                                  "deepseek_v3", "bert_base_uncased", "t5_small", "t5_v1_1_xxl"])
def test_transformers_counts_the_same(size):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**SIZES[size])
    config.pad_token_id = None
    auto = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    with torch.device("meta"):
        model = auto.get(config.model_type, transformers.AutoModelForCausalLM).from_config(config)
    kept = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}  # tied ones are one
    own_head = config.vocab_size * config.d_model if size.startswith("t5_v1_1") else 0  # which it has once a file has one
    assert sum(kept.values()) + own_head == COUNTS[size]


@pytest.mark.parametrize("size", SIZES)
def test_a_config_says_the_same_after_a_round_trip(size):
    family, config = config_of(SIZES[size])
    written = write_config(family, config)
    assert differences(config, written) == []
    again = read_config(written)[1]
    first = read_config(SIZES[size])[1]
    assert {k: v for k, v in again.items() if v or k in first} == {k: v or again[k] for k, v in first.items()}


def test_each_family_is_found_by_what_it_alone_has():
    for size in ("gpt2", "llama3_1_8b", "mistral_7b", "qwen2_5_7b", "qwen3_8b", "qwen3_30b_a3b", "gpt_oss_20b", "deepseek_v2",
                 "deepseek_v3", "bert_base_cased", "t5_v1_1_xl", "t5_small", "gemma2_9b", "gemma3_1b", "olmo2_7b"):
        family, config = config_of(SIZES[size])
        assert family_of(config) is family
    config.model.value_residual = True
    with pytest.raises(UserError, match="no Hugging Face family has such a model.*value_residual"):
        family_of(config)
    assert {SIZES[size]["model_type"] for size in SIZES} == set(MODEL_TYPES)


def test_a_published_size_is_a_preset():
    config = load("configs/published.py:gemma2_9b", ["--config.seq_len=64"])
    assert (config.model.attention_softcap, config.model.window_pattern, config.seq_len) == (50.0, "LG", 64)
    with pytest.raises(UserError, match="did you mean gemma2_9b"):
        load("configs/published.py:gemma2_9", [])
