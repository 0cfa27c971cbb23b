"""Pages of `jaxlm eval`, self-contained: ROC curves, reliability diagram, confusion matrix, as SVG."""

import html

import numpy as np

from jaxlm.evaluate.classification import about, headline, number
from jaxlm.observe.report import STYLE, tile

SIZE, LEFT, TOP = 400, 56, 40  # of the square that curves are in, in pixels
COLOURS = ("#2563eb", "#dc6803", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777", "#4d7c0f", "#7c3aed",
           "#475569", "#b45309", "#0f766e")
OWN_STYLE = """
.charts{align-items:start;grid-template-columns:repeat(auto-fit,minmax(340px,1fr))}.charts>div:first-child{grid-column:auto}
td,th{text-align:right}td:first-child,th:first-child{text-align:left}
.diagonal{stroke:var(--dim);stroke-dasharray:4 4}.cell{font-size:13px}
"""


def classification_page(title: str, result: dict, members=()) -> str:
    """result: of `classification.evaluate_classes`; members: of an ensemble, the rows of a table."""
    rows = [(name, f"{of['examples']:,}", *(number(of[key]) for key in ("precision", "recall", "f1", "auc_roc")))
            for name, of in result["per_class"].items()]
    shown = list(result["roc"].items())
    shown = shown[-1:] if len(result["per_class"]) == 2 else shown
    curves = [(f"{name}: {number(result['per_class'][name]['auc_roc'])}", of) for name, of in shown]
    missing = "".join(f"<p>Not computed: {html.escape(what)}: {html.escape(why)}.</p>"
                      for what, why in result["not_computed"].items())
    runs = f"<h2>Runs</h2>{rows_of(members[0], members[1:])}" if members else ""
    return page(title, about(result), f"""
<div class="tiles">{"".join(tile(label, number(value)) for label, value in headline(result).items())}</div>{missing}
<div class="charts">{roc(curves)}{reliability(result["calibration"])}
{confusion(result["confusion_matrix"], list(result["per_class"]))}</div>
<h2>Classes</h2>{rows_of(("class", "examples", "precision", "recall", "F1", "AUC-ROC"), rows)}{runs}""")


def page(title: str, about: str, body: str) -> str:
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)} – jaxlm</title><style>{STYLE}{OWN_STYLE}</style><h1>{html.escape(title)}</h1>
<div class="dim">{html.escape(about)}</div>{body}</html>"""


def rows_of(head, rows) -> str:
    cells = lambda kind, row: "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in row)
    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def frame(title: str, across: str, up: str, body: str, bottom: int = 46) -> str:
    """A chart whose axes go from 0 to 1."""
    ticks = "".join(
        f'<line class="grid" x1="{x(t):.0f}" x2="{x(t):.0f}" y1="{y(0)}" y2="{y(1)}"/>'
        f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{y(t):.0f}" y2="{y(t):.0f}"/>'
        f'<text x="{x(t):.0f}" y="{y(0) + 16}" text-anchor="middle">{t:.1f}</text>'
        f'<text x="{x(0) - 6}" y="{y(t) + 4:.0f}" text-anchor="end">{t:.1f}</text>' for t in np.linspace(0, 1, 6))
    return (f'<div><svg viewBox="0 0 {LEFT + SIZE + 16} {TOP + SIZE + bottom}"><text class="title" x="14" y="22">{title}</text>'
            f'{ticks}<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>{body}'
            f'<text x="{x(0.5)}" y="{y(0) + 36}" text-anchor="middle">{across}</text>'
            f'<text transform="translate(16 {y(0.5)}) rotate(-90)" text-anchor="middle">{up}</text></svg></div>')


def x(share: float) -> float:
    return LEFT + SIZE * share


def y(share: float) -> float:
    return TOP + SIZE * (1 - share)


def roc(curves, strong: str = "") -> str:
    """curves: [(label, {"false_positive_rate", "true_positive_rate"})]; the one whose label is `strong` is drawn thick."""
    parts = []
    for i, (label, of) in enumerate(curves):
        points = zip(of["false_positive_rate"], of["true_positive_rate"], strict=True)
        path = "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        colour, width = ("var(--fg)", 2.6) if label == strong else (COLOURS[i % len(COLOURS)], 1.5)
        at = y(0.04) - 17 * (len(curves) - 1 - i)
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="{width}" d="{path}"/>'
                     f'<line x1="{x(0.52)}" x2="{x(0.57)}" y1="{at - 4:.0f}" y2="{at - 4:.0f}" stroke="{colour}" '
                     f'stroke-width="3"/>'
                     f'<text x="{x(0.59)}" y="{at:.0f}">{html.escape(label)}</text>')
    return frame("ROC; area under the curve", "share of the others taken for it", "share of it that is found", "".join(parts))


def reliability(calibration: dict) -> str:
    """The accuracy of the examples in each bin of confidence, and below how many they are."""
    most = max(of["examples"] for of in calibration["bins"])
    parts = []
    for of in calibration["bins"]:
        at = x(of["confidence"])
        parts.append(f'<rect x="{at - 7:.1f}" width="14" y="{y(0.16 * of["examples"] / most):.1f}" '
                     f'height="{SIZE * 0.16 * of["examples"] / most:.1f}" fill="var(--line)"/>'
                     f'<circle cx="{at:.1f}" cy="{y(of["accuracy"]):.1f}" r="5" fill="var(--a)">'
                     f'<title>{of["examples"]:,} examples</title></circle>')
    line = "M" + "L".join(f'{x(of["confidence"]):.1f},{y(of["accuracy"]):.1f}' for of in calibration["bins"])
    parts.append(f'<path class="smooth" fill="none" d="{line}"/>')
    return frame(f"Reliability; expected calibration error {number(calibration['expected_calibration_error'])}",
                 "probability of the class told (grey: how many examples)", "share that is right", "".join(parts))


def confusion(matrix, names) -> str:
    """Shades are shares of the true class."""
    count = len(names)
    cell, longest = SIZE / count, max(map(len, names))
    left = min(150, 20 + 8 * longest)
    short = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    turn = longest * 8 > cell
    parts = []
    for i, row in enumerate(matrix):
        top = TOP + 20 + i * cell
        parts.append(f'<text x="{left - 8}" y="{top + cell / 2 + 4:.1f}" text-anchor="end">{html.escape(short[i])}</text>')
        for j, value in enumerate(row):
            share = value / max(1, sum(row))
            parts.append(f'<rect x="{left + j * cell:.1f}" y="{top:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}" '
                         f'fill="var(--a)" fill-opacity="{0.06 + 0.84 * share:.3f}"/>'
                         f'<text class="cell" style="fill:{"#fff" if share > 0.55 else "var(--fg)"}" '
                         f'x="{left + (j + 0.5) * cell:.1f}" y="{top + cell / 2 + 4:.1f}" text-anchor="middle">{value:,}</text>')
    bottom = TOP + 20 + SIZE
    for j, name in enumerate(short):
        at = left + (j + 0.5) * cell
        place = f'transform="translate({at + 4:.1f} {bottom + 8}) rotate(-60)" text-anchor="end"' if turn else (
            f'x="{at:.1f}" y="{bottom + 16}" text-anchor="middle"')
        parts.append(f"<text {place}>{html.escape(name)}</text>")
    height = bottom + (20 + 7 * min(16, longest) if turn else 42)
    return (f'<div><svg viewBox="0 0 {left + SIZE + 16} {height}"><text class="title" x="14" y="22">Confusion; row: true class, '
            f'column: told</text>{"".join(parts)}</svg></div>')


def crossval_page(title: str, summary: dict, curves: list[dict]) -> str:
    """summary, curves: of `crossval.summarise` and `crossval.mean_curves`."""
    from jaxlm.evaluate.crossval import NOTE, NUMBERS, missing, rows

    known = {key: of for key, of in summary["summary"].items() if of}
    areas = [fold["auc_roc"] for fold in summary["folds"] if fold["auc_roc"] is not None]
    names = [f"fold {i}: {number(fold['auc_roc'])}" for i, fold in enumerate(summary["folds"]) if fold["auc_roc"] is not None]
    names += [f"mean: {number(float(np.mean(areas)))}"] if areas else []
    head, *lines = rows(summary)
    tiles = "".join(tile(NUMBERS[key], f"{of['mean']:.4f} ± {(of['interval'][1] - of['interval'][0]) / 2:.4f}")
                    for key, of in known.items())
    picture = roc(list(zip(names, curves, strict=True)), strong=names[-1]) if names else ""
    return page(title, f"{sum(fold['examples'] for fold in summary['folds']):,} examples, each held out once", f"""
<div class="tiles">{tiles}</div><p class="dim">{html.escape(NOTE)}</p>
{"".join(f"<p>{html.escape(line)}</p>" for line in missing(summary))}
<div class="charts">{picture}<div>{rows_of(head, lines)}</div></div>""")
