"""Packing: which tokens are in which row, and what is a target."""

import json

import numpy as np
from data_cases import write

from jaxlm.data.packing import PackedRows
from jaxlm.data.store import open_store


def packed(config, isolate, **flags):
    write(config, "a.jsonl", "\n".join(json.dumps({"text": t}) for t in ("abcde", "fg", "hijklmnopq", "rst", "uvw")))
    config.data.tokenizer, config.data.valid_fraction = "byte", 0.2
    stores, _ = open_store(config)
    return stores["train"], PackedRows(stores["train"], 8, isolate, **flags)


def test_rows_cover_every_target_once(config):
    store, rows = packed(config, False, pad_last=True)
    batch = rows.take(range(len(rows)))
    np.testing.assert_array_equal(batch["targets"][batch["loss_mask"] > 0], store.tokens(1, store.num_tokens))


def test_isolated_documents_have_segments_positions_and_no_loss_across(config):
    store, rows = packed(config, True, pad_last=False)
    row = {name: a[0] for name, a in rows.take([0]).items()}  # a b c d e eos f g | target of the last is eos
    np.testing.assert_array_equal(row["segment_ids"], [1] * 6 + [2] * 2)
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(row["loss_mask"], [1, 1, 1, 1, 1, 0, 1, 1])


def test_rows_of_isolated_documents_equal_those_told_token_by_token(config):
    """Any offsets, padded ends, documents of one token."""
    rng = np.random.default_rng(0)
    texts = ["x" * int(n) for n in rng.integers(0, 12, 60)]
    write(config, "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    config.data.tokenizer, config.data.valid_fraction = "byte", 0.05
    store = open_store(config)[0]["train"]
    document = np.repeat(np.arange(len(store.document_starts)), np.diff([*store.document_starts, store.num_tokens]))
    for offset in (0, 3):
        rows = PackedRows(store, 8, True, pad_last=True)
        batch = rows.take(range(len(rows)), [offset] * len(rows))
        for row in range(len(rows)):
            for t in range(8):
                at = row * 8 + offset + t
                live = at + 1 < store.num_tokens
                same = live and document[at] == document[at + 1]
                assert batch["loss_mask"][row, t] == same
                assert batch["segment_ids"][row, t] == (document[at] - document[row * 8 + offset] + 1 if live else 0)
                if live:
                    assert batch["positions"][row, t] == min(at - store.document_starts[document[at]], t)
