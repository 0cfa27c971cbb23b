"""Write the scoreboard of benchmarks/README.md from results/compare-*.json (every row, the losing ones too):

    python benchmarks/scoreboard.py

It stands between two marker lines; all else in the file is left alone. Of results with the same device and sizes, the newest.
"""

import json
import pathlib

from record import RESULTS

README = pathlib.Path(__file__).parent / "README.md"
BEGIN, END = "<!-- scoreboard: written by scoreboard.py -->", "<!-- end of scoreboard -->"


def newest(folder: pathlib.Path) -> list:
    """[(file name, result), ...] of compare.py, one for each device and set of sizes."""
    found = {}
    for file in sorted(folder.glob("*-compare-*.json")):
        result = json.loads(file.read_text())
        found[result["name"]] = (file.name, result)  # names begin with the date: the last is the newest
    return list(found.values())


def tried(r: dict) -> list[str]:
    """A line for each arm of a size that tried several micro-batches."""
    show = lambda rate: rate if isinstance(rate, str) else f"{rate:,.0f}"
    return [f"{name}: tokens/s in the search, by micro-batch: " + ", ".join(f"{m}: {show(t)}" for m, t in a["trials"].items())
            for name, a in r["arms"].items() if len(a.get("trials", ())) > 1]


def section(name: str, result: dict) -> list[str]:
    machine, ceiling = result["machine"], result["matmul_tflops"]
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.2f}"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
    lines = [f"### {where}", "",
             f"[{name}](results/{name}), commit {result['commit'][:12]}. {versions}. "
             f"Matrix products reach {ceiling['jax']:.3g} TFLOP/s in JAX, {ceiling['torch']:.3g} in PyTorch.", "",
             "| size | arm | micro-batch | tokens/s | min to max | MFU | MFU (PaLM) | of jaxlm | memory | first step | warm |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for size, r in result["sizes"].items():
        base = r["arms"].get("jaxlm", {}).get("tokens_per_second")
        for arm, a in r["arms"].items():
            if "tokens_per_second" not in a:
                lines.append(f"| {size} | {arm} | not timed: {a.get('failed', 'no block was done')} | | | | | | | | |")
                continue
            percent = lambda x: "n/a" if x is None else f"{100 * x:.1f} %"
            ratio = f"{a['tokens_per_second'] / base:.2f}" if base else "n/a"
            # Results of 2026-11-24 and before: every arm took the whole batch at once, with no warm cache.
            warm = f"{a['first_step_seconds_warm']:.1f} s" if "first_step_seconds_warm" in a else "n/a"
            lines.append(
                f"| {size} | {arm} | {a.get('micro_batch', r['batch_size'])} | {a['tokens_per_second']:,.0f} | "
                f"{a['tokens_per_second_min']:,.0f} to {a['tokens_per_second_max']:,.0f} | "
                f"{percent(a['mfu'])} | {percent(a['mfu_palm'])} | {ratio} | "
                f"{a['peak_memory_bytes'] / 2**30:.1f} GiB | {a['first_step_seconds']:.1f} s | {warm} |")
    for size, r in result["sizes"].items():
        lines += [f"\n{size}: {note}." for note in [*tried(r), *r["notes"]]]
    return [*lines, ""]


def scoreboard(folder: pathlib.Path) -> str:
    found = newest(folder)
    lines = [line for name, result in found for line in section(name, result)]
    return "\n".join([BEGIN, *(lines or ["No result of `compare.py` yet."]), END])


def main():
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: needs the lines {BEGIN} and {END}")
    README.write_text(before + scoreboard(RESULTS) + after)
    print(f"{README}: {len(newest(RESULTS))} results")


if __name__ == "__main__":
    main()
