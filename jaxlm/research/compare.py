"""Two runs side by side: what differs in config, code and result; and whether their metrics are the same bit for bit."""

from jaxlm.config import diff
from jaxlm.errors import UserError
from jaxlm.observe.report import field
from jaxlm.research import noise
from jaxlm.research.runs import TIMES, Arm, Run, choose_metric, order_differences, shown


def compare(a: Run, b: Run, cache: str) -> list[str]:
    """Lines for a terminal. Raises UserError: no metric in common."""
    arms = [Arm("A", [a]), Arm("B", [b])]
    split, name = choose_metric(arms)
    changes = diff(a.config, b.config)
    lines = [f"A: {a.folder}, {a.status}", f"B: {b.folder}, {b.status}",
             "config: " + ("; ".join(changes) if changes else "the same experiment")]
    lines += [f"{what}: {one} -> {other}" for what, one, other in facts(a, b) if one != other]
    if order := order_differences(a, b):
        lines.append(f"data order differs ({'; '.join(order)}): no pair, their difference holds that of the data too")
    values = [run.final(split, name) for run in (a, b)]
    if None not in values:
        difference = values[1] - values[0]
        lines.append(f"{split} {name}: {values[0]:.6g} -> {values[1]:.6g} ({difference:+.3g})")
        lines.append(judged(difference, noise.lookup(arms[0], (split, name), cache)))
    else:
        lines.append(f"{split} {name}: " + " and ".join(
            f"{which} has not ended" for which, value in zip("AB", values, strict=True) if value is None))
    first = first_difference(a, b)
    lines.append(f"metrics: {first}" if first else "metrics: equal bit for bit")
    return lines


def judged(difference: float, known: noise.Noise | None) -> str:
    if known is None:
        return ("one run each: no interval can be told, and the noise of A's config is not known; measure it with jaxlm sweep "
                "--config=FILE --repeats=5 --workdir=DIR")
    word = "less" if abs(difference) < known.between_two else "more"
    return (f"noise, {known.source}: over {known.runs} seeds of A's config the standard deviation is {known.std:.2g}; these "
            f"differ by {word} than the noise of this preset ({known.between_two:.2g} between two single runs)")


def assert_equal(a: Run, b: Run) -> None:
    """Raises UserError where the metrics of two runs are not the same bit for bit, with the first difference. Times and rates
    do not count."""
    if not a.lines and not b.lines:
        raise UserError(f"--assert-equal: {a.folder} and {b.folder} have no metrics; nothing was compared")
    if first := first_difference(a, b):
        raise UserError(f"--assert-equal: {a.folder} and {b.folder} differ: {first}")


def first_difference(a: Run, b: Run) -> str:
    """Of metrics.jsonl, by step; "" if there is none. A line's numbers are read back exactly as they were written."""
    one, other = ({(line["step"], line["split"]): line for line in run.lines} for run in (a, b))
    for key in sorted({*one, *other}):
        where = f"step {key[0]}, {key[1]}"
        if key not in one or key not in other:
            return f"{where}: only {'B' if key not in one else 'A'} has it"
        for name in dict.fromkeys([*one[key], *other[key]]):
            x, y = shown(one[key], name), shown(other[key], name)
            if name not in TIMES and x != y:
                return f"{where}: {name} {x!r} -> {y!r}"
    return ""


def facts(a: Run, b: Run):
    """(what, of A, of B)."""
    yield "commit", field(a.record, "commit"), field(b.record, "commit")
    packages = [field(run.record, "packages") or {} for run in (a, b)]
    for name in sorted({*packages[0], *packages[1]}):
        yield name, field(packages[0], name), field(packages[1], name)
    for name in ("devices", "device_kind", "attention_backend", "jax_version"):
        yield name, field(a.summary, name), field(b.summary, name)
