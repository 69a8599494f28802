"""Losses over pairs that need no reference beside those in `pairs`. Touches torch only. Try it: `pytest preftune/losses/unanchored.py`.

Per token log pi/n on the worked pairs is -1, -1, -1.5 (chosen) and -1.25, -2, -2 (rejected).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import WORKED, Side

__all__ = ["WORKED", "alphapo", "cpo", "orpo", "slic"]


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p/(1-p)) from log p, right near p = 0 and p = 1; p = 1 itself reads as 1 - 1e-12.

    >>> _log_odds(torch.tensor([-1e-9, -1.0, -50.0]).double())
    tensor([ 20.7233,  -0.5413, -50.0000], dtype=torch.float64)
    """
    x = log_p.clamp(max=-1e-12)
    return x - torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def slic(chosen: Side, rejected: Side, *, delta: float = 1.0, lam: float = 0.1) -> Tensor:
    """SLiC-HF: max(0, delta - log pi_w + log pi_l) - lam log pi_w/n_w.  arXiv:2305.10425, Eq. 1 with the chosen answer as target.

    log pi_w - log pi_l = 3, 5, -4: 0 + .1; 0 + .1; 5 + .15.

    >>> slic(*WORKED)
    tensor([0.1000, 0.1000, 5.1500], dtype=torch.float64)
    """
    return torch.relu(delta - (chosen.policy - rejected.policy)) - lam * chosen.mean_policy


def orpo(chosen: Side, rejected: Side, *, lam: float = 0.1) -> Tensor:
    """ORPO: -log pi_w/n_w - lam ls(log odds_w - log odds_l), odds of p = exp(log pi/n).  arXiv:2403.07691.

    Log odds of e^-1, e^-1, e^-1.5 are -.541325, -.541325, -1.247519; of e^-1.25, e^-2, e^-2: -.912233, -1.854587, -1.854587.
    The gaps are .370908, 1.313262, .607068: 1 + .1 * .524783; 1 + .1 * .238242; 1.5 + .1 * .435112.

    >>> orpo(*WORKED)
    tensor([1.0525, 1.0238, 1.5435], dtype=torch.float64)
    """
    return -chosen.mean_policy - lam * F.logsigmoid(_log_odds(chosen.mean_policy) - _log_odds(rejected.mean_policy))


def cpo(chosen: Side, rejected: Side, *, beta: float = 0.1, lam: float = 1.0) -> Tensor:
    """CPO: -ls(beta (log pi_w - log pi_l)) - lam log pi_w, both on sums.  arXiv:2401.08417.

    log pi_w - log pi_l = 3, 5, -4: .554355 + 2; .474077 + 3; .913015 + 6.

    >>> cpo(*WORKED)
    tensor([2.5544, 3.4741, 6.9130], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.policy - rejected.policy)) - lam * chosen.policy


def alphapo(chosen: Side, rejected: Side, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Tensor:
    """AlphaPO: SimPO with the reward (1 - p^-alpha)/alpha, p = exp(log pi/n), in the place of log p.  arXiv:2501.03884.

    (1 - e^.25)/.25 = -1.136102, twice; (1 - e^.375)/.25 = -1.819966; rejected (1 - e^.3125)/.25 = -1.467353, (1 - e^.5)/.25 = -2.594885
    twice. Gaps .331251, 1.458783, .774919; twice that less 1: -.337498, 1.917567, .549838.

    >>> alphapo(*WORKED)
    tensor([0.8761, 0.1371, 0.4556], dtype=torch.float64)
    """
    good, bad = (-torch.expm1(-alpha * side.mean_policy) / alpha for side in (chosen, rejected))
    return -F.logsigmoid(beta * (good - bad) - gamma)
