"""Qwen 2 and 2.5 (arXiv:2407.10671), Qwen 3 (arXiv:2505.09388), and the latter's mixture of experts."""

from jaxlm.models.families.family import SIZES, Family, always, context_length, only, register, same, unused
from jaxlm.models.families.llama import ATTENTION, HEAD_NORMS, NORMS, OUTER, SWIGLU, TENSORS, one
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import windows


def after_the_first(fields, num_layers: int) -> str:
    """Layers from `max_window_layers` on have a window."""
    first = min(fields.take("max_window_layers", 28), num_layers)
    return "G" * first + "L" * (num_layers - first)


WINDOWS = windows(after_the_first, switch=True)
NO_MROPE = only("use_mrope", False, written=False)

QWEN2 = register(Family("qwen2", "Qwen2ForCausalLM", (
    *SWIGLU, same("rms_norm_eps", "norm_eps", 1e-6), always(attention_bias=True, attention_out_bias=False), WINDOWS, NO_MROPE,
    rope()),
    TENSORS))

QWEN3 = register(Family("qwen3", "Qwen3ForCausalLM", (
    *SWIGLU, same("head_dim", "head_dim", 128), same("rms_norm_eps", "norm_eps", 1e-6),
    same("attention_bias", "attention_bias", False), always(qk_norm=True), WINDOWS, rope()),
    TENSORS + HEAD_NORMS))

QWEN3_MOE = register(Family("qwen3_moe", "Qwen3MoeForCausalLM", (
    *SIZES,
    same("moe_intermediate_size", "mlp_dim", 768),
    same("num_experts", "num_experts", 128, also="num_local_experts"),
    same("num_experts_per_tok", "experts_per_token", 8),
    same("norm_topk_prob", "router_normalize", False),
    same("tie_word_embeddings", "tie_embeddings", False),
    same("rms_norm_eps", "norm_eps", 1e-6),
    same("attention_bias", "attention_bias", False),
    only("hidden_act", "silu"),
    only("decoder_sparse_step", 1),
    only("mlp_only_layers", []),
    only("use_sliding_window", False),
    unused("intermediate_size", "sliding_window", "max_window_layers"),  # of layers without experts; of use_sliding_window
    context_length(),
    always(norm="rms", feedforward="moe", expert_form="swiglu", qk_norm=True),
    rope(),
), OUTER + ATTENTION + HEAD_NORMS + NORMS + (
    one("layers.{layer}.mlp.gate.weight", "layers/feedforward/router/kernel", "E D -> D E"),
    one("layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "layers/feedforward/experts/gate/kernel", "F D -> D F"),
    one("layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers/feedforward/experts/up/kernel", "F D -> D F"),
    one("layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layers/feedforward/experts/down/kernel", "D F -> F D"),
)))
