"""Losses over pairs that compare each pair with the others of its step: `f(chosen, rejected, weight, *, ...) -> (B,)`, and one that
also looks back at earlier steps and is given what they left (`carry`). Torch only.

`weight` (B,), above 0, says how much each pair counts in the statistic: a pair of weight 2 is the pair twice. Pass the whole step, not
a micro-batch. Try it: `pytest preftune/losses/batchwise.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import WORKED, Side, _row

__all__ = ["WORKED", "alpha_dpo", "aot", "aot_unpaired", "bco", "beta_dpo", "beta_dpo_update"]

ONES = _row(1, 1, 1)
LEAST_SPREAD = 1e-3


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


def _by_quantiles(high: Tensor, low: Tensor, weight: Tensor, beta: float) -> Tensor:
    """-ls(beta (quantile of high - the same quantile of low)), averaged over the quantiles that each item of `high` holds. (B,)

    Both samples carry `weight`. With equal weights the k-th largest meets the k-th largest; else each item is cut where the other
    sample's items begin and end.

    >>> _by_quantiles(_row(3, 1), _row(0, 9), _row(1, 1), 1.0), _by_quantiles(_row(3, 1, 1), _row(0, 9, 9), _row(1, 1, 1), 1.0)
    (tensor([6.0025, 0.3133], dtype=torch.float64), tensor([6.0025, 0.3133, 8.0003], dtype=torch.float64))
    """
    up, down = high.argsort(stable=True), low.argsort(stable=True)
    up_ends, down_ends = weight[up].cumsum(0), weight[down].cumsum(0)
    ends = torch.cat([up_ends, down_ends]).sort().values
    mass = ends.diff(prepend=ends.new_zeros(1))
    # The clamp: by rounding the two totals may differ in the last bit.
    i, j = (order[torch.searchsorted(e, ends).clamp(max=len(e) - 1)] for order, e in ((up, up_ends), (down, down_ends)))
    return torch.zeros_like(high).index_add(0, i, -mass * F.logsigmoid(beta * (high[i] - low[j]))) / weight


def aot(chosen: Side, rejected: Side, weight: Tensor, *, beta: float = 0.01) -> Tensor:
    """AOT, paired: log pi_w - log pi_l and log ref_w - log ref_l, each sorted; DPO on their equal quantiles.  arXiv:2406.05882.

    3, 5, -4 against 1, 5, -1: in order -4, 3, 5 meets -1, 1, 5, so the margins are .01 (2), .01 (0), .01 (-3).

    >>> aot(*WORKED, ONES)
    tensor([0.6832, 0.6931, 0.7083], dtype=torch.float64)
    """
    assert chosen.reference is not None and rejected.reference is not None
    return _by_quantiles(chosen.policy - rejected.policy, chosen.reference - rejected.reference, weight, beta)


def aot_unpaired(chosen: Side, rejected: Side, weight: Tensor, *, beta: float = 0.01) -> Tensor:
    """AOT, unpaired: the a_w and the a_l, each sorted; DPO on their equal quantiles.  arXiv:2406.05882.

    1, 0, -2 against -1, 0, 1: in order -2, 0, 1 meets -1, 0, 1, so the margins are 0, 0 and, for the third pair, .01 (-1).

    >>> aot_unpaired(*WORKED, ONES)
    tensor([0.6931, 0.6931, 0.6982], dtype=torch.float64)
    """
    return _by_quantiles(chosen.ratio, rejected.ratio, weight, beta)


def bco(chosen: Side, rejected: Side, weight: Tensor, *, beta: float = 0.01) -> Tensor:
    """BCO on pairs: -ls(beta a_w - d) - ls(d - beta a_l), d = mean of beta a over both sides of the step, no gradient.  arXiv:2404.04656.

    The paper's d is a running mean over steps; this one forgets, so that a step is a function of its own pairs.
    a = 1, 0, -2, -1, 0, 1, so d = .01 (-1/6) = -.001667: -ls(.011667) - ls(.008333); -ls(.001667) - ls(-.001667);
    -ls(-.018333) - ls(-.011667).

    >>> bco(*WORKED, ONES)
    tensor([1.3763, 1.3863, 1.4014], dtype=torch.float64)
    """
    good, bad = beta * chosen.ratio, beta * rejected.ratio
    shift = _mean((good + bad) / 2, weight).detach()
    return -F.logsigmoid(good - shift) - F.logsigmoid(shift - bad)


def alpha_dpo(chosen: Side, rejected: Side, weight: Tensor, *, beta: float = 2.5, gamma: float = 1.5, alpha: float = 0.2) -> Tensor:
    """alpha-DPO: -ls(beta (log pi_w/n_w - log pi_l/n_l - alpha z) - gamma), z = z-score of a_w/n_w - a_l/n_l.  arXiv:2410.10148.

    z is the step's and carries no gradient; the authors take its mean and spread as running means over steps. A spread below 1e-3 nats
    counts as 1e-3, so that noise at the start is not blown up.
    .75, 0, -1.5 have mean -.25 and variance (1 + .0625 + 1.5625)/3 = .875, so z = 1.069045, .267261, -1.336306.
    2.5 (.25 - .213809) - 1.5 = -1.409523; 2.5 (1 - .053452) - 1.5 = .866369; 2.5 (.5 + .267261) - 1.5 = .418153.

    >>> alpha_dpo(*WORKED, ONES)
    tensor([1.6281, 0.3510, 0.5058], dtype=torch.float64)
    """
    gap = (chosen.mean_ratio - rejected.mean_ratio).detach()
    centred = gap - _mean(gap, weight)
    z = centred / _mean(centred**2, weight).sqrt().clamp(min=LEAST_SPREAD)
    return -F.logsigmoid(beta * (chosen.mean_policy - rejected.mean_policy - alpha * z) - gamma)


UNMOVED = {"mean": 0.0, "spread": 0.0, "steps": 0.0}
"""What beta-DPO carries before the first step: running mean and spread of D in nats, and the steps taken."""


def beta_dpo_update(chosen: Side, rejected: Side, weight: Tensor, carry: Mapping[str, float], *, momentum: float = 0.9,
                    **others: float) -> dict[str, float]:  # fmt: skip
    """Running mean and spread of D over all pairs of each step: new = momentum old + (1 - momentum) step.  arXiv:2407.08639.

    D = 2, 0, -3: mean -1/3, spread sqrt(13/3 - 1/9) = 2.054805, a tenth of each.

    >>> {name: round(value, 6) for name, value in beta_dpo_update(*WORKED, ONES, UNMOVED).items()}
    {'mean': -0.033333, 'spread': 0.20548, 'steps': 1.0}
    """
    gap = (chosen.ratio - rejected.ratio).detach()
    mean = _mean(gap, weight)
    step = {"mean": float(mean), "spread": float(_mean((gap - mean) ** 2, weight).sqrt())}
    return {name: momentum * carry[name] + (1 - momentum) * step[name] for name in step} | {"steps": carry["steps"] + 1}


def _drawn(gap: Tensor, weight: Tensor, keep: float, running: Mapping[str, float]) -> Tensor:
    """How much of each pair is kept: `keep` of all votes, drawn without replacement with chances exp(-z^2/2), z = (D - mean)/spread. (B,)

    The smallest of E/chance with E exponential come first: a draw without replacement (Efraimidis and Spirakis 2006). The draw is a
    function of the number of the step. The last pair drawn is kept in part, so that exactly `keep` of the votes are.
    """
    chance = torch.rand(len(gap), dtype=torch.float64, generator=torch.Generator().manual_seed(int(running["steps"])))
    waits = (-(-chance).log1p()).log().to(gap) + 0.5 * ((gap - running["mean"]) / max(running["spread"], LEAST_SPREAD)) ** 2
    order = waits.argsort(stable=True)
    before = weight[order].cumsum(0) - weight[order]
    kept = torch.minimum((keep * weight.sum() - before).clamp(min=0), weight[order]) / weight[order]
    return torch.zeros_like(gap).index_put((order,), kept)


def beta_dpo(chosen: Side, rejected: Side, weight: Tensor, carry: Mapping[str, float] | None, *, beta: float = 0.1, scale: float = 0.6,
             momentum: float = 0.9, keep: float = 1.0) -> Tensor:  # fmt: skip
    """beta-DPO: -ls(b D), b = max(beta (1 + scale (M - M0)), .001), M the step's mean D, M0 its running mean.  arXiv:2407.08639.

    D = a_w - a_l, not yet times beta; neither M nor M0 carries a gradient. M0 counts this step too, as in the authors' code.
    keep < 1 is the paper's filter (there .8): the loss is that of a share of the pairs, drawn by how near D is to M0, and M is
    theirs. Without a step under way (carry None) M0 is M and nothing is left out: DPO at `beta`.
    D = 2, 0, -3: M = -1/3, M0 = -1/30, b = .1 (1 - .6 * .3) = .082 and the margins are .164, 0, -.246.

    >>> beta_dpo(*WORKED, ONES, UNMOVED)
    tensor([0.6145, 0.6931, 0.8237], dtype=torch.float64)
    """
    gap = chosen.ratio - rejected.ratio
    if carry is None:
        return -F.logsigmoid(beta * gap)
    running, fixed = beta_dpo_update(chosen, rejected, weight, carry, momentum=momentum), gap.detach()
    kept = _drawn(fixed, weight, keep, running) if keep < 1 else torch.ones_like(fixed)
    moved = beta * (1 + scale * (_mean(fixed, weight * kept) - running["mean"]))
    return -F.logsigmoid(moved.clamp(min=1e-3) * gap) * kept / min(keep, 1.0)
