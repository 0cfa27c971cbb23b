"""The verdict on a run's curves, checkpoints averaged, and how both are shown."""

import json

import numpy as np
import pytest

from jaxlm.observe.fitting import judge, judge_run, noise
from jaxlm.observe.report import write_report

STEPS = np.arange(100, 2001, 100)


def curves(valid, train, sigma=0.0, seed=0):
    """-> (train, valid) of functions of the step; training is logged every 10 steps, with noise of its own."""
    rng, dense = np.random.default_rng(seed), np.arange(10, 2001, 10)
    return (list(zip(dense.tolist(), (train(dense) + 0.02 * rng.standard_normal(len(dense))).tolist(), strict=True)),
            list(zip(STEPS.tolist(), (valid(STEPS) + sigma * rng.standard_normal(len(STEPS))).tolist(), strict=True)))


falling = lambda x: 2 + 2 * np.exp(-x / 300)
rising_after = lambda x: falling(x) + np.maximum(0, x - 1200) * 4e-4
steep = lambda x: 3.5 - 1e-3 * x
CASES = {
    "over-fitting": (rising_after, lambda x: falling(x) - x * 4e-4),
    "worsening": (rising_after, lambda x: falling(x) + np.maximum(0, x - 1200) * 4e-4),
    "still learning": (steep, steep),
    "under-fitting": (falling, lambda x: falling(x) - 0.01),
    "fitted": (falling, lambda x: falling(x) - x * 2e-4),
}


@pytest.mark.parametrize("sigma", [0.0, 0.01])
@pytest.mark.parametrize("kind", list(CASES))
def test_each_kind_is_told_with_and_without_noise(kind, sigma):
    verdicts = [judge(*curves(*CASES[kind], sigma, seed)) for seed in range(10)]
    assert [v.kind for v in verdicts] == [kind] * 10
    if kind == "over-fitting":
        assert all(1000 <= v.since <= 1400 and f"over-fitting since step {v.since:,}" in v.text for v in verdicts)


def test_a_rise_within_the_noise_is_none():
    """Many runs that came to rest, of noise alone: the last evaluation is hardly ever the lowest, and that means nothing."""
    kinds = [judge(*curves(falling, lambda x: falling(x) - x * 2e-4, 0.03, seed)).kind for seed in range(200)]
    assert kinds.count("over-fitting") + kinds.count("worsening") <= 4


def test_the_noise_is_told_from_the_evaluations():
    estimates = [noise(curves(steep, steep, 0.05, seed)[1]) for seed in range(100)]
    assert abs(np.mean(estimates) - 0.05) < 0.01
    uneven = [(0, 3.0), (10, 2.9), (100, 2.0), (101, 1.99), (300, 0.0)]
    assert noise(uneven) < 1e-9  # a straight line


def test_little_is_said_of_little():
    train, valid = curves(*CASES["over-fitting"])
    assert judge(train, valid[:3]).kind == judge([], []).kind == "unknown"
    assert judge([], valid).kind == "over-fitting"  # validation alone
    assert judge(train, [*valid, (2100, float("nan"))]).kind == "over-fitting"


def test_the_report_shows_verdict_and_gap(tmp_path):
    train, valid = curves(*CASES["over-fitting"])
    lines = [{"split": "train", "step": s, "loss": y} for s, y in train] + [
        {"split": "valid/all", "step": s, "loss": y, "perplexity": 1.0} for s, y in valid]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"split": "tr')
    verdict = judge_run(str(tmp_path))
    page = open(write_report(str(tmp_path))).read()
    assert verdict.kind == "over-fitting" and all(part in page for part in verdict.text.split(":", 1))
    assert 'class="gap"' in page and f"lowest at {verdict.since:,}" in page
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:5]))
    page = open(write_report(str(tmp_path))).read()
    assert 'class="gap"' not in page and "lowest at" not in page
