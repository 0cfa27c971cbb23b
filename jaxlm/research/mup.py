"""Does what is tuned on a narrow model hold for wide ones? Two answers: the coordinate check, in seconds, and the experiment.

The coordinate check (Yang & Hu, arXiv:2203.03466, D.1) trains models of several widths for a few steps and looks at each
activation of one batch: how large it is at first, and how far it moves. Under a parametrisation that transfers, the root mean
squares of both do not depend on width, nor does how far the loss falls; under the standard one they grow.

Logits may fall with width, by width^-0.5 at most: what a random head makes of features, those at first or what they move, is a
sum of `width` terms of either sign, divided by width. In the first steps that is most of a logit, and it says nothing of the
targets: how far logits move towards these is what the loss tells.
"""

import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.config import resolve
from jaxlm.errors import UserError
from jaxlm.observe.jaxprs import REMATERIALISED, evaluate
from jaxlm.parallel import target
from jaxlm.research.ensemble import train_ensemble
from jaxlm.research.members import Members
from jaxlm.validation import validate

TOLERANCE = 0.25  # largest error of an exponent that counts as none; the standard parametrisation is off by 0.5 to 1.4


def at_width(config, embed_dim: int):
    """`config` with another width, and all else that grows with it: the heads, or with model.base_head_dim their size, and
    mlp_dim. Raises UserError: it is no whole number of heads."""
    c, m = config.copy_and_resolve_references(), config.model
    c.model.embed_dim, c.model.mlp_dim = embed_dim, round(m.mlp_dim * embed_dim / m.embed_dim)
    by_size = m.parametrization != "standard" and m.base_head_dim
    key = "head_dim" if by_size else "num_heads"
    grown = m[key] * embed_dim / m.embed_dim
    kv_heads = m.num_kv_heads * (1 if by_size else embed_dim / m.embed_dim)
    if grown != int(grown) or kv_heads != int(kv_heads):
        raise UserError(f"width {embed_dim}: model.{key}={m[key]} at model.embed_dim={m.embed_dim} would become {grown:g}; give "
                        f"multiples of {m.embed_dim // math.gcd(m[key], m.num_kv_heads if key == 'num_heads' else m[key])}")
    c.model[key], c.model.num_kv_heads = int(grown), int(kv_heads)
    resolve(c)
    validate(c)
    return c


# ---- The coordinate check ------------------------------------------------------------------------------------------------------


class Slope(NamedTuple):
    """Of one activation, at first or in how far it moves; or of the loss."""

    name: str  # "3.down": of the fourth layer
    moved: bool
    exponent: float  # of width, in the root mean square; of the loss, in how far it falls
    lowest: float  # what theory lets it be; the highest is 0
    sizes: dict  # {width: that}

    @property
    def error(self) -> float:
        return self.exponent - min(max(self.exponent, self.lowest), 0.0)

    @property
    def words(self) -> str:
        return f"{self.name}{'' if self.moved else ' at first'} as width^{self.exponent:+.2f}"


def coordinate_check(config, widths, steps: int = 4, seeds: int = 4, overrides=()) -> dict:
    """-> {"passes", "verdict" (a line of words), "steps", "slopes" (of Slope as dicts, after the last step)}.

    Trains `seeds` models of each width at the config's constant learning rate, and averages over them. Raises UserError.
    """
    if len(set(widths)) < 2 or steps < 1 or seeds < 1:
        raise UserError("the coordinate check needs two or more widths, one or more steps and seeds")
    found = {width: sizes(check_config(config, width, steps), steps, seeds, overrides) for width in sorted(set(widths))}
    slopes = []
    for name, moved in found[min(found)]:
        of = {width: found[width][name, moved] for width in found}
        exponent = float(np.polyfit(np.log(list(of)), np.log(np.maximum(list(of.values()), 1e-30)), 1)[0])
        slopes.append(Slope(name, moved, exponent, -0.5 if name == "logits" else 0.0, of))
    off = sorted((s for s in slopes if not abs(s.error) <= TOLERANCE), key=lambda s: -abs(s.error))
    between = f"between widths {min(found)} and {max(found)}"
    if off:
        verdict = (f"fails: {len(off)} of {len(slopes)} sizes and movements depend on width {between}: "
                   f"{', '.join(s.words for s in off[:3])}. A learning rate tuned at one width is not that of another "
                   f"(model.parametrization={config.model.parametrization})")
    else:
        most = max(slopes, key=lambda s: abs(s.error))
        verdict = (f"passes: neither the sizes of activations nor how far they and the loss move in {steps} steps depend on "
                   f"width {between}; farthest from that is {most.words}")
    return {"passes": not off, "verdict": verdict, "steps": steps, "seeds": seeds, "tolerance": TOLERANCE,
            "parametrization": config.model.parametrization, "slopes": [s._asdict() | {"error": s.error} for s in slopes]}


def check_config(config, width: int, steps: int):
    """At a constant learning rate; layers unrolled, so that each shows its own activations."""
    c = at_width(config, width)
    c.steps, c.schedule.name = steps + 1, "constant"
    with c.ignore_type():  # a duration may be a number or words
        c.schedule.warmup_steps = 0
    c.model.scan_layers, c.model.remat, c.model.dropout = False, "none", 0.0
    return c


def sizes(config, steps: int, seeds: int, overrides) -> dict[tuple[str, bool], float]:
    """{(activation, whether moved): root mean square on the first batch}, and of the "loss" how far it falls: means over seeds,
    which all see the rows of the first."""
    group = Members([config], overrides, "in_turn")
    program, batches = group.program, group.data.train
    step, _ = group.compile()

    def look(params, batch):
        loss_sum, weight, _ = program.objective(nnx.merge(program.model.graph, params), batch)
        return activations(program.model.graph, params, batch), loss_sum / weight

    look, first, found = jax.jit(look), batches.batch(0), {}
    rms = lambda a: math.sqrt(np.mean(np.square(a, dtype=np.float64)))
    for seed in range(config.seed, config.seed + seeds):
        state = jax.jit(program.init)(seed)
        with target.building_for(group.devices[0]):
            before, loss = jax.device_get(look(state["params"], first))
        states = [state]
        for number in range(steps):
            states, _ = step(states, group.put(batches.batch(number)))
        after, new_loss = jax.device_get(look(states[0]["params"], first))
        for name in before:
            found.setdefault((name, False), []).append(rms(before[name]))
            found.setdefault((name, True), []).append(rms(after[name] - before[name]))
        found.setdefault(("loss", True), []).append(loss - new_loss)
    return {key: float(np.mean(values)) for key, values in found.items()}


def activations(graph, params, batch) -> dict:
    """{"embedding", "0.query", ..., "hidden", "logits"} of a batch: those that rematerialisation has names for, by layer."""

    def forward(params):
        model = nnx.merge(graph, params)
        x_BTD, _, _ = model.hidden(batch["tokens"], None, batch["segment_ids"])
        return model.embed(batch["tokens"]), x_BTD, model.logits(x_BTD)

    closed = jax.make_jaxpr(forward)(params)
    seen = []
    embedding, hidden, logits = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(params), seen)
    found, layer, before = {"embedding": embedding}, 0, set()
    for name, value in seen:
        if name == REMATERIALISED:
            continue
        if name in before:  # the next layer begins
            layer, before = layer + 1, set()
        before.add(name)
        found[f"{layer}.{name}"] = value
    return {name: a.astype(jnp.float32) for name, a in {**found, "hidden": hidden, "logits": logits}.items()}


def table(check: dict) -> str:
    """For a terminal."""
    widths, lines = list(check["slopes"][0]["sizes"]), []
    for moved, title in ((False, "at first"), (True, f"moved in {check['steps']} steps")):
        lines.append(f"{title:18}" + "".join(f"{width:>10}" for width in widths) + "  exponent")
        for s in (s for s in check["slopes"] if s["moved"] == moved):
            sizes = "".join(f"{size:10.4f}" for size in s["sizes"].values())
            mark = "  <-" if abs(s["error"]) > check["tolerance"] else ""
            lines.append(f"{s['name']:18}{sizes}{s['exponent']:+10.2f}{mark}")
    return "\n".join(lines)


# ---- The experiment ------------------------------------------------------------------------------------------------------------


def transfer(config, widths, learning_rates, workdir: str, seeds: int = 1, overrides=(), execution: str = "auto") -> dict:
    """Train every learning rate and seed at each width, a width's as one ensemble under `workdir/<width>/`; goes on where it
    stopped. -> {"widths": {width: {"losses": {rate: [of each seed]}, "best"}}, "drift" (in factors of 2, from the narrowest to
    the widest), "verdict"}.

    "best" is the minimum of a parabola through the best rate and its neighbours, in log(rate); at an end of the rates, that end.
    """
    rates, found = sorted(learning_rates), {}
    for width in sorted(widths):
        arms = [(rate, config.seed + s) for rate in rates for s in range(seeds)]
        configs = []
        for rate, seed in arms:
            c = at_width(config, width)
            c.optimizer.learning_rate, c.seed = rate, seed
            configs.append(c)
        folders = [os.path.join(workdir, str(width), f"lr{rate:g}-seed{seed}") for rate, seed in arms]
        summaries = train_ensemble(configs, folders, overrides=overrides, execution=execution)
        losses = {rate: [] for rate in rates}
        for (rate, _), summary in zip(arms, summaries, strict=True):
            loss = summary["valid_loss"] if summary["status"] == "completed" else None
            losses[rate].append(math.inf if loss is None else loss)
        found[width] = {"losses": losses, "best": best_rate({rate: float(np.mean(of)) for rate, of in losses.items()})}
    drift = math.log2(found[max(found)]["best"] / found[min(found)]["best"])
    words = "keeps its place" if abs(drift) <= 0.5 else f"moves {'up' if drift > 0 else 'down'}"
    verdict = (f"from width {min(found)} to {max(found)} the best learning rate {words}: {found[min(found)]['best']:.2g} -> "
               f"{found[max(found)]['best']:.2g} (a factor of 2^{drift:+.2f})")
    return {"parametrization": config.model.parametrization, "widths": found, "drift": drift, "verdict": verdict}


def best_rate(loss_of: dict[float, float]) -> float:
    rates, losses = np.log(list(loss_of)), np.array(list(loss_of.values()))
    at = int(np.argmin(losses))
    if 0 < at < len(rates) - 1 and np.isfinite(losses[at - 1 : at + 2]).all():
        a, b, _ = np.polyfit(rates[at - 1 : at + 2] - rates[at], losses[at - 1 : at + 2], 2)
        return float(np.exp(rates[at] - b / (2 * a))) if a > 0 else float(np.exp(rates[at]))
    return float(np.exp(rates[at]))
