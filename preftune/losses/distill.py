"""Losses over pairs of scored responses: `f(one: Side, other: Side, *, ...) -> (B,)`, minimised: distilling a reward. Torch only.

r is the score of a response (`Side.score`) and d = (r_1 - r_2)/unit the gap that the reward model sees, in logits; m = beta (a_1 - a_2) is
the policy's own. Nobody is chosen: every loss is the same for (1, 2) and (2, 1). The optimum of all but the last is m = d, which on
pairs that link all responses is pi* = ref exp(r/(unit beta))/Z.

Every docstring works three numbers on the three pairs of `WORKED`. Try it: `pytest preftune/losses/distill.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pairs
from .pairs import Side, _row

WORKED = (
    replace(pairs.WORKED[0], score=_row(1, 0, 2), member=torch.stack([_row(1, 3), _row(0, 0), _row(2, -1)])),
    replace(pairs.WORKED[1], score=_row(0, 1, 2), member=torch.stack([_row(0, 0), _row(1, -1), _row(3, 2)])),
)
"""The pairs of `pairs.WORKED`, D = 2, 0, -3, with scores: d = 1, -1, 0; an ensemble of two says (1, 3), (-1, 1), (-1, -3)."""


def _gap(one: Side, other: Side, unit: float) -> Tensor:
    assert one.score is not None and other.score is not None, "this loss declares needs=('score',)"
    return (one.score - other.score) / unit


def _margin(one: Side, other: Side, beta: float) -> Tensor:
    return beta * (one.ratio - other.ratio)


def soft(one: Side, other: Side, *, beta: float = 0.1, unit: float = 1.0) -> Tensor:
    """Win-probability cross-entropy: -s ls(m) - (1-s) ls(-m), s = sigmoid(d).  arXiv:2406.11704 (`rpo_bwd_kl` and a constant).

    s = 1 is DPO and s = 1 - e is cDPO to the last bit. -ls(m) + (1-s) m with m = .2, 0, -.3 and s = .731059, .268941, .5:
    .598139 + .268941 * .2; ln 2; .854355 - .5 * .3.

    >>> soft(*WORKED)
    tensor([0.6519, 0.6931, 0.7044], dtype=torch.float64)
    """
    share = torch.sigmoid(_gap(one, other, unit))
    return share * pairs.sigmoid(one, other, beta=beta) + (1 - share) * pairs.sigmoid(other, one, beta=beta)


def soft_square(one: Side, other: Side, *, beta: float = 0.1, unit: float = 1.0) -> Tensor:
    """Square distillation: (d - m)^2.  arXiv:2405.19316 (d-DPO); `rpo_sq` of arXiv:2406.11704.

    Never flat, and so ruled by outliers and by the scale of the reward. (1 - .2)^2; (-1)^2; .3^2.

    >>> soft_square(*WORKED)
    tensor([0.6400, 1.0000, 0.0900], dtype=torch.float64)
    """
    return (_gap(one, other, unit) - _margin(one, other, beta)) ** 2


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL((s, 1-s)||(t, 1-t)) of s = sigmoid(p) and t = sigmoid(q): sums to (p - q) s + log of the two odds."""
    return torch.sigmoid(p) * (p - q) + F.softplus(q) - F.softplus(p)


def soft_kl(one: Side, other: Side, *, beta: float = 0.1, unit: float = 1.0) -> Tensor:
    """KL of the reward model's win probability to the policy's: KL((s, 1-s)||(q, 1-q)), q = sigmoid(m).  arXiv:2406.11704 (`rpo_bwd_kl`).

    `soft` less the entropy of s, so that zero is the end: the same gradients. The entropy of sigmoid(1) is .582203:
    .651927 - .582203; .693147 - .582203; .704355 - .693147.

    >>> soft_kl(*WORKED)
    tensor([0.0697, 0.1109, 0.0112], dtype=torch.float64)
    """
    return _bernoulli_kl(_gap(one, other, unit), _margin(one, other, beta))


def soft_reverse_kl(one: Side, other: Side, *, beta: float = 0.1, unit: float = 1.0) -> Tensor:
    """KL of the policy's win probability to the reward model's: KL((q, 1-q)||(s, 1-s)), q = sigmoid(m).  arXiv:2406.11704 (`rpo_fwd_kl`).

    Not convex in m, flat where q is sure. q (m - d) + log(1 + e^d) - log(1 + e^m), q = .549834, .5, .425557:
    1.313262 - .798139 - .439867; .313262 - .693147 + .5; .693147 - .554355 - .127667.

    >>> soft_reverse_kl(*WORKED)
    tensor([0.0753, 0.1201, 0.0111], dtype=torch.float64)
    """
    return _bernoulli_kl(_margin(one, other, beta), _gap(one, other, unit))


def rebel(one: Side, other: Side, *, eta: float = 1.0) -> Tensor:
    """REBEL: (a_1 - a_2 - eta (r_1 - r_2))^2, a against the policy before this round.  arXiv:2404.16767, as in the authors' code.

    One round is mirror descent: pi ~ pi_before exp(eta r). (2 - 1)^2; (0 + 1)^2; (-3)^2.

    >>> rebel(*WORKED)
    tensor([1., 1., 9.], dtype=torch.float64)
    """
    return (one.ratio - other.ratio - eta * _gap(one, other, 1.0)) ** 2


def soft_pessimistic(one: Side, other: Side, *, beta: float = 0.1, unit: float = 1.0) -> Tensor:
    """Square distillation of the gap that an ensemble is sure of: (t - m)^2, t the nearest to 0 of all between its members' gaps.

    After arXiv:2405.19316: where members disagree on who is better t is 0, which keeps the reference's odds. For a prompt of two
    responses t is exactly what maximises the worst member's E_pi[r] - E_ref[r] - beta KL; with more it is taken pair by pair.
    t = 1, 0, -1: .8^2; 0; .7^2.

    >>> soft_pessimistic(*WORKED)
    tensor([0.6400, 0.0000, 0.4900], dtype=torch.float64)
    """
    assert one.member is not None and other.member is not None, "this loss declares needs=('member',)"
    gaps = (one.member - other.member) / unit
    low, high = gaps.amin(-1), gaps.amax(-1)
    return (low.clamp(min=0) + high.clamp(max=0) - _margin(one, other, beta)) ** 2
