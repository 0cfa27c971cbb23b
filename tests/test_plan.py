"""`jaxlm plan`: the estimate against the compiler's stored answers, the compiler's answers read rightly, and the verb."""

import json
import pathlib

import jax
import pytest
from plan_cases import CASES

from jaxlm.config import load
from jaxlm.plan.devices import find
from jaxlm.plan.estimate import sizes_of, work
from jaxlm.plan.facts import flops
from jaxlm.plan.plan import plan
from jaxlm.train.program import build_program

GOLDEN = pathlib.Path(__file__).parent / "golden" / "plans.json"


def config_of(name, *overrides):
    file, _, given = CASES[name]
    return load(file, [f"--config.{o}" for o in (*given, *overrides)])


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_what_the_compiler_says(name, monkeypatch):
    """Memory within 10 %, FLOPs within 2 % (of real configs on TPUs, which libtpu compiled)."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if there were no libtpu
    config, stored = config_of(name), json.loads(GOLDEN.read_text())["plans"][name]
    found = plan(config, find(CASES[name][1]), sizes_of(config, config.model.vocab_size)).estimate
    assert found.peak == pytest.approx(stored["peak_bytes"], rel=0.10)
    assert found.flops == pytest.approx(stored["flops"], rel=0.02)


@pytest.mark.parametrize("remat", ["none", "minimal", "save_dots", "save_attention", "full"])
@pytest.mark.parametrize("name", ["1B v5e-16", "124M v5e-8"])
def test_flops_are_those_of_the_traced_step(name, remat):
    """On one device, with attention that computes whole squares: at most 2 % apart."""
    config = config_of(name, f"model.remat={remat}", "mesh.data=1", "mesh.fsdp=1", "kernels.attention=plain", "batch_size=4")
    counted = flops(build_program(config, config.model.vocab_size, jax.devices()[:1]).jaxpr())
    assert work(config, sizes_of(config, config.model.vocab_size), whole_squares=True)[0] == pytest.approx(counted, rel=0.02)
