"""Ratings by maximum likelihood: Newton on a sparse Hessian, and what the estimate is worth.

The log-likelihoods are concave in all parameters, so a stationary point is the maximum. Differences of abilities are what the games
determine; the level is fixed by sum(s) = 0 here and by an anchor where ratings are shown.

    >>> import numpy as np
    >>> from .games import paired
    >>> found = fit(design(paired(np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0]), np.ones(4), ("a", "b")), "bradley-terry"))
    >>> float(round(found.theta[0] - found.theta[1], 10)), float(round(np.log(3), 10))
    (1.0986122887, 1.0986122887)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import linalg, sparse
from scipy.sparse import linalg as sparse_linalg
from scipy.special import expit

from ..errors import DataError, NumericsError
from .designs import Design, design
from .games import Array

__all__ = ["DENSE", "Estimate", "Fit", "bootstrap", "design", "estimates", "fit"]

DENSE = 3000  # parameters up to which the Hessian is factorised as a dense matrix; above, as a sparse one
STEPS = 100
GRADIENT, STEP = 1e-10, 1e-6  # the gradient per unit of a parameter's weight; after a step of 1e-6, Newton's error is its square
BLOCK = 256  # right-hand sides solved at once

Solve = Callable[[Array], Array]


@dataclass(frozen=True)
class Fit:
    """A maximum.

    Args:
        design: what was fitted. theta: (parameters,) in its order, abilities summing to 0.
        nll: negative log-likelihood in nats, the prior not included. gradient: largest entry of the gradient.
        iterations: Newton steps. prior: precision of the normal prior on abilities, 0 for none.
        solve: inverse Hessian times (parameters, k), for right-hand sides whose players' part sums to 0.
        draws: (draws, parameters) of a bootstrap, or None. failed: draws that had no maximum.
    """

    design: Design
    theta: Array
    nll: float
    gradient: float
    iterations: int
    prior: float
    solve: Solve
    draws: Array | None = None
    failed: int = 0


@dataclass(frozen=True)
class Estimate:
    """Values of k contrasts with standard errors and intervals, each (k,)."""

    value: Array
    se: Array
    low: Array
    high: Array


def _choices(d: Design, theta: Array) -> tuple[Array, Array]:
    """(negative log-probability of each choice, probability of each row's alternative)."""
    x = d.rows @ theta
    if d.offset is not None:
        x = x + d.offset
    if len(d.first) == len(d.choice):
        return np.logaddexp(0.0, x), expit(x)
    top = np.maximum(np.maximum.reduceat(x, d.first), 0.0)
    each = np.exp(x - top[d.choice])
    whole = np.add.reduceat(each, d.first) + np.exp(-top)
    return top + np.log(whole), each / whole[d.choice]


def _objective(d: Design, theta: Array, weight: Array, ties: float, prior: float) -> tuple[float, float, Array]:
    """(penalised, plain negative log-likelihood, probabilities of the rows). weight: (choices,); ties: weight of the kupper term."""
    each, p = _choices(d, theta)
    nll = float(weight @ each)
    if ties:
        nll = nll - ties * np.log(-np.expm1(-2 * theta[-1])) if theta[-1] > 0 else np.inf
    s = theta[: len(d.players)]
    return nll + 0.5 * prior * float(s @ s), nll, p


def _gram(rows: sparse.csr_matrix, weight: Array) -> sparse.csr_matrix | Array:
    """(parameters, parameters) rows' diag(weight) rows. Where every row has the same few entries and the result is small: a dense matrix,
    each product counted into its cell, which is several times quicker than a sparse product."""
    width, (filled, *others) = rows.shape[1], np.unique(np.diff(rows.indptr))
    if width > DENSE or others or filled > 4 or rows.shape[0] < width:
        return rows.T @ sparse.diags_array(weight) @ rows
    column, value = rows.indices.reshape(-1, filled).astype(np.int64), rows.data.reshape(-1, filled)
    out = np.zeros(width * width)
    for i in range(filled):
        for j in range(i, filled):
            part = np.bincount(
                column[:, i] * width + column[:, j], weights=weight * value[:, i] * value[:, j], minlength=width * width
            )
            out += part if i == j else part + part.reshape(width, width).T.ravel()
    return out.reshape(width, width)


def _derivatives(d: Design, theta: Array, p: Array, weight: Array, ties: float, prior: float) -> tuple[Array, Any]:
    """(gradient, Hessian, sparse or dense) of the penalised objective."""
    row = weight[d.choice] * p
    n, width = len(d.players), len(theta)
    gradient = d.rows.T @ row
    if len(d.first) == len(d.choice):
        hessian = _gram(d.rows, row * (1 - p))
    else:
        mean = sparse.csr_matrix((p, np.arange(len(p)), np.append(d.first, len(p))), shape=(len(d.first), len(p))) @ d.rows
        hessian = d.rows.T @ sparse.diags_array(row) @ d.rows - mean.T @ sparse.diags_array(weight) @ mean
    diagonal = np.zeros(width)
    if ties:
        gradient[-1] -= 2 * ties / np.expm1(2 * theta[-1])
        diagonal[-1] = ties / np.sinh(theta[-1]) ** 2
    gradient[:n] += prior * theta[:n]
    diagonal[:n] += prior
    if isinstance(hessian, np.ndarray):
        hessian[np.diag_indices(width)] += diagonal
        return gradient, hessian
    return gradient, (hessian + sparse.diags_array(diagonal)).tocsr()


def _factor(hessian: Any, players: int, prior: float) -> Solve:
    """x = H^-1 b, up to the level of the players, for b whose players' part sums to 0. Raises LinAlgError where H is singular."""
    width = hessian.shape[0]
    scale = float(hessian.diagonal()[:players].mean())
    if width <= DENSE:
        dense = hessian.copy() if isinstance(hessian, np.ndarray) else hessian.toarray()
        dense[:players, :players] += scale / players  # the level: ones is an eigenvector, orthogonal to every b
        factor = linalg.cho_factor(dense, lower=True, check_finite=True)
        if np.diag(factor[0])[np.diag(factor[0]) > 0].min() ** 2 < 1e-13 * np.diag(dense).max():
            raise linalg.LinAlgError("singular")
        return lambda b: linalg.cho_solve(factor, b)
    keep = np.arange(width) if prior else np.arange(1, width)  # without a prior the first player is held, which any level allows
    inner = sparse_linalg.splu(
        hessian[keep][:, keep].tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}, diag_pivot_thresh=0.0
    )

    def solve(b: Array) -> Array:
        x = np.zeros(b.shape)
        x[keep] = inner.solve(b[keep])
        return x

    return solve


def _start(d: Design) -> Array:
    theta = np.zeros(len(d.names))
    if d.kupper is not None:
        theta[-1] = 0.5
    return theta


def _diverging(d: Design, step: Array) -> DataError:
    """What has no finite estimate: the parameters that still move at the end."""
    size = np.abs(step)
    worst = [d.names[k] for k in np.argsort(-size)[:3] if size[k] > 0.3 * size.max()]
    kind = "effects" if d.effects else "tie parameter" if d.ties else "results"
    return DataError(
        f"no finite estimate exists: {', '.join(map(repr, worst))} grow without bound, because the {kind} and the ratings together "
        "explain every outcome; leave the effects out, or use another --method"
    )


def fit(d: Design, *, prior: float = 0.0, start: Array | None = None, weight: Array | None = None) -> Fit:
    """The maximum of the likelihood, or of likelihood and prior, by damped Newton steps.

    Args:
        prior: lambda of the penalty lambda/2 sum(s^2) on abilities at sum 0: a normal prior of variance 1/lambda. Effects and tie
            parameters have none.
        start: theta to begin with. weight: (ballots,) instead of the design's weight * count.

    At the end the largest entry of the gradient is at most 1e-10 of the weight that a parameter has (of 1 where it has less), and the
    last step was below 1e-6: a likelihood that keeps rising towards infinity has a vanishing gradient too, but never small steps.
    Raises DataError where no finite maximum exists. `games.unrated` says so beforehand, with names.
    """
    ballots = d.weight * d.count if weight is None else weight
    choices = d.share * ballots[d.unit]
    ties = float(ballots @ d.kupper) if d.kupper is not None else 0.0
    theta = _start(d) if start is None else start.copy()
    n = len(d.players)
    held = np.maximum(abs(d.rows).T @ choices[d.choice], 1.0)
    penalised, nll, p = _objective(d, theta, choices, ties, prior)
    step = np.full(len(theta), np.inf)
    for iteration in range(STEPS):
        gradient, hessian = _derivatives(d, theta, p, choices, ties, prior)
        try:
            solve = _factor(hessian, n, prior)
            proposed = -solve(gradient)
            if not np.isfinite(proposed).all():
                raise linalg.LinAlgError("singular")
        except (linalg.LinAlgError, RuntimeError, ValueError):
            raise _diverging(d, step if np.isfinite(step).all() else np.abs(theta) + 1) from None
        vanished = (np.abs(gradient) <= GRADIENT * held).all()
        if vanished and np.abs(step).max() <= STEP * (1 + np.abs(theta).max()):
            return Fit(d, theta, nll, float(np.abs(gradient).max()), iteration, prior, solve)
        if vanished and np.abs(proposed).max() > 0.01:  # near a maximum both vanish
            raise _diverging(d, proposed)
        step, length = proposed, 1.0
        while True:
            trial = theta + length * step
            trial[:n] -= trial[:n].mean()
            found = _objective(d, trial, choices, ties, prior)
            # At the end the objective differs by less than its rounding: then the full step stands.
            if found[0] <= penalised + 1e-4 * length * float(gradient @ step) + 1e-12 * abs(penalised):
                break
            length /= 2
            if length < 1e-10:
                raise NumericsError("ratings: no step lowers the objective; this is our fault")
        theta, (penalised, nll, p) = trial, found
    raise _diverging(d, step)


def _meat(f: Fit) -> sparse.csr_matrix:
    """(parameters, parameters) sum of squared gradients of ballots, or of clusters; a ballot that was counted c times adds c."""
    d = f.design
    _, p = _choices(d, f.theta)
    rows = len(d.choice)
    times = d.weight * (np.sqrt(d.count) if d.cluster is None else d.count)
    pick = sparse.csr_matrix(
        (p * (d.share * times[d.unit])[d.choice], (d.unit[d.choice], np.arange(rows))), shape=(len(d.weight), rows)
    )
    scores = pick @ d.rows
    if d.kupper is not None:
        term = -2 / np.expm1(2 * f.theta[-1]) * d.kupper * times
        scores = scores + sparse.csr_matrix(
            (term, (np.arange(len(term)), np.full(len(term), len(f.theta) - 1))), shape=scores.shape
        )
    if d.cluster is not None:
        scores = sparse.csr_matrix((np.ones(len(d.cluster)), (d.cluster, np.arange(len(d.cluster))))) @ scores
    return scores.T @ scores


def estimates(f: Fit, contrasts: Array, *, intervals: str, level: float = 0.95) -> Estimate:
    """Linear functions of the parameters with their uncertainty.

    Args:
        contrasts: (k, parameters); the players' part of each row sums to 0, so the level does not matter.
        intervals: 'fisher': c' H^-1 c. 'sandwich': c' H^-1 M H^-1 c with M the sum of squared scores of ballots, or of clusters
            (Huber 1967; Liang and Zeger 1986; no small-sample factor). 'bootstrap': spread and percentiles of the draws.

    Raises ValueError for a bootstrap that was not drawn, AssertionError for contrasts of the level.
    """
    n = len(f.design.players)
    assert np.abs(contrasts[:, :n].sum(axis=1)).max(initial=0) < 1e-8, (
        "a contrast of the level has no variance that games determine"
    )
    value = contrasts @ f.theta
    tail = (1 - level) / 2
    if intervals == "bootstrap":
        if f.draws is None:
            raise ValueError("bootstrap intervals of a fit without draws")
        drawn = f.draws @ contrasts.T
        low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
        return Estimate(value, drawn.std(axis=0, ddof=1), low, high)
    variance = np.empty(len(contrasts))
    meat = _meat(f) if intervals == "sandwich" else None
    for begin in range(0, len(contrasts), BLOCK):
        block = contrasts[begin : begin + BLOCK].T
        solved = f.solve(np.ascontiguousarray(block))
        variance[begin : begin + BLOCK] = (solved * (meat @ solved)).sum(0) if meat is not None else (block * solved).sum(0)
    se = np.sqrt(np.maximum(variance, 0.0))
    z = normal_quantile(1 - tail)
    return Estimate(value, se, value - z * se, value + z * se)


def covariance(f: Fit, contrasts: Array, *, intervals: str) -> Array:
    """(k, k) covariance of contrasts; arguments as for `estimates`. For k of a few thousand."""
    if intervals == "bootstrap":
        assert f.draws is not None
        return np.atleast_2d(np.cov(f.draws @ contrasts.T, rowvar=False))
    solved = f.solve(np.ascontiguousarray(contrasts.T))
    if intervals == "fisher":
        return contrasts @ solved
    return solved.T @ (_meat(f) @ solved)


def normal_quantile(probability: float) -> float:
    """z with P(Z <= z) = probability.

    >>> round(normal_quantile(0.975), 6)
    1.959964
    """
    from scipy.special import ndtri

    return float(ndtri(probability))


def bootstrap(f: Fit, *, draws: int, seed: int, progress: Callable[[int], object] = lambda done: None) -> Fit:
    """The fit with refits of resampled data: clusters where there are any, else single ballots, drawn with replacement (Efron 1979).

    Scales of covariates stay as they are. A draw without a finite maximum is left out and counted in `failed`.
    Raises DataError where there are fewer than two to draw from, or more than one draw in twenty failed.
    """
    d, generator = f.design, np.random.default_rng(seed)
    size = int(d.count.sum()) if d.cluster is None else int(d.cluster.max()) + 1
    if size < 2:
        raise DataError("a bootstrap needs at least two clusters to draw from")
    found, failed = [], 0
    for done in range(draws):
        if d.cluster is None:
            weight = d.weight * generator.multinomial(size, d.count / d.count.sum())
        else:
            weight = d.weight * d.count * generator.multinomial(size, np.full(size, 1 / size))[d.cluster]
        try:
            found.append(fit(d, prior=f.prior, start=f.theta, weight=weight).theta)
        except (DataError, NumericsError):
            failed += 1
        progress(done + 1)
    if failed > draws / 20:
        raise DataError(
            f"{failed} of {draws} bootstrap draws have no finite ratings (somebody unbeaten in them): percentiles mean nothing; "
            "use --intervals fisher or sandwich, or state a --prior"
        )
    return replace(f, draws=np.array(found), failed=failed)
