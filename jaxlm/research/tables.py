"""A report in words, and as tables for a paper: Markdown and LaTeX (booktabs)."""

import math

from jaxlm.observe.progress import duration

MINUS, DASH = "−", "–"


def digits(report: dict) -> int:
    """Decimals at which the seeds still differ."""
    spread = [arm["std"] for arm in report["arms"] if arm["std"]]
    return min(6, max(2, 1 + math.ceil(-math.log10(min(spread))))) if spread else 4


def signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def interval_of(low_high, decimals: int) -> str:
    return f"[{signed(low_high[0], decimals)}, {signed(low_high[1], decimals)}]"


def listed(names) -> str:
    """In quotes where commas in them would be taken for those between them."""
    names = list(names)
    return ", ".join(f"“{name}”" for name in names) if any("," in name for name in names) else ", ".join(names)


def findings(report: dict) -> list[str]:
    """What can be said, and what cannot; a line each."""
    decimals, base, out = digits(report), report["baseline"], []
    compared = [arm for arm in report["arms"] if arm["comparison"]]
    for word in ("better", "worse"):
        for arm in sorted((a for a in compared if a["comparison"]["verdict"] == word), key=lambda a: -abs(a["difference"])):
            c = arm["comparison"]
            p = p_value(c["p_adjusted"])
            out.append(f"{arm['name']} is {word} than {base} by {abs(c['difference']):.{decimals}f} "
                       f"({report['level']:.0%} interval {interval_of(c['t'], decimals)}, p {p if '<' in p else '= ' + p})")
    if same := [arm for arm in compared if arm["comparison"]["verdict"] == "not significant"]:
        smallest = max(arm["comparison"]["detectable"] for arm in same)
        out.append(f"{listed(arm['name'] for arm in same)}: not significant (a true difference below "
                   f"{smallest:.{decimals}f} would likely be missed with these seeds)")
    if not compared:
        out = ["nothing can be said with confidence: " + ("there is one arm only" if len(report["arms"]) == 1 else
               "an interval needs at least 2 finished runs with different seeds in each arm")]
    return out


def rows(report: dict) -> list[tuple[str, ...]]:
    """Arm, runs, mean ± std, difference, interval, adjusted p, smallest detectable effect, FLOPs, time, verdict."""
    decimals, out = digits(report), []
    for arm in report["arms"]:
        c = arm["comparison"]
        value = DASH if arm["mean"] is None else f"{arm['mean']:.{decimals}f}"
        finished = sum(run["value"] is not None for run in arm["runs"])
        verdict = c["verdict"] if c else "one run" if finished == 1 else "no interval"
        out.append((
            arm["name"], f"{finished}" if finished == len(arm["runs"]) else f"{finished} of {len(arm['runs'])}",
            value + (f" ± {arm['std']:.{decimals}f}" if arm["std"] is not None else ""),
            DASH if arm["difference"] is None else signed(arm["difference"], decimals),
            interval_of(c["t"], decimals) if c else DASH, p_value(c["p_adjusted"]) if c else DASH,
            f"{c['detectable']:.{decimals}f}" if c else DASH, f"{arm['flops']:.2e}" if arm["flops"] else DASH,
            duration(arm["train_seconds"]) if arm["train_seconds"] else DASH,
            "baseline" if arm["name"] == report["baseline"] else verdict))
    return out


def header(report: dict) -> tuple[str, ...]:
    return ("arm", "seeds", f"{label(report)} (mean ± std)", f"difference from {report['baseline']}",
            f"{report['level']:.0%} interval", f"p ({report['correction']})", "detectable", "FLOPs", "training time", "verdict")


def label(report: dict) -> str:
    split, name = report["metric"]["split"], report["metric"]["name"].replace("_", " ")
    where = {"train": "training", "valid/all": "validation"}
    return f"{where[split] if split in where else split} {name}"


def method(report: dict) -> str:
    """How the figures were made, in one line."""
    kinds = {arm["comparison"]["paired"] for arm in report["arms"] if arm["comparison"]}
    test = {(True,): "paired t-test (same seed, same rows in the same order)", (False,): "Welch's t-test of independent runs",
            (False, True): "paired t-test where seed and data order are the same, else Welch's"}
    if not kinds:
        return "No test was made."
    return (f"{test[tuple(sorted(kinds))]}; p-values two-sided, correction: {report['correction']}; intervals "
            f"{report['level']:.0%}, not corrected; detectable: the smallest true difference found with 80 % "
            "probability at the corrected level.")


def markdown(report: dict) -> str:
    table = [header(report), ("---",) * 10, *rows(report)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([*lines, "", method(report), *(f"- {note}" for note in report["notes"]), ""])


def latex(report: dict) -> str:
    """Needs \\usepackage{booktabs}. The best mean is bold; a dagger marks what is not significant."""
    means = [arm["mean"] for arm in report["arms"] if arm["mean"] is not None]
    best = (max if report["metric"]["higher_is_better"] else min)(means) if means else None
    lines = [r"\begin{tabular}{lrrrrr}", r"\toprule",
             f"Arm & Seeds & {escape(label(report).capitalize())} & Difference & {report['level'] * 100:.0f}\\,\\% interval & $p$"
             r" \\", r"\midrule"]
    for arm, row in zip(report["arms"], rows(report), strict=True):
        name, seeds, value, difference, interval, p, *_ = map(escape, row)
        value = rf"\textbf{{{value}}}" if arm["mean"] is not None and arm["mean"] == best else value
        dagger = r"$^\dagger$" if row[-1] == "not significant" else ""
        lines.append(" & ".join((name, seeds, value, difference + dagger, interval, p)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {escape(method(report))} $^\\dagger$: not significant.", ""])


def escape(text: str) -> str:
    for plain, tex in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("$", r"\$"),
                       ("±", r"$\pm$"), (MINUS, "$-$"), ("< ", "$<$ "), (DASH, "--"), ("²", "$^2$"), ("~", r"\textasciitilde ")):
        text = text.replace(plain, tex)
    return text
