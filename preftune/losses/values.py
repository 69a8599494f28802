"""Losses over single scored responses that know the value of their prompt: `f(side, draws, *, ...) -> (B,)`, minimised. Torch only.

r(x, y) = beta a(y) + V(x) with V = beta log Z(x), Z = E_ref[exp(r/beta)]. V is read off the prompt's own samples of the reference
(`Draws`); responses that others wrote may be trained on and never enter V. Or V is learned beside the policy (`Side.value`), from any
responses. And two losses over the samples themselves. The last three are `f(side) -> (B,)`.

Every docstring works three numbers on `WORKED`. Try it: `pytest preftune/losses/values.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import pairs
from .pairs import Side, _row


@dataclass(frozen=True)
class Draws:
    """Which of B responses belong together and which are the reference's own.

    Args:
        group: (B,) int64, the prompt of each, 0..G-1, none left out; each has at least one draw.
        weight: (B,) how many exact samples of the reference a response is: 1 for a sample, 0 for what others wrote.
    """

    group: Tensor
    weight: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Values summed by prompt: (G,)."""
        return values.new_zeros(int(self.group.max()) + 1).index_add(0, self.group, values)

    def tilted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """exp(values) of the draws, times their weight, in units of each prompt's largest: (B,); and the log of that unit, (G,)."""
        drawn = self.weight > 0
        top = values.new_full((int(self.group.max()) + 1,), -math.inf)
        top = top.scatter_reduce(0, self.group, torch.where(drawn, values, -math.inf), "amax")
        return self.weight * torch.where(drawn, values - top[self.group], 0.0).exp(), top

    def log_mean_exp(self, values: Tensor) -> Tensor:
        """log of the mean of exp(values) over the draws of each prompt: (G,). Its mean is too low by about chi2/(2K), see `effective`."""
        tilt, top = self.tilted(values)
        return self.sums(tilt).log() + top - self.sums(self.weight).log()

    def effective(self, values: Tensor) -> Tensor:
        """Of how many equal draws the mean of exp(values) has the error: (sum w)^2 / sum w^2 over those of a prompt. (G,)

        K/effective - 1 estimates chi2 = E_ref[(pi*/ref)^2] - 1, never above K - 1; the bias of `log_mean_exp` is about -chi2/(2K).
        """
        tilt, _ = self.tilted(values)
        return self.sums(tilt) ** 2 / self.sums(torch.where(self.weight > 0, tilt**2 / self.weight, 0.0))

    def quantile(self, values: Tensor) -> Tensor:
        """Share of the prompt's draws below each value, equal ones half (mid-ranks): (B,)."""
        order = torch.argsort(self.group, stable=True)
        count = torch.bincount(self.group)
        place = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[self.group[order]]
        grid, share = (values.new_zeros(len(count), int(count.max())).index_put((self.group[order], place), x[order])
                       for x in (values, self.weight.to(values)))  # fmt: skip
        mine, theirs = values[:, None], grid[self.group]
        below = (theirs < mine).to(values) + 0.5 * (theirs == mine).to(values)
        return (share[self.group] * below).sum(1) / share.sum(1)[self.group]


WORKED = (
    replace(pairs.WORKED[0], score=_row(0, math.log(3), 2), value=_row(1, 0, -1)),
    Draws(torch.tensor([0, 0, 1]), _row(1, 1, 1)),
)
"""a = 1, 0, -2. Two samples of one prompt with rewards 0 and ln 3, one of another with 2. A value model says 1, 0, -1 of their prompts."""


def value(side: Side, draws: Draws, *, beta: float = 1.0) -> Tensor:
    """Value regression: (r - V - beta a)^2, V = beta log of the mean of exp(r/beta) over the reference's samples.  arXiv:2505.20686.

    V is too low on average, so every response is pushed up a little: `partition` in the manifest says by how much.
    Z = (1 + 3)/2 and e^2, so V = ln 2 and 2: (0 - .693147 - 1)^2; (1.098612 - .693147)^2; (2 - 2 + 2)^2.

    >>> value(*WORKED)
    tensor([2.8667, 0.1644, 4.0000], dtype=torch.float64)
    """
    assert side.score is not None, "this loss declares needs=('score',)"
    return (side.score - beta * draws.log_mean_exp(side.score / beta)[draws.group] - beta * side.ratio) ** 2


def log_z_of_quantiles(beta: float) -> float:
    """log Z of a reward that is its own quantile under the reference: the integral of exp(q/beta) over 0..1, log(beta (e^(1/beta) - 1))."""
    return math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))


def value_quantile(side: Side, draws: Draws, *, beta: float = 0.1) -> Tensor:
    """QRPO: (q - beta log Z - beta a)^2, q the quantile of r among the reference's samples, Z = beta (e^(1/beta) - 1).  arXiv:2507.08068.

    Z is exact for rewards without ties and is not estimated at all. The authors' code leaves the - 1 out. Ties get mid-ranks.
    q = .25, .75, .5 and .1 log Z = .769737: (.25 - .769737 - .1)^2; (.75 - .769737)^2; (.5 - .769737 + .2)^2.

    >>> value_quantile(*WORKED)
    tensor([0.3841, 0.0004, 0.0049], dtype=torch.float64)
    """
    assert side.score is not None, "this loss declares needs=('score',)"
    return (draws.quantile(side.score) - beta * log_z_of_quantiles(beta) - beta * side.ratio) ** 2


def value_learned(side: Side, *, beta: float = 1.0) -> Tensor:
    """DRO-V: (r - V - beta a)^2/2, V a value model of the prompt that learns from the same loss.  arXiv:2405.19107.

    Where the responses cover the reference (pi*, beta log Z) is the only minimum, whoever wrote them. As in the paper the policy's gradient
    is over beta: log pi and V are both pushed by the bare residual.
    0 - 1 - 1 = -2; ln 3; 2 + 1 + 2 = 5.

    >>> value_learned(WORKED[0])
    tensor([ 2.0000,  0.6035, 12.5000], dtype=torch.float64)
    """
    assert side.score is not None and side.value is not None, "this loss declares needs=('score', 'value')"
    still = side.ratio.detach()
    return (side.score - side.value - beta * still - (side.ratio - still)) ** 2 / 2


def anchor(side: Side) -> Tensor:
    """-a on samples of the reference: its mean is KL(ref||pi), with its gradient.  The pessimistic term of arXiv:2405.19316.

    >>> anchor(WORKED[0])
    tensor([-1., -0.,  2.], dtype=torch.float64)
    """
    return -side.ratio


def optimism(side: Side) -> Tensor:
    """+a on samples of the reference: the exploration term of XPO, a small share of it beside DPO.  arXiv:2405.21046.

    >>> optimism(WORKED[0])
    tensor([ 1.,  0., -2.], dtype=torch.float64)
    """
    return side.ratio
