"""Small heat maps of a run's internals: a row for each layer, a column for each look, a picture for each measure of a module."""

import base64
import html
import itertools
import math
import struct
import zlib

COLORS = ((13, 8, 72), (84, 39, 143), (183, 55, 121), (241, 121, 74), (252, 253, 164))  # dark to light: low to high
MEASURES = {  # what the numbers of `jaxlm.observe.internals` are, by the end of their names
    "grad_rms": "Gradient RMS", "update_rms": "Update RMS", "activation_rms": "Activation RMS",
    "attention_entropy": "Attention entropy (nats)", "attention_entropy_min": "Attention entropy, lowest head",
    "router_load_max": "Fullest expert (× equal share)", "router_load_min": "Emptiest expert (× equal share)"}
LINEAR = ("entropy", "router_load")  # measures on a linear scale; the others on a logarithmic one
MOST_COLUMNS = 240
STYLE = """
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}.maps svg .title{font-size:12.5px}
"""


def heatmaps(lines: list[dict]) -> str:
    """lines: those of metrics.jsonl with the split "internals", by step."""
    if not lines:
        return ""
    lines = lines[:: -(-len(lines) // MOST_COLUMNS)]
    steps, shown = [line["step"] for line in lines], {}
    for name in dict.fromkeys(itertools.chain.from_iterable(lines)):
        if name in ("split", "step"):
            continue
        module, _, measure = name.rpartition("/")
        stack, *rest = module.split("/")
        if rest:  # layers/3/attention, layers/3
            what = " ".join([*(() if stack == "layers" else (stack.replace("_", " "),)), *(rest[1:] or ("block",))])
            row = rest[0]
        else:
            what, row = "the rest", module
        shown.setdefault((list(MEASURES).index(measure), what, measure), {})[row] = [
            line[name] if name in line else None for line in lines]
    parts = [picture(f"{MEASURES[measure]}: {what}".replace("_", " "), steps, rows, measure)
             for (_, what, measure), rows in sorted(shown.items())]
    return f'<h2>Inside the layers</h2><div class="maps">{"".join(parts)}</div>'


def picture(title: str, steps: list[int], rows: dict[str, list], measure: str) -> str:
    """The lowest layer is the lowest row."""
    known = [v for values in rows.values() for v in values if v is not None and math.isfinite(v)]
    positive = [v for v in known if v > 0]
    logarithmic = bool(positive) and not any(word in measure for word in LINEAR)
    shown = positive if logarithmic else known  # a logarithm shows no zeros, and nothing where all are
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    scale = (lambda v: math.log(max(v, low) / low)) if logarithmic else (lambda v: v - low)
    whole = scale(high) or 1.0
    pixels = [[color_of(None if v is None or not math.isfinite(v) else scale(v) / whole) for v in rows[name]]
              for name in reversed(rows)]
    width, left, top, tall = 336, 70, 50, max(60, min(150, 13 * len(rows)))
    each, out = tall / len(rows), [f'<text class="title" x="10" y="18">{html.escape(title)}</text>']
    wide = width - left - 12
    out.append(f'<image x="{left}" y="{top}" width="{wide}" height="{tall}" preserveAspectRatio="none" '
               f'style="image-rendering:pixelated" href="{png(pixels)}"/>')
    names, every = list(reversed(rows)), max(1, math.ceil(11 / each))
    out += [f'<text x="{left - 5}" y="{top + (i + 0.5) * each + 4:.1f}" text-anchor="end">{html.escape(name)}</text>'
            for i, name in enumerate(names) if (len(names) - 1 - i) % every == 0]
    out.append(f'<text x="{left}" y="{top + tall + 14:.0f}">{steps[0]:,}</text>'
               f'<text x="{left + wide}" y="{top + tall + 14:.0f}" text-anchor="end">step {steps[-1]:,}</text>')
    bar = [[color_of(i / 63) for i in range(64)]]
    out.append(f'<text x="{left}" y="38">{low:.2g}</text><image x="{left + 52}" y="29" width="{wide - 104}" height="9" '
               f'preserveAspectRatio="none" href="{png(bar)}"/>'
               f'<text x="{left + wide}" y="38" text-anchor="end">{high:.2g}</text>')
    box = f'viewBox="0 0 {width} {top + tall + 24:.0f}" role="img" aria-label="{html.escape(title)}"'
    return f'<div><svg {box}>{"".join(out)}</svg></div>'


def color_of(share: float | None) -> tuple[int, int, int]:
    """Of 0 (lowest) to 1; grey for what is not there or not finite."""
    if share is None:
        return 128, 128, 128
    place = min(max(share, 0.0), 1.0) * (len(COLORS) - 1)
    i = min(int(place), len(COLORS) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(COLORS[i], COLORS[i + 1], strict=True))


def png(rows: list[list[tuple[int, int, int]]]) -> str:
    """A data URL of an image, a pixel for each triple of 0 to 255."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + bytes(itertools.chain.from_iterable(row)) for row in rows)  # 0: no filter
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()
