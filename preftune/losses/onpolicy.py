"""What on-policy training computes per token, per response or per group: advantages, clipped losses, KL estimates and their control.

Pure functions, unreduced: nobody here samples, scores or averages over a step. `log_ratio` is log pi - log pi_old (what a step moves) or
log pi - log ref (what the KL is about), in nats; `shown` (R, T) says which places of a row of tokens are tokens of the response. Rewards
are higher is better. Torch only. Try it: `pytest preftune/losses/onpolicy.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import _row

__all__ = ["adaptive_kl", "clipped_policy", "clipped_value", "gae", "group", "k1", "k2", "k3", "kl_in_reward", "rloo", "truncated",
           "whiten"]  # fmt: skip

EPSILON = 1e-8  # below a variance, so that equal values whiten to 0 and not to NaN
SHOWN = torch.tensor([[True, True, True], [True, True, False]])
"""Two responses for hand work, of three tokens and of two."""
MOVED = _row(0.5, 0, -1)
"""Three log-ratios for hand work, nats."""


def kl_in_reward(score: Tensor, log_ratio: Tensor, shown: Tensor, *, beta: float) -> Tensor:
    """Reward of each token: -beta (log pi_old - log ref)_t, and the response's score at its last token.  arXiv:1909.08593 eq. 2. (R, T)

    With reward-to-go this is the exact gradient of E[r] - beta KL(pi||ref), which k1 as a loss (gradient 0) and k3 as a loss (forward KL)
    are not.

    Args:
        score: (R,). log_ratio: (R, T), anything outside `shown`.

    beta .1: -.02, 0, .05 + 1; -.1, .1 + 2.

    >>> kl_in_reward(_row(1, 2), torch.stack([_row(.2, 0, -.5), _row(1, -1, 9)]), SHOWN, beta=0.1)
    tensor([[-0.0200,  0.0000,  1.0500],
            [-0.1000,  2.1000,  0.0000]], dtype=torch.float64)
    """
    last = shown & ~torch.cat([shown[:, 1:], shown.new_zeros(len(shown), 1)], dim=1)
    return torch.where(shown, -beta * log_ratio, 0) + torch.where(last, score[:, None], 0)


def gae(reward: Tensor, value: Tensor, shown: Tensor, *, discount: float, lam: float) -> Tensor:
    """Generalised advantages: A_t = d_t + discount lam A_{t+1}, d_t = R_t + discount V_{t+1} - V_t, V = 0 after the end.  arXiv:1506.02438
    eq. 16. (R, T), 0 outside `shown`. Returns, which the value is trained on, are A + V.

    lam = 1: the rewards to come less the value. lam = 0: d_t.
    d = 0, 0, .5, so A = .125, .25, .5; d = -1, 2, so A = -1 + .5 * 2, 2.

    >>> value = torch.stack([_row(.5, .5, .5), _row(1, 0, 9)])
    >>> gae(torch.stack([_row(0, 0, 1), _row(0, 2, 9)]), value, SHOWN, discount=1.0, lam=0.5)
    tensor([[0.1250, 0.2500, 0.5000],
            [0.0000, 2.0000, 0.0000]], dtype=torch.float64)
    """
    reward, value = torch.where(shown, reward, 0), torch.where(shown, value, 0)
    out, coming, after = torch.zeros_like(value), torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        coming = torch.where(shown[:, t], reward[:, t] + discount * after - value[:, t] + discount * lam * coming, 0)
        out[:, t], after = coming, value[:, t]
    return out


def whiten(values: Tensor, shown: Tensor, *, shift: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over what is shown; without `shift` the mean is put back.  As OpenAI's lm-human-preferences
    and its descendants do it, over a whole round of rollouts at once. Same shape, 0 outside `shown`; equal values become 0.

    1, 2, 3, 4, 5: mean 3, variance 2, so (x - 3) / 1.414214.

    >>> whiten(torch.stack([_row(1, 2, 3), _row(4, 5, 99)]), SHOWN)
    tensor([[-1.4142, -0.7071,  0.0000],
            [ 0.7071,  1.4142,  0.0000]], dtype=torch.float64)
    """
    seen = values[shown]
    mean, variance = seen.mean(), seen.var(unbiased=False)
    return torch.where(shown, (values - mean) * (variance + EPSILON).rsqrt() + (0 if shift else mean), 0)


def rloo(reward: Tensor) -> Tensor:
    """Leave-one-out: A_i = R_i - mean of the prompt's other rewards = K/(K-1) (R_i - mean).  arXiv:2402.14740 eq. 8. (P, K) -> (P, K)

    1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5.

    >>> rloo(_row(1, 2, 6)[None])
    tensor([[-3.0000, -1.5000,  4.5000]], dtype=torch.float64)
    """
    count = reward.shape[1]
    return count / (count - 1) * (reward - reward.mean(1, keepdim=True))


def group(reward: Tensor) -> Tensor:
    """GRPO: A_i = (R_i - mean) / (standard deviation + 1e-4) over a prompt's K rewards.  arXiv:2402.03300, section 4.1; the 1e-4 is
    TRL's. (P, K) -> (P, K); equal rewards become 0.

    1, 2, 6: mean 3, deviations -2, -1, 3, variance 14/2 = 7, so over 2.645851.

    >>> group(_row(1, 2, 6)[None])
    tensor([[-0.7559, -0.3780,  1.1339]], dtype=torch.float64)
    """
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


def truncated(log_ratio: Tensor, *, cap: float) -> Tensor:
    """min(pi_old / mu, cap): the weight of an answer that mu drew in the place of pi_old, log_ratio = log pi_old(y) - log mu(y).  Truncated
    importance sampling (E. Ionides, 2008). Same shape.

    Of whole answers and without a cap the weighted gradient is exactly that of answers of pi_old; a cap bounds its variance, at the price
    of counting less what mu says too seldom.

    >>> truncated(MOVED, cap=1.5)
    tensor([1.5000, 1.0000, 0.3679], dtype=torch.float64)
    """
    return log_ratio.exp().clamp(max=cap)


def clipped_policy(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """max(-A q, -A clamp(q, 1 - clip, 1 + clip)), q = pi / pi_old: a step gains nothing by moving further than the clip.  arXiv:1707.06347
    eq. 7. Same shape, per token or per response.

    q = 1.5, 1.5, .5: with A = 1 the clip holds (-1.2); with A = -1 it does not (1.5); with A = -1 and q below it holds (.8).

    >>> clipped_policy(_row(1.5, 1.5, .5).log(), _row(1, -1, -1), clip=0.2)
    tensor([-1.2000,  1.5000,  0.8000], dtype=torch.float64)
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def clipped_value(value: Tensor, before: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2.  As in OpenAI's baselines and lm-human-preferences. Same shape.

    V_old = 0, clip .2. V = 1 at R = 1: the clamped .2 is .8 away. V = .1 at R = 1: .9. V = -1 at R = 1: 2.

    >>> clipped_value(_row(1, .1, -1), _row(0, 0, 0), _row(1, 1, 1), clip=0.2)
    tensor([0.3200, 0.4050, 2.0000], dtype=torch.float64)
    """
    held = before + (value - before).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (held - returns) ** 2) / 2


def k1(log_ratio: Tensor) -> Tensor:
    """L = log pi - log ref on samples of pi: unbiased for KL(pi||ref), of either sign; as a loss its gradient is 0 on average.

    >>> k1(MOVED)
    tensor([ 0.5000,  0.0000, -1.0000], dtype=torch.float64)
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """L^2 / 2: biased; as a loss on whole responses its mean gradient is that of KL(pi||ref).  J. Schulman, Approximating KL divergence.

    >>> k2(MOVED)
    tensor([0.1250, 0.0000, 0.5000], dtype=torch.float64)
    """
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^-L - 1 + L: unbiased, never negative; as a loss on whole responses its mean gradient is that of KL(ref||pi), the other KL.

    e^-.5 - .5 = .106531; 0; e - 2 = .718282.

    >>> k3(MOVED)
    tensor([0.1065, 0.0000, 0.7183], dtype=torch.float64)
    """
    return torch.exp(-log_ratio) - 1 + log_ratio


def adaptive_kl(beta: float, kl: float, *, target: float, horizon: float, count: int) -> float:
    """beta (1 + clamp(KL / target - 1, -.2, .2) count / horizon): the KL weight after `count` more responses.  arXiv:1909.08593, 2.2.

    Args:
        kl: mean nats per response of this round. horizon: responses over which the weight may change about e^.2-fold.

    KL twice the target: clamped to .2, so .1 (1 + .2 * 100 / 1000). A tenth below it: .1 (1 - .1 * .1).

    >>> [round(adaptive_kl(0.1, kl, target=6.0, horizon=1000, count=100), 6) for kl in (12.0, 5.4)]
    [0.102, 0.099]
    """
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * count / horizon)
