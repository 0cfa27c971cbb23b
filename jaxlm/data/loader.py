"""Batches: a pure function of (config, seed, step), made ahead of the step in the background.

Host count, worker count and mesh never enter, so resuming is starting at another step.
"""

import hashlib
import itertools
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import BALANCED
from jaxlm.data.mixture import MixedRows, build_stages, gathered, open_sources
from jaxlm.data.packing import SyntheticRows, build_rows
from jaxlm.data.tokenizers import ByteTokenizer, build_tokenizer
from jaxlm.errors import UserError
from jaxlm.stages import stage_at, stages_of


class Data(NamedTuple):
    train: Any  # Batches; None without text
    valid: Any  # HeldOut, or None for synthetic data
    tokenizer: Any
    vocab_size: int  # of the model: the tokenizer's, rounded up, or as the config says
    fingerprint: str | None  # of the text and what makes tokens of it
    about: tuple[str, ...] = ()  # lines for the start of the log
    test: Any = None  # HeldOut, where there is data.test_path
    class_counts: tuple[int, ...] = ()  # training examples of each class, where objective.class_weights asks for them


def build_data(config, text: bool = True) -> Data:
    """text: False where the tokenizer is all that is wanted; where it is a file, no text is then looked at.

    Raises UserError: missing or unreadable files, a split shorter than a row, a vocabulary too small."""
    asked, multiple = config.model.vocab_size, config.model.vocab_multiple
    if config.data.source == "synthetic":
        vocab_size = asked or 256
        _ = config.data.tokenizer, multiple  # bytes; nothing to round
        source_len = config.data.source_len if config.model.family == "encoder_decoder" else 0
        rows = SyntheticRows(vocab_size, config.seq_len, config.seed, source_len)
        return Data(Batches(config, rows, config.batch_size) if text else None, None, ByteTokenizer(), vocab_size, None)
    if not text and os.path.exists(config.data.tokenizer):
        tokenizer = build_tokenizer(config, [])
        return Data(None, None, tokenizer, asked or -(-tokenizer.vocab_size // multiple) * multiple, None)
    stores, tokenizer = open_sources(config)
    problems = [problem for name, of in stores.items() for problem in row_problems(config, of, name)]
    if asked and asked < tokenizer.vocab_size:
        problems.append(f"model.vocab_size={asked}: smaller than the tokenizer's {tokenizer.vocab_size}; use 0 or at "
                        f"least {tokenizer.vocab_size}")
    if problems:
        raise UserError(*problems)
    vocab_size = asked or -(-tokenizer.vocab_size // multiple) * multiple
    rows = {split: {name: found for name, of in stores.items()
                    if (found := rows_of(config, of, split, tokenizer)) is not None} for split in ("train", "valid", "test")}
    train, valid, test = rows["train"], rows["valid"], rows["test"]
    about = tuple(f"{name}: {line}" if name else line for name, of in train.items() for line in of.about())
    folders = [of["train"].folder.name for of in stores.values()]
    held_out = [HeldOut(config, of) if of else None for of in (valid, test)]
    counts = class_counts(config, train.values()) if config.objective.class_weights == BALANCED else ()
    if not config.data.mixture:
        return Data(Batches(config, train[""], config.batch_size), held_out[0], tokenizer, vocab_size, folders[0], about,
                    held_out[1], counts)
    batches = MixedBatches(config, stores, train)
    return Data(batches, held_out[0], tokenizer, vocab_size, hashlib.sha256(" ".join(folders).encode()).hexdigest()[:24],
                (*about, *batches.about()), held_out[1], counts)


def rows_of(config, stores, split: str, tokenizer):
    """Of one source; None where it has no such split. With data.folds the training documents are dealt out to train and valid."""
    if split == "test" or not config.data.folds:
        return build_rows(config, stores[split], split, tokenizer) if split in stores else None
    store = stores["train"]
    of_fold = deal(store, config.data.folds) == config.data.fold
    return build_rows(config, store, split, tokenizer, np.flatnonzero(of_fold if split == "valid" else ~of_fold))


def deal(store, folds: int) -> np.ndarray:
    """Which fold each example is in, each of what they end with (of labelled text, each class) about evenly in all of them."""
    last, rng = last_tokens(store), np.random.default_rng(0)
    fold = np.empty(len(last), np.int64)
    for value in np.unique(last):
        of = rng.permutation(np.flatnonzero(last == value))
        fold[of] = np.arange(len(of)) % folds
    return fold


def last_tokens(store) -> np.ndarray:
    """What each document ends with; of labelled text, its class."""
    return np.array([store.tokens(end - 1, end)[0] for end in (*store.document_starts[1:].tolist(), store.num_tokens)])


def class_counts(config, train) -> tuple[int, ...]:
    """Examples of each class. train: `ExampleRows` of each source."""
    labels = np.concatenate([last_tokens(rows.store)[rows.examples] for rows in train])
    return tuple(np.bincount(labels, minlength=len(config.data.classes)).tolist())


def row_problems(config, stores, name: str) -> list[str]:
    """Splits too short for a row. name: of the source, in a mixture."""
    source = f" of source {name!r}" if name else ""
    problems, tokens = [], stores["train"].num_tokens
    if config.data.form == "label" and (folds := config.data.folds):
        counts = np.bincount(last_tokens(stores["train"]), minlength=len(config.data.classes))
        problems += [f"data.folds={folds}: class {name!r} has {count} training examples{source}, fewer than folds; use "
                     + (f"at most {count}" if count > 1 else "more text of it, or leave the class out")
                     for name, count in zip(config.data.classes, counts.tolist(), strict=True) if count < folds]
    if config.data.form != "text":
        return problems if stores["valid"].num_tokens or config.data.folds else [*problems,
            f"data.valid_fraction: the validation split{source} is empty; raise it, or set data.valid_path"]
    least = (1 + config.data.jitter) * config.seq_len + 1 if config.data.packing == "concat" else 2
    if tokens < least:
        problems.append(f"seq_len={config.seq_len}: longer than the training data{source} ({tokens} tokens); use at most "
                        f"{(tokens - 1) // (1 + config.data.jitter)}, or more text")
    if stores["valid"].num_tokens < 2:
        problems.append(f"data.valid_fraction: the validation split{source} is empty; raise it, or set data.valid_path")
    return problems


class Batches:
    """`batch(step)` for training; `evaluation_batches()` for every row once, in order."""

    def __init__(self, config, rows, batch_size: int, seed: int | None = None):
        import grain

        self.rows, self.batch_size, self.seed = rows, batch_size, config.seed if seed is None else seed
        self.stages = stages_of(config)
        self.jitter, self.prefetch = config.data.jitter, config.data.prefetch
        self.num_bytes = rows.num_bytes
        # Grain's shuffle is a true permutation, new in each epoch, and indexable at any point.
        order = grain.MapDataset.range(len(rows)).seed(self.seed)
        self.order = order.shuffle() if config.data.shuffle else order
        self.order = self.order.repeat()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, rows=None) -> dict[str, np.ndarray]:
        """The batch that takes the state from `step` to `step + 1` completed steps: arrays (B, T), or of it the rows
        `rows` alone (what one of several processes needs, `Feed.rows`). B and T are those of the step's stage."""
        stage = stage_at(self.stages, step)
        first, piece = stage.place(step)
        places = [first + int(row) for row in (range(stage.batch_size) if rows is None else rows)]
        return self.rows_at(places, stage.pieces, piece)

    def rows_at(self, places: list[int], pieces: int = 1, piece: int = 0) -> dict[str, np.ndarray]:
        """Rows of the run, counted from its start; of each, cut into `pieces`, the one with the number `piece`."""
        epochs = [i // len(self.rows) for i in places]
        offsets = {epoch: self._offset(epoch) for epoch in set(epochs)}
        rows = self.rows if pieces == 1 else self.rows.cut(pieces)
        return rows.take([int(self.order[i]) * pieces + piece for i in places], [offsets[epoch] for epoch in epochs])

    def where(self, place: int, pieces: int = 1, piece: int = 0) -> dict:
        """What row `place` of the run is, or a piece of it: {"epoch", "index"}, and in a mixture "source"."""
        return {"epoch": place // len(self.rows), "index": int(self.order[place]) * pieces + piece}

    def _offset(self, epoch: int) -> int:
        """Tokens by which the row grid is moved in this epoch."""
        return int(np.random.default_rng((self.seed, epoch)).integers(0, self.rows.seq_len)) if self.jitter else 0

    def evaluation_batches(self, limit: int = 0, rows=None) -> Iterator[dict[str, np.ndarray]]:
        """Rows in order; the last batch is filled up with rows whose loss_mask is 0. limit: batches, 0 for all. rows: as
        in `batch`."""
        in_batch = np.arange(self.batch_size) if rows is None else rows
        count = -(-len(self.rows) // self.batch_size)
        for i in range(min(count, limit) if limit else count):
            places = i * self.batch_size + in_batch
            real = places[places < len(self.rows)]
            batch = self.rows.take(real if len(real) else [0])
            missing = len(places) - len(real)
            yield {name: np.pad(a[: len(real)], ((0, missing), (0, 0))) for name, a in batch.items()} if missing else batch

    def prefetched(self, start_step: int, put: Callable, rows=None, end_step: int | None = None) -> Iterator:
        """`batch(step, rows)` for start_step, start_step + 1, ... before end_step (None: no end), its arrays sent through `put`
        (dict -> dict). A thread stays `data.prefetch` batches ahead, and holds one more until there is room for it, so both
        reading and the copy to the device happen behind the running step. Close the generator to end the thread."""
        ready, closed = queue.Queue(maxsize=max(1, self.prefetch)), threading.Event()

        def work():
            step, host, item = start_step, {}, {}
            while not closed.is_set() and step != end_step:
                try:
                    before, host = host, self.batch(step, rows)
                    # What comes again, as `packing.whole` does, is on the device already.
                    item = item | put({name: a for name, a in host.items() if name not in before or a is not before[name]})
                except BaseException as error:  # handed to the consumer, whatever it is
                    item = error
                while not closed.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return
                step += 1

        thread = threading.Thread(target=work, name="jaxlm-data", daemon=True)
        thread.start()
        try:
            for _ in itertools.count() if end_step is None else range(start_step, end_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()


class HeldOut(Batches):
    """Of one split, to evaluate on. rows: {source: its rows}; without a mixture the source is "".

    parts: {source: Batches}."""

    def __init__(self, config, rows: dict):
        super().__init__(config, rows[""] if "" in rows else MixedRows(list(rows.values())), config.eval.batch_size)
        self.parts = {name: Batches(config, of, config.eval.batch_size) for name, of in rows.items()}


class MixedBatches(Batches):
    """Of several sources, each in an order of its own, by data.mixture. Has no rows to evaluate on."""

    def __init__(self, config, stores: dict, rows: dict):
        self.names, self.batch_size, self.prefetch = list(rows), config.batch_size, config.data.prefetch
        # By its name: a source's order stays the same when others come and go.
        self.parts = [Batches(config, of, 1, (config.seed + zlib.crc32(name.encode())) % 2**32) for name, of in rows.items()]
        self.mix = build_stages(config, stores, {name: len(of) for name, of in rows.items()})
        self.stages = stages_of(config)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows_at(self, places, pieces=1, piece=0):
        sources, numbers = zip(*map(self.mix.at, places), strict=True)
        return gathered(sources, numbers, lambda source, of: self.parts[source].rows_at(of, pieces, piece))

    def where(self, place, pieces=1, piece=0):
        source, number = self.mix.at(place)
        return {"source": self.names[source], **self.parts[source].where(number, pieces, piece)}

    def about(self) -> tuple[str, ...]:
        rows = self.stages[-1].end_row
        return ("mixture: " + ", ".join(f"{name} {had / rows:.2%} of the rows ({had / len(part):.3g} epochs)" for
                                        name, had, part in zip(self.names, self.mix.had, self.parts, strict=True)),)
