"""OLMo 2 (arXiv:2501.00656): norms come after attention and feed-forward, and queries and keys are normalised over all heads."""

from jaxlm.models.families.family import Family, always, register, same
from jaxlm.models.families.llama import ATTENTION, FEEDFORWARD, OUTER, SWIGLU, one
from jaxlm.models.families.rope import rope

OLMO2 = register(Family("olmo2", "Olmo2ForCausalLM", (
    *SWIGLU, same("rms_norm_eps", "norm_eps", 1e-5), same("attention_bias", "attention_bias", False),
    always(norm_place="post", qk_norm=True, qk_norm_over="all"), rope()),
    OUTER + ATTENTION + FEEDFORWARD + (
        one("layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "(N H) -> (N H)"),
        one("layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "(K H) -> (K H)"),
        one("layers.{layer}.post_attention_layernorm.weight", "layers/post_norm1/scale", "D -> D"),
        one("layers.{layer}.post_feedforward_layernorm.weight", "layers/post_norm2/scale", "D -> D"),
    )))
