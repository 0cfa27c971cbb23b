"""The processes of arms.py, as compare.py sees them."""

import json
import os
import pathlib
import select
import subprocess
import sys
import time


class ArmFailed(Exception):
    def __init__(self, message: str, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """An arm's process. `ask` raises ArmFailed where the arm fails or does not answer before the deadline."""

    def __init__(self, name, size, batch_size, micro_batch, folder, deadline):
        self.deadline, self.log = deadline, pathlib.Path(folder, f"{size}-{name}-{micro_batch}.log")
        cache = self.log.with_suffix(".cache")  # of its compiler: the first worker finds none, a second one what the first left
        here = pathlib.Path(__file__).parent
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
               # Grown as needed up to nearly all, as PyTorch's is.
               "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
               "JAXLM_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache), "TOKENIZERS_PARALLELISM": "false"}
        with open(self.log, "w") as log:
            command = [sys.executable, here / "arms.py", name, size, str(batch_size), str(micro_batch), folder]
            self.process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log)

    def ask(self, do, **arguments):
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the empty line below says it
        ready, _, _ = select.select([self.process.stdout], [], [], max(1.0, self.deadline - time.monotonic()))
        if not ready:
            raise ArmFailed(f"{do}: no answer before --minutes was up")
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing in its log"]
            raise ArmFailed(f"{do}: the process ended with code {self.process.wait()}: {tail[0][:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ArmFailed(f"{do}: {answer['error']}", answer["out_of_memory"])
        return answer

    def stop(self):
        self.process.kill()
        self.process.wait()
