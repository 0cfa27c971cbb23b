"""How the runs of a sweep are made: printed, one after another here or as one program, in processes of this machine, or by
Slurm.

A mode is `(sweep, board, options) -> None`. It takes what is to do from `waves`, tells the board when a run begins and ends, and
lets one that fails not stop the others.
"""

import collections
import contextlib
import glob
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.config import call, flatten
from jaxlm.errors import Diverged, Preempted, UserError
from jaxlm.registry import Registry
from jaxlm.research.board import Board
from jaxlm.research.sweep import Run, Sweep, mean_losses, todo
from jaxlm.train.rundir import write_json

MODES = Registry("mode", key="--mode")
ROOT = pathlib.Path(__file__).parents[2]  # the checkout, or where jaxlm is installed


class Options(NamedTuple):
    workers: int = 0  # of mode=processes; 0: one for each GPU, or for each CPU core
    sbatch: str = ""  # of mode=slurm: more arguments, such as "--gpus-per-node=8 --time=2:00:00"


def waves(sweep: Sweep, board: Board) -> Iterator[list[Run]]:
    """Runs that are not done yet and may go at the same time. Arms whose condition turns out false are left out."""
    for arms in sweep.waves():
        chosen = []
        for arm in arms:
            if arm.when is None or call(sweep.spec.partition(":")[0], arm.when, mean_losses(sweep.runs)):
                chosen.append(arm)
            else:
                for run in sweep.runs_of([arm]):
                    board.ended(run, "left out")
        yield todo(sweep.runs_of(chosen))


@MODES.register("print")
def print_commands(sweep: Sweep, board: Board, options: Options) -> None:
    """One shell command a line; what is done is a comment."""
    waiting = {run.workdir for run in todo(sweep.runs)}
    for arm in sweep.arms:
        if arm.when:
            print(f"# {arm.name}: only if its condition holds")
        for run in sweep.runs_of([arm]):
            print(("" if run.workdir in waiting else "# done: ") + shlex.join(["jaxlm", *run.command(sweep.spec)]))


@MODES.register("serial")
def serial(sweep: Sweep, board: Board, options: Options) -> None:
    """One after another in this process, which starts Python and JAX only once."""
    from jaxlm.train.loop import train
    from jaxlm.verbs.start import start_jax

    start_jax(sweep.runs[0].config)
    for runs in waves(sweep, board):
        for run in runs:
            run.config.observe.progress = "none"  # the board shows it
            board.began(run)
            try:
                train(run.config, str(run.workdir), process_start=time.time(), overrides=run.overrides)
                board.ended(run, "completed")
            except Preempted:
                board.ended(run, "preempted")
                raise
            except Diverged as error:
                board.ended(run, "diverged", str(error))
            except Exception as error:  # whatever it is, it is this run's
                text = "; ".join(error.problems) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                board.ended(run, "failed", text.splitlines()[0])


@MODES.register("vmap")
def vmap(sweep: Sweep, board: Board, options: Options) -> None:
    """Runs that differ in numbers alone as one program (`jaxlm.research.ensemble`), one group after another in this process."""
    from jaxlm.research.ensemble import train_ensemble
    from jaxlm.verbs.start import start_jax

    start_jax(sweep.runs[0].config)
    for runs in waves(sweep, board):
        for group in groups_of(runs):
            for run in group:
                run.config.observe.progress = "none"  # the board shows it
                board.began(run)
            try:
                summaries = train_ensemble([run.config for run in group], [str(run.workdir) for run in group],
                                           overrides=sorted({o for run in group for o in run.overrides}))
                for run, summary in zip(group, summaries, strict=True):
                    board.ended(run, summary["status"])
            except Preempted:
                for run in group:
                    board.ended(run, "preempted")
                raise
            except Exception as error:  # whatever it is, it is this group's
                text = "; ".join(error.problems) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                for run in group:
                    board.ended(run, "diverged" if isinstance(error, Diverged) else "failed", text.splitlines()[0])


def groups_of(runs: list[Run]) -> list[list[Run]]:
    """Those that differ only in what members of one ensemble may, as far as the keys tell."""
    from jaxlm.research.members import may_differ

    groups = collections.defaultdict(list)
    for run in runs:
        groups[repr({key: v for key, v in flatten(run.config).items() if not may_differ(key, v)})].append(run)
    return list(groups.values())


# ---- Processes --------------------------------------------------------------------------------------------------------------


@MODES.register("processes")
def processes(sweep: Sweep, board: Board, options: Options) -> None:
    """Several at a time, each `jaxlm train` of its own on its share of the CPU cores, or its GPU; it writes to output.txt."""
    workers = options.workers or len(gpus()) or len(cores())
    stop, old = [], {}
    try:
        old = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        for runs in waves(sweep, board):
            run_all(runs, sweep, board, workers, stop)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_all(runs: list[Run], sweep: Sweep, board: Board, workers: int, stop: list) -> None:
    waiting, active, free, told = collections.deque(runs), {}, list(range(workers)), False
    try:
        while (waiting and not stop) or active:
            while waiting and free and not stop:
                run, slot = waiting.popleft(), free.pop(0)
                active[start(run, sweep, slot, workers)] = run, slot
                board.began(run)
            if stop and not told:
                told = True  # once: a second signal would end them before they have saved
                for process in active:
                    process.terminate()  # each saves and exits 75
            for process in [p for p in active if p.poll() is not None]:
                run, slot = active.pop(process)
                free.append(slot)
                board.ended(run, *outcome(run, process.returncode))
            time.sleep(0.05)
    finally:
        for process in active:
            process.kill()
    if stop:
        raise Preempted(f"{signal.Signals(stop[0]).name}: its runs have saved; run the same command again to go on")


def start(run: Run, sweep: Sweep, slot: int, workers: int) -> subprocess.Popen:
    run.workdir.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [
        str(ROOT), os.environ.get("PYTHONPATH")]))}
    mine = cores()
    if gpus():
        env["CUDA_VISIBLE_DEVICES"] = gpus()[slot % len(gpus())]
    else:
        mine = mine[slot::workers] or [mine[slot % len(mine)]]
    command = [sys.executable, "-m", "jaxlm.cli", *run.command(sweep.spec), "--config.observe.progress=lines"]
    with open(run.workdir / "output.txt", "a") as output, on_cores(mine):  # in a session of its own: Ctrl-C is ours to pass on
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


@contextlib.contextmanager
def on_cores(mine: list[int]):
    """What is started meanwhile has these CPU cores, where the system can say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine)
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def outcome(run: Run, code: int) -> tuple[str, str]:
    """-> (status, reason) of a process that ended with `code`."""
    if code == 0:
        return "completed", ""
    lines = (run.workdir / "output.txt").read_text(errors="replace").splitlines() or [""]
    reason = next((line.removeprefix("jaxlm: ") for line in reversed(lines) if line.startswith("jaxlm: ")), lines[-1])
    return {3: "diverged", 75: "preempted"}[code] if code in (3, 75) else "failed", reason or f"exit code {code}"


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def gpus() -> list[str]:
    """Of NVIDIA, those that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


# ---- Slurm ------------------------------------------------------------------------------------------------------------------


@MODES.register("slurm")
def slurm(sweep: Sweep, board: Board, options: Options) -> None:
    """An array job of launch/slurm.sbatch: a task for each run that is not done. Given again, it submits what has failed."""
    if conditional := [arm.name for arm in sweep.arms if arm.when]:
        raise UserError(f"--mode=slurm: arm {conditional[0]!r} has a condition, and an array job knows no results; use "
                        "--mode=processes, or leave it out")
    record, queued = sweep.workdir / "slurm.json", []
    if record.is_file():
        job = json.loads(record.read_text())["job"]
        queued = ask("squeue", "--noheader", f"--jobs={job}", check=False).splitlines()
        if queued:
            print(f"job {job} is still in the queue ({len(queued)} lines of squeue); nothing submitted")
            return
    runs = todo(sweep.runs)
    if not runs:
        print("every run is done; nothing submitted")
        return
    script = sweep.workdir / "sweep.sbatch"
    script.write_text(array_script(sweep, runs))
    job = ask("sbatch", "--parsable", f"--array=0-{len(runs) - 1}", f"--output={sweep.workdir}/slurm-%A_%a.out",
              *shlex.split(options.sbatch), str(script)).strip().partition(";")[0]
    write_json(record, {"job": job, "runs": [[run.arm, run.seed] for run in runs]})
    print(f"submitted job {job}: {len(runs)} runs; when they are done: jaxlm report {sweep.workdir}")


def array_script(sweep: Sweep, runs: list[Run]) -> str:
    """launch/slurm.sbatch, whose arguments are those of the task's run."""
    file = ROOT / "launch" / "slurm.sbatch"
    if not file.is_file():
        raise UserError(f"--mode=slurm: no {file}; run from a checkout of jaxlm")
    head, marker, body = file.read_text().partition("set -uo pipefail\n")
    cases = [f"{i}) set -- {shlex.join(run.command(sweep.spec)[1:])} ;;" for i, run in enumerate(runs)]
    return "\n".join([head + marker + 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", body])


def ask(*words: str, check: bool = True) -> str:
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--mode=slurm: cannot run {words[0]} ({error.strerror}); run where Slurm is") from error
    if check and result.returncode:
        raise UserError(f"--mode=slurm: {words[0]} refused: {(result.stderr or result.stdout).strip()}")
    return "" if result.returncode else result.stdout


def failures(sweep: Sweep, board: Board) -> list[str]:
    """One line for each run that failed."""
    return [f"arm {run.arm!r}, seed {run.seed}: {board.reasons[run.workdir] if run.workdir in board.reasons else 'failed'}"
            for run in sweep.runs if board.status[run.workdir] == "failed"]
