"""The ablations that ship: each loads, its arms are valid and differ, and it says what was found, or that it has not been run."""

import ast
import pathlib

import pytest

from jaxlm.config import load
from jaxlm.kernels.attention import choose_backend
from jaxlm.research.sweep import plan
from jaxlm.train.state import build_model

ROOT = pathlib.Path(__file__).parents[1]
FOLDER, RESULTS = ROOT / "configs/ablations", ROOT / "benchmarks/results/ablations"
FILES = sorted(p for p in FOLDER.glob("*.py") if "def sweep(" in p.read_text())
LIBRARY = [p for p in FILES if p.stem not in ("demo", "scaling_wikitext2")]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_arms_are_valid_and_distinct(file, tmp_path):
    sweep = plan(str(file), [], str(tmp_path))
    assert len(sweep.arms) > 2 and len({run.fingerprint for run in sweep.runs}) == len(sweep.runs)
    load(f"{file}:debug")


@pytest.mark.parametrize("file", LIBRARY, ids=lambda p: p.stem)
def test_it_says_what_was_found(file):
    says = ast.get_docstring(ast.parse(file.read_text()))
    assert f"--config=configs/ablations/{file.name}" in says and "Found" in says
    assert ("not run yet" in says) == (not (RESULTS / f"{file.stem}.json").exists())
    assert f"`{file.name}`" in (ROOT / "docs/research.md").read_text()


@pytest.mark.parametrize("name, most", [("feedforwards", 0.0), ("attention", 0.004), ("norms", 0.006)])
def test_arms_have_the_parameters_that_it_says(name, most, tmp_path):
    counts = []
    for run in plan(str(FOLDER / f"{name}.py"), [], str(tmp_path), seeds=1).runs:
        counts.append(build_model(run.config, 65, choose_backend(run.config, "cpu")[0]).num_parameters)
    assert max(abs(count - counts[0]) for count in counts) <= most * counts[0]
