"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (text; arXiv:2503.19786)."""

from jaxlm.models.families.family import SIZES, Family, Part, always, context_length, only, register, same
from jaxlm.models.families.llama import ATTENTION, FEEDFORWARD, HEAD_NORMS, OUTER, one
from jaxlm.models.families.rope import rope, rope_of_two
from jaxlm.models.families.windows import repeat, windows

NORMS = (
    one("layers.{layer}.input_layernorm.weight", "layers/norm1/scale", "D -> D"),
    one("layers.{layer}.post_attention_layernorm.weight", "layers/post_norm1/scale", "D -> D"),
    one("layers.{layer}.pre_feedforward_layernorm.weight", "layers/norm2/scale", "D -> D"),
    one("layers.{layer}.post_feedforward_layernorm.weight", "layers/post_norm2/scale", "D -> D"),
)

PARTS = (
    *SIZES,
    same("head_dim", "head_dim", 256),
    same("intermediate_size", "mlp_dim"),
    same("query_pre_attn_scalar", "attention_scale_dim", 256),
    same("rms_norm_eps", "norm_eps", 1e-6),
    same("tie_word_embeddings", "tie_embeddings", True),
    same("attention_bias", "attention_bias", False),
    only("hidden_activation", "gelu_pytorch_tanh"),
    only("hidden_act", "gelu_pytorch_tanh"),
    only("use_bidirectional_attention", False),
    context_length(),
    Part(lambda fields: {"model.embed_scale": fields.take("hidden_size") ** 0.5}, lambda config: {}),
    always(norm="rms", norm_scale_from_one=True, norm_place="both", feedforward="geglu"),
)


def softcaps(scores: float, logits: float) -> tuple[Part, Part]:
    """Null is none; absent is the default of transformers."""

    def cap(field, key, default):
        def read(fields):
            given = field in fields.values
            return {f"model.{key}": float(fields.take(field, 0.0 if given else default))}

        return Part(read, lambda config: {field: config.model[key] or None})

    return (cap("attn_logit_softcapping", "attention_softcap", scores), cap("final_logit_softcapping", "final_softcap", logits))


def every_sixth_is_global(fields, num_layers: int) -> str:
    every = fields.take("_sliding_window_pattern", fields.take("sliding_window_pattern", 6))
    return repeat("L" * (every - 1) + "G", num_layers)


GEMMA2 = register(Family("gemma2", "Gemma2ForCausalLM", (
    *PARTS, *softcaps(50.0, 30.0), windows(lambda fields, num_layers: repeat("LG", num_layers)), rope()),
    OUTER + ATTENTION + FEEDFORWARD + NORMS))

GEMMA3 = register(Family("gemma3_text", "Gemma3ForCausalLM", (
    *PARTS, *softcaps(0.0, 0.0), always(qk_norm=True), windows(every_sixth_is_global), rope_of_two(1e6, 1e4)),
    OUTER + ATTENTION + HEAD_NORMS + FEEDFORWARD + NORMS))
