"""Every loss: one function and one line of the table.

A loss takes tensors and keyword-only numbers and returns one unreduced value per item. Its keyword-only arguments are its
command-line schema (`--loss simpo --loss.gamma 0.5`); their defaults are the defaults. This room imports torch and nothing
of ours. To add a loss: write the function in the file of its kind with formula, source and three worked numbers, add its
line to `LOSSES`, add its page docs/losses/NAME.md; the sweeping tests then ask for its golden numbers.

`cli` reads this file's table and the functions' signatures without running them (no torch in `--help`): `LOSSES` stays a dict
display with string keys and `module.function` first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor

from . import batchwise, distill, divergences, lists, pairs, reward, tokenwise, unanchored, values, verdicts
from .pairs import Side

RATIO, MEAN_RATIO, POLICY, MEAN_POLICY = map(attrgetter, ("ratio", "mean_ratio", "policy", "mean_policy"))

__all__ = ["LOSSES", "Loss", "Side", "arguments", "expected", "votes"]


@dataclass(frozen=True)
class Loss:
    """What the rest of the house must know of a loss.

    Args:
        function: per-item, unreduced. kind 'pairs': `f(chosen: Side, rejected: Side, *, ...) -> (B,)`, with a third `weight: (B,)`
            where it is not separable and a fourth, what was carried, where it carries; kind 'verdicts':
            `f(side: Side, desirable: (B,) bool, baseline: (), *, ...) -> (B,)`; kind 'lists':
            `f(side: Side, rankings: lists.Rankings, *, ...) -> (L,)`; kind 'orders': the same, 0 for a list of one tier, whose votes
            do not count in the mean; kind 'scored', any two scored responses of a prompt: `f(one: Side, other: Side, *, ...) -> (B,)`;
            kind 'values', scored responses: `f(side: Side, draws: values.Draws, *, ...) -> (B,)`; kind 'draws', samples of the
            reference, and kinds 'grades' and 'classes', single responses that the data gave a score or a class:
            `f(side: Side, *, ...) -> (B,)`.
        kind: which view of the judgements it reads.
        reference: 'none' (the reference column is never built), 'token' (a column of log-probs), 'distribution' (that, and the reference
            itself, run beside the policy at every step).
        soft: what P(w preferred) means for it, see `expected`. 'swap': P f(w,l) + (1-P) f(l,w). 'ignore': only which side is
            likelier. 'refuse': it reads hard verdicts, so labels cannot be smoothed.
        source: paper and equation.
        separable: a step's loss is a sum over items, so micro-batches need one forward; False = batch statistics, two.
        mismatched: needs each prompt with another record's response (KTO's z0).
        needs: which further columns of `Side` it reads: 'tokens', 'collision', 'score', 'member', 'value', 'classes', 'kl'
            (reference='distribution').
        partition: its Z is estimated from samples, so their number and weights decide whether it can be trained at all.
        scalar: whether it stands on the scores of a reward model: 'no'; 'only'; or 'too', with beta 1 and a reference of 0. Then `start`
            is its value where all scores are 0.
        reads: what the loss calls the quality of a response: its difference decides "accuracy", beta times it is the reward.
        start: the value of every item where policy = reference, worked on paper, from all of the loss's arguments (as
            `arguments` names them); for verdicts `start(arguments, desirable)`, for lists
            `start(arguments, sizes of the tiers, how many below)`, for scored pairs `start(arguments, gap, gaps of an ensemble)`.
            None where policy = reference fixes no value.
        carry: statistics that run over steps, by name, as they stand before the first. The function gets those of the steps before
            its own, or None where no step is under way (an evaluation): then the set's own take their place.
        update: `(chosen, rejected, weight, carry, *, ...) -> carry` after the step, with the function's arguments.
    """

    function: Callable
    kind: str
    reference: str
    soft: str
    source: str
    separable: bool = True
    mismatched: bool = False
    needs: tuple[str, ...] = ()
    scalar: str = "no"
    reads: Callable[[Side], Tensor] = RATIO
    start: Callable[..., float] | None = None
    carry: Mapping[str, float] = field(default_factory=dict)
    update: Callable[..., dict[str, float]] | None = None
    partition: bool = False


def votes(loss: Loss, chosen: Side, rejected: Side, prob: Tensor, weight: Tensor) -> tuple[Side, Side, Tensor]:
    """Each pair as votes for and votes against it, those without a vote left out: (chosen, rejected, votes), at most 2B of them.

    prob and weight may stand on the processor: what is left out is then known without waiting for the device of the sides.
    """
    if loss.soft == "ignore":
        prob = (prob >= 0.5).to(weight.dtype)
    count = torch.cat([weight * prob, weight * (1 - prob)])
    (rows,) = torch.nonzero(count, as_tuple=True)
    both = Side(**{name: None if x is None else torch.cat([x, getattr(rejected, name)]) for name, x in vars(chosen).items()})
    other, place = (rows + len(weight)) % len(count), chosen.policy.device
    rows, other, count = (x.to(place, non_blocking=True) for x in (rows, other, count[rows]))
    return both[rows], both[other], count


def expected(loss: Loss, chosen: Side, rejected: Side, prob: Tensor, weight: Tensor, carry: Mapping[str, float] | None = None,
             /, **numbers: float) -> Tensor:  # fmt: skip
    """A pair loss over labels that are wrong sometimes: the sum of weight [P f(w, l) + (1 - P) f(l, w)]. ()

    One function makes every soft form. P = 1 is the hard loss; P = 1 - e is label smoothing (cDPO for `sigmoid`); P = sigmoid(r_w - r_l)
    distils a reward model (arXiv:2405.19316). A pair of probability P is two pairs with weights P and 1 - P: so it also stands in
    the statistics of a step. For soft='ignore' the likelier side is the chosen one, and how likely is no matter.

    Args:
        chosen, rejected: B pairs. prob: (B,) P(chosen is preferred). weight: (B,) votes. carry: as `Loss.carry`. numbers: the loss's
            arguments.

    m = .2, 0, -.3 at P = .75: .598139 + .25*.2; ln 2; .854355 - .25*.3; together 2.120641.

    >>> row = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    >>> expected(LOSSES["sigmoid"], *pairs.WORKED, 0.75 * row, row)
    tensor(2.1206, dtype=torch.float64)
    """
    good, bad, count = votes(loss, chosen, rejected, prob, weight)
    statistics = (() if loss.separable else (count,)) + ((carry,) if loss.carry else ())
    return (loss.function(good, bad, *statistics, **numbers) * count).sum()


def _ln2(arguments: Mapping[str, float]) -> float:
    """-log sigmoid(0); robust too: ((1-e) - e) ln 2 / (1-2e)."""
    return math.log(2)


def _twice_ln2(arguments: Mapping[str, float]) -> float:
    return 2 * math.log(2)


def _ipo(arguments: Mapping[str, float]) -> float:
    """(0 - 1/(2 tau))^2."""
    return 1 / (4 * arguments["tau"] ** 2)


def _one(arguments: Mapping[str, float]) -> float:
    """max(0, 1 - 0); APO: 1/2 + 1/2."""
    return 1.0


def _exo(arguments: Mapping[str, float]) -> float:
    """KL((1/2, 1/2) || (1-e, e))."""
    return -math.log(2) - 0.5 * math.log(arguments["epsilon"] * (1 - arguments["epsilon"]))


def _sppo(arguments: Mapping[str, float]) -> float:
    """(0 - 1/(2 beta))^2 + (0 + 1/(2 beta))^2."""
    return 1 / (2 * arguments["beta"] ** 2)


def _cal(arguments: Mapping[str, float]) -> float:
    return math.log(2) + arguments["lam"] * _sppo(arguments)


def _discopop(arguments: Mapping[str, float]) -> float:
    """(ln 2)/2 + e^0/2."""
    return 0.5 * math.log(2) + 0.5


def _kto(arguments: Mapping[str, float], desirable: bool) -> float:
    """l (1 - sigmoid(0)): every a is zero, so z0 is too."""
    return 0.5 * arguments["desirable_weight" if desirable else "undesirable_weight"]


def _orders(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """All orders are alike, those of a tie and of `below` summed: log K!/below!; Efron's denominators for a tie come to the same."""
    return math.lgamma(sum(tiers) + below + 1) - math.lgamma(below + 1)


def _breslow(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """Each of a tier's d out of all that are left."""
    return sum(d * math.log(sum(tiers[t:]) + below) for t, d in enumerate(tiers))


def _davidson(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """A tier of d out of n: nu^(d-1) among sum_j C(n, j) nu^(j-1) = ((1 + nu)^n - 1)/nu."""
    nu = arguments["nu"]
    return sum(math.log(((1 + nu) ** (sum(tiers[t:]) + below) - 1) / nu) - (d - 1) * math.log(nu) for t, d in enumerate(tiers))


def _first(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """Each of the best against all that are worse."""
    return tiers[0] * math.log(1 + sum(tiers[1:]) + below)


def _soft(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    """-s log(1/2) - (1-s) log(1/2)."""
    return math.log(2)


def _square(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    return (gap / arguments["unit"]) ** 2


def _soft_kl(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    """ln 2 less the entropy of sigmoid(d)."""
    d = abs(gap) / arguments["unit"]
    return math.log(2) + d / (1 + math.exp(-d)) - d - math.log1p(math.exp(-d))


def _soft_reverse_kl(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    """-ln 2 - log(s (1-s))/2."""
    d = abs(gap) / arguments["unit"]
    return d / 2 + math.log1p(math.exp(-d)) - math.log(2)


def _rebel(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    return (arguments["eta"] * gap) ** 2


def _pessimistic(arguments: Mapping[str, float], gap: float, members: Sequence[float]) -> float:
    return (max(0.0, min(members)) + min(0.0, max(members))) ** 2 / arguments["unit"] ** 2


def _margin(arguments: Mapping[str, float]) -> float:
    return math.log1p(math.exp(arguments["margin"]))


def _zero(arguments: Mapping[str, float]) -> float:
    return 0.0


def _compared(tiers: tuple[int, ...], below: int) -> tuple[int, int]:
    """Of a list (pairs of different tiers, pairs inside a tier); what is below is not compared among itself."""
    inside = sum(math.comb(d, 2) for d in tiers)
    return math.comb(sum(tiers) + below, 2) - inside - math.comb(below, 2), inside


def _davidson_pairs(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """1/(2 + nu) and nu/(2 + nu)."""
    apart, tied = _compared(tiers, below)
    return (apart + tied) * math.log(2 + arguments["nu"]) - tied * math.log(arguments["nu"])


def _rao_kupper(arguments: Mapping[str, float], tiers: tuple[int, ...], below: int) -> float:
    """1/(1 + theta) and (theta - 1)/(theta + 1)."""
    apart, tied = _compared(tiers, below)
    return (apart + tied) * math.log(1 + arguments["theta"]) - tied * math.log(arguments["theta"] - 1)


def _binary(arguments: Mapping[str, float], desirable: bool) -> float:
    return math.log(2)


LOSSES: Mapping[str, Loss] = {
    "sigmoid": Loss(pairs.sigmoid, "pairs", "token", "swap", "arXiv:2305.18290, Eq. 7", start=_ln2),
    "reference-free": Loss(pairs.reference_free, "pairs", "none", "swap", "arXiv:2305.18290, authors' code", reads=POLICY),
    "robust": Loss(pairs.robust, "pairs", "token", "swap", "arXiv:2403.00409", start=_ln2, scalar="too"),
    "ipo-sum": Loss(pairs.ipo_sum, "pairs", "token", "swap", "arXiv:2310.12036, Eq. 17", start=_ipo),
    "ipo-mean": Loss(pairs.ipo_mean, "pairs", "token", "swap", "arXiv:2310.12036, as in TRL", start=_ipo, reads=MEAN_RATIO),
    "hinge": Loss(pairs.hinge, "pairs", "token", "swap", "arXiv:2309.06657, hinge-norm", start=_one, scalar="too"),
    "sigmoid-norm": Loss(pairs.sigmoid_norm, "pairs", "token", "swap", "arXiv:2411.15124 (Tulu 3)", start=_ln2, reads=MEAN_RATIO),
    "simpo": Loss(pairs.simpo, "pairs", "none", "swap", "arXiv:2405.14734, Eq. 6", reads=MEAN_POLICY),
    "nll": Loss(pairs.nll, "pairs", "none", "ignore", "arXiv:2404.19733, the added term", reads=POLICY),
    "exo": Loss(pairs.exo, "pairs", "token", "swap", "arXiv:2402.00856, Eq. 16", start=_exo),
    "nca": Loss(pairs.nca, "pairs", "token", "swap", "arXiv:2402.05369", start=_twice_ln2),
    "bco": Loss(batchwise.bco, "pairs", "token", "swap", "arXiv:2404.04656", separable=False, start=_twice_ln2),
    "bco-biased": Loss(pairs.bco_biased, "pairs", "token", "swap", "arXiv:2404.04656 without its shift", start=_twice_ln2),
    "sppo-hard": Loss(pairs.sppo_hard, "pairs", "token", "swap", "arXiv:2405.00675, Eq. 4.7", start=_sppo),
    "apo-zero": Loss(pairs.apo_zero, "pairs", "token", "swap", "arXiv:2408.06266, Eq. 7", start=_one),
    "apo-down": Loss(pairs.apo_down, "pairs", "token", "swap", "arXiv:2408.06266, Eq. 8", start=_one),
    "aot": Loss(batchwise.aot, "pairs", "token", "swap", "arXiv:2406.05882", separable=False, start=_ln2),
    "aot-unpaired": Loss(batchwise.aot_unpaired, "pairs", "token", "swap", "arXiv:2406.05882", separable=False, start=_ln2),
    "discopop": Loss(pairs.discopop, "pairs", "token", "swap", "arXiv:2406.08414, Eq. 5", start=_discopop),
    "f-forward-kl": Loss(divergences.f_forward_kl, "pairs", "token", "swap", "arXiv:2309.16240", start=_ln2),
    "f-js": Loss(divergences.f_js, "pairs", "token", "swap", "arXiv:2309.16240", start=_ln2),
    "f-alpha": Loss(divergences.f_alpha, "pairs", "token", "swap", "arXiv:2309.16240", start=_ln2),
    "chi-po": Loss(divergences.chi_po, "pairs", "token", "swap", "arXiv:2407.13399", start=_ln2),
    "orpo": Loss(unanchored.orpo, "pairs", "none", "swap", "arXiv:2403.07691", reads=MEAN_POLICY),
    "slic": Loss(unanchored.slic, "pairs", "none", "swap", "arXiv:2305.10425", reads=POLICY),
    "cpo": Loss(unanchored.cpo, "pairs", "none", "swap", "arXiv:2401.08417", reads=POLICY),
    "alphapo": Loss(unanchored.alphapo, "pairs", "none", "swap", "arXiv:2501.03884", reads=MEAN_POLICY),
    "dpop": Loss(pairs.dpop, "pairs", "token", "swap", "arXiv:2402.13228", start=_ln2),
    "cal-dpo": Loss(pairs.cal_dpo, "pairs", "token", "swap", "arXiv:2412.14516", start=_cal),
    "r-dpo": Loss(pairs.r_dpo, "pairs", "token", "swap", "arXiv:2403.19159"),
    "wpo": Loss(tokenwise.wpo, "pairs", "token", "swap", "arXiv:2406.11827, Eq. 2", needs=("collision",)),
    "ld-dpo": Loss(tokenwise.ld_dpo, "pairs", "token", "swap", "arXiv:2409.06411", needs=("tokens",), start=_ln2),
    "d2po": Loss(tokenwise.d2po, "pairs", "token", "swap", "arXiv:2502.14340", needs=("tokens",), start=_ln2),
    "tdpo1": Loss(tokenwise.tdpo1, "pairs", "distribution", "swap", "arXiv:2404.11999", needs=("kl",), start=_ln2),
    "tdpo2": Loss(tokenwise.tdpo2, "pairs", "distribution", "swap", "arXiv:2404.11999", needs=("kl",), start=_ln2),
    "alpha-dpo": Loss(batchwise.alpha_dpo, "pairs", "token", "swap", "arXiv:2410.10148", separable=False, reads=MEAN_POLICY),
    "beta-dpo": Loss(batchwise.beta_dpo, "pairs", "token", "swap", "arXiv:2407.08639", separable=False, start=_ln2,
                     carry=batchwise.UNMOVED, update=batchwise.beta_dpo_update),
    "kto": Loss(verdicts.kto, "verdicts", "token", "refuse", "arXiv:2402.01306, Eq. 8", separable=False, mismatched=True,
                start=_kto),
    "plackett-luce": Loss(lists.plackett_luce, "lists", "token", "refuse", "arXiv:2305.18290, appendix A.3; ties: Efron 1977",
                          start=_orders, scalar="too"),
    "plackett-luce-breslow": Loss(lists.plackett_luce_breslow, "lists", "token", "refuse", "as plackett-luce; ties: Breslow 1974",
                                  start=_breslow, scalar="too"),
    "plackett-luce-davidson": Loss(lists.plackett_luce_davidson, "lists", "token", "refuse", "arXiv:1810.12068 (Davidson-Luce)",
                                   start=_davidson, scalar="too"),
    "lipo": Loss(lists.lipo, "orders", "token", "refuse", "arXiv:2402.01878 (LiPO-lambda)"),
    "s-dpo": Loss(lists.s_dpo, "orders", "token", "refuse", "arXiv:2406.09215", start=_first, scalar="too"),
    "soft": Loss(distill.soft, "scored", "token", "refuse", "arXiv:2406.11704; the notes' distillation", needs=("score",), start=_soft),
    "soft-square": Loss(distill.soft_square, "scored", "token", "refuse", "arXiv:2405.19316, d-DPO", needs=("score",), start=_square),
    "soft-kl": Loss(distill.soft_kl, "scored", "token", "refuse", "arXiv:2406.11704", needs=("score",), start=_soft_kl),
    "soft-reverse-kl": Loss(distill.soft_reverse_kl, "scored", "token", "refuse", "arXiv:2406.11704", needs=("score",),
                            start=_soft_reverse_kl),
    "soft-pessimistic": Loss(distill.soft_pessimistic, "scored", "token", "refuse", "after arXiv:2405.19316", needs=("score", "member"),
                             start=_pessimistic),
    "rebel": Loss(distill.rebel, "scored", "token", "refuse", "arXiv:2404.16767", needs=("score",), start=_rebel),
    "value": Loss(values.value, "values", "token", "refuse", "arXiv:2505.20686 (A*-PO), one beta", needs=("score",), partition=True),
    "value-quantile": Loss(values.value_quantile, "values", "token", "refuse", "arXiv:2507.08068 (QRPO)", needs=("score",)),
    "value-learned": Loss(values.value_learned, "grades", "token", "refuse", "arXiv:2405.19107 (DRO-V)", needs=("score", "value")),
    "anchor": Loss(values.anchor, "draws", "token", "refuse", "arXiv:2405.19316, its forward KL", start=_zero),
    "optimism": Loss(values.optimism, "draws", "token", "refuse", "arXiv:2405.21046 (XPO)", start=_zero),
    "bradley-terry": Loss(reward.bradley_terry, "pairs", "none", "swap", "Bradley and Terry 1952; arXiv:2009.01325", reads=POLICY,
                          start=_margin, scalar="only"),
    "bradley-terry-margin": Loss(reward.bradley_terry_margin, "pairs", "none", "swap", "arXiv:2307.09288, Eq. 2", needs=("score",),
                                 reads=POLICY, scalar="only"),
    "centre": Loss(reward.centre, "pairs", "none", "ignore", "arXiv:2312.09244", reads=POLICY, start=_zero, scalar="only"),
    "davidson": Loss(reward.davidson, "lists", "none", "refuse", "Davidson 1970", reads=POLICY, start=_davidson_pairs, scalar="only"),
    "rao-kupper": Loss(reward.rao_kupper, "lists", "none", "refuse", "Rao and Kupper 1967", reads=POLICY, start=_rao_kupper,
                       scalar="only"),
    "binary": Loss(reward.binary, "verdicts", "none", "refuse", "arXiv:2110.14168 (verifiers)", reads=POLICY, start=_binary,
                   scalar="only"),
    "grades": Loss(reward.grades, "grades", "none", "refuse", "McCullagh 1980", needs=("score",), reads=POLICY, start=_ln2,
                   scalar="only"),
    "square": Loss(reward.square, "grades", "none", "refuse", "arXiv:2406.08673 (HelpSteer2)", needs=("score",), reads=POLICY,
                   scalar="only"),
    "nominal": Loss(reward.nominal, "classes", "none", "refuse", "McFadden 1974", needs=("score", "classes"), reads=POLICY, scalar="only"),
}


def arguments(name: str) -> dict[str, float]:
    """The loss's own options and their defaults, in order, read from its signature."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
