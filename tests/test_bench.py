"""`jaxlm bench`: its figures agree with one another, it times the run's own program, and two results compare honestly."""

import gzip
import json

import jax
import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.config import fingerprint, load
from jaxlm.errors import Diverged, UserError
from jaxlm.observe import scores
from jaxlm.observe.throughput import flops_per_token
from jaxlm.observe.trace import costly_operations
from jaxlm.train.bench import bench
from jaxlm.train.step import build_program

pytestmark = pytest.mark.xdist_group("bench")  # one worker, so that `measured` is made once
PRESET = "configs/llama3_8b.py:debug"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """-> (config, result, directory of the trace), on two devices."""
    config = load(PRESET, ["--config.mesh.data=2", "--config.mesh.fsdp=1"])
    folder = str(tmp_path_factory.mktemp("trace"))
    kept = jax.config.jax_compilation_cache_dir
    result = bench(config, warmup=1, blocks=3, block_steps=2, profile=folder)
    assert jax.config.jax_compilation_cache_dir == kept
    return config, result, folder


def test_the_figures_are_positive_and_agree(measured):
    config, r, _ = measured
    seconds = r["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    np.testing.assert_allclose(r["tokens_per_second"] * seconds["median"], config.batch_size * config.seq_len)
    assert r["mfu"] is None and r["mfu_palm"] is None  # a CPU's peak is never guessed
    assert r["device"] == "2 x cpu, data=2" and r["config_fingerprint"] == fingerprint(config)
    assert min(r["matmul_ceiling_tflops"], r["peak_memory_bytes"], r["compile_seconds_warm"]) > 0
    assert r["compile_seconds_warm"] < r["compile_seconds"]
    causal, _ = flops_per_token(config, build_program(config, 257).model.num_matmul_parameters)
    np.testing.assert_allclose(r["share_of_ceiling"] * 2 * r["matmul_ceiling_tflops"] * 1e12, r["tokens_per_second"] * causal)
    assert abs(r["loss"] - np.log(257)) < 0.5  # random tokens cannot be learned in seven steps


def test_attention_is_counted_by_layer_and_in_both_conventions():
    """T = 32: each layer's attention is 6 (or 12) * 4 heads * 16 * 32 FLOPs per token; a window shortens it."""
    config = load(PRESET)
    assert flops_per_token(config, 1000) == (6000 + 2 * 6 * 4 * 16 * 32, 6000 + 2 * 12 * 4 * 16 * 32)
    local = load(PRESET, ["--config.model.window=8", "--config.model.window_pattern=LG"])
    assert flops_per_token(local, 1000)[0] == 6000 + 6 * 4 * 16 * (8 + 32)


def test_the_table_and_the_trace_are_read(measured):
    _, r, folder = measured
    text = scores.table(r)
    assert f"{r['tokens_per_second']:,.0f}" in text and "compile, warm cache (s)" in text and "n/a" in text
    costly = costly_operations(folder)
    assert len(costly) == 10 and [c[1] for c in costly] == sorted((c[1] for c in costly), reverse=True)
    assert 0 < sum(share for _, _, share in costly) <= 1
    assert costly[0][0] in scores.operations(folder)


def test_time_of_an_operation_is_its_own(tmp_path):
    """A loop of 10 us holds two products of 3 us; a product of 1 us runs elsewhere; Python's own events do not count."""
    def event(name, ts, dur, tid=1, **args):
        return {"ph": "X", "pid": 1, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}

    events = [event("while", 0, 10, hlo_op="while"), event("dot", 1, 3, hlo_op="dot"), event("dot", 5, 3, hlo_op="dot"),
              event("dot", 2, 1, 2, hlo_op="dot"), event("python", 0, 99)]
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    assert costly_operations(str(tmp_path)) == []
    with gzip.open(folder / "host.trace.json.gz", "wt") as out:
        json.dump({"traceEvents": events}, out)
    assert costly_operations(str(tmp_path)) == [("dot", 0.007, 7 / 11), ("while", 0.004, 4 / 11)]
    # On a GPU: the kernels of its streams alone.
    events += [{"ph": "M", "pid": 7, "name": "process_name", "args": {"name": "/device:GPU:0"}},
               {"ph": "M", "pid": 7, "tid": 3, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
               {"ph": "M", "pid": 7, "tid": 4, "name": "thread_name", "args": {"name": "Steps"}},
               {"ph": "X", "pid": 7, "tid": 3, "ts": 0, "dur": 4, "name": "gemm_kernel", "args": {"hlo_op": "gemm.1"}},
               {"ph": "X", "pid": 7, "tid": 3, "ts": 4, "dur": 1, "name": "memcpy"},
               {"ph": "X", "pid": 7, "tid": 4, "ts": 0, "dur": 9, "name": "step 1"}]
    with gzip.open(folder / "host.trace.json.gz", "wt") as out:
        json.dump({"traceEvents": events}, out)
    assert costly_operations(str(tmp_path)) == [("gemm.1", 0.004, 0.8), ("memcpy", 0.001, 0.2)]


def test_two_results_compare(measured, tmp_path, capsys):
    a = {key: measured[1][key] for key in scores.KEYS}
    b = a | {"tokens_per_second": 1.25 * a["tokens_per_second"], "mfu": 0.5}
    for name, result in (("a", a), ("b", b), ("c", b | {"device": "1 x NVIDIA H200", "config_fingerprint": "0" * 16})):
        (tmp_path / name).write_text(json.dumps(result))
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    rows = {line.rsplit(None, 3)[0].strip(): line.split()[-3:] for line in text.splitlines()}
    assert rows["tokens/s"][2] == "1.250" and rows["step, median (ms)"][2] == "1.000", text
    assert rows["MFU (%)"] == ["n/a", "50.0", "n/a"] and "WARNING" not in text
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    assert "device: 2 x cpu, data=2 -> 1 x NVIDIA H200  WARNING: the machines differ" in text
    assert f"{'0' * 16}  WARNING: the experiments differ" in text


@pytest.mark.parametrize("args, message", [
    ([], "give --config=FILE to measure, or --compare"),
    (["--config=configs/none.py"], "no such file"),
    ([f"--config={PRESET}", "--blocks=-1"], "--blocks=-1: must be at least 1"),
    ([f"--config={PRESET}", "--config.optimizer.bs=3"], "unknown key"),
    (["--compare", "none.json", "none.json"], "none.json: cannot be read"),
    (["--compare", "README.md", "README.md"], "README.md: is not JSON"),
    (["--compare", "tests/golden/meshes.json", "tests/golden/meshes.json"], "it lacks tokens_per_second"),
])
def test_bad_input_is_one_line_and_exit_2(args, message, capsys):
    assert main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_key_that_the_program_does_not_read_is_refused():
    overrides = ["--config.optimizer.momentum=0.5"]
    with pytest.raises(UserError, match="optimizer.momentum=0.5: is set, but nothing in this run reads it"):
        bench(load(PRESET, overrides), overrides=overrides)


def test_the_speed_of_steps_that_are_not_finite_is_none():
    config = load(PRESET, ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.model.num_layers=1",
                           "--config.optimizer.name=sgd", "--config.optimizer.groups=(('.*', 1.0, 0.0),)",
                           "--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0",
                           "--config.observe.compile_cache=False", "--config.schedule.warmup_steps=0"])
    with pytest.raises(Diverged, match="at step 4 of the benchmark"):
        bench(config, warmup=1, blocks=1, block_steps=3)
