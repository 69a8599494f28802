"""Problems small enough to be solved exactly, and a model that is a table: what every loss and estimator is proved against.

One prompt, enumerated responses, float64: partition function, optimum, KL, frontier, preference probabilities, population losses,
best-of-n. Where gradients are wanted the functions take and return torch tensors; else numpy. `TableModel` runs the same
numbers through the code that real models run through. Logs are natural, rewards are in Bradley-Terry logits, `beta` is the KL
weight. Imports numpy, scipy, torch and `losses`.

    >>> optimum(B4, beta=1.0).round(4)
    array([0.1751, 0.357 , 0.1444, 0.3235])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logsumexp
from torch import Tensor, nn

from .losses import LOSSES, Loss, Side, expected
from .losses import arguments as defaults
from .losses.lists import Rankings
from .losses.values import Draws

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt with n responses. reference: (n,) probabilities, positive. reward: (n,), Bradley-Terry logits."""

    reference: np.ndarray
    reward: np.ndarray

    def __post_init__(self) -> None:
        if self.reference.shape != self.reward.shape or not math.isclose(self.reference.sum(), 1) or (self.reference <= 0).any():
            raise ValueError(f"a reference of positive probabilities that sum to 1 is needed, got {self.reference}")


# ---- the KL-constrained objective: max over pi of E_pi[r] - beta KL(pi||ref) -----------------------------------------------


def log_partition(problem: Problem, *, beta: float) -> float:
    """log Z = log sum_y ref(y) exp(r(y)/beta)."""
    return float(logsumexp(problem.reward / beta, b=problem.reference))


def optimum(problem: Problem, *, beta: float) -> np.ndarray:
    """pi* = ref exp(r/beta) / Z, (n,).  Eq. 4 of arXiv:2305.18290."""
    return problem.reference * np.exp(problem.reward / beta - log_partition(problem, beta=beta))


def soft_value(problem: Problem, *, beta: float) -> float:
    """V = beta log Z: the largest value of the objective, and the f(x) in r = beta log(pi*/ref) + f(x)."""
    return beta * log_partition(problem, beta=beta)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p||q) = sum p log(p/q), nats; 0 log 0 = 0; infinite where p has mass that q has not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum())


def objective(problem: Problem, policy: np.ndarray, *, beta: float) -> float:
    """J = E_pi[r] - beta KL(pi||ref)."""
    return float(policy @ problem.reward) - beta * kl(policy, problem.reference)


def frontier(problem: Problem, betas: Sequence[float]) -> np.ndarray:
    """The most reward for each KL: rows (KL(pi*||ref), E_pi*[r]), one per beta, (len(betas), 2)."""
    optima = [optimum(problem, beta=b) for b in betas]
    return np.array([(kl(p, problem.reference), p @ problem.reward) for p in optima])


# ---- preferences -----------------------------------------------------------------------------------------------------------


def bradley_terry(strength: np.ndarray) -> np.ndarray:
    """P[i, j] = P(i beats j) = sigmoid(s_i - s_j), (n, n)."""
    return expit(strength[:, None] - strength[None, :])


def plackett_luce(strength: np.ndarray, order: Sequence[int]) -> float:
    """P(order, best first) = prod_k exp(s_k) / sum_{j >= k} exp(s_j)."""
    s = strength[list(order)]
    return float(np.exp(sum(s[k] - logsumexp(s[k:]) for k in range(len(s)))))


def sample_pairs(strength: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """(count, 2) rows (winner, loser): two different responses, uniformly, judged by Bradley-Terry."""
    rng = np.random.default_rng(seed)
    first = rng.integers(len(strength), size=count)
    second = (first + rng.integers(1, len(strength), size=count)) % len(strength)
    wins = rng.random(count) < expit(strength[first] - strength[second])
    return np.where(wins[:, None], np.stack([first, second], 1), np.stack([second, first], 1))


def sample_orders(strength: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """(count, n) rankings, best first, from Plackett-Luce: sort strength plus Gumbel noise."""
    noise = np.random.default_rng(seed).gumbel(size=(count, len(strength)))
    return np.argsort(-(strength + noise), axis=1)


def all_pairs(n: int) -> Pairs:
    """Every i < j."""
    return list(itertools.combinations(range(n), 2))


def population_loss(name: str, log_policy: Tensor, problem: Problem, *, pairs: Pairs | None = None,
                    weights: Sequence[float] | None = None, lengths: Sequence[int] | None = None,
                    prob: Sequence[float] | None = None, **arguments: float) -> Tensor:
    """Any loss of the table in expectation over its labels: the mean over pairs (i, j) of P_ij f(i,j) + (1-P_ij) f(j,i). ()

    A loss over rankings reads every order of all n responses, by default with its Plackett-Luce probability.
    A verdict loss reads both sides of every judged pair (winner desirable, loser not) at baseline 0. For losses that look at tokens, the
    first token of a response names it and the rest are forced. Losses over scores see the rewards themselves, an ensemble two that agree;
    losses over samples see each response as often as the reference draws it; a value model says the true value.

    Args:
        log_policy: (n,) log pi; gradients flow into it. pairs: default every i < j. weights: of the pairs; default equal.
        lengths: tokens of each response; default 1. prob: P(i beats j) of each pair; default Bradley-Terry. For rankings
            the weight of each of `itertools.permutations(range(n))`.
    """
    loss = LOSSES[name]
    reference = torch.from_numpy(np.log(problem.reference))
    length = torch.ones_like(reference) if lengths is None else torch.tensor(lengths, dtype=torch.float64)
    if loss.kind in ("values", "draws"):
        return _over_responses(loss, Side(log_policy, reference, length, score=torch.from_numpy(problem.reward)), arguments)
    if loss.kind in ("lists", "orders"):
        return _over_orders(loss, Side(log_policy, reference, length), problem.reward, prob, arguments)
    pairs = all_pairs(len(problem.reward)) if pairs is None else pairs
    i, j = torch.tensor(pairs).T
    true = torch.from_numpy(bradley_terry(problem.reward))[i, j] if prob is None else torch.tensor(prob, dtype=torch.float64)
    weight = torch.ones_like(true) if weights is None else torch.tensor(weights, dtype=torch.float64)

    collision = (2 * log_policy).logsumexp(0).detach().expand(len(length))
    score = torch.from_numpy(problem.reward)
    side = Side(log_policy, reference, length, tokens=(log_policy - reference)[:, None], collision=collision, score=score,
                member=torch.stack([score, score], 1),
                kl=(reference.exp() * (reference - log_policy)).sum().expand(len(length)),
                value=torch.full_like(length, soft_value(problem, beta=(defaults(name) | arguments).get("beta", 1.0))),
                classes=torch.stack([torch.zeros_like(log_policy), -log_policy, log_policy], 1))  # fmt: skip
    if loss.kind == "scored":
        return (weight * loss.function(side[i], side[j], **arguments)).sum() / weight.sum()
    if loss.kind in ("grades", "classes"):
        return (reference.exp() * loss.function(side, **arguments)).sum()
    if loss.kind == "pairs":
        drawn = replace(loss, soft="swap")  # P_ij is how often i is said to win: labels themselves are hard
        return expected(drawn, side[i], side[j], true, weight, **arguments) / weight.sum()
    good, bad, zero = torch.ones(len(i), dtype=torch.bool), torch.zeros(len(i), dtype=torch.bool), torch.zeros(())

    def judged(winner: Tensor, loser: Tensor) -> Tensor:
        pair = loss.function(side[winner], good, zero, **arguments) + loss.function(side[loser], bad, zero, **arguments)
        return pair / 2

    values = true * judged(i, j) + (1 - true) * judged(j, i)
    return (weight * values).sum() / weight.sum()


def _over_responses(loss: Loss, side: Side, arguments: Mapping[str, float]) -> Tensor:
    """The mean of a loss over responses that are drawn as often as the reference says: so its Z, and the mean over samples, are exact."""
    assert side.reference is not None
    often = side.reference.exp()
    draws = (Draws(torch.zeros(len(often), dtype=torch.long), often),) if loss.kind == "values" else ()
    return (often * loss.function(side, *draws, **arguments)).sum()


def _over_orders(loss: Loss, side: Side, reward: np.ndarray, weight: Sequence[float] | None, arguments: Mapping[str, float]) -> Tensor:
    """The mean of a list loss over all orders, best first."""
    orders = list(itertools.permutations(range(len(reward))))
    votes = torch.tensor([plackett_luce(reward, o) for o in orders] if weight is None else weight, dtype=torch.float64)
    tier = torch.arange(len(reward)).repeat(len(orders))
    rankings = Rankings(torch.arange(len(orders)).repeat_interleave(len(reward)), tier)
    return (votes * loss.function(side[torch.tensor(orders).flatten()], rankings, **arguments)).sum() / votes.sum()


def minimise(function: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 200) -> Tensor:
    """Minimiser of a smooth convex function by Newton with halving; null directions stay where they were. For float64."""
    theta = start.clone()
    for _ in range(steps):
        gradient = torch.autograd.functional.jacobian(function, theta)
        step = torch.linalg.pinv(torch.autograd.functional.hessian(function, theta), hermitian=True, rtol=1e-12) @ gradient
        here, size = function(theta), 1.0
        while function(theta - size * step) > here and size > 1e-9:
            size /= 2
        theta = theta - size * step
        if step.abs().max() < 1e-13:
            break
    return theta


# ---- policies without training ---------------------------------------------------------------------------------------------


def best_of_n(problem: Problem, n: int) -> np.ndarray:
    """The best of n reference samples: F(y)^n - F^-(y)^n over reward levels; a tie goes to a random tied draw. (n,)"""
    _, level = np.unique(problem.reward, return_inverse=True)
    mass = np.bincount(level, weights=problem.reference)
    top = np.cumsum(mass)
    return ((top**n - (top - mass) ** n) / mass)[level] * problem.reference


def best_of_n_bound(n: int) -> float:
    """log n - (n-1)/n: at least KL(best of n||ref), equal to it only without atoms.  arXiv:2401.01879."""
    return math.log(n) - (n - 1) / n


def soft_best_of_n(problem: Problem, n: int, *, temperature: float) -> np.ndarray:
    """Draw n from the reference, keep one with softmax(r/temperature), (n,): exact, by enumeration of what was drawn."""
    size, out = len(problem.reward), np.zeros(len(problem.reward))
    tilt = np.exp((problem.reward - problem.reward.max()) / temperature)
    for drawn in itertools.combinations_with_replacement(range(size), n):
        count = np.bincount(drawn, minlength=size)
        ways = math.factorial(n) / math.prod(math.factorial(c) for c in count)
        kept = count * tilt
        out += ways * np.prod(problem.reference**count) * kept / kept.sum()
    return out


def preferred_ft(problem: Problem) -> np.ndarray:
    """What fine-tuning on winners of pairs from the reference converges to: 2 ref(y) sum_y' ref(y') sigmoid(r_y - r_y'), (n,)."""
    return 2 * problem.reference * (bradley_terry(problem.reward) @ problem.reference)


# ---- token level -----------------------------------------------------------------------------------------------------------

EOS, BOS, LIMIT = 2, 3, 3
"""T3's tokens are 0, 1 and EOS = 2; EOS is forced after LIMIT others. BOS = 3 is the whole prompt and is never predicted."""


def _strings(longest: int) -> tuple[tuple[int, ...], ...]:
    """Every string of tokens 0 and 1 of at most this length, shortest first."""
    return tuple(p for n in range(longest + 1) for p in itertools.product((0, 1), repeat=n))


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """Testbed T3: every response of at most three tokens 0 or 1 and an end.

    Args:
        policy, reference: (7, 3) float64 logits, one row per prefix in `prefixes`.
        token_reward: (3,) reward of each token; a response's reward is the sum.
    """

    policy: Tensor
    reference: Tensor
    token_reward: Tensor
    prefixes: tuple[tuple[int, ...], ...] = _strings(LIMIT - 1)
    sequences: tuple[tuple[int, ...], ...] = tuple((*p, EOS) for p in _strings(LIMIT))

    @property
    def reward(self) -> Tensor:
        """(15,)"""
        return torch.stack([self.token_reward[list(s)].sum() for s in self.sequences])

    @property
    def lengths(self) -> Tensor:
        """(15,) chosen tokens: a forced end is not counted."""
        return torch.tensor([min(len(s), LIMIT) for s in self.sequences], dtype=torch.float64)

    @property
    def visits(self) -> Tensor:
        """(15, 7) 1 where the prefix was stood on."""
        stood = [[len(p) < len(s) and s[: len(p)] == p for p in self.prefixes] for s in self.sequences]
        return torch.tensor(stood, dtype=torch.float64)

    def token_logps(self, logits: Tensor) -> Tensor:
        """(15, 7) log pi(token taken at the prefix), 0 at prefixes that were not stood on. Differentiable."""
        taken = torch.tensor([[s[len(p)] if len(p) < len(s) else 0 for p in self.prefixes] for s in self.sequences])
        return logits.log_softmax(-1)[torch.arange(len(self.prefixes)), taken] * self.visits

    def logps(self, logits: Tensor) -> Tensor:
        """(15,) log pi(y)."""
        return self.token_logps(logits).sum(-1)

    def problem(self) -> Problem:
        """The same as 15 responses without inner structure."""
        return Problem(self.logps(self.reference).exp().numpy(), self.reward.numpy())

    def prefix_kl(self, logits: Tensor) -> Tensor:
        """(7,) KL(pi(.|s)||ref(.|s)), nats."""
        log_pi = logits.log_softmax(-1)
        return (log_pi.exp() * (log_pi - self.reference.log_softmax(-1))).sum(-1)

    def reach(self, logits: Tensor) -> Tensor:
        """(7,) probability that pi stands on each prefix; KL(pi||ref) = reach . prefix_kl."""
        return self.logps(logits).exp() @ self.visits

    def kl_estimates(self, logits: Tensor) -> dict[str, Tensor]:
        """What each estimator of KL(pi||ref) says on each of the 15 responses, (15,); they are drawn from pi."""
        token = self.token_logps(logits) - self.token_logps(self.reference)
        total = token.sum(-1)
        return {"k1": total, "k2": total**2 / 2, "k3": torch.exp(-total) - 1 + total,
                "k2 per token": (token**2 / 2).sum(-1), "k3 per token": (torch.exp(-token) - 1 + token).sum(-1),
                "rao-blackwell": self.visits @ self.prefix_kl(logits)}

    def soft_values(self, *, beta: float) -> tuple[Tensor, Tensor]:
        """V = beta log E_ref[exp(reward to come / beta)] at each prefix, (7,); and log pi*(token|prefix), (7, 3)."""
        value, index = torch.zeros(len(self.prefixes), dtype=torch.float64), {p: k for k, p in enumerate(self.prefixes)}
        log_ref, after = self.reference.log_softmax(-1), torch.zeros(len(self.prefixes), 3, dtype=torch.float64)
        for prefix in reversed(self.prefixes):
            row = index[prefix]
            for token in (0, 1):
                # An end, and three tokens, leave nothing to come.
                after[row, token] = value[index[*prefix, token]] if (*prefix, token) in index else 0.0
            value[row] = beta * (log_ref[row] + (self.token_reward + after[row]) / beta).logsumexp(-1)
        return value, log_ref + (self.token_reward + after - value[:, None]) / beta


def _t3() -> TokenProblem:
    identity, token = np.arange(7)[:, None] + 1, np.arange(3)
    policy, reference = np.sin(1.3 * identity + 0.7 * token), np.cos(0.9 * identity + 1.1 * token)
    return TokenProblem(*(torch.from_numpy(a) for a in (policy, reference, np.array([1.0, -0.5, 0.0]))))


# ---- testbeds --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contests:
    """Games between players. wins: (n, n), wins[i, j] = i beat j. ties: (n, n), symmetric."""

    wins: np.ndarray
    ties: np.ndarray


B4 = Problem(np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 0.5, 2.0]))
T3 = _t3()
W3 = Contests(np.array([[0.0, 8, 5], [2, 0, 6], [5, 4, 0]]), np.array([[0.0, 4, 3], [4, 0, 2], [3, 2, 0]]))
"""B4: one prompt, four responses, the best is the rarest. T3: tokens. W3: three players."""


# ---- a table that is a model -----------------------------------------------------------------------------------------------


class TableDecoder(nn.Module):
    """The part below the head: a token's hidden state is one-hot at its chain of tokens, or zero where the table has none."""

    def __init__(self, chains: Sequence[tuple[int, ...]]):
        super().__init__()
        self.row = {chain: k for k, chain in enumerate(chains)}
        self.register_buffer("states", torch.eye(len(chains) + 1)[:, :-1], persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, segments: Any = None, **_: Any) -> SimpleNamespace:
        """Hidden states of rows of tokens.

        Args:
            input_ids: (B, T); B = 1 where a table of segments is given. position_ids: (B, T) or None; must count along the chain.
            segments: `.starts`, `.ends`, `.prefix`, S numbers each; None: a row is one causal sequence.

        Raises:
            AssertionError: a token's position is not its place in its chain (the batch was packed wrongly).
        """
        rows = []
        for b, tokens in enumerate(input_ids.tolist()):
            chains = causal_chains(tokens) if segments is None else segment_chains(tokens, segments)
            if position_ids is not None:
                places = [len(c) - 1 for c in chains]
                if position_ids[b].tolist() != places:
                    raise AssertionError(f"positions are {position_ids[b].tolist()}, their chains say {places}")
            rows.append([self.row.get(c, len(self.row)) for c in chains])
        return SimpleNamespace(last_hidden_state=self.states[torch.tensor(rows, device=self.states.device)])


def causal_chains(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """What each token of a row can see, itself included."""
    return [tuple(tokens[: t + 1]) for t in range(len(tokens))]


def segment_chains(tokens: Sequence[int], segments: Any) -> list[tuple[int, ...]]:
    """What each token can see under a segment table: its ancestors' tokens and its own segment up to itself."""
    chains: list[tuple[int, ...]] = [()] * len(tokens)
    for start, end, prefix in zip(segments.starts, segments.ends, segments.prefix, strict=True):
        above = chains[int(segments.ends[int(prefix)]) - 1] if int(prefix) >= 0 else ()
        for t in range(int(start), int(end)):
            chains[t] = (*above, *tokens[int(start) : t + 1])
    return chains


class TableModel(nn.Module):
    """A causal language model whose head is a trainable table of logits: one row of numbers per chain of tokens.

    It has what the real code asks of a Hugging Face model (`get_decoder`, `get_output_embeddings`, `config`, `.logits`), so that
    exact values can be demanded of packing, reading, losses and steps. Training it is tabular softmax.
    """

    reads_segments = True

    def __init__(self, chains: Sequence[tuple[int, ...]], table: Tensor):
        """chains: D chains of tokens, prompt included. table: (D, V) logits of the next token; its dtype is the model's."""
        super().__init__()
        self.model = TableDecoder(chains).to(table.dtype)
        self.lm_head = nn.Linear(len(chains), table.shape[1], bias=False, dtype=table.dtype)
        self.lm_head.weight.data.copy_(table.T)
        self.config = SimpleNamespace(model_type="table", vocab_size=table.shape[1], hidden_size=len(chains), num_hidden_layers=0)

    @classmethod
    def from_logits(cls, logits: Mapping[tuple[int, ...], Sequence[float]], *, prompt: tuple[int, ...] = (BOS,),
                    dtype: torch.dtype = torch.float64) -> TableModel:
        """From {response tokens so far: logits of the next token}; `prompt` stands before every chain."""
        return cls([(*prompt, *prefix) for prefix in logits], torch.tensor([list(row) for row in logits.values()], dtype=dtype))

    @classmethod
    def from_t3(cls, logits: Tensor, *, dtype: torch.dtype = torch.float64) -> TableModel:
        """T3 with these (7, 3) logits; after three tokens the end has log-prob exactly 0."""
        rows = {prefix: row for prefix, row in zip(T3.prefixes, logits.tolist(), strict=True)}
        # -1e4, not -inf: its probability is an exact zero all the same, and 0 * log 0 stays a number.
        forced = {prefix: (-1e4, -1e4, 0.0) for prefix in itertools.product((0, 1), repeat=LIMIT)}
        return cls.from_logits({**rows, **forced}, dtype=dtype)

    @classmethod
    def t3_policy(cls) -> TableModel:
        return cls.from_t3(T3.policy)

    @classmethod
    def t3_reference(cls) -> TableModel:
        return cls.from_t3(T3.reference)

    def get_decoder(self) -> TableDecoder:
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, segments: Any = None, **_: Any) -> SimpleNamespace:
        """(B, T) ids -> `.logits` (B, T, V)."""
        hidden = self.model(input_ids, position_ids, segments).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden), last_hidden_state=hidden)
