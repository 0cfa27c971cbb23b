"""A plan as lines on a terminal, and as plan.html: memory against the limit, and the roofline."""

import html
import math
import os

import jax

from jaxlm.errors import UserError
from jaxlm.kernels.attention import FUSED
from jaxlm.observe.report import STYLE
from jaxlm.parallel.table import sharding_table
from jaxlm.plan.plan import Plan, command
from jaxlm.plan.roofline import IGNORES

GIB = 2**30
COLORS = {"parameters": "#2563eb", "optimizer": "#7c9ff2", "average": "#b6c8f8", "frozen model": "#475467",
          "gradients": "#dc6803", "activations": "#0f9f76", "logits": "#7a5af8", "temporaries": "#98a2b3"}


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def verdict(p: Plan) -> str:
    room = f" of {gib(p.limit)}" if p.limit else ""
    share = f" ({p.peak / p.limit:.0%})" if p.limit else ""
    if p.refused:
        return f"does NOT fit: the compiler asks for {gib(p.peak)}{room} GiB on each device"
    word = {True: "fits", False: "does NOT fit", None: "limit of memory not known"}[p.fits]
    return f"{word}: {gib(p.peak)}{room} GiB on each device{share}"


def lines(p: Plan, spec: str, overrides=(), advice: str = "") -> list[str]:
    """The plan on one screen."""
    mesh = ", ".join(f"{axis}={n}" for axis, n in p.axes.items() if n > 1) or "one device"
    source = (f"compiled in {p.compiled.compile_seconds:.0f} s" if p.compiled else "refused by the compiler" if p.refused
              else f"estimated; {p.target.missing}" if p.target.missing else "estimated")
    out = [f"{spec} on {p.target.name}: {verdict(p)}",
           f"layout    {mesh}; remat {p.config.model.remat}; {p.config.grad_accum_steps} micro-batch(es); attention {p.attention}"
           + ("" if p.compiled or not p.target.chip or p.attention in FUSED else ", reckoned as if it were a fused kernel"),
           f"source    {source}",
           "memory    " + "  ".join(f"{part} {gib(size)}" for part, size in p.memory.items()) + "  GiB a device"]
    if r := p.roofline:
        mfu = "" if p.mfu is None else f", MFU {p.mfu:.1%}"
        out += [f"step      {r.step:.3g} s, {p.tokens_per_second:,.0f} tokens/s{mfu}; limited by {r.limited_by}",
                f"          compute {r.compute:.3g} s, memory {r.memory:.3g} s, network {r.network:.3g} s"
                + (f", host {r.host:.3g} s" if r.host else "")]
    moved = p.compiled.product_bytes + p.compiled.other_bytes if p.compiled else p.estimate.bytes
    source = p.compiled or p.estimate
    network = ", ".join(f"{name} {gib(size)}" for name, size in source.network.items() if size >= 0.005 * GIB)
    flops = source.flops * math.prod(p.axes.values())
    out += [f"work      {flops:.3g} FLOPs a step; a device moves {gib(moved)} GiB through its memory"]
    out += [f"          and sends {network} GiB"] if network else []
    if chip := p.target.chip:
        out += [f"hardware  {chip.peak_flops / 1e12:,.0f} TFLOP/s bfloat16 ({chip.matmul_share:.0%} of it reached), memory "
                f"{chip.memory_bandwidth / 1e9:,.0f} GB/s, links {chip.link_bandwidth / 1e9:,.0f} GB/s a ring, between "
                f"{'slices' if chip.torus else 'nodes'} {chip.slow_bandwidth / 1e9:,.0f} GB/s: jaxlm/plan/hardware.py",
                "ignored   " + "; ".join(IGNORES)]
    return [*out, f"command   {command(p, spec, overrides)}" if p.fits is not False else f"advice    {advice}"]


def ranking(plans: list[Plan]) -> list[str]:
    """The table of a search."""
    rows = [("", "mesh", "remat", "micro-batches", "GiB a device", "s a step", "tokens/s", "MFU", "limited by", "")]
    for i, p in enumerate(plans, 1):
        mesh = " x ".join(f"{axis} {n}" for axis, n in p.axes.items() if n > 1) or "one device"
        r = p.roofline
        rows.append((str(i), mesh, p.config.model.remat, str(p.config.grad_accum_steps), gib(p.peak),
                     f"{r.step:.3g}" if r else "-", f"{p.tokens_per_second:,.0f}" if r else "-",
                     "-" if p.mfu is None else f"{p.mfu:.1%}", r.limited_by if r else "-",
                     "does not fit" if p.fits is False else "compiled" if p.compiled else "estimated"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def parameters(p: Plan, sizes) -> list[str]:
    """Each parameter: shape, mesh axes, bytes on one device."""
    mesh = jax.sharding.AbstractMesh(tuple(p.axes.values()), tuple(p.axes))
    return sharding_table(mesh, sizes.specs, p.config.mesh.zero_stage)


# ---- plan.html --------------------------------------------------------------------------------------------------------------


def write_page(path: str, plans: list[Plan], spec: str, overrides=(), advice: str = "") -> None:
    """One self-contained page, opens with no network. plans: the best first. Raises UserError: cannot be written."""
    best = plans[0]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Plan: {html.escape(spec)} on {html.escape(best.target.name)}</title><style>{STYLE}</style>
<h1>{html.escape(spec)} on {html.escape(best.target.name)}</h1><div class="dim">{html.escape(verdict(best))}</div>
<h2>Memory of a device (GiB)</h2>{memory_bars(plans)}
<h2>Roofline</h2>{roofline_plot(best) if best.roofline else '<p class="dim">the speed of this hardware is not known</p>'}
<h2>Plan</h2><pre>{html.escape(chr(10).join(lines(best, spec, overrides, advice)))}</pre></html>"""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w") as file:
            file.write(page)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--html={path}: cannot be written ({error.strerror}); give a file in a folder that there is") from error


def memory_bars(plans: list[Plan]) -> str:
    """A bar for each plan, by part, and the limit as a line."""
    limit = plans[0].limit
    longest = max([p.peak for p in plans] + [limit or 0]) * 1.04
    left, width, height = 250, 720, 34
    scale = lambda size: size / longest * width
    out, y = [], 10
    for p in plans:
        mesh = " x ".join(f"{axis} {n}" for axis, n in p.axes.items() if n > 1) or "one device"
        label = html.escape(f"{mesh}, {p.config.model.remat}")
        out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{label}</text>')
        x = left
        for part, size in p.memory.items():
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{scale(size):.1f}" height="24" fill="{COLORS[part]}">'
                       f"<title>{part}: {gib(size)} GiB</title></rect>")
            x += scale(size)
        out.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{gib(p.peak)}</text>')
        y += height
    if limit:
        x = left + scale(limit)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{y}" stroke="#d92d20" stroke-width="2"/>'
                   f'<text x="{x - 4:.1f}" y="{y + 12}" text-anchor="end" style="fill:#d92d20">limit {gib(limit)} GiB</text>')
    x = left
    for part in dict.fromkeys(part for p in plans for part in p.memory):
        out.append(f'<rect x="{x}" y="{y + 24}" width="12" height="12" fill="{COLORS[part]}"/>'
                   f'<text x="{x + 17}" y="{y + 34}">{part}</text>')
        x += 105
    return f'<svg viewBox="0 0 1040 {y + 46}" role="img" aria-label="memory by part">{"".join(out)}</svg>'


def roofline_plot(p: Plan) -> str:
    """Attainable FLOP/s over arithmetic intensity, both logarithmic, and where the step stands: of memory, and of the network."""
    chip, r = p.target.chip, p.roofline
    source = p.compiled or p.estimate
    moved = p.compiled.product_bytes + p.compiled.other_bytes if p.compiled else p.estimate.bytes
    sent = sum(source.network.values())
    roofs = [("memory", chip.memory_bandwidth, moved, "#0f9f76")]
    if sent and r.network:
        roofs.append(("network", sent / r.network, sent, "#7a5af8"))
    peak, reached = chip.peak_flops, chip.peak_flops * chip.matmul_share
    intensities = [source.flops / size for _, _, size, _ in roofs] + [peak / speed for _, speed, _, _ in roofs]
    low, high = math.log10(min(intensities)) - 0.7, math.log10(max(intensities)) + 0.7
    bottom, top = math.log10(peak) - 2.5, math.log10(peak) + 0.25
    X = lambda v: 80 + (math.log10(v) - low) / (high - low) * 900
    Y = lambda v: 320 - (math.log10(v) - bottom) / (top - bottom) * 300
    out = [f'<line class="grid" x1="{X(10**k):.0f}" x2="{X(10**k):.0f}" y1="20" y2="320"/>'
           f'<text x="{X(10**k):.0f}" y="336" text-anchor="middle">{10**k:,}</text>'
           for k in range(math.ceil(low), math.floor(high) + 1)]
    out += [f'<line class="grid" x1="80" x2="980" y1="{Y(10**k):.0f}" y2="{Y(10**k):.0f}"/>'
            f'<text x="74" y="{Y(10**k) + 4:.0f}" text-anchor="end">{10 ** (k - 12):g}</text>'
            for k in range(math.ceil(bottom), math.floor(top) + 1)]
    out.append('<text x="530" y="354" text-anchor="middle">FLOPs per byte</text><text x="84" y="34">TFLOP/s of a device</text>')
    for name, speed, _size, color in roofs:
        start = max(10**low, 10**bottom / speed)
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{X(start):.1f},{Y(start * speed):.1f} '
                   f'{X(reached / speed):.1f},{Y(reached):.1f} 980,{Y(reached):.1f}"/>'
                   f'<text x="{X(start) + 8:.0f}" y="{Y(start * speed) - 8:.0f}" style="fill:{color}">{name}</text>')
    achieved = source.flops / r.step
    for name, _speed, size, color in roofs:
        x, y = X(source.flops / size), Y(achieved)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{color}"><title>by {name}</title></circle>'
                   f'<line stroke="{color}" stroke-dasharray="3 4" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="320"/>')
    roof = f"{reached / 1e12:,.0f} reached of {peak / 1e12:,.0f}"
    out.append(f'<text x="976" y="{Y(reached) - 6:.0f}" text-anchor="end">{roof}</text>')
    return f'<svg viewBox="0 0 1040 362" role="img" aria-label="roofline">{"".join(out)}</svg>'
