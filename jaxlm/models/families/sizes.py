"""The published sizes: what each one's config.json says of the model."""


def fields(text: str, **more) -> dict:
    """The text: "vocab_size hidden_size intermediate_size layers heads key/value heads [head_dim]"."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim")
    return dict(zip(names, map(int, text.split()), strict=False)) | more


def gpt2(embed_dim: int, num_layers: int, num_heads: int) -> dict:
    return dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=embed_dim, n_layer=num_layers, n_head=num_heads,
                layer_norm_epsilon=1e-5, activation_function="gelu_new")


def llama3(text: str, factor: float, tied: bool = False, **more) -> dict:
    scaling = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    return dict(model_type="llama", max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
                tie_word_embeddings=tied, rope_scaling=scaling) | fields("128256 " + text) | more


def named(model_type: str, text: str, **more) -> dict:
    return dict(model_type=model_type) | fields(text) | more


LLAMA2 = dict(max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False)
QWEN = dict(max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
QWEN3 = QWEN | dict(max_position_embeddings=40960, attention_bias=False)
QWEN3_MOE = QWEN3 | dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
GEMMA2 = dict(max_position_embeddings=8192, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
GEMMA3 = dict(max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4, query_pre_attn_scalar=256)
MIXTRAL = dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
OLMO2 = dict(max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=500000.0, tie_word_embeddings=False)
MISTRAL = dict(max_position_embeddings=32768, rms_norm_eps=1e-5, tie_word_embeddings=False)
TIED = dict(tie_word_embeddings=True)

SIZES = {
    "gpt2": gpt2(768, 12, 12),
    "gpt2_medium": gpt2(1024, 24, 16),
    "gpt2_large": gpt2(1280, 36, 20),
    "gpt2_xl": gpt2(1600, 48, 25),
    "llama2_7b": named("llama", "32000 4096 11008 32 32 32", **LLAMA2),
    "llama2_13b": named("llama", "32000 5120 13824 40 40 40", **LLAMA2),
    "llama2_70b": named("llama", "32000 8192 28672 80 64 8", **LLAMA2),
    "llama3_8b": llama3("4096 14336 32 32 8", 8.0, rope_scaling=None, max_position_embeddings=8192),
    "llama3_70b": llama3("8192 28672 80 64 8", 8.0, rope_scaling=None, max_position_embeddings=8192),
    "llama3_1_8b": llama3("4096 14336 32 32 8", 8.0),
    "llama3_1_70b": llama3("8192 28672 80 64 8", 8.0),
    "llama3_1_405b": llama3("16384 53248 126 128 8", 8.0),
    "llama3_2_1b": llama3("2048 8192 16 32 8 64", 32.0, tied=True),
    "llama3_2_3b": llama3("3072 8192 28 24 8 128", 32.0, tied=True),
    "mistral_7b": named("mistral", "32000 4096 14336 32 32 8", sliding_window=4096, **MISTRAL),
    "mistral_7b_v0_3": named("mistral", "32768 4096 14336 32 32 8", rope_theta=1e6, **MISTRAL),
    "qwen2_5_0_5b": named("qwen2", "151936 896 4864 24 14 2", **QWEN | TIED),
    "qwen2_5_1_5b": named("qwen2", "151936 1536 8960 28 12 2", **QWEN | TIED),
    "qwen2_5_3b": named("qwen2", "151936 2048 11008 36 16 2", **QWEN | TIED),
    "qwen2_5_7b": named("qwen2", "152064 3584 18944 28 28 4", **QWEN),
    "qwen2_5_14b": named("qwen2", "152064 5120 13824 48 40 8", **QWEN),
    "qwen2_5_32b": named("qwen2", "152064 5120 27648 64 40 8", **QWEN),
    "qwen2_5_72b": named("qwen2", "152064 8192 29568 80 64 8", **QWEN),
    "qwen3_0_6b": named("qwen3", "151936 1024 3072 28 16 8 128", **QWEN3 | TIED),
    "qwen3_1_7b": named("qwen3", "151936 2048 6144 28 16 8 128", **QWEN3 | TIED),
    "qwen3_4b": named("qwen3", "151936 2560 9728 36 32 8 128", **QWEN3 | TIED),
    "qwen3_8b": named("qwen3", "151936 4096 12288 36 32 8 128", **QWEN3),
    "qwen3_14b": named("qwen3", "151936 5120 17408 40 40 8 128", **QWEN3),
    "qwen3_32b": named("qwen3", "151936 5120 25600 64 64 8 128", **QWEN3),
    "qwen3_30b_a3b": named("qwen3_moe", "151936 2048 6144 48 32 4 128", moe_intermediate_size=768, **QWEN3_MOE),
    "qwen3_235b_a22b": named("qwen3_moe", "151936 4096 12288 94 64 4 128", moe_intermediate_size=1536, **QWEN3_MOE),
    "mixtral_8x7b": named("mixtral", "32000 4096 14336 32 32 8", max_position_embeddings=32768, **MIXTRAL),
    "mixtral_8x22b": named("mixtral", "32000 6144 16384 56 48 8", max_position_embeddings=65536, **MIXTRAL),
    "gemma2_2b": named("gemma2", "256000 2304 9216 26 8 4 256", query_pre_attn_scalar=256, **GEMMA2),
    "gemma2_9b": named("gemma2", "256000 3584 14336 42 16 8 256", query_pre_attn_scalar=256, **GEMMA2),
    "gemma2_27b": named("gemma2", "256000 4608 36864 46 32 16 128", query_pre_attn_scalar=144, **GEMMA2),
    "gemma3_270m": named("gemma3_text", "262144 640 2048 18 4 1 256", sliding_window=512, **GEMMA3),
    "gemma3_1b": named("gemma3_text", "262144 1152 6912 26 4 1 256", sliding_window=512, **GEMMA3),
    "olmo2_1b": named("olmo2", "100352 2048 8192 16 16 16", **OLMO2),
    "olmo2_7b": named("olmo2", "100352 4096 11008 32 32 32", **OLMO2),
    "olmo2_13b": named("olmo2", "100352 5120 13824 40 40 40", **OLMO2),
    "olmo2_32b": named("olmo2", "100352 5120 27648 64 40 8", **OLMO2),
    "phi3_mini": named("phi3", "32064 3072 8192 32 32 32", max_position_embeddings=4096, rms_norm_eps=1e-5, sliding_window=2047),
    "phi4": named("phi3", "100352 5120 17920 40 40 10", max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=250000.0),
    "smollm3_3b": named("smollm3", "128256 2048 11008 36 16 4", max_position_embeddings=65536, rms_norm_eps=1e-6, rope_theta=5e6),
}
