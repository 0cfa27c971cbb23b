"""Where metrics go: metrics.jsonl and samples.jsonl always, TensorBoard and Weights & Biases by config."""

import json
import math
import os

from jaxlm.errors import UserError
from jaxlm.parallel.distributed import is_main


def build_writers(config, workdir: str) -> "Writers":
    """Process 0 writes, the others do not. Raises UserError where a writer's package is missing."""
    if not is_main():
        return NoWriters()
    outlets = []
    if config.observe.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("observe.tensorboard=True: needs tensorboardX; pip install jaxlm[tensorboard]") from error
        outlets.append(TensorBoard(SummaryWriter(os.path.join(workdir, "tensorboard"))))
    if config.observe.wandb:
        try:
            import wandb
        except ImportError as error:
            raise UserError("observe.wandb: needs wandb; pip install jaxlm[wandb]") from error
        outlets.append(WeightsAndBiases(wandb.init(project=config.observe.wandb, dir=workdir, resume="allow")))
    return Writers(workdir, outlets)


class Writers:
    def __init__(self, workdir: str, outlets: list):
        self.outlets = outlets
        self.paths = {name: os.path.join(workdir, name + ".jsonl") for name in ("metrics", "samples")}
        self.files = {}

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps, and a half-written one: the run goes on from `step`."""
        for path in self.paths.values():
            if not os.path.exists(path):
                continue
            kept = []
            for line in open(path):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue
            with open(path + ".tmp", "w") as out:
                out.writelines(kept)
            os.replace(path + ".tmp", path)

    def write(self, line: dict) -> None:
        """One metrics line (DESIGN: metrics.jsonl); what is not finite becomes null, as JSON has no NaN."""
        self._append("metrics", {k: None if isinstance(v, float) and not math.isfinite(v) else v
                                 for k, v in line.items()})
        for outlet in self.outlets:
            outlet.write(line)

    def text(self, step: int, prompt: str, text: str) -> None:
        self._append("samples", {"step": step, "prompt": prompt, "text": text})
        for outlet in self.outlets:
            outlet.text(step, prompt + text)

    def _append(self, name: str, line: dict) -> None:
        if name not in self.files:
            self.files[name] = open(self.paths[name], "a", buffering=1)
        self.files[name].write(json.dumps(line) + "\n")

    def close(self) -> None:
        for closable in [*self.files.values(), *self.outlets]:
            closable.close()
        self.files, self.outlets = {}, []


class NoWriters:
    def truncate_after(self, step: int) -> None: ...

    def write(self, line: dict) -> None: ...

    def text(self, step: int, prompt: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, writer):
        self.writer = writer

    def write(self, line):
        for name, value in line.items():
            if name not in ("split", "step") and value is not None:
                self.writer.add_scalar(f"{line['split']}/{name}", value, line["step"])

    def text(self, step, text):
        self.writer.add_text("sample", text, step)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, run):
        self.run = run

    def write(self, line):
        values = {f"{line['split']}/{k}": v for k, v in line.items() if k not in ("split", "step") and v is not None}
        self.run.log(values, step=line["step"])

    def text(self, step, text):
        self.run.log({"sample": text}, step=step)

    def close(self):
        self.run.finish()
