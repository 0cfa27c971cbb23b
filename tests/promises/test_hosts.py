"""What is promised of several processes, each shown by running them on this machine, over loopback."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import HASTY

pytestmark = pytest.mark.xdist_group("hosts")  # one worker, so that the runs they compare with are made once
STEPS = 8
BASE = ["--config=configs/default.py", f"--config.steps={STEPS}", "--config.batch_size=8", "--config.seq_len=16",
        "--config.model.num_layers=1", "--config.model.embed_dim=32", "--config.model.num_heads=2",
        "--config.model.dropout=0.1", "--config.optimizer.learning_rate=0.01", "--config.eval.batches=3",
        "--config.eval.every_steps=4", "--config.checkpoint.every_steps=2",
        "--config.checkpoint.keep=9", "--config.observe.log_every=1", "--config.observe.report=false",
        "--config.imports=('row_recorder',)",
        f"--config.data.mixture=(('plays', 'shakespeare', 0.7), ('law', '{pathlib.Path('LICENSE').absolute()}', 0.3))"]
FSDP, TENSOR = "--config.mesh.fsdp=4", "--config.mesh.tensor=2"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The launchers find `jaxlm` on the PATH."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "jaxlm").write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxlm.cli "$@"\n')
    (folder / "jaxlm").chmod(0o755)
    here = os.getcwd()
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": f"{here}:{here}/tests/promises",
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": HASTY,
            "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "JAXLM_GRACE": "60"}


class Cluster:
    """launch/local_cluster.sh, started; `wait` gives its exit code, `output` what it said."""

    def __init__(self, environment, workdir, processes, devices, *args, sleep=0.0):
        workdir.mkdir(exist_ok=True, parents=True)
        self.workdir, self.rows = workdir, workdir.with_suffix(f".rows{time.time_ns()}")
        self.rows.mkdir()
        env = {**environment, "JAXLM_LOCAL_DEVICES": str(devices), "ROW_FOLDER": str(self.rows), "ROW_SLEEP": str(sleep)}
        self.process = subprocess.Popen(
            ["bash", "launch/local_cluster.sh", str(processes), *BASE, f"--workdir={workdir}", *args],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self):
        self.output, _ = self.process.communicate(timeout=240)
        return self.process.returncode

    def wait_for_step(self, step, saved=()):
        """Until this step was logged and these checkpoints are there."""
        metrics = self.workdir / "metrics.jsonl"
        for _ in range(2000):
            if metrics.exists() and any(s >= step for s, _, _ in losses(self.workdir)) and set(saved) <= set(self.saved()):
                return
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)
        raise AssertionError(f"step {step} never came")

    def saved(self):
        folder = self.workdir / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []

    def pid(self, process):
        lines = (self.workdir / "logs" / f"process-{process}.log").read_text().splitlines()
        return int([line for line in lines if " start: " in line][-1].rsplit("pid ", 1)[1])

    def rows_by_process(self):
        """{process: {(step, row): digest}}"""
        out = {}
        for file in self.rows.iterdir():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            out[int(file.name)] = {(step, row): digest for step, row, digest in lines if step < STEPS}
        return out


def lines_of(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines() if x.endswith("}")]


def losses(workdir):
    return [(x["step"], x["split"], x["loss"]) for x in lines_of(workdir) if not x["split"].startswith("task/")]


def same_losses(one, two, tolerance=1e-5):
    assert [x[:2] for x in losses(one)] == [x[:2] for x in losses(two)]
    np.testing.assert_allclose([x[2] for x in losses(one)], [x[2] for x in losses(two)], rtol=tolerance, atol=0)


def run(environment, workdir, *args, **kw):
    cluster = Cluster(environment, workdir, *args, **kw)
    assert cluster.wait() == 0, cluster.output
    return cluster


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """What is written and asked at each evaluation: a sample, nine questions, a text longer than the context."""
    folder = tmp_path_factory.mktemp("questions")
    words = "the king and the queen speak of love and of war in the city".split()
    (folder / "q.jsonl").write_text("".join(json.dumps({
        "query": " ".join(words[i : i + 4]), "choices": [words[i], words[-i - 1] + " and", "war"], "gold": i % 3}) + "\n"
        for i in range(9)))
    (folder / "t.txt").write_text(" ".join(words * 2))
    tasks = (("multiple_choice", f"{folder}/q.jsonl"), ("text", f"{folder}/t.txt"))
    return ["--config.eval.sample_tokens=3", f"--config.eval.tasks={tasks}"]


@pytest.fixture(scope="module")
def alone(environment, asking, tmp_path_factory):
    return run(environment, tmp_path_factory.mktemp("hosts") / "alone", 1, 4, FSDP, *asking)


@pytest.fixture(scope="module")
def two(environment, asking, tmp_path_factory):
    return run(environment, tmp_path_factory.mktemp("hosts") / "two", 2, 2, FSDP, *asking)


def test_two_processes_train_on_the_same_rows_with_the_same_losses(alone, two):
    all_rows, rows = alone.rows_by_process()[0], two.rows_by_process()
    assert len(all_rows) == 8 * STEPS and rows[0] | rows[1] == all_rows
    assert not rows[0].keys() & rows[1].keys() and len(rows[0]) == len(rows[1])  # each its half
    same_losses(alone.workdir, two.workdir)
    assert two.output.count("step      8/8") == 1 and "devices: 4 x cpu, fsdp=4" in two.output
    samples = (alone.workdir / "samples.jsonl").read_text()
    assert samples == (two.workdir / "samples.jsonl").read_text() and samples.count("\n") == 2
    asked, wanted = ([x for x in lines_of(of.workdir) if x["split"].startswith("task/")] for of in (two, alone))
    assert [(x["step"], x["split"], x["n"]) for x in asked] == [
        (step, f"task/{name}", n) for step in (4, 8) for name, n in (("multiple_choice", 9), ("text", 1))]
    for got, want in zip(asked, wanted, strict=True):
        assert got.pop("split") == want.pop("split") and got == pytest.approx(want, rel=1e-5)
    for i in (0, 1):
        log = (two.workdir / "logs" / f"process-{i}.log").read_text()
        assert f"process {i} of 2" in log and "2 of 4 devices here" in log and "completed at step 8" in log


def test_four_processes_where_two_share_each_row(environment, alone, tmp_path):
    four = run(environment, tmp_path / "four", 4, 1, "--config.mesh.data=2", TENSOR)
    rows = four.rows_by_process()
    assert rows[0] == rows[1] and rows[2] == rows[3] and rows[0] | rows[2] == alone.rows_by_process()[0]
    assert not rows[0].keys() & rows[2].keys()
    same_losses(alone.workdir, four.workdir)


def test_a_killed_process_ends_the_other_and_the_same_command_goes_on_bitwise(environment, two, tmp_path):
    """With a damaged newest checkpoint on top, on which both processes must agree."""
    cluster = Cluster(environment, tmp_path / "killed", 2, 2, FSDP, sleep=0.4)
    cluster.wait_for_step(5, saved=[2, 4])
    os.kill(cluster.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    assert cluster.wait() != 0 and time.monotonic() - killed < 15
    assert "process 1 ended without a word" in cluster.output and "most recent call first" in cluster.output
    log = (cluster.workdir / "logs" / "process-0.log").read_text()
    # The main thread's stack: in the loop, or already telling of the collective that failed under it.
    assert "process 1 ended without a word" in log and re.search(r'cli\.py", line \d+ in main', log)
    before, newest = cluster.saved()[-2:]
    files = [f for f in (cluster.workdir / "checkpoints" / str(newest) / "state").rglob("*") if f.is_file()]
    data = max(files, key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    again = run(environment, cluster.workdir, 2, 2, FSDP)
    assert again.output.count(f"checkpoint {newest} is damaged") == 1, again.output
    assert f"resuming at step {before}" in again.output and cluster.saved() == [2, 4, 6, 8]
    same_losses(two.workdir, cluster.workdir, tolerance=0)


def test_a_stopped_process_is_noticed_in_time(environment, tmp_path):
    cluster = Cluster(environment, tmp_path / "stopped", 2, 2, FSDP, "--config.observe.peer_seconds=4.0", sleep=0.4)
    cluster.wait_for_step(2)
    victim, survivor = cluster.pid(1), cluster.pid(0)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    while pathlib.Path(f"/proc/{survivor}").exists() and time.monotonic() - stopped < 30:
        time.sleep(0.1)
    took = time.monotonic() - stopped
    os.kill(victim, signal.SIGKILL)
    assert cluster.wait() != 0 and took < 20, took
    assert "process 1: no sign of life for 4 s" in cluster.output and "most recent call first" in cluster.output


def test_a_hang_of_one_process_alone_ends_with_the_stacks(environment, tmp_path):
    cluster = Cluster({**environment, "ROW_HANG": "3"}, tmp_path / "hung", 1, 1, "--config.observe.hang_seconds=3.0")
    assert cluster.wait() == 1, cluster.output
    assert "jaxlm: no progress for 3 s while training" in cluster.output
    for text in (cluster.output, (cluster.workdir / "logs" / "process-0.log").read_text()):
        assert "row_recorder.py" in text and "train/loop.py" in text  # the thread that hangs, and the one that waits for it


def test_sigterm_on_one_process_stops_all_and_another_mesh_goes_on(environment, alone, tmp_path):
    cluster = Cluster(environment, tmp_path / "elastic", 2, 4, "--config.mesh.fsdp=8", sleep=0.4)
    cluster.wait_for_step(3)
    os.kill(cluster.pid(1), signal.SIGTERM)
    assert cluster.wait() == 75 and "SIGTERM at step" in cluster.output, cluster.output
    step = json.loads((cluster.workdir / "summary.json").read_text())["steps"]
    assert 3 <= step < STEPS and (cluster.workdir / "checkpoints" / str(step)).is_dir()
    again = run(environment, cluster.workdir, 1, 4, "--config.mesh.data=2", TENSOR)
    assert f"resuming at step {step}" in again.output and "data=2, tensor=2" in again.output
    rows = {k: v for k, v in alone.rows_by_process()[0].items() if k[0] >= step}
    assert again.rows_by_process()[0] == rows
    same_losses(alone.workdir, cluster.workdir)
    mesh = json.loads((cluster.workdir / "config.json").read_text())["config"]["mesh"]
    assert mesh["tensor"] == 2 and mesh["fsdp"] == 1  # it tells of the mesh that runs now


def processes(environment, workdir, count, ids, *args, cwd=None, **extra):
    """Started one by one by the contract -> [(exit code, output)]."""
    from jaxlm.parallel.peers import free_port

    env = {**environment, "JAXLM_COORDINATOR": f"127.0.0.1:{free_port()}", "JAXLM_NUM_PROCESSES": str(count),
           "ROW_FOLDER": str(workdir.parent), **extra}
    base = [str(pathlib.Path(a.split("=", 1)[1]).absolute()).join(["--config=", ""]) if a.startswith("--config=") else a
            for a in BASE]
    started = [subprocess.Popen(["jaxlm", "train", *base, f"--workdir={workdir}", *args], cwd=cwd and cwd[i], text=True,
                                env={**env, "JAXLM_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for i in ids]
    return [(p.returncode, out) for p, out in [(p, p.communicate(timeout=120)[0]) for p in started]]


def test_a_missing_process_is_named_in_time(environment, tmp_path):
    began = time.monotonic()
    ends = processes(environment, tmp_path / "x", 3, [0, 2], "--config.observe.join_seconds=4.0")
    assert time.monotonic() - began < 40
    for code, output in ends:
        assert code == 1 and "jaxlm: expected 3 processes, 2 joined after 4 s: missing 1" in output, output
    assert not (tmp_path / "x").exists()


def test_a_user_error_of_one_process_ends_all_with_2(environment, tmp_path):
    """The text is there for process 0 only."""
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
    shutil.copy("jaxlm/data/shakespeare/input.txt", tmp_path / "0" / "text.txt")
    ends = processes(environment, tmp_path / "x", 2, [0, 1], "--config.data.mixture=(('text', 'text.txt', 1.0),)",
                     cwd=[tmp_path / "0", tmp_path / "1"])
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("text.txt: no such file" in output for _, output in ends), ends


def test_devices_are_counted(environment, tmp_path):
    ends = processes(environment, tmp_path / "x", 2, [0, 1], JAXLM_LOCAL_DEVICES="3", JAX_NUM_CPU_DEVICES="2")
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("JAXLM_LOCAL_DEVICES=3: process 0 sees 2 devices" in output for _, output in ends), ends


def test_all_processes_stop_early_at_the_same_step(environment, tmp_path):
    args = ("--config.optimizer.learning_rate=0.0", "--config.eval.every_steps=2", "--config.eval.patience=1")
    two = run(environment, tmp_path / "early", 2, 1, *args)
    summary = json.loads((two.workdir / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_early"], summary["best"]["step"]) == (4, True, 2)
    assert all("completed at step 4" in (two.workdir / "logs" / f"process-{i}.log").read_text() for i in (0, 1))
    before = losses(two.workdir)
    run(environment, two.workdir, 2, 1, *args)  # the same command again: nothing to do
    assert losses(two.workdir) == before
