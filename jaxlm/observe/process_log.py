"""`<workdir>/logs/process-<i>.log`: what this process has to say, in plain lines: start-up, errors, stack dumps."""

import datetime
import faulthandler
import os
import pathlib
import socket
import sys

_file = None


def open_log(workdir: str, process_id: int, num_processes: int) -> None:
    """From here on lines are kept, those of several starts one after another. With several processes the stacks of a
    process that a signal ends (SIGABRT: JAX's own reaction to a lost peer) go there too, else to stderr."""
    global _file
    close_log()
    folder = pathlib.Path(workdir, "logs")
    folder.mkdir(exist_ok=True)
    _file = open(folder / f"process-{process_id}.log", "a", buffering=1)
    faulthandler.enable(_file if num_processes > 1 else sys.__stderr__)
    write(f"start: {' '.join(sys.argv)} on {socket.gethostname()}, pid {os.getpid()}")


def write(text: str) -> None:
    if _file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        for line in text.splitlines():
            _file.write(f"{now} {line}\n")


def file():
    return _file


def close_log() -> None:
    global _file
    if _file:
        faulthandler.disable()
        _file.close()
        _file = None
