"""Tiny random Hugging Face models of every family, and what transformers answers with them.

`golden` needs neither torch nor transformers: tests/golden/huggingface.json holds each config.json, and names and shapes of its
tensors, whose numbers come from numpy; huggingface.npz holds the answers. `python tests/hf_models.py`
writes them anew, where transformers is.
"""

import functools
import json
import os
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np

from jaxlm.huggingface.tensors import Planned, write_shards

LENGTH = 96
TOKENS = 12  # of the vocabulary, whose logits are stored
CONFIGS = pathlib.Path(__file__).parent / "golden" / "huggingface.json"
LOGITS = CONFIGS.with_suffix(".npz")
SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=24)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 1.5, 3.0],
                original_max_position_embeddings=32, partial_rotary_factor=0.75)

LATENT = dict(kv_lora_rank=20, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=8, num_key_value_heads=4,
              moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1, num_hidden_layers=3)
DEEPSEEK_YARN = YARN | dict(mscale=1.0, mscale_all_dim=0.8, beta_fast=8.0, beta_slow=1.0)
BERT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, num_labels=3)
T5 = dict(vocab_size=96, d_model=32, d_kv=6, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=4,
          relative_attention_num_buckets=16, relative_attention_max_distance=40)


class Case(NamedTuple):
    architecture: str  # class of transformers
    fields: dict  # of its config. Windows and the lengths before scaling end well within LENGTH
    variant: str = ""  # what the case has, beside what every model of its family has; for the table of families


CASES = {
    "gpt2": Case("GPT2LMHeadModel", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=LENGTH, bos_token_id=1,
                                         eos_token_id=2)),
    "llama2": Case("LlamaForCausalLM", dict(SMALL, rms_norm_eps=1e-5), "plain"),
    "llama3": Case("LlamaForCausalLM", dict(SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True,
                                            tie_word_embeddings=True), "llama3 scaling, biases, tied"),
    "llama_linear": Case("LlamaForCausalLM", dict(SMALL, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
                         "linear scaling"),
    "mistral": Case("MistralForCausalLM", dict(SMALL, sliding_window=16, head_dim=16), "window"),
    "qwen2": Case("Qwen2ForCausalLM", dict(SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=2),
                  "window in some layers"),
    "qwen2_yarn": Case("Qwen2ForCausalLM", dict(SMALL, rope_parameters=YARN), "yarn"),
    "qwen3": Case("Qwen3ForCausalLM", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", dict(SMALL, head_dim=16, moe_intermediate_size=24, num_experts=6,
                                                  num_experts_per_tok=3, norm_topk_prob=True)),
    "mixtral": Case("MixtralForCausalLM", dict(SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=16), "window"),
    "gemma2": Case("Gemma2ForCausalLM", dict(SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=24,
                                             attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": Case("Gemma3ForCausalLM", dict(
        SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=24, num_hidden_layers=6, sliding_window_pattern=3,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                             sliding_attention=dict(rope_type="default", rope_theta=1e4))), "linear scaling of global layers"),
    "olmo2": Case("Olmo2ForCausalLM", SMALL),
    "phi3": Case("Phi3ForCausalLM", dict(SMALL, sliding_window=16), "window"),
    "phi3_longrope": Case("Phi3ForCausalLM", dict(SMALL, original_max_position_embeddings=32, rope_parameters=LONGROPE),
                          "longrope with part of each head rotated"),
    "smollm3": Case("SmolLM3ForCausalLM", SMALL, "layers without rope"),
    "gpt_oss": Case("GptOssForCausalLM", dict(
        SMALL, num_hidden_layers=2, head_dim=8, num_local_experts=6, num_experts_per_tok=3, sliding_window=16,
        rope_parameters=YARN | dict(rope_theta=1000.0, beta_fast=8.0, truncate=False)), "yarn, window"),
    "deepseek_v2": Case("DeepseekV2ForCausalLM", dict(
        SMALL | LATENT, q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.5, topk_method="group_limited_greedy",
        n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN | dict(mscale=0.7, mscale_all_dim=0.7)), "groups, yarn"),
    "deepseek_v2_lite": Case("DeepseekV2ForCausalLM", dict(SMALL | LATENT, q_lora_rank=24, attention_bias=True,
                                                             rms_norm_eps=1e-2), "biases, queries of a latent, another eps"),
    "deepseek_v3": Case("DeepseekV3ForCausalLM", dict(
        SMALL | LATENT, q_lora_rank=24, n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN), "yarn"),
    "bert": Case("BertForMaskedLM", BERT, "masked words"),
    "bert_classes": Case("BertForSequenceClassification", BERT | dict(hidden_act="gelu_new"), "classes"),
    "bert_pooler": Case("BertModel", BERT, "pooler"),
    "t5": Case("T5ForConditionalGeneration", T5, "relu, tied"),
    "t5_v1_1": Case("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
                    "1.1: gated, head of its own"),
}
AUTO = {"LMHeadModel": "ForCausalLM", "ForCausalLM": "ForCausalLM", "ForMaskedLM": "ForMaskedLM", "BertModel": "",
        "ForSequenceClassification": "ForSequenceClassification", "ForConditionalGeneration": "ForSeq2SeqLM"}


def text_rows():
    """-> (tokens, segment_ids, positions), each (3, LENGTH): a text, two documents packed, and one with padding after it."""
    tokens = np.random.default_rng(0).integers(3, 96, (3, LENGTH)).astype(np.int32)
    at = np.arange(LENGTH)
    segments = np.stack([np.ones_like(at), np.where(at < 40, 1, 2), np.where(at < 70, 1, 0)]).astype(np.int32)
    positions = np.stack([at, np.where(at < 40, at, at - 40), at]).astype(np.int32)
    return tokens, segments, positions


def source_rows():
    """-> (tokens, segment_ids), each (3, 72): what an encoder reads for a decoder to write `text_rows`."""
    tokens = np.random.default_rng(1).integers(3, 96, (3, 72)).astype(np.int32)
    at = np.arange(72)
    return tokens, np.stack([np.ones_like(at), np.where(at < 30, 1, 2), np.where(at < 50, 1, 0)]).astype(np.int32)


PIECES = ((0, 0, LENGTH), (1, 0, 40), (1, 40, LENGTH), (2, 0, 70))  # (row, begin, end) of the documents in `text_rows`
SOURCES = ((0, 72), (0, 30), (30, 72), (0, 50))  # (begin, end) of what each is about, in `source_rows`


def write_folder(stored: dict) -> str:
    """config.json and model.safetensors. Norms and biases are not left at 1 and 0, where a wrong mapping would not show."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hf-"))
    (folder / "config.json").write_text(json.dumps(stored["config"]))
    rng = np.random.default_rng(0)
    planned = []
    for tensor, (shape, mean) in stored["tensors"].items():
        std = 1.0 if tensor == "shared.weight" else 0.3 if len(shape) == 1 else 0.15  # T5's head divides by sqrt(d_model)
        numbers = (mean + std * rng.standard_normal(shape)).astype(np.float32)
        planned.append(Planned(tensor, numbers.dtype, tuple(shape), lambda numbers=numbers: numbers))
    write_shards(folder, planned, 10**9)
    return str(folder)


@functools.cache
def golden(name: str):
    """-> (folder, logits of TOKENS for each of PIECES, or one row of numbers of the whole text)."""
    logits = np.load(LOGITS)[name]
    ends = np.cumsum([1 if len(logits) == len(PIECES) else end - begin for _, begin, end in PIECES])
    return write_folder(json.loads(CONFIGS.read_text())[name]), np.split(logits, ends[:-1])


def by_transformers(name: str):
    """-> (what `write_folder` needs, logits of each of PIECES), made anew by transformers."""
    import transformers

    from jaxlm.huggingface.tensors import open_tensors

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, CASES[name].architecture)
    model = cls(cls.config_class(**CASES[name].fields))
    if name == "t5_v1_1":  # transformers 5 ties the head of a new model whatever is asked, but not of a checkpoint
        model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach() + 1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(pathlib.Path(folder, "config.json").read_text())
        if name == "t5_v1_1":
            config["tie_word_embeddings"] = False  # as in the published ones
        stored = {"config": config, "tensors": {
            tensor: [list(t.shape), round(float(t.rows(0, t.shape[0]).mean()))]
            for tensor, t in sorted(open_tensors(folder).items())}}
        if name == "t5_v1_1":
            stored["tensors"]["lm_head.weight"][1] = 0
    return stored, answers(write_folder(stored))


def by_auto_class(folder: str):
    """transformers' model of the folder, by the class that users take."""
    import transformers

    architecture = json.loads(pathlib.Path(folder, "config.json").read_text())["architectures"][0]
    auto = next(auto for end, auto in AUTO.items() if architecture.endswith(end))
    return getattr(transformers, f"AutoModel{auto}").from_pretrained(folder, attn_implementation="eager").eval()


def answer(model, number: int):
    """Of transformers' `model`, to one of PIECES: logits (T, V), or (1, numbers) of the whole text."""
    import torch

    (row, begin, end), (first, last) = PIECES[number], SOURCES[number]
    tokens, about = (torch.from_numpy(rows[0]).long() for rows in (text_rows(), source_rows()))
    piece = tokens[None, row, begin:end]
    if model.config.is_encoder_decoder:
        return model(input_ids=about[None, row, first:last], decoder_input_ids=piece).logits[0]
    out = model(piece, token_type_ids=piece % 2) if model.config.model_type == "bert" else model(piece)
    if "logits" not in out:
        return out.pooler_output
    return out.logits if out.logits.ndim == 2 else out.logits[0]


def answers(folder: str) -> list:
    import torch

    model = by_auto_class(folder)
    with torch.no_grad():
        return [answer(model, number).numpy() for number in range(len(PIECES))]


def update():
    configs, logits = {}, {}
    for name in CASES:
        configs[name], answered = by_transformers(name)
        logits[name] = np.concatenate(answered)[:, :TOKENS]
    CONFIGS.write_text(json.dumps(configs) + "\n")
    np.savez_compressed(LOGITS, **logits)


PARITY = CONFIGS.with_name("parity.json")
UPDATE = "JAXLM_UPDATE_GOLDEN" in os.environ


def measured(name: str, what: str, value) -> None:
    """Stores what a test has measured of a case, or compares it with what is stored: the tables of families are made of it."""
    stored = json.loads(PARITY.read_text()) if PARITY.is_file() else {}
    if UPDATE:
        stored.setdefault(name, {})[what] = value if isinstance(value, int) else float(f"{value:.1e}")
        ordered = {case: dict(sorted(stored[case].items())) for case in CASES if case in stored}
        PARITY.write_text(json.dumps(ordered, indent=1) + "\n")
    elif isinstance(value, int):
        assert value == stored[name][what]
    else:  # another processor rounds otherwise
        wanted = stored[name][what]
        assert value <= max(10 * wanted, 1e-5), f"{what}: {value:.1e}, the table of families says {wanted}"


# ---- The tables of families, in docs/huggingface.md and README.md -------------------------------------------------------------


FAMILIES = {
    "gpt2": "GPT-2", "llama": "Llama 2, 3, 3.1 and later", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3", "qwen3_moe": "Qwen 3 MoE", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3, text", "olmo2": "OLMo 2",
    "phi3": "Phi-3, 3.5, 4", "smollm3": "SmolLM 3", "gpt_oss": "GPT-OSS", "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1", "bert": "BERT", "t5": "T5, T5 1.1, Flan-T5",
}


class Refusal(NamedTuple):
    case: str
    fields: dict  # which config.json is given
    said: str  # regex of the error
    words: str = ""  # in the tables; "" is of what no family has, or goes without saying


DYNAMIC = dict(rope_parameters=dict(rope_type="dynamic", factor=2.0))
REFUSALS = (
    Refusal("llama2", dict(hidden_act="gelu"), "hidden_act='gelu' is not implemented; only 'silu'"),
    Refusal("llama2", dict(clever_new_field=3), "clever_new_field=3 is not a field"),
    Refusal("llama2", dict(quantization_config={"quant_method": "gptq"}), "quant_method='gptq' is not.* give the same"),
    Refusal("llama2", dict(rope_parameters=dict(rope_type="linear", factor=2.0, odd=1)), "rope_scaling.odd=1"),
    Refusal("llama2", dict(hidden_size="wide"), "gives 'wide' for model.embed_dim"),
    Refusal("llama2", dict(model_type="mamba"), "unknown Hugging Face family"),
    Refusal("llama2", DYNAMIC, "rope_scaling='dynamic'", "dynamic rope"),
    Refusal("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True", "scaling by layer"),
    Refusal("gpt2", dict(add_cross_attention=True), "add_cross_attention=True", "cross-attention"),
    Refusal("gpt2", dict(activation_function="relu"), "activation_function='relu'", "other activations"),
    Refusal("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\]", "layers without experts"),
    Refusal("qwen3_moe", dict(use_sliding_window=True), "use_sliding_window=True", "windows"),
    Refusal("gemma2", dict(layer_types=["chunked_attention"] * 4), "layer_types=.*chunked_attention"),
    Refusal("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True", "attention in both directions"),
    Refusal("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True", "attention in both directions"),
    Refusal("gemma3", dict(model_type="gemma3"), "unknown Hugging Face family", "images"),
    Refusal("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit=5.0"),
    Refusal("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True", "`norm_topk_prob`"),
    Refusal("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc'"),
    Refusal("deepseek_v3", dict(quantization_config={"quant_method": "fp8"}), "fp8' without weight_block_size"),
    Refusal("deepseek_v3", dict(rope_interleave=False), "rope_interleave=False", "rope by halves"),
    Refusal("bert", dict(is_decoder=True), "is_decoder=True", "decoders"),
    Refusal("bert", dict(position_embedding_type="relative_key"), "position_embedding_type", "relative positions"),
    Refusal("bert", dict(architectures=["BertForTokenClassification"]), "BertForTokenClassification", "other heads"),
    Refusal("bert", dict(hidden_act="silu"), "hidden_act='silu'"),
    Refusal("t5", dict(is_encoder_decoder=False), "is_encoder_decoder=False", "the encoder alone"),
    Refusal("t5", dict(feed_forward_proj="gated-relu"), "feed_forward_proj='gated-relu'", "other activations"),
    Refusal("t5", dict(dense_act_fn="gelu"), "dense_act_fn='gelu'"),
)


def rows_of_families():
    """-> (model_type, its cases, worst of "rows", "cache", "gradient", number of "tensors", what is refused) of each."""
    configs, stored = json.loads(CONFIGS.read_text()), json.loads(PARITY.read_text())
    for model_type in FAMILIES:
        cases = [name for name in CASES if configs[name]["config"]["model_type"] == model_type]
        worst = {what: max((stored[name][what] for name in cases if what in stored[name]), default=None)
                 for what in ("rows", "cache", "gradient")}
        refused = [r.words for r in REFUSALS if r.words and r.case in cases]
        yield model_type, cases, worst, sum(stored[name]["tensors"] for name in cases), ", ".join(refused)


def long_table() -> str:
    lines = ["| family (`model_type`) | variants compared | whole rows | through the cache | gradients | round trip | refused |",
             "|---|---|---|---|---|---|---|"]
    say = lambda error: "" if error is None else f"{error:.1e}".replace("e-0", "e-")
    for model_type, cases, worst, tensors, refused in rows_of_families():
        variants = "; ".join(CASES[name].variant for name in cases)
        lines.append(f"| {FAMILIES[model_type]} (`{model_type}`) | {variants} | {say(worst['rows'])} | {say(worst['cache'])} | "
                     f"{say(worst['gradient'])} | {tensors} tensors bit-equal | {refused} |")
    return "\n".join(lines)


def short_table() -> str:
    lines = ["| family | logits differ by | round trip | not supported |", "|---|---|---|---|"]
    for model_type, _, worst, _, refused in rows_of_families():
        error = max(worst["rows"], worst["cache"] or 0.0)
        lines.append(f"| {FAMILIES[model_type]} | {error:.1e} | bit-equal | {refused} |".replace("e-0", "e-"))
    return "\n".join(lines)


MARKS = "<!-- written by tests/test_huggingface.py -->", "<!-- end -->"


def with_table(text: str, table: str) -> str:
    """The text of a page, with the table between its marks."""
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


if __name__ == "__main__":
    update()
