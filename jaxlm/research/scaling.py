"""Families of runs for a scaling law, from one base config: which sizes, and for how many tokens.

    def sweep(add):
        for name, overrides in fixed_ratio(get_config(), parameters=(1e5, 2e5, 4e5), tokens_per_parameter=(1, 2, 4)):
            add(name, **overrides)
        for name, overrides in isoflop(get_config(), flops=(1e12, 4e12)):
            add(name, **overrides)

A size is width and depth together: heads keep their size, the feed-forward its share of the width, and layers grow with the
width. Parameters are those without the tables of tokens and positions and without the head (Kaplan et al., arXiv:2001.08361);
FLOPs are what `jaxlm.observe.throughput` counts, the head included. JAX is imported when something is counted, and no device is
touched: models are abstract.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.config import layer_period, nearest_multiple, resolve
from jaxlm.errors import UserError

FEWEST_STEPS = 20  # of a run whose loss says something of its tokens
VOCABULARIES = {"byte": lambda c: 257, "bpe": lambda c: c.data.bpe_vocab_size, "unigram": lambda c: c.data.bpe_vocab_size}


class Size(NamedTuple):
    overrides: dict  # key -> value
    parameters: int  # without embeddings
    flops: float  # of a token, forward and backward


# ---- Families ------------------------------------------------------------------------------------------------------------------


def fixed_ratio(config, parameters: Iterable[float], tokens_per_parameter: Iterable[float]) -> Iterator[tuple[str, dict]]:
    """(name, overrides) of each size with each ratio of tokens to parameters. One ratio alone makes no law: of D = r N the terms
    of N and D cannot be told apart.

    parameters: about how many, without embeddings; the nearest size that can be built. Raises UserError: two of them give one
    size, or a run is too short.
    """
    ratios = tuple(tokens_per_parameter)
    for size in distinct_sizes(config, parameters):
        for ratio in ratios:
            yield run_of(config, size, ratio * size.parameters, f"{ratio:g} per parameter")


def isoflop(config, flops: Iterable[float], sizes: int = 5, tokens_per_parameter: float = 20.0, span: float = 4.0
            ) -> Iterator[tuple[str, dict]]:
    """(name, overrides) of `sizes` sizes for each budget of FLOPs, each for the tokens that the budget pays.

    They lie from 1/span to span times the size at which the budget pays `tokens_per_parameter`: 20 is near the optimum of
    Hoffmann et al. for web text; where the minimum lies outside, `jaxlm scale` says so.
    """
    if sizes < 3 or span <= 1:
        raise UserError(f"isoflop: sizes={sizes}, span={span}: a parabola needs at least 3 sizes, and a span above 1")
    for budget in flops:
        middle = math.sqrt(budget / (6 * tokens_per_parameter))
        wanted = [middle * span ** (2 * i / (sizes - 1) - 1) for i in range(sizes)]
        for size in distinct_sizes(config, wanted):
            yield run_of(config, size, budget / size.flops, f"{budget:.3g} FLOPs")


def run_of(config, size: Size, tokens: float, why: str) -> tuple[str, dict]:
    if config.stages:
        raise UserError("stages: a scaling law's steps all have the same tokens; leave it empty")
    steps = round(tokens / (config.batch_size * config.seq_len))
    if steps < FEWEST_STEPS:
        raise UserError(f"{short(size.parameters)} parameters, {why}: {short(tokens)} tokens are {steps} steps of "
                        f"{config.batch_size} x {config.seq_len}; take a smaller batch_size, or tokens for "
                        f"at least {FEWEST_STEPS} steps")
    return f"{short(size.parameters)}, {short(tokens)} tokens", {**size.overrides, "steps": steps}


def distinct_sizes(config, parameters) -> list[Size]:
    parameters = tuple(parameters)
    sizes = [size_near(config, wanted) for wanted in parameters]
    for i, size in enumerate(sizes):
        if size in sizes[:i]:
            raise UserError(f"{short(parameters[sizes.index(size)])} and {short(parameters[i])} parameters: the nearest model to "
                            f"both has {short(size.parameters)}; take sizes farther apart, or smaller heads (model.head_dim)")
    return sizes


# ---- Sizes ---------------------------------------------------------------------------------------------------------------------


def size_near(config, parameters: float) -> Size:
    """The shape with about so many parameters, of whole heads and whole periods of layers. Of shapes within 15 %, the one whose
    width per layer is nearest to the base's; else the nearest."""
    base = counted(config)
    m = base.model
    known = size_of(base).parameters
    grain = m.num_heads // m.num_kv_heads if m.num_kv_heads > 1 else 1  # heads that share keys stay together
    period, head = layer_period(m), m.embed_dim / m.num_heads
    best = None
    for heads in range(grain, 40 * m.num_heads + 1, grain):
        width = head * heads
        per_layer = known / m.num_layers * (width / m.embed_dim) ** 2
        layers = max(period, nearest_multiple(parameters / per_layer, period))
        error = abs(math.log(per_layer * layers / parameters))
        aspect = abs(math.log(width / layers / (m.embed_dim / m.num_layers)))
        rank = (error > 0.15, aspect if error <= 0.15 else error)
        if best is None or rank < best[0]:
            best = rank, heads, layers
    if best[0][0] and best[0][1] > math.log(2):
        raise UserError(f"{short(parameters)} parameters: no shape of {config.model.num_heads} heads at width "
                        f"{config.model.embed_dim} comes near; the base has {short(known)}")
    return size_of(with_shape(base, *best[1:]))


def counted(config) -> ConfigDict:
    """A resolved copy."""
    config = config.copy_and_resolve_references()
    resolve(config)
    return config


def with_shape(base, heads: int, layers: int) -> ConfigDict:
    """`base` (resolved) with so many heads of the same size, so many layers, and a feed-forward of the same share."""
    c, m = base.copy_and_resolve_references(), base.model
    c.model.embed_dim, c.model.num_heads, c.model.num_layers = round(m.embed_dim / m.num_heads * heads), heads, layers
    c.model.num_kv_heads = heads * m.num_kv_heads // m.num_heads if m.num_kv_heads > 1 else min(m.num_kv_heads, heads)
    c.model.mlp_dim = nearest_multiple(m.mlp_dim * heads / m.num_heads, 8)
    return c


SHAPE = ("embed_dim", "num_heads", "num_kv_heads", "num_layers", "mlp_dim")


def size_of(config) -> Size:
    """config: resolved."""
    parameters, flops = count(config.to_json(sort_keys=True), vocabulary(config))
    return Size({f"model.{key}": config.model[key] for key in SHAPE}, parameters, flops)


def inner_parameters(config) -> int:
    """Without embeddings and head, whatever the vocabulary. config: resolved."""
    return count(config.to_json(sort_keys=True), 256)[0]


@functools.cache
def count(config: str, vocab_size: int) -> tuple[int, float]:
    """-> (parameters without embeddings, training FLOPs of a token), of an abstract model."""
    from jaxlm.observe.throughput import flops_per_token
    from jaxlm.parallel import target
    from jaxlm.train.state import build_model, flatten_paths
    from jaxlm.train.state import size_of as numbers

    config = ConfigDict(json.loads(config))
    with target.building_for(SimpleNamespace(platform="cpu")):  # a sweep is planned before JAX is set up
        model = build_model(config, vocab_size, "plain")
    inner = sum(numbers(spec) for path, spec in flatten_paths(model.specs).items() if not is_table(path))
    return inner, flops_per_token(config, model.num_matmul_parameters, model.num_trained_matmul_parameters)[0]


def is_table(path: str) -> bool:
    """Of tokens, positions or classes, not of the layers."""
    return path.endswith("embedding") or path.startswith(("head/", "classifier/"))


def vocabulary(config) -> int:
    """Without reading the text."""
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.data.tokenizer not in VOCABULARIES:
        raise UserError(f"data.tokenizer={config.data.tokenizer!r}: how many tokens it has is not known before its text is read, "
                        "and the head's FLOPs count; set model.vocab_size")
    known, multiple = VOCABULARIES[config.data.tokenizer](config), config.model.vocab_multiple
    return -(-known // multiple) * multiple


def short(number: float) -> str:
    """98304 -> "98.3K"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
