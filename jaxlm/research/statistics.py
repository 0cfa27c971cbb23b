"""What a few seeds can tell: intervals, p-values and their correction, and the smallest effect they could have seen.

Arms are compared by paired differences where their runs saw the same rows in the same order with the same seed, else as
independent groups (Welch). The t-test leads: with 3 to 10 seeds it keeps its 5 %, the bootstrap does not
(tests/test_statistics.py, docs/research.md). Arrays: R runs of an arm; leading axes are other experiments.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from jaxlm.errors import UserError

RESAMPLES = 9_999
POWER = 0.8


class Interval(NamedTuple):
    low: float
    high: float


class Comparison(NamedTuple):
    """One arm against the baseline; negative differences are lower values. `p` is two-sided, of the t-test."""

    runs: int  # pairs, or runs of the arm
    paired: bool
    difference: float  # of the means: arm - baseline
    t: Interval
    bootstrap: Interval  # BCa
    p: float
    p_adjusted: float  # over the arms of the report
    detectable: float  # smallest true difference that is found with probability POWER at the corrected level
    significant: bool

    def verdict(self, higher_is_better: bool = False) -> str:
        if not self.significant:
            return "not significant"
        return "better" if (self.difference > 0) == higher_is_better else "worse"


def standard_error(*samples_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one sample's mean, or of the difference of two means -> (standard error, degrees of freedom).

    Two: Welch 1947, with Satterthwaite's degrees of freedom. Over the last axis.
    """
    require_two(*samples_R)
    parts = [np.var(x, axis=-1, ddof=1) / x.shape[-1] for x in samples_R]
    total = sum(parts)
    if len(parts) == 1:
        return np.sqrt(total), np.full(np.shape(total), samples_R[0].shape[-1] - 1.0)
    shares = sum(part**2 / (x.shape[-1] - 1) for part, x in zip(parts, samples_R, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(shares > 0, total**2 / shares, min(x.shape[-1] for x in samples_R) - 1.0)
    return np.sqrt(total), freedom


def t_test(*samples_R: np.ndarray, level: float = 0.95) -> tuple[Interval, np.ndarray]:
    """Of a mean against 0, or of two independent means -> (interval of the difference, two-sided p)."""
    error, freedom = standard_error(*samples_R)
    center = difference_of(samples_R)
    reach = error * stats.t.ppf(0.5 + level / 2, freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, np.abs(center) / error, np.where(center == 0, 0.0, np.inf))  # runs that are equal bit for bit
    return Interval(center - reach, center + reach), 2 * stats.t.sf(t, freedom)


def bootstrap(*samples_R: np.ndarray, level: float = 0.95, resamples: int = RESAMPLES, method: str = "BCa") -> Interval:
    """Of the mean, or of the difference of two independent means. method: "BCa" (bias-corrected and accelerated: Efron 1987,
    JASA 82), "percentile". The same resamples for the same number of runs, so a report comes out the same twice."""
    require_two(*samples_R)
    generator = np.random.default_rng(0)
    drawn = []
    for x in samples_R:
        counts_ZR = generator.multinomial(x.shape[-1], np.full(x.shape[-1], 1 / x.shape[-1]), size=resamples)
        drawn.append(x @ (counts_ZR.T / x.shape[-1]))
    means_Z, center = difference_of(drawn, reduce=False), difference_of(samples_R)
    tails = np.array([0.5 - level / 2, 0.5 + level / 2])
    if method == "percentile":
        low, high = np.quantile(means_Z, tails, axis=-1)
        return Interval(low, high)
    # The acceleration, from the jackknife: of each sample by itself (Efron & Tibshirani 1993, section 14.3 and its extension).
    cubes, squares = 0.0, 0.0
    for x, sign in zip(samples_R, (1, -1), strict=False):
        influence = sign * (x - x.mean(-1, keepdims=True))
        cubes, squares = cubes + (influence**3).sum(-1) / x.shape[-1] ** 3, squares + (influence**2).sum(-1) / x.shape[-1] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = np.where(squares > 0, cubes / (6 * squares**1.5), 0.0)[..., None]
    close = 1e-12 * np.maximum(1, np.abs(center))[..., None]  # the same mean, summed in another order
    less, least = means_Z < center[..., None] - close, means_Z <= center[..., None] + close
    share = np.clip((less.mean(-1) + least.mean(-1)) / 2, 0.5 / resamples, 1 - 0.5 / resamples)
    bias = special.ndtri(share)[..., None]
    shifted = bias + special.ndtri(tails)
    levels = special.ndtr(bias + shifted / (1 - acceleration * shifted))
    ordered = np.sort(means_Z, axis=-1)
    place = levels * (resamples - 1)
    lower = np.floor(place).astype(int)
    below, above = (np.take_along_axis(ordered, np.minimum(lower + i, resamples - 1), -1) for i in (0, 1))
    ends = below + (above - below) * (place - lower)
    return Interval(ends[..., 0], ends[..., 1])


def difference_of(samples, reduce: bool = True):
    means = [np.mean(x, axis=-1) if reduce else x for x in samples]
    return means[0] if len(means) == 1 else means[0] - means[1]


def require_two(*samples_R) -> None:
    if (fewest := min(x.shape[-1] for x in samples_R)) < 2:
        raise UserError(f"an interval needs at least 2 runs with different seeds, better 5; there {'is' if fewest else 'are'} "
                        f"{fewest}: run more seeds")


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that keep the chance of any false positive at the level (Holm 1979, Scand. J. Statist. 6)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(1, adjusted[np.argsort(order)])


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that keep the share of false among the positives at the level (Benjamini & Hochberg 1995, JRSS B 57)."""
    p = np.asarray(p, float)
    order = np.argsort(p)[::-1]
    adjusted = np.minimum.accumulate(p[order] * len(p) / (len(p) - np.arange(len(p))))
    return np.minimum(1, adjusted[np.argsort(order)])


CORRECTIONS = {"holm": holm, "benjamini-hochberg": benjamini_hochberg, "none": lambda p: np.asarray(p, float)}


def detectable(error: float, freedom: float, alpha: float = 0.05, power: float = POWER) -> float:
    """The smallest true difference that a two-sided t-test at level `alpha` finds with probability `power`, if the standard error
    of the difference is what was measured; by the noncentral t distribution."""
    if error == 0:
        return 0.0
    critical = stats.t.isf(alpha / 2, freedom)
    wrong_side = lambda shift: np.nan_to_num(stats.nct.cdf(-critical, freedom, shift))  # SciPy's nan where it is below 1e-300
    missed = lambda shift: stats.nct.cdf(critical, freedom, shift) - wrong_side(shift) - (1 - power)
    high = critical + 5.0
    while not missed(high) < 0:  # few degrees of freedom: heavy tails
        high *= 1.5
    return float(error * optimize.brentq(missed, 1e-9, high))


def compare(arms: dict[str, tuple[np.ndarray, np.ndarray, bool]], level: float = 0.95, correction: str = "holm"
            ) -> dict[str, Comparison]:
    """Each arm against its baseline.

    arms: name -> (values of the arm, of the baseline, whether they are pairs in this order). Those with fewer than two are
    left out.
    """
    able = {name: (np.asarray(x, float), np.asarray(base, float), pairs) for name, (x, base, pairs) in arms.items()
            if min(len(x), len(base)) >= 2}
    samples = {name: (x - base,) if pairs else (x, base) for name, (x, base, pairs) in able.items()}
    tests = {name: t_test(*of, level=level) for name, of in samples.items()}
    adjusted = CORRECTIONS[correction](np.array([p for _, p in tests.values()])) if tests else []
    alpha = (1 - level) / (len(tests) if correction == "holm" and tests else 1)
    out = {}
    for (name, (interval, p)), p_adjusted in zip(tests.items(), adjusted, strict=True):
        boot = bootstrap(*samples[name], level=level)
        error, freedom = standard_error(*samples[name])
        out[name] = Comparison(
            len(able[name][0]), able[name][2], float(difference_of(samples[name])), Interval(*map(float, interval)),
            Interval(*map(float, boot)), float(p), float(p_adjusted), detectable(float(error), float(freedom), alpha),
            bool(p_adjusted < 1 - level))
    return out
