"""Mixtures: exact shares, any row without those before it, one tokenizer."""

import json
import types

import numpy as np
import pytest
from data_cases import jsonl, write

from jaxlm.data.loader import build_data
from jaxlm.data.mixture import Schedule, Stages
from jaxlm.errors import UserError


def check_exact(schedule, weights, blocks):
    D = schedule.block_rows
    shares, live = np.array(schedule.units) / sum(schedule.units), sum(w > 0 for w in weights)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=1e-9)
    for block in blocks:
        source, before = schedule._block(block)
        counts = np.array(schedule._border(block)) + np.cumsum(source[:, None] == np.arange(len(weights)), 0)
        wanted = (block * D + np.arange(1, D + 1))[:, None] * shares
        assert abs(counts - wanted).max() <= 1 - 1 / max(1, 2 * live - 2) + 1e-6, (weights, block)
        assert tuple(counts[-1]) == schedule._border(block + 1)
        np.testing.assert_array_equal(before, counts[np.arange(D), source] - 1)


def test_shares_are_within_one_row_of_what_was_asked_after_any_number_of_rows():
    rng = np.random.default_rng(0)
    for trial in range(40):
        k = int(rng.integers(1, 8))
        weights = (rng.dirichlet(np.full(k, [1.0, 0.2, 5.0][trial % 3])) + 2e-4).tolist()
        check_exact(Schedule(weights), weights, [0, 1, int(rng.integers(2, 10**6))])
    check_exact(Schedule([0.999, 0.001]), [0.999, 0.001], range(8))
    for block in range(0, 10**6, 10**5):  # shares smaller than a row of a block of 1,024
        weights = [0.5, 0.4994, 0.0004, 0.0002]
        check_exact(Schedule(weights), weights, [block])
    with pytest.raises(UserError, match="at least 1e-06"):
        Schedule([1.0, 1e-7])
    check_exact(Schedule([1.0] * 12), [1.0] * 12, range(3))
    two = np.concatenate([Schedule([0.31, 0.69])._block(b)[0] for b in range(2)])
    for length in (1, 7, 10, 100):  # and of any window of two sources, one row
        seen = np.convolve(two == 0, np.ones(length), "valid")
        assert abs(seen - 0.31 * length).max() < 1


def test_a_source_that_has_had_its_epochs_leaves_its_share_to_the_others():
    stages = Stages([(0, [1, 1]), (1000, [1, 3])], [300, None], 2000)
    had = [stages.at(n) for n in range(2000)]
    assert [j for s, j in had if s == 0] == list(range(300))
    assert [j for s, j in had if s == 1] == list(range(1700)) and stages.had == [300, 1700]
    assert sum(s == 0 for s, _ in had[:600]) == pytest.approx(300, abs=1) and not any(s == 0 for s, _ in had[601:])
    with pytest.raises(UserError, match="fill 40 of the run's 50 rows"):
        Stages([(0, [1, 1])], [10, 30], 50)


def mixed(config, **data):
    for i, letters in enumerate(("abcdef", "ABCDEF", "123456")):
        rng = np.random.default_rng(i)
        write(config, f"{i}.jsonl", jsonl(*("".join(rng.choice(list(letters), int(n))) for n in rng.integers(5, 40, 120))))
    config.data.path, config.steps = "shakespeare", 400
    config.data.mixture = (("low", "0.jsonl", 0.5), ("up", "1.jsonl", 0.3), ("digits", "2.jsonl", 0.2))
    for key, value in data.items():
        config.data[key] = value
    return config


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_any_step_and_any_hosts_have_the_same_rows_and_shares_are_exact(config, packing):
    config = mixed(config, packing=packing, isolate_documents=packing == "best_fit",
                   mixture_stages=((200, {"digits": 1.0, "low": 1.0}),))
    data = build_data(config)
    again = build_data(config).train
    for step in (399, 17, 250):
        whole = data.train.batch(step)
        for hosts in (2, 4):
            parts = [again.batch(step, range(h * 4 // hosts, (h + 1) * 4 // hosts)) for h in range(hosts)]
            for name in whole:
                np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    names = [data.train.where(n)["source"] for n in range(1600)]
    for name, first, then in (("low", 0.5, 0.5), ("up", 0.3, 0.0), ("digits", 0.2, 0.5)):
        counts = np.cumsum([n == name for n in names])
        assert abs(counts[:800] - first * np.arange(1, 801)).max() < 1
        assert abs(counts[800:] - counts[799] - then * np.arange(1, 801)).max() < 1
    kinds = {"low": "abcdef", "up": "ABCDEF", "digits": "123456"}
    for row, ids in enumerate(data.train.batch(3)["tokens"]):
        text = data.tokenizer.decode(ids[data.train.batch(3)["segment_ids"][row] > 0])
        assert set(text.replace("<|endoftext|>", "")) <= set(kinds[names[12 + row]])
    seen = [data.train.where(n) for n in range(len(names)) if names[n] == "low"]
    length = len(data.train.parts[0])
    assert sorted(x["index"] for x in seen[:length]) == list(range(length)) and seen[length]["epoch"] == 1
    total = sum(b["loss_mask"].sum() for b in data.valid.evaluation_batches())
    assert total == sum(rows.take(range(len(rows)))["loss_mask"].sum() for rows in data.valid.rows.rows)
    assert "up 15.00% of the rows" in data.about[-1]


def test_a_change_of_later_stages_leaves_the_steps_before_as_they_were(config):
    one = build_data(mixed(config)).train.batch(150)
    two = build_data(mixed(config, mixture_stages=((200, {"up": 1.0}),))).train.batch(150)
    np.testing.assert_array_equal(one["tokens"], two["tokens"])


def test_weights_by_size_and_temperature(config):
    config = mixed(config, mixture_by="tokens", mixture_temperature=2.0)
    train = build_data(config).train
    tokens = np.array([part.rows.store.num_tokens for part in train.parts]) * [0.5, 0.3, 0.2]
    schedule = train.mix.schedules[0]
    np.testing.assert_allclose(np.array(schedule.units) / schedule.whole, tokens**0.5 / (tokens**0.5).sum())


@pytest.mark.parametrize("data, message", [
    (dict(mixture=(("a", "0.jsonl", -1.0),)), "must not be negative"),
    (dict(mixture=(("a", "0.jsonl", 0.0),)), "all weights are 0"),
    (dict(mixture=(("a", "0.jsonl"),)), "not of their form"),
    (dict(mixture=(("a", "0.jsonl", 1), ("a", "1.jsonl", 1))), "one name"),
    (dict(mixture_stages=((5, {"lowe": 1.0}),)), "no source 'lowe'; did you mean low"),
    (dict(mixture_stages=((5, {"low": 1.0}), (5, {"low": 1.0}))), "ascend"),
    (dict(mixture=(("a", "0.jsonl", 1), ("b", "3.jsonl", 1))), "no such file"),
    (dict(mixture=(("a", "0.jsonl", 1), ("b", "short.jsonl", 1))), "source 'b'"),
    (dict(mixture=(("a", "0.jsonl", 1), ("b", "x.bin", 1))), "is tokens of another"),
    (dict(mixture=(("a", "0.jsonl", 1), ("b", "x.bin", 1)), tokenizer="byte"), "id 300 .* is not among the 257"),
    (dict(mixture=(("a", "0.jsonl", 1, 1),)), "allow more epochs")])
def test_mixtures_that_cannot_be(config, data, message):
    mixed(config)
    write(config, "short.jsonl", json.dumps({"text": "abcd"}))
    write(config, "x.bin", np.full(100, 300, np.uint16).tobytes())
    with pytest.raises(UserError, match=message) as error:
        build_data(mixed(config, **data))
    assert all("\n" not in problem for problem in error.value.problems)


def test_each_source_has_its_own_loss_and_all_is_the_mean_over_tokens(config):
    from jaxlm.evaluate.perplexity import evaluate, evaluate_split

    write(config, "a.jsonl", jsonl(*(["aaaa bbbb"] * 40)))
    write(config, "b.jsonl", jsonl(*(["cccccc"] * 70)))
    config.data.mixture, config.data.tokenizer = (("a", "a.jsonl", 0.5), ("b", "b.jsonl", 0.5)), "byte"
    data = build_data(config)
    feed = types.SimpleNamespace(rows=None, put=lambda batch: batch)

    def eval_step(params, batch):  # the loss of a token is its id
        return {"nll": (batch["targets"] * batch["loss_mask"]).sum(), "weight": batch["loss_mask"].sum()}

    lines = evaluate_split(eval_step, None, data.valid, feed)
    whole = evaluate(eval_step, None, data.valid.evaluation_batches(), feed.put, data.valid.num_bytes)
    assert list(lines) == ["all", "a", "b"]
    assert lines["all"] == pytest.approx(whole)
    assert lines["b"]["tokens"] + lines["a"]["tokens"] == lines["all"]["tokens"] and lines["a"]["loss"] < lines["b"]["loss"]
    config.data.mixture, config.data.path = (), "a.jsonl"
    assert list(evaluate_split(eval_step, None, build_data(config).valid, feed)) == ["all"]
