"""replay-<N>.html: what a step was given and did, each token in the colour of its loss. Opens with no network."""

import html
import math
import os

from jaxlm.observe.heatmap import MEASURES
from jaxlm.observe.report import STYLE, tile
from jaxlm.train.rundir import write_json, write_text

OWN_STYLE = """
.row{background:var(--card);border-radius:8px;padding:9px 14px;margin:4px 0 14px;font:13px/1.75 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}.row i{font-style:normal;border-radius:2px}
.row u{text-decoration:none;color:var(--dim)}
.row hr{border:0;border-top:1px dashed var(--dim);margin:5px 0}.wide{overflow-x:auto}
td{font-variant-numeric:tabular-nums}th{text-align:right;color:var(--dim);font-weight:500;font-size:12px;padding:3px 8px;
vertical-align:bottom}th:first-child{text-align:left}.num td{text-align:right}.num td:first-child{text-align:left}
.num{font-size:11.5px}.num td,.num th{padding:3px 4px;font-size:11px}.worst th{text-align:left}.worst td:last-child{width:60%}
.scale{display:inline-block;width:180px;height:11px;border-radius:3px;vertical-align:middle;margin:0 7px;
background:linear-gradient(90deg,transparent,rgba(224,62,26,.85))}code{font-family:ui-monospace,monospace;white-space:pre-wrap}
"""


def write(found: dict, workdir: str, rows: int) -> str:
    """found: of `jaxlm.research.replay.replay`. rows: on the page. -> the path of the page."""
    path = os.path.join(workdir, f"replay-{found['step']}")
    write_json(f"{path}.json", found)
    write_text(f"{path}.html", page(found, rows))
    return f"{path}.html"


def page(found: dict, count: int) -> str:
    losses = sorted(loss for row in found["rows"] for loss in row["losses"] if loss is not None)
    high = losses[min(len(losses) - 1, int(0.995 * len(losses)))] if losses else 1.0
    shown = found["rows"][:count]
    title = f"Step {found['step']:,}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title} – jaxlm replay</title><style>{STYLE}{OWN_STYLE}</style><h1>{title}, once more</h1>
<p class="verdict"><b>{html.escape(found['verdict'])}</b></p>
<div class="tiles">{"".join(tile(*t) for t in tiles(found))}</div>
<h2>Tokens that cost most</h2>{worst_table(found["worst"][:20])}
<h2>The batch, rows with the highest loss first</h2>
<p class="dim">{len(shown)} of {len(found["rows"])} rows. Loss of a token, in nats: 0<span class="scale"></span>{high:.2f}
and more; grey: not in the loss. A pointer on a token shows its number.</p>
{"".join(row_of(row, high) for row in shown)}
<h2>Inside the layers</h2><p class="dim">{"Below each number, it as a multiple of the median of the looks before this step. "
if found["usual_internals"] else ""}Darker: higher in its column (logarithmic).</p>
{layers_table(found["internals"], found["usual_internals"])}
</html>"""


def tiles(found: dict):
    form = lambda value, digits: "–" if value is None else f"{value:.{digits}g}"
    for name in ("loss", "grad_norm"):
        yield name.replace("_", " "), form(found["metrics"][name], 5)
        if name in found["usual"]:
            yield f"usual {name.replace('_', ' ')}", form(found["usual"][name], 5)
    yield "learning rate", form(found["metrics"]["learning_rate"], 3)
    yield "epoch", str(found["epoch"])
    yield "from checkpoint", f"{found['from_checkpoint']:,}"


def visible(text: str) -> str:
    return html.escape(text).replace("\n", "↵\n") or "∅"


def one_line(text: str) -> str:
    return visible(text).replace("\n", "") if text else ""


def row_of(row: dict, high: float) -> str:
    parts = []
    for span in row["spans"]:
        if "border" in span:
            parts.append("<hr>")
        elif span["loss"] is None:
            parts.append(f"<u>{visible(span['text'])}</u>")
        else:
            share = min(max(span["loss"] / high if high > 0 else 0.0, 0.0), 1.0)
            parts.append(f'<i style="background:rgba(224,62,26,{0.85 * share:.3f})" title="{span["loss"]:.3f} nats, place '
                         f'{span["place"]}">{visible(span["text"])}</i>')
    of = f" of {html.escape(row['source'])}" if "source" in row else " of the data"
    loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
    return (f'<div class="dim">row {row["row"]} (row {row["index"]:,}{of}): loss <b>{loss}</b> over {row["told"]} targets</div>'
            f'<div class="row">{"".join(parts)}</div>')


def worst_table(worst: list[dict]) -> str:
    body = "".join(f"<tr><td>{x['loss']:.3f}</td><td>{x['probability']:.1e}</td><td>{x['row']}</td><td>{x['place']}</td>"
                   f'<td><code><span class="dim">{one_line(x["before"][-60:])}</span>'
                   f'<b>{one_line(x["text"])}</b></code></td></tr>'
                   for x in worst)
    return ('<table class="worst"><tr><th>loss</th><th>probability</th><th>row</th><th>place</th>'
            f'<th style="text-align:left">token, after</th></tr>{body}</table>')


def layers_table(values: dict, usual: dict) -> str:
    """A line for each layer, a column for each measure of a module."""
    cells, columns = {}, []
    for name, value in values.items():
        module, _, measure = name.rpartition("/")
        stack, *rest = module.split("/")
        line = "/".join([stack, *rest[:1]])
        column = (list(MEASURES).index(measure), " ".join(rest[1:]) or ("block" if rest else "all"), measure)
        cells.setdefault(line, {})[column] = name, value
        columns += [column] if column not in columns else []
    columns.sort()
    shades = {column: shading([row[column][1] for row in cells.values() if column in row]) for column in columns}
    head = "".join(f"<th>{html.escape(MEASURES[measure])}<br>{html.escape(what)}</th>" for _, what, measure in columns)
    body = []
    for line, row in cells.items():
        tds = []
        for column in columns:
            if column not in row:
                tds.append("<td></td>")
                continue
            name, value = row[column]
            times = f'<br><span class="dim">×{value / usual[name]:.2f}</span>' if value and name in usual and usual[name] else ""
            text = "not finite" if value is None else f"{value:.3g}"
            tds.append(f'<td style="background:rgba(37,99,235,{0.45 * shades[column](value):.3f})">{text}{times}</td>')
        body.append(f"<tr><td>{html.escape(line)}</td>{''.join(tds)}</tr>")
    return f'<div class="wide"><table class="num"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


def shading(values):
    known = [math.log(v) for v in values if v is not None and v > 0]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    return lambda v: 1.0 if v is None else 0.0 if v <= 0 or high == low else (math.log(v) - low) / (high - low)
