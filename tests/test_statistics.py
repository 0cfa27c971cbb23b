"""Statistics of few seeds: against SciPy, stored answers of statsmodels 0.15, and by simulation."""

import json
import pathlib

import numpy as np
import pytest
from scipy import integrate, stats

from jaxlm.errors import UserError
from jaxlm.research import statistics

GOLDEN = json.loads(pathlib.Path("tests/golden/statistics.json").read_text())
A, B, C = (np.array(GOLDEN[name]) for name in "abc")


def test_pairs_are_those_of_statsmodels_and_scipy():
    interval, p = statistics.t_test(B - A)
    np.testing.assert_allclose(interval, GOLDEN["paired"]["interval"], rtol=1e-10)
    np.testing.assert_allclose(p, stats.ttest_rel(B, A).pvalue, rtol=1e-10)
    np.testing.assert_allclose(p, GOLDEN["paired"]["p"], rtol=1e-10)


def test_independent_runs_are_those_of_statsmodels_and_scipy():
    interval, p = statistics.t_test(C, A)
    np.testing.assert_allclose(interval, GOLDEN["welch"]["interval"], rtol=1e-10)
    np.testing.assert_allclose([p, p], [GOLDEN["welch"]["p"], stats.ttest_ind(C, A, equal_var=False).pvalue], rtol=1e-10)
    np.testing.assert_allclose(statistics.standard_error(C, A)[1], GOLDEN["welch"]["df"], rtol=1e-10)


@pytest.mark.parametrize("correction", ["holm", "benjamini-hochberg"])
def test_corrections_are_those_of_statsmodels(correction):
    np.testing.assert_allclose(statistics.CORRECTIONS[correction](GOLDEN["p"]), GOLDEN[correction], rtol=1e-12)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
@pytest.mark.parametrize("samples", [(B - A,), (C, A)], ids=["pairs", "independent"])
def test_the_bootstrap_is_that_of_scipy(samples, method):
    """Both draw 50,000 resamples, each its own: ends agree to a hundredth of the interval's width or two."""
    difference = lambda *x, axis: np.mean(x[0], axis) - (np.mean(x[1], axis) if len(x) > 1 else 0)
    theirs = stats.bootstrap(samples, difference, method=method, n_resamples=50_000, rng=np.random.default_rng(7))
    ours = statistics.bootstrap(*samples, method=method, resamples=50_000)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.03 * (ours.high - ours.low))


def test_the_detectable_difference_is_that_of_statsmodels():
    for runs, alpha, effect in GOLDEN["detectable"]:
        assert statistics.detectable(1 / np.sqrt(runs), runs - 1, alpha) == pytest.approx(effect, rel=1e-5)


@pytest.mark.parametrize("freedom, alpha", [(2, 0.05), (2, 0.01), (4, 0.002), (6.4, 0.01)])
def test_the_detectable_difference_has_the_promised_power(freedom, alpha):
    """By integrating over the variance; where statsmodels' solver stops early (2 degrees of freedom, 0.01) too."""
    shift, critical = statistics.detectable(1.0, freedom, alpha), stats.t.isf(alpha / 2, freedom)
    beyond = lambda v: sum(stats.norm.sf(critical * np.sqrt(v / freedom) - sign * shift) for sign in (1, -1))
    power = integrate.quad(lambda v: beyond(v) * stats.chi2.pdf(v, freedom), 0, 60 + 10 * freedom, limit=400)[0]
    assert power == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("seeds, of_bootstrap", [(3, 0.28), (5, 0.17), (10, 0.10)])
def test_the_t_test_keeps_five_percent_and_the_bootstrap_does_not(seeds, of_bootstrap):
    """20,000 experiments without an effect; the report's page and docs/research.md say these rates."""
    rng = np.random.default_rng(seeds)
    x_XR = rng.normal(size=(20_000, seeds))
    false = lambda interval: np.mean((interval.low > 0) | (interval.high < 0))
    interval, p = statistics.t_test(x_XR)
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.006) and false(interval) == np.mean(p < 0.05)
    assert false(statistics.bootstrap(x_XR[:3000], resamples=999)) == pytest.approx(of_bootstrap, abs=0.025)
    welch = statistics.t_test(rng.normal(size=(20_000, seeds)), 3 * rng.normal(size=(20_000, seeds)))[1]
    assert np.mean(welch < 0.05) < 0.066


def test_holm_keeps_the_chance_of_any_false_claim():
    """Five arms against one baseline, 5 seeds: uncorrected, every fifth report would claim something."""
    x_XAR = np.random.default_rng(0).normal(size=(8000, 6, 5))
    p_XA = statistics.t_test(x_XAR[:, 1:] - x_XAR[:, :1])[1]
    assert np.mean([(statistics.holm(p) < 0.05).any() for p in p_XA]) < 0.055
    assert np.mean((p_XA < 0.05).any(-1)) > 0.15


def test_a_real_difference_of_the_detectable_size_is_found_four_times_in_five():
    rng = np.random.default_rng(1)
    effect = statistics.detectable(1 / np.sqrt(5), 4)
    assert np.mean(statistics.t_test(rng.normal(effect, size=(20_000, 5)))[1] < 0.05) == pytest.approx(0.8, abs=0.01)


def test_arms_are_compared_with_words():
    base = [1.50, 1.51, 1.49, 1.505, 1.495]
    arms = {"better": (np.array(base) - [0.02, 0.021, 0.019, 0.0195, 0.0205], base, True),
            "same": (np.array(base) + [0.001, -0.002, 0.002, -0.001, 0.0005], base, True), "single": ([1.2], base, False)}
    found = statistics.compare(arms)
    assert list(found) == ["better", "same"]
    assert found["better"].verdict() == "better" and found["better"].verdict(higher_is_better=True) == "worse"
    assert found["same"].verdict() == "not significant" and found["same"].detectable > abs(found["same"].difference)
    assert found["better"].p_adjusted == pytest.approx(2 * found["better"].p)


def test_runs_that_are_equal_bit_for_bit_differ_by_nothing():
    found = statistics.compare({"twin": ([1.0, 2.0], [1.0, 2.0], True)})["twin"]
    assert (found.difference, found.p, found.significant, found.detectable) == (0, 1, False, 0)


def test_one_seed_has_no_interval():
    for function in (statistics.t_test, statistics.bootstrap):
        with pytest.raises(UserError, match="needs at least 2 runs with different seeds"):
            function(np.array([1.0]))
