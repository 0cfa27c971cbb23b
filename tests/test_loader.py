"""Batches: pure in (config, seed, step), made ahead, whole in evaluation."""

import numpy as np
import pytest
from data_cases import write

from jaxlm.data.loader import Batches, build_data
from jaxlm.errors import UserError


def test_batches_are_pure_and_each_epoch_is_a_permutation(config):
    write(config, "a.txt", "".join(chr(32 + i % 90) for i in range(500)))
    batches = build_data(config).train
    np.testing.assert_array_equal(batches.batch(3)["tokens"], build_data(config).train.batch(3)["tokens"])
    epochs = [[int(batches.order[e * len(batches) + i]) for i in range(len(batches))] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(batches))) and epochs[0] != epochs[1]


def test_prefetch_from_any_step_gives_the_same_batches_and_hands_over_errors(config):
    write(config, "a.txt", "the quick brown fox " * 30)
    config.data.jitter = True
    batches = build_data(config).train
    sent = []
    stream = batches.prefetched(5, lambda arrays: sent.append(sorted(arrays)) or arrays)
    for step in (5, 6, 7):
        batch, again = next(stream), batches.batch(step)
        assert batch.keys() == again.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    stream.close()
    assert sent[0] == sorted(again) and sent[1] == sent[2] == ["targets", "tokens"]  # what does not change is sent once
    with pytest.raises(ZeroDivisionError):
        next(batches.prefetched(0, lambda b: 1 / 0))


def test_evaluation_batches_pad_with_masked_rows(config):
    write(config, "a.txt", "abc " * 200)
    data = build_data(config)
    total = sum(b["loss_mask"].sum() for b in data.valid.evaluation_batches())
    assert total == data.valid.rows.store.num_tokens - 1
    assert isinstance(data.valid, Batches)


@pytest.mark.parametrize("change, message", [
    (dict(seq_len=5000), "longer than the training data"), (dict(vocab=3), "smaller than the tokenizer's")])
def test_data_that_does_not_fit(config, change, message):
    write(config, "a.txt", "abcdefgh" * 20)
    config.seq_len = change.pop("seq_len", 8)
    config.model.vocab_size = change.pop("vocab", 0)
    with pytest.raises(UserError, match=message):
        build_data(config)
