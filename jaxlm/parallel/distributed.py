"""Several processes: start, agree, leave together. Who this process is, `jaxlm.parallel.place` finds out.

With one process nothing happens: all here but `leave` works there too, and costs nothing.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading

from jaxlm.errors import UserError
from jaxlm.observe import process_log
from jaxlm.parallel.peers import Peers
from jaxlm.parallel.place import Place, detect, devices_of, number_of, port_of

_peers: Peers | None = None
_place: Place | None = None
_about = "one process"
_leaving = threading.Lock()


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
