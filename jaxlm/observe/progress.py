"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

import sys
import time

from jaxlm.parallel.distributed import is_main


def build_progress(config, total_steps: int):
    """Process 0 shows progress, the others are silent."""
    kind = config.observe.progress
    if not is_main():
        kind = "none"
    if kind == "auto":
        kind = "live" if sys.stdout.isatty() else "lines"
    return {"live": Live, "lines": Lines, "none": Silent}[kind](total_steps)


def compact(number: float | None, unit: str = "") -> str:
    """12345 -> '12.3k'; None -> '-'."""
    if number is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}{unit}"
    return f"{number:.0f}{unit}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class Silent:
    def __init__(self, total_steps: int):
        self.total_steps = total_steps

    def start(self, info: list[str]) -> None: ...

    def update(self, line: dict) -> None: ...

    def evaluation(self, line: dict) -> None: ...

    def sample(self, text: str) -> None: ...

    def message(self, text: str) -> None: ...

    def stop(self) -> None: ...


class Lines(Silent):
    """One line a log interval, at most one a second but for the last."""

    _shown = 0.0

    def message(self, text):
        print(text, flush=True)

    def start(self, info):
        for text in info:
            self.message(text)

    def update(self, line):
        if time.monotonic() - self._shown < 1 and line["step"] != self.total_steps:
            return
        self._shown = time.monotonic()
        step, seconds = line["step"], line["step_seconds"]
        eta = duration((self.total_steps - step) * seconds) if seconds else "-"
        self.message(f"step {step:>6}/{self.total_steps}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
                     f"{compact(line['tokens_per_second'], ' tok/s')}  mfu {percent(line['mfu'])}  "
                     f"data wait {percent(line['data_wait_fraction'])}  eta {eta}")

    def evaluation(self, line):
        self.message(f"step {line['step']:>6}  {line['split']}  loss {line['loss']:.4f}  perplexity "
                     f"{line['perplexity']:.3f}" + "".join(f"  {name} {line[key]:.4f}" for key, name in (
                         ("bits_per_byte", "bits/byte"), ("accuracy", "accuracy"), ("reward_margin", "margin"),
                         ("teacher_kl", "KL")) if key in line))

    def sample(self, text):
        self.message("\n".join("    | " + row for row in text.splitlines()[:8]))


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


class Live(Lines):
    """A `rich` bar with ETA, loss, tokens/s, MFU and data wait; evaluations and samples scroll by above it."""

    def start(self, info):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"), BarColumn(bar_width=24), TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), refresh_per_second=4)
        self.task = self.bar.add_task("train", total=self.total_steps, numbers="")
        self.bar.start()
        super().start(info)

    def message(self, text):
        self.bar.console.print(text, markup=False, highlight=False)

    def update(self, line):
        numbers = (f"loss {line['loss']:.4f}  {compact(line['tokens_per_second'], ' tok/s')}  mfu {percent(line['mfu'])}"
                   f"  wait {percent(line['data_wait_fraction'])}")
        self.bar.update(self.task, completed=line["step"], numbers=numbers)

    def stop(self):
        if hasattr(self, "bar"):
            self.bar.stop()
