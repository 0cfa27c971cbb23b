import json
import sys
import types

import pytest

from configs import default
from jaxlm.errors import UserError
from jaxlm.observe.writers import build_writers


def test_weights_and_biases_gets_every_line(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    init = lambda **kw: calls.append(kw) or run
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = default.get_config()
    config.observe.wandb = "my-project"
    writers = build_writers(config, str(tmp_path))
    writers.write({"split": "train", "step": 3, "loss": 2.5, "mfu": None})
    writers.write({"split": "valid/all", "step": 3, "loss": float("nan")})
    writers.text(3, "To ", "be")
    writers.close()
    assert calls[0] == {"project": "my-project", "dir": str(tmp_path), "resume": "allow"}
    assert calls[1] == (3, {"train/loss": 2.5}) and list(calls[2][1]) == ["valid/all/loss"]
    assert calls[3:] == [(3, {"sample": "To be"}), "finish"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.5, None]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = default.get_config()
    config.observe.wandb = "my-project"
    with pytest.raises(UserError, match="pip install"):
        build_writers(config, str(tmp_path))
