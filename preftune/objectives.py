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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch, Table
from .errors import DataError
from .losses import LOSSES, Loss, Side, arguments, expected, votes
from .losses.lists import Rankings, agreement
from .losses.values import Draws
from .losses.verdicts import baseline
from .readout import (
    Learner,
    as_reference,
    forward_kl,
    head_outputs,
    hidden_states,
    log_odds,
    prompt_values,
    response_rows,
    response_sums,
    token_collisions,
    token_logps,
)
from .store import Store

Terms = Mapping[str, tuple[Tensor, str]]


Columns = Side  # what is known of all R responses of a batch or a step; `columns[rows]` are some of them


def join_columns(columns: Sequence[Any]) -> Any:
    """Columns of a step's batches, of whatever kind, as those of the whole step; rows of tokens are filled up to the longest."""
    parts = {f.name: [getattr(c, f.name) for c in columns] for f in fields(columns[0])}
    if parts.get("tokens", [None])[0] is not None:
        longest = max(x.shape[1] for x in parts["tokens"])
        parts["tokens"] = [F.pad(x, (0, longest - x.shape[1])) for x in parts["tokens"]]
    return type(columns[0])(**{name: None if x[0] is None else torch.cat(x) for name, x in parts.items()})


@dataclass(frozen=True)
class Objective:
    """What to minimise and what to report.

    Args:
        name: for logs. terms: (columns, table, carry) -> {name: (weighted sum, denominator)}.
        metrics: (columns, table) -> {name: one value per pair, verdict or list}; their means are reported, exact for any batch size.
        reads: 'lists', 'pairs', 'verdicts', 'scores', 'values', 'draws', 'grades' or 'responses': what a record must have for this to
            learn from it (HAS). also: what further terms of a sum read; some record must have each.
        reference: 'none', 'token' or 'distribution': what the columns need.
        separable: whether terms are sums over items; otherwise a step of several micro-batches takes two forward passes.
        mismatched: whether the store must carry mismatched responses.
        read: what stands in the column `policy`: 'logps', log pi(y|x); or 'scalar', the score of a reward model, whose reference is 0.
        needs: which columns beyond the sums are read: 'tokens', 'collision', 'score', 'member', 'kl', 'value' (of a `readout.Learner`),
            'classes' (of a head of several outputs).
        frozen: for reference='distribution' the frozen model, None where it is the policy with its adapter off (`readout.as_reference`).
        compares: table -> (P, 2) int64, the pairs that `metrics` measures, the better response first.
        partition: betas of the terms whose Z is estimated from samples.
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
    also: frozenset[str] = frozenset()
    compares: Callable[[Table], Tensor] = lambda table: table.pair
    partition: tuple[float, ...] = ()
    frozen: Any = None
    carry: Mapping[str, float] = field(default_factory=dict)
    advance: Callable[[Columns, Table, Mapping[str, float]], dict[str, float]] = lambda columns, table, carry: {}

    def score(self, model: Any, batch: Batch) -> Columns:
        """Columns of a batch under the model, with gradient where grad is enabled."""
        model, value = (model.policy, model.value) if isinstance(model, Learner) else (model, None)
        hidden = hidden_states(model, batch)
        if self.read == "scalar":
            said = head_outputs(model, hidden[batch.last])
            score = log_odds(said)
            length = response_sums(torch.ones_like(batch.target), batch)
            return Columns(score, torch.zeros_like(score), length, score=batch.table.score if "score" in self.needs else None,
                           classes=said if "classes" in self.needs else None)  # fmt: skip
        logps = token_logps(model, hidden, batch)
        reference = batch.columns["reference"] if self.reference != "none" else None
        return Columns(
            policy=response_sums(logps, batch), reference=None if reference is None else response_sums(reference, batch),
            length=response_sums(torch.ones_like(logps), batch).detach(),
            tokens=response_rows(logps.double() - reference, batch) if "tokens" in self.needs else None,
            collision=response_sums(token_collisions(model, hidden, batch), batch) if "collision" in self.needs else None,
            score=batch.table.score if "score" in self.needs else None,
            member=batch.table.member if "member" in self.needs else None,
            kl=response_sums(self._forward_kl(model, hidden, batch), batch) if "kl" in self.needs else None,
            value=prompt_values(value, hidden, batch) if value is not None else None)  # fmt: skip

    def _forward_kl(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad(), as_reference(model, self.frozen) as frozen:
            theirs = hidden_states(frozen, batch)
        return forward_kl(model, hidden, self.frozen, theirs, batch)


def total(terms: Terms, totals: Mapping[str, float]) -> Tensor:
    """The step's loss: each term's sum over its own denominator. A denominator of zero (no such item) contributes nothing."""
    return torch.stack([value / totals[name] if totals[name] else value * 0 for value, name in terms.values()]).sum()


Part = tuple[float, str, Mapping[str, float]]


def preference(parts: Sequence[Part], *, label_smoothing: float = 0.0, read: str = "logps") -> Objective:
    """A weighted sum of losses of the table.

    Args:
        parts: (weight, loss name, those of its arguments that differ from their defaults).
        label_smoothing: e; labels p become (1-e) p + e (1-p). read: as `Objective.read`.
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

    reads = sorted({_reads(loss) for _, _, loss, _ in named}, key=list(HAS).index)
    return Objective(
        name="+".join(name if weight == 1 else f"{weight:g}*{name}" for weight, name, _, _ in named), terms=terms,
        metrics=_preference_metrics(named) if read == "logps" else _score_metrics(named), read=read, reads=reads[0],
        also=frozenset(reads[1:]), compares=_compares(named[0][2]),
        partition=tuple(numbers["beta"] for _, _, loss, numbers in named if loss.partition),
        reference=max(needs, key=("none", "token", "distribution").index) if read == "logps" else "none",
        separable=all(loss.separable for _, _, loss, _ in named), mismatched=any(loss.mismatched for _, _, loss, _ in named),
        start=start if all(loss.start for _, _, loss, _ in named) else None,
        needs=frozenset(name for _, _, loss, _ in named for name in loss.needs),
        carry={f"{name}.{key}": value for _, name, loss, _ in named for key, value in loss.carry.items()}, advance=advance)  # fmt: skip


def _baseline(columns: Columns, table: Table) -> Tensor:
    """KTO's z0 of these records; zero where no mismatched response fits the window, or nothing has a reference."""
    known = columns.reference is not None and len(table.mismatched)
    return baseline(columns[table.mismatched].ratio) if known else columns.policy.new_zeros(())


def _draws(table: Table) -> Draws:
    """Which of the valued responses belong together; a record that stands twice in a step is one group with every draw twice."""
    return Draws(torch.unique(table.record[table.valued], return_inverse=True)[1],
                 table.drawn[table.valued] * ~table.score[table.valued].isnan())  # fmt: skip


def _gaps(table: Table) -> list[tuple]:
    one, other = table.scored.T
    members = (table.member[one] - table.member[other]).tolist()
    return list(zip((table.score[one] - table.score[other]).tolist(), members, strict=True))


def graded(table: Table) -> Tensor:
    """Responses that the data gave a score."""
    return torch.nonzero(~table.score.isnan(), as_tuple=True)[0]


def _rankings(table: Table) -> Rankings:
    return Rankings(table.item_list, table.item_tier)


# Kind of a loss without soft labels -> (what its function takes, the votes of its items, what their start depends on).
ITEMS: Mapping[str, tuple[Callable[[Columns, Table], tuple], Callable[[Table], Tensor], Callable[[Table], list[tuple]]]] = {
    "verdicts": (lambda c, t: (c[t.verdict], t.verdict_good, _baseline(c, t)), lambda t: t.verdict_weight,
                 lambda t: [(good,) for good in t.verdict_good.tolist()]),
    "scored": (lambda c, t: (c[t.scored[:, 0]], c[t.scored[:, 1]]), lambda t: torch.ones_like(t.score[t.scored[:, 0]]), lambda t: _gaps(t)),
    "values": (lambda c, t: (c[t.valued], _draws(t)), lambda t: torch.ones_like(t.score[t.valued]), lambda t: [()] * len(t.valued)),
    "draws": (lambda c, t: (c[t.drawn > 0],), lambda t: t.drawn[t.drawn > 0], lambda t: [()] * int(t.drawn.sum())),
    **dict.fromkeys(("grades", "classes"),
                    (lambda c, t: (c[graded(t)],), lambda t: torch.ones_like(t.score[graded(t)]), lambda t: [()] * len(graded(t)))),
    **dict.fromkeys(("lists", "orders"),  # orders: a list of one tier is 0, and only their denominators differ
                    (lambda c, t: (c[t.item], _rankings(t)), lambda t: t.list_weight, lambda t: _rankings(t).shapes())),
}  # fmt: skip
READS = {"orders": "pairs", "scored": "scores", "classes": "grades"}  # a list that compares is a list with pairs


def _reads(loss: Loss) -> str:
    return READS.get(loss.kind, loss.kind)


def by_scores(table: Table) -> Tensor:
    """Pairs of responses of a prompt with different scores, the higher first: (P, 2)."""
    gap = table.score[table.scored[:, 0]] - table.score[table.scored[:, 1]]
    return torch.where(gap[:, None] > 0, table.scored, table.scored.flip(1))[gap != 0]


def _compares(loss: Loss) -> Callable[[Table], Tensor]:
    """Who counts as chosen: what was judged, or the response with the higher score where the loss reads scores."""
    return by_scores if loss.scalar == "no" and _reads(loss) in ("scores", "values", "draws", "grades") else lambda table: table.pair


def _per_record(store: Store, segments: np.ndarray) -> np.ndarray:
    """How many of each record's segments are marked: (R,) of (S,) bool."""
    return np.diff(np.concatenate([[0], np.cumsum(segments)])[store.record_start])


# What a record must have -> whether it has it, (R,) bool. A sum of losses trains on the records that have the first of what it reads.
HAS: Mapping[str, Callable[[Store], np.ndarray]] = {
    "lists": lambda s: np.diff(s.ranking_start) > 0, "pairs": lambda s: np.diff(s.pair_start) > 0,
    "verdicts": lambda s: np.diff(s.verdict_start) > 0, "values": lambda s: _per_record(s, s.drawn & ~np.isnan(s.score)) > 0,
    "scores": lambda s: _per_record(s, ~np.isnan(s.score)) > 1, "draws": lambda s: _per_record(s, s.drawn) > 0,
    "grades": lambda s: _per_record(s, ~np.isnan(s.score)) > 0,
    "responses": lambda s: np.diff(s.record_start) > 0,
}  # fmt: skip
WANTED = {
    "scores": "two scored responses; preftune score gives scores",
    "values": "a scored sample of the reference: of the very weights of --model, at temperature 1 and top_p 1 (preftune sample)",
    "grades": "a scored response; preftune score gives scores",
    "draws": "a sample of the reference: of the very weights of --model, at temperature 1 and top_p 1 (preftune sample)",
}


def readable(store: Store, objective: Objective, records: np.ndarray) -> np.ndarray:
    """Those of these records that the objective learns from. Raises DataError where one of its terms finds none, or an ensemble's part is
    missing."""
    found = records[HAS[objective.reads](store)[records]]
    for what in (objective.reads, *sorted(objective.also)):
        if not HAS[what](store)[found].any():
            hint = "; --from-scores best-worst (or all) makes judgements of their scores" if (~np.isnan(store.score)).any() else ""
            raise DataError(f"no training record has {WANTED.get(what, f'{what}{hint}')}")
    if "member" in objective.needs:
        unrated = ~np.isnan(store.score)
        unrated[store.rated] = False
        if (lacking := np.flatnonzero(_per_record(store, unrated))).size:
            raise DataError(f"{len(lacking)} records have scores without those of an ensemble (source.scores), the first "
                            f"{store.where[int(lacking[0])]}; score all of them with one ensemble")  # fmt: skip
    return found


FEWEST = 1.5  # samples that must count in Z, of half of the prompts at least: with 1 the value of a response is its own reward


def partition(store: Store, records: np.ndarray, objective: Objective) -> dict[str, float]:
    """How well the samples of these records know Z, for losses that read it off them; {} for others.

    Returns:
        samples: mean number a prompt. effective: how many of them count, median over prompts. bias: what is known of the error of
        V = beta log Z, about -beta chi2/(2K), in units of reward, mean over prompts. spread: of the rewards of a prompt's samples.

    Raises:
        DataError: fewer than FEWEST count in most prompts; names a beta that the same samples would do for.
    """
    if not objective.partition:
        return {}
    segments = np.concatenate([np.arange(store.record_start[r], store.record_start[r + 1]) for r in records])
    number = np.repeat(np.arange(len(records)), np.diff(store.record_start)[records])
    drawn = store.drawn[segments] & ~np.isnan(store.score[segments])
    score, beta = torch.from_numpy(store.score[segments][drawn]), min(objective.partition)
    draws = Draws(torch.from_numpy(number[drawn]), torch.ones_like(score))
    count, effective = draws.sums(draws.weight), draws.effective(score / beta)
    if float(effective.median()) < FEWEST:
        wider = next((b for b in (beta * 2**k for k in range(1, 13)) if float(draws.effective(score / b).median()) >= FEWEST), None)
        mend = f"--beta {wider:.3g}, more samples a prompt, or --loss value-quantile" if wider else "draw several samples a prompt"
        raise DataError(f"Z cannot be had at beta {beta:g}: of {float(count.mean()):.3g} samples a prompt {float(effective.median()):.2f} "
                        f"count; {mend}")  # fmt: skip
    spread = (draws.sums(score**2) / count - (draws.sums(score) / count) ** 2).clamp(min=0).sqrt()
    return {"samples": float(count.mean()), "effective": float(effective.median()), "beta": beta,
            "bias": float((-beta * (1 / effective - 1 / count) / 2).mean()), "spread": float(spread.mean())}  # fmt: skip


def _preference_metrics(named: Sequence[tuple[float, str, Loss, Mapping[str, float]]]) -> Callable[[Columns, Table], dict]:
    """TRL's names. Rewards are the first loss's beta (or tau) times what that loss reads; ties count half. Rankings add theirs.

    Where that loss reads scores, the response with the higher score counts as chosen.
    """
    _, _, loss, numbers = named[0]
    listed = any(loss.kind in ("lists", "orders") for _, _, loss, _ in named)
    scale = numbers.get("beta", numbers.get("tau", 1 / numbers.get("eta", 1.0)))
    compares = _compares(loss)

    def metrics(columns: Columns, table: Table) -> dict[str, Tensor]:
        pair = compares(table)
        if not len(pair) and compares is by_scores:
            return {}
        if not len(pair):
            reward, want = scale * loss.reads(columns[table.verdict]), table.verdict_good
            return {"rewards/desirable": reward[want], "rewards/undesirable": reward[~want]}
        chosen, rejected = columns[pair[:, 0]], columns[pair[:, 1]]
        good, bad = scale * loss.reads(chosen), scale * loss.reads(rejected)
        wins = (good > bad).double() + 0.5 * (good == bad).double()
        values = {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad, "rewards/accuracies": wins,
                  "logps/chosen": chosen.policy, "logps/rejected": rejected.policy}  # fmt: skip
        if listed:
            values["rankings/tau"], values["rankings/exact"] = agreement(loss.reads(columns[table.item]), _rankings(table))
        values |= {} if columns.value is None else {"value": columns.value[graded(table)]}
        return values if columns.reference is None else values | {"displacement": chosen.ratio}

    return metrics


def _score_metrics(named: Sequence[tuple[float, str, Loss, Mapping[str, float]]]) -> Callable[[Columns, Table], dict]:
    """As for preferences, with the score itself as the reward; of verdicts how many lie on the right side of 0.

    The accuracy of a soft label is the chance that a label drawn from it agrees: what can be compared with the ceiling of such labels.
    """
    kinds = {loss.kind for _, _, loss, _ in named}

    def metrics(columns: Columns, table: Table) -> dict[str, Tensor]:
        score, values = columns.policy, {}
        if len(table.pair):
            good, bad = score[table.pair[:, 0]], score[table.pair[:, 1]]
            prob = table.pair_prob.to(good.device, non_blocking=True)
            agrees = torch.where(good > bad, prob, torch.where(good < bad, 1 - prob, 0.5))
            values = {"rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad, "rewards/accuracies": agrees}
        if kinds & {"lists", "orders"}:
            values["rankings/tau"], values["rankings/exact"] = agreement(score[table.item], _rankings(table))
        if columns.classes is not None:
            rows = graded(table)
            values["classes/accuracies"] = (columns.classes[rows].argmax(1) == table.score[rows]).double()
        if "verdicts" in kinds:
            mine = score[table.verdict]
            values |= {"rewards/desirable": mine[table.verdict_good], "rewards/undesirable": mine[~table.verdict_good],
                       "labels/accuracies": ((mine > 0) == table.verdict_good).double()}  # fmt: skip
        return values

    return metrics


def supervised() -> Objective:
    """Next-token cross-entropy over all trained tokens of all responses: the mean over the tokens of the step."""
    return Objective("supervised", lambda columns, table, carry=None: {"nll": (-columns.policy.sum(), "tokens")}, lambda columns, table: {},
                     reads="responses", reference="none", separable=True, mismatched=False, start=None)  # fmt: skip
