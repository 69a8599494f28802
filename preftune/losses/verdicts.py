"""Losses over unpaired verdicts: `f(side, desirable, baseline, *, ...) -> (B,)`, minimised. Touches torch only.

One response, one verdict (desirable or not). a = log pi - log ref, summed over response tokens.
Try it: `pytest preftune/losses/verdicts.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import Side


def _row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


WORKED = (
    Side(policy=_row(-2, -5, -3), reference=_row(-3, -4, -3), length=_row(2, 4, 3)),
    torch.tensor([True, False, True]),
    torch.tensor(0.5, dtype=torch.float64),
)
"""Three verdicts for hand work: a = 1, -1, 0; desirable, undesirable, desirable; z0 = .5."""


def baseline(mismatched: Tensor) -> Tensor:
    """z0: KTO's estimate of KL(pi||ref), from the a of each prompt with another record's response. (B,) -> (), no gradient.

    The mean is clamped at zero because a KL cannot be negative. Batch statistic: pass the whole step, not a micro-batch.

    >>> baseline(_row(0.7, -0.2, 1.0)), baseline(_row(-0.7, 0.2))
    (tensor(0.5000, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    return mismatched.detach().mean().clamp(min=0)


def kto(side: Side, desirable: Tensor, baseline: Tensor, *, beta: float = 0.1, desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0) -> Tensor:
    """KTO: desirable l_D (1 - sigmoid(beta (a - z0))), undesirable l_U (1 - sigmoid(beta (z0 - a))).  Eq. 8 of arXiv:2402.01306.

    beta = .1, z0 = .5 and a = 1, -1, 0: 1 - sigmoid(.05) = .487503; 1 - sigmoid(.15) = .462570; 1 - sigmoid(-.05) = .512497.

    >>> kto(*WORKED)
    tensor([0.4875, 0.4626, 0.5125], dtype=torch.float64)
    """
    gap = beta * (side.ratio - baseline)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gap), undesirable_weight * torch.sigmoid(gap))
