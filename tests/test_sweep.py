"""Sweeps: what is wrong is told before anything runs; every mode makes the same runs; what is done is not done again."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from jaxlm.cli import main
from jaxlm.errors import Preempted, UserError
from jaxlm.research import modes
from jaxlm.research.board import Board
from jaxlm.research.designs import Uniform, grid, random
from jaxlm.research.sweep import mean_losses, plan, status_of, todo

TINY = '''
from configs import default

def get_config(arg=""):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 4, 8, 8
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 8, 1
    c.eval.batches, c.eval.every_steps, c.eval.batch_size = 1, 2, 8
    c.checkpoint.every_steps, c.observe.log_every, c.observe.report = 0, 1, False
    c.schedule.warmup_steps, c.mesh.data = 1, 1
    return c

def sweep(add):
'''


@pytest.fixture
def write(tmp_path):
    """sweep's body -> the config file."""

    def file(body: str) -> str:
        path = tmp_path / "tiny.py"
        path.write_text(TINY + "".join(f"    {line}\n" for line in body.splitlines()))
        return str(path)

    return file


def fake_train(monkeypatch, losses=lambda run: 1.0, calls=None):
    """In place of `train`: leaves what a run leaves."""
    from jaxlm.config import fingerprint

    def train(config, workdir, process_start=None, overrides=()):
        if calls is not None:
            calls.append(pathlib.Path(workdir).relative_to(pathlib.Path(workdir).parents[1]).as_posix())
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        values = json.loads(config.to_json())
        (folder / "config.json").write_text(json.dumps({"config": values, "fingerprint": fingerprint(config), "data": "text"}))
        loss = losses(folder)
        (folder / "metrics.jsonl").write_text(json.dumps(
            {"split": "valid/all", "step": config.steps, "loss": loss, "perplexity": 2.0, "bits_per_byte": 1.0}) + "\n")
        (folder / "summary.json").write_text(json.dumps({"status": "completed", "valid_loss": loss, "train_loss": loss,
                                                         "devices": 1, "device_kind": "cpu"}))

    monkeypatch.setattr("jaxlm.train.loop.train", train)


# ---- Plans ------------------------------------------------------------------------------------------------------------------


def test_arms_and_seeds_become_runs_with_their_own_folder_and_command(write):
    spec = write('add.seeds = 2\nadd("base")\n'
                 'add("wide, fast", steps=3, **{"model.mlp_dim": 16, "optimizer.learning_rate": 0.01})\n'
                 'add(seeds=(7,), **{"model.norm": "layer"})')
    found = plan(spec, ["--config.batch_size=16"], "runs")
    assert [(run.arm, run.seed, str(run.workdir)) for run in found.runs] == [
        ("base", 0, "runs/base/seed-0"), ("base", 1, "runs/base/seed-1"), ("wide, fast", 0, "runs/wide-fast/seed-0"),
        ("wide, fast", 1, "runs/wide-fast/seed-1"), ("norm=layer", 7, "runs/norm=layer/seed-7")]
    assert found.runs[3].command(spec) == [
        "train", f"--config={spec}", "--workdir=runs/wide-fast/seed-1", "--config.batch_size=16", "--config.steps=3",
        "--config.model.mlp_dim=16", "--config.optimizer.learning_rate=0.01", "--config.seed=1"]
    config = found.runs[3].config
    assert (config.seed, config.steps, config.model.mlp_dim, config.batch_size) == (1, 3, 16, 16)
    assert [run.seed for run in plan(spec, [], "runs", seeds=1).runs] == [0, 0, 7]
    assert [(run.arm, run.seed) for run in plan(spec, [], "runs", repeats=3).runs] == [("tiny", 0), ("tiny", 1), ("tiny", 2)]


@pytest.mark.parametrize("body, message", [
    ('add("a")\nadd("b", **{"model.mlp_dim": 32})', "arm 'b' is the same experiment as arm 'a' (seed 0, "),
    ('add("a", seeds=(1, 1))', "arm 'a' gives this seed twice (seed 1, "),
    ('add("a")\nadd("a", steps=3)', "arm 'a': has the name of arm 'a'"),
    ('add("a")\nadd("b", **{"optimizer.learning_rat": 1.0})',
     "arm 'b': optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?"),
    ('add("a", steps="x")', "arm 'a': --config.steps=x: wrong type; give int"),
    ('add("a", **{"model.num_heads": 3})', "arm 'a': model.embed_dim=8 is not divisible by model.num_heads=3"),
    ('add("a", seeds=0)', "arm 'a': seeds=[]: give a number of seeds"),
    ('pass', "sweep(add) added no arm"),
    ('add("a", **{"batch_size": 16})', "arm 'a' sets batch_size, and so does the command line"),
    ('1 / 0', "ZeroDivisionError at"),
    ('from jaxlm.research.designs import grid\nlist(grid({"steps": 3}))', "steps=3: give the values to try as a tuple"),
])
def test_a_bad_sweep_is_one_line_by_arm_before_anything_runs(body, message, write, tmp_path, capsys):
    overrides = ["--config.batch_size=16"] if "batch_size" in body else []
    assert main(["sweep", f"--config={write(body)}", f"--workdir={tmp_path / 'w'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "w").exists()


def test_all_that_is_wrong_is_told_at_once(write):
    with pytest.raises(UserError) as error:
        plan(write('add("a", stepz=1)\nadd("b", nope=2)\nadd("c")'), [], "runs")
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["arm 'a'", "arm 'b'"]


def test_a_folder_of_another_experiment_is_refused(write, tmp_path, monkeypatch):
    fake_train(monkeypatch)
    spec = write('add("a")')
    modes.serial(found := plan(spec, [], tmp_path / "w"), Board(found), modes.Options())
    with pytest.raises(UserError, match=r"arm 'a': .*seed-0 has a run of another config \(steps: 4 -> 3\)"):
        plan(spec, ["--config.steps=3"], tmp_path / "w")


@pytest.mark.parametrize("args, message", [
    (["--mode=seriall"], "--mode='seriall': unknown mode; did you mean serial?"),
    (["--workers=-1"], "--workers=-1: must be at least 1"),
    (["--repeats=3", "--trials=3"], "give one of them"), (["--trials=3"], "has no suggest(trial)")])
def test_bad_arguments_are_one_line(args, message, write, tmp_path, capsys):
    assert main(["sweep", f"--config={write('add()')}", f"--workdir={tmp_path / 'w'}", *args]) == 2
    assert message in capsys.readouterr().err


# ---- Designs ----------------------------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_and_conditional_keys_only_where_they_count():
    space = {"optimizer.name": ("adamw", "muon"), "optimizer.muon_steps": (4, 5)}
    assert len(list(grid(space))) == 4
    only = {"optimizer.muon_steps": lambda o: o["optimizer.name"] == "muon"}
    assert list(grid(space, only)) == [{"optimizer.name": "adamw"}, {"optimizer.name": "muon", "optimizer.muon_steps": 4},
                                       {"optimizer.name": "muon", "optimizer.muon_steps": 5}]


def test_random_draws_are_distinct_the_same_again_and_grow():
    space = {"optimizer.learning_rate": Uniform(1e-4, 1e-2, log=True), "model.num_layers": Uniform(1, 3),
             "model.norm": ("rms", "layer")}
    few, many = list(random(space, 5, seed=1)), list(random(space, 50, seed=1))
    assert many[:5] == few and len(many) == 50 and list(random(space, 5, seed=2)) != few
    assert {o["model.num_layers"] for o in many} == {1, 2, 3} and all(1e-4 <= o["optimizer.learning_rate"] <= 1e-2 for o in many)
    assert sum(o["optimizer.learning_rate"] < 1e-3 for o in many) in range(15, 36)  # half of a logarithmic scale
    assert len(list(random({"model.norm": ("rms", "layer")}, 10))) == 2


# ---- Modes ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two arms that train, and one that fails when it is built, three seeds: by the command, for real."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.py").write_text(TINY + '''
    add.seeds = 3
    add("base")
    add("fails", **{"model.norm": "nope"}, seeds=1)
    add("lr", **{"optimizer.learning_rate": 0.01})
''')
    command = ["sweep", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'w'}"]
    return folder / "w", command, main(command)


def test_a_run_that_fails_is_recorded_and_the_others_go_on(trained, capsys):
    folder, command, code = trained
    assert code == 2
    record = json.loads((folder / "sweep.json").read_text())
    assert [(run["arm"], run["seed"], run["status"]) for run in record["runs"]] == [
        *(("base", seed, "completed") for seed in range(3)), ("fails", 0, "failed"),
        *(("lr", seed, "completed") for seed in range(3))]
    assert "model.norm='nope': unknown norm" in record["runs"][3]["reason"]
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("summary.json")}
    assert len(times) == 6 and main(command) == 2  # only what failed is tried again
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("summary.json")}
    output = capsys.readouterr()
    assert "6 of them done before" in output.out and "1 of 7 runs failed" in output.err


def test_a_finished_sweep_has_its_report_its_noise_and_real_costs(trained):
    folder = trained[0]
    report = json.loads((folder / "report.json").read_text())
    base, lr = report["arms"]
    assert [arm["name"] for arm in report["arms"]] == ["base", "lr"] and lr["comparison"]["paired"]
    finals = [json.loads((folder / f"lr/seed-{seed}/summary.json").read_text())["valid_loss"] for seed in range(3)]
    assert [run["value"] for run in lr["runs"]] == finals and len(set(finals)) == 3
    assert base["flops"] > 0 and base["train_seconds"] > 0 and base["tokens"] == 4 * 8 * 8
    assert [run["name"] for run in json.loads((folder / "noise.json").read_text())] == ["base", "lr"]


def test_processes_make_the_same_runs(trained, tmp_path, monkeypatch):
    """Bit for bit those of mode=serial; one that was stopped is not counted as done."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    folder, command, _ = trained
    spec = next(a for a in command if a.startswith("--config=")).removeprefix("--config=")
    found = plan(spec, [], tmp_path / "w", seeds=1)
    found = found._replace(runs=[run for run in found.runs if run.arm != "lr"])
    with Board(found, live=False) as board:
        modes.processes(found, board, modes.Options(workers=2))
    assert [board.status[run.workdir] for run in found.runs] == ["completed", "failed"]
    assert "unknown norm" in modes.failures(found, board)[0]
    assert main(["report", "--compare", str(folder / "base/seed-0"), str(tmp_path / "w/base/seed-0"), "--assert-equal"]) == 0


def test_a_stop_of_processes_is_passed_on_once_and_nothing_new_begins(write, tmp_path, monkeypatch):
    script = ("trap 'echo told >> told; [ $(wc -l < told) = 1 ] && sleep 0.5 && exit 75' TERM; touch up; "
              "while :; do sleep 0.05; done")

    def start(run, sweep, slot, workers):
        run.workdir.mkdir(parents=True)
        (run.workdir / "output.txt").write_text("jaxlm: preempted: SIGTERM at step 2")
        process = subprocess.Popen(["bash", "-c", script], cwd=run.workdir)
        while not (run.workdir / "up").exists():
            pass
        stop.append(15)
        return process

    stop, found = [], plan(write('add("a", seeds=3)'), [], tmp_path / "w")
    monkeypatch.setattr(modes, "start", start)
    with Board(found, live=False) as board, pytest.raises(Preempted, match="SIGTERM: its runs have saved"):
        modes.run_all(found.runs, found, board, 2, stop)
    assert list(board.status.values()) == ["preempted", "", ""]
    assert (found.runs[0].workdir / "told").read_text() == "told\n"


def test_print_is_commands_for_a_shell_and_writes_nothing(write, tmp_path, capsys):
    spec = write('add("a b", seeds=2)\nadd("c", steps=3, when=lambda loss: True)')
    assert main(["sweep", f"--config={spec}", f"--workdir={tmp_path / 'w'}", "--mode=print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[0]) == ["jaxlm", "train", f"--config={spec}", f"--workdir={tmp_path}/w/a-b/seed-0",
                                     "--config.seed=0"]
    assert lines[2] == "# c: only if its condition holds" and len(lines) == 4 and not (tmp_path / "w").exists()


def test_a_conditional_arm_waits_for_those_before_it(write, tmp_path, monkeypatch, capsys):
    calls = []
    fake_train(monkeypatch, lambda folder: {"a": 2.0, "b": 1.0}.get(folder.parent.name, 0.5) + 0.1 * int(folder.name[-1]), calls)
    spec = write('add.seeds = 2\nadd("a")\nadd("yes", steps=3, when=lambda loss: loss["a"] == 2.05)\n'
                 'add("no", steps=5, when=lambda loss: loss["a"] < 1)\nadd("last", steps=6)')
    command = ["sweep", f"--config={spec}", f"--workdir={tmp_path / 'w'}"]
    assert main(command) == 0
    assert calls == ["a/seed-0", "a/seed-1", "yes/seed-0", "yes/seed-1", "last/seed-0", "last/seed-1"]
    record = json.loads((tmp_path / "w/sweep.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["completed"] * 4 + ["left out"] * 2 + ["completed"] * 2
    assert main(command) == 0 and len(calls) == 6
    found = plan(spec, [], tmp_path / "w")
    assert todo(found.runs) == found.runs[4:6] and mean_losses(found.runs)["a"] == 2.05


def test_a_condition_that_names_no_arm_is_one_line(write, tmp_path, monkeypatch, capsys):
    fake_train(monkeypatch)
    spec = write('add("a")\nadd("b", steps=3, when=lambda loss: loss["A"] < 1)')
    assert main(["sweep", f"--config={spec}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "tiny.py: KeyError at" in capsys.readouterr().err


def test_a_stopped_sweep_goes_on(write, tmp_path, monkeypatch):
    calls, stop = [], [True]

    def losses(folder):
        if stop and "b" in folder.parts:
            raise Preempted("SIGTERM at step 2: saved")
        return 1.0

    fake_train(monkeypatch, losses, calls)
    command = ["sweep", f"--config={write('add(chr(97))' + chr(10) + 'add(chr(98), steps=3)')}", f"--workdir={tmp_path / 'w'}"]
    assert main(command) == 75
    assert [run["status"] for run in json.loads((tmp_path / "w/sweep.json").read_text())["runs"]] == ["completed", "preempted"]
    stop.clear()
    assert main(command) == 0 and calls == ["a/seed-0", "b/seed-0", "b/seed-0"]


def test_repeats_measure_the_noise_of_a_config(write, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAXLM_CACHE", str(cache))
    fake_train(monkeypatch, lambda folder: 1.5 + 0.01 * int(folder.name[-1]))
    command = ["sweep", f"--config={write('add()')}", f"--workdir={tmp_path / 'w'}"]
    assert main([*command, "--repeats=3"]) == 0
    out = capsys.readouterr().out
    assert "noise of tiny: valid/all loss 1.5100, standard deviation 0.01 over 3 seeds; two single runs must differ" in out
    stored, = (json.loads(file.read_text()) for file in (cache / "noise").iterdir())
    assert stored["seeds"] == [0, 1, 2] and stored["metrics"]["valid/all:loss"]["std"] == pytest.approx(0.01)
    assert stored["metrics"]["valid/all:loss"]["std_by_step"] == {"4": pytest.approx(0.01)}
    assert main(["sweep", command[1], f"--workdir={tmp_path / 'v'}", "--repeats=2"]) == 2
    assert "2 finished runs; at least 3 are needed" in capsys.readouterr().err


def test_a_diverged_run_has_ended_a_preempted_one_has_not(write, tmp_path, monkeypatch):
    fake_train(monkeypatch)
    found = plan(write('add("a", seeds=2)'), [], tmp_path / "w")
    modes.serial(found, Board(found), modes.Options())
    for run, status in zip(found.runs, ("diverged", "preempted"), strict=True):
        (run.workdir / "summary.json").write_text(json.dumps({"status": status}))
    assert [status_of(run) for run in found.runs] == ["diverged", "preempted"] and todo(found.runs) == found.runs[1:]


def test_slurm_submits_an_array_job_whose_tasks_are_the_runs(write, tmp_path, monkeypatch, capsys):
    """sbatch, squeue and srun are scripts that note their arguments; the job's script then runs as a task of the array would."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    for name, body in (("sbatch", 'printf "%s\\n" "$@" > "$CALLS"; echo "1234;cluster"'), ("squeue", 'cat "$QUEUE"'),
                       ("srun", 'printf "%s\\n" "$@" > "$CALLS"')):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    (tmp_path / "queue").write_text("")
    fake_train(monkeypatch)
    spec, folder = write('add("a b", seeds=2)\nadd("c", steps=3)'), tmp_path / "w"
    done = plan(spec, [], folder)
    modes.serial(done._replace(runs=done.runs[:1]), Board(done), modes.Options())
    command = ["sweep", f"--config={spec}", f"--workdir={folder}", "--mode=slurm", "--sbatch=--gpus-per-node=8 --time=2:00:00"]
    assert main(command) == 0
    assert calls.read_text().splitlines() == ["--parsable", "--array=0-1", f"--output={folder}/slurm-%A_%a.out",
                                              "--gpus-per-node=8", "--time=2:00:00", str(folder / "sweep.sbatch")]
    assert json.loads((folder / "slurm.json").read_text()) == {"job": "1234", "runs": [["a b", 1], ["c", 0]]}
    script = (folder / "sweep.sbatch").read_text()
    contract = pathlib.Path("launch/slurm.sbatch").read_text()
    assert all(line in script.splitlines() for line in contract.splitlines())  # --requeue, the signal, exit codes: all of it
    for task, arguments in (("0", [f"--workdir={folder}/a-b/seed-1", "--config.seed=1"]),
                            ("1", [f"--workdir={folder}/c/seed-0", "--config.steps=3", "--config.seed=0"])):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": "1"}
        assert subprocess.run(["bash", str(folder / "sweep.sbatch")], env=env).returncode == 0
        assert calls.read_text().splitlines() == ["--wait=120", "--kill-on-bad-exit=0", "jaxlm", "train", f"--config={spec}",
                                                  *arguments]
    (tmp_path / "queue").write_text("1234_1 R\n")
    calls.unlink()
    capsys.readouterr()
    assert main(command) == 0 and "job 1234 is still in the queue" in capsys.readouterr().out and not calls.exists()
    conditional = write('add("a")\nadd("b", steps=3, when=lambda loss: True)')
    assert main(["sweep", f"--config={conditional}", f"--workdir={tmp_path / 'v'}", "--mode=slurm"]) == 2
    assert "arm 'b' has a condition" in capsys.readouterr().err


def test_without_slurm_is_one_line(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sweep", f"--config={write('add()')}", f"--workdir={tmp_path / 'w'}", "--mode=slurm"]) == 2
    assert "cannot run sbatch" in capsys.readouterr().err


def test_the_live_table_has_a_row_for_each_arm(write, tmp_path, monkeypatch):
    from rich.console import Console

    fake_train(monkeypatch)
    found = plan(write('add("a", seeds=2)\nadd("b", steps=3)'), [], tmp_path / "w")
    board = Board(found, live=False)
    modes.serial(found._replace(runs=found.runs[:1]), board, modes.Options())
    board.began(found.runs[1])
    found.runs[1].workdir.mkdir(parents=True)
    (found.runs[1].workdir / "metrics.jsonl").write_text('{"step": 2, "loss": 3.25}\n')
    board.ended(found.runs[2], "failed", "no such norm")
    with Console(width=120, record=True, file=open(os.devnull, "w")) as console:
        console.print(board.table())
    text = console.export_text()
    assert "2/3 runs" in text and "●◐" in text and "2/4  3.250" in text and "1.0000" in text and "no such norm" in text


def test_a_search_learns_and_goes_on(write, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    calls = []
    read = lambda folder: json.loads((folder / "config.json").read_text())["config"]["optimizer"]["learning_rate"]
    fake_train(monkeypatch, lambda folder: abs(read(folder) - 0.003), calls)
    spec = write("pass")
    with open(spec, "a") as file:
        file.write("def suggest(trial):\n"
                   "    return {'optimizer.learning_rate': trial.suggest_float('lr', 1e-4, 1e-1, log=True)}\n")
    command = ["sweep", f"--config={spec}", f"--workdir={tmp_path / 'w'}"]
    assert main([*command, "--trials=6"]) == 0 and len(calls) == 6
    assert main([*command, "--trials=15"]) == 0 and len(calls) == 15
    arms = json.loads((tmp_path / "w/sweep.json").read_text())["arms"]
    best = arms[0]["overrides"]["optimizer.learning_rate"]
    assert len(arms) == 15 and abs(best - 0.003) == min(abs(a["overrides"]["optimizer.learning_rate"] - 0.003) for a in arms)
    assert main([*command, "--trials=15", "--mode=print"]) == 2


def test_planning_needs_no_jax(write):
    """What is wrong is told at once, also where JAX takes seconds to start."""
    code = f"import sys; from jaxlm.research.sweep import plan; plan({write('add()')!r}, [], 'w'); print('jax' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.stdout.strip() == "False", result.stderr


def test_arms_that_the_model_is_built_with_go_in_groups_of_their_own(write):
    """mode=vmap: a cap is part of the program, a rate is a number in it, and a clip of 0 is no clip."""
    file = write('''    add.seeds = 2
    add("base")
    add("rate", **{"optimizer.learning_rate": 0.1})
    add("cap", **{"model.final_softcap": 30.0})
    add("no clip", **{"optimizer.clip_norm": 0.0})
''')
    groups = modes.groups_of(plan(file, [], "runs").runs)
    assert sorted(sorted({run.arm for run in group}) for group in groups) == [["base", "rate"], ["cap"], ["no clip"]]
