"""`train_ensemble`: several runs trained as one program (`jaxlm.research.members`), each with the run directory of its own run:
`jaxlm train` goes on in it, `jaxlm eval` and `generate` read it.

Successive halving (Jamieson & Talwalkar, arXiv:1502.07943): at given steps those with the highest validation loss are dropped,
and the others gathered into a smaller program.
"""

import collections
import json
import math
import os
import pathlib
import shutil
import time

import jax

from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.config import fingerprint, steps_of
from jaxlm.errors import Diverged, Preempted, UserError
from jaxlm.evaluate.perplexity import told
from jaxlm.observe.progress import build_progress
from jaxlm.observe.report import write_report
from jaxlm.observe.throughput import Clock
from jaxlm.observe.watchdog import SLOW
from jaxlm.observe.writers import build_writers
from jaxlm.parallel.distributed import num_processes
from jaxlm.research.members import Members
from jaxlm.train import heap
from jaxlm.train.record import cost_of, summarise, train_line
from jaxlm.train.rundir import open_run_directory, write_json
from jaxlm.train.state import flatten_paths
from jaxlm.train.stop import StopSignal

ENDED = ("completed", "dropped", "diverged")


def train_ensemble(configs, workdirs: list[str], *, halve=(), overrides=(), execution: str = "auto", devices=None,
                   allow_config_change: bool = False, alive=lambda doing="", allowance=1: None) -> list[dict]:
    """Train each config in its run directory -> their summaries, in order. The same call again goes on where it stopped.

    A member's numbers are those of its own run (`jaxlm train`), the order of its data included; on several devices, or where
    products are batched, up to rounding. Its `tokens_per_second` is what it gets while it shares the devices with the others.
    No text is sampled (`eval.sample_tokens`).

    Args:
        halve: ((step, members left after it), ...), by validation loss, without such a split by the step's training loss.
        overrides: those already in the configs, for `Tracked.unread`.
        execution: together, in_turn, or auto (see `jaxlm.research.members`). devices: that members are dealt out to; None: all.
        alive: as of `jaxlm.train.loop.train`.

    A member whose loss is not finite ends as its own run would (status "diverged"), the others go on. Raises UserError; Diverged,
    once all have; Preempted after all are saved.
    """
    check(configs, workdirs, halve)
    began = time.time()
    group = Members(configs, overrides, execution, devices)
    runs = [Run(config, workdir, group, began) for config, workdir in zip(configs, workdirs, strict=True)]
    for run in runs:
        open_run_directory(run.workdir, run.config, allow_config_change, group.program.compiler_options, group.data.fingerprint)
    live = [run for run in runs if run.ended() is None]
    if live:
        if len(live) < len(runs):
            group = Members([run.config for run in live], overrides, execution, devices)
        Training(group, live, halve, alive).run()
    return [run.ended() for run in runs]


def check(configs, workdirs, halve) -> None:
    problems, steps, left = [], configs[0].steps if configs else 0, len(configs)
    if len(set(map(os.path.abspath, workdirs))) != len(configs):
        problems.append(f"an ensemble of {len(configs)} members needs as many different run directories")
    if num_processes() > 1:
        problems.append("an ensemble runs in one process, on all devices that this one has; start it without a launcher")
    at = 0
    for step, keep in halve:
        if not at < step < steps:
            problems.append(f"halving at step {step}: must come after {at} and before the last, {steps}")
        if not 0 < keep < left:
            problems.append(f"halving at step {step} leaves {keep} members: must be from 1 to {left - 1}")
        at, left = step, keep
    if problems:
        raise UserError(*problems)


class Run:
    """One member's run directory, and what is written there."""

    def __init__(self, config, workdir: str, group: Members, began: float):
        self.config, self.workdir, self.began = config, workdir, began
        self.name = os.path.basename(os.path.abspath(workdir))
        self.program, self.cost = group.program, cost_of(config, group.program)
        self.totals = {"tokens": 0, "first_step": None, "valid": {}, "train_loss": None, "speeds": []}

    def ended(self) -> dict | None:
        """The summary of a run that is over, whichever way."""
        file = pathlib.Path(self.workdir, "summary.json")
        summary = json.loads(file.read_text()) if file.exists() else None
        return summary if summary and summary["status"] in ENDED else None

    def open(self) -> None:
        checkpoint, config = self.config.checkpoint, self.config
        self.checkpoints = Checkpoints(os.path.join(self.workdir, "checkpoints"), checkpoint.keep,
                                       steps_of(checkpoint.keep_every_steps, config, "checkpoint.keep_every_steps"),
                                       checkpoint.keep_best)
        self.checkpoints.require_room(self.program.state)
        self.writers = build_writers(config, self.workdir)

    def start_at(self, step: int) -> None:
        """Forget what was written of later steps."""
        for later in self.checkpoints.steps():
            if later > step:
                shutil.rmtree(os.path.join(self.checkpoints.directory, str(later)))
        self.writers.truncate_after(step)
        self.totals["tokens"] = step * self.config.batch_size * self.config.seq_len

    @property
    def rank(self) -> float:
        """What halving goes by."""
        loss = self.totals["valid"]["loss"] if self.totals["valid"] else self.totals["train_loss"]
        return loss if loss is not None and math.isfinite(loss) else math.inf

    def evaluated(self, step: int, result: dict) -> None:
        self.totals["valid"] = result
        shown = {k: v for k, v in result.items() if k not in ("tokens", "examples")}
        self.writers.write({"split": "valid/all", "step": step, **shown})

    def save(self, step: int, state, evaluated: bool) -> None:
        metrics = self.totals["valid"] if evaluated and self.totals["valid"] else None
        self.checkpoints.save(step, state, metrics, {"fingerprint": fingerprint(self.config), "step": step})

    def finish(self, status: str, exit_code: int, step: int, compile_seconds: float) -> None:
        self.checkpoints.wait()
        self.checkpoints.close()
        summary = summarise(self.workdir, self.program, self.totals, self.cost, status=status, exit_code=exit_code, steps=step,
                            flops=self.totals["tokens"] * self.cost.causal_flops, compile_seconds=compile_seconds,
                            elapsed_seconds=time.time() - self.began)
        write_json(os.path.join(self.workdir, "summary.json"), summary)
        self.writers.close()
        if self.config.observe.report:
            write_report(self.workdir)


class Training:
    """The loop, as that of one run (`jaxlm.train.loop`) is, over the members of a group."""

    def __init__(self, group: Members, runs: list[Run], halve, alive):
        self.group, self.runs, self.halve, self.alive = group, runs, halve, alive
        config = runs[0].config  # they agree on all that is read here
        self.config, self.steps, self.log_every = config, config.steps, config.observe.log_every
        self.eval_every = steps_of(config.eval.every_steps, config, "eval.every_steps")
        self.save_every = steps_of(config.checkpoint.every_steps, config, "checkpoint.every_steps")
        self.dead, self.clock, self.compile_seconds = set(), Clock(), 0.0
        self.names = list(flatten_paths(group.program.model.trained))
        self.progress = build_progress(config, self.steps)

    def run(self) -> None:
        for run in self.runs:
            run.open()
        self.alive("restoring or initialising", SLOW)
        start, self.states = self.first_states()
        self.progress.start([*self.group.about(), *self.group.data.about,
                             f"resuming at step {start}" if start else "from scratch"])
        self.stop, step = StopSignal(start + 1), start
        try:
            for end in [*(at for at, _ in self.halve if at > start), self.steps]:
                self.alive("compiling", SLOW)
                self.step_fn, seconds = self.group.compile()
                self.compile_seconds += seconds
                self.train(step, end)
                step = end
                if end < self.steps:
                    self.drop(end, dict(self.halve)[end])
            self.finish("completed", 0, self.steps)
        finally:
            self.stop.restore()
            self.progress.stop()
            for run in self.runs:
                run.checkpoints.close()

    def first_states(self):
        """-> (step, states): the newest step that all members have saved, or 0."""
        common = set.intersection(*({0, *run.checkpoints.steps()} for run in self.runs))
        start = max(common)
        for run in self.runs:
            run.start_at(start)
        if not start:
            return 0, self.group.join(self.group.init())
        restored = [run.checkpoints.restore(self.group.program.state) for run in self.runs]
        if any(step != start for step, _, _ in restored):  # a damaged one was set aside: from the newest that all still have
            return self.first_states()
        return start, self.group.join([state for _, state, _ in restored])

    def train(self, start: int, end: int) -> None:
        """From `start` completed steps to `end`."""
        pending, batches = None, self.group.batches(start)
        self.clock.restart(start, self.first.totals["tokens"])
        self.alive("in the first step", SLOW)
        try:
            with jax.transfer_guard("disallow"):
                for step in range(start + 1, end + 1):
                    waited = time.perf_counter()
                    batch = next(batches)
                    self.clock.waited(time.perf_counter() - waited)
                    self.states, metrics = self.step_fn(self.states, batch)
                    if pending:
                        self.read_back(*pending)
                    pending = step, metrics
                    due_eval = step == end or (self.eval_every and step % self.eval_every == 0)
                    due_save = step == self.steps or (self.save_every and step % self.save_every == 0)
                    stopping = self.stop.after(step)
                    if due_eval or due_save or stopping:
                        self.read_back(*pending)
                        pending = None
                        self.alive("evaluating or saving", SLOW)
                        with jax.transfer_guard("allow"):
                            if due_eval:
                                self.evaluate(step)
                            if due_save or stopping:
                                for m, run in self.living:
                                    run.save(step, self.group.member(self.states, m), due_eval)
                        heap.give_back_freed_memory()
                        self.clock.restart(step, self.first.totals["tokens"])
                    self.alive()
                    if stopping and step < self.steps:
                        self.finish("preempted", 75, step)
                        raise Preempted(f"{self.stop.name} at step {step}: saved; run the same command again to go on")
        finally:
            batches.close()

    @property
    def living(self) -> list[tuple[int, Run]]:
        return [(m, run) for m, run in enumerate(self.runs) if m not in self.dead]

    @property
    def first(self) -> Run:
        return next((run for _, run in self.living), self.runs[0])

    def read_back(self, step: int, metrics) -> None:
        """Metrics of a finished step, one step late."""
        logged = step % self.log_every == 0 or step == self.steps
        metrics, rates = self.group.read(metrics), None
        for m, run in self.living:
            mine, totals = metrics[m], run.totals
            totals["tokens"] += int(mine["tokens"])
            totals["first_step"] = totals["first_step"] or time.time() - run.began
            if not mine["finite"]:
                self.not_finite(m, run, step, mine["bad_leaf"])
                if m in self.dead:
                    continue
            totals["train_loss"] = mine["loss"] if mine["finite"] else None
            if logged:
                rates = rates or self.clock.lap(step, totals["tokens"])
                if rates["tokens_per_second"] and step > 2 * self.log_every:  # the first lines hold the warm-up
                    totals["speeds"].append(rates["tokens_per_second"])
                line = train_line(step, totals["tokens"], mine, rates, run.cost, time.time() - run.began)
                run.writers.write(line)
                if run is self.first:
                    self.progress.update(line)

    def not_finite(self, m: int, run: Run, step: int, bad: int) -> None:
        where = f"first in the gradient of {self.names[bad]}" if bad >= 0 else "in the loss"
        message = f"{run.name}: step {step}: non-finite value, {where}"
        if run.config.optimizer.nonfinite == "skip":
            self.progress.message(f"{message}; update skipped")
            return
        self.progress.message(f"{message}; this member ends here")
        self.dead.add(m)
        run.finish("diverged", 3, step, self.compile_seconds)
        if not self.living:
            raise Diverged(f"all members; the last: {message}. Lower optimizer.learning_rate, or set optimizer.nonfinite=skip")

    def evaluate(self, step: int) -> None:
        valid, limit = self.group.data.valid, self.config.eval.batches
        if valid is None:
            return
        params = self.group.params(self.states)
        sums = [self.group.evaluate(params, self.group.put_shared(batch)) for batch in valid.evaluation_batches(limit)]
        sums = jax.device_get(sums)
        share = min(1.0, limit * valid.batch_size / len(valid)) if limit else 1.0
        for m, run in self.living:
            totals = collections.Counter()
            for batch in sums:
                totals.update({name: float(of[m]) for name, of in batch.items()})
            run.evaluated(step, told(totals, share * valid.num_bytes))
        best = sorted((run for _, run in self.living), key=lambda run: run.rank)
        self.progress.message(f"step {step}: validation loss " + ", ".join(f"{run.name} {run.rank:.4f}" for run in best[:8])
                              + (f", and {len(best) - 8} more" if len(best) > 8 else ""))

    def drop(self, step: int, keep: int) -> None:
        """All but the best `keep`: saved, and out of the program."""
        ranked = [m for m, _ in sorted(self.living, key=lambda item: item[1].rank)]
        chosen = sorted(ranked[:keep])
        for m in sorted(ranked[keep:]):
            self.runs[m].save(step, self.group.member(self.states, m), True)
            self.runs[m].finish("dropped", 0, step, self.compile_seconds)
        self.progress.message(f"step {step}: dropped {', '.join(self.runs[m].name for m in sorted(ranked[keep:])) or 'none'}")
        if len(chosen) < len(self.runs):
            self.group, self.states = self.group.keep(self.states, chosen)
            self.runs, self.dead = [self.runs[m] for m in chosen], set()

    def finish(self, status: str, exit_code: int, step: int) -> None:
        self.alive("saving", SLOW)
        for _, run in self.living:
            run.finish(status, exit_code, step, self.compile_seconds)
