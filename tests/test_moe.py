"""Mixture of experts: forward and gradients against a loop in float64, and one curve on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
from flax import nnx
from test_mesh import VOCAB, assert_same_run, packed_batch

from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.models.block import Context, Inits
from jaxlm.models.moe import MixtureOfExperts, Stats, balance_biases, build_router_loss
from jaxlm.objectives.build import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.compile import jit
from jaxlm.parallel.expert import SLACK, choose, dispatch, gather
from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems
from jaxlm.parallel.rules import replicated
from jaxlm.train.state import build_init, build_model
from jaxlm.train.step import build_train_step
from jaxlm.validation import validate


def tiny(**changes):
    return test_mesh.tiny(**{"model__feedforward": "moe", "model__num_experts": 8, "model__mlp_dim": 16, "model__num_layers": 2,
                             "model__router_z_weight": 0.001, **changes})


# ---- One layer against a loop -----------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def feedforward(x, p, form):
    up = x @ p["up"]["kernel"]
    hidden = silu(x @ p["gate"]["kernel"]) * up if form == "swiglu" else np.maximum(up, 0) ** 2
    return hidden @ p["down"]["kernel"]


def loop(m, p, x_BTD, live_BT):
    """The layer, a token and an expert at a time: y_BTD, load-balance loss and z-loss of each row, counts."""
    (B, T, _), E, K = x_BTD.shape, m.num_experts, m.experts_per_token
    y, balance, z, counts = np.zeros_like(x_BTD), np.zeros(B), np.zeros(B), np.zeros((B, E), int)
    places = int(np.ceil(m.capacity_factor * T * K / E)) if m.routing == "capacity" else T
    for b in range(B):
        mean, taken, tokens = np.zeros(E), np.zeros(E, int), live_BT[b].sum()
        for t in range(T):
            if m.shared_experts:
                y[b, t] += feedforward(x_BTD[b, t], p["shared"], m.expert_form)
            if not live_BT[b, t]:
                continue
            logits = x_BTD[b, t] @ p["router"]["kernel"]
            scores = np.exp(logits) / np.exp(logits).sum() if m.router_score == "softmax" else 1 / (1 + np.exp(-logits))
            best = np.argsort(-(scores + (p["router"]["bias"] if "bias" in p["router"] else 0)), kind="stable")[:K]
            weights = scores[best] / (scores[best].sum() if m.router_normalize else 1)
            mean += scores / scores.sum() / tokens
            z[b] += np.log(np.exp(logits).sum()) ** 2 / tokens
            for e, weight in zip(best, weights, strict=True):
                counts[b, e] += 1
                if taken[e] < places:
                    own = {name: {"kernel": kernel["kernel"][e]} for name, kernel in p["experts"].items()}
                    y[b, t] += weight * feedforward(x_BTD[b, t], own, m.expert_form)
                taken[e] += 1
        balance[b] = (E / K * counts[b] / max(tokens, 1) * mean).sum()
    return y, balance, z, counts


VARIANTS = {
    "softmax": dict(),
    "sigmoid, bias, shared": dict(router_score="sigmoid", bias_update_rate=0.1, shared_experts=2, experts_per_token=3),
    "plain experts, raw weights": dict(expert_form="relu2", router_normalize=False, experts_per_token=1),
    "capacity": dict(routing="capacity", capacity_factor=0.8),
    "capacity, room for all": dict(routing="capacity", capacity_factor=1e9),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_and_gradients_equal_a_loop_in_float64(variant):
    c, rng = tiny(**{f"model__{k}": v for k, v in VARIANTS[variant].items()}), np.random.default_rng(0)
    c.model.embed_dim = 12
    graph, state = nnx.split(MixtureOfExperts(c, nnx.Rngs(params=0), Inits(0.5, False, False, 1)))
    noisy = lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32)
    params = nnx.to_pure_dict(jax.tree.map(noisy, state))
    x, d = (rng.standard_normal((3, 20, 12)).astype(np.float32) for _ in range(2))
    live = np.arange(20) < np.array([[20], [13], [0]])
    context = Context(None, None, "plain", 0.0, live=live)

    def outputs(params, x):
        return nnx.merge(graph, params)(x, context)

    def total(y, balance, z):
        return (y * d).sum() + 3 * balance.sum() + 2 * z.sum()

    def scalar(params, x):
        y, stats = outputs(params, x)
        return total(y, stats.load_balance_B, stats.router_z_B)

    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    expected = loop(c.model, *exact, live)
    y, stats = jax.jit(outputs)(params, x)
    np.testing.assert_allclose(y, expected[0], atol=1e-5)
    np.testing.assert_allclose(stats.load_balance_B, expected[1], rtol=1e-5)
    np.testing.assert_allclose(stats.router_z_B, expected[2], rtol=1e-5)
    np.testing.assert_array_equal(stats.counts_BE, expected[3])
    if c.model.routing == "capacity":  # some were dropped, or none
        assert (expected[3].max() > np.ceil(c.model.capacity_factor * 20 * 2 / 8)) == (c.model.capacity_factor < 1)
    gradient = jax.jit(jax.grad(scalar, (0, 1)))(params, x)
    leaves, tree = jax.tree.flatten(exact)
    for i, found in enumerate(jax.tree.leaves(gradient)):  # the slope along a random direction of each leaf
        direction, ends = rng.standard_normal(leaves[i].shape), []
        for side in (1e-6, -1e-6):
            moved = tree.unflatten([a + side * direction if i == j else a for j, a in enumerate(leaves)])
            ends.append(total(*loop(c.model, *moved, live)[:3]))
        slope = (ends[0] - ends[1]) / 2e-6
        size = np.linalg.norm(found) + np.linalg.norm(direction) * 1e-3
        assert abs(np.vdot(found, direction) - slope) < 1e-4 * size * np.sqrt(direction.size), i


def test_ties_go_to_the_lower_expert():
    np.testing.assert_array_equal(choose(jnp.zeros((1, 1, 4)), 2), [[[0, 1]]])


# ---- Losses, counts, biases -------------------------------------------------------------------------------------------------


def test_router_losses_are_sums_of_rows_by_their_target_tokens():
    c, rng = tiny(model__load_balance_weight=0.5, model__router_z_weight=0.25), np.random.default_rng(0)
    balance, z, counts = rng.random((3, 4)), rng.random((3, 4)), rng.integers(0, 9, (3, 4, 8))
    weight = np.array([5.0, 0.0, 2.0, 7.0])
    loss, aux = build_router_loss(c)(Stats(balance, z, counts), weight)
    np.testing.assert_allclose(loss, sum(weight[b] * (0.5 * balance[i, b] + 0.25 * z[i, b]) for b in range(4) for i in range(3)))
    np.testing.assert_allclose(aux["load_balance_loss"], (balance * weight).sum() / 3, rtol=1e-6)
    np.testing.assert_allclose(aux["router_z_loss"], (z * weight).sum() / 3, rtol=1e-6)
    np.testing.assert_array_equal(aux["expert_counts"], counts.sum(1))
    assert build_router_loss(tiny(model__feedforward="swiglu"))(None, weight) == (0.0, {})


def test_bias_follows_the_sign_rule():
    params = {"layers": {"feedforward": {"router": {"bias": jnp.full((1, 3), 9.0)}}, "other": 1}, "rest": 2}
    old = {"layers": {"feedforward": {"router": {"bias": jnp.array([[0.5, 0.0, 0.0]])}}}}
    new = balance_biases(params, old, jnp.array([[1, 2, 3]]), 0.25)
    np.testing.assert_array_equal(new["layers"]["feedforward"]["router"]["bias"], [[0.75, 0.0, -0.25]])
    assert new["layers"]["other"] == 1 and new["rest"] == 2


def test_balancing_evens_loads_out_and_a_bad_step_leaves_the_bias_alone():
    c = tiny(model__num_layers=1, model__bias_update_rate=0.002, model__load_balance_weight=0.0, optimizer__nonfinite="skip")
    c.optimizer.groups = ((".*", 1.0, 1.0),)  # decay on all: not for the bias
    model = build_model(c, VOCAB, "plain")
    optimizer = build_optimizer(c, model.specs)
    state = jax.jit(build_init(c, model, optimizer))(0)
    state["params"]["layers"]["feedforward"]["router"]["kernel"] *= 20
    step = jax.jit(build_train_step(c, model, build_objective(c), optimizer, build_schedule(c)))
    hyper = {"learning_rate": np.float32(0), "weight_decay": np.float32(0.1), "seed": np.int32(0)}
    batch, loads = packed_batch(c, 0), []
    bias_of = lambda state: np.asarray(state["params"]["layers"]["feedforward"]["router"]["bias"])
    for i in range(150):
        before = bias_of(state)
        state, metrics = step(state, batch, hyper)
        loads.append(float(metrics["expert_load_max"]))
        moved = (bias_of(state) - before) / 0.002
        np.testing.assert_allclose(moved, np.round(moved), atol=1e-3, err_msg=str(i))
    assert loads[0] > 1.5 and np.mean(loads[-20:]) < 1.15, loads
    hyper["learning_rate"] = np.float32(1)
    before = bias_of(state)
    state["params"]["embedding"] = state["params"]["embedding"].at[0, 0].set(jnp.nan)
    state, metrics = step(state, batch, hyper)
    assert not metrics["finite"]
    np.testing.assert_array_equal(bias_of(state), before)


# ---- What is counted, what is refused ---------------------------------------------------------------------------------------


def test_counts_of_mixtral():
    c = load("configs/mixtral_8x7b.py")
    model = build_model(c, c.model.vocab_size, "plain")
    assert model.num_parameters == 46_702_792_704 and model.num_active_parameters == 12_879_925_248
    norms, embedding = (2 * 32 + 1) * 4096, 32_000 * 4096
    assert model.num_matmul_parameters == model.num_active_parameters - norms - embedding


def test_what_does_not_fit_is_named():
    c = tiny(model__experts_per_token=9, model__routing="dropfree", mesh__expert=3)
    with pytest.raises(UserError) as error:
        validate(c)
    found = error.value.problems
    assert any("experts_per_token=9" in p and "use 8" in p for p in found) and any("routing='dropfree'" in p for p in found)
    problems = mesh_problems(c, axis_sizes(c, 3), 3)
    assert any("model.num_experts=8 is not divisible by mesh expert = 3; use model.num_experts=6 or 9" in p for p in problems)


# ---- Over devices -----------------------------------------------------------------------------------------------------------

MESHES = {
    "expert=4,fsdp=2": dict(mesh__expert=4, mesh__fsdp=2),
    "expert=2,tensor=2,data=2": dict(mesh__expert=2, mesh__tensor=2, mesh__data=2),
    "expert=2,context=2,fsdp=2": dict(mesh__expert=2, mesh__context=2, mesh__fsdp=2),
    "stage=2,expert=2,fsdp=2": dict(mesh__stage=2, mesh__expert=2, mesh__fsdp=2),
}
MODELS = {
    "dropless": dict(),
    "capacity": dict(model__routing="capacity", model__router_score="sigmoid", model__shared_experts=1,
                     model__bias_update_rate=0.001),
}


@functools.cache
def reference(kind):
    losses, gradient, state = test_mesh.run(tiny(**MODELS[kind]))
    return losses, gradient, jax.device_get(state["params"]["layers"]["feedforward"]["router"])


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # its parts are each in another case


@pytest.mark.parametrize("kind, mesh, accum", [
    ("dropless", "expert=4,fsdp=2", 1), ("dropless", "expert=4,fsdp=2", 4), ("dropless", "expert=2,tensor=2,data=2", 1),
    SLOW("dropless", "expert=2,tensor=2,data=2", 4), ("dropless", "expert=2,context=2,fsdp=2", 1),
    ("capacity", "expert=4,fsdp=2", 4), ("capacity", "expert=2,tensor=2,data=2", 1),
    SLOW("capacity", "expert=2,context=2,fsdp=2", 1), ("capacity", "stage=2,expert=2,fsdp=2", 1),
    ("dropless", "stage=2,expert=2,fsdp=2", 1)])
def test_every_mesh_gives_the_same_curve_and_gradient(kind, mesh, accum):
    state = assert_same_run(tiny(**MODELS[kind], **MESHES[mesh], grad_accum_steps=accum), reference(kind))
    if kind == "capacity":
        np.testing.assert_array_equal(state["params"]["layers"]["feedforward"]["router"]["bias"], reference(kind)[2]["bias"])


def test_dispatch_over_devices_drops_nothing_however_skewed():
    """Even loads take the small buffers of the all-to-all, all tokens on one device's experts the large ones; padding goes
    nowhere."""
    mesh, rng = build_mesh(tiny(**MESHES["expert=4,fsdp=2"])), np.random.default_rng(0)
    B, T, D, F, E, K = 8, 16, 4, 6, 16, 2
    x, d = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
    weights = rng.random((B, T, K)).astype(np.float32)
    kernels = {"up": rng.standard_normal((E, D, F), np.float32), "down": rng.standard_normal((E, F, D), np.float32)}

    def run(rows, sizes, kernels):
        for name in ("up", "down"):
            rows = jax.lax.ragged_dot(rows, gather(name, kernels[name]), sizes)
        return rows

    def both(x, choices, weights, kernels):
        out, pull = jax.vjp(lambda *a: dispatch(run, a[0], choices, *a[1:]), x, weights, kernels)
        return out, pull(d)

    alone, over = jax.jit(both), jit(mesh, both)
    even = np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
    even[0, 3:9] = E
    skewed = even % 4
    for choices, large in ((even, False), (skewed, True), (np.full_like(even, E), False)):
        to_each = [max((row // 4 == device).sum() for row in choices.reshape(8, -1)) for device in range(4)]
        assert (max(to_each) > SLACK * T * K / 4) == large
        given = (x, choices, weights, kernels)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), over(*jax.device_put(given, replicated(mesh))),
                     alone(*given))
