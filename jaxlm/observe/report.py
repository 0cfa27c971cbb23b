"""report.html: one self-contained page of a run: curves, samples, config. Opens with no network."""

import html
import json
import math
import os
import pathlib

from jaxlm.observe import heatmap
from jaxlm.observe.fitting import LEAST, judge

STYLE = """
:root{--fg:#1c1e21;--bg:#fff;--dim:#6a7078;--line:#e3e6ea;--card:#f6f7f9;--a:#2563eb;--b:#dc6803}
@media(prefers-color-scheme:dark){:root{--fg:#e6e8eb;--bg:#14161a;--dim:#969da6;--line:#2c3037;--card:#1c1f25;--a:#6ea0ff;--b:#ffa04d}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1080px;padding:28px 22px;color:var(--fg);background:var(--bg);
font:15px/1.5 system-ui,sans-serif}h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;margin:30px 0 10px}
.dim{color:var(--dim)}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:10px;margin:18px 0}
.tile{background:var(--card);border-radius:8px;padding:10px 14px}.tile b{display:block;font-size:21px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:14px}.charts>div:first-child{grid-column:1/-1}
svg{width:100%;height:auto;background:var(--card);border-radius:8px}svg text{fill:var(--dim);font-size:11px}
.grid{stroke:var(--line)}.raw{stroke:var(--a);opacity:.3}.smooth{stroke:var(--a);stroke-width:1.8}.valid{stroke:var(--b);stroke-width:2}
.gap{fill:var(--b);opacity:.13}.best{stroke:var(--b);stroke-dasharray:4 3}
.verdict{background:var(--card);border-left:4px solid var(--b);border-radius:0 8px 8px 0;padding:9px 14px;margin:0 0 14px}
.verdict b::first-letter{text-transform:uppercase}
svg .label{fill:var(--b);font-weight:600;font-size:12px}svg .title{fill:var(--fg);font-size:13px;font-weight:600}
pre{background:var(--card);border-radius:8px;padding:12px 14px;overflow:auto;white-space:pre-wrap;font-size:13px}
table{border-collapse:collapse;width:100%;font-size:13px}td{border-top:1px solid var(--line);padding:3px 8px}
td:first-child{font-family:ui-monospace,monospace}tr.set td{font-weight:600}
"""

ROUTER_CHARTS = {"Fullest expert (multiple of an equal share)": "expert_load_max", "Load-balance loss": "load_balance_loss",
                 "Router z-loss": "router_z_loss"}


def write_report(workdir: str) -> str:
    """Reads what is there of config.json, summary.json, metrics.jsonl and samples.jsonl; -> the path of the page."""
    folder = pathlib.Path(workdir)
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    lines, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    train = [x for x in lines if x["split"] == "train"]
    valid = [x for x in lines if x["split"] == "valid/all"]
    loss, valid_loss = pairs(train, "loss"), pairs(valid, "loss")
    page = folder / "report.html"
    temporary = folder / "report.html.tmp"
    temporary.write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(folder.resolve().name)} – jaxlm</title>
<style>{STYLE}{heatmap.STYLE}</style><h1>{html.escape(folder.resolve().name)}</h1>
<div class="dim">{html.escape(headline(config, summary))}</div>
<div class="tiles">{"".join(tile(*t) for t in tiles(summary, train, valid))}</div>
{about_fit(judge(loss, valid_loss))}
<div class="charts">
{chart("Loss", loss, valid_loss, wide=True)}
{chart("Tokens per second", pairs(train, "tokens_per_second"))}
{chart("Gradient norm", pairs(train, "grad_norm"))}
{chart("Learning rate", pairs(train, "learning_rate"), smooth=False)}
{chart("Data wait (share of time)", pairs(train, "data_wait_fraction"))}
{"".join(chart(title, points) for title, name in ROUTER_CHARTS.items() if (points := pairs(train, name)))}
</div>
{heatmap.heatmaps([x for x in lines if x["split"] == "internals"])}
<h2>Generated text</h2>{"".join(sample(s) for s in reversed(samples[-6:])) or '<p class="dim">none (eval.sample_tokens=0)</p>'}
<h2>Config</h2><p class="dim">Keys that differ from the defaults come first, in bold.</p>{config_table(config)}
</html>""")
    os.replace(temporary, page)
    return str(page)


def read_json(file) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def read_lines(file) -> list[dict]:
    out = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            out.append(json.loads(line))
        except ValueError:  # the run was killed in the middle of a line
            continue
    return out


def field(record: dict, name: str):
    return record[name] if name in record else None


def headline(config, summary) -> str:
    parts = [f"status {field(summary, 'status') or 'running'}", f"config {field(config, 'fingerprint') or '-'}",
             f"commit {short_commit(field(config, 'commit') or '-')}", f"started {field(config, 'started') or '-'}",
             f"{field(summary, 'devices') or '-'} × {field(summary, 'device_kind') or '-'}",
             f"jax {field(summary, 'jax_version') or '-'}"]
    return " · ".join(parts)


def tiles(summary, train, valid):
    number = lambda x, form: "–" if x is None else format(x, form)
    last = valid[-1] if valid else {}
    yield "validation loss", number(field(last, "loss"), ".4f")
    if field(last, "accuracy") is None:
        yield "perplexity", number(field(last, "perplexity"), ".3f")
        yield "bits per byte", number(field(last, "bits_per_byte"), ".4f")
    else:
        yield "accuracy", number(field(last, "accuracy"), ".2%")
    yield "tokens per second", number(field(summary, "tokens_per_second"), ",.0f")
    yield "steps", number(field(summary, "steps") or (train[-1]["step"] if train else None), ",")
    yield "parameters", number(field(summary, "parameters"), ",")
    yield "seconds", number(field(summary, "elapsed_seconds"), ",.0f")


def short_commit(commit: str) -> str:
    """The first letters of its hash, and whether the code was edited."""
    return commit[:12] + commit[40:]


def tile(name, value) -> str:
    return f'<div class="tile"><span class="dim">{name}</span><b>{value}</b></div>'


def about_fit(verdict) -> str:
    what, colon, why = verdict.text.partition(":")
    return f'<p class="verdict"><b>{html.escape(what)}</b>{colon}{html.escape(why)}</p>'


def pairs(lines, name) -> list[tuple[float, float]]:
    return [(x["step"], x[name]) for x in lines if field(x, name) is not None]


def chart(title: str, points, valid=(), wide=False, smooth=True) -> str:
    """An SVG line chart: the raw values faint, their running mean strong, validation points on top."""
    width, height, left, bottom, top = (1036, 330, 54, 26, 30) if wide else (510, 210, 54, 26, 30)
    title = f'<text class="title" x="14" y="20">{html.escape(title)}</text>'
    if not points:
        return f'<div><svg viewBox="0 0 {width} {height}">{title}<text x="14" y="60">no data</text></svg></div>'
    xs = [x for x, _ in [*points, *valid]]
    ys = sorted(y for _, y in [*points, *valid])
    low, high = ys[0], ys[min(len(ys) - 1, int(0.995 * len(ys)))]  # one spike must not flatten the curve
    high = high if high > low else low + (abs(low) or 1.0)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    sx = lambda x: left + (x - x0) / (x1 - x0) * (width - left - 60)
    sy = lambda y: height - bottom - (min(y, high) - low) / (high - low) * (height - bottom - top - 6)
    path = lambda ps: "M" + "L".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in ps)
    parts = [title]
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 60}" y1="{sy(y):.1f}" y2="{sy(y):.1f}"/>'
                     f'<text x="{left - 6}" y="{sy(y) + 4:.1f}" text-anchor="end">{number_of(y)}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{sx(x):.1f}" y="{height - 8}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<path class="{"raw" if smooth else "smooth"}" fill="none" d="{path(points)}"/>')
    if smooth:
        parts.append(f'<path class="smooth" fill="none" d="{path(running_mean(points))}"/>')
    if valid:
        if gap := gap_between(running_mean(points) if smooth else points, valid):
            parts.append(f'<path class="gap" d="{path(gap)}Z"/>')
        if len(valid) >= LEAST:
            x, y = min(valid, key=lambda point: point[1])
            parts.append(f'<line class="best" x1="{sx(x):.1f}" x2="{sx(x):.1f}" y1="{top}" y2="{height - bottom}"/>'
                         f'<text x="{sx(x) - 5:.1f}" y="{top + 12}" text-anchor="end">lowest at {x:,}: {y:.4f}</text>')
        parts.append(f'<path class="valid" fill="none" d="{path(valid)}"/>')
        parts += [f'<circle cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="3.2" fill="var(--b)"/>' for x, y in valid]
        x, y = valid[-1]
        parts.append(f'<text class="label" x="{sx(x) + 7:.1f}" y="{sy(y) + 4:.1f}">{y:.4f}</text>')
        parts.append(f'<text x="{width - 70}" y="20" text-anchor="end">blue: train · orange: validation · shaded: the gap</text>')
    return f'<div><svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg></div>'


def gap_between(points, valid) -> list[tuple[float, float]]:
    """The outline of what lies between two curves, over the steps of both; [] where that is no area."""
    first, last = max(points[0][0], valid[0][0]), min(points[-1][0], valid[-1][0])
    over, under = ([p for p in curve if first <= p[0] <= last] for curve in (valid, points))
    return [*over, *reversed(under)] if len(over) > 1 and len(under) > 1 else []


def number_of(y: float) -> str:
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.3g}"


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in [low, high]."""
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def running_mean(points):
    half, out = max(1, len(points) // 60), []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(window) / len(window)))
    return out


def sample(record) -> str:
    text = html.escape(record["prompt"] + record["text"])
    return f'<div class="dim">step {record["step"]:,}</div><pre>{text.strip()}</pre>'


def config_table(record) -> str:
    from configs import default
    from jaxlm.config import flatten

    if "config" not in record:
        return ""
    base, rows = flatten(default.get_config()), []
    for key, value in flatten(record["config"]).items():
        changed = key not in base or json.loads(json.dumps(base[key])) != value
        rows.append((not changed, f'<tr class="{"set" if changed else ""}"><td>{html.escape(key)}</td>'
                                  f"<td>{html.escape(json.dumps(value))}</td></tr>"))
    versions = ", ".join(f"{k} {v}" for k, v in record["packages"].items()) if "packages" in record else ""
    body = "".join(row for _, row in sorted(rows, key=lambda r: r[0]))
    return f'<table>{body}</table><p class="dim">{html.escape(versions)}</p>'
