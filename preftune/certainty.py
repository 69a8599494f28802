"""How sure a number is: intervals where observations share a prompt, paired tests, calibration, win rates at equal length.

Arrays in, numbers out: numpy and scipy only, no model, no file. Answers to one prompt depend on each other, so every function that can
takes `cluster`, one number an observation; observations of one cluster count as one source of chance.

    >>> [round(x, 4) for x in wilson(0.8, 50)]
    [0.6696, 0.8876]
    >>> sign_test(9, 1)
    0.021484375
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, expit, ndtri, stdtr, stdtrit

Z95 = 1.959963984540054
DRAWS = 2000  # of a bootstrap: its 95% ends then move by a twentieth of their standard error from seed to seed
POWER = 0.8  # the chance of telling, where it is asked how many prompts would be needed
BINS = 10
STEPS, FLAT = 100, 1e-12  # Newton


# ---- means and shares ------------------------------------------------------------------------------------------------------


def wilson(share: float, count: float) -> tuple[float, float]:
    """95% interval of a share of `count` independent observations (Wilson 1927). `count` may be a fraction: an effective number."""
    middle, spread = share + Z95**2 / (2 * count), Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return (middle - spread) / scale, (middle + spread) / scale


def mean_of(values: np.ndarray, cluster: np.ndarray) -> tuple[float, float | None]:
    """Mean and its standard error where values of one cluster depend on each other: (N,) values, (N,) cluster numbers."""
    if not len(values):
        return 0.0, None
    mean = float(values.mean())
    number = np.unique(cluster, return_inverse=True)[1]
    rest = np.bincount(number, values - mean)
    if len(rest) < 2:
        return mean, None
    return mean, float(np.sqrt((rest**2).sum() * len(rest) / (len(rest) - 1))) / len(values)


def ratio_of(above: np.ndarray, below: np.ndarray, cluster: np.ndarray) -> tuple[float, float | None]:
    """sum(above) / sum(below) and its standard error by the delta method: (N,), (N,) positive, (N,) cluster numbers."""
    ratio = float(above.sum() / below.sum())
    error = mean_of(above - ratio * below, cluster)[1]
    return ratio, None if error is None else error / float(below.mean())


def share_of(hits: np.ndarray, cluster: np.ndarray) -> tuple[float, float | None, float | None]:
    """A share with its 95% Wilson interval, at the number of independent observations that the clustered error stands for.

    Where clusters hold several observations the error is widened by t / z at clusters - 1 degrees of freedom: without it 5 prompts of 4
    observations cover 87%, with it 96%.

    Args:
        hits: (N,) from 0 to 1; a half is a tie. cluster: (N,).
    """
    share, error = mean_of(hits.astype(float), cluster)
    if error is None:
        return share, None, None
    clusters = len(np.unique(cluster))
    error *= float(stdtrit(clusters - 1, 0.975)) / Z95 if clusters < len(hits) else 1.0
    count = share * (1 - share) / error**2 if error > 0 else float(clusters)
    return share, *wilson(share, count)


def interval_of(values: np.ndarray, cluster: np.ndarray) -> tuple[float, float | None, float | None]:
    """A mean with its 95% interval by Student's t at clusters - 1 degrees of freedom; None, None for a single cluster."""
    mean, error = mean_of(values, cluster)
    if error is None:
        return mean, None, None
    half = float(stdtrit(len(np.unique(cluster)) - 1, 0.975)) * error
    return mean, mean - half, mean + half


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, *, seed: int = 0,
              draws: int = DRAWS) -> tuple[float, float]:  # fmt: skip
    """95% interval of a statistic of sums over clusters, by drawing clusters with replacement (percentiles).

    Args:
        statistic: (draws, C) sums -> (draws,). sums: (G, C), what each of G clusters contributes.
    """
    chance, groups, found = np.random.default_rng(seed), len(sums), []
    size = max(1, (1 << 22) // max(1, groups))
    for first in range(0, draws, size):
        times = chance.multinomial(groups, np.full(groups, 1 / groups), size=min(size, draws - first))
        found.append(statistic(times @ sums))
    low, high = np.nanquantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def sums_of(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """(N, C) values -> (G, C) sums over each cluster."""
    number = np.unique(cluster, return_inverse=True)[1]
    return np.stack([np.bincount(number, column) for column in values.T], axis=1)


def bootstrap_mean(values: np.ndarray, cluster: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """95% interval of the mean of (N,) values by drawing whole clusters: with sizes that differ, sums and counts are drawn together."""
    sums = sums_of(np.stack([values.astype(float), np.ones(len(values))], axis=1), cluster)
    return bootstrap(lambda drawn: drawn[:, 0] / drawn[:, 1], sums, seed=seed, draws=draws)


# ---- tests -----------------------------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of wins and losses by chance alone, ties left out. On pairs of right and wrong answers to the same questions
    this is McNemar's exact test."""
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def signs(differences: np.ndarray, cluster: np.ndarray) -> tuple[int, int]:
    """How many clusters are better, and how many worse, by the sign of the sum of their differences: what a sign test may count."""
    sums = sums_of(differences[:, None].astype(float), cluster)[:, 0]
    return int((sums > 1e-12).sum()), int((sums < -1e-12).sum())


def paired_t(differences: np.ndarray, cluster: np.ndarray) -> float | None:
    """Two-sided p of a mean difference of zero, the clusters as units; None where there are fewer than two, or nothing varies."""
    mean, error = mean_of(differences, cluster)
    if not error:
        return None
    return float(2 * stdtr(len(np.unique(cluster)) - 1, -abs(mean) / error))


def prompts_needed(effect: float, error: float, clusters: int) -> int | None:
    """How many prompts would tell an effect of this size from none (95% two-sided, four times in five).

    Args:
        effect: the difference, of any unit. error: its standard error at `clusters` prompts. None for no effect or no error.
    """
    if not effect or not error:
        return None
    return math.ceil(clusters * ((Z95 + float(ndtri(POWER))) * error / effect) ** 2)


# ---- calibration -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Predictions from `least` to `most`: how many, their mean, the share that came true with its interval (None: one prompt)."""

    least: float
    most: float
    count: int
    said: float
    came: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Calibration:
    """Whether sigmoid(margin) means what it says.

    Args:
        bins: of the confidence max(p, 1 - p), from 0.5 to 1; empty ones left out.
        ece: mean of |said - came| over bins, weighted by count. low, high: bootstrap by cluster; its percentiles lie above the truth
            where bins are small, so compare with `chance`: the mean ECE of this many predictions that are right about themselves.
        slope: b of P(chosen preferred) = sigmoid(b margin) by maximum likelihood: 1 is calibrated, below 1 too sure of itself; None where
            every margin has the right sign (no finite one) or all are 0. slope_low, slope_high: 95%, sandwich by cluster.
    """

    bins: tuple[Bin, ...]
    ece: float
    low: float | None
    high: float | None
    chance: float
    slope: float | None
    slope_low: float | None
    slope_high: float | None


def _ece(drawn: np.ndarray) -> np.ndarray:
    """(draws, 3 * B) sums of counts, said, came per bin -> (draws,)."""
    count, said, came = np.split(drawn, 3, axis=1)
    return np.abs(said - came).sum(1) / count.sum(1)


def calibration(margin: np.ndarray, label: np.ndarray, cluster: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> Calibration:
    """Reliability of sigmoid(margin) as the probability that the chosen answer is preferred.

    Args:
        margin: (N,) log-odds. label: (N,) what people said, 0 to 1: 1 where they chose the chosen one; soft labels as they are.
        cluster: (N,). Which of two answers is called chosen does not matter: (m, y) and (-m, 1-y) count the same.
    """
    sure, came = expit(np.abs(margin)), np.where(margin >= 0, label, 1 - label).astype(float)
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    width, rows = 0.5 / BINS, []
    for b in np.unique(place):
        mine = place == b
        share, low, high = share_of(came[mine], cluster[mine])
        rows.append(Bin(0.5 + b * width, 0.5 + (b + 1) * width, int(mine.sum()), float(sure[mine].mean()), share, low, high))
    one_hot = np.eye(BINS)[place]
    sums = sums_of(np.concatenate([one_hot, one_hot * sure[:, None], one_hot * came[:, None]], axis=1), cluster)
    low, high = bootstrap(_ece, sums, seed=seed, draws=draws) if len(sums) > 1 else (None, None)
    chance = np.random.default_rng([seed, 1]).random((200, len(sure))) < sure
    perfect = np.abs((chance - sure) @ one_hot).sum(1) / len(sure)
    return Calibration(tuple(rows), float(_ece(sums.sum(0, keepdims=True))[0]), low, high, float(perfect.mean()),
                       *_slope(margin, label.astype(float), cluster))  # fmt: skip


def _slope(margin: np.ndarray, label: np.ndarray, cluster: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """b of sigmoid(b margin) and its 95% interval; None where there is no finite one."""
    fit = logistic(margin[:, None], label, cluster)
    if fit is None:
        return None, None, None
    value, covariance = fit
    half = Z95 * math.sqrt(covariance[0, 0]) if len(np.unique(cluster)) > 1 else None
    return float(value[0]), None if half is None else float(value[0] - half), None if half is None else float(value[0] + half)


def logistic(columns: np.ndarray, label: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Maximum likelihood of P(label) = sigmoid(columns @ value) by Newton with halving, and the sandwich covariance by cluster.

    Args:
        columns: (N, C). label: (N,) 0 to 1; a half is half a win each way.

    Returns:
        (C,) and (C, C); None where no finite maximum exists: the columns are dependent, or separate the labels.
    """
    value = np.zeros(columns.shape[1])

    def loss(at: np.ndarray) -> float:
        score = columns @ at
        return float((np.logaddexp(0, score) - label * score).sum())

    for _ in range(STEPS):
        chance = expit(columns @ value)
        gradient = columns.T @ (label - chance)
        curve = (columns * (chance * (1 - chance))[:, None]).T @ columns
        if not np.isfinite(curve).all() or np.linalg.cond(curve) > 1 / FLAT:
            return None
        step, size = np.linalg.solve(curve, gradient), 1.0
        while loss(value + size * step) > loss(value) + FLAT and size > FLAT:
            size /= 2
        value = value + size * step
        if np.abs(columns @ step).max() < 1e-10:
            break
    else:
        return None
    sums = sums_of(columns * (label - expit(columns @ value))[:, None], cluster)
    middle = sums.T @ sums * len(sums) / max(1, len(sums) - 1)
    inverse = np.linalg.inv(curve)
    return value, inverse @ middle @ inverse


# ---- a win rate at equal length --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtEqualLength:
    """P(A wins) if both answers had one length, under logit P = theta + gamma tanh(d / s), d = length of A - length of B.

    Args:
        rate, low, high: sigmoid(theta) and its 95% interval (sandwich by cluster). gamma: log-odds for being much longer.
        scale: s, the root mean square of d; stored, never fitted again. longer: share of comparisons in which A is the longer one.
        inside: whether both signs of d are common enough (5% each) that equal length lies inside the data.
    """

    rate: float
    low: float
    high: float
    gamma: float
    scale: float
    longer: float
    inside: bool


def at_equal_length(wins: np.ndarray, gap: np.ndarray, cluster: np.ndarray) -> AtEqualLength | None:
    """The length-controlled win rate; None where the data do not determine it (one length, one cluster, or a separation).

    d is divided by its root mean square and its mean is not taken out: a model that always writes longer answers must not have that
    difference put into theta. Exchanging A and B gives 1 - rate exactly.

    Args:
        wins: (N,) 1 where A won, 0.5 a tie, 0. gap: (N,) length of A - length of B, any unit. cluster: (N,).
    """
    scale = float(np.sqrt((gap.astype(float) ** 2).mean()))
    if not scale or len(np.unique(cluster)) < 2:
        return None
    fit = logistic(np.stack([np.ones(len(gap)), np.tanh(gap / scale)], axis=1), wins.astype(float), cluster)
    if fit is None:
        return None
    (theta, gamma), covariance = fit
    half = float(stdtrit(len(np.unique(cluster)) - 1, 0.975)) * math.sqrt(covariance[0, 0])
    longer = float((gap > 0).mean())
    inside = min(longer, float((gap < 0).mean())) >= 0.05
    return AtEqualLength(float(expit(theta)), float(expit(theta - half)), float(expit(theta + half)), float(gamma), scale, longer, inside)
