import json
import pathlib

import pytest

from configs import default
from jaxlm.config import Tracked, apply_overrides, diff, fingerprint, flatten, load, resolve, steps_of
from jaxlm.errors import UserError
from jaxlm.validation import BELOW_1, SIGNED, validate

PRESETS = sorted(str(p) for p in pathlib.Path("configs").glob("*.py") if p.stem not in ("__init__", "default"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_has_debug(preset):
    load(preset)
    debug = load(preset + ":debug")
    assert (debug.model.num_layers, debug.steps, debug.data.source) == (2, 10, "synthetic")


def problems(*overrides, config="configs/shakespeare.py"):
    with pytest.raises(UserError) as error:
        load(config, [f"--config.{o}" for o in overrides])
    return error.value.problems


def test_all_problems_at_once_with_suggestions():
    found = problems("optimizer.learning_rat=1", "model.nlayers=3", "steps=abc")
    assert len(found) == 3
    assert "did you mean optimizer.learning_rate?" in found[0] and "wrong type" in found[2]
    found = problems("batch_size=30", "grad_accum_steps=4", "model.block=seril", "model.dropout=1.5")
    assert any("batch_size=30 is not divisible" in p for p in found) and any("serial" in p for p in found)
    assert len(found) == 3
    assert "make it shorter than the run" in problems("steps=10", "schedule.warmup_steps=10")[0]
    assert "no such file; did you mean configs/shakespeare.py" in problems(config="configs/shakespear.py")[0]


def test_numbers_out_of_their_range_are_named():
    """All that may not be negative, at once; then those that must be below 1."""
    flat = flatten(default.get_config()).items()
    numbers = [key for key, value in flat if type(value) in (int, float) and key not in SIGNED and "every_steps" not in key]
    for keys, wrong in ((numbers, -3), (BELOW_1, 1)):
        with pytest.raises(UserError) as error:
            load("configs/default.py", [f"--config.{key}={wrong}" for key in keys])
        told = "\n".join(error.value.problems)
        assert len(keys) > 5 and not [key for key in keys if f"{key}={wrong}" not in told]


def test_values_are_parsed_by_the_type_of_the_default():
    c = default.get_config()
    c.lock()
    apply_overrides(c, ["--config.steps=1e3", "--config.optimizer.learning_rate=1", "--config.data.path=7",
                        "--config.data.shuffle=False", "--config.schedule.warmup_steps=5%"])
    assert (c.steps, c.optimizer.learning_rate, c.data.path, c.data.shuffle) == (1000, 1.0, "7", False)
    assert steps_of(c.schedule.warmup_steps, c, "k") == 50
    assert steps_of("1M tokens", c, "k") == round(1e6 / (32 * 256)) and steps_of(7, c, "k") == 7
    with pytest.raises(UserError, match="5 apples"):
        steps_of("5 apples", c, "k")


def test_unread_keys_that_were_set_are_named():
    c = default.get_config()
    c.optimizer.momentum = 0.5
    tracked = Tracked(c)
    assert any("optimizer.momentum" in line for line in tracked.unread(default.get_config()))
    assert tracked.optimizer.momentum == 0.5
    assert tracked.unread(default.get_config()) == []


def test_a_choice_on_the_command_line_excuses_the_presets_keys_for_the_other_part():
    def unread(*overrides):
        overrides = [f"--config.{o}" for o in overrides]
        tracked = Tracked(load("configs/shakespeare.py", overrides))
        tracked.reads.update(set(flatten(tracked._config)) - {"optimizer.muon_steps", "optimizer.b2"})
        return [line.partition("=")[0] for line in tracked.unread(default.get_config(), overrides)]

    assert unread() == ["optimizer.muon_steps"]
    assert unread("optimizer.name=sgd") == []
    assert unread("optimizer.name=sgd", "optimizer.b2=0.5") == ["optimizer.b2"]
    assert unread("schedule.name=cosine", "optimizer.learning_rate=0.1") == ["optimizer.muon_steps"]


def test_mesh_auto_is_short_for_its_key_and_excuses_the_mesh_of_the_file():
    config = load("configs/llama_1b.py", ["--config.mesh=auto"])
    tracked = Tracked(config)
    assert tracked.mesh.auto
    of_mesh = lambda overrides: [p for p in tracked.unread(default.get_config(), overrides) if p.startswith("mesh")]
    assert of_mesh(["--config.mesh=auto"]) == []
    assert [p.partition("=")[0] for p in of_mesh(["--config.mesh=auto", "--config.mesh.fsdp=-1"])] == ["mesh.fsdp"]


def test_identity_leaves_out_paths_and_logging():
    a, b = default.get_config(), default.get_config()
    b.observe.log_every, b.checkpoint.keep = 3, 9
    assert fingerprint(a) == fingerprint(b) and diff(a, b) == []
    b.seed = 1
    assert fingerprint(a) != fingerprint(b) and diff(a, b) == ["seed: 0 -> 1"]


def test_a_key_newer_than_the_run_counts_as_its_default():
    old, new = json.loads(default.get_config().to_json()), default.get_config()
    del old["model"]["window"]
    assert diff(old, new) == []
    new.model.window = 8
    assert diff(old, new) == ["model.window: 0 -> 8"]


def test_default_config_is_valid_and_every_key_has_a_reader():
    c = default.get_config()
    resolve(c)
    validate(c)
    source = "".join(p.read_text() for p in pathlib.Path("jaxlm").rglob("*.py"))
    unread = [key for key in flatten(c) if f".{key.rsplit('.', 1)[-1]}" not in source and not key.startswith("mesh.")]
    assert unread == []


def test_no_get_on_configs():
    for file in pathlib.Path("jaxlm").rglob("*.py"):
        assert "config.get(" not in file.read_text(), file
