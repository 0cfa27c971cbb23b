"""jaxlm's own arm of benchmarks/compare.py, without PyTorch; `test_torch_models.py` sets the models side by side."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_the_arm_of_jaxlm_answers(tmp_path):
    questions = [{"do": "build"}, {"do": "train", "steps": 2, "timed": False}, {"do": "train", "steps": 1, "timed": True}]
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "arms.py", "jaxlm", "shakespeare", "1", tmp_path], text=True,
                         input="".join(json.dumps(question) + "\n" for question in questions), capture_output=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    facts, first, timed = (json.loads(line) for line in run.stdout.splitlines())
    assert "error" not in first and "error" not in timed, run.stderr
    assert facts["flops_per_token_palm"] > facts["flops_per_token"] > 6 * facts["parameters"] and facts["peak_flops"] is None
    assert (tmp_path / "parameters.npz").exists()  # what the other arms start from
    assert first["losses"][1] < first["losses"][0] < 5 and timed["seconds"] > 0
