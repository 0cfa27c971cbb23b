"""Mixtures: row n of a run -> (source, its j-th row), exact in every prefix and a pure function of n.

The schedule keeps the count of each of k sources within 1 - 1/(2k - 2) of its share of n, for every n, which can always be done
and cannot be done better (Tijdeman, The chairman assignment problem, 1980). It is made in blocks of rows. The counts at a
block's borders are chosen from the border alone, so that both neighbours can be filled (Hall's condition); inside, earliest
deadline first fills it. Any row is thus found without those before it.
"""

import bisect
import functools
import hashlib
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from jaxlm.config import View
from jaxlm.data.contents import content_of
from jaxlm.data.examples import build_form
from jaxlm.data.packing import whole
from jaxlm.data.sources import Skipped, find_all, reading, told, whole_files
from jaxlm.data.store import open_store, store_root
from jaxlm.data.token_files import is_token_file
from jaxlm.data.tokenizers import build_tokenizer, learns
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import main_first
from jaxlm.registry import did_you_mean
from jaxlm.stages import stage_at, stages_of

UNITS = 2**34  # shares are whole numbers of 1/UNITS
SMALLEST = 1e-6  # share


class Source(NamedTuple):
    name: str
    path: str
    weight: float
    max_epochs: float = 0.0  # 0: any number


class Schedule:
    """Args:
    weights: (k,) >= 0, of which the shares follow. Raises UserError: one so small that blocks would be long."""

    def __init__(self, weights):
        total, live = sum(weights), sum(weight > 0 for weight in weights)
        parts, least = max(1, 2 * live - 2), min(weight for weight in weights if weight) / total
        if least < SMALLEST:
            raise UserError(f"data.mixture: a source would have {least:.1e} of the rows; give it at least {SMALLEST:.0e}, or 0")
        # Each source has a row in a block, so no count is lower at its end than at its start.
        self.block_rows = max(1024, int(1 / least) + 1)
        units = [int(UNITS * (weight / total)) for weight in weights]
        units[int(np.argmax(weights))] += UNITS - sum(units)
        # Shares are units / whole; a count may be off by slack / whole.
        self.units, self.whole, self.slack = [unit * parts for unit in units], UNITS * parts, UNITS * (parts - 1)
        self._block, self._border = functools.lru_cache(4)(self._block), functools.lru_cache(64)(self._border)

    def at(self, n: int) -> tuple[int, int]:
        """-> (source, how many rows it had before)."""
        source, before = self._block(n // self.block_rows)
        return int(source[n % self.block_rows]), int(before[n % self.block_rows])

    def counts(self, n: int) -> list[int]:
        """Rows of each source among the first n."""
        source, _ = self._block(n // self.block_rows)
        within = np.bincount(source[: n % self.block_rows], minlength=len(self.units))
        return [a + int(b) for a, b in zip(self._border(n // self.block_rows), within, strict=True)]

    def _border(self, block: int) -> tuple[int, ...]:
        """Counts after so many blocks."""
        low, over = zip(*(divmod(unit * block * self.block_rows, self.whole) for unit in self.units), strict=True)
        ahead, unit, over_k = np.arange(self.block_rows + 1)[:, None], np.array(self.units), np.array(over)
        due = -((self.slack - over_k - unit * ahead) // self.whole)  # rows that a source must have had so many rows later
        free = (over_k - unit * ahead + self.slack) // self.whole  # and may have had at most so many rows earlier
        open_ = sorted((s for s in range(len(low)) if over[s]), key=lambda s: -over[s])
        for chosen in itertools.combinations(open_, sum(over) // self.whole):
            up = np.isin(np.arange(len(low)), chosen)
            if ((np.maximum(0, due - up).sum(1) <= ahead[:, 0]).all()
                    and (np.maximum(0, up - free).sum(1) <= ahead[:, 0]).all()):
                return tuple(a + int(b) for a, b in zip(low, up, strict=True))
        raise AssertionError("no counts at a border: contradicts Tijdeman")

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the block's rows: the source, and how many rows it had before."""
        had, end, D = list(self._border(block)), self._border(block + 1), self.block_rows
        base = block * D
        k, never = len(had), base + 2 * D
        source, before = np.zeros(D, np.int64), np.zeros(D, np.int64)

        def window(s):  # of the source's next row: the first and the last place it may take
            if had[s] == end[s]:
                return never, never
            at = had[s] * self.whole
            return -((self.slack - at - self.whole) // self.units[s]) - 1, (at + self.slack) // self.units[s]

        windows = [window(s) for s in range(k)]
        for n in range(base, base + D):
            best = -1
            for s in range(k):
                if windows[s][0] <= n and (best < 0 or windows[s][1] < windows[best][1]):
                    best = s
            source[n - base], before[n - base] = best, had[best]
            had[best] += 1
            windows[best] = window(best)
        return source, before


class Stages:
    """Schedules one after another.

    Args:
        stages: [(first row, weights (k,))], ascending from 0. caps: rows that each source has at most, None for any number.
        rows: of the run.

    A source that has had its last row leaves its share to the others, which begins another schedule. Raises UserError: all are
    at their end before the run is.
    """

    def __init__(self, stages, caps, rows: int):
        self.firsts, self.schedules, self.bases = [], [], []
        had, at = [0] * len(caps), 0
        for (_, weights), end in zip(stages, [*(first for first, _ in stages[1:]), rows], strict=True):
            while at < end:
                left = [None if cap is None else cap - h for cap, h in zip(caps, had, strict=True)]
                weights_left = [0 if room == 0 else weight for weight, room in zip(weights, left, strict=True)]
                if not sum(weights_left):
                    raise UserError(f"data.mixture: the sources, each in its greatest number of epochs, fill {at:,} of the run's "
                                    f"{rows:,} rows; allow more epochs, or use fewer steps")
                schedule, n = Schedule(weights_left), end - at
                for s, room in enumerate(left):
                    if room is not None and schedule.counts(n)[s] > room:
                        n = bisect.bisect_left(range(n), room, key=lambda m, s=s: schedule.counts(m)[s])
                self.firsts.append(at)
                self.schedules.append(schedule)
                self.bases.append(list(had))
                had, at = [a + b for a, b in zip(had, schedule.counts(n), strict=True)], at + n
        self.had = had  # rows of each source in the whole run

    def at(self, n: int) -> tuple[int, int]:
        """Row n of the run -> (source, which of its rows)."""
        stage = bisect.bisect_right(self.firsts, n) - 1
        source, j = self.schedules[stage].at(n - self.firsts[stage])
        return source, j + self.bases[stage][source]


# ---- From the config ---------------------------------------------------------------------------------------------------------


def sources_of(config) -> list[Source]:
    """Raises UserError: data.mixture or data.mixture_stages that cannot be."""
    try:
        sources = [Source(*entry) for entry in config.data.mixture]
        numbers = [float(value) for source in sources for value in (source.weight, source.max_epochs)]
        stages = [(int(first), {str(name): float(weight) for name, weight in weights.items()})
                  for first, weights in config.data.mixture_stages]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"data.mixture, data.mixture_stages: not of their form ({error}); give (('web', 'web/*.jsonl', 0.7), "
                        "('code', 'code/*.jsonl', 0.3)) and ((1000, {'web': 0.5, 'code': 0.5}),)") from error
    names, problems = [source.name for source in sources], []
    if len(set(names)) < len(names):
        problems.append(f"data.mixture: two sources have one name ({', '.join(names)}); give each its own")
    if min(numbers) < 0 or not np.isfinite(numbers).all():
        problems.append("data.mixture: weights and epochs must not be negative; 0 epochs are any number")
    if not sum(source.weight for source in sources):
        problems.append("data.mixture: all weights are 0; give one above")
    for first, weights in stages:
        problems += [f"data.mixture_stages: step {first}: no source {name!r}; {did_you_mean(name, names)}" for name in weights
                     if name not in names]
        if any(not 0 <= weight < np.inf for weight in weights.values()) or not sum(weights.values()):
            problems.append(f"data.mixture_stages: step {first}: weights must not be negative, nor all 0")
    if [first for first, _ in stages] != sorted({max(1, first) for first, _ in stages}):
        problems.append("data.mixture_stages: steps must be above 0 and ascend; those of data.mixture are from step 0")
    if config.data.mixture_temperature <= 0:
        problems.append(f"data.mixture_temperature={config.data.mixture_temperature}: must be above 0; 1 leaves weights alone")
    if config.data.valid_path:
        problems.append("data.valid_path: with data.mixture each source holds out its own data.valid_fraction; remove it")
    if problems:
        raise UserError(*problems)
    return sources


def open_sources(config):
    """-> ({name: {"train", "valid": TokenStore}}, tokenizer), all of one tokenizer. Without data.mixture the name is ""."""
    if not config.data.mixture:
        stores, tokenizer = open_store(config)
        return {"": stores}, tokenizer
    sources, stores = sources_of(config), {}
    files = find_all(config, {f"data.mixture: {source.name}": source.path for source in sources})
    name = common_tokenizer(config, [file for of in files for file in of])
    for source in sources:
        view = View(config, {"data.path": source.path, "data.tokenizer": name})
        stores[source.name], tokenizer = open_store(view)
    return stores, tokenizer


def common_tokenizer(config, files: list[str]) -> str:
    """data.tokenizer; where it is made of text, the path of the one made of the texts of all sources' files."""
    if not learns(config):
        return config.data.tokenizer
    if tokens := [file for file in files if is_token_file(file)]:
        raise UserError(f"data.tokenizer={config.data.tokenizer}: is made of text, and {tokens[0]} is tokens of another; name "
                        "the tokenizer it was made with")
    facts, d = content_of(files, store_root(config)), config.data
    settings = [d.tokenizer, d.bpe_vocab_size, list(d.special_tokens), told(config), [facts[file]["sha256"] for file in files]]
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:24]
    file = pathlib.Path(store_root(config), "tokenizers", f"{digest}.json")
    with main_first("tokenizer of the mixture"):
        if not file.exists():
            from jaxlm.data.store import write_durably

            file.parent.mkdir(parents=True, exist_ok=True)
            form = build_form(reading(config))
            items = form.read(whole_files(config, files), Skipped())
            tokenizer = build_tokenizer(config, (text for item in items for text in form.texts(item)))
            write_durably(file, tokenizer.to_json().encode())
    return str(file)


def build_stages(config, stores: dict, lengths: dict[str, int]) -> Stages:
    """lengths: rows of each source's training split."""
    sources, d = sources_of(config), config.data
    size = {"given": lambda store: 1, "tokens": lambda store: store.num_tokens,
            "documents": lambda store: len(store.document_starts)}[d.mixture_by]

    def tempered(weights):
        return [(weights[s.name] * size(stores[s.name]["train"])) ** (1 / d.mixture_temperature)
                if s.name in weights and weights[s.name] else 0 for s in sources]

    asked = [(0, {s.name: s.weight for s in sources}), *d.mixture_stages]
    caps = [int(s.max_epochs * lengths[s.name]) if s.max_epochs else None for s in sources]
    stages = stages_of(config)
    return Stages([(stage_at(stages, step).place(step)[0], tempered(weights)) for step, weights in asked if step < config.steps],
                  caps, stages[-1].end_row)


class MixedRows:
    """The rows of several sources, each source's evenly among the others': of the first n rows, about its part of all."""

    def __init__(self, rows: list):
        self.rows, self.seq_len = rows, rows[0].seq_len
        sizes = [of.num_bytes for of in rows]
        self.num_bytes = sum(sizes)
        places = np.concatenate([(np.arange(len(of)) + 0.5) / len(of) for of in rows])
        source = np.repeat(np.arange(len(rows)), [len(of) for of in rows])
        number = np.concatenate([np.arange(len(of)) for of in rows])
        order = np.argsort(places, kind="stable")
        self.source, self.number = source[order], number[order]

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """As `PackedRows.take`; offsets are 0."""
        return gathered(self.source[indices], self.number[indices], lambda s, numbers: self.rows[s].take(numbers))


def gathered(sources, numbers, take) -> dict[str, np.ndarray]:
    """Rows of several sources (B,) in one batch, by `take(source, numbers)` once for each source."""
    sources, numbers = np.asarray(sources), np.asarray(numbers)
    places = [np.flatnonzero(sources == source) for source in np.unique(sources)]
    parts = [take(int(sources[at[0]]), numbers[at].tolist()) for at in places]
    out = {}
    for name, first in parts[0].items():
        if all(not part[name].flags.writeable for part in parts):  # of `whole`: the same for any rows
            out[name] = whole(len(sources), first.shape[1])[name]
            continue
        out[name] = np.empty((len(sources), *first.shape[1:]), first.dtype)
        for at, part in zip(places, parts, strict=True):
            out[name][at] = part[name]
    return out
