"""Processes that make shards: `python -m jaxlm.data.workers`, each fed through its standard input by a thread of the one that
builds. They are not children of `multiprocessing`: JAX's threads forbid a fork, and a spawn would run the user's script again."""

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback

from jaxlm.data.store import Job, Piece, make_shard, shard_done
from jaxlm.errors import UserError

ALONE = 2**22  # bytes of sources that no other process is started for


def make_shards(job: Job, tokenizer, todo: list[Piece], pieces: list[Piece], workers: int) -> list[dict]:
    """What is known of the shards of all `pieces`; those of `todo` are made now, by up to `workers` processes."""
    meter = Meter(sum(p.size for p in pieces), sum(p.size for p in pieces) - sum(p.size for p in todo))
    if todo:
        run = here if workers == 1 or sum(piece.size for piece in todo) < ALONE else in_processes
        run(job, tokenizer, todo, workers, meter)
    meter.end()
    return [shard_done(job, piece) for piece in pieces]


class Meter:
    """Says every few seconds how far the tokens are."""

    def __init__(self, total: int, done: int, every: float = 5.0):
        self.total, self.done, self.before, self.every = total, done, done, every
        self.documents, self.began, self.spoke = 0, time.monotonic(), time.monotonic()

    def add(self, documents: int = 0, size: int = 0) -> None:
        self.documents, self.done = self.documents + documents, self.done + size
        if time.monotonic() - self.spoke >= self.every:
            self.say()

    def say(self) -> None:
        self.spoke = time.monotonic()
        spent, share = self.spoke - self.began, self.done / max(1, self.total)
        made = self.done - self.before
        left = f"{spent * (self.total - self.done) / made:,.0f} s left" if made else "time left not known yet"
        print(f"data: tokens of {self.documents:,} documents, {self.documents / max(spent, 1e-9):,.0f} documents/s, {share:.0%} "
              f"of the source, {left}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if time.monotonic() - self.began >= self.every:
            self.say()


def here(job: Job, tokenizer, todo: list[Piece], workers: int, meter: Meter) -> None:
    """One after another in this process; the tokenizer may use threads, unless workers is 1."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
    try:
        for piece in todo:
            make_shard(job, tokenizer, piece, meter.add)
            meter.add(0, piece.size)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def in_processes(job: Job, tokenizer, todo: list[Piece], workers: int, meter: Meter) -> None:
    """Each process takes the next piece when it is done with one. The first problem ends all."""
    count = min(workers, len(todo))
    threads = max(1, workers // count)  # where there are fewer pieces than cores
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": str(threads),
                   "TOKENIZERS_PARALLELISM": "true"}  # one such thread is a tenth faster than none
    command = [sys.executable, "-m", "jaxlm.data.workers"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(count)]
    pieces, news = queue.SimpleQueue(), queue.SimpleQueue()
    for piece in todo:
        pieces.put(piece)
    hello = pickle.dumps((job, tokenizer.to_json()))

    def feed(process):
        try:
            process.stdin.write(hello)
            while not pieces.empty():
                piece = pieces.get_nowait()
                pickle.dump(piece, process.stdin)
                process.stdin.flush()
                while isinstance(answer := pickle.load(process.stdout), int):
                    news.put((answer, 0))
                if answer != "done":
                    news.put(answer)
                    return
                news.put((0, piece.size))
        except queue.Empty:
            pass
        except (OSError, EOFError, pickle.UnpicklingError):
            news.put(ChildProcessError(f"one that made tokens died (exit {process.wait()}), for want of memory perhaps"))
        finally:
            news.put(None)

    feeders = [threading.Thread(target=feed, args=(process,), daemon=True) for process in processes]
    for feeder in feeders:
        feeder.start()
    try:
        ended = 0
        while ended < count:
            new = news.get()
            if new is None:
                ended += 1
            elif isinstance(new, BaseException):
                raise new
            else:
                meter.add(*new)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def serve() -> None:
    """Pickles on standard input: job, tokenizer, then pieces. On standard output, for each piece: numbers of documents that are
    done, then "done" or an exception. Ends with the one who feeds it."""
    import importlib

    from jaxlm.data.tokenizers import load_tokenizer

    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value):
        pickle.dump(value, out)
        out.flush()

    try:
        job, tokenizer = pickle.load(source)
        for module in job.imports:
            importlib.import_module(module)
        tokenizer = load_tokenizer(tokenizer)
        while True:
            piece = pickle.load(source)
            try:
                make_shard(job, tokenizer, piece, answer)
                answer("done")
            except (UserError, OSError) as error:
                answer(error)
            except Exception:
                answer(RuntimeError(f"a process that makes tokens failed:\n{traceback.format_exc()}"))
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    serve()
