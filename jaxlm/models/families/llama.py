"""Llama 2, 3, 3.1 and later (text): arXiv:2307.09288, arXiv:2407.21783. Its tensors' names are those of most families."""

from jaxlm.models.families.family import SIZES, Family, Tensor, always, context_length, only, register, same
from jaxlm.models.families.rope import rope


def one(name: str, path: str, layout: str, beside: str = "") -> Tensor:
    return Tensor(name, ((path, layout),), beside=beside)


OUTER = (
    one("embed_tokens.weight", "embedding", "V D -> V D"),
    one("norm.weight", "final_norm/scale", "D -> D"),
    one("lm_head.weight", "head/kernel", "V D -> D V"),
)

ATTENTION = (
    one("layers.{layer}.self_attn.q_proj.weight", "layers/attention/query/kernel", "(N H) D -> D N H"),
    one("layers.{layer}.self_attn.k_proj.weight", "layers/attention/key/kernel", "(K H) D -> D K H"),
    one("layers.{layer}.self_attn.v_proj.weight", "layers/attention/value/kernel", "(K H) D -> D K H"),
    one("layers.{layer}.self_attn.o_proj.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
    one("layers.{layer}.self_attn.q_proj.bias", "layers/attention/query/bias", "(N H) -> N H"),
    one("layers.{layer}.self_attn.k_proj.bias", "layers/attention/key/bias", "(K H) -> K H"),
    one("layers.{layer}.self_attn.v_proj.bias", "layers/attention/value/bias", "(K H) -> K H"),
    one("layers.{layer}.self_attn.o_proj.bias", "layers/attention/out/bias", "D -> D"),
)

HEAD_NORMS = (
    one("layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "H -> H"),
    one("layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "H -> H"),
)

FEEDFORWARD = (
    one("layers.{layer}.mlp.gate_proj.weight", "layers/feedforward/gate/kernel", "F D -> D F"),
    one("layers.{layer}.mlp.up_proj.weight", "layers/feedforward/up/kernel", "F D -> D F"),
    one("layers.{layer}.mlp.down_proj.weight", "layers/feedforward/down/kernel", "D F -> F D"),
    one("layers.{layer}.mlp.gate_proj.bias", "layers/feedforward/gate/bias", "F -> F"),
    one("layers.{layer}.mlp.up_proj.bias", "layers/feedforward/up/bias", "F -> F"),
    one("layers.{layer}.mlp.down_proj.bias", "layers/feedforward/down/bias", "D -> D"),
)

NORMS = (
    one("layers.{layer}.input_layernorm.weight", "layers/norm1/scale", "D -> D"),
    one("layers.{layer}.post_attention_layernorm.weight", "layers/norm2/scale", "D -> D"),
)

TENSORS = OUTER + ATTENTION + FEEDFORWARD + NORMS

SWIGLU = (
    *SIZES,
    same("intermediate_size", "mlp_dim"),
    same("tie_word_embeddings", "tie_embeddings", False),
    context_length(),
    only("hidden_act", "silu"),
    always(norm="rms", feedforward="swiglu"),
)

LLAMA = register(Family("llama", "LlamaForCausalLM", (
    *SWIGLU,
    same("rms_norm_eps", "norm_eps", 1e-6),
    same("attention_bias", "attention_bias", False),
    same("mlp_bias", "mlp_bias", False),
    only("pretraining_tp", 1, 2, 4),  # the same sums in another order
    only("rope_interleaved", False, written=False),
    only("is_llama_config", True, written=False),
    rope(),
), TENSORS))
