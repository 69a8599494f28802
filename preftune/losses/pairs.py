"""Losses over pairs: `f(chosen, rejected, *, ...) -> (B,)`, minimised. Touches torch only.

a(y) = log pi(y|x) - log ref(y|x), summed over response tokens; a_w, a_l for chosen and rejected; D = a_w - a_l; n = length;
m = beta*D is the margin; ls(z) = log sigmoid(z) = -softplus(-z). `beta` is the KL weight: it multiplies the log-ratio.
Labels are hard here; soft labels and label smoothing are one function for every loss, `losses.expected`.

Every docstring works three numbers on the three pairs of `WORKED`. Try it: `pytest preftune/losses/pairs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One side of B pairs, or B single responses. All float64 in training.

    Args:
        policy: (B,) log pi(y|x), summed over response tokens, EOS included where finished.
        reference: (B,) log ref(y|x), likewise; None for losses that declare reference='none'.
        length: (B,) response tokens counted, at least 1.
        tokens: (B, T) log pi - log ref token by token, zero after the end; only for losses that need 'tokens'.
        collision: (B,) sum over tokens of log sum_v pi(v)^2, without gradient; only for losses that need 'collision'.
        score: (B,) the data's own reward of the response, NaN where it has none; only for losses that need 'score'.
        member: (B, M) what each member of an ensemble says of it; only for losses that need 'member'.
        kl: (B,) sum over its tokens of KL(ref(.|s_t)||pi(.|s_t)), with gradient; only for losses that need 'kl'.
        value: (B,) what a value model says of its prompt, with gradient; only for losses that need 'value'.
        classes: (B, C) what a head of C outputs says of the response; only for losses that need 'classes'.
    """

    policy: Tensor
    reference: Tensor | None
    length: Tensor
    tokens: Tensor | None = None
    collision: Tensor | None = None
    score: Tensor | None = None
    member: Tensor | None = None
    kl: Tensor | None = None
    value: Tensor | None = None
    classes: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Side:
        """The same with every column changed."""
        return Side(**{name: None if x is None else change(x) for name, x in vars(self).items()})

    def __getitem__(self, rows: Tensor) -> Side:
        """These responses, in this order."""
        return self.each(lambda x: x[rows])

    @property
    def ratio(self) -> Tensor:
        """a(y) = log pi - log ref, summed. (B,), nats."""
        return self.policy - self.reference

    @property
    def mean_ratio(self) -> Tensor:
        """a(y) / n. (B,), nats per token."""
        return self.ratio / self.length

    @property
    def mean_policy(self) -> Tensor:
        """log pi(y|x) / n. (B,), nats per token."""
        return self.policy / self.length


def _row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


WORKED = (
    Side(policy=_row(-2, -3, -6), reference=_row(-3, -3, -4), length=_row(2, 3, 4), collision=_row(-2, -4.5, -10), kl=_row(0.5, 1, 2),
         tokens=torch.stack([_row(1.5, -0.5, 0, 0), _row(0, 0, 0, 0), _row(-1, -0.5, -0.5, 0)])),
    Side(policy=_row(-5, -8, -2), reference=_row(-4, -8, -3), length=_row(4, 4, 1), collision=_row(-3, -6, -2.5), kl=_row(1.5, 0, 1),
         tokens=torch.stack([_row(-1, 0.5, -0.5, 0), _row(0, 0, 0, 0), _row(1, 0, 0, 0)])),
)  # fmt: skip
"""Three pairs for hand work. a_w = 1, 0, -2 and a_l = -1, 0, 1, so D = 2, 0, -3; per token a_w/n_w - a_l/n_l = .75, 0, -1.5;
log pi_w - log pi_l = 3, 5, -4; per token .25, 1, .5. The middle pair stands where policy = reference."""


def sigmoid(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """DPO: -ls(beta (a_w - a_l)).  Eq. 7 of arXiv:2305.18290.

    m = .2, 0, -.3: log(1 + e^-.2) = .598139; ln 2 = .693147; log(1 + e^.3) = .854355.

    >>> sigmoid(*WORKED)
    tensor([0.5981, 0.6931, 0.8544], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.ratio - rejected.ratio))


def reference_free(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """DPO with a uniform reference: -ls(beta (log pi_w - log pi_l)), sums.  The DPO authors' `reference_free` option.

    log pi_w - log pi_l = 3, 5, -4: log(1 + e^-.3) = .554355; log(1 + e^-.5) = .474077; log(1 + e^.4) = .913015.

    >>> reference_free(*WORKED)
    tensor([0.5544, 0.4741, 0.9130], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.policy - rejected.policy))


def robust(chosen: Side, rejected: Side, *, beta: float = 0.1, noise: float = 0.1) -> Tensor:
    """Robust DPO: [-(1-e) ls(m) + e ls(-m)] / (1 - 2e), unbiased when labels flip with rate e = noise.  arXiv:2403.00409.

    Because ls(-m) = ls(m) - m this is -ls(m) - m e/(1-2e): unbounded below on separable data.
    e = .1, so e/(1-2e) = .125 and m = .2, 0, -.3: .598139 - .025; ln 2; .854355 + .0375.

    >>> robust(*WORKED)
    tensor([0.5731, 0.6931, 0.8919], dtype=torch.float64)
    """
    margin = beta * (chosen.ratio - rejected.ratio)
    return (-(1 - noise) * F.logsigmoid(margin) + noise * F.logsigmoid(-margin)) / (1 - 2 * noise)


def ipo_sum(chosen: Side, rejected: Side, *, tau: float = 0.1) -> Tensor:
    """IPO on sums: (a_w - a_l - 1/(2 tau))^2.  Eq. 17 of arXiv:2310.12036, as printed.

    1/(2 tau) = 5 and D = 2, 0, -3: (2-5)^2 = 9; 25; 64.

    >>> ipo_sum(*WORKED)
    tensor([ 9., 25., 64.], dtype=torch.float64)
    """
    return (chosen.ratio - rejected.ratio - 1 / (2 * tau)) ** 2


def ipo_mean(chosen: Side, rejected: Side, *, tau: float = 0.1) -> Tensor:
    """IPO on per-token means: (a_w/n_w - a_l/n_l - 1/(2 tau))^2.  arXiv:2310.12036 in the form that TRL's `ipo` computes.

    1/(2 tau) = 5 and the mean gap is .75, 0, -1.5: 4.25^2 = 18.0625; 25; 6.5^2 = 42.25.

    >>> ipo_mean(*WORKED)
    tensor([18.0625, 25.0000, 42.2500], dtype=torch.float64)
    """
    return (chosen.mean_ratio - rejected.mean_ratio - 1 / (2 * tau)) ** 2


def hinge(chosen: Side, rejected: Side, *, beta: float = 0.05) -> Tensor:
    """SLiC on normalised likelihoods (RSO's hinge-norm): max(0, 1 - beta (a_w - a_l)).  arXiv:2309.06657.

    beta = .05 and D = 2, 0, -3: 1 - .1; 1; 1 + .15.

    >>> hinge(*WORKED)
    tensor([0.9000, 1.0000, 1.1500], dtype=torch.float64)
    """
    return F.relu(1 - beta * (chosen.ratio - rejected.ratio))


def sigmoid_norm(chosen: Side, rejected: Side, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: -ls(beta (a_w/n_w - a_l/n_l)).  Tulu 3, arXiv:2411.15124. beta is per token.

    beta = 5 and the mean gap is .75, 0, -1.5: log(1 + e^-3.75) = .023245; ln 2; log(1 + e^7.5) = 7.500553.

    >>> sigmoid_norm(*WORKED)
    tensor([0.0232, 0.6931, 7.5006], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.mean_ratio - rejected.mean_ratio))


def simpo(chosen: Side, rejected: Side, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: -ls(beta (log pi_w/n_w - log pi_l/n_l) - gamma).  Eq. 6 of arXiv:2405.14734. Needs no reference.

    gamma is the target margin inside the sigmoid, in reward units; the authors' code sets gamma_beta_ratio = gamma/beta.
    The mean gap is .25, 1, .5, so the argument is -.5, 1, 0: log(1 + e^.5) = .974077; log(1 + e^-1) = .313262; ln 2.

    >>> simpo(*WORKED)
    tensor([0.9741, 0.3133, 0.6931], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.mean_policy - rejected.mean_policy) - gamma)


def nll(chosen: Side, rejected: Side) -> Tensor:
    """Negative log-likelihood of the chosen response, per token: -log pi_w / n_w.  The added term of arXiv:2404.19733.

    For weighted sums (`sigmoid+0.1*nll`); alone it is fine-tuning on the preferred answers (Preferred-FT).
    log pi_w = -2, -3, -6 over 2, 3, 4 tokens: 1; 1; 1.5.

    >>> nll(*WORKED)
    tensor([1.0000, 1.0000, 1.5000], dtype=torch.float64)
    """
    return -chosen.mean_policy


def exo(chosen: Side, rejected: Side, *, beta: float = 0.1, epsilon: float = 0.001) -> Tensor:
    """EXO on pairs: q [ls(m) - ln(1-e)] + (1-q) [ls(-m) - ln e], q = sigmoid(m), e = epsilon.  Eq. 16 of arXiv:2402.00856.

    The reverse KL from (q, 1-q) to the softened label (1-e, e); e = 0 has no finite value.
    m = .2, 0, -.3: q = .549834, .5, .425557 and ln(.999/.001) = 6.906755, so the value is -entropy(q) - q ln .999 - (1-q) ln .001:
    -.688172 + .000550 + 3.109635; -.693147 + .000500 + 3.453878; -.682021 + .000426 + 3.968112.

    >>> exo(*WORKED)
    tensor([2.4220, 2.7612, 3.2865], dtype=torch.float64)
    """
    margin = beta * (chosen.ratio - rejected.ratio)
    right, wrong = F.logsigmoid(margin) - math.log1p(-epsilon), F.logsigmoid(-margin) - math.log(epsilon)
    return torch.sigmoid(margin) * right + torch.sigmoid(-margin) * wrong


def nca(chosen: Side, rejected: Side, *, beta: float = 0.01) -> Tensor:
    """NCA on pairs: -ls(beta a_w) - ls(-beta a_w)/2 - ls(-beta a_l)/2.  arXiv:2402.05369.

    beta a_w = .01, 0, -.02 and beta a_l = -.01, 0, .01, and -ls(z) = ln 2 - z/2 + z^2/8 to 1e-9 here: .688160 + .349080 + .344080;
    2 ln 2; .703197 + .341599 + .349080.

    >>> nca(*WORKED)
    tensor([1.3813, 1.3863, 1.3939], dtype=torch.float64)
    """
    good, bad = beta * chosen.ratio, beta * rejected.ratio
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_biased(chosen: Side, rejected: Side, *, beta: float = 0.01) -> Tensor:
    """BCO without its shift: -ls(beta a_w) - ls(-beta a_l).  What TRL >= 0.29 calls `bco_pair`; `bco` is the paper's.

    beta a_w = .01, 0, -.02 and beta a_l = -.01, 0, .01: 2 * .688160; 2 ln 2; .703197 + .698160.

    >>> bco_biased(*WORKED)
    tensor([1.3763, 1.3863, 1.4014], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * chosen.ratio) - F.logsigmoid(-beta * rejected.ratio)


def sppo_hard(chosen: Side, rejected: Side, *, beta: float = 0.001) -> Tensor:
    """SPPO with hard labels: (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2.  Eq. 4.7 of arXiv:2405.00675, beta = 1/eta.

    1/(2 beta) = 500: 499^2 + 499^2; 500^2 + 500^2; 502^2 + 501^2.

    >>> sppo_hard(*WORKED)
    tensor([498002., 500000., 503005.], dtype=torch.float64)
    """
    return (chosen.ratio - 1 / (2 * beta)) ** 2 + (rejected.ratio + 1 / (2 * beta)) ** 2


def apo_zero(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """APO-zero: 1 - sigmoid(beta a_w) + sigmoid(beta a_l).  Eq. 7 of arXiv:2408.06266. For answers better than the model's own.

    beta a_w = .1, 0, -.2 and beta a_l = -.1, 0, .1: .475021 + .475021; 1; .549834 + .524979.

    >>> apo_zero(*WORKED)
    tensor([0.9500, 1.0000, 1.0748], dtype=torch.float64)
    """
    return torch.sigmoid(-beta * chosen.ratio) + torch.sigmoid(beta * rejected.ratio)


def apo_down(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Tensor:
    """APO-down: sigmoid(beta a_w) + 1 - sigmoid(m).  Eq. 8 of arXiv:2408.06266. For answers worse than the model's own.

    beta a_w = .1, 0, -.2 and m = .2, 0, -.3: .524979 + .450166; 1; .450166 + .574443.

    >>> apo_down(*WORKED)
    tensor([0.9751, 1.0000, 1.0246], dtype=torch.float64)
    """
    return torch.sigmoid(beta * chosen.ratio) + torch.sigmoid(-beta * (chosen.ratio - rejected.ratio))


def discopop(chosen: Side, rejected: Side, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """DiscoPOP (LRML): (1-s) (-ls(m)) + s exp(-m), s = sigmoid(m/tau).  Eq. 5 of arXiv:2406.08414. Not convex.

    m = .1, 0, -.15, so s = sigmoid(2) = .880797, .5, sigmoid(-3) = .047426: .119203 * .644397 + .880797 * .904837;
    (ln 2 + 1)/2; .952574 * .770957 + .047426 * 1.161834.

    >>> discopop(*WORKED)
    tensor([0.8738, 0.8466, 0.7895], dtype=torch.float64)
    """
    margin = beta * (chosen.ratio - rejected.ratio)
    # s exp(-m) as one exponential: for m far below zero s is 0 and exp(-m) infinite.
    return -torch.sigmoid(-margin / tau) * F.logsigmoid(margin) + torch.exp(F.logsigmoid(margin / tau) - margin)


def dpop(chosen: Side, rejected: Side, *, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """DPO-Positive: -ls(beta (a_w - a_l - lam max(0, -a_w))).  Smaug, arXiv:2402.13228.

    Only the third a_w is below zero: beta (2), beta (0), beta (-3 - 50 * 2) = .6, 0, -30.9.

    >>> dpop(*WORKED)
    tensor([ 0.4375,  0.6931, 30.9000], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.ratio - rejected.ratio - lam * F.relu(-chosen.ratio)))


def cal_dpo(chosen: Side, rejected: Side, *, beta: float = 0.1, lam: float = 0.5) -> Tensor:
    """Cal-DPO: -ls(a_w - a_l) + lam [(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2].  arXiv:2412.14516. No beta in the first term.

    1/(2 beta) = 5: .126928 + (16 + 16)/2; ln 2 + (25 + 25)/2; 3.048587 + (49 + 36)/2.

    >>> cal_dpo(*WORKED)
    tensor([16.1269, 25.6931, 45.5486], dtype=torch.float64)
    """
    return -F.logsigmoid(chosen.ratio - rejected.ratio) + lam * sppo_hard(chosen, rejected, beta=beta)


def r_dpo(chosen: Side, rejected: Side, *, beta: float = 0.1, per_token: float = 0.05) -> Tensor:
    """R-DPO: -ls(m + per_token (n_w - n_l)).  arXiv:2403.19159. The sign that takes a bonus for length out of the reward.

    Judges who like length pay per_token nats a token: r = beta a + per_token n. n_w - n_l = -2, -1, 3: .2 - .1; -.05; -.3 + .15.

    >>> r_dpo(*WORKED)
    tensor([0.6444, 0.7185, 0.7710], dtype=torch.float64)
    """
    return -F.logsigmoid(beta * (chosen.ratio - rejected.ratio) + per_token * (chosen.length - rejected.length))
