"""Where a benchmark's result goes: benchmarks/results/<date>-<name>.json, with the machine and the versions."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

from jaxlm.train.rundir import git_commit

RESULTS = pathlib.Path(__file__).parent / "results"


def check_idle(limit: float = 0.5) -> None:
    """Timings on a loaded machine are not facts. `--force` goes on, and the load is in the result."""
    if os.getloadavg()[0] > limit and "--force" not in sys.argv:
        raise SystemExit(f"load average {os.getloadavg()[0]:.2f} > {limit}: wait, or pass --force")


def machine() -> dict:
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy",
                    "scikit-learn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": cpu[0] if cpu else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "python": platform.python_version(), "versions": versions, "gpus": gpus()}


def gpus() -> list[str]:
    """A line for each NVIDIA GPU, as nvidia-smi prints it."""
    fields = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,memory.total"
    try:
        run = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return []
    return run.stdout.strip().splitlines() if run.returncode == 0 else []


def save(name: str, result: dict, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    now = datetime.datetime.now(datetime.UTC)
    out = {"name": name, "date": now.isoformat(timespec="seconds"), "commit": git_commit(), "command": sys.argv,
           "machine": machine(), **result}
    file = folder / f"{now:%Y-%m-%d}-{name}.json"
    file.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {file}")
    return file


if __name__ == "__main__":  # keep the summary of a finished run, and what `time` said of the command
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python benchmarks/record.py NAME WORKDIR [WALL_SECONDS]")
    folder = pathlib.Path(sys.argv[2])
    wall = float(sys.argv[3]) if len(sys.argv) == 4 else None
    save(sys.argv[1], {"wall_seconds": wall, "summary": json.loads((folder / "summary.json").read_text()),
                       "config": json.loads((folder / "config.json").read_text())["config"]})
