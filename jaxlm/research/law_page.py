"""scaling.html: a scaling law, its prediction and its score as one self-contained page, made of their JSON files alone."""

import html
import math

from jaxlm.observe.report import STYLE, tile
from jaxlm.research import charts
from jaxlm.research.law import PARAMETERS, Law, levels
from jaxlm.research.page import OWN_STYLE
from jaxlm.research.scaling import short

NAMES = {"E": "E", "A": "A", "alpha": "alpha", "B": "B", "beta": "beta", "compute_exponent": "a, N ~ C^a"}
CURVE = 48  # places at which a curve is drawn


def page(title: str, scaling: dict, prediction: dict, score: dict) -> str:
    """prediction, score: {} where there are none yet."""
    esc = html.escape
    metric = scaling["metric"]
    label = f"{metric['split']} {metric['name']}"
    sections = [
        verdict(prediction, score),
        f'<div class="tiles">{"".join(tile(*t) for t in tiles(scaling))}</div>',
        *(f'<p class="note dim">• {esc(note)}</p>' for note in scaling["notes"]),
        f"<h2>Loss over tokens</h2>{over_tokens(label, scaling, prediction, score)}"
        '<p class="dim">Points are runs, lines the law at their sizes.'
        + (" The bar is the interval that was written down before the run existed" if prediction else "")
        + ("; the cross is what it then reached" if score else "") + ("." if prediction else "") + "</p>",
        f'<div class="two">{residuals(scaling)}{budgets(label, scaling)}</div>',
        f'<h2>The law</h2><p>L(N, D) = E + A / N<sup>alpha</sup> + B / D<sup>beta</sup></p>{table(scaling)}',
        f"<h2>Runs</h2>{runs(scaling)}",
        f"<h2>Method</h2>{METHOD}",
    ]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{esc(title)} – jaxlm</title><style>{STYLE}{OWN_STYLE}</style><h1>Scaling law: {esc(title)}</h1>
<div class="dim">{len(scaling["points"])} runs · {esc(label)} · {scaling["level"]:.0%} intervals</div>
{"".join(sections)}
</html>"""


def verdict(prediction: dict, score: dict) -> str:
    if not prediction:
        return ""
    low, high = prediction["interval"]
    said = [f"Predicted on {prediction['created']} for {short(prediction['parameters'])} parameters and "
            f"{short(prediction['tokens'])} tokens: {prediction['loss']:.4f}, {prediction['level']:.0%} interval {low:.4f} to "
            f"{high:.4f} (config {prediction['fingerprint']}, digest {prediction['digest']}).",
            f"{score['verdict'].capitalize()} (run begun {score['started']})." if score else "That run has not been scored yet."]
    return f'<div class="verdict">{"".join(f"<p>{html.escape(line)}</p>" for line in said)}</div>'


def tiles(scaling: dict):
    law, points = scaling["law"], scaling["points"]
    yield "alpha (of N)", f"{law['alpha']['value']:.3f}"
    yield "beta (of D)", f"{law['beta']['value']:.3f}"
    yield "E", f"{law['E']['value']:.3f}"
    yield "runs off the law by", f"{scaling['noise']:.2%}"
    yield "sizes", f"{len(levels_of(points))}"
    yield "FLOPs, all runs", f"{sum(p['flops'] for p in points):.2e}"


def levels_of(points: list[dict]) -> list[list[dict]]:
    """Runs of each size, smallest first."""
    return [[points[i] for i in group] for group in levels([p["parameters"] for p in points])]


def spaced(low: float, high: float) -> list[float]:
    """From low to high, evenly by logarithm."""
    return [low * (high / low) ** (i / (CURVE - 1)) for i in range(CURVE)]


def line(frame, xs, ys, hue: str, more: str = "") -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline class="line" stroke="{hue}" {more} points="{path}"/>'


def over_tokens(label: str, scaling: dict, prediction: dict, score: dict, width=1036, height=420) -> str:
    law = Law(*(scaling["law"][name]["value"] for name in PARAMETERS))
    points, groups = scaling["points"], levels_of(scaling["points"])
    tokens, losses = [p["tokens"] for p in points], [p["loss"] for p in points]
    if prediction:
        tokens.append(prediction["tokens"])
        losses += [*prediction["interval"], *([score["measured"]] if score and score["measured"] else [])]
    losses.append(min(losses) - 0.06 * (max(losses) - min(losses)))  # room below
    frame = charts.LogFrame(width, height, tokens, losses, right=150)
    out = frame.grid("tokens", short, f"{label.capitalize()} over tokens, by parameters without embeddings")
    xs, ends = spaced(min(tokens), max(tokens)), []
    for i, group in enumerate(groups):
        hue = charts.color(i)
        ys = [float(law.loss(group[0]["parameters"], x)) for x in xs]
        shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= frame.y1]
        out.append(line(frame, *zip(*shown, strict=True), hue) if len(shown) > 1 else "")
        out += [f'<circle cx="{frame.x(p["tokens"]):.1f}" cy="{frame.y(p["loss"]):.1f}" r="4.5" fill="{hue}" '
                f'stroke="var(--card)"><title>{html.escape(p["name"])}: {p["loss"]:.4f}</title></circle>' for p in group]
        ends.append((short(group[0]["parameters"]), hue, frame.y(ys[-1])))
    if prediction:
        out.append(foretold(frame, law, xs, prediction, score))
        ends.append((f"{short(prediction['parameters'])}, held back", "var(--fg)",
                     frame.y(float(law.loss(prediction["parameters"], xs[-1])))))
    places = charts.spread([y for *_, y in ends], 15, frame.top, height - frame.bottom)
    out += [f'<text class="name" style="fill:{hue}" x="{width - 142}" y="{y + 4:.1f}">{html.escape(name)}</text>'
            for (name, hue, _), y in zip(ends, places, strict=True)]
    return charts.svg(width, height, out, label)


def foretold(frame, law: Law, xs, prediction: dict, score: dict) -> str:
    """The law at the held-back size, the interval as a bar, what was measured as a cross."""
    ys = [float(law.loss(prediction["parameters"], x)) for x in xs]
    shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= frame.y1]
    low, high = prediction["interval"]
    x, y = frame.x(prediction["tokens"]), frame.y(prediction["loss"])
    out = [line(frame, *zip(*shown, strict=True), "var(--fg)", 'stroke-dasharray="5 4" opacity=".6"') if len(shown) > 1 else "",
           f'<line stroke="var(--fg)" stroke-width="7" opacity=".28" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(high):.1f}" '
           f'y2="{frame.y(low):.1f}"/>',
           f'<line stroke="var(--fg)" stroke-width="2" x1="{x - 7:.1f}" x2="{x + 7:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>']
    if score and score["measured"]:
        m = frame.y(score["measured"])
        hue = "#169b72" if score["inside"] else "#d6407b"
        out += [f'<line stroke="{hue}" stroke-width="2.6" x1="{x - 6:.1f}" x2="{x + 6:.1f}" y1="{m - s:.1f}" y2="{m + s:.1f}"/>'
                for s in (6, -6)]
    return "".join(out)


def residuals(scaling: dict, width=510, height=330) -> str:
    """How far each run lies off the law, over its size: a law of the right form leaves no pattern."""
    points, groups = scaling["points"], levels_of(scaling["points"])
    percent = [100 * p["log_residual"] for p in points]
    frame = charts.LogFrame(width, height, [p["parameters"] for p in points], [*percent, 0.0])
    out = frame.grid("parameters without embeddings", short, "Measured above the law, %")
    out.append(f'<line class="zero" x1="{frame.left}" x2="{width - frame.right}" y1="{frame.y(0):.1f}" y2="{frame.y(0):.1f}"/>')
    for i, group in enumerate(groups):
        out += [f'<circle cx="{frame.x(p["parameters"]):.1f}" cy="{frame.y(100 * p["log_residual"]):.1f}" r="4.5" '
                f'fill="{charts.color(i)}" stroke="var(--card)"><title>{html.escape(p["name"])}</title></circle>' for p in group]
    return charts.svg(width, height, out, "Residuals")


def budgets(label: str, scaling: dict, width=510, height=330) -> str:
    """A parabola for each budget of FLOPs."""
    found = scaling["parabolas"]
    title = f"{label.capitalize()} at one budget of FLOPs"
    if not found:
        return ""
    at = lambda p, n: sum(c * math.log(n) ** k for c, k in zip(p["coefficients"], (2, 1, 0), strict=True))
    mine = lambda p: [q for q in scaling["points"] if abs(q["flops"] / p["flops"] - 1) < 0.1]
    curves = [spaced(p["parameters"][0], p["parameters"][-1]) for p in found]
    ys = [at(p, n) for p, xs in zip(found, curves, strict=True) for n in xs] + [q["loss"] for p in found for q in mine(p)]
    frame = charts.LogFrame(width, height, [n for p in found for n in p["parameters"]], ys, right=86)
    out, ends = frame.grid("parameters without embeddings", short, title), []
    for i, (p, xs) in enumerate(zip(found, curves, strict=True)):
        hue = charts.color(i)
        out.append(line(frame, xs, [at(p, n) for n in xs], hue))
        out += [f'<circle cx="{frame.x(q["parameters"]):.1f}" cy="{frame.y(q["loss"]):.1f}" r="4" fill="{hue}"/>'
                for q in mine(p)]
        if p["best_parameters"]:
            out.append(f'<circle cx="{frame.x(p["best_parameters"]):.1f}" cy="{frame.y(p["best_loss"]):.1f}" r="7" fill="none" '
                       f'stroke="{hue}" stroke-width="2"><title>{short(p["best_parameters"])}</title></circle>')
        ends.append((charts.decades(p["flops"]), hue, frame.y(at(p, xs[-1]))))
    places = charts.spread([y for *_, y in ends], 14, frame.top, height - frame.bottom)
    out += [f'<text class="name" style="fill:{hue}" x="{width - 78}" y="{y + 4:.1f}">{name}</text>'
            for (name, hue, _), y in zip(ends, places, strict=True)]
    return charts.svg(width, height, out, title)


def table(scaling: dict) -> str:
    rows = [(NAMES[name], entry["value"], entry["interval"]) for name, entry in scaling["law"].items()]
    if ranked := scaling["parabola_exponent"]:
        rows.append(("a, by parabolas", ranked["value"], ranked["interval"]))
    between = lambda interval: f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "–"
    body = "".join(f"<tr><td>{name}</td><td>{value:.4g}</td><td>{between(interval)}</td></tr>" for name, value, interval in rows)
    minima = "".join(f"<tr><td>{charts.decades(p['flops'])} FLOPs</td><td>"
                     + (f"{short(p['best_parameters'])} parameters</td><td>loss {p['best_loss']:.4f}" if p["best_parameters"]
                        else f"–</td><td>{html.escape(p['words'])}") + "</td></tr>" for p in scaling["parabolas"])
    return (f"<table><tr><th></th><th>value</th><th>{scaling['level']:.0%} interval</th></tr>{body}</table>"
            + (f"<h2>Best sizes by budget</h2><table>{minima}</table>" if minima else ""))


def runs(scaling: dict) -> str:
    body = "".join(f"<tr><td>{html.escape(p['name'])}</td><td>{p['seed']}</td><td>{short(p['parameters'])}</td>"
                   f"<td>{short(p['tokens'])}</td><td>{p['flops']:.2e}</td><td>{p['loss']:.4f}</td>"
                   f"<td>{100 * p['log_residual']:+.2f} %</td></tr>"
                   for p in sorted(scaling["points"], key=lambda p: (p["parameters"], p["tokens"])))
    head = "".join(f"<th>{name}</th>" for name in ("run", "seed", "parameters", "tokens", "FLOPs", "loss", "above the law"))
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


METHOD = """<p>The sum of Huber losses (delta 1e-3) of log L is minimised by L-BFGS from a grid of starts (Hoffmann et al.,
arXiv:2203.15556, D.3), as a sum and to a tight tolerance (Besiroglu et al., arXiv:2404.10102). Parameters are those without
embeddings and head; tokens are steps times batch times length. Intervals of the parameters are percentiles of a bootstrap over
runs; that of a prediction adds the noise of one run, by Student's t. They hold if the law does: what the form of the law gets
wrong beyond the fitted sizes is in no interval. The parameters lean on one another, so that each alone is less sure than the loss
between the runs. <b>a</b> is the exponent of compute with which the best size grows.</p>"""
