"""The run directory: config.json says what the run is; a work directory belongs to one config."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess

from jaxlm.config import diff, fingerprint
from jaxlm.data.store import changed_sources
from jaxlm.data.tokenizers import learns
from jaxlm.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy", "tokenizers")


def open_run_directory(workdir: str, config, allow_config_change: bool, compiler_options: dict,
                       data: str | None = None) -> None:
    """Make the directory and write config.json, or check that the one there is the same experiment; if only what does not
    make the experiment changed (the mesh, say), it tells of the new values.

    data: `jaxlm.data.loader.Data.fingerprint`. Raises UserError: not writable, another config (with the diff), or other text.
    """
    file = pathlib.Path(workdir, "config.json")
    values = json.loads(config.to_json())
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if file.exists():
        try:
            stored = json.loads(file.read_text())
            old, started = stored["config"], stored["started"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{file}: cannot be read ({error}); use another --workdir") from error
        changes = diff(old, values)
        if changes and not allow_config_change:
            raise UserError(f"{workdir}: belongs to another config ({'; '.join(changes)}); use another --workdir, "
                            "or --allow_config_change to go on with the new one")
        known = stored["data"] if "data" in stored else None
        if not allow_config_change and known not in (None, data):
            raise UserError(f"{workdir}: its text is no longer what it was when the run began "
                            f"({'; '.join(changed_sources(config, known))}); put the old text back, use another "
                            "--workdir, or --allow_config_change to go on with the new one")
        if old == values and known == data:
            return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"config": values, "fingerprint": fingerprint(config), "data": data, "commit": git_commit(),
                          "started": started, "compiler_options": compiler_options,
                          "packages": {p: importlib.metadata.version(p) for p in PACKAGES}})
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); free space or choose another "
                        "directory") from error


def keep_tokenizer(workdir: str, config, tokenizer) -> None:
    """<workdir>/tokenizer.json, of a tokenizer that was made of the run's text: what starts from the run takes it over, and
    `data.tokenizer=<workdir>` names it. A tokenizer that came as a file stays where it is."""
    if learns(config):
        write_text(os.path.join(workdir, "tokenizer.json"), tokenizer.to_json())


def completed_summary(workdir: str) -> dict | None:
    """summary.json of a run that is done: running its command again changes nothing."""
    file = pathlib.Path(workdir, "summary.json")
    summary = json.loads(file.read_text()) if file.exists() else None
    return summary if summary and summary["status"] == "completed" else None


def write_json(file, value) -> None:
    write_text(file, json.dumps(value, indent=1))


def write_text(file, text: str) -> None:
    temporary = f"{file}.tmp{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
    os.replace(temporary, file)


def git_commit() -> str | None:
    """The commit of the jaxlm checkout, "-dirty" if edited; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(("git", "-C", here, *args), capture_output=True, text=True, timeout=5)
        head = run("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("-dirty" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
