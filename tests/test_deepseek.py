"""DeepSeek-V2 and V3: latent attention, first dense layers, experts by groups; against `transformers`."""

import functools

import jax
import numpy as np
import pytest
import test_mesh
import test_moe
from flax import nnx
from parity import Pair, make_config, randomise, stacked
from test_transformer import noisy

from jaxlm.config import validate
from jaxlm.errors import UserError
from jaxlm.models.rope_scaling import mscale
from jaxlm.parallel.expert import best_groups
from jaxlm.parallel.mesh import axis_sizes, mesh_problems
from jaxlm.train.state import build_model

N, NOPE, ROPE, VALUE, RANK, MOE = 4, 10, 6, 8, 20, 16
# Theirs rotates neighbours, ours a first and a second half; and our rotated part comes first.
HALVES = np.r_[0:ROPE:2, 1:ROPE:2]
HEAD = np.r_[NOPE + HALVES, :NOPE]


def to_params(arrays):
    def layers(numbers, dense):
        layer = lambda name, form=lambda a: a: stacked(arrays, "model.layers.{}." + name, numbers, form)
        kernel = lambda name: {"kernel": layer(f"{name}.weight", np.transpose)}
        norm = lambda name: {"scale": layer(f"{name}.weight")}
        query = lambda a: a.T.reshape(-1, N, NOPE + ROPE)[..., HEAD]
        up = lambda a: a.T.reshape(RANK, N, NOPE + VALUE)
        latent = lambda a: a[np.r_[:RANK, RANK + HALVES]].T
        ranks = "model.layers.0.self_attn.q_a_proj.weight" in arrays
        attention = {
            "query": {"kernel": layer("self_attn.q_b_proj.weight" if ranks else "self_attn.q_proj.weight", query)},
            "latent": {"kernel": layer("self_attn.kv_a_proj_with_mqa.weight", latent)},
            "latent_norm": norm("self_attn.kv_a_layernorm"),
            "key": {"kernel": layer("self_attn.kv_b_proj.weight", lambda a: up(a)[..., :NOPE])},
            "value": {"kernel": layer("self_attn.kv_b_proj.weight", lambda a: up(a)[..., NOPE:])},
            "out": {"kernel": layer("self_attn.o_proj.weight", lambda a: a.T.reshape(N, VALUE, -1))}}
        if ranks:
            attention |= {"query_down": kernel("self_attn.q_a_proj"), "query_norm": norm("self_attn.q_a_layernorm")}
        dense_of = lambda name: {ours: kernel(f"{name}.{ours}_proj") for ours in ("gate", "up", "down")}
        both = lambda part: {"kernel": layer("mlp.experts.gate_up_proj", lambda a: a.transpose(0, 2, 1)[..., part])}
        if dense:
            feedforward = dense_of("mlp")
        else:
            router = kernel("mlp.gate")
            if "model.layers.2.mlp.gate.e_score_correction_bias" in arrays:
                router["bias"] = layer("mlp.gate.e_score_correction_bias")
            feedforward = {"router": router, "shared": dense_of("mlp.shared_experts"), "experts": {
                "gate": both(slice(MOE)), "up": both(slice(MOE, None)),
                "down": {"kernel": layer("mlp.experts.down_proj", lambda a: a.transpose(0, 2, 1))}}}
        return {"norm1": norm("input_layernorm"), "norm2": norm("post_attention_layernorm"), "attention": attention,
                "feedforward": feedforward}

    return {"embedding": arrays["model.embed_tokens.weight"], "head": {"kernel": arrays["lm_head.weight"].T},
            "final_norm": {"scale": arrays["model.norm.weight"]},
            "first_layers": layers(range(1), True), "layers": layers(range(1, 3), False)}


COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=MOE, num_hidden_layers=3,
              num_attention_heads=N, num_key_value_heads=N, n_routed_experts=8, kv_lora_rank=RANK, qk_rope_head_dim=ROPE,
              v_head_dim=VALUE, qk_nope_head_dim=NOPE, n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1,
              max_position_embeddings=256, attn_implementation="eager")
OURS = dict(num_layers=3, embed_dim=32, num_heads=N, head_dim=NOPE + ROPE, rope_fraction=ROPE / (NOPE + ROPE), mlp_dim=MOE,
            dense_mlp_dim=40, attention="latent", kv_rank=RANK, value_head_dim=VALUE, feedforward="moe", num_experts=8,
            experts_per_token=3, first_dense_layers=1, router_groups=4, router_groups_per_token=2, tie_embeddings=False)


@functools.cache
def pair(version=3, isolate=False, backend="plain", scan=False):
    pytest.importorskip("torch").manual_seed(0)
    transformers = pytest.importorskip("transformers")
    if version == 3:
        rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0,
                "mscale_all_dim": 0.8, "original_max_position_embeddings": 32}
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
            **COMMON, q_lora_rank=24, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, rope_parameters=rope))
        ours = dict(query_rank=24, shared_experts=1, router_scale=2.5, router_score="sigmoid", router_group_best=2,
                    bias_update_rate=0.001, rope_scaling="yarn", rope_theta=1000.0, rope_factor=8.0, rope_beta_fast=8.0,
                    rope_original_len=32, rope_attention_factor=mscale(8.0, 1.0) / mscale(8.0, 0.8),
                    attention_score_factor=mscale(8.0, 0.8) ** 2)
    else:
        theirs = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
            **COMMON, q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.5, topk_method="group_limited_greedy"))
        ours = dict(shared_experts=2, router_scale=1.5, router_normalize=False)
    config = make_config(**OURS, **ours, scan_layers=scan)
    config.data.isolate_documents = isolate
    return Pair(config, randomise(theirs, 0.2), to_params, backend)


@pytest.mark.parametrize("version", [2, 3])
def test_logits(version):
    pair(version).check_logits()


def test_logits_scanned_and_by_blocks():
    pair(3, backend="blockwise", scan=True).check_logits()


@pytest.mark.parametrize("version", [2, 3])
def test_padding(version):
    pair(version).check_padding()


@pytest.mark.parametrize("version", [2, 3])
def test_packed_documents(version):
    pair(version, True).check_packed()


@pytest.mark.parametrize("version", [2, 3])
def test_decoding(version):
    pair(version).check_decoding()


@pytest.mark.parametrize("version", [2, 3])
def test_gradients(version):
    pair(version).check_gradients()


def test_the_cache_holds_the_latent():
    """Numbers a token and layer: the latent and the rotated part, whatever the number of heads."""
    config = make_config(**OURS)
    model = build_model(config, 64, "plain")
    _, cache = nnx.merge(model.graph, noisy(jax.jit(model.init)(jax.random.key(0)))).init_cache(2, 10)
    assert {name: [a.shape for a in arrays] for name, arrays in cache.items()} == {
        "first_layers": [(1, 2, 10, ROPE), (1, 2, 10, RANK)], "layers": [(2, 2, 10, ROPE), (2, 2, 10, RANK)]}


def test_groups_with_the_best_sums_remain():
    scores = np.array([[[0.9, 0.0, 0.5, 0.5, 0.1, 0.2]]])
    for best, kept in ((1, [0, 1]), (2, [2, 3])):
        left = best_groups(scores, 3, 1, best)[0, 0]
        assert np.flatnonzero(np.isfinite(left)).tolist() == kept


@pytest.mark.parametrize("change, word", [
    (dict(num_kv_heads=2), "num_kv_heads=2"), (dict(value_residual=True), "value_residual"), (dict(qk_norm=True), "qk_norm"),
    (dict(attention_sinks=True), "attention_sinks"), (dict(value_head_dim=17), "value_head_dim=17"),
    (dict(kv_rank=0), "kv_rank=0"),
    (dict(router_groups=3), "router_groups=3"), (dict(router_groups_per_token=1), "router_groups_per_token=1"),
    (dict(router_group_best=3), "router_group_best=3"), (dict(first_dense_layers=3), "first_dense_layers=3"),
    (dict(feedforward="swiglu"), "first_dense_layers=1")])
def test_what_does_not_fit_is_named(change, word):
    with pytest.raises(UserError) as error:
        make_config(**{**OURS, **change})
    assert len(error.value.problems) == 1 and word in error.value.problems[0]


MODEL = {f"model__{key}": value for key, value in dict(
    OURS, num_kv_heads=N, num_layers=2, query_rank=24, shared_experts=1, router_score="sigmoid", router_group_best=2,
    bias_update_rate=0.001, tie_embeddings=True).items()}
STEPS = 8


@functools.cache
def reference():
    return test_mesh.run(test_moe.tiny(**MODEL), STEPS)[:2]


@pytest.mark.parametrize("mesh", [dict(mesh__expert=2, mesh__tensor=2, mesh__fsdp=2), dict(mesh__context=4, mesh__data=2)])
def test_every_mesh_gives_the_same_curve_and_gradient(mesh):
    config = test_moe.tiny(**MODEL, **mesh)
    validate(config)
    losses, gradient, _ = test_mesh.run(config, STEPS)
    np.testing.assert_allclose(losses, reference()[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max()), gradient, reference()[1])


def test_meshes_that_do_not_fit_are_named():
    for mesh, devices, problem in ((dict(mesh__tensor=8), 8, "model.num_heads=4 is not divisible by mesh tensor = 8"),
                                   (dict(mesh__stage=2), 2, "use mesh.stage=1")):
        config = test_moe.tiny(**MODEL, **mesh)
        assert any(problem in found for found in mesh_problems(config, axis_sizes(config, devices), devices))
