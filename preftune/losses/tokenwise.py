"""Losses over pairs that look inside a response: they read `Side.tokens`, `Side.collision` or `Side.kl`. Touches torch only.

Token by token the worked pairs have log-ratios w: (1.5, -.5), zeros, (-1, -.5, -.5, 0) and l: (-1, .5, -.5, 0), zeros, (1).
Sums over prefixes of KL(ref||pi): w .5, 1, 2 and l 1.5, 0, 1.
Try it: `pytest preftune/losses/tokenwise.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import WORKED, Side

__all__ = ["WORKED", "d2po", "ld_dpo", "tdpo1", "tdpo2", "wpo"]


def _place(side: Side) -> Tensor:
    """0, 1, 2, ... along a response. (T,)"""
    assert side.tokens is not None, "this loss declares needs=('tokens',)"
    return torch.arange(side.tokens.shape[1], dtype=side.tokens.dtype, device=side.tokens.device)


def _weighed(side: Side, weight: Tensor) -> Tensor:
    """Sum over tokens of weight times log-ratio; weight (T,) or (B, T). (B,)"""
    return (side.tokens * weight).sum(-1)


def ld_dpo(chosen: Side, rejected: Side, *, beta: float = 0.1, tail: float = 0.5) -> Tensor:
    """LD-DPO: DPO in which tokens beyond the shorter side's length count `tail`, in policy and reference.  arXiv:2409.06411.

    The shorter side has 2, 3, 1 tokens. a_w = 1; 0; -1 + .5 (-1) = -1.5 and a_l = -.5 + .5 (-.5) = -.75; 0; 1.
    m = .1 (1.75, 0, -2.5).

    >>> ld_dpo(*WORKED)
    tensor([0.6095, 0.6931, 0.8259], dtype=torch.float64)
    """
    shared = torch.minimum(chosen.length, rejected.length)[:, None]
    good, bad = (_weighed(s, torch.where(_place(s) < shared, 1.0, tail)) for s in (chosen, rejected))
    return -F.logsigmoid(beta * (good - bad))


def d2po(chosen: Side, rejected: Side, *, beta: float = 0.1, decay: float = 0.98) -> Tensor:
    """D2PO (temporal decay): -ls(beta sum_t decay^t (log-ratio_w,t - log-ratio_l,t)), t from 0.  arXiv:2502.14340.

    The authors' code counts t from 1: its beta is ours divided by decay.
    w: 1.5 - .49 = 1.01; 0; -1 - .49 - .4802 = -1.9702. l: -1 + .49 - .4802 = -.9902; 0; 1. m = .1 (2.0002, 0, -2.9702).

    >>> d2po(*WORKED)
    tensor([0.5981, 0.6931, 0.8526], dtype=torch.float64)
    """
    good, bad = (_weighed(s, decay ** _place(s)) for s in (chosen, rejected))
    return -F.logsigmoid(beta * (good - bad))


def wpo(chosen: Side, rejected: Side, *, beta: float = 0.01, cap: float = 1.0) -> Tensor:
    """WPO: min(cap, v_w v_l) (-ls(m)), v = exp(mean over tokens of log pi - log sum_v pi(v)^2), no gradient.  Eq. 2 of arXiv:2406.11827.

    v is about 1 for what the policy itself would say, below for what it would not.
    ln v_w = 0/2, 1.5/3, 4/4; ln v_l = -2/4, -2/4, .5/1; products e^-.5 = .606531, 1, e^1.5, the last capped.
    m = .02, 0, -.03: .606531 * .683197; ln 2; .708260.

    >>> wpo(*WORKED)
    tensor([0.4144, 0.6931, 0.7083], dtype=torch.float64)
    """
    likely = sum((s.policy.detach() - s.collision) / s.length for s in (chosen, rejected))
    return -torch.exp(likely).clamp(max=cap) * F.logsigmoid(beta * (chosen.ratio - rejected.ratio))


def tdpo1(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """TDPO1: -ls(m - beta (K_l - K_w)), K = sum over a response's prefixes of KL(ref||pi), with gradient.  arXiv:2404.11999.

    m = .2, 0, -.3 less .1 (1, -1, -1): .1, .1, -.2.

    >>> tdpo1(*WORKED)
    tensor([0.6444, 0.6444, 0.7981], dtype=torch.float64)
    """
    assert chosen.kl is not None and rejected.kl is not None, "this loss declares needs=('kl',)"
    return -F.logsigmoid(beta * (chosen.ratio - rejected.ratio - (rejected.kl - chosen.kl)))


def tdpo2(chosen: Side, rejected: Side, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO2: -ls(m - alpha beta (K_l - K_w)), K as in TDPO1 but K_w without gradient: only the rejected side is held.  arXiv:2404.11999.

    m = .2, 0, -.3 less .05 (1, -1, -1): .15, .05, -.25.

    >>> tdpo2(*WORKED)
    tensor([0.6210, 0.6685, 0.8259], dtype=torch.float64)
    """
    assert chosen.kl is not None and rejected.kl is not None, "this loss declares needs=('kl',)"
    return -F.logsigmoid(beta * (chosen.ratio - rejected.ratio - alpha * (rejected.kl - chosen.kl.detach())))
