"""Batches: a pure function of (config, seed, step), made ahead of the step in the background.

Host count, worker count and mesh never enter, so resuming is starting at another step.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.packing import SyntheticRows, build_rows
from jaxlm.data.store import open_store
from jaxlm.data.tokenizers import ByteTokenizer, build_tokenizer
from jaxlm.errors import UserError


class Data(NamedTuple):
    train: Any  # Batches; None without text
    valid: Any  # Batches, or None for synthetic data
    tokenizer: Any
    vocab_size: int  # of the model: the tokenizer's, rounded up, or as the config says
    fingerprint: str | None  # of the text and what makes tokens of it
    about: tuple[str, ...] = ()  # lines for the start of the log


def build_data(config, text: bool = True) -> Data:
    """text: False where the tokenizer is all that is wanted; where it is a file, no text is then looked at.

    Raises UserError: missing or unreadable files, a split shorter than a row, a vocabulary too small."""
    asked, multiple = config.model.vocab_size, config.model.vocab_multiple
    if config.data.source == "synthetic":
        vocab_size = asked or 256
        _ = config.data.tokenizer, multiple  # bytes; nothing to round
        rows = SyntheticRows(vocab_size, config.seq_len, config.seed)
        return Data(Batches(config, rows, config.batch_size), None, ByteTokenizer(), vocab_size, None)
    if not text and os.path.exists(config.data.tokenizer):
        tokenizer = build_tokenizer(config, [])
        return Data(None, None, tokenizer, asked or -(-tokenizer.vocab_size // multiple) * multiple, None)
    stores, tokenizer = open_store(config)
    problems = row_problems(config, stores)
    if asked and asked < tokenizer.vocab_size:
        problems.append(f"model.vocab_size={asked}: smaller than the tokenizer's {tokenizer.vocab_size}; use 0 or at "
                        f"least {tokenizer.vocab_size}")
    if problems:
        raise UserError(*problems)
    train, valid = (build_rows(config, stores[split], split) for split in ("train", "valid"))
    vocab_size = asked or -(-tokenizer.vocab_size // multiple) * multiple
    return Data(Batches(config, train, config.batch_size), Batches(config, valid, config.eval.batch_size), tokenizer,
                vocab_size, stores["train"].folder.name, train.about())


def row_problems(config, stores) -> list[str]:
    """Splits too short for a row."""
    problems, tokens = [], stores["train"].num_tokens
    least = (1 + config.data.jitter) * config.seq_len + 1 if config.data.packing == "concat" else 2
    if tokens < least:
        problems.append(f"seq_len={config.seq_len}: longer than the training data ({tokens} tokens); use at most "
                        f"{(tokens - 1) // (1 + config.data.jitter)}, or more text")
    if stores["valid"].num_tokens < 2:
        problems.append("data.valid_fraction: the validation split is empty; raise it, or set data.valid_path")
    return problems


class Batches:
    """`batch(step)` for training; `evaluation_batches()` for every row once, in order."""

    def __init__(self, config, rows, batch_size: int):
        import grain

        self.rows, self.batch_size, self.seed = rows, batch_size, config.seed
        self.jitter, self.prefetch = config.data.jitter, config.data.prefetch
        self.num_bytes = rows.num_bytes
        # Grain's shuffle is a true permutation, new in each epoch, and indexable at any point.
        order = grain.MapDataset.range(len(rows)).seed(config.seed)
        self.order = order.shuffle() if config.data.shuffle else order
        self.order = self.order.repeat()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, rows=None) -> dict[str, np.ndarray]:
        """The batch that takes the state from `step` to `step + 1` completed steps: arrays (B, T), or of it the rows
        `rows` alone (what one of several processes needs, `Feed.rows`)."""
        places = [step * self.batch_size + int(row) for row in (range(self.batch_size) if rows is None else rows)]
        epochs = [i // len(self.rows) for i in places]
        offsets = {epoch: self._offset(epoch) for epoch in set(epochs)}
        return self.rows.take([int(self.order[i]) for i in places], [offsets[epoch] for epoch in epochs])

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

    def prefetched(self, start_step: int, put: Callable, rows=None) -> Iterator:
        """`batch(step, rows)` for start_step, start_step + 1, ..., its arrays sent through `put` (dict -> dict). A thread stays
        `data.prefetch` batches ahead, and holds one more until there is room for it, so both reading and the copy to the device
        happen behind the running step. Close the generator to end the thread."""
        ready, closed = queue.Queue(maxsize=max(1, self.prefetch)), threading.Event()

        def work():
            step, host, item = start_step, {}, {}
            while not closed.is_set():
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
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()
