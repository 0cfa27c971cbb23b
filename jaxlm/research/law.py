"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta, fitted to the losses of runs (Hoffmann et al., arXiv:2203.15556, D.3).

The sum over runs of Huber losses, delta 1e-3, of the residuals of log L is minimised by L-BFGS from a grid of starts. It is a sum,
divided by delta^2, and not the mean that ended the authors' own search before the minimum (Besiroglu et al., arXiv:2404.10102):
with numbers of order one the optimiser's tolerances mean something. log N and log D are centred, or a and alpha are all but one.

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
        problems.append(f"{n} runs for {p} parameters (E, A, alpha, B, beta): nothing is left to tell how sure the fit is; give at "
                        f"least {p + 1}, better 12")
    if sizes < FEWEST_LEVELS:
        problems.append(f"{'all runs have one size' if sizes == 1 else f'there are {sizes} sizes'}: alpha and A cannot be told from "
                        f"E; give runs of at least {FEWEST_LEVELS} sizes")
    if lengths < FEWEST_LEVELS:
        problems.append(f"{'all runs saw as many tokens' if lengths == 1 else f'there are {lengths} token counts'}: beta and B cannot "
                        f"be told from E; give runs with at least {FEWEST_LEVELS}")
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
