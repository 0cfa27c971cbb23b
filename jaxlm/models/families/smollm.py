"""SmolLM 3: Llama, every fourth layer of which has no rope."""

from jaxlm.models.families.family import Family, Part, register, same, unused
from jaxlm.models.families.llama import SWIGLU, TENSORS
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import repeat, shortest_period, windows


def read_pattern(fields) -> dict:
    num_layers, every = fields.take("num_hidden_layers"), fields.take("no_rope_layer_interval", 4)
    rotated = fields.take("no_rope_layers", None) or [(i + 1) % every != 0 for i in range(num_layers)]  # 1 is with rope
    if len(rotated) != num_layers:
        fields.refuse("no_rope_layers", rotated, f"num_hidden_layers is {num_layers}")
    return {"model.rope_pattern": shortest_period("".join("R" if r else "N" for r in rotated))}


def write_pattern(config) -> dict:
    m = config.model
    return {"no_rope_layers": [int(letter == "R") for letter in repeat(m.rope_pattern, m.num_layers)]}


def no_window(fields, num_layers: int) -> str:
    return "G" * num_layers


SMOLLM3 = register(Family("smollm3", "SmolLM3ForCausalLM", (
    *SWIGLU, same("rms_norm_eps", "norm_eps", 1e-6), same("tie_word_embeddings", "tie_embeddings", True),
    same("attention_bias", "attention_bias", False), same("mlp_bias", "mlp_bias", False), rope(2e6),
    Part(read_pattern, write_pattern), windows(no_window, switch=True), unused("max_window_layers", "pretraining_tp")),
    TENSORS))
