"""jaxlm beside PyTorch and Hugging Face on this machine: tokens/s of one optimizer step, same model, same tokens, same AdamW.

    python benchmarks/compare.py                          all sizes of the machine found: a GPU, or its CPU
    python benchmarks/compare.py --sizes 124M --minutes 9

An arm is timed only if it has as many parameters as jaxlm, to the unit, and from the same initial parameters the same loss
(within 0.01 in bfloat16, 0.0005 in float32) and first gradient norm. Each arm first looks for its own best micro-batch (the
batch stays the same, its gradients are summed): the whole batch, a half, a quarter, until one is slower; in rounds over the arms,
so that all have had as many tries if time runs out. Then blocks of the arms, each at its best, take turns, A B C A B C; where
memory does not hold all arms at once, one arm after the other, and the result says so. Compilers start without a cache in the
search, and with what it left in the timing: the first step, cold and warm. Tokens lie on the device: no arm but hf_trainer reads
data. What does not fit the memory or --minutes is left out, and the result says so.
Writes results/<date>-compare-<device>-<sizes>.json, and a .png beside it where matplotlib is installed.
"""

import argparse
import functools
import importlib.util
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from arms import ARMS, SIZES, config_of
from record import RESULTS, check_idle, save
from scoreboard import tried
from worker import ArmFailed, Worker

CHECKED = {"gpu": (0, 1, 10, 50), "cpu": (0, 1, 10)}  # completed steps at which losses are compared
TOLERANCE = {"gpu": {"loss": 0.01, "grad_norm": 0.05}, "cpu": {"loss": 0.0005, "grad_norm": 0.0005}}  # the norm's: relative


def parity(reference, mine, kind):
    """-> the comparison with jaxlm's first steps, and whether it is passed."""
    at, tolerance = CHECKED[kind], TOLERANCE[kind]
    loss = [abs(mine["losses"][i] - reference["losses"][i]) for i in at]
    norm = abs(mine["grad_norms"][0] / reference["grad_norms"][0] - 1)
    return {"steps": at, "losses": [mine["losses"][i] for i in at], "loss_differences": loss,
            "first_grad_norm": mine["grad_norms"][0], "first_grad_norm_difference": norm, "tolerance": tolerance,
            "passed": all(d < tolerance["loss"] for d in loss) and norm < tolerance["grad_norm"]}  # NaN fails


def gate(worker, kind, reference):
    """Build, first steps, checks against jaxlm (`reference`, None for its first worker) -> what is known of the arm."""
    began = time.monotonic()
    facts = worker.ask("build")
    if facts["platform"] != kind:
        raise ArmFailed(f"its framework sees no GPU (platform {facts['platform']}); install its CUDA version")
    build_seconds = time.monotonic() - began
    first = worker.ask("train", steps=1, timed=False)
    rest = worker.ask("train", steps=CHECKED[kind][-1], timed=False)
    trace = {name: first[name] + rest[name] for name in ("losses", "grad_norms")}
    arm = {**facts, "build_seconds": build_seconds, "first_step_seconds": first["seconds"], "trace": trace,
           "step_seconds": rest["seconds"] / CHECKED[kind][-1],
           "parity": parity(reference["trace"] if reference else trace, trace, kind)}
    if reference and arm["parameters"] != reference["parameters"]:
        arm["failed"] = f"{arm['parameters']} parameters, jaxlm has {reference['parameters']}"
    elif not arm["parity"]["passed"]:
        p = arm["parity"]
        arm["failed"] = (f"parity: losses differ by {max(p['loss_differences']):.2g}, the first gradient norm by "
                         f"{p['first_grad_norm_difference']:.2g}")
    return arm


class Search:
    """An arm's own best micro-batch, looked for among `micro_batches` in their order, until one is slower or fails.

    trials: {micro-batch: tokens/s, or why there is none}. best: what `measure` said of the fastest, and its micro_batch; None:
    no trial passed. seconds: of the last turn.
    """

    def __init__(self, micro_batches):
        self.left, self.trials, self.best, self.seconds = list(micro_batches), {}, None, 0.0

    def turn(self, measure):
        """Try the next micro-batch that fits the memory. measure: micro-batch -> (facts of `gate`, tokens/s)."""
        began, go_on = time.monotonic(), True
        while self.left and go_on:
            micro = self.left.pop(0)
            try:
                facts, rate = measure(micro)
                self.trials[micro] = facts.get("failed", rate)
            except ArmFailed as error:
                self.trials[micro] = "out of memory" if error.out_of_memory else str(error)
                if error.out_of_memory:
                    continue
                facts = {"failed": str(error)}
            if "failed" not in facts and (self.best is None or rate > self.trials[self.best["micro_batch"]]):
                self.best, go_on = {**facts, "micro_batch": micro}, False
            else:
                self.left = []
        self.seconds = time.monotonic() - began

    def result(self):
        failed = {} if self.best else {"failed": list(self.trials.values())[-1]}
        return {**(self.best or failed), "trials": self.trials}


def search(size, kind, names, micro_batches, tokens, args, folder, deadline, notes):
    """-> {arm: Search.result()}. After its first, a round over the arms is begun only if it fits into half of the time."""
    half, searches, reference = (time.monotonic() + deadline) / 2, {}, None
    for name in names:
        if reason := unavailable(name, size):
            notes.append(f"{name}: left out: {reason}")
        else:
            searches[name] = Search(micro_batches)

    def measure(name, micro):
        say(f"{size} {name}: building, first steps, micro-batch {micro}")
        worker = Worker(name, size, args.batch_size, micro, folder, deadline)
        try:
            facts = gate(worker, kind, reference)
        finally:
            worker.stop()
        rate = tokens / facts["step_seconds"]
        say(f"{size} {name}: {facts.get('failed') or f'as jaxlm, about {rate:,.0f} tokens/s'}")
        return facts, rate

    while active := {name: s for name, s in searches.items() if s.left}:
        if time.monotonic() + sum(s.seconds for s in active.values()) > half and all(s.trials for s in active.values()):
            notes.append(f"no time to try further micro-batches: {', '.join(active)}")
            break
        for name, arm in active.items():
            if not arm.trials and time.monotonic() > deadline:
                notes.append(f"{name}: left out, --minutes was up")
                searches.pop(name)
                continue
            arm.turn(functools.partial(measure, name))
            reference = reference or arm.best  # jaxlm comes first
            if reference is None:
                notes.append("no jaxlm to compare with")
                return {name: arm.result()}
    return {name: arm.result() for name, arm in searches.items()}


def summary(blocks, steps, tokens, facts):
    """blocks: the answers to the timed trainings of `steps` steps of `tokens` tokens; facts: jaxlm's, for the FLOPs."""
    rates = sorted(steps * tokens / b["seconds"] for b in blocks)
    median = statistics.median(rates)
    share = lambda flops: median * flops / facts["peak_flops"] if facts["peak_flops"] else None
    return {"tokens_per_second": median, "tokens_per_second_min": rates[0], "tokens_per_second_max": rates[-1],
            "step_seconds": tokens / median, "step_cpu_seconds": statistics.median(b["cpu_seconds"] / steps for b in blocks),
            "tflops": median * facts["flops_per_token"] / 1e12, "mfu": share(facts["flops_per_token"]),
            "mfu_palm": share(facts["flops_per_token_palm"]), "peak_memory_bytes": max(b["peak_memory_bytes"] for b in blocks),
            "blocks": len(blocks), "steps": steps}


def time_blocks(workers, arms, steps, blocks, deadline, notes):
    """Rounds over the workers; the block of an arm that fails is lost, and the arm with it."""
    times, round_seconds = {name: [] for name in workers}, 0.0
    for done in range(blocks):
        if not workers:
            break
        if time.monotonic() + round_seconds > deadline:
            notes.append(f"{', '.join(workers)}: {done} of {blocks} blocks, --minutes was up")
            break
        began = time.monotonic()
        for name in list(workers):
            try:
                block = workers[name].ask("train", steps=steps, timed=True)
                if not all(map(math.isfinite, block["losses"])):
                    raise ArmFailed("a loss that is not finite in a timed block")
                times[name].append(block)
            except ArmFailed as error:
                arms[name]["failed"] = str(error)
                if error.out_of_memory and len(workers) > 1:
                    raise
                workers.pop(name).stop()
        round_seconds = time.monotonic() - began
    return {name: blocks for name, blocks in times.items() if blocks and "failed" not in arms[name]}


def time_arms(size, kind, found, tokens, args, folder, deadline, together):
    """Each arm at its best micro-batch, in a new process -> (arms, notes). Raises ArmFailed (out_of_memory) where `together` was
    too much. found: of `search`."""
    arms, notes, workers, times = {name: dict(arm) for name, arm in found.items()}, [], {}, {}
    steps, product = SIZES[kind][size], {"n": 8192, "repeats": 20} if kind == "gpu" else {"n": 2048, "repeats": 3}
    try:
        for name, arm in arms.items():
            if "failed" in arm:
                continue
            if time.monotonic() > deadline:
                notes.append(f"{name}: not timed, --minutes was up")
                continue
            say(f"{size} {name}: building again, with a warm cache, micro-batch {arm['micro_batch']}")
            # A slow start must not take from the others the time of 3 blocks each.
            reserved = min(3, args.blocks) * steps * sum(arms[other]["step_seconds"] for other in workers)
            workers[name] = worker = Worker(name, size, args.batch_size, arm["micro_batch"], folder, deadline - reserved)
            try:
                facts = gate(worker, kind, found["jaxlm"])
                arm |= {**facts, "first_step_seconds": arm["first_step_seconds"],
                        "first_step_seconds_warm": facts["first_step_seconds"],
                        "matmul_tflops": worker.ask("matmul", **product)["tflops"]}
            except ArmFailed as error:
                if error.out_of_memory and len(workers) > 1:
                    raise
                arm["failed"] = str(error)
            if "failed" in arm:
                workers.pop(name).stop()
                say(f"{size} {name}: not timed: {arm['failed']}")
                continue
            worker.deadline = deadline
            if not together:
                times |= time_blocks(workers, arms, steps, args.blocks, deadline, notes)
                workers.pop(name, worker).stop()
        if together:
            times = time_blocks(workers, arms, steps, args.blocks, deadline, notes)
    finally:
        for worker in workers.values():
            worker.stop()
    for name, blocks in times.items():
        arms[name] |= summary(blocks, steps, tokens, arms["jaxlm"])
    return arms, notes


def measure(size, kind, names, args, folder, deadline):
    """-> {"arms", "notes", ...} of one size."""
    config = config_of(size, args.batch_size)
    tokens, notes = config.batch_size * config.seq_len, []
    micro_batches = args.micro_batches or [config.batch_size // n for n in (1, 2, 4) if config.batch_size % n == 0]
    found = search(size, kind, names, micro_batches, tokens, args, folder, deadline, notes)
    together = size != "8B"  # of the largest size no two arms fit: finding out would take minutes
    try:
        arms, more = time_arms(size, kind, found, tokens, args, folder, deadline, together)
    except ArmFailed as error:
        say(f"{size}: {error}; again, one arm after the other")
        together = False
        arms, more = time_arms(size, kind, found, tokens, args, folder, deadline, together)
        more.append("memory does not hold all arms at once: timed one after the other")
    return {"batch_size": config.batch_size, "seq_len": config.seq_len, "interleaved": together, "arms": arms,
            "notes": notes + more, "param_dtype": config.model.param_dtype, "compute_dtype": config.model.compute_dtype,
            "moment_dtype": config.optimizer.moment_dtype, "remat": config.model.remat, "scan_layers": config.model.scan_layers}


NEEDS = {"jaxlm": (), "hf": ("torch", "transformers"), "hf_trainer": ("torch", "transformers", "accelerate")}


def unavailable(name, size):
    missing = [package for package in NEEDS.get(name, ("torch",)) if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if name.startswith("hf") and size == "shakespeare":
        return "transformers has no model with RMSNorm, RoPE and GELU"
    return ""


def find_device():
    """-> ("gpu" or "cpu", a name for the file)."""
    if shutil.which("nvidia-smi"):
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
        if names.returncode == 0 and names.stdout.strip():
            return "gpu", names.stdout.splitlines()[0].strip().replace(" ", "_").lower()
    return "cpu", "cpu"


def say(text):
    print(text, file=sys.stderr, flush=True)


def table(result):
    lines = [f"{'size':12} {'arm':14} {'micro':>5} {'tokens/s':>10} {'min':>10} {'max':>10} {'MFU':>6} {'PaLM':>6} "
             f"{'of matmul':>9} {'memory':>8} {'1st step':>8} {'warm':>8}  of jaxlm"]
    for size, r in result["sizes"].items():
        base = r["arms"].get("jaxlm", {}).get("tokens_per_second")
        for name, a in r["arms"].items():
            if "tokens_per_second" not in a:
                lines.append(f"{size:12} {name:14} not timed: {a.get('failed', 'no block was done')}")
                continue
            percent = lambda x: "n/a" if x is None else f"{100 * x:.1f}%"
            lines.append(f"{size:12} {name:14} {a['micro_batch']:5} {a['tokens_per_second']:10,.0f} "
                         f"{a['tokens_per_second_min']:10,.0f} {a['tokens_per_second_max']:10,.0f} "
                         f"{percent(a['mfu']):>6} {percent(a['mfu_palm']):>6} "
                         f"{percent(a['tflops'] / result['matmul_tflops']['best']):>9} {a['peak_memory_bytes'] / 2**30:6.1f} G "
                         f"{a['first_step_seconds']:6.1f} s {a['first_step_seconds_warm']:6.1f} s  "
                         + (f"{a['tokens_per_second'] / base:.2f}" if base else "n/a"))
        lines += [f"{size:12} {note}" for note in [*tried(r), *r["notes"]]]
    return "\n".join(lines)


def matmul_ceilings(sizes):
    """The best of each framework over all arms, TFLOP/s; they should agree within 2 %."""
    best = {"jax": 0.0, "torch": 0.0}
    for r in sizes.values():
        for name, a in r["arms"].items():
            framework = "jax" if name == "jaxlm" else "torch"
            best[framework] = max(best[framework], a.get("matmul_tflops", 0.0))
    known = [b for b in best.values() if b]
    return {**best, "best": max(best.values()), "agree_within_2_percent": len(known) < 2 or min(known) > 0.98 * max(known)}


def draw(result, file):
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result["sizes"]), figsize=(4 * len(result["sizes"]), 3.2), squeeze=False)
    for axis, (size, r) in zip(axes[0], result["sizes"].items(), strict=True):
        timed = {name: a for name, a in r["arms"].items() if "tokens_per_second" in a}
        rates = [a["tokens_per_second"] for a in timed.values()]
        error = [[a["tokens_per_second"] - a["tokens_per_second_min"] for a in timed.values()],
                 [a["tokens_per_second_max"] - a["tokens_per_second"] for a in timed.values()]]
        axis.bar(list(timed), rates, yerr=error, color=["C0" if name == "jaxlm" else "0.6" for name in timed])
        axis.set_title(f"{size}, T={r['seq_len']}, batch {r['batch_size']}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xticks(range(len(timed)), [f"{name}\n{a['micro_batch']}" for name, a in timed.items()], rotation=30)
    axes[0][0].set_ylabel("tokens/s, median; bars: min to max", fontsize=8)
    figure.supxlabel("arm and its micro-batch", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    say(f"drawn to {file}")


def main():
    kind, device = find_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES[kind]), choices=list(SIZES[kind]))
    parser.add_argument("--arms", nargs="+", default=list(ARMS[kind]), choices=ARMS[kind],
                        help="jaxlm always runs: it is the reference")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="leave out what does not fit")
    parser.add_argument("--batch_size", type=int, default=0, help="sequences a step, in every arm; 0: the size's own")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[],
                        help="sequences a micro-batch to try, in this order; default: the whole batch, a half, a quarter")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine all the same")
    args = parser.parse_args()
    check_idle(limit=0.5 if kind == "cpu" else 0.25 * os.cpu_count())
    for size in args.sizes:
        batch = config_of(size, args.batch_size).batch_size
        if odd := [micro for micro in args.micro_batches if micro < 1 or batch % micro]:
            raise SystemExit(f"--micro_batches {odd[0]}: does not divide the batch of {size}, {batch} sequences")
    if kind == "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    deadline = time.monotonic() + 60 * args.minutes
    names = ["jaxlm", *(name for name in args.arms if name != "jaxlm")]
    result = {"device": device, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            if time.monotonic() > deadline:
                result["sizes"][size] = {"arms": {}, "notes": ["left out, --minutes was up"]}
                continue
            result["sizes"][size] = measure(size, kind, names, args, folder, deadline)
    result["matmul_tflops"] = matmul_ceilings(result["sizes"])
    text = table(result)
    args.out.mkdir(parents=True, exist_ok=True)
    batch = f"-batch{args.batch_size}" if args.batch_size else ""
    file = save(f"compare-{device}-{'-'.join(result['sizes'])}{batch}", result, args.out)
    draw({**result, "sizes": {s: r for s, r in result["sizes"].items() if r["arms"]}}, file.with_suffix(".png"))
    print(text)
    ceilings = result["matmul_tflops"]
    print(f"matmul ceiling, TFLOP/s: jax {ceilings['jax']:.3g}, torch {ceilings['torch']:.3g}")
    if not ceilings["agree_within_2_percent"]:
        print("the frameworks' matmul ceilings differ by more than 2 %: look into it before quoting these figures")


if __name__ == "__main__":
    main()
