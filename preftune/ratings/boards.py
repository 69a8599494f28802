"""From a fit to what people read: ratings on a scale, with an anchor, intervals of ratings and of differences, ranks to claim."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import lsqr

from ..errors import DataError, UsageError, nearest
from .designs import Design, design
from .fits import Estimate, Fit, bootstrap, covariance, estimates, fit, normal_quantile
from .games import Array, Games, merged, played, unrated

ELO = 400 / math.log(10)  # points per natural unit of log-ability: 400 points are odds of ten to one
ELO_MEAN = 1000.0
MOST_RANKED = 2000  # players up to which all differences are looked at


@dataclass(frozen=True)
class Line:
    """A player. `first`, `last`: its best and worst rank by difference intervals, None where there are more than MOST_RANKED players;
    `score`: share of comparisons won, ties half."""

    name: str
    rating: float
    se: float
    low: float
    high: float
    first: int | None
    last: int | None
    games: int
    score: float


@dataclass(frozen=True)
class Effect:
    """An effect in the scale's units (a tie parameter as itself), with its interval. `unit`: what a difference of 1 stands for."""

    name: str
    value: float
    se: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Board:
    """Ratings, best first, and how they were made. Numbers in the units of `scale` unless named otherwise."""

    lines: tuple[Line, ...]
    effects: tuple[Effect, ...]
    fit: Fit
    method: str
    intervals: str
    level: float
    scale: str
    anchor: tuple[str, float] | None
    notes: tuple[str, ...]


def _index(d: Design, name: str, option: str) -> int:
    if name not in d.players:
        raise UsageError(f"{option}: nobody is called {name!r}{nearest(name, d.players)}")
    return d.players.index(name)


def _factor(scale: str) -> float:
    return ELO if scale == "elo" else 1.0


def _gauge(d: Design, anchor: str | None) -> Array:
    """(players, parameters): each player against the anchor, or against the mean of all."""
    n = len(d.players)
    rows = np.zeros((n, len(d.names)))
    rows[np.arange(n), np.arange(n)] = 1.0
    if anchor is None:
        rows[:, :n] -= 1 / n
    else:
        rows[:, _index(d, anchor, "--anchor")] -= 1.0
    return rows


def compare(board: Board, a: str, b: str) -> tuple[Estimate, float]:
    """(the difference a - b in the scale's units, its interval from the joint covariance; P(a beats b) without ties and effects)."""
    d = board.fit.design
    contrast = np.zeros((1, len(d.names)))
    contrast[0, _index(d, a, "--compare")] += 1
    contrast[0, _index(d, b, "--compare")] -= 1
    found, k = estimates(board.fit, contrast, intervals=board.intervals, level=board.level), _factor(board.scale)
    return Estimate(*(k * x for x in (found.value, found.se, found.low, found.high))), 1 / (1 + math.exp(-float(found.value[0])))


def _ranks(f: Fit, gauge: Array, value: Array, intervals: str, level: float) -> tuple[list[int | None], list[int | None]]:
    """Best and worst rank of each player: how many are certainly above it and certainly below it, one difference interval each."""
    n = len(value)
    if n > MOST_RANKED:
        return [None] * n, [None] * n
    if intervals == "bootstrap" and f.draws is not None:
        tail, drawn = (1 - level) / 2, f.draws @ gauge.T
        above = np.array([(np.quantile(drawn - drawn[:, [i]], tail, axis=0) > 0).sum() for i in range(n)])
        below = np.array([(np.quantile(drawn - drawn[:, [i]], 1 - tail, axis=0) < 0).sum() for i in range(n)])
    else:
        cov = covariance(f, gauge, intervals=intervals)
        half = normal_quantile((1 + level) / 2) * np.sqrt(np.maximum(np.diag(cov)[:, None] + np.diag(cov)[None] - 2 * cov, 0.0))
        gap = value[None] - value[:, None]
        above, below = (gap > half).sum(1), (gap < -half).sum(1)
    return [int(1 + a) for a in above], [int(n - b) for b in below]


def _effects(f: Fit, intervals: str, level: float, scale: str) -> tuple[Effect, ...]:
    """Effects and tie parameters. nu = exp(tau) and theta = exp(c) get the interval of their logarithm."""
    d = f.design
    n, many = len(d.players), len(d.effects) + len(d.ties)
    if not many:
        return ()
    contrasts = np.zeros((many, len(d.names)))
    contrasts[np.arange(many), n + np.arange(many)] = 1
    found = estimates(f, contrasts, intervals=intervals, level=level)
    out = []
    for k, name in enumerate((*d.effects, *d.ties)):
        value, se, low, high = (float(x[k]) for x in (found.value, found.se, found.low, found.high))
        if k < len(d.effects):
            unit, c = "yes or no" if name == "shown first" else f"{d.scale[k]:.4g}", _factor(scale)
            out.append(Effect(name, c * value, c * se, c * low, c * high, unit))
        else:
            symbol = "theta" if d.kupper is not None else "nu" if name == "tie" else f"delta, {name}"
            out.append(Effect(symbol, math.exp(value), math.exp(value) * se, math.exp(low), math.exp(high), ""))
    return tuple(out)


def _require_information(d: Design) -> None:
    """Refuses effects that are collinear with the ratings or with each other, before the fit. Raises DataError that names them."""
    n, e = len(d.players), len(d.effects)
    if not e:
        return
    weight = (d.share * (d.weight * d.count)[d.unit])[d.choice]
    x, z = d.rows[:, :n], d.rows[:, n : n + e].toarray()
    own = (weight[:, None] * z**2).sum(0)
    root = np.sqrt(weight)
    own_rows = sparse.diags_array(root) @ x
    # What least squares on the players leaves of each effect; lsqr needs no matrix of all players.
    left = np.column_stack(
        [root * z[:, k] - own_rows @ lsqr(own_rows, root * z[:, k], atol=1e-13, btol=1e-13)[0] for k in range(e)]
    )
    for k in range(e):
        if (left[:, k] ** 2).sum() < 1e-8 * own[k]:
            raise DataError(
                f"{d.effects[k]}: each player has one value of its own throughout, so its effect cannot be told from the rating"
            )
    unit = left / np.sqrt((left**2).sum(0))
    sizes, vectors = np.linalg.eigh(unit.T @ unit)
    if sizes[0] < 1e-8:
        names = [d.effects[k] for k in range(e) if abs(vectors[k, 0]) > 0.1]
        raise DataError(
            f"{' and '.join(names)}: one follows from the other, so their effects cannot be told apart; leave one out"
        )


def rate(
    games: Games,
    method: str,
    *,
    ties: str = "refuse",
    order_effect: bool = False,
    prior: float = 0.0,
    intervals: str = "fisher",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    scale: str = "elo",
    anchor: tuple[str, float] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Board:
    """Ratings of the players of some games.

    Args:
        method, ties, order_effect: see `designs.design`. prior: see `fits.fit`. intervals, level: see `fits.estimates`.
        draws, seed, progress: of the bootstrap. scale: 'elo' (ELO points per natural unit, mean 1000) or 'logit' (natural, mean 0).
        anchor: a player and the rating it has; its own interval is then a point, and the others' are those of their difference from it.

    Raises DataError where no finite ratings exist and no prior is stated (components named), or an effect cannot be told apart; UsageError
    where the method does not fit the games or the anchor is unknown.
    """
    d = design(merged(games, keep_order=order_effect), method, ties=ties, order_effect=order_effect)
    gauge = _gauge(d, anchor[0] if anchor else None)
    if len(d.players) < 2:
        raise DataError(f"only {d.players[0]!r} plays in these games; ratings compare two or more")
    notes, why = [], unrated(games)
    if why and not prior:
        raise DataError(
            f"no finite ratings exist: {why}\n--prior 0.1 states a normal prior of variance 1/0.1 on the ratings; or leave them out"
        )
    if why:
        notes.append(f"without the prior no finite ratings would exist: {why}")
    _require_information(d)
    f = fit(d, prior=prior)
    if intervals == "bootstrap":
        f = bootstrap(f, draws=draws, seed=seed, progress=progress)
        if f.failed:
            notes.append(f"{f.failed} of {draws} bootstrap draws had no finite ratings and were left out")
    if d.cluster is not None and intervals == "sandwich" and d.cluster.max() + 1 < len(d.names):
        notes.append(
            f"{d.cluster.max() + 1} clusters for {len(d.names)} parameters: the sandwich has not enough of them to be trusted"
        )
    k, zero = _factor(scale), anchor[1] if anchor else ELO_MEAN if scale == "elo" else 0.0
    found = estimates(f, gauge, intervals=intervals, level=level)
    first, last = _ranks(f, gauge, found.value, intervals, level)
    number, score = played(games)
    lines = []
    for i, name in enumerate(d.players):
        value, low, high = (float(zero + k * x[i]) for x in (found.value, found.low, found.high))
        lines.append(Line(name, value, float(k * found.se[i]), low, high, first[i], last[i], int(number[i]), float(score[i])))
    lines.sort(key=lambda line: (-line.rating, line.name))
    return Board(tuple(lines), _effects(f, intervals, level, scale), f, method, intervals, level, scale, anchor, tuple(notes))


def differences(board: Board) -> list[list[dict[str, float] | None]]:
    """[row][column] rating of the row's line minus that of the column's, with its interval; None on the diagonal."""
    d, n = board.fit.design, len(board.lines)
    at = [d.players.index(line.name) for line in board.lines]
    rows, columns = np.nonzero(~np.eye(n, dtype=bool))
    contrasts = np.zeros((len(rows), len(d.names)))
    contrasts[np.arange(len(rows)), np.array(at)[rows]] += 1
    contrasts[np.arange(len(rows)), np.array(at)[columns]] -= 1
    found, k = estimates(board.fit, contrasts, intervals=board.intervals, level=board.level), _factor(board.scale)
    out: list[list[dict[str, float] | None]] = [[None] * n for _ in range(n)]
    for x, (i, j) in enumerate(zip(rows, columns, strict=True)):
        out[i][j] = {"value": float(k * found.value[x]), "low": float(k * found.low[x]), "high": float(k * found.high[x])}
    return out
