"""Who this process is: one contract of environment variables, for every launcher.

    JAXLM_COORDINATOR    host:port of process 0; the port is free on its machine, the same in all processes
    JAXLM_NUM_PROCESSES  processes of the run
    JAXLM_PROCESS_ID     this one's number, 0 ... JAXLM_NUM_PROCESSES - 1
    JAXLM_LOCAL_DEVICES  (optional) devices that each process must see; of GPUs, those it takes where several processes share
                         a machine (default 1)

What is not given is taken from Open MPI, Slurm, a Kubernetes JobSet or a TPU pod.
"""

import glob
import importlib.util
import os
import re
import zlib
from typing import NamedTuple

from jaxlm.errors import UserError

VARIABLES = ("JAXLM_COORDINATOR", "JAXLM_NUM_PROCESSES", "JAXLM_PROCESS_ID")


class Place(NamedTuple):
    """Where this process stands in its run."""

    source: str  # what told us
    coordinator: str | None = None  # all three None: JAX finds out by itself (TPU pods)
    num_processes: int | None = None
    process_id: int | None = None
    local_process: int = 0  # among the processes of this machine
    processes_here: int = 1


def detect(env=os.environ) -> Place | None:
    """The place that the environment gives this process, None if it is the only one. Raises UserError, naming the
    variable, where settings are partial, malformed or contradict each other."""
    found = next((place for detector in (open_mpi, slurm, jobset) if (place := detector(env))), None)
    given = {name: env[name] for name in VARIABLES if env.get(name)}
    if not given:
        if found is None:
            return tpu_pod(env)
        if missing := [v for v, x in zip(VARIABLES, found[1:4], strict=True) if x is None]:
            raise UserError(*(f"{name}: is not set, and {found.source} does not tell; set it" for name in missing))
        return found if found.num_processes > 1 else None

    problems = []
    numbers = {name: number_of(env, name, problems) for name in VARIABLES[1:]}
    count, index = numbers["JAXLM_NUM_PROCESSES"], numbers["JAXLM_PROCESS_ID"]
    coordinator = given.get("JAXLM_COORDINATOR")
    if coordinator and not re.fullmatch(r"[^\s]+:\d{1,5}", coordinator):
        problems.append(f"JAXLM_COORDINATOR={coordinator}: give host:port of process 0, such as node1:8476")
    if found and found.num_processes and count and found.num_processes != count:
        problems.append(f"JAXLM_NUM_PROCESSES={count}: {found.source} started {found.num_processes}; unset one of them")
    if found and index is not None and found.process_id is not None and found.process_id != index:
        problems.append(f"JAXLM_PROCESS_ID={index}: {found.source} says {found.process_id}; unset JAXLM_PROCESS_ID")
    if found:
        coordinator, count = coordinator or found.coordinator, count or found.num_processes
        index = found.process_id if index is None else index
    if not problems and count == 1:
        return None
    values = dict(zip(VARIABLES, (coordinator, count, index), strict=True))
    if not problems:
        others = " and ".join(given)
        problems += [f"{name}: is not set, though {others} is; set it" for name, value in values.items() if value is None]
    if not problems and not 0 <= index < count:
        problems.append(f"JAXLM_PROCESS_ID={index}: must be 0 to JAXLM_NUM_PROCESSES - 1 = {count - 1}")
    if problems:
        raise UserError(*problems)
    source = ", ".join(given) + (f" and {found.source}" if found and len(given) < 3 else "")
    local = (found.local_process, found.processes_here) if found else (0, 1)
    return Place(source, coordinator, count, index, *local)


def number_of(env, name, problems) -> int | None:
    text = env.get(name)
    if not text:
        return None
    if not re.fullmatch(r"\d+", text) or (name != "JAXLM_PROCESS_ID" and text == "0"):
        problems.append(f"{name}={text}: must be a whole number" + ("" if name == "JAXLM_PROCESS_ID" else ", at least 1"))
        return None
    return int(text)


def open_mpi(env) -> Place | None:
    """JAX's own detector reads a variable that Open MPI 5 no longer sets."""
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    size, local_size = int(env["OMPI_COMM_WORLD_SIZE"]), int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    if match := re.search(r"tcp6?://\[?([^,\]:]+)", uri):
        host = match[1]
    else:
        host = "127.0.0.1" if local_size == size else None  # of several machines nothing tells process 0's address
    job = uri.split(".")[0] or env.get("PMIX_NAMESPACE", "")
    return Place("Open MPI", host and f"{host}:{port_of(job)}", size, int(env["OMPI_COMM_WORLD_RANK"]),
                 int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)), local_size)


def slurm(env) -> Place | None:
    """A step that srun started. (JAX's own detector also takes a batch script for a task, and shows one GPU to a process
    that has its node for itself.)"""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in env for name in needed):
        return None
    first = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", env["SLURM_STEP_NODELIST"])[0]  # node[003-010],other -> node[003-010]
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    tasks_per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    port = port_of(f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', 0)}")
    return Place("Slurm", f"{host}:{port}", int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"]),
                 int(env.get("SLURM_LOCALID", 0)), int(tasks_per_node[0]))


def jobset(env) -> Place | None:
    """A pod of an indexed Job in a JobSet (launch/k8s-jobset.yaml). (JAX's own detector asks the Kubernetes API, which
    needs a package and a role.) The number of processes is not in a pod's environment: JAXLM_NUM_PROCESSES tells."""
    needed = ("JOB_COMPLETION_INDEX", "JOBSET_NAME", "REPLICATED_JOB_NAME")
    if any(not env.get(name) for name in needed):
        return None
    name = env["JOBSET_NAME"]
    return Place("Kubernetes JobSet", f"{name}-{env['REPLICATED_JOB_NAME']}-0-0.{name}:8476", None,
                 int(env["JOB_COMPLETION_INDEX"]))


def tpu_pod(env) -> Place | None:
    """JAX asks the TPU machine's metadata itself; we only tell whether this is one."""
    if "cpu" in env.get("JAX_PLATFORMS", "") or importlib.util.find_spec("libtpu") is None:
        return None
    workers = env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or ""
    on_gce = not env.get("TPU_SKIP_MDS_QUERY") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return Place("TPU pod") if "," in workers or (on_gce and not workers) else None


def port_of(job: str) -> int:
    """A port for a job, above those that systems hand out by themselves."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def devices_of(place: Place) -> list[int] | None:
    """GPUs of this process where several processes share a machine and nobody has dealt them out yet; None: all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    each = int(os.environ.get("JAXLM_LOCAL_DEVICES") or 1)
    if place.processes_here == 1 or (visible is not None and len(visible.split(",")) <= each):
        return None
    return list(range(place.local_process * each, (place.local_process + 1) * each))
