"""Several processes: who we are (one contract of environment variables), start, agree, leave together.

The contract, for every launcher:
    JAXLM_COORDINATOR    host:port of process 0; the port is free on its machine, the same in all processes
    JAXLM_NUM_PROCESSES  processes of the run
    JAXLM_PROCESS_ID     this one's number, 0 ... JAXLM_NUM_PROCESSES - 1
    JAXLM_LOCAL_DEVICES  (optional) devices that each process must see; of GPUs, those it takes where several processes share
                         a machine (default 1)
What is not given is taken from Open MPI, Slurm, a Kubernetes JobSet or a TPU pod. With one process, nothing happens.

Everything here but `start` and `leave` also works with one process, where it costs nothing.
"""

import contextlib
import faulthandler
import glob
import importlib.util
import os
import re
import socket
import sys
import threading
import zlib
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.observe import process_log
from jaxlm.parallel.peers import Peers

VARIABLES = ("JAXLM_COORDINATOR", "JAXLM_NUM_PROCESSES", "JAXLM_PROCESS_ID")

_peers: Peers | None = None
_place: "Place | None" = None
_about = "one process"
_leaving = threading.Lock()


class Place(NamedTuple):
    """Where this process stands in its run."""

    source: str  # what told us
    coordinator: str | None = None  # all three None: JAX finds out by itself (TPU pods)
    num_processes: int | None = None
    process_id: int | None = None
    local_process: int = 0  # among the processes of this machine
    processes_here: int = 1


# ---- Detection -----------------------------------------------------------------------------------------------------------


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


# ---- Start ---------------------------------------------------------------------------------------------------------------


def start(join_seconds: float, peer_seconds: float, facts: dict) -> None:
    """Join the other processes, if there are any; before JAX touches a device.

    facts: {name: text} that must be equal in all processes. Raises UserError or PeerLost.
    """
    global _peers, _place, _about
    place = detect()
    if place is None:
        if os.environ.get("JAXLM_LOCAL_DEVICES"):
            check_devices()
        return
    import jax

    # Orderly stops are agreed on by `jaxlm.train.stop`; JAX's own handler of SIGTERM would hide the signal from it.
    jax.config.update("jax_enable_preemption_service", False)
    facts = {"JAXLM_NUM_PROCESSES": str(place.num_processes), "jax": jax.__version__, **facts}
    options = {"initialization_timeout": int(join_seconds) + 1, "shutdown_timeout_seconds": int(peer_seconds) + 1,
               # Behind our own watch over the line; it is what ends a process whose line's thread hangs too.
               "heartbeat_timeout_seconds": int(1.5 * peer_seconds) + 10}
    if place.coordinator is None:
        place = start_by_jax(place, options)
        if place is None:
            return
    _place = place
    _peers = Peers(place.process_id, place.num_processes, place.coordinator, join_seconds, peer_seconds, facts,
                   lambda process, code, lines: leave(code, lines, process))
    if not jax.distributed.is_initialized():
        host = place.coordinator.rsplit(":", 1)[0]
        jax.distributed.initialize(f"{host}:{_peers.jax_port}", place.num_processes, place.process_id,
                                   local_device_ids=devices_of(place), cluster_detection_method="deactivate", **options)
    check_devices()
    _about = (f"process {place.process_id} of {place.num_processes} (by {place.source}), process 0 at "
              f"{place.coordinator}, {jax.local_device_count()} of {jax.device_count()} devices here")


def about_processes() -> str:
    """The line to show about them."""
    return _about


def start_by_jax(place: Place, options: dict) -> Place | None:
    """TPU pods: JAX first, then our line, to an address that process 0 announces through JAX."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    try:
        jax.distributed.initialize(**options)
    except OSError:  # no metadata to be had: a TPU that is not a cloud's pod
        return None
    if jax.process_count() == 1:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 1))  # sends nothing; picks the interface that leads out
        address = f"{probe.getsockname()[0]}:{port_of(os.environ.get('TPU_WORKER_HOSTNAMES', ''))}"
    text = np.frombuffer(address.ljust(64).encode(), np.uint8)
    address = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).decode().strip()
    return place._replace(coordinator=address, num_processes=jax.process_count(), process_id=jax.process_index())


def devices_of(place: Place) -> list[int] | None:
    """GPUs of this process where several processes share a machine and nobody has dealt them out yet; None: all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    each = int(os.environ.get("JAXLM_LOCAL_DEVICES") or 1)
    if place.processes_here == 1 or (visible is not None and len(visible.split(",")) <= each):
        return None
    return list(range(place.local_process * each, (place.local_process + 1) * each))


def check_devices() -> None:
    """All processes see JAXLM_LOCAL_DEVICES devices. Raises UserError, in every process the same."""
    import jax

    problems = []
    expected = number_of(os.environ, "JAXLM_LOCAL_DEVICES", problems)
    counts = gather([expected, jax.local_device_count()], "devices")
    problems += [f"JAXLM_LOCAL_DEVICES={wanted}: process {i} sees {seen} devices; check its machine, or what its launcher "
                 "gives it" for i, (wanted, seen) in enumerate(counts) if wanted and wanted != seen]
    if problems:
        raise UserError(*problems)


# ---- Together ------------------------------------------------------------------------------------------------------------


def process_id() -> int:
    return _place.process_id if _peers else 0


def num_processes() -> int:
    return _place.num_processes if _peers else 1


def is_main() -> bool:
    """Process 0 writes what the run has once: metrics, summary, report, config."""
    return process_id() == 0


def peers() -> Peers | None:
    return _peers


def gather(value, label: str) -> list:
    """[JSON value of each process]; waits for all. `label` says where we are: if the processes' labels differ, all end."""
    return _peers.gather(value, label) if _peers else [value]


def share(function, label: str):
    """function() of process 0, in all processes (JSON). A UserError there ends all."""
    return gather(function() if is_main() else None, label)[0]


@contextlib.contextmanager
def main_first(label: str):
    """Process 0 goes through the block before the others: it makes what they then find, or, where their disk is another,
    make too."""
    if not is_main():
        gather(None, label)
    yield
    if is_main():
        gather(None, label)


# ---- The end -------------------------------------------------------------------------------------------------------------


def finish() -> None:
    """All processes have come to the same good end; returns when all are there."""
    global _peers
    if _peers:
        _peers.close()
        _peers = None


def leave(code: int, lines: list[str], process: int | None = None) -> None:
    """End this process with `code` and all others with it; never returns. `process` is where it went wrong, if not here.

    Does not unwind: another thread may be waiting for a lost process inside a collective operation for ever.
    """
    _leaving.acquire()  # the first to come here speaks; never released
    here = process is None
    prefix = "" if here or process == process_id() or code == 1 else f"process {process}: "
    for line in lines:
        text = f"jaxlm: {prefix}{line}"
        process_log.write(text)
        print(text, file=sys.stderr)
    if code == 1:
        dump_stacks()
    sys.stdout.flush()
    sys.stderr.flush()
    if _peers:
        _peers.fail(process_id() if here else process, code, lines)
    os._exit(code)


def dump_stacks() -> None:
    """Every thread's Python stack, to stderr and to this process's log."""
    for file in (sys.stderr, process_log.file()):
        if file:
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
