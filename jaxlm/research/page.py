"""report.html of several runs: one self-contained page, made of report.json alone."""

import html

from jaxlm.observe.progress import duration
from jaxlm.observe.report import STYLE, number_of, short_commit, tile
from jaxlm.research import charts, tables

OWN_STYLE = charts.STYLE + """
.verdict{background:var(--card);border-left:4px solid var(--a);border-radius:6px;padding:12px 16px;margin:16px 0;font-size:16px}
.verdict p{margin:2px 0}
.tiles{grid-template-columns:repeat(auto-fit,minmax(116px,1fr))}.tile{overflow-wrap:anywhere}.tile b{font-size:18px}
.tile:first-child{grid-column:span 2}
.wide{overflow-x:auto}.wide td{white-space:nowrap}.wide td .dim{white-space:normal}
th{text-align:left;color:var(--dim);font-weight:500;padding:3px 8px;font-size:12px;vertical-align:bottom}
td{font-variant-numeric:tabular-nums;vertical-align:top}td:first-child{font-family:inherit;font-weight:600;white-space:nowrap}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}.better{color:#169b72;font-weight:600}
.worse{color:#d6407b;font-weight:600}code{font-family:ui-monospace,monospace;font-size:12.5px}.note{margin:3px 0 3px 2px}
summary{cursor:pointer;font-weight:600;margin:10px 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:14px}
details pre{white-space:pre;font-size:12px}a{color:var(--a)}h2{margin-top:34px}svg{display:block}
"""


def page(report: dict) -> str:
    hue = {arm["name"]: charts.color(i) for i, arm in enumerate(report["arms"])}
    esc = html.escape
    sections = [
        f'<div class="verdict">{"".join(f"<p>{esc(line)}</p>" for line in tables.findings(report))}</div>',
        f'<div class="tiles">{"".join(tile(*t) for t in tiles(report))}</div>',
        *(f'<p class="note dim">• {esc(note)}</p>' for note in [*report["notes"], noise_note(report)] if note),
        forest(report, hue),
        f'<h2>Results</h2><div class="wide">{results(report, hue)}</div><p class="dim">{esc(tables.method(report))}</p>',
        f'<h2>Curves</h2>{charts.curves(tables.label(report).capitalize(), series(report, hue, "curve"))}'
        '<p class="dim">Lines are means over seeds, bands one standard deviation.</p>',
        charts.curves("Training loss (running mean)", series(report, hue, "train_curve"), height=300)
        if report["metric"]["split"] != "train" else "",
        f'<h2>Cost</h2><div class="two">{cost(report, hue, "flops", "training FLOPs of a run", charts.decades)}'
        f'{cost(report, hue, "train_seconds", "seconds in training steps", number_of)}</div>'
        '<p class="dim">Filled: no other arm is as good for less, or better for as much. FLOPs count causal attention and no '
        "recomputation; seconds are of steps alone, on the machines named above.</p>",
        f'<h2>Config by arm</h2><p class="dim">Keys that differ from {esc(report["baseline"])}.</p>'
        f'<div class="wide">{config_diff(report, hue)}</div>',
        f"<h2>Method</h2>{METHOD}",
        "<h2>For a paper</h2>" + "".join(f"<details><summary>{name}</summary><pre>{esc(make(report))}</pre></details>"
                                         for name, make in (("Markdown", tables.markdown), ("LaTeX", tables.latex))),
        f'<h2>Runs</h2><details><summary>{report["runs"]} runs</summary>{runs(report, hue)}</details>',
    ]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{esc(report["title"])} – jaxlm</title><style>{STYLE}{OWN_STYLE}</style><h1>{esc(report["title"])}</h1>
<div class="dim">{esc(headline(report))}</div>
{"".join(sections)}
</html>"""


def headline(report: dict) -> str:
    finished = sum(run["value"] is not None for arm in report["arms"] for run in arm["runs"])
    about = report["about"]
    return " · ".join([
        f"{len(report['arms'])} arms, {finished} of {report['runs']} runs finished", tables.label(report),
        f"baseline {report['baseline']}", *(f"commit {short_commit(commit)}" for commit in about["commit"]),
        *about["device"], *(f"jax {version}" for version in about["jax"])])


def tiles(report: dict):
    decimals = tables.digits(report)
    known = [arm for arm in report["arms"] if arm["mean"] is not None]
    best = (max if report["metric"]["higher_is_better"] else min)(known, key=lambda arm: arm["mean"], default=None)
    compared = [arm["comparison"] for arm in report["arms"] if arm["comparison"]]
    total = lambda name: sum(run[name] or 0 for arm in report["arms"] for run in arm["runs"])
    yield "best arm", html.escape(charts.cut(best["name"], 24)) if best else "–"
    yield f"its {tables.label(report)}", f"{best['mean']:.{decimals}f}" if best else "–"
    yield "significant", f"{sum(c['significant'] for c in compared)} of {len(compared)}" if compared else "–"
    yield "detectable difference", f"{max(c['detectable'] for c in compared):.{decimals}f}" if compared else "–"
    yield "noise of baseline", f"{report['noise']['std']:.{decimals}f}" if report["noise"] else "not known"
    yield "FLOPs, all runs", charts.decades(total("flops")) if total("flops") else "–"
    yield "time in steps", duration(total("train_seconds"))


def noise_note(report: dict) -> str:
    if not (known := report["noise"]):
        return (f"The noise of {report['baseline']} is not known: jaxlm sweep --config=FILE --repeats=5 --workdir=DIR measures "
                "it once for all later reports.")
    small = [arm["name"] for arm in report["arms"] if arm["difference"] is not None
             and abs(arm["difference"]) < known["between_two"]]
    return (f"Noise, {known['source']}: over {known['runs']} seeds of {report['baseline']} the standard deviation is "
            f"{known['std']:.2g}; two single runs lie up to {known['between_two']:.2g} apart by chance (95 %)."
            + (f" One run of each could not have told {tables.listed(small)} from {report['baseline']}." if small else ""))


def forest(report: dict, hue: dict) -> str:
    decimals = tables.digits(report)
    shown = []
    for arm in report["arms"]:
        if c := arm["comparison"]:
            words = (f"{tables.signed(c['difference'], decimals)}  {c['verdict']}, p {tables.p_value(c['p_adjusted'])}\n"
                     f"{tables.interval_of(c['t'], decimals)}, {c['runs']} {'pairs' if c['paired'] else 'runs'}")
            shown.append({"name": arm["name"], "color": hue[arm["name"]], "difference": c["difference"], "t": c["t"],
                          "bootstrap": c["bootstrap"], "pairs": [d for _, d in arm["pairs"]],
                          "detectable": c["detectable"], "words": words})
    if not shown:
        return ""
    better = "right" if report["metric"]["higher_is_better"] else "left"
    return (f"<h2>Difference from {html.escape(report['baseline'])}</h2>"
            + charts.differences(f"{tables.label(report).capitalize()}; {better} of zero is better", shown)
            + f'<p class="dim">Thick: {report["level"]:.0%} t interval; thin, below it: BCa bootstrap interval, too narrow with '
              "few seeds. Small dots: single pairs. Grey: true differences that these seeds would likely have missed.</p>")


def results(report: dict, hue: dict) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in tables.header(report))
    body = []
    for arm, row in zip(report["arms"], tables.rows(report), strict=True):
        cells = [f"<td>{key_of(arm, hue)}</td>", *(f"<td>{html.escape(cell)}</td>" for cell in row[1:-1])]
        note = f'<br><span class="dim">{html.escape(arm["note"])}</span>' if arm["note"] else ""
        body.append(f'<tr>{"".join(cells)}<td class="{row[-1]}">{html.escape(row[-1])}{note}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def key_of(arm: dict, hue: dict) -> str:
    return f'<span class="key" style="background:{hue[arm["name"]]}"></span>{html.escape(arm["name"])}'


def series(report: dict, hue: dict, which: str) -> list[tuple]:
    return [(arm["name"], hue[arm["name"]], arm[which]) for arm in report["arms"]]


def cost(report: dict, hue: dict, name: str, label: str, form) -> str:
    points = [{"name": arm["name"], "color": hue[arm["name"]], "x": arm[name], "y": arm["mean"], "std": arm["std"] or 0.0,
               "frontier": arm["frontier"][name]} for arm in report["arms"] if arm["mean"] is not None and arm[name] is not None]
    return charts.pareto(f"{tables.label(report).capitalize()} against {label}", points, label, form)


def config_diff(report: dict, hue: dict) -> str:
    keys = sorted({key for arm in report["arms"] for key, _ in arm["config_diff"]})
    if not keys:
        return '<p class="dim">none</p>'
    base = {key: change.partition(" -> ")[0] for arm in report["arms"] for key, change in arm["config_diff"]}
    body = []
    for arm in report["arms"]:
        mine = {key: change.partition(" -> ")[2] for key, change in arm["config_diff"]}
        cells = "".join(f"<td><b><code>{html.escape(mine[key])}</code></b></td>" if key in mine else
                        f'<td class="dim"><code>{html.escape(base[key])}</code></td>' for key in keys)
        body.append(f"<tr><td>{key_of(arm, hue)}</td>{cells}</tr>")
    head = "".join(f"<th><code>{html.escape(key)}</code></th>" for key in ("", *keys))
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def runs(report: dict, hue: dict) -> str:
    body = []
    for arm in report["arms"]:
        for run in arm["runs"]:
            value = "–" if run["value"] is None else f"{run['value']:.5f}"
            body.append(f'<tr><td>{key_of(arm, hue)}</td><td>{run["seed"]}</td><td>{run["status"]}</td><td>{value}</td>'
                        f'<td><a href="{html.escape(run["folder"])}/report.html">{html.escape(run["folder"])}</a></td></tr>')
    return f"<table><tr><th>arm</th><th>seed</th><th>status</th><th>value</th><th>run</th></tr>{''.join(body)}</table>"


METHOD = """<p>Runs of two arms are pairs where seed and data order are the same: they started from the same random numbers
and saw the same rows in the same order, and their difference is free of what both share. The interval and the p-value are of
Student's t on the differences (Welch's where there are no pairs). The bootstrap (BCa, Efron 1987) is shown beside it;
simulated, it takes chance for an effect in 28 %, 17 % and 10 % of cases with 3, 5 and 10 seeds where 5 % are promised, and
the t-test in 5 %. With many arms the p-values are corrected as said above (Holm 1979: the chance of any false claim in this
report stays at 5 %). <b>Not significant</b> does not mean equal: the detectable difference is the one that would have been
found four times in five.</p>"""
