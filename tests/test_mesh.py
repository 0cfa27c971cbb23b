"""The mesh changes speed, never the loss: one curve and one gradient for every mesh, with ragged masks and packed documents."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import default
from jaxlm.config import Tracked, load, resolve
from jaxlm.errors import UserError
from jaxlm.kernels.attention import Extras, attend
from jaxlm.objectives.build import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.automatic import choose_axes
from jaxlm.parallel.compile import jit
from jaxlm.parallel.context import zigzag_order
from jaxlm.parallel.mesh import AXES, build_mesh, hybrid_grid
from jaxlm.parallel.rules import batch_sharding, replicated, sharding_of, spec_of_axes
from jaxlm.train.state import build_init, build_model, flatten_paths, state_shardings
from jaxlm.train.step import build_programs, build_train_step

STEPS, VOCAB = 4, 48


def tiny(**changes):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = STEPS, 64, 32
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.num_kv_heads = 4, 32, 4, 2
    c.model.scan_layers, c.data.isolate_documents, c.mesh.data = True, True, 1
    for key, value in changes.items():
        group, name = key.split("__") if "__" in key else (None, key)
        setattr(c[group] if group else c, name, value)
    resolve(c)
    return c


def packed_batch(c, seed):
    """Two or three documents a row, of which the last is padding; targets that cross documents or are padding do not count."""
    rng, shape = np.random.default_rng(seed), (c.batch_size, c.seq_len)
    cuts = np.sort(rng.integers(1, c.seq_len, (c.batch_size, 2)), axis=1)
    at = np.arange(c.seq_len)
    segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    live = (segments < 3) | (rng.random((c.batch_size, 1)) < 0.5)
    mask = live & (np.roll(segments, -1, 1) == segments)
    return {"tokens": rng.integers(0, VOCAB, shape, np.int32), "targets": rng.integers(0, VOCAB, shape, np.int32),
            "segment_ids": np.where(live, segments, 0).astype(np.int32), "positions": (at - starts).astype(np.int32),
            "loss_mask": mask.astype(np.float32)}


HYPER = {"learning_rate": np.float32(3e-3), "weight_decay": np.float32(0.1), "seed": np.int32(0)}


def build(c):
    """-> (mesh, model, init, shardings of the state, jitted step)."""
    mesh = build_mesh(c)
    model = build_model(c, VOCAB, "plain")
    optimizer = build_optimizer(c, model.specs)
    step = build_train_step(c, model, build_objective(c), optimizer, build_schedule(c))
    init = build_init(c, model, optimizer)
    shardings = state_shardings(mesh, model, jax.eval_shape(init, 0), c.mesh.zero_stage)
    return mesh, model, init, shardings, jit(mesh, step, donate_argnums=0, out_shardings=(shardings, None))


def run(c, steps=STEPS):
    """-> (losses, first gradient as Adam's first moment, the state)."""
    mesh, _, init, shardings, step = build(c)
    state = jax.device_put(jax.device_get(jax.jit(init)(3)), shardings, may_alias=False)  # one program for all meshes
    losses, gradient = [], None
    for i in range(steps):
        state, metrics = step(state, jax.device_put(packed_batch(c, i), batch_sharding(mesh)), HYPER)
        losses.append(float(metrics["loss"]))
        gradient = jax.device_get(state["opt_state"]["mu"]) if gradient is None else gradient
    return losses, gradient, state


@functools.cache
def reference(**changes):
    return run(tiny(**changes))[:2]


def assert_same_run(c, expected):
    losses, gradient, state = run(c)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    wanted = flatten_paths(expected[1])
    for path, g in flatten_paths(gradient).items():
        assert np.abs(g - wanted[path]).max() <= 1e-5 * np.abs(wanted[path]).max() + 1e-9, path
    return state


MESHES = {
    "data=8": dict(mesh__data=8),
    "fsdp=8": dict(mesh__fsdp=8),
    "fsdp=8, ZeRO-1": dict(mesh__fsdp=8, mesh__zero_stage=1),
    "data=2,fsdp=2,tensor=2": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
    "fsdp=2,context=4 ring": dict(mesh__fsdp=2, mesh__context=4),
    "fsdp=2,context=4 all_gather": dict(mesh__fsdp=2, mesh__context=4, kernels__context="all_gather"),
    "stage=2,fsdp=4": dict(mesh__stage=2, mesh__fsdp=4),
    "stage=2,tensor=2,data=2": dict(mesh__stage=2, mesh__tensor=2, mesh__data=2),
    "stage=2,data=4 circular": dict(mesh__stage=2, mesh__data=4, mesh__pipeline_repeats=2),
    "context=2,tensor=2,data=2": dict(mesh__context=2, mesh__tensor=2, mesh__data=2),
}


ACCUMULATE = ("fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,context=4 ring", "stage=2,tensor=2,data=2")  # in the default suite


@pytest.mark.parametrize("mesh, accum", [(mesh, 1) for mesh in MESHES] + [
    pytest.param(mesh, 4, marks=() if mesh in ACCUMULATE else pytest.mark.slow) for mesh in MESHES])
def test_every_mesh_gives_the_same_curve_and_gradient(mesh, accum):
    assert_same_run(tiny(**MESHES[mesh], grad_accum_steps=accum), reference())


def test_a_state_is_born_the_same_on_every_mesh():
    mesh, _, init, shardings, _ = build(tiny(mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    born = flatten_paths(jax.jit(init, out_shardings=shardings)(3))
    assert {len(leaf.sharding.spec) > 0 for leaf in born.values()} == {True, False}
    for path, leaf in flatten_paths(jax.jit(init)(3)).items():
        np.testing.assert_array_equal(born[path], leaf, err_msg=path)


@pytest.mark.parametrize("options", [dict(), dict(window=5), dict(softcap=3.0), dict(segments=True, window=9)])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_context_parallel_attention_equals_plain(method, options):
    c = tiny(mesh__context=4, mesh__tensor=2)
    mesh, rng = build_mesh(c), np.random.default_rng(0)
    B, T = 2, 32
    q, k, v, d = (rng.standard_normal((B, T, n, 8)).astype(np.float32) for n in (4, 2, 2, 4))
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32) if options.pop("segments", False) else None

    def weighted(q, k, v, order=slice(None)):
        keep = None if segments is None else segments[:, order]
        q, k, v = q[:, order], k[:, order], v[:, order]
        out = attend(q, k, v, backend="plain", segment_ids_BT=keep, context_method=method, **options)
        return (out * d[:, order]).sum()

    def on_mesh(q, k, v):
        return weighted(q, k, v, zigzag_order(T) if method == "ring" else slice(None))

    expected = jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))(q, k, v)
    found = jit(mesh, jax.value_and_grad(on_mesh, (0, 1, 2)))(*jax.device_put((q, k, v), replicated(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_a_prefix_is_the_same_on_a_mesh(backend):
    mesh, rng = build_mesh(tiny(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)), np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, 32, n, 8)).astype(np.float32) for n in (4, 2, 2))
    segments, prefix = np.sort(rng.integers(0, 3, (4, 32)), axis=1).astype(np.int32), rng.random((4, 32)) < 0.4
    run = lambda *args: attend(*args[:3], backend=backend, segment_ids_BT=args[3], extras=Extras(prefix_BS=args[4]))
    arrays = (q, k, v, segments, prefix)
    np.testing.assert_allclose(jit(mesh, run)(*jax.device_put(arrays, replicated(mesh))), jax.jit(run)(*arrays), atol=1e-5)


def test_all_that_does_not_fit_is_said_at_once_with_values_that_do():
    def problems(**changes):
        with pytest.raises(UserError) as error:
            build_mesh(tiny(**changes))
        return error.value.problems

    assert "takes 3 devices or a multiple, and there are 8" in problems(mesh__data=-1, mesh__tensor=3)[0]
    found = problems(mesh__stage=8, mesh__data=3, model__num_layers=6, batch_size=8)
    assert "takes 24 devices" in found[0] and "use batch_size / grad_accum_steps=6 or 9" in found[1]
    assert any("model.num_layers=6 is not divisible by mesh stage" in p and "use model.num_layers=8" in p for p in found)
    assert "use model.num_heads=8, or mesh tensor = 4" in problems(mesh__tensor=8)[0]
    found = problems(mesh__context=8, seq_len=36)
    assert "seq_len=36" in found[0] and "use seq_len=32 or 48" in found[1]
    assert "cannot be cut into 2 to 4 micro-batches" in problems(mesh__stage=2, mesh__data=4, batch_size=4)[0]
    assert "mesh.dcn_data=3: must divide mesh.data=8; use 2 or 4" in problems(mesh__data=8, mesh__dcn_data=3)
    assert "form 1 groups" in problems(mesh__data=8, mesh__dcn_data=2)[0]
    assert "prefix_attention=True: cannot be cut up" in problems(mesh__data=4, mesh__context=2, model__prefix_attention=True)[0]


def test_rules_refuse_unknown_and_colliding_axes():
    with pytest.raises(ValueError, match="'embedding' is not in RULES"):
        spec_of_axes(("embedding",))
    with pytest.raises(ValueError, match="'tensor' twice"):
        spec_of_axes(("heads", "mlp"))
    mesh = build_mesh(tiny(mesh__tensor=2, mesh__fsdp=4))
    assert sharding_of(mesh, ("vocab", "embed"), (65, 32)).spec == PartitionSpec(None, "fsdp")  # 65 characters do not divide


@pytest.mark.parametrize("slow", [dict(data=2), dict(data=2, fsdp=2), dict(stage=4)])
def test_a_slow_axis_changes_group_and_a_fast_one_does_not(slow):
    class Device:
        platform = "gpu"

        def __init__(self, i):
            self.id, self.process_index = i, i // 4

    sizes = {"data": 4, "fsdp": 2, "tensor": 1, "context": 1, "expert": 1, "stage": 4}
    count = int(np.prod(list(slow.values())))
    devices = [Device(i) for i in range(32)]
    for device in devices:
        device.process_index = device.id // (32 // count)
    grid = hybrid_grid(devices, sizes, {axis: slow[axis] if axis in slow else 1 for axis in AXES})
    assert grid.shape == tuple(sizes.values()) and len({d.id for d in grid.ravel()}) == 32
    group = np.vectorize(lambda d: d.process_index)(grid)
    for i, axis in enumerate(AXES):
        blocks = np.split(group, slow[axis] if axis in slow else 1, axis=i)
        for block in blocks:  # inside a block, going along the axis never changes group
            assert (block == np.take(block, [0], axis=i)).all(), axis
    assert len(np.unique(group)) == count


def test_auto_cuts_up_only_what_memory_asks_for():
    class Device:
        process_index, device_kind, platform = 0, "unheard of", "gpu"

        def memory_stats(self):
            return {"bytes_limit": 80 * 2**30}

    def axes(width, **changes):
        changes = dict(seq_len=2048, model__num_layers=16, model__embed_dim=width, model__head_dim=128, model__mlp_dim=4 * width,
                       model__remat="full", model__compute_dtype="bfloat16") | changes
        return choose_axes(tiny(**changes), 32_000, [Device()] * 8)

    sizes, why = axes(1024)
    assert sizes["data"] * sizes["fsdp"] == 8
    sizes, why = axes(4096)
    assert sizes["fsdp"] > 1 and sizes["tensor"] == sizes["context"] == 1 and "80.00 GiB" in why and "an H100's speeds" in why
    sizes, why = axes(65536)
    assert sizes["fsdp"] * sizes["tensor"] == 8 and "may not fit" in why
    sizes, why = axes(1024, batch_size=2)  # too few rows: some devices must share them
    assert sizes["data"] * sizes["fsdp"] == 2 and sizes["context"] * sizes["tensor"] == 4
    c = tiny(mesh__auto=True)
    assert build_mesh(c, sizes=choose_axes(c, 48, jax.devices())[0]).size == 8


def test_training_takes_auto_from_the_config_that_it_tracks():
    """As `train` builds its programs."""
    config = load("configs/shakespeare.py:debug", ["--config.mesh=auto", "--config.batch_size=8"])
    program, = build_programs(Tracked(config), 256).values()
    assert program.mesh.size == 8 and "the fastest by the estimate" in program.layout


def test_dropout_does_not_depend_on_the_mesh():
    expected = run(tiny(model__dropout=0.2), steps=2)[0]
    assert expected != reference()[0][:2]
    for mesh in (dict(mesh__fsdp=2, mesh__context=4), dict(mesh__stage=2, mesh__data=4), dict(grad_accum_steps=4)):
        np.testing.assert_allclose(run(tiny(model__dropout=0.2, **mesh), steps=2)[0], expected, rtol=1e-5)


def test_value_residual_and_windows_in_a_pipeline():
    changes = dict(model__value_residual=True, model__window=5, model__window_pattern="LG")
    expected = run(tiny(**changes), steps=3)[0]
    for mesh in (dict(mesh__stage=2, mesh__tensor=2, mesh__data=2), dict(mesh__fsdp=2, mesh__context=2, mesh__tensor=2)):
        np.testing.assert_allclose(run(tiny(**changes, **mesh), steps=3)[0], expected, rtol=1e-5)


def test_norms_and_ropes_of_the_families_on_a_mesh():
    """Norms of all heads together, norms after the branches, rope by kind of layer, in part, or not at all."""
    changes = dict(model__norm_place="both", model__qk_norm=True, model__qk_norm_over="all", model__window=5,
                   model__window_pattern="LG", model__rope_theta_local=100.0, model__rope_pattern="RN", model__rope_fraction=0.5,
                   model__norm_scale_from_one=True, model__attention_bias=True, model__attention_out_bias=False)
    expected = run(tiny(**changes), steps=3)[0]
    for mesh in (dict(mesh__stage=2, mesh__tensor=2, mesh__data=2), dict(mesh__fsdp=2, mesh__context=2, mesh__tensor=2)):
        np.testing.assert_allclose(run(tiny(**changes, **mesh), steps=3)[0], expected, rtol=1e-5)
