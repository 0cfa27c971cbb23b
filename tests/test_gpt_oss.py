"""GPT-OSS: attention sinks, experts with biases and a clamped form, YaRN; against `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
import test_moe
from parity import Pair, make_config, randomise, stacked

from jaxlm.errors import UserError
from jaxlm.kernels import attention
from jaxlm.kernels.attention import Extras, attend, choose_backend
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems
from jaxlm.parallel.rules import replicated

LAYERS = range(2)


def to_params(arrays):
    layer = lambda name, form=lambda a: a: stacked(arrays, "model.layers.{}." + name, LAYERS, form)
    heads = lambda a: a.reshape(-1, 8, *a.shape[1:])

    def projection(name):
        return {"kernel": layer(f"self_attn.{name}.weight", lambda a: np.moveaxis(heads(a), -1, 0)),
                "bias": layer(f"self_attn.{name}.bias", heads)}

    def expert(name, part):
        return {"kernel": layer(f"mlp.experts.{name}", lambda a: a[..., part]),
                "bias": layer(f"mlp.experts.{name}_bias", lambda a: a[..., part])}

    return {
        "embedding": arrays["model.embed_tokens.weight"], "head": {"kernel": arrays["lm_head.weight"].T},
        "final_norm": {"scale": arrays["model.norm.weight"]},
        "layers": {
            "norm1": {"scale": layer("input_layernorm.weight")}, "norm2": {"scale": layer("post_attention_layernorm.weight")},
            "attention": {
                "query": projection("q_proj"), "key": projection("k_proj"), "value": projection("v_proj"),
                "out": {"kernel": layer("self_attn.o_proj.weight", lambda a: a.T.reshape(4, 8, -1)),
                        "bias": layer("self_attn.o_proj.bias")},
                "sink_bias": layer("self_attn.sinks")},
            "feedforward": {
                "router": {"kernel": layer("mlp.router.weight", np.transpose), "logit_bias": layer("mlp.router.bias")},
                "experts": {"gate": expert("gate_up_proj", slice(0, None, 2)), "up": expert("gate_up_proj", slice(1, None, 2)),
                            "down": expert("down_proj", slice(None))}}}}


@functools.cache
def pair(backend="plain", isolate=False, truncate=False):
    pytest.importorskip("torch").manual_seed(0)
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": truncate,
            "original_max_position_embeddings": 32}
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(
        num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=3, vocab_size=64, hidden_size=32, intermediate_size=24,
        head_dim=8, num_attention_heads=4, num_key_value_heads=2, sliding_window=20, max_position_embeddings=256,
        rope_parameters=rope, attn_implementation="eager"))
    config = make_config(
        num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, norm_eps=1e-5, window=20,
        window_pattern="LG", rope_scaling="yarn", rope_theta=1000.0, rope_factor=8.0, rope_beta_fast=8.0, rope_original_len=32,
        rope_truncate=truncate, attention_sinks=True, attention_bias=True, mlp_bias=True, feedforward="moe", num_experts=8,
        experts_per_token=3, expert_form="clamped_swiglu", router_bias=True, tie_embeddings=False)
    config.data.isolate_documents = isolate
    theirs = randomise(theirs, 0.3)
    return Pair(config, theirs, to_params, backend)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_logits(backend):
    pair(backend).check_logits()


def test_logits_with_waves_at_whole_places():
    pair(truncate=True).check_logits()


def test_padding():
    pair().check_padding()


def test_packed_documents():
    pair("blockwise", True).check_packed()


def test_decoding():
    pair().check_decoding()


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_gradients(backend):
    pair(backend).check_gradients()


# ---- Sinks ------------------------------------------------------------------------------------------------------------------


def exact(q, k, v, sinks, window, segment_ids):
    """A query at a time, float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if (not window or t - s < window) and segment_ids[b, s] == segment_ids[b, t]]
        scores = np.exp(k[b, seen, n // 2] @ q[b, t, n] / np.sqrt(q.shape[-1]))
        out[b, t, n] = scores / (scores.sum() + np.exp(sinks[n])) @ v[b, seen, n // 2]
    return out


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("backend, tile", [("plain", 0), ("blockwise", 0), ("blockwise", 16)])
def test_sinks_equal_float64(backend, tile, window, monkeypatch):
    if tile:
        monkeypatch.setattr(attention, "LONG", 0)
        monkeypatch.setattr(attention, "TILE", tile)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 75, heads, 8)) for heads in (4, 2, 2)] + [rng.standard_normal(4)]
    segment_ids, weights = np.sort(rng.integers(0, 3, (2, 75)), axis=1), rng.standard_normal((2, 75, 4, 8)).astype(np.float32)

    def loss(q, k, v, sinks):
        out = attend(q, k, v, backend=backend, window=window, segment_ids_BT=segment_ids, extras=Extras(sinks_N=sinks))
        return jnp.vdot(out, weights), out

    gradient, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*(a.astype(np.float32) for a in arrays))
    np.testing.assert_allclose(out, exact(*arrays, window, segment_ids), atol=2e-5)
    for i in range(4):  # the slope along a random direction
        direction = rng.standard_normal(arrays[i].shape)
        ends = [exact(*arrays[:i], arrays[i] + side * direction, *arrays[i + 1 :], window, segment_ids) for side in (1e-5, -1e-5)]
        np.testing.assert_allclose(np.vdot(gradient[i], direction), np.vdot((ends[0] - ends[1]) / 2e-5, weights), rtol=1e-3)


def test_sinks_over_a_cut_up_sequence():
    """`all_gather` has its own softmax, a block at a time."""
    config = test_mesh.tiny(mesh__context=4, mesh__tensor=2, kernels__context="all_gather")
    mesh, rng = build_mesh(config), np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    arrays.append(rng.standard_normal(4).astype(np.float32))

    def run(*arrays):
        def loss(q, k, v, sinks):
            out = attend(q, k, v, backend="plain", context_method="all_gather", extras=Extras(sinks_N=sinks))
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)

    over, alone = jit(mesh, run)(*jax.device_put(arrays, replicated(mesh))), jax.jit(run)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), over, alone)


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_backends_without_sinks_refuse(backend):
    config = test_mesh.tiny(model__attention_sinks=True, kernels__attention=backend)
    with pytest.raises(UserError, match="attention_sinks"):
        choose_backend(config, {"cudnn": "gpu", "splash": "tpu"}[backend])
    ring = test_mesh.tiny(model__attention_sinks=True, mesh__context=2)
    assert any("use kernels.context=all_gather" in p for p in mesh_problems(ring, axis_sizes(ring, 2), 2))


# ---- Over devices -----------------------------------------------------------------------------------------------------------

STEPS = 8  # from about 10 on, the last bit of a router's score may send a token elsewhere
MODEL = dict(model__attention_sinks=True, model__mlp_bias=True, model__router_bias=True, model__expert_form="clamped_swiglu")


@functools.cache
def reference():
    return test_mesh.run(test_moe.tiny(**MODEL), STEPS)[:2]


@pytest.mark.parametrize("mesh", [dict(mesh__expert=2, mesh__tensor=2, mesh__data=2),
                                  dict(mesh__fsdp=2, mesh__context=2, kernels__context="all_gather")])
def test_every_mesh_gives_the_same_curve_and_gradient(mesh):
    losses, gradient, _ = test_mesh.run(test_moe.tiny(**MODEL, **mesh), STEPS)
    np.testing.assert_allclose(losses, reference()[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max()), gradient, reference()[1])
