"""The data card: card.json says what came in, what each step did and what came out; card.html shows it on one page."""

import html
import json
from collections import Counter

from jaxlm.config import flatten
from jaxlm.data.cleaning.shards import read_lines, write_json, written_whole
from jaxlm.observe.report import STYLE, tile

CARD_STYLE = """
table.steps td,table.sources td{white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;padding:3px 8px;color:var(--dim)}td.w{width:38%}
.bar{height:14px;border-radius:3px;background:var(--a);min-width:1px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(155px,1fr))}.track{background:var(--line);border-radius:3px}.b{background:var(--b)}.scroll{overflow-x:auto}
details{background:var(--card);border-radius:8px;padding:8px 14px;margin:8px 0}summary{cursor:pointer}summary b{font-weight:600}
details pre{background:var(--bg);margin:4px 0 12px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px}.pair pre{margin-top:2px}
svg .before{fill:var(--line);stroke:var(--dim);stroke-width:.6}svg .after{fill:var(--a)}
.panel{background:var(--card);border-radius:8px;padding:6px 10px 12px}.panel .t{font-weight:600;font-size:13px;margin:4px 4px 8px}
"""
SHOWN = 40  # rows of a table on the page; card.json has all


def write_card(job, results: dict, segments) -> None:
    card = make_card(job.config, results, segments)
    write_json(job.path("card.json"), card)
    samples = {path.stem: list(read_lines(path)) for path in sorted(job.path("out", "removed").glob("*.jsonl"))}
    with written_whole(job.path("out", "card.html")) as out:
        out.write(page(card, samples, job.folder.name.removesuffix(".partial")).encode("utf-8", "surrogatepass"))


def make_card(config, results: dict, segments) -> dict:
    steps = {}
    for number in range(len(segments)):
        cleaned = results[f"clean-{number}"]
        for name in cleaned[0]["stats"] if cleaned else ():
            steps[name] = {**total(cleaned, "stats", name), "removed": total(cleaned, "reasons", name),
                           "counts": total(cleaned, "counts", name)}
        if corpus_step := segments[number].corpus_step:
            steps[corpus_step, "seconds"] = sum(r["sketch_seconds"] for r in cleaned) + sum(
                r["seconds"] for r in results[f"match-{number}"])
    order = []
    for name in config.prepare.steps:
        none = dict.fromkeys(("documents_in", "documents_out", "characters_in", "characters_out"), 0)
        step = {"step": name, **none, "seconds": 0.0, **steps[name]}
        if (name, "seconds") in steps:
            step["seconds"] = steps[name, "seconds"]
        order.append(step | {"seconds": round(step["seconds"], 3)})
    read, last = results["read"], [r["outcome"] for r in results[f"clean-{len(segments) - 1}"]]
    sources_in, sources_out = nested(read, "sources"), nested(last, "sources")
    output = {key: sum(o[key] for o in last) for key in ("documents", "characters", "bytes", "tokens")}
    if not config.prepare.count_tokens:
        output["tokens"] = None
    gone = {"documents": 0, "characters": 0}
    return {
        "input": {"documents": sum(c["documents"] for c in sources_in.values()),
                  "characters": sum(c["characters"] for c in sources_in.values()), "lengths": total(read, "lengths"),
                  "skipped": {"count": sum(r["skipped"]["count"] for r in read),
                              "first": [problem for r in read for problem in r["skipped"]["first"]][:20]}},
        "steps": order,
        "output": {**output, "tokenizer": config.prepare.count_tokens or None, "lengths": total(last, "lengths"),
                   "languages": nested(last, "languages")},
        "sources": {name: {"in": sources_in[name], "out": sources_out[name] if name in sources_out else gone}
                    for name in sources_in},
        "config": {key: value for key, value in flatten(config).items() if shown(config, key)},
    }


def shown(config, key: str) -> bool:
    """Keys that had a say: of reading, of all steps, of the steps that ran."""
    group, _, rest = key.partition(".")
    if group != "prepare":
        return key in ("data.path", "data.document", "data.text_field")
    return "." not in rest or rest.partition(".")[0] in config.prepare.steps


def total(results, *keys) -> dict:
    """The sum of what lies under `keys` in each result, keys sorted; numbers as keys come out of JSON as text."""
    out = Counter()
    for result in results:
        for key in keys:
            result = result[key] if key in result else {}
        out.update(result)
    return dict(sorted(out.items(), key=lambda item: (len(item[0]), item[0]) if item[0].isdigit() else (0, item[0])))


def nested(results, key) -> dict:
    names = sorted({name for result in results for name in result[key]})
    return {name: total(results, key, name) for name in names}


def page(card: dict, samples: dict, name: str) -> str:
    start, end = card["input"], card["output"]
    kept = lambda key: f"{100 * end[key] / max(1, start[key]):.1f} %"
    tiles = [("documents in", f"{start['documents']:,}"), ("documents out", f"{end['documents']:,}"),
             ("kept", kept("documents")), ("characters out", f"{end['characters']:,}"),
             ("kept", kept("characters")), ("bytes out", f"{end['bytes']:,}")]
    if end["tokens"] is not None:
        tiles.append((f"tokens ({html.escape(end['tokenizer'].rpartition('/')[2])})", f"{end['tokens']:,}"))
    tiles.append(("CPU seconds", f"{sum(step['seconds'] for step in card['steps']):,.1f}"))
    dropped = "".join(removed(step, samples) for step in card["steps"])
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(name)} – data card – jaxlm</title>
<style>{STYLE}{CARD_STYLE}</style><h1>{html.escape(name)}</h1>
<div class="dim">data card · {html.escape(str(card["config"]["data.path"]))}</div>
<div class="tiles">{"".join(tile(*t) for t in tiles)}</div>
<h2>What each step did</h2>{funnel(card)}
<div class="charts" style="margin-top:14px">{lengths(start["lengths"], end["lengths"])}{languages(end["languages"])}</div>
<h2>Sources</h2>{sources(card["sources"])}{skipped(start["skipped"])}
<h2>What was removed</h2>{dropped or '<p class="dim">nothing</p>'}
<h2>Config</h2><table>{"".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(json.dumps(v, ensure_ascii=False))}</td></tr>"
                               for k, v in card["config"].items())}</table>
</html>"""


def funnel(card: dict) -> str:
    first = max(1, card["input"]["documents"])
    rows = []
    for step in card["steps"]:
        share = 100 * step["documents_out"] / first
        speed = step["characters_in"] / step["seconds"] / 1e6 if step["seconds"] else 0
        did = ", ".join(f"{html.escape(key)} {count:,}" for key, count in step["counts"].items())
        rows.append(f'<tr><td>{html.escape(step["step"])}</td><td class="w"><div class="track"><div class="bar" '
                    f'style="width:{share:.2f}%"></div></div></td><td class="n">{step["documents_out"]:,}</td>'
                    f'<td class="n">{step["documents_in"] - step["documents_out"]:,}</td>'
                    f'<td class="n">{step["characters_in"] - step["characters_out"]:,}</td>'
                    f'<td class="n">{speed:,.1f}</td><td style="white-space:normal">{did}</td></tr>')
    return ('<div class="scroll"><table class="steps"><tr><th>step</th><th>documents left</th><th class="n"></th>'
            '<th class="n">removed</th><th class="n">characters removed</th><th class="n">M characters/s</th>'
            f'<th>documents changed, pieces masked</th></tr>{"".join(rows)}</table></div>')


def lengths(before: dict, after: dict) -> str:
    """Documents by length, in powers of two: a box for what came in, filled as far as it came out."""
    bins = [int(b) for b in before] + [int(b) for b in after]
    if not bins:
        return panel("Length of a document (characters)", '<p class="dim">no documents</p>')
    low, high = max(1, min(bins)), max(bins)
    most = max([*before.values(), *after.values()])
    width, height, left, bottom, top = 1036, 250, 54, 30, 34
    wide = (width - left - 20) / (high - low + 1)
    tall = lambda count: (height - bottom - top) * count / most
    parts = [f'<text class="title" x="14" y="20">Length of a document (characters)</text><text x="{width - 20}" y="20" '
             'text-anchor="end">box: before · filled: after cleaning</text>']
    for i, b in enumerate(range(low, high + 1)):
        x, base = left + i * wide, height - bottom
        for kind, counts in (("before", before), ("after", after)):
            count = counts[str(b)] if str(b) in counts else 0
            parts.append(f'<rect class="{kind}" x="{x + 2:.1f}" y="{base - tall(count):.1f}" width="{wide - 4:.1f}" '
                         f'height="{tall(count):.1f}"><title>{count:,}</title></rect>')
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{short(2 ** (b - 1))}</text>')
    parts.append(f'<text x="{left - 8}" y="{top + 8}" text-anchor="end">{most:,}</text>')
    return f'<div><svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg></div>'


def short(number: int) -> str:
    return f"{number >> 20}M" if number >= 2**20 else f"{number >> 10}k" if number >= 2**10 else str(number)


def languages(found: dict) -> str:
    if not found:
        return panel("Languages", '<p class="dim">not told: the step language is not among prepare.steps</p>')
    ranked = sorted(found.items(), key=lambda item: (-item[1]["characters"], item[0]))
    most = ranked[0][1]["characters"] or 1
    rows = "".join(f'<tr><td>{html.escape(name)}</td><td class="w"><div class="bar b" style="width:'
                   f'{100 * count["characters"] / most:.2f}%"></div></td><td class="n">{count["documents"]:,}</td>'
                   f'<td class="n">{count["characters"]:,}</td></tr>' for name, count in ranked[:12])
    return panel("Languages", f'<table><tr><th></th><th></th><th class="n">documents</th><th class="n">characters</th></tr>'
                              f"{rows}</table>")


def panel(title: str, body: str) -> str:
    return f'<div class="panel"><div class="t">{title}</div>{body}</div>'


def sources(found: dict) -> str:
    rows = "".join(f'<tr><td>{html.escape(name)}</td><td class="n">{c["in"]["documents"]:,}</td><td class="n">'
                   f'{c["out"]["documents"]:,}</td><td class="n">{c["in"]["characters"]:,}</td><td class="n">'
                   f'{c["out"]["characters"]:,}</td></tr>' for name, c in list(found.items())[:SHOWN])
    more = f'<p class="dim">and {len(found) - SHOWN:,} more in card.json</p>' if len(found) > SHOWN else ""
    return ('<div class="scroll"><table class="sources"><tr><th>file</th><th class="n">documents in</th><th class="n">out</th>'
            f'<th class="n">characters in</th><th class="n">out</th></tr>{rows}</table></div>{more}')


def skipped(found: dict) -> str:
    """Records that could not be read (data.on_error=skip)."""
    if not found["count"]:
        return ""
    shown = "".join(f"<pre>{html.escape(problem)}</pre>" for problem in found["first"])
    return f"<details><summary><b>{found['count']:,} records could not be read</b> and were left out</summary>{shown}</details>"


def removed(step: dict, samples: dict) -> str:
    out = []
    for reason, count in sorted(step["removed"].items(), key=lambda item: (-item[1], item[0])):
        lines = [line for line in (samples[step["step"]] if step["step"] in samples else ()) if line["reason"] == reason]
        shown = "".join(sample(line) for line in lines[:SHOWN])
        out.append(f'<details><summary><b>{html.escape(step["step"])}</b> · {html.escape(reason)} '
                   f'<span class="dim">{count:,} document{"s" * (count > 1)}</span></summary>{shown}</details>')
    return "".join(out)


def sample(line: dict) -> str:
    head = " · ".join([line["source"], f"{line['characters']:,} characters", line["detail"]])
    head = f'<div class="dim">{html.escape(head)}</div>'
    text = f'<pre>{html.escape(line["excerpt"])}</pre>'
    if "kept_excerpt" in line:
        return f'{head}<div class="pair">{text}<pre>{html.escape(line["kept_excerpt"])}</pre></div>'
    return head + text
