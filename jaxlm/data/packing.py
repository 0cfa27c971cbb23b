"""Packing: row i of a split, concatenate-and-split, as a pure function of i."""

import functools

import numpy as np


class PackedRows:
    """Rows of `seq_len` targets. Row i covers tokens [offset + i*T, offset + (i+1)*T], one shared with the next row.

    pad_last: the ragged tail becomes a padded row (evaluation: every target exactly once), else it is left out.
    jitter: one row fewer, so that the grid may be moved by up to a row.
    isolate: documents get segment ids and positions of their own, and no loss on the step from one to the next.
    """

    def __init__(self, store, seq_len: int, isolate: bool, pad_last: bool, jitter: bool = False):
        self.store, self.seq_len, self.isolate = store, seq_len, isolate
        targets = store.num_tokens - 1
        self.length = -(-targets // seq_len) if pad_last else targets // seq_len - jitter

    def __len__(self) -> int:
        return self.length

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """Rows `indices` (B,), each moved by its offset in tokens -> int32 (B, T) arrays tokens, targets, segment_ids (0 is
        padding), positions; float32 loss_mask. Not to be written to: `whole` shares its arrays."""
        T, store = self.seq_len, self.store
        start_B = np.asarray(indices) * T + offsets
        window = np.zeros((len(start_B), T + 1), np.int32)
        for row, start in zip(window, start_B.tolist(), strict=True):
            ids = store.tokens(start, start + T + 1)
            row[: len(ids)] = ids
        batch = {"tokens": window[:, :-1], "targets": window[:, 1:]}
        at, live_B1 = np.arange(T + 1), store.num_tokens - 1 - start_B[:, None]
        if not self.isolate and live_B1.min() >= T:
            return batch | whole(*batch["tokens"].shape)
        begins = np.zeros_like(window)  # documents that begin at each token, but for the first of the row
        if self.isolate:
            starts = store.document_starts  # of the whole split, mapped: only the row's own are read, and found by bisection
            firsts, ends = (np.searchsorted(starts, at_B, side="right").tolist() for at_B in (start_B, start_B + T))
            for row, start, first, end in zip(begins, start_B, firsts, ends, strict=True):
                np.add.at(row, starts[first:end] - start, 1)
        segments, positions = 1 + np.cumsum(begins, 1), at - np.maximum.accumulate(np.where(begins > 0, at, 0), 1)
        mask = (at[:T] < live_B1) & (segments[:, 1:] == segments[:, :-1])
        return batch | {"segment_ids": np.where(at[:T] < live_B1, segments[:, :-1], 0).astype(np.int32),
                        "positions": positions[:, :-1].astype(np.int32), "loss_mask": mask.astype(np.float32)}


@functools.lru_cache(maxsize=4)
def whole(B: int, T: int) -> dict[str, np.ndarray]:
    """What rows without padding or document borders have in common: made once, not once a step, and read-only."""
    arrays = {"segment_ids": np.ones((B, T), np.int32), "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
              "loss_mask": np.ones((B, T), np.float32)}
    for array in arrays.values():
        array.setflags(write=False)
    return arrays
