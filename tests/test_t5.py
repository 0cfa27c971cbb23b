"""T5: an encoder and a decoder of the same blocks, cross-attention, relative positions.
`test_huggingface` compares the whole with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
from flax import nnx
from tiny_config import make_config

from jaxlm.errors import UserError
from jaxlm.kernels.attention import Extras, attend, choose_backend
from jaxlm.models.positions import bucket_of
from jaxlm.objectives.build import build_objective
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems
from jaxlm.parallel.rules import replicated
from jaxlm.train.state import build_model
from jaxlm.validation import validate

N, H = 4, 6
OURS = dict(family="encoder_decoder", num_layers=2, encoder_layers=3, embed_dim=32, num_heads=N, head_dim=H, mlp_dim=40,
            position="relative", relative_buckets=16, relative_max_distance=40, attention_scale_dim=1, feedforward="geglu",
            tie_embeddings=False)


# ---- Parts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 40), (8, 20)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_of_distances(buckets, max_distance, causal):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-400, 400)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), not causal, buckets, max_distance)
    np.testing.assert_array_equal(bucket_of(distance, buckets, max_distance, causal), theirs.numpy())


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
@pytest.mark.parametrize("causal", [True, False])
def test_bias_of_scores_equals_float64(backend, causal):
    rng, T = np.random.default_rng(0), 75
    q, k, v, bias = (rng.standard_normal(shape) for shape in ((2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (4, T, T)))
    scores = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, 2, 2)) / np.sqrt(8) + bias
    weights = np.exp(np.where(np.tri(T) > 0, scores, -np.inf) if causal else scores)
    exact = np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, 2))
    cotangent = rng.standard_normal(q.shape).astype(np.float32)

    def loss(q, k, v, bias, backend):
        out = attend(q, k, v, backend=backend, extras=Extras(causal=causal, bias_NTS=bias))
        return jnp.vdot(out, cotangent), out

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True), static_argnums=4)
    arrays = [a.astype(np.float32) for a in (q, k, v, bias)]
    gradients, out = run(*arrays, backend)
    np.testing.assert_allclose(out, exact, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), gradients, run(*arrays, "plain")[0])


def test_every_mesh_gives_the_same_numbers_and_gradient():
    config = test_mesh.tiny(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, data__isolate_documents=False, **{
        f"model__{key}": value for key, value in dict(OURS, num_kv_heads=N, scan_layers=True).items()})
    validate(config)
    model, devices = build_model(config, 48, "plain"), build_mesh(config)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    source, tokens = np.random.default_rng(0).integers(0, 48, (2, 8, 32)).astype(np.int32)
    segments = (np.arange(32) < np.array([[32], [20]] * 4)).astype(np.int32)

    def run(params, source, segments, tokens):
        def loss(params):
            module = nnx.merge(model.graph, params)
            x_BTD, _, _ = module.hidden(tokens, memory=module.encode(source, segment_ids_BS=segments))
            return jnp.mean(jnp.cos(module.logits(x_BTD)))

        return jax.value_and_grad(loss)(params)

    arrays = params, source, segments, tokens
    over, alone = jit(devices, run)(*jax.device_put(arrays, replicated(devices))), jax.jit(run)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max()), over, alone)


def test_dropout_differs_between_the_texts_and_is_off_without_keys():
    config = make_config(**OURS, dropout=0.5)
    model = build_model(config, 64, "plain")
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)

    @jax.jit
    def run(params, keys):
        return nnx.merge(model.graph, params).encode(tokens, keys_B=keys).x_BSD

    off, one, other = (run(params, keys) for keys in (None, jax.random.split(jax.random.key(0), 2),
                                                      jax.random.split(jax.random.key(1), 2)))
    assert not np.allclose(off, one) and not np.allclose(one, other)


# ---- What does not fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, word", [
    (dict(window=4, window_pattern="LG"), "window_pattern"), (dict(value_residual=True), "value_residual"),
    (dict(norm_place="post"), "norm_place"), (dict(relative_max_distance=8), "relative_max_distance=8"),
    (dict(attention="latent", rope_fraction=0.5), "model.attention='latent'")])
def test_what_does_not_fit_is_named(change, word):
    with pytest.raises(UserError) as error:
        make_config(**{**OURS, **change})
    assert len(error.value.problems) == 1 and word in error.value.problems[0]


def test_what_cannot_run_it_refuses():
    config = make_config(**OURS)
    with pytest.raises(UserError, match="use model.family=decoder"):
        build_objective(config)
    for family, reason in (("decoder", "model.position=relative"), ("encoder_decoder", "model.family")):
        for backend, platform in (("cudnn", "gpu"), ("splash", "tpu")):
            asked = test_mesh.tiny(model__family=family, model__position="relative", kernels__attention=backend)
            with pytest.raises(UserError, match=reason):
                choose_backend(asked, platform)
    long = test_mesh.tiny(model__position="relative", kernels__attention="blockwise", seq_len=4096)
    with pytest.raises(UserError, match="above a seq_len of 2048"):
        choose_backend(long, "cpu")
    for axis in ("context", "stage"):
        cut = test_mesh.tiny(model__family="encoder_decoder", model__position="relative", **{f"mesh__{axis}": 2})
        assert sum(f"use mesh.{axis}=1" in problem for problem in mesh_problems(cut, axis_sizes(cut, 2), 2)) == 2
    model = build_model(config, 64, "plain")
    with pytest.raises(UserError, match="a text that must be given"):
        jax.eval_shape(lambda key: nnx.merge(model.graph, model.init(key)).init_cache(1, 8), jax.random.key(0))
