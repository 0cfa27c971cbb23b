"""DeepSeek-V2 and V3: latent attention, first dense layers, experts by groups.
`test_huggingface` compares the whole with transformers."""

import functools

import jax
import numpy as np
import pytest
import test_mesh
import test_moe
from flax import nnx
from test_transformer import noisy
from tiny_config import make_config

from jaxlm.errors import UserError
from jaxlm.parallel.expert import best_groups
from jaxlm.parallel.mesh import axis_sizes, mesh_problems
from jaxlm.train.state import build_model
from jaxlm.validation import validate

N, NOPE, ROPE, VALUE, RANK, MOE = 4, 10, 6, 8, 20, 16
OURS = dict(num_layers=3, embed_dim=32, num_heads=N, head_dim=NOPE + ROPE, rope_fraction=ROPE / (NOPE + ROPE), mlp_dim=MOE,
            dense_mlp_dim=40, attention="latent", kv_rank=RANK, value_head_dim=VALUE, feedforward="moe", num_experts=8,
            experts_per_token=3, first_dense_layers=1, router_groups=4, router_groups_per_token=2, tie_embeddings=False)


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
    (dict(kv_rank=0), "kv_rank=0"), (dict(rope_fraction=1.0), "rope_fraction=1.0"),
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
STEPS = 4


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
