"""A report of several runs: what each arm reached, how sure that is, and what it cost. -> report.json, and from that alone
report.html, table.md and table.tex."""

import os
import pathlib

import numpy as np

from jaxlm.config import diff
from jaxlm.errors import UserError
from jaxlm.observe.report import field, read_json, running_mean
from jaxlm.registry import did_you_mean
from jaxlm.research import noise, page, statistics, tables
from jaxlm.research.runs import HIGHER_IS_BETTER, Arm, arms_of, choose_metric, finite, order_differences, provenance, read_runs
from jaxlm.train.rundir import write_json

TESTS = ("auto", "paired", "welch")
CURVE_POINTS = 150  # of a training curve in report.json


def write_report(paths: list[str], out: str, cache: str, **choices) -> dict:
    """-> what is in report.json. choices: of `analyse`."""
    report = analyse(paths, out, cache, **choices)
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", report)
        for name, text in (("report.html", page.page(report)), ("table.md", tables.markdown(report)),
                           ("table.tex", tables.latex(report))):
            temporary = folder / f"{name}.tmp"
            temporary.write_text(text)
            os.replace(temporary, folder / name)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); give a folder that can") from error
    return report


def analyse(paths: list[str], out: str, cache: str, baseline: str = "", metric: str = "", test: str = "auto", level: float = 0.95,
            correction: str = "holm") -> dict:
    """Compares arms with a baseline: the first arm of the sweep, or the one named.

    out: folders of runs are told as seen from there. test: "paired" refuses runs that are no pairs, "welch" pairs none,
    "auto" pairs where data order and seed are the same.
    Raises UserError: no runs, unknown baseline or metric, no pairs.
    """
    planned = field(read_json(pathlib.Path(paths[0], "sweep.json")), "arms") or []
    arms = arms_of(read_runs(paths), [arm["name"] for arm in planned])
    names = [arm.name for arm in arms]
    if baseline and baseline not in names:
        raise UserError(f"--baseline={baseline}: no such arm; {did_you_mean(baseline, names)}")
    base = next(arm for arm in arms if arm.name == (baseline or names[0]))
    split, name = choose_metric(arms, metric)
    notes = [f"{arm.name}: no run has ended" for arm in arms if not arm.finals(split, name)]
    notes += [f"{arm.name}: {lost} of {len(arm.runs)} runs did not end well ({', '.join(kinds)}); the figures are of the others"
              for arm in arms if arm.finals(split, name)
              and (kinds := sorted({run.status for run in arm.runs if run.seed not in arm.finals(split, name)}))
              and (lost := len(arm.runs) - len(arm.finals(split, name)))]
    pairing = {arm.name: pair(arm, base, split, name, test) for arm in arms if arm is not base}
    notes += dict.fromkeys(note for *_, note in pairing.values() if note)
    compared = statistics.compare({arm: found[:3] for arm, found in pairing.items()}, level, correction)
    known = noise.lookup(base, (split, name), cache)
    higher = name in HIGHER_IS_BETTER
    rows = [about(arm, base, split, name, level, compared, higher, out) for arm in arms]
    for row in rows:
        row["note"] = row["note"] or in_the_noise(row, rows[arms.index(base)], known)
        row["frontier"] = {cost: on_frontier(row, rows, cost, higher) for cost in ("flops", "train_seconds")}
    report = {
        "title": pathlib.Path(paths[0]).resolve().name, "metric": {"split": split, "name": name, "higher_is_better": higher},
        "baseline": base.name, "level": level, "correction": correction, "test": test, "arms": rows,
        "noise": {**known._asdict(), "between_two": known.between_two} if known else None, "notes": notes,
        "runs": sum(len(arm.runs) for arm in arms), "about": provenance(arms)}
    return {**report, "summary": "; ".join(tables.findings(report)) + "."}


def pair(arm: Arm, base: Arm, split: str, name: str, test: str) -> tuple[list, list, bool, str]:
    """-> (values of the arm, of the baseline, whether they are pairs, what a reader must know). Raises UserError: test="paired",
    and they are none."""
    mine, its = arm.finals(split, name), base.finals(split, name)
    common = sorted(set(mine) & set(its))
    runs = {run.seed: run for run in arm.runs}
    others = {run.seed: run for run in base.runs}
    differ = list(dict.fromkeys(line for seed in sorted(set(runs) & set(others))
                                for line in order_differences(others[seed], runs[seed])))
    alone = list(mine.values()), list(its.values()), False
    if test == "welch":
        return *alone, ""
    if differ:
        if test == "paired":
            raise UserError(f"{arm.name} and {base.name}: their runs saw other rows, or in another order ({'; '.join(differ)}), "
                            "and are no pairs; compare them with --test=welch")
        return *alone, f"{arm.name}: compared as independent runs, as its data order is another ({'; '.join(differ)})"
    if len(common) < 2:
        if test == "paired":
            raise UserError(f"{arm.name} and {base.name}: {len(common)} seeds in common that ended; pairs need at least 2: run "
                            "both with the same seeds, or compare with --test=welch")
        if few := [x.name for x, ended in ((base, its), (arm, mine)) if len(ended) == 1]:
            return *alone, f"{few[0]}: one finished run, of which no interval and no p-value can be told; run at least 3 seeds"
        if not mine or not its:
            return *alone, ""
        return *alone, f"{arm.name}: compared as independent runs, as it has fewer than 2 seeds in common with {base.name}"
    left_out = sorted((set(mine) | set(its)) - set(common))
    return ([mine[s] for s in common], [its[s] for s in common], True,
            f"{arm.name}: seeds {', '.join(map(str, left_out))} have no partner, and are left out of the comparison"
            if left_out else "")


def about(arm: Arm, base: Arm, split: str, name: str, level: float, compared: dict, higher: bool, out: str
          ) -> dict:
    """One arm of report.json."""
    finals = arm.finals(split, name)
    values = np.array(list(finals.values()))
    interval = statistics.t_test(values, level=level)[0] if len(values) > 1 else None
    c = compared[arm.name] if arm.name in compared else None
    others = base.finals(split, name)
    difference = float(values.mean() - np.mean(list(others.values()))) if len(values) and others else None
    return {
        "name": arm.name, "experiment": arm.experiment, "note": "",
        "config_diff": [line.partition(": ")[::2] for line in diff(base.config, arm.config) if not line.startswith("seed: ")],
        "runs": [{"folder": os.path.relpath(run.folder, out), "seed": run.seed, "status": run.status,
                  "value": finite(field(finals, run.seed)), "flops": field(run.summary, "flops"),
                  "train_seconds": run.train_seconds} for run in arm.runs],
        "mean": finite(values.mean()) if len(values) else None,
        "std": finite(values.std(ddof=1)) if len(values) > 1 else None,
        "interval": list(map(float, interval)) if interval else None,
        "difference": c.difference if c else difference if arm is not base else None,
        "comparison": {**c._asdict(), "verdict": c.verdict(higher)} if c else None,
        "pairs": [[seed, value - others[seed]] for seed, value in finals.items() if seed in others]
        if c and c.paired else [],
        "flops": arm.mean_of("flops"), "train_seconds": arm.train_seconds(), "tokens": arm.mean_of("tokens"),
        "tokens_per_second": arm.mean_of("tokens_per_second"), "parameters": arm.mean_of("parameters"),
        "curve": band(arm, split, name), "train_curve": band(arm, "train", "loss", CURVE_POINTS),
    }


def band(arm: Arm, split: str, name: str, points: int = 0) -> list[list[float]]:
    """[[step, mean over seeds, standard deviation or 0]], where all finished runs have a value. points: so many running means."""
    curves = [run.curve(split, name) for run in arm.runs if run.status == "completed"]
    if points:
        curves = [running_mean(curve) for curve in curves]
    curves = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if points and len(steps) > points:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, points).round().astype(int))]
    return [[step, float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]
            for step in steps if (values := [curve[step] for curve in curves])]


def in_the_noise(row: dict, base: dict, known) -> str:
    """Where no test can be made, what the stored noise says of the difference of two single runs."""
    if row is base or row["comparison"] or row["difference"] is None or known is None:
        return ""
    size = abs(row["difference"])
    if size < known.between_two:
        return f"differs by {size:.2g}, less than the noise of this preset ({known.between_two:.2g} between two single runs)"
    return f"differs by {size:.2g}, more than the noise of this preset ({known.between_two:.2g} between two single runs)"


def on_frontier(row: dict, rows: list[dict], cost: str, higher: bool) -> bool:
    """Is no other arm as good for less, or better for as much?"""
    if row["mean"] is None or row[cost] is None:
        return False
    worth = lambda r: r["mean"] if higher else -r["mean"]
    rivals = [r for r in rows if r is not row and r["mean"] is not None and r[cost] is not None]
    return not any(worth(r) >= worth(row) and r[cost] <= row[cost] and (worth(r), r[cost]) != (worth(row), row[cost])
                   for r in rivals)
