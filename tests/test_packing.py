"""Packing: which tokens are in which row, and what is a target."""

import json

import numpy as np
import pytest
from data_cases import write

from jaxlm.data.packing import PackedRows, PlannedRows
from jaxlm.data.plans import best_fit
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


def planned(config, packing, seq_len=8, count=300, isolate=True):
    """Documents of 0 to 40 letters; their ends have ids of their own."""
    rng = np.random.default_rng(1)
    texts = ["".join(chr(97 + int(i) % 26) for i in range(n)) for n in rng.integers(0, 40, count)]
    write(config, "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    config.data.tokenizer, config.data.valid_fraction, config.data.packing, config.seq_len = "byte", 0.05, packing, seq_len
    store = open_store(config)[0]["train"]
    return store, PlannedRows(store, seq_len, isolate, packing)


@pytest.mark.parametrize("packing", ["best_fit", "one"])
def test_planned_rows_have_every_token_and_target_once_and_split_only_what_does_not_fit(config, packing):
    store, rows = planned(config, packing)
    ends, starts, lengths, tokens = rows.plan
    own, targets = np.zeros(store.num_tokens, int), np.zeros(store.num_tokens, int)
    firsts, whole_documents = set(store.document_starts.tolist()), 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        own[start + (start not in firsts) : start + length] += 1  # a later part begins with the last token of the one before
        targets[start + 1 : start + length] += 1
    borders = [*store.document_starts.tolist(), store.num_tokens]
    pieces = dict(zip(starts.tolist(), lengths.tolist(), strict=True))
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        if 1 < end - start <= 9:
            assert pieces[start] == end - start
            whole_documents += 1
    assert whole_documents > 20
    alone = [s for s, e in zip(borders[:-1], borders[1:], strict=True) if e - s == 1]  # no target, so no row of its own
    assert own.sum() == store.num_tokens - (len(alone) if packing == "one" else 0) and own.max() == 1
    assert targets.sum() == store.num_tokens - len(store.document_starts) and targets.max() == 1
    assert np.add.reduceat(lengths, [0, *ends[:-1]]).max() <= 9
    batch = rows.take(range(len(rows)))
    assert batch["loss_mask"].sum() == targets.sum()
    counted = (batch["segment_ids"] == 0).mean()
    assert counted == pytest.approx(rows.plan.padding(8), abs=1e-12) and f"{counted:.2%}" in rows.about()[0]
    assert rows.plan.padding(8) < 0.08 if packing == "best_fit" else max(np.diff(ends)) == 1
    np.testing.assert_array_equal(np.sort(batch["targets"][batch["loss_mask"] > 0]),
                                  np.sort(store.tokens(0, store.num_tokens)[targets > 0]))


def test_the_rows_of_a_plan_are_those_told_piece_by_piece(config):
    store, rows = planned(config, "best_fit", seq_len=16)
    ends, starts, lengths, _ = rows.plan
    for row in range(len(rows)):
        batch = {name: a[0] for name, a in rows.take([row]).items()}
        at = 0
        for number, piece in enumerate(range(ends[row - 1] if row else 0, ends[row])):
            ids = store.tokens(int(starts[piece]), int(starts[piece] + lengths[piece]))
            for i in range(len(ids) - 1):
                told = [batch[name][at + i] for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")]
                assert told == [ids[i], ids[i + 1], number + 1, i, 1]
            at += len(ids)
        assert batch["loss_mask"].sum() == at - (number + 1)
    again = PlannedRows(store, 16, True, "best_fit")  # found, not made again
    assert [p.name for p in (store.folder / "plans").iterdir()] == ["train-best_fit-16-v1"]
    np.testing.assert_array_equal(again.take([3])["tokens"], rows.take([3])["tokens"])


def test_best_fit_is_that_of_a_plain_loop():
    """One piece at a time, longest first, each into the row with the least room that takes it: as many rows, of the same fill."""
    lengths, left = np.random.default_rng(2).integers(1, 34, 500), []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [i for i, room in enumerate(left) if room >= length]
        if fits:
            left[min(fits, key=lambda i: left[i])] -= length
        else:
            left.append(33 - length)
    order, ends = best_fit(lengths, 33)
    assert sorted(order) == list(range(500))
    assert sorted(33 - np.add.reduceat(lengths[order], [0, *ends[:-1]])) == sorted(left)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_count_each_target_once_with_context(config, isolate, stride):
    """The loss of a model whose prediction depends on all that it sees equals that of a plain loop over targets."""
    store, _ = packed(config, isolate, pad_last=True)
    rows, T = PackedRows(store, 8, isolate, pad_last=True, stride=stride), 8
    ids, document = store.tokens(0, store.num_tokens).astype(int), np.zeros(store.num_tokens, int)
    document[store.document_starts[1:]] = 1
    document = np.cumsum(document)
    said = lambda context, target: np.sin(np.dot(context, np.arange(1, len(context) + 1)) + target)
    wanted, count = 0.0, 0
    for t in range(1, len(ids)):
        start = 0 if t <= T else -(-(t - T) // stride) * stride
        if isolate and document[t] != document[t - 1]:
            continue
        context = [ids[i] for i in range(start, t) if not isolate or document[i] == document[t]]
        assert isolate or len(context) >= min(t, T - stride + 1)
        wanted, count = wanted + said(context, ids[t]), count + 1
    batch = rows.take(range(len(rows)))
    got = 0.0
    for row in range(len(rows)):
        for t in np.flatnonzero(batch["loss_mask"][row]):
            seen = batch["segment_ids"][row, : t + 1] == batch["segment_ids"][row, t]
            got += said(batch["tokens"][row, : t + 1][seen], batch["targets"][row, t])
    assert batch["loss_mask"].sum() == count
    np.testing.assert_allclose(got, wanted)
