"""The train step: accumulation and meshes change nothing, bad numbers never reach the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.objectives.build import build_objective
from jaxlm.optimizers.build import OPTIMIZERS, build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding
from jaxlm.train.state import build_init, build_model, flatten_paths, state_shardings
from jaxlm.train.step import build_train_step


def tiny(**changes):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 10, 8, 16
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 2, 32, 2
    c.mesh.data = 1
    for key, value in changes.items():
        group, name = key.split("__") if "__" in key else (None, key)
        setattr(c[group] if group else c, name, value)
    resolve(c)
    return c


def ragged_batch(c, seed=0):
    rng = np.random.default_rng(seed)
    shape = (c.batch_size, c.seq_len)
    lengths = rng.integers(1, c.seq_len, c.batch_size)  # micro-batches of very different weight
    mask = (np.arange(c.seq_len) < lengths[:, None]).astype(np.float32)
    return {"tokens": rng.integers(0, 48, shape, np.int32), "targets": rng.integers(0, 48, shape, np.int32),
            "segment_ids": np.ones(shape, np.int32), "loss_mask": mask,
            "positions": np.broadcast_to(np.arange(c.seq_len, dtype=np.int32), shape)}


def run(c, steps=3, spoil=None, lr=1e-2):
    mesh = build_mesh(c)
    model = build_model(c, 48, "plain")
    optimizer = build_optimizer(c, model.trained)
    step = jit(mesh, build_train_step(c, model, build_objective(c), optimizer, build_schedule(c)), donate_argnums=0)
    init = build_init(c, model, optimizer)
    shardings = state_shardings(mesh, model, jax.eval_shape(init, 0), c.mesh.zero_stage)
    state = jax.jit(init, out_shardings=shardings)(3)
    if spoil:
        state = spoil(state)
    hyper = {"learning_rate": np.float32(lr), "weight_decay": np.float32(0.1), "seed": np.int32(0)}
    losses, metrics = [], None
    for i in range(steps):
        state, metrics = step(state, jax.device_put(ragged_batch(c, i), batch_sharding(mesh)), hyper)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state), metrics, model


def same(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


REFERENCE = {}


def reference():
    if not REFERENCE:
        REFERENCE["run"] = run(tiny())
    return REFERENCE["run"]


@pytest.mark.parametrize("changes", [
    dict(grad_accum_steps=4), dict(mesh__data=8), dict(mesh__fsdp=8), dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
    dict(mesh__fsdp=2, mesh__tensor=2, grad_accum_steps=4, model__scan_layers=True)])
def test_accumulation_and_mesh_change_nothing_with_ragged_masks(changes):
    losses, state, _, _ = run(tiny(**changes))
    expected, expected_state, _, _ = reference()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    same(state["params"], expected_state["params"], 5e-5)


def test_fsdp_really_shards():
    c = tiny(mesh__fsdp=8)
    model = build_model(c, 48, "plain")
    optimizer = build_optimizer(c, model.specs)
    abstract = jax.eval_shape(build_init(c, model, optimizer), 0)
    shardings = flatten_paths(state_shardings(build_mesh(c), model, abstract))
    for path in ("params/embedding", "params/layers/attention/query/kernel", "opt_state/mu/layers/feedforward/up/kernel"):
        assert "fsdp" in str(shardings[path].spec), path


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_gradient_is_named_and_never_reaches_the_state(policy):
    def spoil(state):
        state["params"]["layers"]["feedforward"]["up"]["kernel"] = (
            state["params"]["layers"]["feedforward"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan))
        return state

    _, state, metrics, model = run(tiny(optimizer__nonfinite=policy), steps=1, spoil=spoil)
    assert not metrics["finite"] and int(metrics["bad_leaf"]) >= 0
    assert list(flatten_paths(model.specs))[int(metrics["bad_leaf"])] in flatten_paths(state["params"])
    clean = run(tiny(), steps=0)[1]["params"]
    np.testing.assert_array_equal(state["params"]["embedding"], clean["embedding"])
    assert int(state["step"]) == 1


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_bad_update_is_held_back_by_branch_and_by_select(backend, monkeypatch):
    """A CPU takes a branch, an accelerator a select (traced here as if there were one): same numbers, same refusal."""
    monkeypatch.setattr("jaxlm.parallel.target.platform", lambda: backend)
    same(run(tiny())[1], reference()[1], 1e-6)
    nan = lambda state: {**state, "params": {**state["params"], "embedding": state["params"]["embedding"] * jnp.nan}}
    _, state, metrics, _ = run(tiny(), steps=1, spoil=nan)
    assert not metrics["finite"] and int(state["step"]) == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state["opt_state"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_state_keeps_its_types_with_every_optimizer(name, dtype):
    c = tiny(optimizer__name=name, optimizer__moment_dtype=dtype)
    model = build_model(c, 48, "plain")
    optimizer = build_optimizer(c, model.specs)
    state = jax.eval_shape(build_init(c, model, optimizer), 0)
    hyper = {"learning_rate": np.float32(0.1), "weight_decay": np.float32(0.1), "seed": np.int32(0)}
    step = build_train_step(c, model, build_objective(c), optimizer, build_schedule(c))
    after = jax.eval_shape(step, state, ragged_batch(c), hyper)[0]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), after)


def test_ema_follows_the_parameters():
    c = tiny(optimizer__ema_decay=0.5)
    init = run(c, steps=0)[1]["params"]
    _, state, _, _ = run(c, steps=1)
    same(state["ema"], jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, init, state["params"]), 1e-6)


def test_dropout_depends_on_seed_and_step_and_is_off_in_evaluation():
    a = run(tiny(model__dropout=0.3))[0]
    assert a == run(tiny(model__dropout=0.3))[0] and a != reference()[0]


@pytest.mark.parametrize("options", [dict(), dict(z_loss=0.1, label_smoothing=0.2), dict(cap=3.0)])
def test_chunked_loss_and_its_gradient_equal_plain_and_numpy(options):
    options = {"cap": 0.0, "z_loss": 0.0, "label_smoothing": 0.0, **options}
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 16, 8)), rng.standard_normal((8, 11))
    y, mask = rng.integers(0, 11, (2, 16)), (rng.random((2, 16)) < 0.7).astype(np.float32)

    def total(method):
        f = lambda x, w: cross_entropy(x, w, y, mask, method=method, **options)[0]
        return jax.jit(jax.value_and_grad(f, (0, 1)))(jnp.float32(x), jnp.float32(w))

    same(total("chunked"), total("plain"), 2e-5)
    logits = x @ w
    if options["cap"]:
        logits = options["cap"] * np.tanh(logits / options["cap"])
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, y[..., None], -1)[..., 0]
    s = options["label_smoothing"]
    loss = (1 - s) * nll + s * (lse - logits.mean(-1)) + options["z_loss"] * lse**2
    np.testing.assert_allclose(total("plain")[0], (loss * mask).sum(), rtol=1e-5)
