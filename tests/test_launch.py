"""The launchers: shell scripts are checked, the JobSet against its API, the TPU script dry, Slurm for real on one node."""

import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import HASTY

SCRIPTS = sorted(str(p) for p in pathlib.Path("launch").iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian: shellcheck)")
def test_shell_scripts_are_sound():
    result = subprocess.run(["shellcheck", "--severity=warning", *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_launcher_runs_the_same_command():
    for name in ("local_cluster.sh", "slurm.sbatch"):
        assert 'jaxlm train "$@"' in pathlib.Path("launch", name).read_text(), name


def test_the_jobset_is_one_by_its_api():
    """Against the models that the Kubeflow project generates from JobSet's and Kubernetes' own API definitions."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load(pathlib.Path("launch/k8s-jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
    assert job["completionMode"] == "Indexed" and str(job["completions"]) == str(job["parallelism"]) == env["JAXLM_NUM_PROCESSES"]
    assert env["JAXLM_LOCAL_DEVICES"] == str(container["resources"]["limits"]["nvidia.com/gpu"])

    from jaxlm.parallel.place import detect

    pod = {"JOB_COMPLETION_INDEX": "1", "JOBSET_NAME": jobset["metadata"]["name"],
           "REPLICATED_JOB_NAME": jobset["spec"]["replicatedJobs"][0]["name"], "JAX_PLATFORMS": "cpu",
           "JAXLM_NUM_PROCESSES": env["JAXLM_NUM_PROCESSES"]}
    place = detect(pod)  # JobSet's host names: <jobset>-<job>-<job index>-<pod index>.<jobset>
    assert place[1:4] == ("jaxlm-workers-0-0.jaxlm:8476", 2, 1) and container["ports"] == [{"containerPort": 8476}]

    for quantity in container["resources"].pop("limits").values():  # the models know quantities as objects only
        assert re.fullmatch(r"\d+(\.\d+)?(m|[kMGTP]i?)?", str(quantity))
    read = models.JobsetV1alpha2JobSet.model_validate(jobset)
    assert contains(read.to_dict(), jobset) == []
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3  # the check does find a wrong name
    assert contains(models.JobsetV1alpha2JobSet.model_validate(jobset).to_dict(), jobset) == [".spec.failurePolicy.maxRestart"]


def contains(read, written, path="") -> list[str]:
    """Paths that were written but not understood."""
    if isinstance(written, dict):
        return [p for k, v in written.items()
                for p in (contains(read[k], v, f"{path}.{k}") if isinstance(read, dict) and k in read else [f"{path}.{k}"])]
    if isinstance(written, list):
        return [p for i, v in enumerate(written) for p in contains(read[i], v, f"{path}[{i}]")]
    return [] if read == written else [path]


def test_tpu_vm_runs_the_command_on_every_machine_and_again_after_preemption(tmp_path):
    """A dry run: gcloud is a script that notes its arguments; training is preempted once."""
    (tmp_path / "gcloud").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$*" >> "$CALLS"\n'
        '[[ $* == *"jaxlm train"* && ! -e $CALLS.once ]] && { touch "$CALLS.once"; exit 75; }\nexit 0\n')
    (tmp_path / "gcloud").chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    args = ["bash", "launch/tpu-vm.sh", "pod", "us-east5-a", "--config=configs/llama_1b.py", "--config.eval.sample_prompt=a b"]
    result = subprocess.run(args, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    copy, install, *trains = calls.read_text().splitlines()
    assert copy.startswith("compute tpus tpu-vm scp ") and copy.endswith("pod:jaxlm.tar.gz --zone=us-east5-a --worker=all")
    assert "launch/setup.sh tpu" in install and len(trains) == 2 and trains[0] == trains[1]
    assert trains[0].startswith("compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all --command=cd jaxlm && ")
    assert trains[0].endswith(r"jaxlm train --config=configs/llama_1b.py --config.eval.sample_prompt=a\ b")
    assert subprocess.run(args[:3], capture_output=True).returncode == 2


# ---- Slurm ---------------------------------------------------------------------------------------------------------------

one_worker = pytest.mark.xdist_group("slurm")
TINY = ["--config=configs/default.py", "--config.batch_size=4", "--config.seq_len=8", "--config.model.num_layers=1",
        "--config.model.embed_dim=16", "--config.model.num_heads=1", "--config.eval.batches=1",
        "--config.eval.every_steps=0", "--config.checkpoint.every_steps=0", "--config.observe.log_every=10"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """munged, slurmctld and slurmd of this machine, one node of two CPUs, all on loopback -> environment for sbatch."""
    wanted = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
    find = functools.partial(shutil.which, path=f"{os.environ['PATH']}:/usr/sbin")
    if missing := [name for name in wanted if not find(name)]:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}; Debian: slurm-wlm munge)")
    if os.getuid():
        pytest.skip("slurmd must be started by root")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(64))
    (folder / "key").chmod(0o600)
    (folder / "bin" / "jaxlm").write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxlm.cli "$@"\n')
    (folder / "bin" / "jaxlm").chmod(0o755)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    control, daemon = (s.getsockname()[1] for s in sockets)
    for s in sockets:
        s.close()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
""")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin",
           "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": HASTY}
    munged = [find("munged"), "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
    daemons = []
    try:
        for command in (munged, [find("slurmctld"), "-D"], [find("slurmd"), "-D", "-N", "localhost"]):
            log = open(folder / (pathlib.Path(command[0]).name + ".out"), "w")
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(60):
            nodes = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
            if nodes.stdout.strip() == "idle":
                break
            time.sleep(0.5)
        else:
            logs = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in sorted(folder.glob("*.log")))
            raise AssertionError(f"Slurm did not start: {nodes.stdout}{nodes.stderr}\n{logs}")
        yield env
    finally:
        subprocess.run(["scancel", "--state=RUNNING"], env=env, capture_output=True)
        subprocess.run(["scancel", "--state=PENDING"], env=env, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


@one_worker
def test_slurm_trains_on_two_tasks_requeues_after_sigterm_and_ends(slurm, tmp_path):
    run = tmp_path / "run"
    args = ["sbatch", "--ntasks-per-node=2", f"--output={tmp_path}/out", "launch/slurm.sbatch", f"--workdir={run}",
            *TINY, "--config.steps=200"]
    submitted = subprocess.run(args, env=slurm, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 3, tmp_path)
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)  # what --signal=TERM@120 sends: to the tasks
    wait_for(lambda: "back to the queue" in (tmp_path / "out").read_text(), tmp_path)
    assert json.loads((run / "summary.json").read_text())["exit_code"] == 75
    # Slurm waits two minutes before it starts a requeued job; the test does not.
    ask = lambda *words: subprocess.run(words, env=slurm, capture_output=True, text=True).stdout
    wait_for(lambda: ask("scontrol", "update", f"JobId={job}", "StartTime=now") or "resuming" in (tmp_path / "out").read_text(),
             tmp_path)
    # The run writes its summary, then says so; srun hands the words on a little later.
    wait_for(lambda: "completed: step 200" in (tmp_path / "out").read_text(), tmp_path)
    assert json.loads((run / "summary.json").read_text())["exit_code"] == 0
    output = (tmp_path / "out").read_text()
    assert output.count("process 0 of 2 (by Slurm), process 0 at localhost:") == 2, output
    assert "preempted: SIGTERM at step" in output and "resuming at step" in output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(10, 201, 10), 200]
    assert sorted(p.name for p in (run / "logs").iterdir()) == ["process-0.log", "process-1.log"]
    wait_for(lambda: {"JobState=COMPLETED", "ExitCode=0:0"} <= set(ask("scontrol", "show", "job", job).split()), tmp_path)


@one_worker
def test_a_job_that_is_cancelled_stays_so(slurm, tmp_path):
    args = ["sbatch", "--ntasks-per-node=2", f"--output={tmp_path}/out", "launch/slurm.sbatch", f"--workdir={tmp_path}/run",
            *TINY, "--config.steps=100000"]
    job = subprocess.run(args, env=slurm, capture_output=True, text=True, check=True).stdout.split()[-1]
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") > 2, tmp_path)
    subprocess.run(["scancel", job], env=slurm, check=True)
    state = lambda: subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True).stdout
    wait_for(lambda: "JobState=CANCELLED" in state() and "forcing job termination" in (tmp_path / "out").read_text(), tmp_path)
    time.sleep(7)  # longer than KillWait: the batch script has ended
    assert "JobState=CANCELLED" in state() and "back to the queue" not in (tmp_path / "out").read_text()


def wait_for(condition, tmp_path, seconds=150):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, ValueError):  # not there yet, or half written
            pass
        time.sleep(0.2)
    raise AssertionError((tmp_path / "out").read_text() if (tmp_path / "out").exists() else "the job never began")
