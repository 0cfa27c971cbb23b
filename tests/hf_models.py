"""Tiny random Hugging Face models of every family, and what transformers answers with them.

`golden` needs neither torch nor transformers: tests/golden/huggingface.json holds each config.json, and names and shapes of its
tensors, whose numbers come from numpy; huggingface.npz holds the answers. `python tests/hf_models.py`
writes them anew, where transformers is.
"""

import functools
import json
import pathlib
import tempfile

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

# name: (class, fields). Windows and the lengths before scaling end well within LENGTH.
CASES = {
    "gpt2": ("GPT2", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=LENGTH, bos_token_id=1, eos_token_id=2)),
    "llama2": ("Llama", dict(SMALL, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama_linear": ("Llama", dict(SMALL, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("Mistral", dict(SMALL, sliding_window=16, head_dim=16)),
    "qwen2": ("Qwen2", dict(SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=2)),
    "qwen2_yarn": ("Qwen2", dict(SMALL, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3Moe", dict(SMALL, head_dim=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3,
                                   norm_topk_prob=True)),
    "mixtral": ("Mixtral", dict(SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)),
    "gemma2": ("Gemma2", dict(SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3", dict(SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=24, num_hidden_layers=6,
                              sliding_window_pattern=3, rope_parameters=dict(
                                  full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                                  sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "olmo2": ("Olmo2", SMALL),
    "phi3": ("Phi3", dict(SMALL, sliding_window=16)),
    "phi3_longrope": ("Phi3", dict(SMALL, original_max_position_embeddings=32, rope_parameters=LONGROPE)),
    "smollm3": ("SmolLM3", SMALL),
}


def text_rows():
    """-> (tokens, segment_ids, positions), each (3, LENGTH): a text, two documents packed, and one with padding after it."""
    tokens = np.random.default_rng(0).integers(3, 96, (3, LENGTH)).astype(np.int32)
    at = np.arange(LENGTH)
    segments = np.stack([np.ones_like(at), np.where(at < 40, 1, 2), np.where(at < 70, 1, 0)]).astype(np.int32)
    positions = np.stack([at, np.where(at < 40, at, at - 40), at]).astype(np.int32)
    return tokens, segments, positions


PIECES = ((0, 0, LENGTH), (1, 0, 40), (1, 40, LENGTH), (2, 0, 70))  # (row, begin, end) of the documents in `text_rows`


def write_folder(stored: dict) -> str:
    """config.json and model.safetensors. Norms and biases are not left at 1 and 0, where a wrong mapping would not show."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hf-"))
    (folder / "config.json").write_text(json.dumps(stored["config"]))
    rng = np.random.default_rng(0)
    planned = []
    for tensor, (shape, mean) in stored["tensors"].items():
        numbers = (mean + (0.3 if len(shape) == 1 else 0.15) * rng.standard_normal(shape)).astype(np.float32)
        planned.append(Planned(tensor, numbers.dtype, tuple(shape), lambda numbers=numbers: numbers))
    write_shards(folder, planned, 10**9)
    return str(folder)


@functools.cache
def golden(name: str):
    """-> (folder, logits of TOKENS for each of PIECES)."""
    logits, ends = np.load(LOGITS)[name], np.cumsum([end - begin for _, begin, end in PIECES])
    return write_folder(json.loads(CONFIGS.read_text())[name]), np.split(logits, ends[:-1])


def by_transformers(name: str):
    """-> (what `write_folder` needs, logits of each of PIECES), made anew by transformers."""
    import transformers

    from jaxlm.huggingface.tensors import open_tensors

    transformers.logging.set_verbosity_error()
    kind, fields = CASES[name]
    cls = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))(**fields)
    with tempfile.TemporaryDirectory() as folder:
        cls(config).save_pretrained(folder)
        stored = {"config": json.loads(pathlib.Path(folder, "config.json").read_text()), "tensors": {
            tensor: [list(t.shape), round(float(t.rows(0, t.shape[0]).mean()))]
            for tensor, t in sorted(open_tensors(folder).items())}}
    return stored, answers(write_folder(stored))


def answers(folder: str) -> list:
    """Of transformers, to each of PIECES: logits (T, V)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = text_rows()[0]
    with torch.no_grad():
        return [model(torch.from_numpy(tokens[None, row, begin:end]).long()).logits[0].numpy() for row, begin, end in PIECES]


def update():
    configs, logits = {}, {}
    for name in CASES:
        configs[name], answered = by_transformers(name)
        logits[name] = np.concatenate(answered)[:, :TOKENS]
    CONFIGS.write_text(json.dumps(configs) + "\n")
    np.savez_compressed(LOGITS, **logits)


if __name__ == "__main__":
    update()
