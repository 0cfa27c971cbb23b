"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta, fitted to the losses of runs (Hoffmann et al., arXiv:2203.15556, D.3).

The sum over runs of Huber losses, delta 1e-3, of the residuals of log L is minimised by L-BFGS from a grid of starts. It is a
sum, divided by delta^2, and not the mean that ended the authors' own search before the minimum (Besiroglu et al.,
arXiv:2404.10102): with numbers of order one the optimiser's tolerances mean something. log N and log D are centred, or log A
and alpha would be all but one.

No JAX in this file.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from jaxlm.errors import UserError

DELTA = 1e-3
PARAMETERS = ("E", "A", "alpha", "B", "beta")
EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)  # of the starts
BOUNDS = (0.005, 3.0)  # of an exponent: below, its term is a constant; a fit that ends at one has not found it
FEWEST_LEVELS = 3  # sizes, and token counts: of two, no exponent beside E


class Observations(NamedTuple):
    """Of n runs, arrays of shape (n,)."""

    parameters_N: np.ndarray
    tokens_N: np.ndarray
    loss_N: np.ndarray

    @classmethod
    def of(cls, rows) -> "Observations":
        """rows: (parameters, tokens, loss) of each run."""
        return cls(*np.array(rows, float).reshape(-1, 3).T)


class Law(NamedTuple):
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters, tokens):
        """Nats a token, or whatever the fitted losses were in."""
        parameters, tokens = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    @property
    def compute_exponent(self) -> float:
        """a of N_opt ~ C^a, where C ~ N D."""
        return self.beta / (self.alpha + self.beta)

    @property
    def undetermined(self) -> list[str]:
        """Exponents that ended at a bound."""
        return [name for name in ("alpha", "beta") if not BOUNDS[0] * 1.01 < getattr(self, name) < BOUNDS[1] * 0.99]


def require_identifiable(seen: Observations) -> None:
    """Raises UserError where these runs cannot tell the five parameters: too few, of one size, of one ratio."""
    n, p = len(seen.loss_N), len(PARAMETERS)
    sizes, lengths = (len(levels(values)) for values in (seen.parameters_N, seen.tokens_N))
    problems = []
    if n <= p:
        problems.append(f"{n} run{'s' * (n != 1)} for {p} parameters (E, A, alpha, B, beta): nothing is left to tell how sure "
                        f"the fit is; give at least {p + 1}, better 12")
    if sizes < FEWEST_LEVELS:
        problems.append(f"{'all runs have one size' if sizes == 1 else f'there are {sizes} sizes'}: alpha and A cannot be told "
                        f"from E; give runs of at least {FEWEST_LEVELS} sizes")
    if lengths < FEWEST_LEVELS:
        problems.append(f"{'all runs saw as many tokens' if lengths == 1 else f'there are {lengths} token counts'}: beta and B "
                        f"cannot be told from E; give runs with at least {FEWEST_LEVELS}")
    if not problems and len(levels(seen.tokens_N / seen.parameters_N)) == 1:
        problems.append("all runs have the same tokens per parameter: the terms of N and D cannot be told apart; give runs of "
                        "several ratios: fixed_ratio(config, parameters, (5, 10, 20))")
    if problems:
        raise UserError(*problems)


def levels(values, tolerance=0.05) -> list[list[int]]:
    """Indices of values that are the same within 5 %, smallest first."""
    groups, last = [], None
    for i in np.argsort(values):
        if last is None or values[i] > values[last] * (1 + tolerance):
            groups.append([])
            last = i
        groups[-1].append(int(i))
    return groups


# ---- The fit -------------------------------------------------------------------------------------------------------------------


def fit_law(seen: Observations, starts: tuple[Law, ...] = (), tried: int = 12) -> Law:
    """The best of L-BFGS from `starts`, and from the `tried` best of a grid of exponents. On it the model is linear in E, A, B,
    which non-negative least squares of the relative errors gives. Deterministic."""
    center = np.log(seen.parameters_N).mean(), np.log(seen.tokens_N).mean()
    x, y, log_loss = np.log(seen.parameters_N) - center[0], np.log(seen.tokens_N) - center[1], np.log(seen.loss_N)
    points = [np.array([math.log(s.E), math.log(s.A) - s.alpha * center[0], math.log(s.B) - s.beta * center[1], s.alpha, s.beta])
              for s in starts]
    points += [point for _, point in sorted(grid_of(x, y, seen.loss_N), key=lambda pair: pair[0])[:tried]]
    low, high = math.log(seen.loss_N.min()) - 12, math.log(seen.loss_N.max()) + 12
    bounds = [(low, high)] * 3 + [BOUNDS] * 2
    found = min((optimize.minimize(objective, np.clip(point, *np.transpose(bounds)), (x, y, log_loss), jac=True, bounds=bounds,
                                   method="L-BFGS-B", options={"ftol": 1e-11, "gtol": 1e-6, "maxiter": 400, "maxcor": 20})
                 for point in points), key=lambda result: result.fun)
    e, a, b, alpha, beta = map(float, found.x)
    return Law(math.exp(e), math.exp(a + alpha * center[0]), alpha, math.exp(b + beta * center[1]), beta)


def objective(point, x, y, log_loss) -> tuple[float, np.ndarray]:
    """-> (sum of Huber losses / delta^2, its gradient) at (log E, log A, log B, alpha, beta) with N, D in centred logarithms."""
    e, a, b, alpha, beta = point
    terms = np.stack([np.full_like(x, e), a - alpha * x, b - beta * y])
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    shares /= total
    scaled = (top + np.log(total) - log_loss) / DELTA
    clipped = np.clip(scaled, -1, 1)
    weighted = shares * (clipped / DELTA)
    # Huber(r) = clip(r) (r - clip(r) / 2)
    return float(clipped @ (scaled - clipped / 2)), np.array([*weighted.sum(1), -weighted[1] @ x, -weighted[2] @ y])


def grid_of(x, y, loss):
    """(squared relative error, point) for each pair of exponents."""
    for alpha, beta in itertools.product(EXPONENTS, repeat=2):
        columns = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], 1) / loss[:, None]
        weights, error = optimize.nnls(columns, np.ones_like(x))
        yield error, np.array([*np.log(np.maximum(weights, 1e-4 * loss.mean())), alpha, beta])


def log_residuals(law: Law, seen: Observations) -> np.ndarray:
    """log of measured over fitted loss, (n,)."""
    return np.log(seen.loss_N) - np.log(law.loss(seen.parameters_N, seen.tokens_N))


# ---- How sure it is ------------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    law: Law
    draws: tuple[Law, ...]  # of runs drawn anew with replacement
    noise: float  # standard deviation of log residuals, n - 5 in the denominator
    runs: int

    def interval(self, of, level: float = 0.95) -> tuple[float, float]:
        """Percentile bootstrap over runs of `of(law)`."""
        low, high = np.quantile([of(law) for law in self.draws], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def predict(self, parameters: float, tokens: float, level: float = 0.95) -> tuple[float, float, float]:
        """-> (loss, interval in which one run's loss lies): the draws, each with noise of a run; its size is itself an estimate,
        hence Student's t with n - 5 degrees of freedom."""
        noise = stats.t(self.runs - len(PARAMETERS)).ppf((np.arange(201) + 0.5) / 201) * self.noise  # all of t alike, not drawn
        means = np.log([law.loss(parameters, tokens) for law in self.draws])
        low, high = np.quantile(np.add.outer(means, noise), [(1 - level) / 2, (1 + level) / 2])
        return float(self.law.loss(parameters, tokens)), math.exp(low), math.exp(high)


def fit(seen: Observations, resamples: int = 400, seed: int = 0) -> Fit:
    """The law and its bootstrap. Raises UserError: not identifiable."""
    require_identifiable(seen)
    law = fit_law(seen)
    generator, n, draws = np.random.default_rng(seed), len(seen.loss_N), []
    while len(draws) < resamples:
        chosen = generator.integers(0, n, n)
        drawn = Observations(*(values[chosen] for values in seen))
        if min(len(levels(drawn.parameters_N)), len(levels(drawn.tokens_N))) >= FEWEST_LEVELS:  # others tell no exponent
            draws.append(fit_law(drawn, (law,), tried=0))  # more starts find the same, at five times the cost
    noise = math.sqrt((log_residuals(law, seen) ** 2).sum() / (n - len(PARAMETERS)))
    return Fit(law, tuple(draws), noise, n)


# ---- IsoFLOP parabolas ---------------------------------------------------------------------------------------------------------


class Parabola(NamedTuple):
    """Loss over log N at one budget (Hoffmann et al., section 3.2)."""

    flops: float  # mean of the runs'
    parameters: list[float]  # sizes of the runs, from smallest to largest
    coefficients: list[float]  # of log N: square, linear, constant
    best_parameters: float | None  # None: no minimum between the smallest and the largest
    best_loss: float | None
    words: str  # what is wrong; "" where there is a minimum


def parabolas(seen: Observations, flops_N) -> list[Parabola]:
    """Of each budget (the same within 5 %) with three or more sizes."""
    found = []
    for group in levels(np.asarray(flops_N)):
        x, loss = np.log(seen.parameters_N[group]), seen.loss_N[group]
        sizes = sorted(seen.parameters_N[group])
        if len(levels(seen.parameters_N[group])) < 3:
            continue
        square, linear, constant = map(float, np.polyfit(x, loss, 2))
        best = -linear / (2 * square) if square else math.inf
        inside = square > 0 and x.min() < best < x.max()
        words = "" if inside else ("the loss does not bend upwards" if square <= 0 else
                                   f"the minimum lies {'below the smallest' if best <= x.min() else 'above the largest'} size")
        found.append(Parabola(float(np.mean(np.asarray(flops_N)[group])), [float(s) for s in sizes], [square, linear, constant],
                              math.exp(best) if inside else None, constant - linear**2 / (4 * square) if inside else None, words))
    return found


def optimal_exponent(found: list[Parabola], level: float = 0.95) -> tuple[float, tuple[float, float] | None] | None:
    """-> (a of N_opt ~ C^a by least squares over the parabolas' minima, Student's t interval: None below three); None: fewer than
    two minima."""
    points = [(math.log(p.flops), math.log(p.best_parameters)) for p in found if p.best_parameters]
    if len(points) < 2:
        return None
    line = stats.linregress(*zip(*points, strict=True))
    if len(points) == 2:
        return float(line.slope), None
    wide = stats.t.isf((1 - level) / 2, len(points) - 2) * line.stderr
    return float(line.slope), (float(line.slope - wide), float(line.slope + wide))
