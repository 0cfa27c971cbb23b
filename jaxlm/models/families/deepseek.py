"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437; R1 too): latent attention, a few dense layers, then shared experts and
routed ones that are chosen by groups. The layer of V3 that predicts one more token is left out, as transformers does."""

import math

from jaxlm.config import rotated_size
from jaxlm.models.families.family import Family, Part, Tensor, always, context_length, only, register, same, unused
from jaxlm.models.families.llama import OUTER, one
from jaxlm.models.families.rope import rope
from jaxlm.models.rope_scaling import mscale


def read_heads(fields) -> dict:
    rotated, size = fields.take("qk_rope_head_dim", 64), fields.take("qk_nope_head_dim", 128)
    value = fields.take("v_head_dim", 128)
    return {"model.head_dim": size + rotated, "model.rope_fraction": rotated / (size + rotated),
            "model.value_head_dim": 0 if value == size + rotated else value}


def write_heads(config) -> dict:
    m = config.model
    return {"qk_rope_head_dim": rotated_size(m), "qk_nope_head_dim": m.head_dim - rotated_size(m),
            "v_head_dim": m.value_head_dim or m.head_dim}


LATENT_EPS = 1e-6  # of the norms of latents, whatever config.json says of the others


def read_eps(fields) -> dict:
    eps = fields.take("rms_norm_eps", 1e-6)
    return {"model.norm_eps": eps, "model.latent_norm_eps": 0.0 if eps == LATENT_EPS else LATENT_EPS}


def read_dense(fields) -> dict:
    dense, expert = fields.take("intermediate_size"), fields.take("moe_intermediate_size")
    return {"model.mlp_dim": expert, "model.dense_mlp_dim": 0 if dense == expert else dense}


def write_dense(config) -> dict:
    m = config.model
    return {"moe_intermediate_size": m.mlp_dim, "intermediate_size": m.dense_mlp_dim or m.mlp_dim}


ROPE = rope()


def read_rope(fields) -> dict:
    keys = ROPE.read(fields)
    values = fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or {}
    keys.pop("model.rope_fraction")  # `read_heads` tells it
    if keys.get("model.rope_scaling") == "yarn":
        keys["model.attention_score_factor"] = mscale(keys["model.rope_factor"], values.get("mscale_all_dim") or 0) ** 2
    return keys


def write_rope(config) -> dict:
    """`mscale` and `mscale_all_dim` are told by what follows from them."""
    m, values = config.model, ROPE.write(config)
    values.pop("partial_rotary_factor", None)
    if m.rope_scaling == "yarn" and m.rope_factor > 1 and m.attention_score_factor != 1:
        weight = lambda product: round((product - 1) / (0.1 * math.log(m.rope_factor)), 9)
        below = math.sqrt(m.attention_score_factor)
        values["rope_scaling"]["mscale_all_dim"] = weight(below)
        if above := weight(m.rope_attention_factor * below):
            values["rope_scaling"]["mscale"] = above
            values["rope_scaling"].pop("attention_factor", None)
    return values


def read_groups(fields) -> dict:
    """Of V2."""
    method = fields.take("topk_method", "greedy")
    groups, kept = fields.take("n_group", 1), fields.take("topk_group", 1)
    if method not in ("greedy", "group_limited_greedy"):
        fields.refuse("topk_method", method, "only 'greedy' and 'group_limited_greedy' are")
    return {"model.router_groups": groups, "model.router_groups_per_token": kept} if method != "greedy" else {}


def write_groups(config) -> dict:
    m = config.model
    return {"topk_method": "group_limited_greedy" if m.router_groups > 1 else "greedy", "n_group": m.router_groups,
            "topk_group": m.router_groups_per_token}


PARTS = (
    same("vocab_size", "vocab_size"),
    same("hidden_size", "embed_dim"),
    same("num_hidden_layers", "num_layers"),
    same("num_attention_heads", "num_heads"),
    same("num_key_value_heads", "num_kv_heads", 0),
    same("kv_lora_rank", "kv_rank", 512),
    same("tie_word_embeddings", "tie_embeddings", False),
    same("attention_bias", "attention_bias", False),
    only("hidden_act", "silu"),
    only("pretraining_tp", 1),
    only("moe_layer_freq", 1, written=False),
    unused("qk_head_dim", "head_dim", "ep_size", "seq_aux", "aux_loss_alpha"),  # of the others; of training
    context_length(),
    always(norm="rms", attention="latent", feedforward="moe", expert_form="swiglu"),
    Part(lambda fields: {"model.query_rank": fields.take("q_lora_rank", 0 if "q_lora_rank" in fields.values else 1536)},
         lambda config: {"q_lora_rank": config.model.query_rank or None}),
    Part(read_eps, lambda config: {"rms_norm_eps": config.model.norm_eps}),
    Part(read_heads, write_heads), Part(read_dense, write_dense), Part(read_rope, write_rope),
)


def layers(stack: str, *feedforward: Tensor) -> tuple[Tensor, ...]:
    """first_layers, or the others, which follow them."""
    name, attention = "layers.{layer}.self_attn", f"{stack}/attention"
    return (
        one("layers.{layer}.input_layernorm.weight", f"{stack}/norm1/scale", "D -> D"),
        one("layers.{layer}.post_attention_layernorm.weight", f"{stack}/norm2/scale", "D -> D"),
        one(f"{name}.q_a_proj.weight", f"{attention}/query_down/kernel", "Q D -> D Q"),
        one(f"{name}.q_a_proj.bias", f"{attention}/query_down/bias", "Q -> Q"),
        one(f"{name}.q_a_layernorm.weight", f"{attention}/query_norm/scale", "Q -> Q"),
        one(f"{name}.q_proj.weight", f"{attention}/query/kernel", "(N H~) D -> D N H"),
        one(f"{name}.q_b_proj.weight", f"{attention}/query/kernel", "(N H~) Q -> Q N H", f"{attention}/query_down/kernel"),
        one(f"{name}.kv_a_proj_with_mqa.weight", f"{attention}/latent/kernel", "W~ D -> D W"),
        one(f"{name}.kv_a_proj_with_mqa.bias", f"{attention}/latent/bias", "W~ -> W"),
        one(f"{name}.kv_a_layernorm.weight", f"{attention}/latent_norm/scale", "Z -> Z"),
        Tensor(f"{name}.kv_b_proj.weight", (
            (f"{attention}/key/kernel", "(N O) Z -> Z N O"), (f"{attention}/value/kernel", "(N U) Z -> Z N U")), axis=1),
        one(f"{name}.o_proj.weight", f"{attention}/out/kernel", "D (N U) -> N U D"),
        one(f"{name}.o_proj.bias", f"{attention}/out/bias", "D -> D"),
        *feedforward)


def swiglu(name: str, path: str, letter: str) -> tuple[Tensor, ...]:
    return (one(f"{name}.gate_proj.weight", f"{path}/gate/kernel", f"{letter} D -> D {letter}"),
            one(f"{name}.up_proj.weight", f"{path}/up/kernel", f"{letter} D -> D {letter}"),
            one(f"{name}.down_proj.weight", f"{path}/down/kernel", f"D {letter} -> {letter} D"))


TENSORS = OUTER + layers("first_layers", *swiglu("layers.{layer}.mlp", "first_layers/feedforward", "G")) + layers(
    "layers",
    *swiglu("layers.{layer}.mlp.shared_experts", "layers/feedforward/shared", "S"),
    *swiglu("layers.{layer}.mlp.experts.{expert}", "layers/feedforward/experts", "F"),
    one("layers.{layer}.mlp.gate.weight", "layers/feedforward/router/kernel", "E D -> D E"),
    one("layers.{layer}.mlp.gate.e_score_correction_bias", "layers/feedforward/router/bias", "E -> E"))

DEEPSEEK_V2 = register(Family("deepseek_v2", "DeepseekV2ForCausalLM", (
    *PARTS,
    same("n_routed_experts", "num_experts", 64),
    same("num_experts_per_tok", "experts_per_token"),
    same("n_shared_experts", "shared_experts", 2),
    same("routed_scaling_factor", "router_scale", 1.0),
    same("first_k_dense_replace", "first_dense_layers", 0),
    only("norm_topk_prob", False),
    only("mlp_bias", False),
    only("scoring_func", "softmax", written=False),
    always(router_score="softmax", router_normalize=False),
    Part(read_groups, write_groups),
), TENSORS))

DEEPSEEK_V3 = register(Family("deepseek_v3", "DeepseekV3ForCausalLM", (
    *PARTS,
    same("n_routed_experts", "num_experts", 256),
    same("num_experts_per_tok", "experts_per_token", 8),
    same("n_shared_experts", "shared_experts", 1),
    same("routed_scaling_factor", "router_scale", 2.5),
    same("first_k_dense_replace", "first_dense_layers", 3),
    same("n_group", "router_groups", 8),
    same("topk_group", "router_groups_per_token", 4),
    same("norm_topk_prob", "router_normalize", True),
    only("rope_interleave", True),
    only("scoring_func", "sigmoid", written=False),
    only("topk_method", "noaux_tc", written=False),
    only("num_nextn_predict_layers", 0, 1),
    always(router_score="sigmoid", router_choice_bias=True, router_group_best=2),
), TENSORS, left_out=r".*\.rotary_emb\.inv_freq|layers\.61\..*"))
