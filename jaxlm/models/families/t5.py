"""T5, T5 1.1 and Flan-T5 (arXiv:1910.10683, arXiv:2210.11416): an encoder and a decoder; 1.1 has a gate and a head of its own."""

from jaxlm.models.families.family import Family, Part, Tensor, always, only, register, same
from jaxlm.models.families.llama import one

FORMS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gelu": "gelu_exact", "gelu_new": "gelu"}


def read_form(fields) -> dict:
    name = fields.take("feed_forward_proj", "relu")
    if name not in FORMS:
        fields.refuse("feed_forward_proj", name, f"{', '.join(FORMS)} are")
        return {}
    activation = "gelu_new" if name == "gated-gelu" else name.split("-")[-1]
    for field, value in (("dense_act_fn", activation), ("is_gated_act", name.startswith("gated"))):
        if (found := fields.take(field, value)) != value:
            fields.refuse(field, found, f"only that of feed_forward_proj={name!r} is")
    return {"model.feedforward": FORMS[name]}


def write_form(config) -> dict:
    names = {ours: name for name, ours in FORMS.items()}
    return {"feed_forward_proj": names[config.model.feedforward]} if config.model.feedforward in names else {}


def read_depths(fields) -> dict:
    encoder = fields.take("num_layers", 6)
    decoder = fields.take("num_decoder_layers", encoder)
    return {"model.num_layers": decoder, "model.encoder_layers": 0 if encoder == decoder else encoder}


def write_depths(config) -> dict:
    m = config.model
    return {"num_layers": m.encoder_layers or m.num_layers, "num_decoder_layers": m.num_layers}


def read_head(fields) -> dict:
    """The first T5 scales what a tied head sees. transformers 5 ties those of 1.1 too, where a file has none of its own."""
    tied = fields.take("tie_word_embeddings", True)
    scaled = fields.take("scale_decoder_outputs", tied)
    return {"model.tie_embeddings": tied, "model.logit_scale": fields.take("d_model", 512) ** -0.5 if scaled else 1.0}


def write_head(config) -> dict:
    m = config.model
    return {"tie_word_embeddings": m.tie_embeddings, "scale_decoder_outputs": m.logit_scale != 1.0}


def block(side: str, stack: str, *more: Tensor) -> tuple[Tensor, ...]:
    last = f"{side}.block.{{layer}}.layer.{2 if more else 1}"
    gate, up = f"{stack}/feedforward/gate", f"{stack}/feedforward/up"
    return (
        *attention(f"{side}.block.{{layer}}.layer.0.SelfAttention", f"{stack}/attention"),
        one(f"{side}.block.{{layer}}.layer.0.layer_norm.weight", f"{stack}/norm1/scale", "D -> D"),
        *more,
        one(f"{last}.DenseReluDense.wi.weight", f"{up}/kernel", "F D -> D F"),
        one(f"{last}.DenseReluDense.wi_0.weight", f"{gate}/kernel", "F D -> D F"),
        one(f"{last}.DenseReluDense.wi_1.weight", f"{up}/kernel", "F D -> D F", f"{gate}/kernel"),
        one(f"{last}.DenseReluDense.wo.weight", f"{stack}/feedforward/down/kernel", "D F -> F D"),
        one(f"{last}.layer_norm.weight", f"{stack}/norm2/scale", "D -> D"))


def attention(name: str, path: str) -> tuple[Tensor, ...]:
    return (*(one(f"{name}.{ours[0]}.weight", f"{path}/{ours}/kernel", "(N H) D -> D N H") for ours in ("query", "key", "value")),
            one(f"{name}.o.weight", f"{path}/out/kernel", "D (N H) -> N H D"))


DISTANCES = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

T5 = register(Family("t5", "T5ForConditionalGeneration", (
    same("vocab_size", "vocab_size", 32128),
    same("d_model", "embed_dim", 512),
    same("d_kv", "head_dim", 64),
    same("d_ff", "mlp_dim", 2048),
    same("num_heads", "num_heads", 8),
    same("relative_attention_num_buckets", "relative_buckets", 32),
    same("relative_attention_max_distance", "relative_max_distance", 128),
    same("layer_norm_epsilon", "norm_eps", 1e-6),
    only("is_encoder_decoder", True),
    only("is_decoder", False),
    only("output_past", True, written=False),  # an older name of use_cache
    Part(lambda fields: {"seq_len": fields.take("n_positions", 512)}, lambda config: {}),  # any length is read
    always(family="encoder_decoder", norm="rms", position="relative", attention_scale_dim=1),
    Part(read_form, write_form), Part(read_depths, write_depths), Part(read_head, write_head),
), (
    one("shared.weight", "embedding", "V D -> V D"),
    one("lm_head.weight", "head/kernel", "V D -> D V"),
    one(f"encoder.{DISTANCES}", "encoder_position/embedding", "B N -> B N"),
    one(f"decoder.{DISTANCES}", "position/embedding", "B N -> B N"),
    one("encoder.final_layer_norm.weight", "encoder_norm/scale", "D -> D"),
    one("decoder.final_layer_norm.weight", "final_norm/scale", "D -> D"),
    *block("encoder", "encoder_layers"),
    *block("decoder", "layers",
           *attention("decoder.block.{layer}.layer.1.EncDecAttention", "layers/cross"),
           one("decoder.block.{layer}.layer.1.layer_norm.weight", "layers/cross_norm/scale", "D -> D")),
), prefix="", left_out=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    copies=dict.fromkeys(("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "embedding")))
