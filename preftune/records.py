"""The nouns: what people said about answers, before any token exists.

`Record` is the only form that preference data takes outside `formats`. Responses are stored once; pairs and rankings are
derived from judgements. This room touches only the standard library.

    >>> r = Record("2+2=", (Response("4"), Response("5")), (Judgement(((0,), (1,))),))
    >>> list(pairs(r))
    [Pair(chosen=0, rejected=1, prob=1.0, weight=1.0)]
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType
from typing import Any, overload

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue. `role` is 'system', 'user', 'assistant' or 'tool'."""

    role: str
    content: str


Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt.

    Args:
        text: plain text, or the messages that follow the prompt (only the assistant's tokens are trained).
        finished: True where the answer ended by itself, False where it was cut, None where the data does not say.
        score: a reward, if some rule, model or person gave one.
        source: where it came from (model, seed, sampling settings), kept as it was given.
    """

    text: Text
    finished: bool | None = None
    score: float | None = None
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """One comparison by one judge. Indices point into `Record.responses`.

    Args:
        order: tiers, best first, equal inside a tier.
        below: responses worse than all of `order`, unordered among themselves. Unnamed responses were not judged.
        prob: P(first tier preferred), only where there are exactly two tiers and nothing below.
        weight: how many votes this judgement stands for.
        by: the judge.
    """

    order: tuple[tuple[int, ...], ...]
    below: tuple[int, ...] = ()
    prob: float | None = None
    weight: float = 1.0
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt, its responses and what was said of them.

    Args:
        prompt: text, or messages (system, user and earlier assistant turns).
        responses: at least one.
        judgements: comparisons; several may stand and contradict each other.
        labels: one verdict per response, for unpaired data: True (desirable), False, or the name of a class; None where there is none.
        id: the data's own name for it, or ''.
        meta: unknown columns, as given.
        where: 'file:line' for messages, or ''.
    """

    prompt: Text
    responses: tuple[Response, ...]
    judgements: tuple[Judgement, ...] = ()
    labels: tuple[bool | str | None, ...] | None = None
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    where: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A derived comparison of two responses of one record. `prob` = P(chosen preferred), `weight` = its votes."""

    chosen: int
    rejected: int
    prob: float = 1.0
    weight: float = 1.0


def pairs(record: Record) -> Iterator[Pair]:
    """Every ordered comparison that the judgements imply; equal responses imply none.

    With `prob` below one half the pair keeps the order that the data wrote; the soft label carries the doubt.
    """
    for judgement in record.judgements:
        tiers = (*judgement.order, judgement.below) if judgement.below else judgement.order
        prob = 1.0 if judgement.prob is None else judgement.prob
        for i, better in enumerate(tiers):
            for worse in tiers[i + 1 :]:
                for chosen in better:
                    for rejected in worse:
                        yield Pair(chosen, rejected, prob, judgement.weight)


def rankings(record: Record) -> Iterator[Judgement]:
    """Every judgement of two responses or more, as a hard ranking; a judgement that only says `below` of nothing is none.

    With P(first tier preferred) a judgement stands as P of its votes for it and 1 - P for the reverse, as it does in pair losses.
    """
    for judgement in record.judgements:
        if judgement.order and sum(map(len, judgement.order)) + len(judgement.below) > 1:
            share = 1.0 if judgement.prob is None else judgement.prob
            both = ((judgement.order, share), (judgement.order[::-1], 1 - share))
            yield from (replace(judgement, order=order, prob=None, weight=judgement.weight * p) for order, p in both if p)


def verdicts(record: Record) -> Iterator[tuple[int, bool, float]]:
    """(response, desirable, weight): the unpaired view. Labels if there are any (no names of classes), else both sides of every pair.

    A pair with P(chosen preferred) < 1 counts as P votes for and 1 - P against, as it does in pair losses.
    """
    if record.labels is not None:
        for index, label in enumerate(record.labels):
            if isinstance(label, bool):
                yield index, label, 1.0
        return
    for pair in pairs(record):
        for index, good, share in ((pair.chosen, True, pair.prob), (pair.chosen, False, 1 - pair.prob),
                                   (pair.rejected, False, pair.prob), (pair.rejected, True, 1 - pair.prob)):  # fmt: skip
            if share:
                yield index, good, pair.weight * share


def scores_of(response: Response) -> tuple[float, ...]:
    """What each member of an ensemble says of a response: source['scores'], or nothing where that is no list of numbers."""
    found = (response.source or NOTHING).get("scores")
    fits = isinstance(found, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x) for x in found)
    return tuple(float(x) for x in found) if fits and found else ()


def inexact(source: Mapping[str, Any] | None) -> str:
    """Why a response of this source cannot stand for an exact sample of the model that wrote it, or ''."""
    if source is None or not isinstance(source.get("weights"), str):
        return "no source.weights says which weights wrote it"
    if source.get("kept"):
        return "it was selected by its score already"
    for name in ("temperature", "top_p"):
        if source.get(name) != 1:
            return f"sampled with {name} {source.get(name)}, not 1"
    return ""


def draw_of(response: Response) -> str | None:
    """The weights that a response is an exact sample of; None where its source does not say so (`inexact`)."""
    return response.source["weights"] if response.source and not inexact(response.source) else None


def judge_by_scores(record: Record, how: str) -> Record:
    """The record with one judgement made of its scores, where nothing else was judged; equal scores give none.

    Args:
        how: 'best-worst' (the first of the best against the first of the worst) or 'all' (every pair of unequal scores).
    """
    scored = [(response.score, i) for i, response in enumerate(record.responses) if response.score is not None]
    levels = sorted({score for score, _ in scored}, reverse=True)
    if record.judgements or record.labels is not None or len(levels) < 2:
        return record
    tiers = tuple(tuple(i for score, i in scored if score == level) for level in levels)
    order = tiers if how == "all" else (tiers[0][:1], tiers[-1][:1])
    return replace(record, judgements=(Judgement(order),))


def _merged(group: list[Record]) -> Record:
    """One record of several with the same prompt. See `merge`."""
    responses: list[Response] = []
    labels: list[bool | str | None] = []
    judgements: list[Judgement] = []
    known: dict[tuple[Text, bool | None], list[int]] = {}
    for record in group:
        number: dict[int, int] = {}  # response of this record -> response of the whole
        for i, response in enumerate(record.responses):
            label = record.labels[i] if record.labels is not None else None
            same = known.setdefault((response.text, response.finished), [])
            at = next((n for n in same if n not in number.values() and label is None and labels[n] is None), len(responses))
            if at == len(responses):
                responses.append(response)
                labels.append(label)
                same.append(at)
            elif responses[at].score is None:
                responses[at] = replace(responses[at], score=response.score, source=responses[at].source or response.source)
            number[i] = at
        judgements += [replace(j, order=tuple(tuple(number[i] for i in tier) for tier in j.order), below=tuple(number[i] for i in j.below))
                       for j in record.judgements]  # fmt: skip
    others = [{"where": r.where, "id": r.id, "meta": dict(r.meta)} for r in group[1:]]
    return replace(group[0], responses=tuple(responses), judgements=tuple(judgements), meta={**group[0].meta, "merged": others},
                   labels=tuple(labels) if any(record.labels is not None for record in group) else None)  # fmt: skip


def merge(records: Iterable[Record], *, apart: Collection[int] = ()) -> list[Record]:
    """Records that share a prompt become one, where the first of them stands.

    Responses with the same text and the same `finished` become one response (those that carry a label stay apart, for each label is
    a vote); every judgement stands, re-indexed, with its weight, contradicting ones too. `where`, `id` and `meta` are the first's;
    those of the others are listed under meta['merged']. A record whose prompt is its own comes back as it is, and so does one whose
    number stands in `apart`.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for number, record in enumerate(records):
        groups.setdefault((prompt_key(record), number if number in apart else -1), []).append(record)
    return [group[0] if len(group) == 1 else _merged(group) for group in groups.values()]


def as_text(text: Text) -> str:
    """A prompt or a response as one text: itself, or its turns one below the other."""
    return text if isinstance(text, str) else "\n\n".join(m.content for m in text)


def prompt_key(record: Record) -> str:
    """The prompt as one string: records with equal keys share a prompt and never stand on two sides of a split."""
    if isinstance(record.prompt, str):
        return record.prompt
    return "\x1e".join(f"{m.role}\x1f{m.content}" for m in record.prompt)


class Places(Sequence[str]):
    """Where records stand, 'file:line' each: twelve bytes a record and every file's name once. Grows by `append`."""

    def __init__(self, where: Iterable[str] = ()) -> None:
        self._names: dict[str, int] = {}
        self._order: list[str] = []
        self._name, self._line = array("I"), array("q")
        for place in where:
            self.append(place)

    def append(self, where: str) -> None:
        """Add one."""
        name, _, line = where.rpartition(":")
        if not (line.isdecimal() and line.isascii() and str(int(line)) == line and len(line) < 19):
            name, line = where, "-1"
        if name not in self._names:
            self._names[name] = len(self._order)
            self._order.append(name)
        self._name.append(self._names[name])
        self._line.append(int(line))

    def __len__(self) -> int:
        return len(self._name)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._order[self._name[index]]
        return name if self._line[index] < 0 else f"{name}:{self._line[index]}"
