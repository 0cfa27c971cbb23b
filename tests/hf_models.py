"""Tiny Hugging Face models of every family, random, made by transformers itself, with what they answer."""

import functools
import tempfile

import numpy as np

LENGTH = 96
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


def torch_model(name):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    kind, fields = CASES[name]
    ending = {"GPT2": "LMHeadModel"}.get(kind, "ForCausalLM")
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, kind + ending)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases start at 0 and 1, where a wrong mapping would not show
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter))
    return model


@functools.cache
def made(name):
    """-> (folder, logits of each of PIECES)."""
    import torch

    model = torch_model(name)
    folder = tempfile.mkdtemp(prefix=f"hf-{name}-")
    model.save_pretrained(folder)
    tokens = text_rows()[0]
    with torch.no_grad():
        logits = [model(torch.from_numpy(tokens[None, row, begin:end]).long()).logits[0].numpy() for row, begin, end in PIECES]
    return folder, logits
