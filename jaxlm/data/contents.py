"""Contents of files by their hash: what a token store is told apart by."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import time

from jaxlm.data.formats import open_binary


def content_of(files: list[str], root: pathlib.Path) -> dict[str, dict]:
    """{file: {"sha256", "bytes", "state"}}. What was hashed once is not read again while size, times and inode (elsewhere: what
    the file system says of the object) stay the same; a file that was touched just now is, as it may change unseen."""
    memory = root / f"hashes-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    began, states = time.time(), {file: state_of(file) for file in files}
    facts = {file: known[file] for file, (state, _) in states.items() if file in known and known[file]["state"] == state}
    new = [file for file in states if file not in facts]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for file, (digest, size) in zip(new, pool.map(hash_file, new), strict=True):
            facts[file] = {"sha256": digest, "bytes": size, "state": states[file][0]}
    lasting = {file: fact for file, fact in facts.items() if states[file][1] < began - 2}
    if lasting != known:
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(lasting))
            temporary.replace(memory)
        except OSError:
            pass  # then they are hashed again next time
    return facts


def state_of(file: str) -> tuple[str, float]:
    """(what is another if the file is another, when it was last changed)."""
    if "://" not in file:
        found = os.stat(file)
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}", max(found.st_mtime, found.st_ctime)
    from fsspec.core import url_to_fs

    system, path = url_to_fs(file)
    return str(system.ukey(path)), 0.0


def hash_file(file: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open_binary(file) as source:
        while block := source.read(2**20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
