"""The drawings of a report, as SVG without a script: curves with bands, differences with intervals, cost against result."""

import html
import itertools
import math

from jaxlm.observe.report import number_of, ticks

LONGEST = 40  # letters of a name in a drawing; the axes make room for as many
PALETTE = ("#3b6fe0", "#e07b1a", "#169b72", "#8b5cf6", "#d6407b", "#1496b8", "#9a7b12", "#7a8594")
STYLE = """
.band{opacity:.16}.line{fill:none;stroke-width:2}svg .name{font-size:12px;font-weight:600}
svg .words{fill:var(--fg);font-size:12px}
.zero{stroke:var(--fg);stroke-width:1.2;opacity:.55}.blind{fill:var(--dim);opacity:.10}.frontier{fill:none;stroke:var(--dim);
stroke-dasharray:4 4}.faint{opacity:.45}
"""


def color(index: int) -> str:
    return PALETTE[index] if index < len(PALETTE) else f"hsl({index * 137.5 % 360:.0f} 55% 52%)"


class Frame:
    """Axes: x and y to places of an SVG, grid lines and numbers."""

    def __init__(self, width, height, xs, ys, left=58, right=24, top=34, bottom=40):
        self.width, self.height, self.left, self.right, self.top, self.bottom = width, height, left, right, top, bottom
        (self.x0, self.x1), (self.y0, self.y1) = widened(xs), widened(ys)

    def x(self, value) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)

    def y(self, value) -> float:
        """Values above the frame end at its edge."""
        value = min(max(value, self.y0), self.y1)
        return self.height - self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)

    def x_marks(self) -> list[float]:
        return ticks(self.x0, self.x1)

    def grid(self, x_label: str, form=number_of, title: str = "") -> list[str]:
        end, foot = self.width - self.right, self.height - self.bottom
        out = [f'<text class="title" x="14" y="20">{html.escape(title)}</text>']
        for value in ticks(self.y0, self.y1):
            out.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>'
                       f'<text x="{self.left - 7}" y="{self.y(value) + 4:.1f}" text-anchor="end">{number_of(value)}</text>')
        for value in self.x_marks():
            out.append(f'<text x="{self.x(value):.1f}" y="{foot + 16}" text-anchor="middle">{form(value)}</text>')
        middle = (self.left + end) / 2
        return [*out, f'<text x="{middle:.0f}" y="{self.height - 6}" text-anchor="middle">{html.escape(x_label)}</text>']


class LogFrame(Frame):
    """x is given as it is, and placed by its logarithm."""

    def __init__(self, width, height, xs, ys, **margins):
        low, high = math.log10(min(xs)), math.log10(max(xs))
        pad = 0.04 * (high - low) or 0.1
        super().__init__(width, height, [low - pad, high + pad], ys, **margins)

    def x(self, value) -> float:
        return super().x(math.log10(value))

    def x_marks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; of many, the powers alone."""
        powers = range(math.floor(self.x0), math.ceil(self.x1) + 1)
        inside = lambda factors: [m * 10.0**k for k in powers for m in factors if self.x0 <= math.log10(m) + k <= self.x1]
        marks = inside((1, 2, 5))
        return marks if len(marks) <= 9 else inside((1,))


def widened(values) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)


def empty(title: str, width: int) -> str:
    said = f'<text class="title" x="14" y="20">{html.escape(title)}</text><text x="14" y="56">no data</text>'
    return svg(width, 80, [said], title)


def svg(width: int, height: int, parts: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def curves(title: str, series: list[tuple[str, str, list]], width=1036, height=360) -> str:
    """series: (name, colour, [[step, mean, standard deviation]]). Lines are means, bands one standard deviation over seeds."""
    series = [s for s in series if s[2]]
    if not series:
        return empty(title, width)
    steps = [step for _, _, points in series for step, *_ in points]
    late = min(steps) + 0.12 * (max(steps) - min(steps))  # the first steep part would flatten what follows
    shown = [(m - s, m + s) for _, _, points in series for step, m, s in points if step >= late or len(points) < 4]
    frame = Frame(width, height, steps, [v for pair in shown for v in pair], right=30 + room(name for name, *_ in series))
    out = frame.grid("step", lambda x: f"{x:,.0f}", title)
    for _, hue, points in series:
        if any(s for _, _, s in points):
            edge = [(x, m + s) for x, m, s in points] + [(x, m - s) for x, m, s in reversed(points)]
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in edge)
            out.append(f'<polygon class="band" fill="{hue}" points="{path}"/>')
    for _, hue, points in series:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(m):.1f}" for x, m, _ in points)
        out.append(f'<polyline class="line" stroke="{hue}" points="{path}"/>')
        if len(points) <= 12:
            out += [f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(m):.1f}" r="3" fill="{hue}"/>' for x, m, _ in points]
    ends = spread([frame.y(points[-1][1]) for _, _, points in series], 15, frame.top, height - 8)
    for (name, hue, points), y in zip(series, ends, strict=True):
        x, true = frame.x(points[-1][0]), frame.y(points[-1][1])
        out.append(f'<path class="faint" fill="none" stroke="{hue}" d="M{x + 4:.1f} {true:.1f}L{x + 14:.1f} {y:.1f}"/>'
                   f'<text class="name" style="fill:{hue}" x="{x + 18:.1f}" y="{y + 4:.1f}">{html.escape(cut(name))}</text>')
    return svg(width, height, out, title)


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """The same places, moved so that labels do not overlap."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out, last = list(places), low - gap
    for i in order:
        last = out[i] = max(places[i], last + gap)
    for i, after in itertools.pairwise(reversed(order)):  # what was pushed out below comes up again
        out[i] = min(out[i], high)
        out[after] = min(out[after], out[i] - gap)
    return out


def cut(text: str, length: int = LONGEST) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def room(names, length: int = LONGEST) -> int:
    """How wide the longest name is, cut to `length` letters."""
    return 8 * min(max(map(len, names)), length)


def differences(title: str, rows: list[dict], width=1036) -> str:
    """A line for each arm: its t interval, its BCa interval below it, the single pairs; in grey what could not have been seen.

    rows: {"name", "color", "difference", "t", "bootstrap", "pairs", "detectable", "words"}.
    """
    height, left, right = 70 + 44 * len(rows), max(170, 28 + room(row["name"] for row in rows)), 300
    ends = [0.0] + [v for row in rows for v in (*row["t"], *row["bootstrap"], *row["pairs"])]
    frame = Frame(width, height, [min(ends), max(ends)], [0, 1], left=left, right=right)
    foot = height - frame.bottom
    out = [f'<text class="title" x="14" y="20">{html.escape(title)}</text>']
    for value in ticks(frame.x0, frame.x1):
        out.append(f'<line class="grid" x1="{frame.x(value):.1f}" x2="{frame.x(value):.1f}" y1="{frame.top}" y2="{foot}"/>'
                   f'<text x="{frame.x(value):.1f}" y="{foot + 16}" text-anchor="middle">{number_of(value)}</text>')
    inside = lambda v: min(max(frame.x(v), left), width - right)
    for i, row in enumerate(rows):
        y, hue = 58 + 44 * i, row["color"]
        x0, x1 = inside(-row["detectable"]), inside(row["detectable"])
        out.append(f'<rect class="blind" x="{x0:.1f}" width="{x1 - x0:.1f}" y="{y - 18}" height="36"><title>differences below '
                   f'{row["detectable"]:.3g} would likely be missed</title></rect>')
        name = html.escape(cut(row["name"]))
        out.append(f'<text class="name" style="fill:{hue}" x="{left - 14}" y="{y + 4}" text-anchor="end">{name}</text>')
        for (low, high), place, thickness, kind in ((row["t"], y, 4, "t"), (row["bootstrap"], y + 9, 1.6, "BCa")):
            out.append(f'<line stroke="{hue}" stroke-width="{thickness}" stroke-linecap="round" x1="{frame.x(low):.1f}" '
                       f'x2="{frame.x(high):.1f}" y1="{place}" y2="{place}">'
                       f'<title>{kind} interval {low:.4g} to {high:.4g}</title></line>')
        out += [f'<circle class="faint" cx="{frame.x(v):.1f}" cy="{y - 10}" r="2.6" fill="{hue}"/>' for v in row["pairs"]]
        out.append(f'<circle cx="{frame.x(row["difference"]):.1f}" cy="{y}" r="5.5" fill="{hue}" stroke="var(--card)"/>')
        strong, _, rest = row["words"].partition("\n")
        out.append(f'<text class="words" x="{width - right + 16}" y="{y - 3}" font-weight="600">{html.escape(strong)}</text>'
                   f'<text x="{width - right + 16}" y="{y + 13}">{html.escape(rest)}</text>')
    out.append(f'<line class="zero" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="{frame.top}" y2="{foot}"/>')
    return svg(width, height, out, title)


def pareto(title: str, points: list[dict], x_label: str, form, width=510, height=330) -> str:
    """Result against cost with the standard deviation over seeds, and the arms that no other beats in both joined by a line.

    points: {"name", "color", "x", "y", "std", "frontier"}.
    """
    if not points:
        return empty(title, width)
    xs = [p["x"] for p in points]
    pad = 0.12 * (max(xs) - min(xs)) or abs(xs[0]) * 0.05 or 1.0
    ys = [v for p in points for v in (p["y"] - p["std"], p["y"] + p["std"])]
    frame = Frame(width, height, [min(xs) - pad, max(xs) + pad], ys)
    out = frame.grid(x_label, form, title)
    best = sorted((p for p in points if p["frontier"]), key=lambda p: p["x"])
    if len(best) > 1:
        path = f"M{frame.x(best[0]['x']):.1f} {frame.y(best[0]['y']):.1f}" + "".join(
            f"H{frame.x(p['x']):.1f}V{frame.y(p['y']):.1f}" for p in best[1:])
        out.append(f'<path class="frontier" d="{path}"/>')
    labels = spread([frame.y(p["y"]) for p in points], 13, frame.top, height - frame.bottom)
    for p, y_label in zip(points, labels, strict=True):
        x, y, name = frame.x(p["x"]), frame.y(p["y"]), cut(p["name"], 30)
        right = x + 10 + room([name]) > width
        top, foot = frame.y(p["y"] + p["std"]), frame.y(p["y"] - p["std"])
        out.append(f'<line stroke="{p["color"]}" stroke-width="1.5" x1="{x:.1f}" x2="{x:.1f}" y1="{foot:.1f}" y2="{top:.1f}"/>'
                   f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" '
                   f'fill="{p["color"] if p["frontier"] else "var(--card)"}" stroke="{p["color"]}" stroke-width="2"/>'
                   f'<text class="name" style="fill:{p["color"]}" x="{x + (-10 if right else 10):.1f}" y="{y_label + 4:.1f}" '
                   f'text-anchor="{"end" if right else "start"}">{html.escape(name)}</text>')
    return svg(width, height, out, title)


def decades(value: float) -> str:
    """FLOPs as on an axis: 1.2e15."""
    if value <= 0:
        return "0"
    number, exponent = f"{value:.2e}".split("e")  # rounds before it counts: 9.999e11 is 1e12
    return f"{float(number):g}e{int(exponent)}"
