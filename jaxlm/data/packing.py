"""Packing: row i of a split, concatenate-and-split, as a pure function of i."""

import numpy as np

NAMES = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


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

    def row(self, index: int, offset: int = 0) -> dict[str, np.ndarray]:
        """-> int32 (T,) arrays tokens, targets, segment_ids (0 is padding), positions; float32 loss_mask."""
        T, start = self.seq_len, offset + index * self.seq_len
        ids = self.store.tokens(start, start + T + 1)
        live = len(ids) - 1
        window = np.zeros(T + 1, np.int32)
        window[: len(ids)] = ids
        at = np.arange(T + 1)
        if self.isolate:
            starts = self.store.document_starts
            document = np.searchsorted(starts, start + at, side="right") - 1
            segments = document - document[0] + 1
            positions = np.minimum(start + at - starts[document], at)
        else:
            segments, positions = np.ones(T + 1, np.int32), at
        mask = (at[:T] < live) & (segments[1:] == segments[:-1])
        return {"tokens": window[:-1], "targets": window[1:],
                "segment_ids": np.where(at[:T] < live, segments[:-1], 0).astype(np.int32),
                "positions": positions[:-1].astype(np.int32), "loss_mask": mask.astype(np.float32)}
