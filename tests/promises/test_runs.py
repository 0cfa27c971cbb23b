"""What the README promises of a run, each shown by running the command."""

import http.client
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import HASTY

pytestmark = pytest.mark.xdist_group("runs")  # one worker, so that `finished` is made once
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]), "JAX_PLATFORMS": "cpu",
       "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "XLA_FLAGS": ""}
QUICK = {**ENV, "XLA_FLAGS": HASTY}  # where no bits are compared
SMALL = ["--config=configs/shakespeare.py", "--config.steps=8", "--config.batch_size=4", "--config.seq_len=16",
         "--config.model.num_layers=1", "--config.model.embed_dim=32", "--config.model.num_heads=2",
         "--config.model.dropout=0.1", "--config.data.tokenizer=char", "--config.eval.batches=2",
         "--config.eval.sample_tokens=5", "--config.checkpoint.every_steps=4", "--config.checkpoint.keep=5",
         "--config.eval.every_steps=4", "--config.observe.log_every=1"]


def jaxlm(*args, env=ENV):
    return subprocess.run([sys.executable, "-m", "jaxlm.cli", *args], capture_output=True, text=True, env=env, timeout=300)


def train(workdir, *args, env=ENV):
    return jaxlm("train", f"--workdir={workdir}", *SMALL, *args, env=env)


def losses(workdir):
    lines = [json.loads(x) for x in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["split"], x["loss"]) for x in lines]


def arrays(workdir, step):
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(pathlib.Path(workdir, "checkpoints", str(step), "state").absolute())
    return jax.tree.leaves(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a"
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_run_leaves_what_the_contract_says(finished):
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.html", "samples.jsonl", "checkpoints/8"):
        assert (finished / name).exists(), name
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"], summary["steps"], summary["tokens"]) == ("completed", 0, 8, 512)
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"split", "step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
                         "step_seconds", "mfu_palm", "data_wait_fraction", "elapsed_seconds"}
    assert line["mfu"] is None  # an unknown device is never guessed


def test_a_finished_run_is_left_as_it_is(finished):
    before = (finished / "summary.json").read_text(), losses(finished)
    assert train(finished).returncode == 0
    assert before == ((finished / "summary.json").read_text(), losses(finished))


def test_rerun_is_bitwise(finished, tmp_path):
    assert train(tmp_path / "b").returncode == 0
    assert losses(finished) == losses(tmp_path / "b")
    for a, b in zip(arrays(finished, 8), arrays(tmp_path / "b", 8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stop_and_resume_is_bitwise(finished, tmp_path):
    """A run that saved at step 4 is killed at step 6; the same command goes on from 4."""
    workdir = tmp_path / "c"
    script = """
import os, signal, sys
from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.cli import main
from jaxlm.observe.writers import Writers

save, write = Checkpoints.save, Writers.write
def save_and_wait(self, *args):
    save(self, *args)
    self.wait()
def write_and_die(self, line):
    write(self, line)
    if line["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save, Writers.write = save_and_wait, write_and_die
main(sys.argv[1:])
"""
    killed = subprocess.run([sys.executable, "-c", script, "train", f"--workdir={workdir}", *SMALL], env=ENV, timeout=300)
    assert killed.returncode == -signal.SIGKILL and len(losses(workdir)) == 7  # six steps, one evaluation
    result = train(workdir)
    assert result.returncode == 0 and "resuming at step 4" in result.stdout, result.stderr
    assert losses(finished) == losses(workdir)
    for a, b in zip(arrays(finished, 8), arrays(workdir, 8), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(tmp_path, number):
    args = [sys.executable, "-m", "jaxlm.cli", "train", f"--workdir={tmp_path / 'd'}", *SMALL, "--config.steps=3000",
            "--config.checkpoint.every_steps=0", "--config.eval.every_steps=0"]
    process = subprocess.Popen(args, env=QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "d" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "run the same command again" in err
    saved = [int(p.name) for p in (tmp_path / "d" / "checkpoints").iterdir() if p.name.isdigit()]
    summary = json.loads((tmp_path / "d" / "summary.json").read_text())
    assert saved == [summary["steps"]] and summary["status"] == "preempted"


def test_a_changed_config_is_refused_with_the_diff(finished):
    before = (finished / "config.json").read_text()
    result = train(finished, "--config.seed=7")
    assert result.returncode == 2 and "seed: 0 -> 7" in result.stderr and "--allow_config_change" in result.stderr
    assert (finished / "config.json").read_text() == before


def test_a_text_that_changed_since_the_run_began_is_refused_by_its_name(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    args = (f"--config.data.path={text}", "--config.steps=2", "--config.eval.every_steps=0", "--config.eval.batches=0",
            "--config.checkpoint.every_steps=0")
    assert train(tmp_path / "t", *args, env=QUICK).returncode == 0
    text.write_text("the quick brown fox jumps over the lazy cat\n" * 200)
    result = train(tmp_path / "t", *args, env=QUICK)
    assert result.returncode == 2 and "its text is no longer what it was when the run began" in result.stderr, result.stderr
    assert f"{text}: sha256 " in result.stderr and "--allow_config_change" in result.stderr
    result = jaxlm("data", "inspect", f"--workdir={tmp_path / 't'}", "--step=1")
    assert result.returncode == 2 and f"{text}: sha256 " in result.stderr, result.stderr


def test_divergence_exits_3_and_names_the_tensor(tmp_path):
    result = train(tmp_path / "e", "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=1e30",
                   "--config.optimizer.clip_norm=0.0", "--config.optimizer.groups=(('.*', 1.0, 0.0),)", env=QUICK)
    assert result.returncode == 3 and "non-finite value" in result.stderr, result.stderr
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["status"] == "diverged"


def test_every_verb_runs_and_its_help_fits_a_screen(finished):
    result = jaxlm("eval", f"--workdir={finished}", "--json")
    assert result.returncode == 0, result.stderr
    assert {"loss", "perplexity", "bits_per_byte", "step"} <= set(json.loads(result.stdout))
    generate = ["generate", f"--workdir={finished}", "--prompt=KING", "--tokens=40", "--seed=3"]
    first, second = jaxlm(*generate), jaxlm(*generate)
    assert first.returncode == 0 and first.stdout == second.stdout and len(first.stdout) == 45, first.stderr
    assert jaxlm("report", f"--workdir={finished}").returncode == 0
    result = jaxlm("data", "inspect", f"--workdir={finished}", "--step=8", "--rows=0")
    assert result.returncode == 0 and result.stdout.startswith("step 8, epoch 0: 4 of 4 rows"), result.stderr
    assert "self-test passed" in jaxlm("doctor", env=QUICK).stdout
    result = jaxlm("bench", "--config=configs/llama3_8b.py:debug", "--json", "--warmup=1", "--blocks=2", "--block_steps=2",
                   env=QUICK)
    assert result.returncode == 0 and set(json.loads(result.stdout)) == {  # one object, and nothing beside it
        "tokens_per_second", "step_seconds", "mfu", "mfu_palm", "matmul_ceiling_tflops", "peak_memory_bytes", "compile_seconds",
        "device", "config_fingerprint", "commit"}, result.stderr
    for verb in ("train", "eval", "generate", "chat", "serve", "data", "plan", "bench", "ensemble", "mup", "report", "doctor"):
        text = jaxlm(verb, "--help").stdout
        assert 3 < text.count("\n") <= 40, verb


def test_a_conversation_on_a_terminal_survives_ctrl_c(finished, tmp_path):
    pytest.importorskip("pty")
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", spawn, sys.executable, "-m", "jaxlm.cli", "chat", f"--workdir={finished}",
               "--config.seq_len=4096", "--tokens=4000"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                               env={**QUICK, "JAXLM_CACHE": str(tmp_path), "TERM": "dumb"})

    def read_until(text):
        shown = ""
        while text not in shown:
            piece = os.read(process.stdout.fileno(), 1000).decode()
            assert piece, shown
            shown += piece
        return shown

    read_until("> ")
    process.stdin.write(b"Hi\n")
    read_until("Hi\r\n")
    for _ in range(5):  # pieces of the answer
        assert os.read(process.stdout.fileno(), 1000)
    process.stdin.write(b"\x03")
    assert len(read_until("> ")) < 3000
    process.stdin.write(b"/seed 5\n")
    read_until("(seed 5)")
    process.stdin.write(b"/quit\n")
    assert process.wait(60) == 0
    assert (tmp_path / "chat_history").read_text().split("\n")[-4:] == ["Hi", "/seed 5", "/quit", ""]


def test_a_server_finishes_its_answers_on_sigterm_and_ends_with_0(finished):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    process = subprocess.Popen([sys.executable, "-m", "jaxlm.cli", "serve", f"--workdir={finished}", "--port=0",
                                "--config.seq_len=512"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUICK)
    line = process.stdout.readline()
    url = re.search(r"http://127.0.0.1:(\d+)/v1", line)
    assert url and line.startswith("serving a at"), process.stderr.read()
    connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "KING", "max_tokens": 300, "stream": True}),
                       {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = response.readline()
    process.send_signal(signal.SIGTERM)
    rest = response.read().decode()
    assert first.startswith(b"data: {") and rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest
    assert process.wait(60) == 0, process.stderr.read()
    process.communicate()


def test_a_run_of_many_devices_is_read_on_one(tmp_path):
    result = train(tmp_path / "m", "--config.mesh.data=2", "--config.mesh.tensor=2", "--config.steps=2",
                   "--config.eval.every_steps=0", "--config.checkpoint.every_steps=0", "--config.eval.batches=0",
                   "--config.eval.batch_size=64",
                   env={**ENV, "XLA_FLAGS": f"{HASTY} --xla_force_host_platform_device_count=4"})
    assert result.returncode == 0 and "data=2, tensor=2" in result.stdout, result.stderr
    table = [line.split() for line in result.stdout.splitlines() if line.startswith("layers/attention/query/kernel")]
    assert table[0][1:] == ["1x32x2x16", "-,", "-,", "tensor,", "-", "2,048"], result.stdout
    loss = json.loads((tmp_path / "m" / "summary.json").read_text())["valid_loss"]
    result = jaxlm("eval", f"--workdir={tmp_path / 'm'}", "--json", env=QUICK)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout)["loss"], loss, rtol=1e-5)
    result = jaxlm("eval", f"--workdir={tmp_path / 'm'}", "--config.mesh.tensor=2")
    assert result.returncode == 2 and "there are 1" in result.stderr, result.stderr


def test_the_commands_of_the_readme_run(finished):
    """Every `jaxlm` line of its shell blocks, on a small run; its `bash launch/...` lines are what `.ci/run` calls."""
    blocks = re.findall(r"```bash\n(.*?)```", pathlib.Path("README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    ran = 0
    for line in lines:
        if line.startswith("jaxlm "):
            verb, *args = shlex.split(line)[1:]
            args = [f"--workdir={finished}" if a.startswith("--workdir=") else a for a in args if not a.startswith("--config=")]
            result = jaxlm(verb, *(SMALL if verb == "train" else ()), *args)
            assert result.returncode == 0, (line, result.stderr)
            ran += 1
        elif line.startswith("bash "):
            assert line in pathlib.Path(".ci/run").read_text(), line
    assert ran >= 2


def test_the_road_from_text_to_gradient_is_ten_files_and_under_2500_lines():
    road = re.search(r"## From text file to gradient\n\n(.*?): ten files", pathlib.Path("README.md").read_text(), re.S)[1]
    files = re.findall(r"`([a-z_/]+\.py)`", road)
    assert len(files) == 10 and sum(len(pathlib.Path("jaxlm", f).read_text().splitlines()) for f in files) < 2500


@pytest.mark.parametrize("args, message", [
    (["--config.data.path=none.txt"], "none.txt: no such file"),
    (["--config.seq_len=2000000"], "longer than the training data"),
    (["--config.model.vocab_size=5"], "smaller than the tokenizer's 65"),
    (["--config.modle.x=1"], "unknown key"),
    (["--config.eval.sample_prompt="], "eval.sample_prompt='': is no token"),
    (["--config.eval.sample_prompt=é"], "eval.sample_prompt='é': character 'é' at 0 is not in"),
    (["--config.optimizer.b2=0.5", "--config.optimizer.name=sgd"], "nothing in this run reads it"),
])
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, args, message):
    result = train(tmp_path / "f", *args)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "f").exists()


def test_an_unwritable_workdir_and_a_missing_run(tmp_path):
    (tmp_path / "file").write_text("")
    result = train(tmp_path / "file" / "x")
    assert result.returncode == 2 and "cannot be written" in result.stderr, result.stderr
    assert "no config.json there" in jaxlm("eval", f"--workdir={tmp_path / 'nothing'}").stderr
