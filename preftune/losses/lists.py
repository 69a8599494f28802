"""Losses over rankings: `f(side, rankings, *, ...) -> (L,)`, one value a list, minimised. Touches torch only.

A list is one judgement of two or more responses of a prompt: tiers, best first, equal inside a tier, and perhaps some `below`, worse
than all of them and unordered. s = beta a is the score of a response, a = log pi - log ref summed over its tokens; A_t is tier t with all
that is worse. Labels are hard; a judgement with a probability stands as votes for it and for the reverse (`records.rankings`).

Every docstring works three numbers on the three lists of `WORKED`. Try it: `pytest preftune/losses/lists.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Side, _row

UNORDERED = 2**31 - 1  # the level of `below`: worse than any tier
NEVER = -1e30  # a log-probability of nothing; minus infinity would give gradients that are not numbers


@dataclass(frozen=True)
class Rankings:
    """L lists over I items; the items of a list stand together, in any order.

    Args:
        row: (I,) int64, the list of each item, 0..L-1, none left out. tier: (I,) int64, 0 the best; -1 for `below`.
    """

    row: Tensor
    tier: Tensor

    @property
    def level(self) -> Tensor:
        """(I,) the tier, `below` last: smaller is better."""
        return torch.where(self.tier < 0, UNORDERED, self.tier)

    def others(self) -> tuple[Tensor, Tensor]:
        """Items of each item's own list: (I, K) which, (I, K) whether that place holds one and another than itself."""
        count = torch.bincount(self.row)
        place = torch.arange(max([1, *count.tolist()]), device=self.row.device)
        item = (count.cumsum(0) - count)[self.row][:, None] + place
        itself = torch.arange(len(self.row), device=self.row.device)[:, None]
        return item.clamp(max=max(0, len(self.row) - 1)), (place < count[self.row][:, None]) & (item != itself)

    def shapes(self) -> list[tuple[tuple[int, ...], int]]:
        """Of each list the sizes of its tiers, best first, and how many are below."""
        tiers: list[list[int]] = [[] for _ in torch.bincount(self.row)]
        for row, tier in zip(self.row.tolist(), self.tier.tolist(), strict=True):
            tiers[row].append(tier)
        return [(tuple(mine.count(t) for t in range(max(mine) + 1)), mine.count(-1)) for mine in tiers]

    def sums(self, values: Tensor, items: Tensor) -> Tensor:
        """Values that stand for `items`, summed by list: (L,)."""
        return values.new_zeros(len(torch.bincount(self.row))).index_add(0, self.row[items], values)


def _strengths(*strengths: float) -> Side:
    ratio = 10 * _row(*strengths).log()
    return Side(policy=-20 + ratio, reference=torch.full_like(ratio, -20), length=torch.full_like(ratio, 9))


WORKED = (
    _strengths(4, 2, 1, 2, 1, 4, 1, 2, 4),
    Rankings(torch.arange(9) // 3, torch.tensor([0, 1, 2, 0, 0, 1, 0, -1, -1])),
)
"""Three lists of three for hand work. p = exp(a/10) = 4 > 2 > 1; 2 and 1 tied, both > 4; 1 > {2, 4}, which are unordered."""


def _stages(side: Side, rankings: Rankings, beta: float, share: Tensor) -> Tensor:
    """Sum over ranked items i of log of (what comes after i + share_i times its tier, itself included) / p_i. (L,)

    Written as differences of scores, so that a list of two is DPO to the last bit. share: (I,), of items in tiers.
    """
    other, there = rankings.others()
    level = rankings.level
    after = there & (level[other] >= level[:, None])
    (items,) = torch.nonzero((rankings.tier >= 0) & after.any(1), as_tuple=True)
    other, after = other[items], after[items]
    own = share[items].log()
    tied = level[other] == level[items][:, None]
    ahead = beta * (side.ratio[other] - side.ratio[items][:, None]) + torch.where(tied, own[:, None], 0.0)
    rest = ahead.masked_fill(~after, -math.inf).logsumexp(1)
    return rankings.sums(own - F.logsigmoid(own - rest), items)


def plackett_luce(side: Side, rankings: Rankings, *, beta: float = 0.1) -> Tensor:
    """Plackett-Luce: -sum_t log of the chance that tier t is taken from A_t; ties by Efron's form.  arXiv:2305.18290, appendix A.3.

    -log prod_i exp(s_i) / sum of exp(s) over i and all after it. A tier S of d equals: the denominators are
    sum_A - (l/d) sum_S, l = 0..d-1 (Efron 1977). `below` stands in the denominators only: the sum over all orders of it.
    (7/4)(3/2) = 21/8; 7 (7 - 3/2)/(2 * 1) = 77/4; 7/1.

    >>> plackett_luce(*WORKED)
    tensor([0.9651, 2.9575, 1.9459], dtype=torch.float64)
    """
    other, there = rankings.others()
    tied = there & (rankings.level[other] == rankings.level[:, None])
    earlier = tied & (other < torch.arange(len(other), device=other.device)[:, None])
    return _stages(side, rankings, beta, 1 - earlier.sum(1) / (1 + tied.sum(1)).to(side.policy))


def plackett_luce_breslow(side: Side, rankings: Rankings, *, beta: float = 0.1) -> Tensor:
    """Plackett-Luce with ties by Breslow's form: each of a tier's d equals is taken from all of A_t.  Breslow 1974.

    Quicker to explain than Efron's, and further from the likelihood of unknown orders. Without ties the same.
    21/8; 7 * 7/(2 * 1); 7.

    >>> plackett_luce_breslow(*WORKED)
    tensor([0.9651, 3.1987, 1.9459], dtype=torch.float64)
    """
    return _stages(side, rankings, beta, torch.ones_like(side.policy))


def plackett_luce_davidson(side: Side, rankings: Rankings, *, beta: float = 0.1, nu: float = 1.0) -> Tensor:
    """Davidson-Luce: P(tier S of A) ~ nu^(d-1) (prod_S exp(s))^(1/d), d = |S|, among all sets of A.  arXiv:1810.12068.

    Ties are outcomes of their own, so the chances of all weak orders sum to one; for two it is Davidson's model (1970): a tie of equals has
    chance nu/(2 + nu), and nu -> 0 is Plackett-Luce. The sum over sets is one over elementary symmetric polynomials.
    T = 7 + (2 + 3 sqrt 2) + 2 = 15.242641: T/4 (3 + sqrt 2)/2; T/sqrt 2; T.

    >>> plackett_luce_davidson(*WORKED)
    tensor([2.1295, 2.3775, 2.7241], dtype=torch.float64)
    """
    order = torch.argsort(rankings.level, stable=True)
    order = order[torch.argsort(rankings.row[order], stable=True)]  # by list, best first
    row, tier, score = rankings.row[order], rankings.tier[order], beta * side.ratio[order]
    count = torch.bincount(row)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    lists, longest = len(count), max([1, *count.tolist()])
    grid = torch.full((lists, longest), NEVER, dtype=score.dtype, device=score.device).index_put((row, place), score)
    size = torch.arange(1, longest + 1, device=row.device, dtype=score.dtype)
    # poly[:, d-1, k]: log of the k-th elementary symmetric polynomial of exp(s/d) over the items from this place to the last.
    poly = torch.full((lists, longest, longest + 1), NEVER, dtype=score.dtype, device=score.device)
    poly[:, :, 0] = 0
    totals = []
    for k in reversed(range(longest)):
        one_more = poly[:, :, :-1] + (grid[:, k, None] / size)[:, :, None]
        poly = torch.cat([poly[:, :, :1], torch.logaddexp(poly[:, :, 1:], one_more)], 2)
        totals.append((poly[:, :, 1:].diagonal(dim1=1, dim2=2) + (size - 1) * math.log(nu)).logsumexp(1))
    total = torch.stack(totals[::-1], 1)
    ranked = tier >= 0
    first = ranked & ((place == 0) | (tier != tier.roll(1)))
    group = first.cumsum(0)
    tied = torch.zeros_like(score).index_add(0, group[ranked] - 1, torch.ones_like(score[ranked]))[group - 1]
    each = torch.where(first, total[row, place], 0.0) - (score + (tied - 1) * math.log(nu)) / tied
    (items,) = torch.nonzero(ranked, as_tuple=True)
    return Rankings(row, tier).sums(each[items], items)


def lipo(side: Side, rankings: Rankings, *, beta: float = 0.05) -> Tensor:
    """LiPO-lambda: sum over i better than j of |G_i - G_j| |1/D_i - 1/D_j| (-ls(s_i - s_j)).  arXiv:2402.01878.

    G = 2^psi - 1, psi the share of the list's other responses that i beats, a tie half: the data have tiers where the paper has scores.
    D = log(1 + rank), rank by the model's own s, best 1; equal scores rank as the data say. Ranks carry no gradient.
    p = 2, 1.414, 1 at beta .05, ranks 1, 2, 3: .585786 * .532456 ln 1.7071 + .721348 ln 1.5 + .414214 * .188891 ln 1.7071 = .501132;
    psi = .75, .75, 0 and ranks 2, 3, 1: .681793 (.532456 ln 2.4142 + .721348 ln 3);
    psi = 1, .25, .25 and ranks 3, 2, 1: .810793 (.188891 ln 2.4142 + .721348 ln 3).

    >>> lipo(*WORKED)
    tensor([0.5011, 0.8603, 0.7775], dtype=torch.float64)
    """
    other, there = rankings.others()
    level, score = rankings.level, side.ratio
    better, equal = there & (level[:, None] < level[other]), there & (level[:, None] == level[other])
    psi = (better.sum(1) + 0.5 * equal.sum(1)).to(score.dtype) / there.sum(1)
    above, same = there & (score[other] > score[:, None]), there & (score[other] == score[:, None])
    rank = 1 + (above | (same & ~better & ~equal)).sum(1) + 0.5 * (same & equal).sum(1)
    gain, discount = 2**psi - 1, 1 / (1 + rank).to(score.dtype).log()
    weight = (gain[:, None] - gain[other]).abs() * (discount[:, None] - discount[other]).abs()
    items, places = torch.nonzero(better, as_tuple=True)
    margin = beta * (side.ratio[items] - side.ratio[other[items, places]])
    return rankings.sums(-weight[items, places] * F.logsigmoid(margin), items)


def s_dpo(side: Side, rankings: Rankings, *, beta: float = 0.1) -> Tensor:
    """S-DPO: -ls(-log sum_l exp(s_l - s_w)): the best against all others at once, whose own order is not read.  arXiv:2406.09215.

    The first factor of Plackett-Luce. Of several that are best, each is one w against all that are worse.
    1 + 3/4; (1 + 4/2)(1 + 4/1); 1 + 6/1.

    >>> s_dpo(*WORKED)
    tensor([0.5596, 2.7081, 1.9459], dtype=torch.float64)
    """
    other, there = rankings.others()
    worse = there & (rankings.level[other] > rankings.level[:, None])
    (items,) = torch.nonzero((rankings.tier == 0) & worse.any(1), as_tuple=True)
    ahead = beta * (side.ratio[other[items]] - side.ratio[items][:, None])
    return rankings.sums(-F.logsigmoid(-ahead.masked_fill(~worse[items], -math.inf).logsumexp(1)), items)


def agreement(score: Tensor, rankings: Rankings) -> tuple[Tensor, Tensor]:
    """Kendall's tau of scores and tiers, and whether every comparison comes out right: float64, one each a list that compares any.

    tau = (pairs in order - pairs the other way round)/(pairs of different tiers); equal scores are neither.

    >>> agreement(_row(3, 2, 1, 1, 1, 1, 2, 1, 3), WORKED[1])
    (tensor([1., 0., 0.], dtype=torch.float64), tensor([1., 0., 0.], dtype=torch.float64))
    """
    other, there = rankings.others()
    items, places = torch.nonzero(there & (rankings.level[:, None] < rankings.level[other]), as_tuple=True)
    sign = (score[items] - score[other[items, places]]).sign().double()
    count, balance = rankings.sums(torch.ones_like(sign), items), rankings.sums(sign, items)
    tau = balance[count > 0] / count[count > 0]
    return tau, (tau == 1).double()
