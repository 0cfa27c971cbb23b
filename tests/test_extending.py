"""The out-of-tree parts that docs/extending.md shows: short, and they train."""

import json
import pathlib
import re

import numpy as np
import pytest

from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.config import load
from jaxlm.data.loader import build_data
from jaxlm.train.loop import train
from jaxlm.train.step import build_program

PAGE = pathlib.Path("docs/extending.md").read_text()
FILES = dict(re.findall(r"`(my_\w+)\.py`\n```python\n(.*?)```", PAGE, re.DOTALL))
TINY = ["steps=1", "batch_size=2", "seq_len=8", "mesh.data=1", "model.num_layers=1", "model.embed_dim=16", "model.num_heads=2",
        "data.source=synthetic", "data.tokenizer=byte", "model.vocab_size=32", "schedule.name=constant",
        "schedule.warmup_steps=0", "observe.log_every=1", "observe.progress=none", "observe.report=False", "eval.every_steps=0"]


def test_the_page_has_three_short_files():
    assert set(FILES) == {"my_norm", "my_optimizer", "my_objective"}
    assert all(text.count("\n") <= 25 for text in FILES.values())
    assert "docs/extending.md" in pathlib.Path("README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_step_is_trained_with_each(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(FILES[name])
    monkeypatch.syspath_prepend(tmp_path)
    key = {"my_norm": "model.norm=dyt", "my_optimizer": "optimizer.name=signum", "my_objective": "objective.name=focal"}[name]
    assert f"`--config.{key}`" in PAGE
    overrides = [f"--config.{o}" for o in (f"imports=('{name}',)", key, "optimizer.weight_decay=0.0", *TINY)]
    config = load("configs/default.py", overrides)
    summary = train(config, str(tmp_path / "run"), overrides=overrides)
    assert summary["status"] == "completed" and summary["steps"] == 1
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
    program = build_program(config, build_data(config).vocab_size)
    _, state, _ = Checkpoints(str(tmp_path / "run/checkpoints"), 1, 0, False, create=False).restore(program.state)
    scale = np.asarray(state["params"]["layers"]["norm1"]["scale"])
    moved = np.abs(scale - 1).max()  # from where it began
    assert moved > 0
    if name == "my_norm":
        assert state["params"]["layers"]["norm1"]["input_scale"].shape == (1,)
    if name == "my_optimizer":  # each number that has a gradient moves by the learning rate
        assert moved == pytest.approx(config.optimizer.learning_rate, rel=1e-3)
    if name == "my_objective":  # the loss that is told is the plain one
        assert abs(line["loss"] - np.log(32)) < 0.1
