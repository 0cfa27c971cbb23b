"""What a run writes down of itself: the lines of metrics.jsonl about training, and summary.json."""

import json
import pathlib
import statistics
from typing import NamedTuple

import jax

from jaxlm.models.moe import ROUTER_METRICS
from jaxlm.objectives.objective import MEANS
from jaxlm.observe.throughput import flops_per_token, peak_flops, peak_memory_bytes


class Cost(NamedTuple):
    causal_flops: float  # of a token
    palm_flops: float
    peak: float | None  # FLOP/s of the run's devices together; None where they are not known


def cost_of(config, program) -> Cost:
    model, mesh = program.model, program.mesh
    peak = peak_flops(jax.devices()[0].device_kind, config.kernels.quantization)
    flops = flops_per_token(config, model.num_matmul_parameters, model.num_trained_matmul_parameters, program.frozen)
    return Cost(*flops, peak * mesh.size if peak else None)


def train_line(step: int, tokens: int, metrics: dict, rates: dict, cost: Cost, elapsed: float) -> dict:
    """metrics: of the step, on the host. rates: of `Clock.lap`."""
    speed, peak = rates["tokens_per_second"], cost.peak
    return {"split": "train", "step": step, "tokens": tokens, "loss": metrics["loss"],
            "learning_rate": metrics["learning_rate"], "grad_norm": metrics["grad_norm"], **rates,
            **{k: metrics[k] for k in (*ROUTER_METRICS, *MEANS) if k in metrics},
            "mfu": speed * cost.causal_flops / peak if peak and speed else None,
            "mfu_palm": speed * cost.palm_flops / peak if peak and speed else None, "elapsed_seconds": elapsed}


def summarise(workdir: str, program, totals: dict, cost: Cost, *, status: str, exit_code: int, steps: int,
              flops: float, compile_seconds: float, elapsed_seconds: float) -> dict:
    """totals: "tokens", "train_loss", "valid" (the last evaluation, {} without), "first_step" (seconds), "speeds" (tokens/s)."""
    model, mesh, valid = program.model, program.mesh, totals["valid"]
    speed = statistics.median_high(totals["speeds"]) if totals["speeds"] else None
    return {
        "status": status, "exit_code": exit_code, "steps": steps, "tokens": totals["tokens"],
        "parameters": model.num_parameters, "active_parameters": model.num_active_parameters,
        "train_loss": totals["train_loss"], "valid_loss": valid["loss"] if valid else None,
        "bits_per_byte": valid.get("bits_per_byte"),
        "tokens_per_second": speed, "mfu": speed * cost.causal_flops / cost.peak if speed and cost.peak else None,
        "flops": flops,
        "compile_seconds": compile_seconds, "seconds_to_first_step": totals["first_step"],
        "elapsed_seconds": elapsed_seconds, "peak_memory_bytes": peak_memory_bytes(), "devices": mesh.size,
        "device_kind": jax.devices()[0].device_kind, "mesh": dict(mesh.shape), "attention_backend": program.backend,
        "jax_version": jax.__version__, "commit": json.loads(pathlib.Path(workdir, "config.json").read_text())["commit"],
    }
