"""Answers for many at once: one thread has the model; requests take its rows as they become free (continuous batching)."""

import collections
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.generate.decoding import Request, Session
from jaxlm.generate.write import Written


class Busy(Exception):
    """The queue is full."""


class Failed(Exception):
    """An answer that will not come: `status` of HTTP and why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Event(NamedTuple):
    """What is new of an answer."""

    index: int  # of the answer, among those of its request
    text: str
    tokens: list  # jaxlm.generate.decoding.Token
    finish: str | None  # "stop", "length", or None: it goes on
    error: Failed | None = None  # it ends so


class Job:
    """One answer that is to be written.

    Args:
        receive: is given each `Event`; called in the engine's thread, by `Engine.deliver`.
        deadline: by time.monotonic().
    """

    def __init__(self, index: int, request: Request, tokenizer, stop: tuple[str, ...], deadline: float, receive: Callable):
        self.index, self.request, self.deadline, self.receive = index, request, deadline, receive
        self.written = Written("", tokenizer, stop, request.stop)
        self.tokens, self.untold = [], []  # all, and those of no event yet
        self.cancelled = False  # nobody waits for it any more
        self.restarted = False
        self.began = time.monotonic()

    def left(self) -> Request:
        """What is still to be written, after what has been: the same samples follow."""
        ids = [token.id for token in self.tokens]
        return self.request._replace(prompt=[*self.request.prompt, *ids], num_tokens=self.request.num_tokens - len(ids))


class Engine:
    """
    Args:
        queue: answers that may wait for a row.
        deliver: takes [(Job, Event)]: from the engine's thread to where requests are answered.
        metrics: jaxlm.serve.metrics.Metrics.
    """

    def __init__(self, generator, params, rows: int, queue: int, deliver: Callable, metrics):
        self.session, self.deliver, self.metrics = Session(generator, params, rows), deliver, metrics
        self.queue, self.waiting, self.running = queue, collections.deque(), {}
        self.changed = threading.Condition()
        self.stopping = self.draining = False
        self.number, self.beat = 0, time.monotonic()
        self.thread = threading.Thread(target=self._run, name="engine")

    # ---- From other threads ----------------------------------------------------------------------------------------------------

    def submit(self, jobs: list[Job]) -> None:
        """All of them or none. Raises Busy, or Failed(503) where the engine is going down."""
        with self.changed:
            if self.draining or not self.thread.is_alive():
                raise Failed(503, "the server is shutting down; ask again elsewhere, or later")
            if len(self.waiting) + len(jobs) > self.queue + self.session.free:
                raise Busy
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]) -> None:
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    def drain(self) -> None:
        """Finish what is being written, refuse the rest."""
        self.draining = True  # no lock: also called by a signal handler, which may hold it already

    def stop(self) -> None:
        with self.changed:
            self.draining = self.stopping = True
            self.changed.notify()
        self.thread.join()

    def silent_seconds(self) -> float:
        """Since the engine was last seen at work; 0 where it has none. A program that is being compiled counts too."""
        return time.monotonic() - self.beat if self.running or self.waiting else 0.0

    # ---- The thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.stopping):
                    self.changed.wait()
            if self.stopping:
                break
            try:
                self._turn()
            except Exception:  # of one turn; the server goes on
                self.metrics.engine_errors.inc()
                traceback.print_exc()
                self._recover()
        self._tell([(job, error_of(job, 503, "the server was stopped")) for job in (*self.running.values(), *self.waiting)])
        self.running.clear()
        self.waiting.clear()

    def _turn(self) -> None:
        """Free rows are filled, then each text gets one more token."""
        self.beat = time.monotonic()
        self._drop()
        while jobs := self._next(self.session.free):
            self._begin(jobs)
        if self.session.busy:
            self._tell(event for token in self.session.step() if (event := self._took(token)))
        self.metrics.rows_busy.set(len(self.running))
        self.metrics.waiting.set(len(self.waiting))

    def _drop(self) -> None:
        """Texts that nobody waits for, or whose time is over."""
        now, told = time.monotonic(), []
        for number, job in list(self.running.items()):
            if job.cancelled or now > job.deadline:
                self.session.cancel(number)
                del self.running[number]
                self.metrics.cancelled.inc()
                told.append((job, error_of(job, 504, "the answer took longer than the server's --timeout")))
        with self.changed:
            over = [job for job in self.waiting if job.cancelled or now > job.deadline or self.draining]
            for job in over:
                self.waiting.remove(job)
        self.metrics.cancelled.inc(len(over))
        for job in over:
            told.append((job, error_of(job, 503, "the server is shutting down") if self.draining else
                         error_of(job, 504, "no row became free within the server's --timeout")))
        self._tell(told)

    def _next(self, count: int) -> list[Job]:
        with self.changed:
            return [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]

    def _begin(self, jobs: list[Job]) -> None:
        begun = {self.number + 1 + i: job for i, job in enumerate(jobs)}
        self.number += len(jobs)
        self.running |= begun
        try:
            tokens = self.session.add([(number, job.left()) for number, job in begun.items()])
        except Exception as error:
            for number in begun:
                del self.running[number]
            if len(jobs) > 1:  # it may be the fault of one
                for job in jobs:
                    self._begin([job])
                return
            if not isinstance(error, UserError):
                self.metrics.engine_errors.inc()
                traceback.print_exc()
            self._tell([(jobs[0], error_of(jobs[0], 400 if isinstance(error, UserError) else 500,
                                           f"{type(error).__name__}: {error}"))])
            return
        for job in jobs:
            if not job.tokens:
                self.metrics.first_token_seconds.observe(time.monotonic() - job.began)
                self.metrics.prompt_tokens.inc(len(job.request.prompt))
        self._tell([event for token in tokens if (event := self._took(token))])

    def _took(self, token) -> tuple[Job, Event] | None:
        job = self.running[token.request]
        job.tokens.append(token)
        job.untold.append(token)
        self.metrics.tokens.inc()
        try:
            new = job.written.add(token)
        except Exception as error:  # of this text alone
            self.metrics.engine_errors.inc()
            traceback.print_exc()
            event = error_of(job, 500, f"{type(error).__name__}: {error}")
        else:
            ended = job.written.inner.stopped or token.id in job.request.stop
            finish = None if not job.written.done else "stop" if ended else "length"
            if not (new or finish):
                return None
            event, job.untold = Event(job.index, new, job.untold, finish), []
        if event.finish or event.error:
            self.session.cancel(token.request)
            del self.running[token.request]
        return job, event

    def _recover(self) -> None:
        """After a step that failed, whose rows are lost: each text goes on from what it has, once."""
        self.session.clear()
        lost, self.running = list(self.running.values()), {}
        self._tell([(job, error_of(job, 500, "the model's program failed twice")) for job in lost if job.restarted])
        with self.changed:
            for job in reversed([job for job in lost if not job.restarted]):
                job.restarted = True
                self.waiting.appendleft(job)

    def _tell(self, events) -> None:
        if events := [(job, event) for job, event in events if not job.cancelled]:
            self.deliver(events)


def error_of(job: Job, status: int, message: str) -> Event:
    return Event(job.index, "", [], None, Failed(status, message))
