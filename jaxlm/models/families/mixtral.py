"""Mixtral 8x7B and 8x22B (arXiv:2401.04088): Mistral with a mixture of experts."""

from jaxlm.models.families.family import SIZES, Family, always, context_length, only, register, same
from jaxlm.models.families.llama import ATTENTION, NORMS, OUTER, one
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import window_of_all

MIXTRAL = register(Family("mixtral", "MixtralForCausalLM", (
    *SIZES,
    same("intermediate_size", "mlp_dim"),
    same("num_local_experts", "num_experts", 8),
    same("num_experts_per_tok", "experts_per_token", 2),
    same("tie_word_embeddings", "tie_embeddings", False),
    same("rms_norm_eps", "norm_eps", 1e-5),
    only("hidden_act", "silu"),
    context_length(),
    always(norm="rms", feedforward="moe", expert_form="swiglu"),
    window_of_all(),
    rope(1e6),
), OUTER + ATTENTION + NORMS + (
    one("layers.{layer}.block_sparse_moe.gate.weight", "layers/feedforward/router/kernel", "E D -> D E"),
    one("layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "layers/feedforward/experts/gate/kernel", "F D -> D F"),
    one("layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "layers/feedforward/experts/up/kernel", "F D -> D F"),
    one("layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "layers/feedforward/experts/down/kernel", "D F -> F D"),
)))
