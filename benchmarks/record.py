"""Where a benchmark's result goes: benchmarks/results/<date>-<name>.json, with the machine and the versions."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

from jaxlm.train.rundir import git_commit


def check_idle(limit: float = 0.5) -> None:
    """Timings on a loaded machine are not facts. `--force` goes on, and the load is in the result."""
    if os.getloadavg()[0] > limit and "--force" not in sys.argv:
        raise SystemExit(f"load average {os.getloadavg()[0]:.2f} > {limit}: wait, or pass --force")


def machine() -> dict:
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": cpu[0] if cpu else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "python": platform.python_version(), "versions": versions}


def save(name: str, result: dict) -> None:
    now = datetime.datetime.now(datetime.UTC)
    out = {"name": name, "date": now.isoformat(timespec="seconds"), "commit": git_commit(), "command": sys.argv,
           "machine": machine(), **result}
    file = pathlib.Path(__file__).parent / "results" / f"{now:%Y-%m-%d}-{name}.json"
    file.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {file}")


if __name__ == "__main__":  # keep the summary of a finished run, and what `time` said of the command
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python benchmarks/record.py NAME WORKDIR [WALL_SECONDS]")
    folder = pathlib.Path(sys.argv[2])
    wall = float(sys.argv[3]) if len(sys.argv) == 4 else None
    save(sys.argv[1], {"wall_seconds": wall, "summary": json.loads((folder / "summary.json").read_text()),
                       "config": json.loads((folder / "config.json").read_text())["config"]})
