"""What a step minimises: columns from a batch, terms from columns, each term with the name of its denominator.

`score(model, batch)` gives per-response columns; `terms(columns, table)` sums per-item losses and names what they are divided by;
the engine divides by the whole step's totals, so any cut into micro-batches gives the same numbers. No loop, no optimiser here.

    objective = preference([(1.0, "sigmoid", {"beta": 0.1})])
    columns = objective.score(model, batch)
    total(objective.terms(columns, batch.table), step.totals)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch, Table
from .losses import LOSSES, Loss, Side, arguments, expected, votes
from .losses.lists import Rankings, agreement
from .losses.verdicts import baseline
from .readout import hidden_states, response_rows, response_sums, scalars, token_collisions, token_logps

Terms = Mapping[str, tuple[Tensor, str]]


Columns = Side  # what is known of all R responses of a batch or a step; `columns[rows]` are some of them


def join_columns(columns: Sequence[Columns]) -> Columns:
    """Columns of a step's batches as those of the whole step; rows of tokens are filled up to the longest."""
    parts = {f.name: [getattr(c, f.name) for c in columns] for f in fields(Columns)}
    if parts["tokens"][0] is not None:
        longest = max(x.shape[1] for x in parts["tokens"])
        parts["tokens"] = [F.pad(x, (0, longest - x.shape[1])) for x in parts["tokens"]]
    return Columns(**{name: None if x[0] is None else torch.cat(x) for name, x in parts.items()})


@dataclass(frozen=True)
class Objective:
    """What to minimise and what to report.

    Args:
        name: for logs. terms: (columns, table, carry) -> {name: (weighted sum, denominator)}.
        metrics: (columns, table) -> {name: one value per pair, verdict or list}; their means are reported, exact for any batch size.
        reads: 'lists', 'pairs', 'verdicts' or 'responses': what a record must have for this to learn from it.
        reference: 'none', 'token' or 'distribution': what the columns need.
        separable: whether terms are sums over items; otherwise a step of several micro-batches takes two forward passes.
        mismatched: whether the store must carry mismatched responses.
        needs: which columns beyond the sums are read: 'tokens', 'collision', 'score'.
        read: what stands in the column `policy`: 'logps', log pi(y|x); or 'scalar', the score of a reward model, whose reference is 0.
        start: (table, totals) -> the loss while policy = reference, or None where that depends on the policy.
        carry: named numbers that run over steps, before the first; the engine keeps them with the weights. `terms` gets them as they
            stand before its step, or None outside training. advance: (columns, table, carry) -> them after the step.
    """

    name: str
    terms: Callable[..., Terms]
    metrics: Callable[[Columns, Table], Mapping[str, Tensor]]
    reads: str
    reference: str
    separable: bool
    mismatched: bool
    start: Callable[[Table, Mapping[str, float]], float] | None
    needs: frozenset[str] = frozenset()
    read: str = "logps"
    carry: Mapping[str, float] = field(default_factory=dict)
    advance: Callable[[Columns, Table, Mapping[str, float]], dict[str, float]] = lambda columns, table, carry: {}

    def score(self, model: Any, batch: Batch) -> Columns:
        """Columns of a batch under the model, with gradient where grad is enabled."""
        hidden = hidden_states(model, batch)
        if self.read == "scalar":
            score = scalars(model, hidden, batch)
            length = response_sums(torch.ones_like(batch.target), batch)
            return Columns(score, torch.zeros_like(score), length, score=batch.table.score if "score" in self.needs else None)
        logps = token_logps(model, hidden, batch)
        reference = batch.columns["reference"] if self.reference != "none" else None
        return Columns(
            policy=response_sums(logps, batch), reference=None if reference is None else response_sums(reference, batch),
            length=response_sums(torch.ones_like(logps), batch).detach(),
            tokens=response_rows(logps.double() - reference, batch) if "tokens" in self.needs else None,
            collision=response_sums(token_collisions(model, hidden, batch), batch) if "collision" in self.needs else None)  # fmt: skip


def total(terms: Terms, totals: Mapping[str, float]) -> Tensor:
    """The step's loss: each term's sum over its own denominator. A denominator of zero (no such item) contributes nothing."""
    return torch.stack([value / totals[name] if totals[name] else value * 0 for value, name in terms.values()]).sum()


Part = tuple[float, str, Mapping[str, float]]


def preference(parts: Sequence[Part], *, label_smoothing: float = 0.0) -> Objective:
    """A weighted sum of losses of the table.

    Args:
        parts: (weight, loss name, those of its arguments that differ from their defaults).
        label_smoothing: e; labels p become (1-e) p + e (1-p).
    """
    named = [(weight, name, LOSSES[name], arguments(name) | dict(given)) for weight, name, given in parts]

    def judged(columns: Columns, table: Table) -> tuple[Columns, Columns, Tensor, Tensor]:
        """Both sides of every pair, P(chosen preferred) after smoothing, and votes."""
        prob = table.pair_prob * (1 - label_smoothing) + (1 - table.pair_prob) * label_smoothing
        return columns[table.pair[:, 0]], columns[table.pair[:, 1]], prob, table.pair_weight

    def terms(columns: Columns, table: Table, carry: Mapping[str, float] | None = None) -> Terms:
        out: dict[str, tuple[Tensor, str]] = {}
        for weight, name, loss, numbers in named:
            if loss.kind == "pairs":
                before = None if carry is None else {key: carry[f"{name}.{key}"] for key in loss.carry}
                value = expected(loss, *judged(columns, table), before, **numbers)
            else:
                seen, votes_of, _ = ITEMS[loss.kind]
                value = (loss.function(*seen(columns, table), **numbers) * votes_of(table)).sum()
            out[name] = (weight * value, loss.kind)
        return out

    def advance(columns: Columns, table: Table, carry: Mapping[str, float]) -> dict[str, float]:
        after = dict(carry)
        for _, name, loss, numbers in named:
            if loss.update and len(table.pair):  # a step without a pair teaches nothing of pairs
                before = {key: carry[f"{name}.{key}"] for key in loss.carry}
                found = loss.update(*votes(loss, *judged(columns, table)), before, **numbers)
                after |= {f"{name}.{key}": value for key, value in found.items()}
        return after

    needs = [loss.reference for _, _, loss, _ in named]

    def start(table: Table, totals: Mapping[str, float]) -> float:
        value = 0.0
        for weight, _, loss, numbers in named:
            assert loss.start is not None  # offered only where every loss has one
            if loss.kind == "pairs":
                value += weight * loss.start(numbers)
            else:
                _, votes_of, shapes = ITEMS[loss.kind]
                items = torch.tensor([loss.start(numbers, *shape) for shape in shapes(table)], dtype=torch.float64)
                value += weight * float((items * votes_of(table).cpu()).sum()) / totals[loss.kind]
        return value

    return Objective(
        name="+".join(name if weight == 1 else f"{weight:g}*{name}" for weight, name, _, _ in named), terms=terms,
        metrics=_preference_metrics(named),
        reads=min((READS.get(loss.kind, loss.kind) for _, _, loss, _ in named), key=("lists", "pairs", "verdicts").index),
        reference="token" if "token" in needs else "none",
        separable=all(loss.separable for _, _, loss, _ in named), mismatched=any(loss.mismatched for _, _, loss, _ in named),
        start=start if all(loss.start for _, _, loss, _ in named) else None,
        needs=frozenset(name for _, _, loss, _ in named for name in loss.needs),
        carry={f"{name}.{key}": value for _, name, loss, _ in named for key, value in loss.carry.items()}, advance=advance)  # fmt: skip


def _baseline(columns: Columns, table: Table) -> Tensor:
    """KTO's z0 of these records; zero where no mismatched response fits the window."""
    return baseline(columns[table.mismatched].ratio) if len(table.mismatched) else columns.policy.new_zeros(())


def _rankings(table: Table) -> Rankings:
    return Rankings(table.item_list, table.item_tier)


# Kind of a loss without soft labels -> (what its function takes, the votes of its items, what their start depends on).
ITEMS: Mapping[str, tuple[Callable[[Columns, Table], tuple], Callable[[Table], Tensor], Callable[[Table], list[tuple]]]] = {
    "verdicts": (lambda c, t: (c[t.verdict], t.verdict_good, _baseline(c, t)), lambda t: t.verdict_weight,
                 lambda t: [(good,) for good in t.verdict_good.tolist()]),
    **dict.fromkeys(("lists", "orders"),  # orders: a list of one tier is 0, and only their denominators differ
                    (lambda c, t: (c[t.item], _rankings(t)), lambda t: t.list_weight, lambda t: _rankings(t).shapes())),
}  # fmt: skip
READS = {"orders": "pairs"}  # a list that compares is a list with pairs


def _preference_metrics(named: Sequence[tuple[float, str, Loss, Mapping[str, float]]]) -> Callable[[Columns, Table], dict]:
    """TRL's names. Rewards are the first loss's beta (or tau) times what that loss reads; ties count half. Rankings add theirs."""
    _, _, loss, numbers = named[0]
    listed = any(loss.kind in ("lists", "orders") for _, _, loss, _ in named)
    scale = numbers.get("beta", numbers.get("tau", 1.0))

    def metrics(columns: Columns, table: Table) -> dict[str, Tensor]:
        if not len(table.pair):
            reward, want = scale * loss.reads(columns[table.verdict]), table.verdict_good
            return {"rewards/desirable": reward[want], "rewards/undesirable": reward[~want]}
        chosen, rejected = columns[table.pair[:, 0]], columns[table.pair[:, 1]]
        good, bad = scale * loss.reads(chosen), scale * loss.reads(rejected)
        wins = (good > bad).double() + 0.5 * (good == bad).double()
        values = {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad, "rewards/accuracies": wins,
                  "logps/chosen": chosen.policy, "logps/rejected": rejected.policy}  # fmt: skip
        if listed:
            values["rankings/tau"], values["rankings/exact"] = agreement(loss.reads(columns[table.item]), _rankings(table))
        return values if columns.reference is None else values | {"displacement": chosen.ratio}

    return metrics


def supervised() -> Objective:
    """Next-token cross-entropy over all trained tokens of all responses: the mean over the tokens of the step."""
    return Objective("supervised", lambda columns, table, carry=None: {"nll": (-columns.policy.sum(), "tokens")}, lambda columns, table: {},
                     reads="responses", reference="none", separable=True, mismatched=False, start=None)  # fmt: skip
