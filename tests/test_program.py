"""What each preset's step computes, holds and calls, tiny, against stored facts: a gate for speed and memory without an
accelerator. A change that alters them writes the file anew, `JAXLM_UPDATE_GOLDEN=1 python -m pytest tests/test_program.py`."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config import load
from jaxlm.data.feed import put_everywhere
from jaxlm.observe.throughput import flops_per_token
from jaxlm.parallel.compile import empty_compile_cache
from jaxlm.parallel.rules import replicated
from jaxlm.plan.facts import bytes_accessed, flops, host_calls, memory, operations, types, wide_products
from jaxlm.train import loop
from jaxlm.train.loop import train
from jaxlm.train.step import Program, build_program

GOLDEN = pathlib.Path(__file__).parent / "golden" / "programs.json"
CPU = pathlib.Path("/proc/cpuinfo")
INSTRUCTIONS = next((name for name in ("avx512f", "avx2") if CPU.exists() and name in CPU.read_text()), platform.machine())
VERSION = f"{jax.__version__} {jax.default_backend()} {INSTRUCTIONS}"  # XLA fuses by what the CPU can do
PRESETS = sorted(p.stem for p in pathlib.Path("configs").glob("*.py") if p.stem not in ("__init__", "default", "published"))
TPU = "v5e:2x4"
WITHIN = 0.02  # of bytes, and of operations that XLA joins and splits as it likes


def preset(name, *overrides, mesh=(1, 1), devices=None):
    axes = (f"mesh.data={mesh[0]}", f"mesh.fsdp={mesh[1]}")
    # The emitter decides what is fused; conftest.py turns it off for the others.
    emitter = "kernels.compiler_options=xla_cpu_use_fusion_emitters=true"
    config = load(f"configs/{name}.py:debug", [f"--config.{o}" for o in (*axes, emitter, *overrides)])
    return build_program(config, config.model.vocab_size, devices)


def step_jaxpr(program):
    return jax.make_jaxpr(program.train_step)(*program.inputs)


def gradient_jaxpr(program, rows=None):
    """Of the model and its loss, without the optimizer."""
    batch = {name: jax.ShapeDtypeStruct((rows or a.shape[0], a.shape[1]), a.dtype) for name, a in program.inputs[1].items()}
    loss = lambda params, batch: program.objective(nnx.merge(program.model.graph, params), batch)[0]
    return jax.make_jaxpr(jax.grad(loss))(program.state["params"], batch)


@functools.cache
def compiled(name, *overrides, mesh=(1, 1)):
    program = preset(name, *overrides, mesh=mesh)
    return program, program.compile()[0]


def facts(program, step):
    m = memory(step)
    return {"flops": flops(step_jaxpr(program)), "bytes_accessed": bytes_accessed(step), "argument_bytes": m.arguments,
            "aliased_bytes": m.aliased, "temporary_bytes": m.temporary, "peak_bytes": m.peak,
            "operations": operations(step.as_text())}


def compare(found, version, name):
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("JAXLM_UPDATE_GOLDEN"):
        stored.setdefault(version, {})[name] = found
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    if version not in stored:
        pytest.skip(f"no stored facts for JAX {version}; write them with JAXLM_UPDATE_GOLDEN=1")
    wanted = stored[version][name]
    exact = ("flops", "argument_bytes", "aliased_bytes")
    assert {key: found[key] for key in exact} == {key: wanted[key] for key in exact}
    for key in ("bytes_accessed", "temporary_bytes", "peak_bytes"):
        np.testing.assert_allclose(found[key], wanted[key], rtol=WITHIN, err_msg=key)
    here, there = found["operations"], wanted["operations"]
    assert here.keys() == there.keys()
    for kind in here:
        slack = WITHIN * there[kind] if kind in ("fusion", "copy", "convert", "transpose", "reduce") else 0
        assert abs(here[kind] - there[kind]) <= slack, f"{kind}: {here[kind]}, stored {there[kind]}"


# ---- What the stored facts say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_compiled_step_is_the_stored_one(name):
    compare(facts(*compiled(name)), VERSION, name)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_step_compiled_for_a_tpu_is_the_stored_one(monkeypatch):
    """The run's own program for a TPU that is not there, in bfloat16, its parameters cut up over 8 chips."""
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TPU).devices
    program = preset("llama_1b", "model.compute_dtype=bfloat16", mesh=(1, -1), devices=chips)
    assert program.mesh.shape["fsdp"] == len(chips) == 8
    with empty_compile_cache():  # nothing here could load what one keeps
        step = program.compile()[0]
    assert memory(step).aliased >= bytes_on_a_device(program.state)
    compare(facts(program, step), f"{jax.__version__} tpu {TPU} libtpu {importlib.metadata.version('libtpu')}", "llama_1b")


# ---- What a step asks for ---------------------------------------------------------------------------------------------------


VARIANTS = [(name,) for name in PRESETS] + [
    ("llama_1b", "kernels.attention=plain"), ("llama_1b", "seq_len=4096"), ("llama_1b", "kernels.loss=chunked"),
    ("llama_1b", "kernels.embedding_gradient=onehot"), ("llama_1b", "model.attention_softcap=50.0"),
    ("mixtral_8x7b", "kernels.grouped_matmul=ragged_dot"), ("mixtral_8x7b", "model.routing=capacity")]


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_a_bfloat16_model_multiplies_bfloat16(variant):
    """Its router alone is in float32, at the highest precision. (Muon's products are the optimizer's; angles of positions,
    softmax and norms are no products.)"""
    jaxpr = gradient_jaxpr(preset(*variant, "model.compute_dtype=bfloat16"), rows=1)
    assert "bfloat16" in types(jaxpr) and flops(jaxpr)
    assert not wide_products(jaxpr)


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_is_without_float64_and_never_waits_for_the_host(name):
    jaxpr = step_jaxpr(preset(name))
    assert types(jaxpr) <= {"float32", "int32", "uint32", "bool"} and not host_calls(jaxpr)


@pytest.mark.parametrize("name", ["gpt2_124m", "llama_1b"])
def test_flops_per_token_are_those_of_the_products(name):
    """`plain` attention multiplies whole squares, as the PaLM convention counts. The causal convention counts half of them: the
    triangle without half of its diagonal, which nothing can do in whole blocks; eight blocks a side leave (1 + 1/8)/2."""
    options = ("model.remat=none", "grad_accum_steps=1", "seq_len=1024")
    for backend, share in (("plain", 1), ("blockwise", (1 + 1 / 8) / 2)):
        program = preset(name, *options, f"kernels.attention={backend}")
        config = load(f"configs/{name}.py:debug", [f"--config.{o}" for o in options])
        causal, palm = flops_per_token(config, program.model.num_matmul_parameters)
        counted = flops(gradient_jaxpr(program)) / (config.batch_size * config.seq_len)
        attention = 2 * (palm - causal)
        assert attention > 0.5 * palm  # or this would not see it
        assert counted == pytest.approx(palm - (1 - share) * attention, rel=0.001)
        assert backend == "plain" or counted == pytest.approx(causal, rel=0.1)


# ---- The readers, on programs that have what they look for ------------------------------------------------------------------


def test_flops_are_counted_by_hand():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 8))
    products = lambda f, *args: flops(jax.make_jaxpr(f)(*args))
    one = 2 * 4 * 8 * 8
    looped = lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]
    assert products(looped, a, b) == 5 * one
    assert products(jax.grad(lambda a, b: looped(a, b).sum(), (0, 1)), a, b) == 15 * one
    assert products(jax.grad(lambda a: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ b) @ b)(a))), a) == 5 * one
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    assert products(cut, a, b) == one
    grouped = lambda a, kernels: jax.lax.ragged_dot(a, kernels, jnp.array([1, 3])).sum()
    assert products(jax.grad(grouped, (0, 1)), a, jnp.ones((2, 8, 8))) == 3 * one


def test_what_should_not_be_in_a_program_is_found():
    with jax.enable_x64(True):
        assert "float64" in types(jax.make_jaxpr(lambda x: x.astype("float64") + 1)(np.float32(1)))
    half, full = jnp.ones((8, 8), jnp.bfloat16), jnp.ones((8, 8))
    mixed = lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32)
    # The gradient of a product whose result is wider than its operands is one of float32.
    assert len(wide_products(jax.make_jaxpr(jax.grad(lambda a, b: mixed(a, b).sum(), (0, 1)))(half, half))) == 2
    assert wide_products(jax.make_jaxpr(mixed)(half, full)) and not wide_products(jax.make_jaxpr(mixed)(half, half))
    assert not wide_products(jax.make_jaxpr(lambda a: jnp.dot(a, a, precision="highest"))(full))

    def talks(x, _):
        jax.debug.print("{}", x)
        return jax.pure_callback(lambda x: x, x, x), None

    assert len(host_calls(jax.make_jaxpr(lambda x: jax.lax.scan(talks, x, length=2))(1.0))) == 2


def test_operations_are_read_from_the_text():
    text = """ENTRY %main {
  %a = f32[8,16]{1,0} parameter(0)
  %dot.1 = f32[8,16]{1,0:T(8,128)} dot(%a, %b), metadata={op_name="x = f32[2] copy(y)"}
  %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%dot
  ROOT %s.2 = f32[] custom-call(%w), custom_call_target="fusion"
}"""
    assert operations(text) == {"dot": 1, "custom-call": 1, "while": 1}


# ---- One copy of the state --------------------------------------------------------------------------------------------------


def bytes_on_a_device(state) -> int:
    return sum(np.prod(a.sharding.shard_shape(a.shape), dtype=int) * a.dtype.itemsize for a in jax.tree.leaves(state))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_the_whole_state_is_donated(mesh):
    program, step = compiled("gpt2_124m", mesh=mesh)
    assert memory(step).aliased >= bytes_on_a_device(program.state) > 100_000
    old = jax.jit(program.init, out_shardings=program.shardings)(0)
    batch = program.feed.put({name: np.zeros(a.shape, a.dtype) for name, a in program.inputs[1].items()})
    hyper = put_everywhere(program.hyper, replicated(program.mesh))
    new, _ = step(old, batch, hyper)
    assert all(a.is_deleted() for a in jax.tree.leaves(old))
    assert not any(a.is_deleted() for a in jax.tree.leaves((new, batch, hyper)))


# ---- The loop ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Six steps of a real run -> {"live": bytes alive after each step, "state": of one, "ahead": batches on the device that no
    step has taken, once the thread that makes them has come to rest, "events": ("step" | "read", number), in order}."""
    seen = {"live": [], "ahead": [], "events": []}
    finite, put, before = {}, [], {id(a) for a in jax.live_arrays()}
    compile_step, feed_put, device_get = Program.compile, loop.Feed.put, jax.device_get

    def watched_compile(program):
        step_fn, seconds = compile_step(program)
        seen["state"] = bytes_on_a_device(program.state)

        def step(*args):
            state, metrics = step_fn(*args)
            finite[id(metrics["finite"])] = number = len(finite) + 1
            kept.append(metrics["finite"])  # or its id might come again
            seen["events"].append(("step", number))
            return state, metrics

        return step, seconds

    def watched_put(feed, batch):
        arrays = feed_put(feed, batch)
        assert all(isinstance(a, jax.Array) and a.sharding == feed.sharding for a in arrays.values())
        put.append(len(arrays))
        return arrays

    def watched_get(tree):
        if isinstance(tree, dict) and "finite" in tree:
            seen["events"].append(("read", finite[id(tree["finite"])]))
        return device_get(tree)

    def alive(doing="", allowance=1):
        if doing or not finite:
            return
        resting, deadline = -1, time.time() + 10
        while (resting != len(put) or len(put) < len(finite) + PREFETCH) and time.time() < deadline:
            resting = len(put)
            time.sleep(0.3)
        seen["ahead"].append(len(put) - len(finite))
        # By buffer: an array and its shard, as a save leaves them, are two objects over one.
        seen["live"].append(sum({a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays() if id(a) not in before}.values()))

    kept, config = [], load("configs/gpt2_124m.py:debug", [f"--config.{o}" for o in (
        "steps=6", f"data.prefetch={PREFETCH}", "mesh.data=1", "checkpoint.every_steps=0", "eval.every_steps=0",
        "observe.report=False", "observe.progress=none")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", watched_compile)
        patch.setattr(loop.Feed, "put", watched_put)
        patch.setattr(jax, "device_get", watched_get)
        train(config, str(tmp_path_factory.mktemp("run")), alive=alive)
    return seen


PREFETCH = 2


def test_the_loop_holds_one_state(watched):
    """Beside it are batches and metrics alone, of less than a tenth of its size."""
    assert len(watched["live"]) == 6 and watched["state"] > 1_000_000
    assert all(watched["state"] <= live < 1.1 * watched["state"] for live in watched["live"]), watched


def test_batches_wait_on_the_device_ahead_of_the_step(watched):
    """As many as data.prefetch says, and the one with which the thread waits for room."""
    assert watched["ahead"] == [PREFETCH + 1] * 6


def test_metrics_are_read_one_step_late(watched):
    """At the last step, which is evaluated and saved, both its own and those before."""
    late = [event for n in range(2, 7) for event in (("step", n), ("read", n - 1))]
    assert watched["events"] == [("step", 1), *late, ("read", 6)]
