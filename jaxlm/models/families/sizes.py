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


def deepseek(model_type: str, text: str, dense: int, mscale: float, **more) -> dict:
    """dense: intermediate_size of the first layers."""
    scaling = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=mscale, mscale_all_dim=mscale,
                   original_max_position_embeddings=4096)
    sizes = fields(text)
    return sizes | dict(model_type=model_type, moe_intermediate_size=sizes["intermediate_size"], intermediate_size=dense,
                        max_position_embeddings=163840, rope_scaling=scaling, kv_lora_rank=512, qk_rope_head_dim=64,
                        qk_nope_head_dim=128, v_head_dim=128) | more


def bert(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int) -> dict:
    return dict(model_type="bert", architectures=["BertForMaskedLM"], vocab_size=vocab_size, hidden_size=hidden_size,
                intermediate_size=4 * hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads,
                max_position_embeddings=512)


def t5(text: str, **more) -> dict:
    """The text: "d_model d_kv d_ff layers heads"."""
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return dict(model_type="t5", vocab_size=32128) | dict(zip(names, map(int, text.split()), strict=True)) | more


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
GPT_OSS = dict(max_position_embeddings=131072, rope_theta=150000.0, sliding_window=128, rms_norm_eps=1e-5, swiglu_limit=7.0,
               rope_scaling=dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                                 original_max_position_embeddings=4096))
T5_1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # and Flan-T5

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
    "gpt_oss_20b": named("gpt_oss", "201088 2880 2880 24 64 8 64", num_local_experts=32, **GPT_OSS),
    "gpt_oss_120b": named("gpt_oss", "201088 2880 2880 36 64 8 64", num_local_experts=128, **GPT_OSS),
    "deepseek_v2_lite": deepseek("deepseek_v2", "102400 2048 1408 27 16 16", 10944, 0.707, q_lora_rank=None, n_routed_experts=64,
                                 num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "deepseek_v2": deepseek("deepseek_v2", "102400 5120 1536 60 128 128", 12288, 0.707, q_lora_rank=1536, n_routed_experts=160,
                            num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=16.0,
                            topk_method="group_limited_greedy", n_group=8, topk_group=3),
    "deepseek_v3": deepseek("deepseek_v3", "129280 7168 2048 61 128 128", 18432, 1.0, q_lora_rank=1536, n_routed_experts=256,
                            num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=3, routed_scaling_factor=2.5,
                            n_group=8, topk_group=4),
    "bert_base_uncased": bert(30522, 768, 12, 12),
    "bert_large_uncased": bert(30522, 1024, 24, 16),
    "bert_base_cased": bert(28996, 768, 12, 12),
    "bert_large_cased": bert(28996, 1024, 24, 16),
    "t5_small": t5("512 64 2048 6 8"),
    "t5_base": t5("768 64 3072 12 12"),
    "t5_large": t5("1024 64 4096 24 16"),
    "t5_3b": t5("1024 128 16384 24 32"),
    "t5_11b": t5("1024 128 65536 24 128"),
    "t5_v1_1_small": t5("512 64 1024 8 6", **T5_1_1),
    "t5_v1_1_base": t5("768 64 2048 12 12", **T5_1_1),
    "t5_v1_1_large": t5("1024 64 2816 24 16", **T5_1_1),
    "t5_v1_1_xl": t5("2048 64 5120 24 32", **T5_1_1),
    "t5_v1_1_xxl": t5("4096 64 10240 24 64", **T5_1_1),
}
