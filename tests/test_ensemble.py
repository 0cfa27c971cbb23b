"""Members of an ensemble are the runs they stand for."""

import itertools
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.errors import Diverged, Preempted, UserError
from jaxlm.research import ensemble
from jaxlm.research.ensemble import train_ensemble
from jaxlm.research.members import Members
from jaxlm.train.loop import train
from jaxlm.validation import validate


def make(tmp_path, steps=6, **values):
    """A tiny run on Tiny Shakespeare. values: config keys, dots written as two underscores."""
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = steps, 4, 16
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 2, 32, 2
    c.data.store_dir = str(tmp_path / "stores")
    c.optimizer.learning_rate = 3e-3
    c.eval.batches, c.eval.every_steps, c.checkpoint.every_steps = 2, 3, 3
    c.observe.log_every, c.observe.progress, c.observe.report, c.mesh.data = 1, "none", False, -1
    for key, value in values.items():
        *groups, leaf = key.split("__")
        node = c
        for group in groups:
            node = node[group]
        node[leaf] = value
    resolve(c)
    validate(c)
    return c


def curve(workdir, split="train"):
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if line["split"] == split])


def serial(config, workdir):
    config = config.copy_and_resolve_references()
    config.mesh.data = 1
    train(config, str(workdir))
    return workdir


def folders(tmp_path, count, name="member"):
    return [str(tmp_path / f"{name}{i}") for i in range(count)]


MIXED = [dict(seed=1, optimizer__learning_rate=1e-3, optimizer__b1=0.8, model__dropout=0.1, model__init_std=0.02),
         dict(seed=2, optimizer__weight_decay=0.0, optimizer__b2=0.99, model__dropout=0.2, model__init_std=0.05),
         dict(seed=1, optimizer__clip_norm=0.5, optimizer__eps=1e-6, objective__z_loss=1e-3, schedule__final_fraction=0.5),
         dict(seed=3, objective__label_smoothing=0.1, model__dropout=0.3)]


@pytest.mark.parametrize("execution, devices", [("together", 1), ("together", 4), ("in_turn", 1)])
def test_members_are_their_serial_runs(tmp_path, execution, devices):
    """Whatever number differs: training and validation curves, and the state that is saved."""
    chosen = MIXED if execution == "together" else MIXED[1:3]
    configs, workdirs = [make(tmp_path, **values) for values in chosen], folders(tmp_path, len(chosen))
    train_ensemble(configs, workdirs, execution=execution, devices=jax.devices()[:devices])
    for m, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
        if devices == 4 and m != 1:  # one is enough to see the mesh
            continue
        alone = serial(config, tmp_path / f"alone{m}")
        for split in ("train", "valid/all"):
            np.testing.assert_allclose(curve(workdir, split), curve(alone, split), atol=1e-4, err_msg=f"{m} {split}")
    curves = [curve(workdir) for workdir in workdirs]
    assert all(abs(a - b).max() > 1e-3 for a, b in itertools.combinations(curves, 2))  # or all of this would show nothing


def test_in_turn_a_member_is_bitwise_its_serial_run(tmp_path):
    configs = [make(tmp_path, seed=seed, optimizer__learning_rate=lr) for seed, lr in ((0, 1e-3), (5, 3e-3))]
    workdirs = folders(tmp_path, 2)
    train_ensemble(configs, workdirs, execution="in_turn", devices=jax.devices()[:1])
    alone = serial(configs[1], tmp_path / "alone")
    np.testing.assert_array_equal(curve(workdirs[1]), curve(alone))
    assert saved(workdirs[1]) == saved(alone)


def saved(workdir, step=6):
    """{leaf: fingerprint} of a checkpoint."""
    meta = json.loads((pathlib.Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {name: leaf["fingerprint"] for name, leaf in meta["leaves"].items()}


@pytest.mark.slow
def test_over_200_steps_a_member_stays_with_its_serial_run(tmp_path):
    configs = [make(tmp_path, steps=200, seed=seed, optimizer__learning_rate=lr, eval__every_steps=0, checkpoint__every_steps=0)
               for seed, lr in ((0, 1e-3), (1, 1e-3), (0, 3e-3))]
    workdirs = folders(tmp_path, 3)
    train_ensemble(configs, workdirs, execution="together", devices=jax.devices()[:1])
    gaps = [abs(curve(workdir) - curve(serial(config, tmp_path / f"alone{m}"))).max()
            for m, (config, workdir) in enumerate(zip(configs, workdirs, strict=True))]
    print("largest gaps", gaps)
    assert max(gaps) < 1e-4


# ---- Goes on, stops, is dropped ------------------------------------------------------------------------------------------------


def test_a_stopped_ensemble_goes_on_bitwise_and_a_member_as_its_own_run(tmp_path, monkeypatch):
    """Also where only some members had saved when it was killed."""
    configs, whole = [make(tmp_path, seed=seed) for seed in (0, 1)], folders(tmp_path, 2, "whole")
    train_ensemble(configs, whole, execution="together", devices=jax.devices()[:1])
    parts = folders(tmp_path, 2, "part")
    with monkeypatch.context() as patch:
        patch.setattr(ensemble.StopSignal, "after", lambda self, step: step == 4)
        with pytest.raises(Preempted):
            train_ensemble(configs, parts, execution="together", devices=jax.devices()[:1])
    assert json.loads(pathlib.Path(parts[0], "summary.json").read_text())["status"] == "preempted"
    alone = tmp_path / "alone"
    shutil.copytree(parts[1], alone)
    shutil.rmtree(tmp_path / "part1" / "checkpoints" / "4")
    summaries = train_ensemble(configs, parts, execution="together", devices=jax.devices()[:1])
    assert [s["status"] for s in summaries] == ["completed"] * 2 and summaries[0]["steps"] == 6
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(curve(a), curve(b))
        assert saved(a) == saved(b)
    serial(configs[1], alone)  # the directory of a member, by `jaxlm train`
    np.testing.assert_allclose(curve(alone), curve(whole[1]), atol=1e-4)
    again = train_ensemble(configs, parts, execution="together", devices=jax.devices()[:1])
    assert again == summaries  # nothing left to do


@pytest.mark.parametrize("execution", ["together", "in_turn"])
def test_halving_drops_the_worst(tmp_path, execution):
    rates = (1e-6, 3e-3, 1e-5, 1e-2)
    configs, workdirs = [make(tmp_path, optimizer__learning_rate=rate) for rate in rates], folders(tmp_path, 4)
    summaries = train_ensemble(configs, workdirs, halve=((2, 3), (4, 2)), execution=execution)
    assert [s["status"] for s in summaries] == ["dropped", "completed", "dropped", "completed"]
    assert [s["steps"] for s in summaries] == [2, 6, 4, 6]
    assert summaries[0]["valid_loss"] > summaries[1]["valid_loss"]
    assert (tmp_path / "member0" / "checkpoints" / "2").is_dir()
    if execution == "in_turn":  # the survivor is what it would have been without the others
        np.testing.assert_array_equal(curve(workdirs[1]), curve(serial(configs[1], tmp_path / "alone")))


def test_a_member_that_diverges_ends_alone(tmp_path):
    configs = [make(tmp_path, optimizer__learning_rate=rate, optimizer__clip_norm=0.0) for rate in (1e-3, 1e30)]
    summaries = train_ensemble(configs, folders(tmp_path, 2), execution="together", devices=jax.devices()[:1])
    assert [(s["status"], s["exit_code"]) for s in summaries] == [("completed", 0), ("diverged", 3)]
    with pytest.raises(Diverged):
        train_ensemble([configs[1]], folders(tmp_path, 1, "all"), execution="in_turn", devices=jax.devices()[:1])


# ---- Refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, values", [
    ("model__embed_dim", (32, 64)), ("model__norm", ("rms", "layer")), ("model__norm_eps", (1e-6, 1e-5)), ("steps", (6, 7)),
    ("batch_size", (4, 8)), ("optimizer__clip_norm", (0.0, 1.0)), ("optimizer__nesterov", (True, False)),
    ("optimizer__muon_steps", (4, 5)), ("eval__batches", (1, 2)), ("model__rope_theta", (1e4, 1e5))])
def test_what_cannot_differ_is_refused_by_name(tmp_path, key, values):
    configs = [make(tmp_path, optimizer__name="muon", optimizer__learning_rate=rate, **{key: value})
               for value, rate in zip(values, (1e-3, 2e-3), strict=True)]
    with pytest.raises(UserError, match=key.replace("__", ".")) as error:
        Members(configs)
    assert len(error.value.problems) <= 3 and "learning_rate" not in str(error.value)  # what follows of a width differs too


def test_bad_calls(tmp_path):
    config = make(tmp_path)
    with pytest.raises(UserError, match="different run directories"):
        train_ensemble([config, config], [str(tmp_path / "a")] * 2)
    with pytest.raises(UserError, match="halving at step 9"):
        train_ensemble([config, config], folders(tmp_path, 2), halve=((9, 1),))
    with pytest.raises(UserError, match="leaves 2 members"):
        train_ensemble([config, config], folders(tmp_path, 2), halve=((3, 2),))
    assert not list(tmp_path.glob("member*"))


# ---- The command ---------------------------------------------------------------------------------------------------------------


def test_the_command_stops_at_sigterm_and_goes_on(tmp_path, monkeypatch, capsys):
    """Each value with each, and seeds; a real signal."""
    from jaxlm.cli import main

    seen = []

    def after(stop, step):
        seen.append(step)
        if seen == [1, 2, 3]:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop._received

    monkeypatch.setattr(ensemble.StopSignal, "after", after)
    command = ["ensemble", "--config=configs/shakespeare.py:debug", "--config.mesh.data=-1", "--config.observe.hang_seconds=0",
               "--config.optimizer.name=adamw", "--config.observe.report=False", "--vary=optimizer.b1=0.8,0.9", "--seeds=2",
               "--vary=optimizer.learning_rate=0.001", "--config.steps=5", f"--workdir={tmp_path}"]
    assert main(command) == 75
    names = [f"b1={b1}-learning_rate=0.001-seed={seed}" for b1 in (0.8, 0.9) for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name / "checkpoints" / "3").is_dir() for name in names)
    assert main(command) == 0 and seen == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("completed at step 5") == 4
    lines = [json.loads(line) for line in (tmp_path / names[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert main([*command, "--vary=model.embed_dim=32,64"]) == 2 and main([*command, "--vary=model.embed"]) == 2
    assert "model.embed_dim differs between members" in capsys.readouterr().err
