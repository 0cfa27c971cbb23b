import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from jaxlm.errors import UserError
from jaxlm.models.parameter import ParamSpec
from jaxlm.optimizers.build import OPTIMIZERS, build_optimizer
from jaxlm.optimizers.muon import orthogonalize
from jaxlm.optimizers.schedules import SCHEDULES, build_schedule

SPECS = {"embedding": ParamSpec((6, 4), jnp.float32, ("vocab", "embed"), 0, False),
         "layers": {"up": {"kernel": ParamSpec((3, 4, 8), jnp.float32, ("layers", "embed", "mlp"), 1, True)},
                    "experts": {"kernel": ParamSpec((3, 2, 4, 8), jnp.float32, ("layers", "expert", "embed", "mlp"), 1, True)},
                    "norm": {"scale": ParamSpec((3, 4), jnp.float32, ("layers", None), 0, True)}}}


def random_tree(seed):
    leaves, tree = jax.tree.flatten(SPECS, is_leaf=lambda x: isinstance(x, ParamSpec))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.standard_normal(s.shape), jnp.float32) for s in leaves])


def test_adamw_equals_optax():
    config = default.get_config()
    optimizer = build_optimizer(config, SPECS)
    mask = {"embedding": True, "layers": {"up": {"kernel": True}, "experts": {"kernel": True}, "norm": {"scale": False}}}
    reference = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=mask)
    ours = theirs = random_tree(0)
    state, ref_state = optimizer.init(ours), reference.init(theirs)
    for seed in range(1, 5):
        grads = random_tree(seed)
        ours, state = optimizer.update(grads, state, ours, 0.01, 0.3)
        updates, ref_state = reference.update(grads, ref_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 8, 40), (1, 40, 8)])
def test_muon_is_nearly_orthogonal_and_follows_the_svd(shape):
    m = np.random.default_rng(1).standard_normal(shape)
    out = np.asarray(orthogonalize(jnp.asarray(m, jnp.float32), 5), np.float64)
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    values = np.linalg.svd(out, compute_uv=False)
    well_conditioned = s / np.linalg.norm(m, axis=(1, 2))[:, None] > 0.02
    assert (values[well_conditioned] > 0.6).all() and (values < 1.3).all()
    # same singular directions: u^T out v is diagonal
    rotated = u.swapaxes(-1, -2) @ out @ vt.swapaxes(-1, -2)
    off = rotated - np.eye(rotated.shape[-1]) * rotated
    assert np.abs(off).max() < 1e-3


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_lowers_a_quadratic(name):
    config = default.get_config()
    config.optimizer.name = name
    optimizer = build_optimizer(config, SPECS)
    target, params = random_tree(5), random_tree(6)
    leaves = jax.tree.leaves
    loss = lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(leaves(p), leaves(target), strict=True))
    state, before = optimizer.init(params), loss(params)

    @jax.jit
    def step(params, state):
        return optimizer.update(jax.grad(loss)(params), state, params, 0.01, 0.0)

    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < before


@pytest.mark.parametrize("name, reference", [("adan", optax.adan(0.01, 0.9, 0.95, 0.99, 1e-8, 0.0)),
                                             ("rmsprop", optax.rmsprop(0.01, 0.95, 1e-8))])
def test_thin_wrappers_equal_optax(name, reference):
    config = default.get_config()
    config.optimizer.name = name
    optimizer = build_optimizer(config, SPECS)
    ours = theirs = random_tree(0)
    state, ref_state = optimizer.init(ours), reference.init(theirs)
    for seed in range(1, 4):
        ours, state = optimizer.update(random_tree(seed), state, ours, 0.01, 0.0)
        updates, ref_state = reference.update(random_tree(seed), ref_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_novograd_keeps_one_second_moment_a_matrix():
    config = default.get_config()
    config.optimizer.name = "novograd"
    state = build_optimizer(config, SPECS).init(random_tree(0))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.size < 8) == [
        (), (), (3,), (3,), (3,), (3, 2), (3, 2)]  # counts and moments: all together, of each layer, of each expert


def test_each_parameter_needs_exactly_one_group():
    config = default.get_config()
    config.optimizer.groups = ((".*kernel", 1.0, 1.0), (".*", 1.0, 0.0))
    with pytest.raises(UserError, match="layers/up/kernel matches 2"):
        build_optimizer(config, SPECS)
    config.optimizer.groups = ((".*kernel", 1.0, 1.0),)
    with pytest.raises(UserError) as error:
        build_optimizer(config, SPECS)
    assert len(error.value.problems) == 2


def test_a_malformed_group_is_a_user_error():
    config = default.get_config()
    config.optimizer.groups = (("(", 1.0, 1.0), (".*", 1.0))
    with pytest.raises(UserError) as error:
        build_optimizer(config, SPECS)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize("part, at", [("up", (1,)), ("experts", (0, 1))])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_one_layer_or_expert_does_not_move_another(name, part, at):
    config = default.get_config()
    config.optimizer.name = name
    optimizer = build_optimizer(config, SPECS)

    def first(factor):
        params = random_tree(0)
        params["layers"][part]["kernel"] = params["layers"][part]["kernel"].at[at].multiply(factor)
        state = optimizer.init(params)
        for seed in range(1, 4):
            grads = random_tree(seed)
            grads["layers"][part]["kernel"] = grads["layers"][part]["kernel"].at[at].multiply(factor**seed)
            params, state = optimizer.update(grads, state, params, 0.01, 0.0)
        return params["layers"][part]["kernel"].reshape(-1, 4, 8)[0]

    np.testing.assert_allclose(first(10.0), first(1.0), atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_state_as_large_as_a_parameter_is_found_by_its_path(name):
    """`state_shardings` recognises moments by the end of their path; another key would leave them replicated."""
    config = default.get_config()
    config.optimizer.name = name
    state = build_optimizer(config, SPECS).init(random_tree(0))
    shapes = {"embedding": (6, 4), "layers/up/kernel": (3, 4, 8), "layers/experts/kernel": (3, 2, 4, 8),
              "layers/norm/scale": (3, 4)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        known = any(path.endswith("/" + n) and leaf.shape == s for n, s in shapes.items())
        assert leaf.ndim < 2 or path.endswith("/count") or known, path


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 8, 40), (1, 40, 8)])
def test_orthogonalize_equals_float64(shape):
    m = np.random.default_rng(2).standard_normal(shape)
    x = m / np.linalg.norm(m, axis=(1, 2), keepdims=True)
    for _ in range(5):
        gram = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    np.testing.assert_allclose(orthogonalize(jnp.asarray(m, jnp.float32), 5), x, atol=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_warm_up_and_end(name):
    config = default.get_config()
    config.steps, config.schedule.name, config.schedule.warmup_steps = 100, name, 10
    schedule = build_schedule(config)
    scale = [float(schedule(jnp.int32(s))) for s in range(100)]
    np.testing.assert_allclose(scale[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert all(a >= b - 1e-6 for a, b in zip(scale[10:], scale[11:], strict=False))
    assert scale[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    config.schedule.final_fraction = 0.0
    last = float(build_schedule(config)(jnp.int32(99)))
    assert last == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-6)


def test_wsd_is_stable_until_the_decay():
    config = default.get_config()
    config.steps, config.schedule.name, config.schedule.warmup_steps = 101, "wsd", 0
    config.schedule.decay_steps = "40%"
    schedule = build_schedule(config)
    assert float(schedule(jnp.int32(59))) == 1.0 and float(schedule(jnp.int32(70))) < 1.0


def test_muon_sees_each_expert_as_a_matrix():
    config = default.get_config()
    config.optimizer.name, config.optimizer.nesterov, config.optimizer.momentum = "muon", False, 0.0
    optimizer, grads, zeros = build_optimizer(config, SPECS), random_tree(3), jax.tree.map(jnp.zeros_like, random_tree(3))
    moved, _ = optimizer.update(grads, optimizer.init(zeros), zeros, 1.0, 0.0)
    for i in range(3):
        for j in range(2):
            alone = orthogonalize(grads["layers"]["experts"]["kernel"][i, j][None], config.optimizer.muon_steps)[0] * 2**0.5
            np.testing.assert_allclose(moved["layers"]["experts"]["kernel"][i, j], -alone, atol=1e-5)
