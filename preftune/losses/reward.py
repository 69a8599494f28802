"""Losses of a reward model: `policy` of a Side is the score r of a response, in logits of preference. Touches torch only.

P(w preferred) = sigmoid(r_w - r_l), so that only differences within a prompt are ever seen. `score` is what the data itself says of a
response. Pairs, verdicts and rankings as in the other files; `grades` are single responses with a score of the data, `classes` with the
number of a class in its place. Losses of the other files that read nothing but differences of a log-ratio stand on scores too
(`Loss.scalar`), with beta 1.

Every docstring works three numbers on `WORKED`. Try it: `pytest preftune/losses/reward.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .lists import Rankings
from .pairs import Side, _row


def _scores(given: Tensor, score: Tensor | None = None) -> Side:
    return Side(policy=given, reference=None, length=torch.ones_like(given), score=score)


WORKED = {
    "pairs": (_scores(_row(1, 0, -2), _row(3, 2, 1)), _scores(_row(-1, 1, 1), _row(1, 2, 2))),
    "lists": (_scores(_row(4, 2, 1, 2, 1, 4, 1, 2, 4).log()), Rankings(torch.arange(9) // 3, torch.tensor([0, 1, 2, 0, 0, 1, 0, -1, -1]))),
    "verdicts": (_scores(_row(1, -1, 0)), torch.tensor([True, False, True]), torch.tensor(0.0, dtype=torch.float64)),
    "grades": (_scores(_row(1, -1, 0), _row(1, 0.25, 0.5)),),
    "classes": (replace(_scores(_row(0, 0, 0), _row(2, 0, 1)), classes=torch.stack([_row(1, 1, 2), _row(3, 1, 1), _row(1, 1, 1)]).log()),),
}
"""For hand work. Pairs: r_w - r_l = 2, -1, -3, r_w + r_l = 0, 1, -1; the data's scores differ by 2, 0, -1. Lists as in `lists.WORKED`,
p = e^r: 4 > 2 > 1; 2 and 1 tied, both > 4; 1 > {2, 4}, which are unordered. r = 1, -1, 0, judged good, bad, good, or graded 1, .25, .5. Of
three classes the odds are 1:1:2, 3:1:1, 1:1:1; it was the last, the first, the second."""


def bradley_terry(chosen: Side, rejected: Side, *, margin: float = 0.0) -> Tensor:
    """Bradley-Terry: -ls(r_w - r_l - margin).  Bradley and Terry 1952; for language models arXiv:2009.01325.

    r_w - r_l = 2, -1, -3: log(1 + e^-2) = .126928; log(1 + e) = 1.313262; log(1 + e^3) = 3.048587.

    >>> bradley_terry(*WORKED["pairs"])
    tensor([0.1269, 1.3133, 3.0486], dtype=torch.float64)
    """
    return -F.logsigmoid(chosen.policy - rejected.policy - margin)


def bradley_terry_margin(chosen: Side, rejected: Side, *, scale: float = 1.0) -> Tensor:
    """Bradley-Terry with the data's own margin: -ls(r_w - r_l - scale (s_w - s_l)), s the scores of the data.  arXiv:2307.09288, Eq. 2.

    2 - 2, -1 - 0, -3 + 1: ln 2; log(1 + e) = 1.313262; log(1 + e^2) = 2.126928.

    >>> bradley_terry_margin(*WORKED["pairs"])
    tensor([0.6931, 1.3133, 2.1269], dtype=torch.float64)
    """
    assert chosen.score is not None and rejected.score is not None
    return -F.logsigmoid(chosen.policy - rejected.policy - scale * (chosen.score - rejected.score))


def centre(chosen: Side, rejected: Side) -> Tensor:
    """Centring: (r_w + r_l)^2, a term that fixes the level which no comparison sees.  arXiv:2312.09244; TRL's centre coefficient.

    0^2, 1^2, (-1)^2. Written beside another loss: --loss bradley-terry+0.01*centre.

    >>> centre(*WORKED["pairs"])
    tensor([0., 1., 1.], dtype=torch.float64)
    """
    return (chosen.policy + rejected.policy) ** 2


def _compared(side: Side, rankings: Rankings, win: Callable[[Tensor], Tensor], tie: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over the pairs of each list of win(r_i - r_j) where i stands above j, of tie(r_i - r_j) where they share a tier. (L,)"""
    other, there = rankings.others()
    level = rankings.level
    items, places = torch.nonzero(there & (level[:, None] < level[other]), as_tuple=True)
    later = other > torch.arange(len(other), device=other.device)[:, None]
    tied, beside = torch.nonzero(there & later & (level[:, None] == level[other]) & (rankings.tier >= 0)[:, None], as_tuple=True)
    score = side.policy
    return rankings.sums(win(score[items] - score[other[items, places]]), items) + rankings.sums(
        tie(score[tied] - score[other[tied, beside]]), tied
    )


def davidson(side: Side, rankings: Rankings, *, nu: float = 1.0) -> Tensor:
    """Davidson: P(i > j) = p_i/d, P(tie) = nu sqrt(p_i p_j)/d, d = p_i + p_j + nu sqrt(p_i p_j), p = e^r.  Davidson 1970.

    A list of K is taken pair by pair, which counts its pairs as if they were independent. Equals tie with chance nu/(2 + nu).
    (4, 2): d = 6 + sqrt 8, (4, 1): 7, (2, 1): 3 + sqrt 2: log 8.828427/4 + log 7/4 + log 4.414214/2 = 2.142981;
    log 4.414214/sqrt 2 + log 8.828427/2 + log 7 = 4.568996; log 4.414214 + log 7.

    >>> davidson(*WORKED["lists"])
    tensor([2.1430, 4.5690, 3.4307], dtype=torch.float64)
    """

    def whole(gap: Tensor) -> Tensor:
        return torch.stack([gap / 2, -gap / 2, torch.full_like(gap, math.log(nu))]).logsumexp(0)

    return _compared(side, rankings, lambda gap: whole(gap) - gap / 2, lambda gap: whole(gap) - math.log(nu))


def rao_kupper(side: Side, rankings: Rankings, *, theta: float = 2.0) -> Tensor:
    """Rao-Kupper: P(i > j) = p_i/(p_i + theta p_j), what is left is a tie; p = e^r, theta > 1.  Rao and Kupper 1967.

    P(tie) = (1 - theta^-2) sigmoid(c - d) sigmoid(c + d), c = log theta, d = r_i - r_j. A list of K is taken pair by pair. Equals tie with
    chance (theta - 1)/(theta + 1).
    4/8, 4/6, 2/4: log 6; 6/20, 2/10, 1/9: log 150; 1/5, 1/9: log 45.

    >>> rao_kupper(*WORKED["lists"])
    tensor([1.7918, 5.0106, 3.8067], dtype=torch.float64)
    """
    wide = math.log(theta)

    def tie(gap: Tensor) -> Tensor:
        return -math.log(1 - theta**-2) - F.logsigmoid(wide - gap) - F.logsigmoid(wide + gap)

    return _compared(side, rankings, lambda gap: -F.logsigmoid(gap - wide), tie)


def binary(side: Side, desirable: Tensor, baseline: Tensor) -> Tensor:
    """Binary cross-entropy: -ls(r) where the response is good, -ls(-r) where it is not: P(good) = sigmoid(r).  arXiv:2110.14168.

    Each response by itself: the level of r means something, and prompts can be told apart. r = 1, -1, 0, good, bad, good:
    log(1 + e^-1) = .313262, twice; ln 2.

    >>> binary(*WORKED["verdicts"])
    tensor([0.3133, 0.3133, 0.6931], dtype=torch.float64)
    """
    return -F.logsigmoid(torch.where(desirable, side.policy, -side.policy))


def grades(side: Side, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Grades: -t ls(r) - (1 - t) ls(-r), t = (s - low)/(high - low): grades are counts of successes, P = sigmoid(r) each.  McCullagh 1980.

    Up to a constant and a factor the likelihood of a binomial count of high - low trials; probabilities with low 0 and high 1.
    -ls(r) + (1 - t) r = .313262 + 0; 1.313262 - .75; ln 2.

    >>> grades(*WORKED["grades"])
    tensor([0.3133, 0.5633, 0.6931], dtype=torch.float64)
    """
    assert side.score is not None
    share = (side.score - low) / (high - low)
    return -share * F.logsigmoid(side.policy) - (1 - share) * F.logsigmoid(-side.policy)


def square(side: Side) -> Tensor:
    """Square: (r - s)^2, s the score of the data: the reward is the mean score.  arXiv:2406.08673 (HelpSteer2).

    0^2, (-1.25)^2, (-.5)^2.

    >>> square(*WORKED["grades"])
    tensor([0.0000, 1.5625, 0.2500], dtype=torch.float64)
    """
    assert side.score is not None
    return (side.policy - side.score) ** 2


def nominal(side: Side) -> Tensor:
    """Classes without an order: -log softmax(z)[c], z a head's outputs, one a class, c the class that the data names.  McFadden 1974.

    P(class) = softmax(z). The reward r = z_C - log sum of the other e^z is the log-odds of the last class, the wanted one: with two classes
    and z = (0, r) this is `binary`. e^z = (1, 1, 2), (3, 1, 1), (1, 1, 1), classes 2, 0, 1 (`score` is the number): log 2; log 5/3; log 3.

    >>> nominal(*WORKED["classes"])
    tensor([0.6931, 0.5108, 1.0986], dtype=torch.float64)
    """
    assert side.score is not None and side.classes is not None
    return F.cross_entropy(side.classes, side.score.long(), reduction="none")
