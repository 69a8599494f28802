"""Scores into preferences: who is paired with whom, what is accepted, which of many is the best, and what that does to a distribution.

Pure functions on the numbers of one prompt; numpy, no file and no model. Sources: Stiennon et al. 2020 (best-of-n), Liu et al. 2023
(arXiv:2309.06657: rejection sampling towards the optimum), Beirami et al. 2024 (arXiv:2401.01879), docs/rejection.md.

    >>> choose(np.array([0.1, 0.9, 0.5]), "best-worst")
    [(1, 0)]
    >>> tiers(np.array([0.5, 1.0, 0.5]))
    [[1], [0, 2]]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

Pairs = list[tuple[int, int]]

# Below so many expected acceptances a prompt, the largest of K samples is a poor stand-in for the largest reward there is: what is
# accepted is mostly each prompt's best (docs/rejection.md has the exact bias by K).
ENOUGH = 10


# --- judgements -----------------------------------------------------------------------------------------------------------------


def tiers(scores: np.ndarray) -> list[list[int]]:
    """Responses by score, best first; equal scores share a tier. (K,) -> indices."""
    return [np.flatnonzero(scores == level).tolist() for level in np.unique(scores)[::-1]]


def choose(scores: np.ndarray, how: str, *, margin: float = 0.0, limit: int | None = None,
           chance: np.random.Generator | None = None) -> Pairs:  # fmt: skip
    """(better, worse) pairs of one prompt's responses whose scores differ, by `margin` at least.

    Args:
        scores: (K,).
        how: 'best-worst', 'best-random' (the best against one drawn from those that `margin` leaves), 'all'.
        limit: of 'all', at most so many, drawn by lot. chance: where lots come from.

    Returns:
        no pair where the scores leave none. Of several best or worst the first stands for them.
    """
    if len(scores) < 2:
        return []
    best, worst = int(scores.argmax()), int(scores.argmin())

    def apart(a: int, b: int) -> bool:
        return bool(scores[a] > scores[b] and scores[a] - scores[b] >= margin)

    if how == "best-worst":
        return [(best, worst)] if apart(best, worst) else []
    if how == "best-random":
        others = [i for i in range(len(scores)) if apart(best, i)]
        return [(best, int(_lots(chance).choice(others)))] if others else []
    found = [(a, b) for a in range(len(scores)) for b in range(len(scores)) if apart(a, b)]
    if limit is not None and len(found) > limit:
        found = [found[i] for i in np.sort(_lots(chance).choice(len(found), limit, replace=False))]
    return found


def _lots(chance: np.random.Generator | None) -> np.random.Generator:
    assert chance is not None, "lots are drawn from a generator that the caller seeds"
    return chance


def soft(difference: float, scale: float) -> float:
    """P(better preferred) = sigmoid(difference / scale): Bradley-Terry, where scores / scale are log-abilities."""
    z = difference / scale
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def form(text: str) -> str:
    """What two nearly equal texts share: words and digits in lower case, without space and punctuation."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def repeats(texts: Sequence[str]) -> tuple[list[int], int, int]:
    """(the first of each kind of text, how many more are equal to an earlier one, how many more are nearly so)."""
    exact, kinds, first, equal, near = set[str](), set[str](), [], 0, 0
    for i, text in enumerate(texts):
        kind = form(text) or text
        if text in exact:
            equal += 1
        elif kind in kinds:
            near += 1
        else:
            first.append(i)
        exact.add(text)
        kinds.add(kind)
    return first, equal, near


# --- rejection sampling ---------------------------------------------------------------------------------------------------------


def accept(scores: np.ndarray, uniforms: np.ndarray, *, beta: float, ceiling: float) -> np.ndarray:
    """Which of the draws y_i ~ ref are kept as draws of pi* ~ ref exp(r/beta): u_i < exp((r_i - ceiling)/beta). (K,) bool.

    One pass: what was refused is never looked at again. Exact wherever no reward can exceed `ceiling`.
    """
    return uniforms < np.exp((scores - ceiling) / beta)


def acceptance(scores: np.ndarray, *, beta: float, ceiling: float) -> float:
    """Mean of exp((r_i - ceiling)/beta): an unbiased estimate of the rate Z exp(-ceiling/beta), without the noise of the lots."""
    return float(np.exp((scores - ceiling) / beta).mean())


# --- best of n ------------------------------------------------------------------------------------------------------------------


def best_of(scores: np.ndarray, n: int, chance: np.random.Generator) -> list[int]:
    """The best of each n consecutive responses, of equals one by lot; what does not fill a group is left out. (K,) -> K // n indices."""
    kept = []
    for a in range(0, len(scores) - n + 1, n):
        group = scores[a : a + n]
        kept.append(a + int(chance.choice(np.flatnonzero(group == group.max()))))
    return kept


def best_of_n_weights(size: int, n: int) -> np.ndarray:
    """(size,): weights C(i-1, n-1) / C(size, n) of scores in rising order, whose sum is an unbiased estimate of E[best of n].

    The chance that the i-th smallest of `size` is the largest of n drawn from them without return.
    """
    assert 1 <= n <= size, (n, size)
    return np.array([math.comb(i, n - 1) for i in range(size)], dtype=float) / math.comb(size, n)


def best_of_n_reward(scores: np.ndarray, n: int) -> float:
    """Unbiased estimate of the expected best of n from (K,) scores, K >= n."""
    return float(np.sort(scores) @ best_of_n_weights(len(scores), n))


# --- whom to ask ----------------------------------------------------------------------------------------------------------------


def doubts(scores: np.ndarray, members: np.ndarray | None = None) -> list[tuple[float, int, int]]:
    """(doubt, a, b) for every two responses, most doubtful first.

    Args:
        scores: (K,). members: (M, K) rewards that were put together.

    Returns:
        doubt is minus the difference of the scores, or, with members, the standard deviation of the members' differences: a constant
        that a member adds to all scores of a prompt does not count.
    """
    found = []
    for a in range(len(scores)):
        for b in range(a + 1, len(scores)):
            gap = 0.0 - abs(float(scores[a] - scores[b]))
            found.append((gap if members is None else float((members[:, a] - members[:, b]).std()), a, b))
    return sorted(found, key=lambda each: (-each[0], each[1], each[2]))
