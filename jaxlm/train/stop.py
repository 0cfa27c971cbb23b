"""Ends before the last step, which all processes agree on: SIGTERM and SIGINT, with a save; and early stopping."""

import json
import math
import os
import pathlib
import signal

from jaxlm.checkpoint.manager import higher_is_better
from jaxlm.errors import UserError
from jaxlm.parallel import distributed


class StopSignal:
    """Asks for a save and a clean end, whichever process the signal reaches; a second one acts at once."""

    def __init__(self, first_step: int):
        self.name, self._received, self._passed_on, self._old = "", False, False, {}
        self.peers = distributed.peers()
        if self.peers:
            self.peers.begin(first_step)
        try:
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: the caller handles signals
            pass

    def _handle(self, number, frame):
        if self._received:
            raise KeyboardInterrupt
        self._received, self.name = True, signal.Signals(number).name

    def after(self, step: int) -> bool:
        """Is `step`, just sent to the device, the last one? The same answer in all processes."""
        if self.peers is None:
            return self._received
        if self._received and not self._passed_on:
            self._passed_on = True
            self.peers.request_stop(self.name)
        stop = self.peers.stop_after(step)
        self.name = self.peers.stop_name or self.name
        return stop

    def restore(self):
        for number, old in self._old.items():
            signal.signal(number, old)


class Patience:
    """The best evaluation so far; and whether there were so many in a row since then that the run ends (early stopping; Prechelt
    1998, "Early Stopping - But When?"). A run that goes on finds what it knew in metrics.jsonl. Process 0 decides for all.

    patience: evaluations; 0: the run never ends for this.
    """

    def __init__(self, metric: str, patience: int, workdir: str, step: int):
        """step: completed, of the checkpoint that the run goes on from."""
        self.metric, self.patience = metric, patience
        self.best = self.best_step = None
        self.waited = 0
        file = os.path.join(workdir, "metrics.jsonl")
        for line in distributed.share(lambda: evaluations(file, step), "evaluations so far"):
            self._saw(line)

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def saw(self, line: dict) -> bool:
        """line: of an evaluation, as `Writers.write` has it. -> Is it the best so far? Raises UserError: it lacks the metric."""
        if self.metric not in line:
            raise UserError(f"eval.metric={self.metric}: the evaluation has none; it has {', '.join(line)}")
        return self._saw(distributed.share(lambda: line, "evaluation"))

    def _saw(self, line):
        value = line[self.metric] if self.metric in line else None
        if value is None or not math.isfinite(value):
            value = -math.inf if higher_is_better(self.metric) else math.inf
        better = self.best is None or (value > self.best if higher_is_better(self.metric) else value < self.best)
        if better:
            self.best, self.best_step = value, line["step"]
        self.waited = 0 if better else self.waited + 1
        return better


def evaluations(file: str, step: int) -> list[dict]:
    """The lines of metrics.jsonl with all of the validation split, up to a step."""
    found = []
    for text in pathlib.Path(file).read_text().splitlines() if os.path.isfile(file) else ():
        try:
            line = json.loads(text)
        except ValueError:  # the run was killed in the middle of a line
            continue
        if line["split"] == "valid/all" and line["step"] <= step:
            found.append(line)
    return found
