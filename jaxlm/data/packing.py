"""Packing: row i of a split as a pure function of i. Rows are a grid over the tokens (`PackedRows`), whole documents put
together by a plan that was made once (`PlannedRows`), or whole examples (`jaxlm.data.example_rows`)."""

import functools

import numpy as np

from jaxlm.data.example_rows import ExampleRows, Source
from jaxlm.data.examples import FORMS
from jaxlm.data.plans import open_plan
from jaxlm.errors import UserError


def build_rows(config, store, split: str, tokenizer=None, documents=None):
    """The rows of data.packing; of the validation split, windows with an overlap where eval.stride says so.

    documents: of examples, those that there are to be rows of; None: all."""
    packing, isolate, stride = config.data.packing, config.data.isolate_documents, config.eval.stride
    jitter = config.data.jitter
    if config.data.form != "text":
        source = None
        if config.model.family == "encoder_decoder":
            start = config.model.decoder_start
            source = Source(config.data.source_len, tokenizer.eos_id if start < 0 else start, tokenizer.eos_id)
        return ExampleRows(store, config.seq_len, FORMS[config.data.form], packing, source, documents)
    if split != "train" and (stride or packing == "concat"):
        return PackedRows(store, config.seq_len, isolate, pad_last=True, stride=stride)
    if packing == "concat":
        return PackedRows(store, config.seq_len, isolate, pad_last=False, jitter=jitter)
    return PlannedRows(store, config.seq_len, isolate, packing)


class PackedRows:
    """Rows of `seq_len` targets. Row i covers tokens [offset + i*T, offset + (i+1)*T], one shared with the next row.

    pad_last: the ragged tail becomes a padded row (evaluation: every target exactly once), else it is left out.
    jitter: one row fewer, so that the grid may be moved by up to a row.
    isolate: documents get segment ids and positions of their own, and no loss on the step from one to the next.
    stride: S, where rows begin every S tokens and overlap: but for the first row, only the last S targets count, each with the
    T - S tokens before as context. 0: T.
    """

    def __init__(self, store, seq_len: int, isolate: bool, pad_last: bool, jitter: bool = False, stride: int = 0):
        self.store, self.seq_len, self.isolate, self.stride = store, seq_len, isolate, stride or seq_len
        targets = store.num_tokens - 1
        self.num_bytes = store.num_bytes
        self.length = 1 + -(-max(0, targets - seq_len) // self.stride) if pad_last else targets // seq_len - jitter

    def __len__(self) -> int:
        return self.length

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """Rows `indices` (B,), each moved by its offset in tokens -> int32 (B, T) arrays tokens, targets, segment_ids (0 is
        padding), positions; float32 loss_mask. Not to be written to: `whole` shares its arrays."""
        T, store = self.seq_len, self.store
        start_B = np.asarray(indices) * self.stride + offsets
        window = np.zeros((len(start_B), T + 1), np.int32)
        for row, start in zip(window, start_B.tolist(), strict=True):
            ids = store.tokens(start, start + T + 1)
            row[: len(ids)] = ids
        live_B = store.num_tokens - 1 - start_B
        if not self.isolate and live_B.min() >= T and self.stride == T:
            return {"tokens": window[:, :-1], "targets": window[:, 1:], **whole(len(window), T)}
        begins = np.zeros_like(window)  # documents that begin at each token, but for the first of the row
        if self.isolate:
            starts = store.document_starts  # of the whole split, mapped: only the row's own are read, and found by bisection
            firsts, ends = (np.searchsorted(starts, at_B, side="right").tolist() for at_B in (start_B, start_B + T))
            for row, start, first, end in zip(begins, start_B, firsts, ends, strict=True):
                np.add.at(row, starts[first:end] - start, 1)
        batch = divided(window, begins, live_B)
        if self.stride < T:
            batch["loss_mask"][np.asarray(indices) > 0, : T - self.stride] = 0
        return batch

    def cut(self, pieces: int) -> "PackedRows":
        """The same text, each row in so many: row i is rows i * pieces ... of the result."""
        return PackedRows(self.store, self.seq_len // pieces, self.isolate, pad_last=False)

    def about(self) -> tuple[str, ...]:
        """Lines for the start of the log."""
        return ()


class PlannedRows:
    """Rows of up to `seq_len` targets, each of whole documents, or of parts where a document is longer than a row.

    packing: "best_fit", "one" (`jaxlm.data.plans`). isolate: as in `PackedRows`; without it a row is one stream, as there.
    """

    def __init__(self, store, seq_len: int, isolate: bool, packing: str):
        self.store, self.seq_len, self.isolate, self.packing = store, seq_len, isolate, packing
        self.num_bytes, self.plan = store.num_bytes, open_plan(store, packing, seq_len)
        if not len(self.plan.ends):
            raise UserError(f"data.packing={packing}: no document of the {store.split} split has two tokens; give more text")

    def __len__(self) -> int:
        return len(self.plan.ends)

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """As `PackedRows.take`; there is no grid to move."""
        T, (ends, starts, lengths, _) = self.seq_len, self.plan
        window = np.zeros((len(indices), T + 1), np.int32)
        begins, used_B = np.zeros_like(window), np.zeros(len(window), np.int64)
        for row, i in enumerate(indices):
            first, end, at = int(ends[i - 1]) if i else 0, int(ends[i]), 0
            for start, length in zip(starts[first:end].tolist(), lengths[first:end].tolist(), strict=True):
                window[row, at : at + length] = self.store.tokens(start, start + length)
                begins[row, at] = self.isolate and at > 0
                at += length
            used_B[row] = at
        if not self.isolate and used_B.min() == T + 1:
            return {"tokens": window[:, :-1], "targets": window[:, 1:], **whole(len(window), T)}
        return divided(window, begins, used_B - 1)

    def about(self) -> tuple[str, ...]:
        return (f"{self.packing} packing: {len(self):,} rows, {self.plan.padding(self.seq_len):.2%} padding",)


class SyntheticRows:
    """Random tokens, pure in (seed, index), for benchmarks: nothing is read. source_len: > 0 for an encoder-decoder."""

    num_bytes = 0

    def __init__(self, vocab_size: int, seq_len: int, seed: int, source_len: int = 0):
        self.vocab_size, self.seq_len, self.seed, self.source_len = vocab_size, seq_len, seed, source_len

    def __len__(self) -> int:
        return 2**20

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """As `PackedRows.take`; there is no grid to move."""
        T, S = self.seq_len, self.source_len
        window = np.stack([np.random.default_rng((self.seed, i)).integers(0, self.vocab_size, T + 1 + S, np.int32)
                           for i in indices])
        batch = {"tokens": window[:, :T], "targets": window[:, 1 : T + 1], **whole(len(window), T)}
        if not S:
            return batch
        source = whole(len(window), S)
        return batch | {"source_tokens": window[:, T + 1 :], "source_segment_ids": source["segment_ids"],
                        "source_positions": source["positions"]}

    def cut(self, pieces: int) -> "SyntheticRows":
        """Others, shorter: there is no text to go on in."""
        return SyntheticRows(self.vocab_size, self.seq_len // pieces, self.seed, self.source_len)


def divided(window, begins, live_B) -> dict[str, np.ndarray]:
    """Rows of T + 1 ids -> the batch's arrays (B, T). begins (B, T+1): documents that begin at a token, the row's first left
    out; live_B: of the row, targets before the padding."""
    at = np.arange(window.shape[1], dtype=np.int32)
    segments = np.cumsum(begins, 1, np.int32)
    segments += 1
    positions, mask = at - np.maximum.accumulate(begins.astype(bool) * at, 1), (begins[:, 1:] == 0).astype(np.float32)
    if live_B.min() < len(at) - 1:
        live = at[:-1] < live_B[:, None]
        segments[:, :-1] *= live
        mask *= live
    return {"tokens": window[:, :-1], "targets": window[:, 1:], "segment_ids": segments[:, :-1], "positions": positions[:, :-1],
            "loss_mask": mask}


@functools.lru_cache(maxsize=4)
def whole(B: int, T: int) -> dict[str, np.ndarray]:
    """What rows without padding or document borders have in common: made once, not once a step, and read-only."""
    arrays = {"segment_ids": np.ones((B, T), np.int32), "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
              "loss_mask": np.ones((B, T), np.float32)}
    for array in arrays.values():
        array.setflags(write=False)
    return arrays
