"""The table by hardware, what the user adds, and what this compiler does not know."""

import json
from types import SimpleNamespace

import jax
import pytest
from test_transformer import tiny

from jaxlm import cli
from jaxlm.errors import UserError
from jaxlm.parallel.compiler_options import compiler_options, parse_options

H200, V6E = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200"), SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.fixture(autouse=True)
def compiler_of_this_machine(monkeypatch):
    """Knows all of XLA's own options, those of GPUs too."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr("jaxlm.parallel.compiler_options.SingleDeviceSharding", lambda device: here)


def options(device, devices=1, given="", deterministic=False, **model):
    config = tiny(**model)
    config.kernels.compiler_options, config.observe.deterministic = given, deterministic
    return compiler_options(config, device, devices)


def test_hardware_decides():
    assert options(CPU, 8) == options(H200) == {}
    assert options(H200, 8)["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert "xla_gpu_enable_while_loop_double_buffering" not in options(H200, 8)
    assert "xla_gpu_enable_while_loop_double_buffering" in options(H200, 8, scan_layers=True)
    assert options(H200, deterministic=True) == {"xla_gpu_exclude_nondeterministic_ops": True}
    assert options(CPU, deterministic=True) == {}


def test_the_user_adds_and_takes_away():
    assert options(CPU, given="xla_cpu_enable_fast_math=false, xla_gpu_graph_min_graph_size=3") == {
        "xla_cpu_enable_fast_math": False, "xla_gpu_graph_min_graph_size": 3}
    assert options(H200, deterministic=True, given="xla_gpu_exclude_nondeterministic_ops=") == {}
    assert parse_options("xla_a=x,xla_b=-1") == {"xla_a": "x", "xla_b": -1}


def test_an_unknown_option_is_left_out_with_a_warning(capsys):
    assert options(V6E, given="xla_gpu_graph_level=3") == {}  # this compiler is not a TPU's either
    said = capsys.readouterr().err
    assert "no option xla_tpu_scoped_vmem_limit_kib" in said and "no option xla_gpu_graph_level" in said


@pytest.mark.parametrize("given, words", [("fast", "xla_name=value"), ("jax_a=1", "xla_name=value"),
                                          ("xla_cpu_enable_fast_math=maybe", "not a valid bool")])
def test_a_bad_option_is_one_line(given, words):
    with pytest.raises(UserError, match=words):
        options(CPU, given=given)


def test_the_run_is_compiled_with_them_and_says_so(tmp_path, capsys):
    arguments = ["train", "--config=configs/gpt2_124m.py:debug", "--config.steps=1", "--config.grad_accum_steps=1",
                 "--config.schedule.warmup_steps=0",
                 "--config.observe.deterministic=True", f"--workdir={tmp_path}", "--config.observe.report=False",
                 "--config.kernels.compiler_options=xla_cpu_enable_fast_math=false"]
    assert cli.main(arguments) in (0, None)
    assert json.loads((tmp_path / "config.json").read_text())["compiler_options"] == {"xla_cpu_enable_fast_math": False}
    assert "compiler options: xla_cpu_enable_fast_math=False" in capsys.readouterr().out
