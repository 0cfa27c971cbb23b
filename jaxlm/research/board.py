"""What a person sees while a sweep goes on: a live table of arms on a terminal, plain lines elsewhere; and sweep.json."""

import json
import os
import sys
import time

from jaxlm.observe.progress import duration
from jaxlm.research.sweep import ENDED, Run, Sweep, loss_of, status_of
from jaxlm.train.rundir import write_json

MARKS = {"completed": "[green]●[/]", "diverged": "[red]▲[/]", "failed": "[red]✗[/]", "running": "[yellow]◐[/]",
         "preempted": "[yellow]◌[/]", "left out": "[dim]–[/]", "": "[dim]○[/]"}


class Board:
    """Knows how each run stands. `began` and `ended` tell of one; sweep.json is written at each."""

    def __init__(self, sweep: Sweep, live: bool | None = None):
        self.sweep, self.started, self.running, self.seconds = sweep, time.monotonic(), {}, []
        self.status = {run.workdir: status if (status := status_of(run)) in ENDED else "" for run in sweep.runs}
        self.losses = {run.workdir: loss_of(run) for run in sweep.runs}
        self.reasons = {}  # workdir -> why a run failed
        self.live = None
        if sys.stdout.isatty() if live is None else live:
            from rich.live import Live

            self.live = Live(get_renderable=self.table, refresh_per_second=2)

    def __enter__(self):
        done = sum(s in ENDED for s in self.status.values())
        self.say(f"{len(self.sweep.arms)} arms, {len(self.sweep.runs)} runs" + (f", {done} of them done before" if done else ""))
        if self.live:
            self.live.start()
        self.write()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        if self.live and self.live.is_started:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def began(self, run: Run) -> None:
        self.status[run.workdir], self.running[run.workdir] = "running", time.monotonic()
        self.write()

    def ended(self, run: Run, status: str, reason: str = "") -> None:
        """status: completed, diverged, preempted, failed, left out."""
        self.status[run.workdir] = status
        if run.workdir in self.running:
            self.seconds.append(time.monotonic() - self.running.pop(run.workdir))
        if reason:
            self.reasons[run.workdir] = reason
        loss = self.losses[run.workdir] = loss_of(run)
        done = sum(s not in ("", "running") for s in self.status.values())
        self.say(f"[{done}/{len(self.sweep.runs)}] {run.arm}, seed {run.seed}: {status}"
                 + (f", loss {loss:.4f}" if loss is not None else "") + (f", {reason}" if reason else "")
                 + (f"; eta {self.eta()}" if self.eta() else ""))
        self.write()

    def eta(self) -> str:
        """By the mean time of the runs so far, and how many go at once."""
        left = sum(s in ("", "running") for s in self.status.values())
        if not self.seconds or not left:
            return ""
        rate = len(self.seconds) / (time.monotonic() - self.started)
        return duration(left / rate)

    def write(self) -> None:
        """sweep.json: the plan, and how each run stands."""
        self.sweep.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.sweep.workdir / "sweep.json", {
            "config": self.sweep.spec, "overrides": self.sweep.overrides,
            "arms": [{"name": arm.name, "overrides": arm.overrides, "conditional": arm.when is not None}
                     for arm in self.sweep.arms],
            "runs": [{"arm": run.arm, "seed": run.seed, "workdir": os.path.relpath(run.workdir, self.sweep.workdir),
                      "fingerprint": run.fingerprint, "status": self.status[run.workdir],
                      "reason": self.reasons[run.workdir] if run.workdir in self.reasons else ""}
                     for run in self.sweep.runs]})

    def table(self):
        """One row an arm: a mark for each seed, where the one that runs stands, the mean loss of those that ended."""
        from rich.table import Table

        done = sum(s not in ("", "running") for s in self.status.values())
        title = [str(self.sweep.workdir), f"{done}/{len(self.sweep.runs)} runs", duration(time.monotonic() - self.started),
                 f"eta {self.eta()}" if self.eta() else ""]
        table = Table(title="  ".join(title), title_justify="left")
        for name, justify in (("arm", "left"), ("seeds", "left"), ("now", "right"), ("mean loss", "right"), ("", "left")):
            table.add_column(name, justify=justify)
        for arm in self.sweep.arms:
            runs = self.sweep.runs_of([arm])
            losses = [loss for run in runs if (loss := self.losses[run.workdir]) is not None]
            now = [newest(run) for run in runs if self.status[run.workdir] == "running"]
            reasons = list(dict.fromkeys(self.reasons[run.workdir] for run in runs if run.workdir in self.reasons))
            table.add_row(arm.name, "".join(MARKS[self.status[run.workdir]] for run in runs), ", ".join(now),
                          f"{sum(losses) / len(losses):.4f}" if losses else "", reasons[0][:60] if reasons else "")
        return table


def newest(run: Run) -> str:
    """Where a run stands, by the last line of its metrics: another process may write them."""
    try:
        with open(run.workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            line = json.loads(file.read().splitlines()[-1])
        return f"{line['step']}/{run.config.steps}  {line['loss']:.3f}"
    except (OSError, ValueError, IndexError, KeyError, TypeError):  # not there yet, half written, no loss
        return "starting"
