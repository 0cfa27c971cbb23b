"""Programs compiled for TPUs that are not there, by libtpu (`pip install -e '.[tpu]'`)."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from test_mesh import HYPER, packed_batch, tiny

from jaxlm.kernels.attention import attend
from jaxlm.objectives.build import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding, replicated
from jaxlm.train.state import build_init, build_model, state_shardings
from jaxlm.train.step import build_train_step

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
              pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")]  # not without the device


@pytest.fixture
def devices(monkeypatch):
    """-> the devices of a topology, by its name."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def abstract(a, sharding):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


# The longest heads for each size of block; a v4 has the least memory for them.
@pytest.mark.parametrize("dtype, head_dim, window", [("bfloat16", 128, 0), ("bfloat16", 80, 9000), ("bfloat16", 512, 0),
                                                     ("float32", 512, 1000)])
def test_splash_compiles_for_a_tpu(devices, dtype, head_dim, window):
    sharding = jax.sharding.SingleDeviceSharding(devices("v4:2x2x1")[0])
    q, k, v = (jax.ShapeDtypeStruct((2, 16384, heads, head_dim), dtype, sharding=sharding) for heads in (4, 2, 2))
    segment_ids = jax.ShapeDtypeStruct((2, 16384), jnp.int32, sharding=sharding)

    def loss(q, k, v, segment_ids):
        out = attend(q, k, v, backend="splash", window=window, softcap=30.0, segment_ids_BT=segment_ids)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, segment_ids).compile()
    scores_bytes = 2 * 4 * 16384**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes / 5
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, gradient of q, gradient of k and v


def test_a_train_step_with_splash_compiles_for_eight_tpus(devices):
    c = tiny(mesh__fsdp=4, mesh__tensor=2, seq_len=1024, batch_size=16, model__embed_dim=256, model__head_dim=128,
             model__mlp_dim=512, model__compute_dtype="bfloat16")
    mesh, model = build_mesh(c, devices=devices("v5e:2x4")), build_model(c, 512, "splash")
    optimizer = build_optimizer(c, model.specs)
    step = build_train_step(c, model, build_objective(c), optimizer, build_schedule(c))
    state = jax.eval_shape(build_init(c, model, optimizer), 0)
    shardings = state_shardings(mesh, model, state, c.mesh.zero_stage)
    batch = {k: abstract(a, batch_sharding(mesh)) for k, a in packed_batch(c, 0).items()}
    hyper = {k: abstract(a, replicated(mesh)) for k, a in HYPER.items()}
    compiled = jit(mesh, step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))).lower(
        jax.tree.map(abstract, state, shardings), batch, hyper).compile()
    assert compiled.as_text().count("splash_mha_") >= 3
