"""BERT (Devlin et al., arXiv:1810.04805): an encoder with the head for masked words, with one for classes of texts on the pooler,
with the pooler alone, or with nothing; `architectures` of config.json tells which."""

from jaxlm.models.families.family import Family, Part, Tensor, always, only, register, same, unused
from jaxlm.models.families.llama import one

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}


def activation(field: str, names: dict[str, str], default: str) -> Part:
    """names: {its: our feed-forward}."""

    def read(fields):
        if (name := fields.take(field, default)) not in names:
            fields.refuse(field, name, f"{', '.join(names)} are")
            return {}
        return {"model.feedforward": names[name]}

    theirs = {ours: name for name, ours in reversed(names.items())}
    return Part(read, lambda config: {field: theirs[config.model.feedforward]} if config.model.feedforward in theirs else {})


def read_heads(fields) -> dict:
    architecture = fields.take("architectures", ["BertForMaskedLM"])[0]
    labels = fields.take("num_labels", len(fields.take("id2label", ("LABEL_0", "LABEL_1"))))
    heads = {
        "BertForMaskedLM": {"model.masked_lm_head": True},
        "BertForPreTraining": {"model.masked_lm_head": True},
        "BertForSequenceClassification": {"model.pooler": True, "model.num_classes": labels},
        "BertModel": {"model.pooler": True}}
    if architecture not in heads:
        fields.refuse("architectures", [architecture], f"{', '.join(heads)} are")
        return {}
    return heads[architecture]


def write_heads(config) -> dict:
    m = config.model
    if m.num_classes:
        return {"architectures": ["BertForSequenceClassification"], "num_labels": m.num_classes}
    return {"architectures": ["BertForMaskedLM" if m.masked_lm_head else "BertModel"]}


def linear(name: str, path: str, kernel: str) -> tuple[Tensor, ...]:
    """kernel: its layout; that of the bias is the same without the inputs."""
    outputs = kernel.split(" -> ")[1][2:]
    return one(f"{name}.weight", f"{path}/kernel", kernel), one(f"{name}.bias", f"{path}/bias", f"({outputs}) -> {outputs}")


def norm(name: str, path: str) -> tuple[Tensor, ...]:
    return tuple(one(f"{name}.{theirs}", f"{path}/{ours}", "D -> D") for theirs, ours in (("weight", "scale"), ("bias", "bias")))


LAYER = "encoder.layer.{layer}"

BERT = register(Family("bert", "BertForMaskedLM", (
    same("vocab_size", "vocab_size"),
    same("hidden_size", "embed_dim"),
    same("num_hidden_layers", "num_layers"),
    same("num_attention_heads", "num_heads"),
    same("intermediate_size", "mlp_dim"),
    same("max_position_embeddings", "seq_len"),
    same("type_vocab_size", "token_types", 2),
    same("layer_norm_eps", "norm_eps", 1e-12),
    only("tie_word_embeddings", True),
    only("is_decoder", False),
    only("add_cross_attention", False),
    only("position_embedding_type", "absolute", written=False),
    unused("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
           "pooler_type"),  # as TensorFlow's first ones had them
    always(family="encoder", norm="layer", norm_place="sum", embed_norm=True, position="learned", attention_bias=True,
           mlp_bias=True),
    activation("hidden_act", ACTIVATIONS, "gelu"),
    Part(read_heads, write_heads),
), (
    one("embeddings.word_embeddings.weight", "embedding", "V D -> V D"),
    one("embeddings.token_type_embeddings.weight", "token_type_embedding", "Y D -> Y D"),
    one("embeddings.position_embeddings.weight", "position/embedding", "T D -> T D"),
    *norm("embeddings.LayerNorm", "embed_norm"),
    *linear(f"{LAYER}.attention.self.query", "layers/attention/query", "(N H) D -> D N H"),
    *linear(f"{LAYER}.attention.self.key", "layers/attention/key", "(N H) D -> D N H"),
    *linear(f"{LAYER}.attention.self.value", "layers/attention/value", "(N H) D -> D N H"),
    one(f"{LAYER}.attention.output.dense.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
    one(f"{LAYER}.attention.output.dense.bias", "layers/attention/out/bias", "D -> D"),
    *norm(f"{LAYER}.attention.output.LayerNorm", "layers/sum_norm1"),
    *linear(f"{LAYER}.intermediate.dense", "layers/feedforward/up", "F D -> D F"),
    *linear(f"{LAYER}.output.dense", "layers/feedforward/down", "D F -> F D"),
    *norm(f"{LAYER}.output.LayerNorm", "layers/sum_norm2"),
    *linear("cls.predictions.transform.dense", "transform", "M D -> D M"),
    *norm("cls.predictions.transform.LayerNorm", "transform_norm"),
    one("cls.predictions.bias", "head_bias", "V -> V"),
    *linear("pooler.dense", "pooler", "M D -> D M"),
    *linear("classifier", "classifier", "C D -> D C"),
), prefix="bert.", outside=r"(cls|classifier)\..*",
    left_out=r"embeddings\.position_ids|pooler\..*|cls\.seq_relationship\..*",  # the last two: of the other heads of pretraining
    copies={"cls.predictions.decoder.weight": "embedding", "cls.predictions.decoder.bias": "head_bias"},
    older=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))))
