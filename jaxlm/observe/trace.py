"""What a profiler trace says: the operations that took the most time."""

import collections
import gzip
import json
import pathlib


def costly_operations(directory: str, count: int = 10) -> list[tuple[str, float, float]]:
    """-> [(operation, its own milliseconds, share of all operations)] of the newest trace of `jax.profiler` under `directory`,
    most costly first; [] if it names no operations.

    Time is added up over devices, streams and threads; of an operation that contains others (a loop), only what they leave.
    """
    files = sorted(pathlib.Path(directory).glob("plugins/profile/*/*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
    if not files:
        return []
    with gzip.open(files[-1]) as file:
        events = json.load(file)["traceEvents"]
    label = lambda e, kind: e.get("name") == kind and e["args"]["name"]
    processes = {e["pid"]: label(e, "process_name") for e in events if label(e, "process_name")}
    threads = {(e["pid"], e["tid"]): label(e, "thread_name") for e in events if label(e, "thread_name")}
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}

    def is_operation(event):
        if event.get("ph") != "X":
            return False
        if devices:  # a GPU's streams, a TPU's operations
            thread = threads.get((event["pid"], event["tid"]), "")
            return event["pid"] in devices and thread.startswith(("Stream", "XLA Ops"))
        return "hlo_op" in event.get("args", {})

    by_thread = collections.defaultdict(list)
    for event in filter(is_operation, events):
        name = event.get("args", {}).get("hlo_op", event["name"])
        by_thread[event["pid"], event["tid"]].append((event["ts"], -event["dur"], name))
    total = collections.Counter()
    for thread in by_thread.values():
        around = []  # (end, name) of the operations that the present one lies in
        for start, minus, name in sorted(thread):
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                total[around[-1][1]] += minus
            total[name] -= minus
            around.append((start - minus, name))
    everything = sum(total.values())
    return [(name, micros / 1e3, micros / everything) for name, micros in total.most_common(count)]
