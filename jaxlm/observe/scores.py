"""Results of `jaxlm bench` as text: one as a table, two side by side."""

import json
import pathlib

from jaxlm.errors import UserError
from jaxlm.observe.trace import costly_operations

# What --json prints; tools rely on it.
KEYS = ("tokens_per_second", "step_seconds", "mfu", "mfu_palm", "matmul_ceiling_tflops", "peak_memory_bytes", "compile_seconds",
        "device", "config_fingerprint", "commit")
NUMBERS = {  # row -> (key, its part, how it reads)
    "tokens/s": ("tokens_per_second", None, "{:,.0f}"),
    "step, median (ms)": ("step_seconds", "median", "{:.2f}"),
    "step, min (ms)": ("step_seconds", "min", "{:.2f}"),
    "step, max (ms)": ("step_seconds", "max", "{:.2f}"),
    "MFU (%)": ("mfu", None, "{:.1f}"),
    "MFU, PaLM convention (%)": ("mfu_palm", None, "{:.1f}"),
    "matmul ceiling, a device (TFLOP/s)": ("matmul_ceiling_tflops", None, "{:.3g}"),
    "peak memory (GiB)": ("peak_memory_bytes", None, "{:.2f}"),
    "compile, cold (s)": ("compile_seconds", None, "{:.1f}"),
}
UNITS = {"step_seconds": 1e-3, "mfu": 0.01, "mfu_palm": 0.01, "peak_memory_bytes": 2**30}
SAME = {"device": "the machines", "config_fingerprint": "the experiments", "commit": "the code"}


def table(result: dict) -> str:
    """`result`: of `jaxlm.train.bench.bench`."""
    r = result
    rows = [(row, number(r, row)[1]) for row in NUMBERS]
    warm = r["compile_seconds_warm"]
    rows += [("compile, warm cache (s)", "n/a (observe.compile_cache=False)" if warm is None else f"{warm:.1f}"),
             ("share of the matmul ceiling (%)", f"{100 * r['share_of_ceiling']:.1f}"),
             ("loss at the last step", f"{r['loss']:.4f}")]
    width = max(len(row) for row, _ in rows)
    return "\n".join([
        f"{r['device']}; {r['parameters']:,} parameters, {r['tokens']:,} tokens a step, data.source={r['data']}, attention: "
        f"{r['attention']}",
        f"{r['warmup']} steps to warm up, then {r['blocks']} blocks of {r['block_steps']}; seconds are per step of a block",
        *(f"{row:{width}}  {text}" for row, text in rows),
        f"config {r['config_fingerprint']}, commit {r['commit'] or 'unknown'}"])


def operations(directory: str) -> str:
    """The ten most costly operations of the newest trace in `directory`, or that it names none."""
    costly = costly_operations(directory)
    if not costly:
        return f"trace in {directory}; it names no operations that can be read without XProf"
    return "\n".join([f"trace in {directory}; the most costly operations of its three steps, their own time:",
                      *(f"{ms:10.3f} ms {share:6.1%}  {name}" for name, ms, share in costly)])


def number(result: dict, row: str) -> tuple[float | None, str]:
    """-> (value, text) of a row of NUMBERS; an unknown one is None and "n/a"."""
    key, part, form = NUMBERS[row]
    value = result[key][part] if part else result[key]
    return value, "n/a" if value is None else form.format(value / UNITS[key] if key in UNITS else value)


def comparison(file_a: str, file_b: str) -> str:
    """Two results side by side, with B / A, what else differs, and a warning if they do not measure the same thing.

    Raises UserError: a file that is missing, or is no result.
    """
    a, b = read(file_a), read(file_b)
    rows = [("", "A", "B", "B / A")]
    for row in NUMBERS:
        (x, text_x), (y, text_y) = number(a, row), number(b, row)
        rows.append((row, text_x, text_y, f"{y / x:.3f}" if x and y is not None else "n/a"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"A: {file_a}", f"B: {file_b}", *("  ".join([row[0].ljust(widths[0]), *(
        text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]) for row in rows)]
    for key, what in SAME.items():
        if a[key] != b[key]:
            lines.append(f"{key}: {a[key]} -> {b[key]}" + (f"  WARNING: {what} differ" if key != "commit" else ""))
    if all(a[key] == b[key] for key in SAME):
        lines.append("same device, config and commit")
    return "\n".join(lines)


def read(file: str) -> dict:
    try:
        result = json.loads(pathlib.Path(file).read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a file written by jaxlm bench --json") from error
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); give a file written by jaxlm bench --json") from error
    if not isinstance(result, dict) or (missing := [key for key in KEYS if key not in result]):
        lacks = f"it lacks {', '.join(missing)}" if isinstance(result, dict) else "it is no object"
        raise UserError(f"{file}: no result of jaxlm bench --json ({lacks}); measure again")
    return result
