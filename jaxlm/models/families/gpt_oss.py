"""GPT-OSS (arXiv:2508.10925): attention sinks, a window in every other layer, and a mixture of experts whose kernels lie in one
tensor a layer, those of gate and up in turns."""

from jaxlm.models.families.family import SIZES, Family, Tensor, always, context_length, only, register, same, unused
from jaxlm.models.families.llama import ATTENTION, NORMS, OUTER, one
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import repeat, windows

EXPERTS = "layers/feedforward/experts"

GPT_OSS = register(Family("gpt_oss", "GptOssForCausalLM", (
    *SIZES,
    same("head_dim", "head_dim", 64),
    same("intermediate_size", "mlp_dim"),
    same("num_local_experts", "num_experts", 128),
    same("num_experts_per_tok", "experts_per_token", 4, also="experts_per_token"),
    same("rms_norm_eps", "norm_eps", 1e-5),
    same("attention_bias", "attention_bias", True),
    same("tie_word_embeddings", "tie_embeddings", False),
    only("hidden_act", "silu"),
    only("swiglu_alpha", 1.702),
    only("swiglu_limit", 7.0),
    unused("initial_context_length"),  # again in rope_scaling
    context_length(),
    always(norm="rms", feedforward="moe", expert_form="clamped_swiglu", mlp_bias=True, router_bias=True, attention_sinks=True),
    windows(lambda fields, num_layers: repeat("LG", num_layers)),
    rope(150_000.0),
), OUTER + ATTENTION + NORMS + (
    one("layers.{layer}.self_attn.sinks", "layers/attention/sink_bias", "N -> N"),
    one("layers.{layer}.mlp.router.weight", "layers/feedforward/router/kernel", "E D -> D E"),
    one("layers.{layer}.mlp.router.bias", "layers/feedforward/router/logit_bias", "E -> E"),
    Tensor("layers.{layer}.mlp.experts.gate_up_proj", (
        (f"{EXPERTS}/gate/kernel", "E D (F 1) -> E D F"), (f"{EXPERTS}/up/kernel", "E D (F 1) -> E D F")), axis=3),
    Tensor("layers.{layer}.mlp.experts.gate_up_proj_bias", (
        (f"{EXPERTS}/gate/bias", "E (F 1) -> E F"), (f"{EXPERTS}/up/bias", "E (F 1) -> E F")), axis=2),
    one("layers.{layer}.mlp.experts.down_proj", f"{EXPERTS}/down/kernel", "E F D -> E F D"),
    one("layers.{layer}.mlp.experts.down_proj_bias", f"{EXPERTS}/down/bias", "E D -> E D"),
)))
