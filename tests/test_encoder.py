"""An encoder: attention both ways, over meshes. `test_huggingface` compares BERT with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
from flax import nnx
from tiny_config import make_config

from jaxlm.errors import UserError
from jaxlm.kernels import attention
from jaxlm.kernels.attention import Extras, attend, choose_backend
from jaxlm.objectives.build import build_objective
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems
from jaxlm.parallel.rules import replicated
from jaxlm.train.state import build_model
from jaxlm.validation import validate

OURS = dict(family="encoder", num_layers=2, embed_dim=32, num_heads=4, mlp_dim=40, norm="layer", norm_eps=1e-12,
            norm_place="sum", embed_norm=True, position="learned", token_types=2, attention_bias=True, mlp_bias=True,
            feedforward="gelu_exact")


# ---- Attention both ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, tile", [("plain", 0), ("blockwise", 0), ("blockwise", 16)])
@pytest.mark.parametrize("segments, S", [(False, 75), (True, 75), (False, 50), (True, 50)])
def test_attention_both_ways_equals_float64(backend, tile, segments, S, monkeypatch):
    """S: as many keys as queries, or those of another text."""
    if tile:
        monkeypatch.setattr(attention, "LONG", 0)
        monkeypatch.setattr(attention, "TILE", tile)
    rng, T = np.random.default_rng(0), 75
    q, k, v = rng.standard_normal((2, T, 4, 8)), rng.standard_normal((2, S, 2, 8)), rng.standard_normal((2, S, 2, 8))
    ids, key_ids = (np.sort(rng.integers(0, 3, (2, length)), axis=1) for length in (T, S))
    scores = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, 2, 2)) / np.sqrt(8)
    if segments:
        scores = np.where((ids[:, :, None] == key_ids[:, None])[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, 2))
    extras = Extras(causal=False, key_segment_ids_BS=key_ids if segments else None)
    run = lambda q, k, v, backend: attend(q, k, v, backend=backend, segment_ids_BT=ids if segments else None, extras=extras)
    single = [a.astype(np.float32) for a in (q, k, v)]
    np.testing.assert_allclose(jax.jit(run, static_argnums=3)(*single, backend), exact, atol=2e-5)
    cotangent = rng.standard_normal(q.shape).astype(np.float32)
    slopes = [jax.jit(jax.grad(lambda *a, name=name: jnp.vdot(run(*a, name), cotangent), (0, 1, 2)))(*single)
              for name in (backend, "plain")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), *slopes)


@pytest.mark.parametrize("mesh", [dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
                                  dict(mesh__context=4, mesh__data=2, kernels__context="all_gather")])
def test_every_mesh_gives_the_same_numbers_and_gradient(mesh):
    config = test_mesh.tiny(**mesh, data__isolate_documents=False, **{
        f"model__{key}": value for key, value in dict(OURS, masked_lm_head=True, scan_layers=True).items()})
    validate(config)
    model, devices = build_model(config, 48, "plain"), build_mesh(config)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    tokens = np.random.default_rng(0).integers(0, 48, (8, 32)).astype(np.int32)
    segments = (np.arange(32) < np.array([[32], [20]] * 4)).astype(np.int32)

    def run(params, tokens, segments):
        def loss(params):
            module = nnx.merge(model.graph, params)
            logits = module.logits(module.hidden(tokens, segment_ids_BT=segments)[0])
            return jnp.sum(jnp.where(segments[..., None] > 0, jnp.cos(logits), 0)) / tokens.size

        return jax.value_and_grad(loss)(params)

    over, alone = jit(devices, run)(*jax.device_put((params, tokens, segments), replicated(devices))), jax.jit(run)(
        params, tokens, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max()), over, alone)


# ---- What does not fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_backends_that_are_causal_refuse(backend):
    config = test_mesh.tiny(model__family="encoder", kernels__attention=backend)
    with pytest.raises(UserError, match="sees only what comes before"):
        choose_backend(config, {"cudnn": "gpu", "splash": "tpu"}[backend])
    ring = test_mesh.tiny(model__family="encoder", mesh__context=2)
    assert any("use kernels.context=all_gather" in p for p in mesh_problems(ring, axis_sizes(ring, 2), 2))


@pytest.mark.parametrize("change, word", [
    (dict(window=4, window_pattern="LG"), "window_pattern"),
    (dict(family="decoder", pooler=True, token_types=0), "model.pooler=True"),
    (dict(block="parallel"), "model.block='parallel'")])
def test_what_does_not_fit_is_named(change, word):
    with pytest.raises(UserError) as error:
        make_config(**{**OURS, **change})
    assert len(error.value.problems) == 1 and word in error.value.problems[0]


def test_an_encoder_does_not_tell_the_next_token():
    config = make_config(**OURS)
    with pytest.raises(UserError, match="use model.family=decoder"):
        build_objective(config)
    model = build_model(config, 64, "plain")
    with pytest.raises(UserError, match="use model.family=decoder"):
        jax.eval_shape(lambda key: nnx.merge(model.graph, model.init(key)).init_cache(1, 8), jax.random.key(0))
