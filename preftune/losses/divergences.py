"""f-DPO: another divergence in the place of the KL, `-ls(beta (f'(u_w) - f'(u_l)))`, u = pi/ref.  arXiv:2309.16240. Torch only.

The optimum of E[r] - beta D_f(pi||ref) where f'(0+) is minus infinity, so that it keeps the reference's support. f' is known up to a
constant, which cancels between the sides. f'(u) = log u is the KL and plain DPO. Ratios of whole responses can be astronomical:
see `_exp`. Try it: `pytest preftune/losses/divergences.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import WORKED, Side, _row

__all__ = ["WORKED", "_row", "chi_po", "f_alpha", "f_forward_kl", "f_js"]

STEEPEST = 20.0


def _exp(x: Tensor) -> Tensor:
    """e^x, continued by its tangent where x > 20: finite for any log-ratio, and unlike a clamp never without a gradient.

    >>> _exp(_row(1, 21)) / _row(1, 20).exp()
    tensor([1., 2.], dtype=torch.float64)
    """
    return x.clamp(max=STEEPEST).exp() * (1 + F.relu(x - STEEPEST))


def f_forward_kl(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """Forward KL(ref||pi): f'(u) = -1/u, so -ls(beta (e^-a_l - e^-a_w)).

    e^1 - e^-1 = 2.350402; 0; e^-1 - e^2 = -7.021177, times .1.

    >>> f_forward_kl(*WORKED)
    tensor([0.5825, 0.6931, 1.1046], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (_exp(-rejected.ratio) - _exp(-chosen.ratio)))


def f_js(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """Jensen-Shannon: f'(u) = log(2u/(1+u)) = ln 2 + ls(a), so -ls(beta (ls(a_w) - ls(a_l))).

    ls(1) - ls(-1) = 1; 0; ls(-2) - ls(1) = -2.126928 + .313262 = -1.813666, times .1.

    >>> f_js(*WORKED)
    tensor([0.6444, 0.6931, 0.7879], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (F.logsigmoid(chosen.ratio) - F.logsigmoid(rejected.ratio)))


def f_alpha(chosen: Side, rejected: Side, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """Alpha divergence: f'(u) = (1 - u^-alpha)/alpha, so -ls(beta (e^(-alpha a_l) - e^(-alpha a_w))/alpha).

    The authors' convention: alpha -> 0 is DPO, alpha = 1 the forward KL. TRL >= 0.29 counts the other way round (its alpha is 1 - ours).
    2 (e^.5 - e^-.5) = 2.084381; 0; 2 (e^-.5 - e) = -4.223502, times .1.

    >>> f_alpha(*WORKED)
    tensor([0.5943, 0.6931, 0.9265], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (_exp(-alpha * rejected.ratio) - _exp(-alpha * chosen.ratio)) / alpha)


def chi_po(chosen: Side, rejected: Side, *, beta: float = 0.05) -> Tensor:
    """chi-PO: f'(u) = u + log u, so -ls(beta (e^a_w + a_w - e^a_l - a_l)): chi-square and KL together.  arXiv:2407.13399.

    e - e^-1 + 2 = 4.350402; 0; e^-2 - e - 3 = -5.582947, times .05.

    >>> chi_po(*WORKED)
    tensor([0.5903, 0.6931, 0.8424], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (_exp(chosen.ratio) + chosen.ratio - _exp(rejected.ratio) - rejected.ratio))
