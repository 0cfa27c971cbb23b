"""benchmarks/compare.py: the search for a micro-batch, and its arms; `test_torch_models.py` sets the models side by side."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from test_torch_models import make_config

pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parent.parent


def test_the_arm_of_jaxlm_answers(tmp_path):
    questions = [{"do": "build"}, {"do": "train", "steps": 2, "timed": False}, {"do": "train", "steps": 1, "timed": True}]
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "arms.py", "jaxlm", "shakespeare", "2", "1", tmp_path], text=True,
                         input="".join(json.dumps(question) + "\n" for question in questions), capture_output=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "JAXLM_CACHE": str(tmp_path)})
    facts, first, timed = (json.loads(line) for line in run.stdout.splitlines())
    assert "error" not in first and "error" not in timed, run.stderr
    assert facts["flops_per_token_palm"] > facts["flops_per_token"] > 6 * facts["parameters"] and facts["peak_flops"] is None
    assert (tmp_path / "parameters.npz").exists()  # what the other arms start from
    assert any((tmp_path / "xla").iterdir())  # what a second process finds warm
    assert first["losses"][1] < first["losses"][0] < 5 and timed["seconds"] > 0


@pytest.mark.parametrize("name", ["torch_eager", "hf_trainer"])
@pytest.mark.parametrize("family, accum", [("llama", 1), ("gpt2", 2)])
def test_an_arm_trains_as_jaxlm_by_micro_batches(name, family, accum, tmp_path, monkeypatch):
    """Asked twice, as compare.py does: the steps of the second request go on where the first ended."""
    torch = pytest.importorskip("torch")
    if name == "hf_trainer":
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    from arms import JaxlmArm, kind_of

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # what is compared is the loop, not the compiler
    config = make_config(family, tie=family == "gpt2")
    whole = JaxlmArm("jaxlm", config, tmp_path)  # `make_config` has one micro-batch
    want = [(float(loss), float(norm)) for loss, norm in whole.train(5)]
    config.grad_accum_steps = accum
    arm = kind_of(name)(name, config, tmp_path)
    got = [(float(loss), float(norm)) for loss, norm in arm.train(2) + arm.train(3)]
    np.testing.assert_allclose(got, want, rtol=3e-4)
    assert abs(want[0][0] - want[-1][0]) > 0.01, "nothing was learnt: a step that is lost would not show"


OUT_OF_MEMORY = "out of memory"


@pytest.mark.parametrize("outcome, best, tried", [
    ({8: 100.0, 4: 120.0, 2: 110.0, 1: 500.0}, 4, {8: 100.0, 4: 120.0, 2: 110.0}),  # until one is slower
    ({8: 100.0, 4: 90.0}, 8, {8: 100.0, 4: 90.0}),
    ({8: OUT_OF_MEMORY, 4: OUT_OF_MEMORY, 2: 80.0, 1: 70.0}, 2, {8: OUT_OF_MEMORY, 4: OUT_OF_MEMORY, 2: 80.0, 1: 70.0}),
    ({8: 100.0, 4: "parity"}, 8, {8: 100.0, 4: "parity"}),
    ({8: "parity", 4: 100.0}, None, {8: "parity"}),
    ({8: OUT_OF_MEMORY}, None, {8: OUT_OF_MEMORY}),
])
def test_the_search_keeps_the_fastest_micro_batch(outcome, best, tried):
    from compare import Search
    from worker import ArmFailed

    def measure(micro):
        what = outcome[micro]
        if what == OUT_OF_MEMORY:
            raise ArmFailed("RESOURCE_EXHAUSTED", out_of_memory=True)
        return ({"failed": what}, 1e9) if isinstance(what, str) else ({"found_at": micro}, what)

    search = Search(outcome)
    while search.left:
        search.turn(measure)
    result = search.result()
    assert result["trials"] == tried
    if best is None:
        assert result["failed"] == list(tried.values())[-1]
    else:
        assert (result["micro_batch"], result["found_at"]) == (best, best) and "failed" not in result


def test_the_scoreboard_reads_results_with_and_without_a_search(tmp_path):
    from scoreboard import RESULTS, scoreboard

    old = json.loads((RESULTS / "2026-11-24-compare-cpu-shakespeare-8x256.json").read_text())
    (tmp_path / "2026-11-24-compare-old.json").write_text(json.dumps(old))
    new = {**old, "name": "new"}
    arm = new["sizes"]["8x256"]["arms"]["jaxlm"]
    arm |= {"micro_batch": 4, "first_step_seconds_warm": 1.25, "trials": {"8": 2000.0, "4": 2100.0, "2": "out of memory"}}
    (tmp_path / "2026-11-25-compare-new.json").write_text(json.dumps(new))
    before, _, after = scoreboard(tmp_path).partition("2026-11-25-compare-new.json")
    row = lambda text, arm: next(line for line in text.splitlines() if line.startswith(f"| 8x256 | {arm} |"))
    assert "| jaxlm | 8 |" in row(before, "jaxlm") and row(before, "jaxlm").endswith("| n/a |")
    assert "| jaxlm | 4 |" in row(after, "jaxlm") and row(after, "jaxlm").endswith("| 1.2 s |")
    assert "8: 2,000, 4: 2,100, 2: out of memory" in after
    assert len({line.count("|") for line in before.splitlines() if line.startswith("|")}) == 1
