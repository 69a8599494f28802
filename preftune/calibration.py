"""What held-out preferences say of a reward model: agreement beside the most that is possible, calibration, and where it is weak.

Pairs come as numbers: gap = r_chosen - r_rejected, prob = P(chosen preferred), weight = votes, record = what shares a prompt. Numpy only.

    told(Pairs(gap, prob, weight, first, second, record, length))["calibration"]["ece"]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .certainty import calibration, share_of

GROUPS = 20  # of a column that are told apart; the rest is one


@dataclass(frozen=True)
class Pairs:
    """P held-out pairs, all (P,).

    Args:
        gap: r_chosen - r_rejected. prob: P(chosen preferred). weight: votes. first, second: numbers of the two responses; equal numbers are
            one response. record: prompts. length: tokens of the chosen less those of the rejected.
    """

    gap: np.ndarray
    prob: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray
    record: np.ndarray
    length: np.ndarray

    @property
    def agreement(self) -> np.ndarray:
        """(P,) chance that a drawn label says what the scores say; equal scores: one half."""
        return np.where(self.gap > 0, self.prob, np.where(self.gap < 0, 1 - self.prob, 0.5))


def ceiling(pairs: Pairs, *, votes: bool = True) -> dict[str, Any] | None:
    """The most that agreement with these labels can be, whatever the model; None where nothing says how certain a label is.

    Where the data give probabilities: the mean of max(p, 1 - p). Where pairs were judged several times by hard labels: two judgements
    of a pair agree with chance A = E[p^2 + (1-p)^2], estimated without bias from pairs of two and more, and as |2p - 1| lies between its
    square and 1, A <= E max(p, 1-p) <= (1 + sqrt(2A - 1))/2; the upper end is reached where all pairs are equally hard.

    Args:
        votes: whether weights are counts of judgements. Whole numbers only are read as such.

    Returns:
        'low', 'high', 'pairs' that say it, 'from': 'probabilities' or 'repeated judgements'.
    """
    soft = (pairs.prob > 0) & (pairs.prob < 1)
    if soft.any():
        best = float(np.average(np.maximum(pairs.prob, 1 - pairs.prob), weights=pairs.weight))
        return {"low": best, "high": best, "pairs": len(pairs.prob), "from": "probabilities"}
    sides = np.sort(np.stack([pairs.first, pairs.second], 1), axis=1)
    _, number = np.unique(sides, axis=0, return_inverse=True)
    number = number.reshape(-1)
    up = (pairs.first == sides[:, 0]) == (pairs.prob == 1)
    count = pairs.weight if votes else np.ones(len(up))
    total, one = np.bincount(number, count), np.bincount(number, count * up)
    several = (total >= 2) & (np.bincount(number, count != np.round(count)) == 0)
    if not several.any():
        return None
    n, k = total[several], one[several]
    agree = float(np.mean((k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1))))
    return {"low": max(agree, 0.5), "high": (1 + math.sqrt(max(0.0, 2 * agree - 1))) / 2, "pairs": int(several.sum()),
            "from": "repeated judgements"}  # fmt: skip


def groups(agrees: np.ndarray, record: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement in each group of pairs with its 95% interval, the largest first; what comes after GROUPS of them is one group."""
    found, number, count = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    rows = []
    for place in range(min(len(order), GROUPS + 1)):
        rest = place == GROUPS
        mine = np.isin(number, order[place:] if rest else order[place])
        share, low, high = share_of(agrees[mine], record[mine])
        name = f"{len(order) - GROUPS} others" if rest else str(found[order[place]])
        rows.append({"group": name, "pairs": int(mine.sum()), "agreement": share, "low": low, "high": high})
    return rows


def by_length(pairs: Pairs) -> list[dict[str, Any]]:
    """Agreement in five parts of equal size by how much longer the chosen response is, from shorter to longer."""
    rows = []
    for mine in np.array_split(np.argsort(pairs.length, kind="stable"), min(5, len(pairs.length))):
        share, low, high = share_of(pairs.agreement[mine], pairs.record[mine])
        ends = f"{int(pairs.length[mine].min()):+d} to {int(pairs.length[mine].max()):+d} tokens"
        rows.append({"group": ends, "pairs": len(mine), "agreement": share, "low": low, "high": high})
    return rows


def told(pairs: Pairs, names: Sequence[str] | None = None, *, votes: bool = True) -> dict[str, Any]:
    """Everything at once: agreement with its interval, ceiling, calibration of sigmoid(gap), by length and, with names, by group."""
    share, low, high = share_of(pairs.agreement, pairs.record)
    return {"pairs": len(pairs.gap), "agreement": share, "low": low, "high": high, "ceiling": ceiling(pairs, votes=votes),
            "calibration": asdict(calibration(pairs.gap, pairs.prob, pairs.record)), "by_length": by_length(pairs),
            "by_group": groups(pairs.agreement, pairs.record, names) if names is not None else []}  # fmt: skip
