"""From the store to one optimiser step: which records, packed how, and where each log-prob is read.

A batch is flat: tokens and positions, a segment table with prefix links, and targets (hidden index, token, response). A token attends
to its prefix chain in full and to its own segment causally. All responses to a prompt read their first token from the same
prompt-end state: gathered, never shifted. `batch_size` counts records; `micro_tokens` only cuts a step into forward passes.

    order = Order(records=len(store), batch_size=32, epochs=2, seed=0)
    step = make_step(store, order.records_of(0), micro_tokens=8192)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .store import MISMATCHED, Store


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """To a device, without waiting for what it is doing there: pinned memory is copied beside it."""
    kind = torch.device(device).type
    return (x.pin_memory() if kind == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=kind != "cpu")


@dataclass(frozen=True)
class Segments:
    """The segment table of a flat batch of T tokens; travels to attention as a forward argument.

    Args:
        starts, ends: token range of each of S segments. prefix: index of the segment that each continues, or -1.
        trees: token ranges (start, end) of connected segments; no token sees another tree.
        seen: None, or a list to which every attention call appends its layer (the self-check counts them).
        plans: how `attention` computes this batch, per sliding window, filled by it.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    prefix: tuple[int, ...]
    trees: tuple[tuple[int, int], ...]
    seen: list[int] | None = None
    plans: dict = field(default_factory=dict, compare=False, repr=False)

    def chain(self, segment: int) -> list[int]:
        """The segment's ancestors, root first, and itself."""
        out = [segment]
        while self.prefix[out[-1]] >= 0:
            out.append(self.prefix[out[-1]])
        return out[::-1]

    @cached_property
    def kin(self) -> np.ndarray:
        """(3, S) int64: number, end and depth of each segment. Those below it have the numbers up to its end; depth: tokens before it."""
        size, below = np.subtract(self.ends, self.starts), [1] * len(self.starts)
        for s, p in reversed(list(enumerate(self.prefix))):
            if p >= 0:
                below[p] += below[s]
        number, depth, free, top = [0] * len(size), [0] * len(size), [0] * len(size), 0
        for s, p in enumerate(self.prefix):
            if p < 0:
                number[s], top = top, top + below[s]
            else:
                number[s], free[p], depth[s] = free[p], free[p] + below[s], depth[p] + int(size[p])
            free[s] = number[s] + 1
        return np.stack([number, np.add(number, below), depth])

    @cached_property
    def marks(self) -> Tensor:
        """(3, T) int32: number and end of the segment of each token, and its position. A token sees those whose range of numbers holds
        its own number and whose position is not behind its own."""
        number, end, depth = np.repeat(self.kin, np.subtract(self.ends, self.starts), axis=1)
        place = np.arange(len(number)) - np.repeat(self.starts, np.subtract(self.ends, self.starts))
        return torch.from_numpy(np.stack([number, end, depth + place]).astype(np.int32))


@dataclass(frozen=True)
class Table:
    """What is said of R responses: P pairs, U verdicts, L lists of I items. Indices are responses, 0..R-1, of a batch or of a whole step.

    Args:
        pair: (P, 2) int64, chosen and rejected. pair_prob: (P,) float64, P(chosen preferred). pair_weight: (P,) float64 votes.
        verdict: (U,) int64. verdict_good: (U,) bool. verdict_weight: (U,) float64.
        mismatched: (M,) int64, responses that stand after another record's prompt.
        item: (I,) int64 responses, list by list. item_list: (I,) int64, 0..L-1. item_tier: (I,) int64, 0 the best, -1 below all,
            unordered. list_weight: (L,) float64.
        score: (R,) float64, the data's own reward of each response, NaN where it has none.
        record: (R,) int64, the store's record of each response.
        drawn: (R,) float64, 1 for an exact sample of the reference.
        member: (R, M) float64, what each member of an ensemble says, NaN where it says nothing.
        scored: (Q, 2) int64, all pairs of scored responses of a record, each once. valued: (W,) int64, scored responses of records of which
            a scored one is a sample of the reference.
    """

    pair: Tensor
    pair_prob: Tensor
    pair_weight: Tensor
    verdict: Tensor
    verdict_good: Tensor
    verdict_weight: Tensor
    mismatched: Tensor
    item: Tensor
    item_list: Tensor
    item_tier: Tensor
    list_weight: Tensor
    score: Tensor
    record: Tensor
    drawn: Tensor
    member: Tensor
    scored: Tensor
    valued: Tensor

    @property
    def compares(self) -> Tensor:
        """(L,) bool: lists of two tiers at least, `below` being one."""
        count = torch.bincount(self.item_list, minlength=len(self.list_weight))
        first = (count.cumsum(0) - count)[self.item_list]
        other = self.item_list[self.item_tier != self.item_tier[first]]
        return torch.bincount(other, minlength=len(self.list_weight)) > 0

    def to(self, device: torch.device | str) -> Table:
        """All but probabilities and weights of the pairs: how many votes there are must be known without waiting for the device."""
        return Table(**{k: v if k in ("pair_prob", "pair_weight") else send(v, device) for k, v in vars(self).items()})


def join(tables: Sequence[Table]) -> Table:
    """The tables of a step's batches as one, responses numbered through."""
    shift = np.concatenate([[0], np.cumsum([len(t.record) for t in tables])])
    lists = np.concatenate([[0], np.cumsum([len(t.list_weight) for t in tables])])
    moved = [replace(t, pair=t.pair + int(n), verdict=t.verdict + int(n), mismatched=t.mismatched + int(n), item=t.item + int(n),
                     item_list=t.item_list + int(m), scored=t.scored + int(n), valued=t.valued + int(n))
             for t, n, m in zip(tables, shift, lists, strict=False)]  # fmt: skip
    return Table(**{f.name: torch.cat([getattr(t, f.name) for t in moved]) for f in fields(Table)})


@dataclass(frozen=True)
class Batch:
    """One forward pass. T tokens, N targets, R responses.

    Args:
        tokens, positions: (T,) int64. segments: the table.
        hidden: (N,) int64, the state that predicts each target. target: (N,) its id. response: (N,) its response, 0..R-1.
        last: (R,) int64, the state of each response's last token, which has seen all of it.
        columns: per target (N,), for instance 'reference' float32.
        slot: (N,) int64, where each target stands in the store. table: what is said of the responses.
    """

    tokens: Tensor
    positions: Tensor
    segments: Segments
    hidden: Tensor
    target: Tensor
    response: Tensor
    responses: int
    last: Tensor
    columns: Mapping[str, Tensor]
    slot: Tensor
    table: Table

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        if self.tokens.device == torch.device(device):
            return self
        moved = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, columns={k: send(v, device) for k, v in self.columns.items()}, table=self.table.to(device))


@dataclass(frozen=True)
class Step:
    """One optimiser step: its forward passes and the denominators of the whole step, so that any cut gives the same numbers.

    Args:
        micro: the batches. records: the store's records in it. totals: denominators by name: 'records', 'pairs', 'verdicts',
            'lists' and 'orders', the lists that compare (sums of weights), 'scored' (pairs), 'values', 'draws', 'grades',
            'classes' (responses), 'responses', 'tokens' (targets).
        again: tokens a pass -> the same step in smaller passes, where it is known.
        facts: what was known of the step before it was taken, for its line of metrics.
    """

    micro: tuple[Batch, ...]
    records: tuple[int, ...]
    totals: Mapping[str, float]
    again: Callable[[int], Step] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Order:
    """Which records make which step: a seeded permutation per epoch, a function of (seed, epoch) alone, so resuming needs a number.

    Args:
        records: how many. batch_size: records a step; an epoch's last step may be smaller. epochs: may be a fraction.
    """

    records: int
    batch_size: int
    epochs: float
    seed: int

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.records / self.batch_size)

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.per_epoch * self.epochs - 1e-9))

    def records_of(self, step: int) -> np.ndarray:
        """Record indices of step 0, 1, ..."""
        epoch, index = divmod(step, self.per_epoch)
        return _permutation(self.seed, epoch, self.records)[index * self.batch_size : (index + 1) * self.batch_size]


def _rows(store: Store, record: int, share: bool) -> list[tuple[list[int], int]]:
    """(segments laid out in a row, index of its prefix in this list or -1): shared, each segment once; else one row a response."""
    segments = range(store.record_start[record], store.record_start[record + 1])
    if share:
        return [([s], int(store.parent[s]) - segments.start if store.parent[s] >= 0 else -1) for s in segments]
    return [(store.chain(s), -1) for s in segments if store.response[s] >= 0 or store.response[s] == MISMATCHED]


def tokens_of(store: Store, records: Sequence[int] | np.ndarray, *, share: bool = True) -> np.ndarray:
    """Tokens that each of these records costs in a forward pass: (len(records),) int64."""
    records = np.asarray(records, dtype=np.int64)
    if share:
        return store.start[store.record_start[records + 1]] - store.start[store.record_start[records]]
    size = np.diff(store.start)
    return np.array([sum(size[s] for row, _ in _rows(store, r, share) for s in row) for r in records.tolist()], dtype=np.int64)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _pairs_within(rows: np.ndarray) -> np.ndarray:
    """Every two of them, each pair once: (2, n(n-1)/2)."""
    return rows[np.stack(np.triu_indices(len(rows), k=1))]


class _Builder:
    """Accumulates one batch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.parts: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.prefix: list[int] = []
        self.trees: list[tuple[int, int]] = []
        self.hidden: list[np.ndarray] = []
        self.slot: list[np.ndarray] = []
        self.response: list[np.ndarray] = []
        self.number: dict[int, int] = {}  # store segment -> response of this batch
        self.record: list[int] = []
        self.last: list[int] = []
        self.size = 0

    def add(self, record: int, share: bool) -> None:
        store, first, tree = self.store, len(self.starts), self.size
        depth: list[int] = []  # tokens before and within each row, for positions of its children
        for row, parent in _rows(store, record, share):
            ids = np.concatenate([store.tokens[store.start[s] : store.start[s + 1]] for s in row])
            before = depth[parent] if parent >= 0 else 0
            self.positions.append(np.arange(before, before + len(ids)))
            depth.append(before + len(ids))
            last = row[-1]
            own = int(store.start[last + 1] - store.start[last])
            if store.response[last] >= 0 or store.response[last] == MISMATCHED:
                above = self.ends[first + parent] - 1 if parent >= 0 else -1
                self._targets(last, self.size + len(ids) - own, above if own == len(ids) else None)
                self.last.append(self.size + len(ids) - 1)
            self.starts.append(self.size)
            self.size += len(ids)
            self.ends.append(self.size)
            self.prefix.append(first + parent if parent >= 0 else -1)
            self.parts.append(ids)
            if not share:
                self.trees.append((self.starts[-1], self.size))
        if share:
            self.trees.append((tree, self.size))
        self.record += [record] * (len(self.number) - len(self.record))

    def _targets(self, segment: int, at: int, above: int | None) -> None:
        """Targets of a response whose tokens begin at `at`; `above` is the state before its first token where that is not at-1."""
        slots = np.arange(self.store.start[segment], self.store.start[segment + 1])
        hidden = np.arange(at - 1, at - 1 + len(slots))
        if above is not None:
            hidden[0] = above
        keep = self.store.trained[slots]
        self.number[segment] = len(self.number)
        self.hidden.append(hidden[keep])
        self.slot.append(slots[keep])
        self.response.append(np.full(int(keep.sum()), self.number[segment]))

    def build(self, records: Sequence[int], columns: Mapping[str, np.ndarray]) -> Batch:
        store, n = self.store, self.number
        slot = np.concatenate(self.slot)
        return Batch(
            tokens=torch.from_numpy(np.concatenate(self.parts).astype(np.int64)),
            positions=torch.from_numpy(np.concatenate(self.positions)),
            segments=Segments(tuple(self.starts), tuple(self.ends), tuple(self.prefix), tuple(self.trees)),
            hidden=torch.from_numpy(np.concatenate(self.hidden)), target=torch.from_numpy(store.tokens[slot].astype(np.int64)),
            response=torch.from_numpy(np.concatenate(self.response)), responses=len(n),
            last=torch.tensor(self.last, dtype=torch.long),
            columns={name: torch.from_numpy(np.ascontiguousarray(values[slot])) for name, values in columns.items()},
            slot=torch.from_numpy(slot), table=self._table([int(r) for r in records]))  # fmt: skip

    def _table(self, records: Sequence[int]) -> Table:
        store, n = self.store, self.number
        pairs = np.concatenate([np.arange(store.pair_start[r], store.pair_start[r + 1]) for r in records])
        verdicts = np.concatenate([np.arange(store.verdict_start[r], store.verdict_start[r + 1]) for r in records])
        lists = np.concatenate([np.arange(store.ranking_start[r], store.ranking_start[r + 1]) for r in records])
        sizes = store.list_start[lists + 1] - store.list_start[lists]
        items = np.concatenate([np.arange(store.list_start[i], store.list_start[i + 1]) for i in lists] or [lists])
        return Table(
            item=torch.tensor([n[int(s)] for s in store.item[items]], dtype=torch.long),
            item_list=torch.from_numpy(np.repeat(np.arange(len(lists)), sizes)),
            item_tier=torch.from_numpy(store.item_tier[items].astype(np.int64)), list_weight=torch.from_numpy(store.list_weight[lists]),
            pair=torch.tensor([[n[int(w)], n[int(x)]] for w, x in store.pair[pairs]], dtype=torch.long).reshape(-1, 2),
            pair_prob=torch.from_numpy(store.pair_prob[pairs]), pair_weight=torch.from_numpy(store.pair_weight[pairs]),
            verdict=torch.tensor([n[int(v)] for v in store.verdict[verdicts]], dtype=torch.long),
            verdict_good=torch.from_numpy(store.verdict_good[verdicts]), verdict_weight=torch.from_numpy(store.verdict_weight[verdicts]),
            score=torch.from_numpy(store.score[list(n)]),
            mismatched=torch.tensor([i for s, i in n.items() if store.response[s] == MISMATCHED], dtype=torch.long),
            record=torch.tensor(self.record, dtype=torch.long), **self._scores())  # fmt: skip

    def _scores(self) -> dict[str, Tensor]:
        """What is known of the responses one by one, and who can be compared with whom by it."""
        store, segments, record = self.store, np.fromiter(self.number, np.int64), np.array(self.record)
        score, drawn = store.score[segments], store.drawn[segments]
        member = np.full((len(segments), store.member.shape[1]), np.nan)
        place = np.searchsorted(store.rated, segments)
        known = np.isin(segments, store.rated)
        member[known] = store.member[place[known]]
        scored = np.flatnonzero(~np.isnan(score))
        first, second = np.concatenate([_pairs_within(scored[a:b]) for a, b in _runs(record[scored])] or [np.zeros((2, 0), np.int64)], 1)
        valued = scored[np.isin(record[scored], record[drawn & ~np.isnan(score)])]
        return {"drawn": torch.from_numpy(drawn.astype(np.float64)), "member": torch.from_numpy(member),
                "scored": torch.from_numpy(np.stack([first, second], 1)), "valued": torch.from_numpy(valued)}  # fmt: skip


def make_batch(
    store: Store, records: Sequence[int], *, columns: Mapping[str, np.ndarray] | None = None, share: bool = True
) -> Batch:
    """These records as one forward pass. `columns` are arrays parallel to `store.tokens`; `share=False` gives a row per response."""
    builder = _Builder(store)
    for record in records:
        builder.add(int(record), share)
    return builder.build([int(r) for r in records], columns or {})


def split(store: Store, records: Sequence[int] | np.ndarray, micro_tokens: int, *, share: bool = True,
          even: bool = False) -> list[list[int]]:  # fmt: skip
    """Cut records, in order, into groups of at most `micro_tokens` tokens; a record larger than that stands alone.

    Args:
        even: the smallest largest group that the same number of groups allows, so that none is nearly empty.
    """
    costs = tokens_of(store, records, share=share)

    def cut(limit: int) -> list[list[int]]:
        groups: list[list[int]] = []
        room = -1
        for record, cost in zip(records, costs.tolist(), strict=True):
            if cost > room or not groups:
                groups.append([])
                room = limit
            groups[-1].append(int(record))
            room -= cost
        return groups

    groups = cut(micro_tokens)
    if not even or len(groups) < 2:
        return groups
    low, high = int(costs.sum()) // len(groups), micro_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= len(groups) else (middle + 1, high)
    return cut(high)


def totals_of(batches: Sequence[Batch], records: int) -> dict[str, float]:
    """The denominators of a step, by name."""
    return {"records": float(records), "pairs": float(sum(b.table.pair_weight.sum() for b in batches)),
            "verdicts": float(sum(b.table.verdict_weight.sum() for b in batches)),
            "lists": float(sum(b.table.list_weight.sum() for b in batches)),
            "orders": float(sum(b.table.list_weight[b.table.compares].sum() for b in batches)),
            "scored": float(sum(len(b.table.scored) for b in batches)), "values": float(sum(len(b.table.valued) for b in batches)),
            "draws": float(sum(b.table.drawn.sum() for b in batches)),
            "grades": (graded := float(sum((~b.table.score.isnan()).sum() for b in batches))), "classes": graded,
            "responses": float(sum(b.responses for b in batches)),
            "tokens": float(sum(len(b.target) for b in batches))}  # fmt: skip


def make_step(store: Store, records: Sequence[int] | np.ndarray, *, micro_tokens: int, columns: Mapping[str, np.ndarray] | None = None,
              share: bool = True) -> Step:  # fmt: skip
    """One optimiser step of these records, cut to fit `micro_tokens`."""
    micro = tuple(
        make_batch(store, group, columns=columns, share=share) for group in split(store, records, micro_tokens, share=share, even=True)
    )
    return Step(micro, tuple(int(r) for r in records), totals_of(micro, len(records)))
