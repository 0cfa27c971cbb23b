"""A Hugging Face family: how its config.json says what jaxlm's config says, and which of its tensors are which parameters.

Both are tables, each read in both directions: `read_config` and `write_config`, and `jaxlm.huggingface` for the tensors. No JAX
here: `jaxlm.config` reads families before JAX starts.
"""

import json
import pathlib
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxlm.errors import UserError
from jaxlm.registry import Registry

MODEL_TYPES = Registry("Hugging Face family", key="config.json: model_type")

# Fields that do not change what the model computes when it reads a text: how it was made, trained, saved or is sampled from.
NOT_ARCHITECTURE = frozenset("""
    _name_or_path architectures attention_dropout attention_probs_dropout_prob attn_pdrop auto_map bos_token_id
    cache_implementation classifier_dropout decoder_start_token_id dropout_rate dtype embd_pdrop eos_token_id
    gradient_checkpointing hidden_dropout_prob id2label initializer_factor initializer_range label2id model_type n_ctx
    output_attentions output_hidden_states output_router_logits pad_token_id problem_type resid_pdrop return_dict
    router_aux_loss_coef router_jitter_noise summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params torch_dtype transformers.js_config transformers_version unk_token_id
    use_cache""".split())

# jaxlm keys that do not change what the model computes when it reads a text; a family says nothing of them.
NOT_SAID = frozenset("""
    adapter bias_update_rate capacity_factor compute_dtype dropout from_pretrained from_scratch init_fan_in init_std
    load_balance_weight
    lora_alpha lora_modules lora_rank ngram_buckets
    param_dtype remat router_z_weight scan_layers scan_unroll vocab_multiple zero_init_proj""".split())

# Keys that a task asks for, whatever the checkpoint is: they stay as they are where config.json does not say them.
OF_THE_TASK = frozenset("decoder_start num_classes pooling prefix_attention token_dropout".split())

REQUIRED = object()


class Part(NamedTuple):
    """A field or a few, and the config keys that say the same: read(Fields) -> {"model.embed_dim": ...}, write(config) ->
    {"hidden_size": ...}."""

    read: Callable
    write: Callable


class Tensor(NamedTuple):
    """A tensor of the checkpoint, and the parameters that it holds, one after the other along `axis`."""

    name: str  # without Family.prefix; {layer} and {expert} where there is one for each
    parts: tuple[tuple[str, str], ...]  # (parameter's path, layout): "(N H) D -> D N H" is its axes there -> here
    axis: int = 0  # of those in the layout, each by itself
    beside: str = ""  # a parameter without which there is no such tensor; with it, this comes before what was said above


class Family(NamedTuple):
    model_type: str
    architecture: str  # class of transformers
    parts: tuple[Part, ...]
    tensors: tuple[Tensor, ...]  # those whose parameters the model has not are not in the checkpoint
    prefix: str = "model."  # of names, but for those of `outside`; a checkpoint of the bare model leaves it out
    outside: str = r"lm_head\..*"
    left_out: str = r".*\.rotary_emb\.inv_freq"  # tensors that checkpoints may have and transformers does not look at either
    copies: dict = MappingProxyType({"lm_head.weight": "embedding"})  # tensors that are parameters of another name, if tied
    older: tuple[tuple[str, str], ...] = ()  # what names were in older checkpoints: (regex, what it is now)

    def is_outside(self, name: str) -> bool:
        return re.fullmatch(self.outside, name) is not None

    def is_router(self, name: str) -> bool:
        """Whether a tensor is float32 here, however the model is stored."""
        names = [tensor.name for tensor in self.tensors if "/router/" in tensor.parts[0][0]]
        return any(name.endswith(ending.rpartition("}")[2]) for ending in names)


def register(family: Family) -> Family:
    return MODEL_TYPES.register(family.model_type)(family)


class Fields:
    """The fields of a config.json: each must be taken by some part. Problems are gathered."""

    def __init__(self, values: dict):
        self.values, self.taken, self.problems = values, set(NOT_ARCHITECTURE), []

    def take(self, name: str, default: Any = REQUIRED):
        """The value; where it is absent or null, the default. Raises UserError: absent, without a default."""
        self.taken.add(name)
        value = self.values[name] if name in self.values else None
        if value is None and default is REQUIRED:
            raise UserError(f"config.json: {name} is missing; give the folder of a whole checkpoint")
        return default if value is None else value

    def refuse(self, name: str, value, only: str):
        self.problems.append(f"config.json: {name}={value!r} is not implemented; {only}")


# ---- Parts that many families share ------------------------------------------------------------------------------------------


def same(field: str, key: str, default=REQUIRED, also: str = "") -> Part:
    """A field and a key with the same value. also: another name that the field has in some versions."""
    name = key if key == "seq_len" else f"model.{key}"

    def read(fields):
        return {name: fields.take(field, fields.take(also, default) if also else default)}

    return Part(read, lambda config: {field: config_value(config, key)})


def config_value(config, key: str):
    return config.seq_len if key == "seq_len" else config.model[key]


def only(field: str, *values, written: bool = True) -> Part:
    """A field of which jaxlm implements these values only, the first where it is absent. written: False for what some published
    files have, but transformers does not."""

    def read(fields):
        if (value := fields.take(field, values[0])) not in values:
            fields.refuse(field, value, "only " + " and ".join(map(repr, values)) + (" are" if len(values) > 1 else " is"))
        return {}

    return Part(read, lambda config: {field: values[0]} if written else {})


def always(**keys) -> Part:
    """What the family leaves no choice about."""
    return Part(lambda fields: {f"model.{key}": value for key, value in keys.items()}, lambda config: {})


def unused(*fields: str) -> Part:
    """Fields that say nothing beside the others."""
    return Part(lambda f: {field: f.take(field, None) for field in fields} and {}, lambda config: {})


LONGEST = 4096  # tokens that a converted model is set up for, at most; --config.seq_len sets another


def context_length(field: str = "max_position_embeddings") -> Part:
    """How long texts may be; nothing in the model depends on it, but seq_len is also the room of the key/value cache."""
    return Part(lambda fields: {"seq_len": min(fields.take(field), LONGEST)}, lambda config: {field: config.seq_len})


SIZES = (
    same("vocab_size", "vocab_size"),
    same("hidden_size", "embed_dim"),
    same("num_hidden_layers", "num_layers"),
    same("num_attention_heads", "num_heads"),
    same("num_key_value_heads", "num_kv_heads", 0),  # 0 is "derive" here
    same("head_dim", "head_dim", 0),
)


# ---- Both directions ---------------------------------------------------------------------------------------------------------


def read_config(values: dict) -> tuple[Family, dict]:
    """config.json -> its family and {"model.embed_dim": ..., "seq_len": ...}. Raises UserError: each field that is not
    implemented, by its name."""
    if "model_type" not in values:
        raise UserError("config.json: model_type is missing; give the folder of a Hugging Face checkpoint")
    family, fields, keys = MODEL_TYPES[values["model_type"]], Fields(values), {}
    for part in family.parts:
        keys.update(part.read(fields))
    problems = fields.problems + quantization_problems(fields.take("quantization_config", None)) + [
        f"config.json: {name}={value!r} is not a field that jaxlm's {family.model_type} knows; if it says nothing of the model, "
        "take it out" for name, value in values.items() if name not in fields.taken and value is not None]
    if problems:
        raise UserError(*problems)
    return family, keys


def quantization_problems(values: dict | None) -> list[str]:
    """Why the weights that config.json says are quantised so are not read, as `huggingface.quantized` does."""
    if values is None:
        return []
    method, block = (values[name] if name in values else None for name in ("quant_method", "weight_block_size"))
    if method == "mxfp4" or method == "fp8" and block:
        return []
    said = f"quant_method={method!r}" + (" without weight_block_size" if method == "fp8" else "")
    return [f"config.json: quantization_config: {said} is not implemented; only mxfp4, and fp8 in blocks, are: give the same "
            "checkpoint in bfloat16"]


def read_folder(folder) -> tuple[Family, dict]:
    """`read_config` of a folder. Raises UserError: there is none."""
    file = pathlib.Path(folder, "config.json")
    try:
        return read_config(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error}); give the folder of a Hugging Face checkpoint "
                        "or of a jaxlm run") from error


def apply(config, keys: dict) -> None:
    """Set these keys, in place; the model's other keys go back to their defaults, but for those that no family speaks of, and
    those of the task."""
    from configs import default

    for key, value in default.get_config().model.items():
        if key not in NOT_SAID | OF_THE_TASK:
            config.model[key] = value
    for key, value in keys.items():
        group, _, name = key.rpartition(".")
        node = config[group] if group else config
        if node.get_type(name) is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            node[name] = value
        except TypeError as error:
            raise UserError(f"config.json: gives {value!r} for {key}, which is {node[name]!r} by default; the type is "
                            "wrong") from error


def write_config(family: Family, config) -> dict:
    """The config.json of a (resolved) config. Raises UserError: each key that says what the family cannot."""
    values = {"model_type": family.model_type, "architectures": [family.architecture]}
    for part in family.parts:
        values.update(part.write(config))
    if problems := differences(config, values):
        raise UserError(*(f"{problem}; {family.model_type} has no such model" for problem in problems))
    return values


def differences(config, values: dict) -> list[str]:
    """What `config` says of the model and config.json does not."""
    from configs import default
    from jaxlm.config import resolve

    said = default.get_config()
    apply(said, read_config(values)[1])
    resolve(said)
    return [f"model.{key}={value!r}: config.json would say {said.model[key]!r}" for key, value in config.model.items()
            if key not in NOT_SAID and value != said.model[key]]


def family_of(config) -> Family:
    """The first family that has such a model. Raises UserError: none has."""
    reasons = []
    for name in MODEL_TYPES:
        try:
            write_config(MODEL_TYPES[name], config)
            return MODEL_TYPES[name]
        except UserError as error:
            reasons.append(error.problems)
    raise UserError("no Hugging Face family has such a model; the nearest: " + min(reasons, key=len)[0])
