"""The token store: every record's ids in flat arrays, with the comparisons as indices into them.

One array of tokens, one table of segments (a prompt is a segment, each response a segment whose parent is the prompt's), and the
pairs and verdicts as segment numbers. Columns such as the reference's log-probs are arrays parallel to `tokens`. numpy only.
Records are taken one at a time; with a folder the arrays grow on the disk and are mapped, so that memory does not grow with them.

    store, intake = build(records, codec, max_length=512)
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from .errors import DataError
from .files import disk, fingerprint
from .records import Places, Record, Response, draw_of, pairs, rankings, scores_of, verdicts
from .tokens import Codec, Encoded, encode

CONTEXT, MISMATCHED = -1, -2
BELOW = -1  # the tier of what is worse than all tiers, unordered


@dataclass(frozen=True)
class Store:
    """R records, S segments, N tokens.

    Args:
        tokens: (N,) int32 ids. trained: (N,) bool, ids that the model has to produce.
        start: (S+1,) int64, segment s is tokens[start[s]:start[s+1]]. parent: (S,) int64, prefix segment or -1.
        response: (S,) int64: index in the record, CONTEXT for a prompt, MISMATCHED for another record's response.
        record_start: (R+1,) int64: record r owns segments record_start[r]:record_start[r+1]; a parent precedes its children.
        pair: (P, 2) int64 segments chosen, rejected. pair_prob, pair_weight: (P,) float64. pair_start: (R+1,) int64.
        verdict: (U,) int64 segments. verdict_good: (U,) bool. verdict_weight: (U,) float64. verdict_start: (R+1,) int64.
        score: (S,) float64, the data's own reward of a response, NaN where it has none and for other segments. drawn: (S,) bool, whether
            it is an exact sample of the reference.
        item: (I,) int64 segments, list by list. item_tier: (I,) int32, 0 the best, BELOW. list_start: (L+1,) int64, list l is
            item[list_start[l]:list_start[l+1]]. list_weight: (L,) float64. ranking_start: (R+1,) int64, record r's lists.
        rated: (Q,) int64 segments, ascending, of which an ensemble says member: (Q, M) float64, one reward a member; M = 0 where none was
            asked for.
        where: per record 'file:line' or its id.
    """

    tokens: np.ndarray
    trained: np.ndarray
    start: np.ndarray
    parent: np.ndarray
    response: np.ndarray
    record_start: np.ndarray
    pair: np.ndarray
    pair_prob: np.ndarray
    pair_weight: np.ndarray
    pair_start: np.ndarray
    verdict: np.ndarray
    verdict_good: np.ndarray
    verdict_weight: np.ndarray
    verdict_start: np.ndarray
    score: np.ndarray
    item: np.ndarray
    item_tier: np.ndarray
    list_start: np.ndarray
    list_weight: np.ndarray
    ranking_start: np.ndarray
    drawn: np.ndarray
    rated: np.ndarray
    member: np.ndarray
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.record_start) - 1

    def chain(self, segment: int) -> list[int]:
        """The segment's ancestors, root first, and itself."""
        out = [segment]
        while (parent := int(self.parent[out[-1]])) >= 0:
            out.append(parent)
        return out[::-1]

    def identity(self) -> str:
        """Fingerprint of the final ids and masks: what the reference column depends on."""
        return fingerprint("store-1", self.tokens, self.trained, self.start, self.parent, self.response)


@dataclass
class Intake:
    """What became of the records: read = kept + sum(dropped)."""

    read: int = 0
    kept: array = field(default_factory=lambda: array("q"))  # indices of the records that were kept
    dropped: Counter[str] = field(default_factory=Counter)
    refused: list[DataError] = field(default_factory=list)
    cases: Counter[str] = field(default_factory=Counter)
    lengths: array = field(default_factory=lambda: array("i"))  # longest chain of each record, dropped ones included

    def drop(self, reason: str, error: DataError) -> None:
        self.dropped[reason] += 1
        self.refused.append(error)


def kind_of(error: DataError) -> str:
    """What kind of refusal it is, in the words of the manifest."""
    return "control token in the text" if "control token" in error.reason else error.reason.split(":")[0]


def too_long(record: Record, encoded: Encoded, max_length: int | None) -> str | None:
    """Which part does not fit, in the words of the manifest."""
    if max_length is None:
        return None
    if len(encoded.prompt) >= max_length:
        return "prompt too long"
    over = [i for i, ids in enumerate(encoded.responses) if len(encoded.prompt) + len(ids) > max_length]
    if not over:
        return None
    sides = {side for p in pairs(record) for side, i in (("chosen", p.chosen), ("rejected", p.rejected)) if i in over}
    if len(sides) == 2:
        return "both responses too long"
    return f"{sides.pop()} too long" if sides else "response too long"


CODES = {"i": np.int32, "q": np.int64, "d": np.float64, "b": np.bool_}  # array's type codes
FLUSH = 1 << 16  # values that a column on the disk keeps in memory


class _Column:
    """A growing array: in memory, or with a folder a file without a name there as soon as there are FLUSH values: a kill leaves nothing."""

    def __init__(self, code: str, folder: Path | None) -> None:
        self.values, self.written, self.folder = array(code), 0, folder
        self.file: Any = None

    def __len__(self) -> int:
        return self.written + len(self.values)

    def extend(self, values: Iterable[Any]) -> None:
        self.values.extend(values)
        if self.folder and len(self.values) >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        assert self.folder is not None
        with disk(self.folder, needed=len(self.values) * self.values.itemsize):
            if self.file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = TemporaryFile(dir=self.folder)  # noqa: SIM115 - `freeze` closes it
            self.values.tofile(self.file)
        self.written += len(self.values)
        del self.values[:]

    def freeze(self) -> np.ndarray:
        """The array, of memory or mapped; it cannot be written."""
        kind = np.dtype(CODES[self.values.typecode])
        if self.file is None:
            return np.frombuffer(self.values, kind)
        self._flush()
        with disk(self.folder), self.file:
            self.file.flush()
            return np.frombuffer(mmap(self.file.fileno(), 0, access=ACCESS_READ), kind)


class _Columns:
    """Growing columns that become the store's arrays."""

    def __init__(self, folder: Path | None = None) -> None:
        def column(code: str) -> _Column:
            return _Column(code, folder)

        self.tokens, self.trained, self.start = column("i"), column("b"), column("q")
        self.parent, self.response = column("q"), column("q")
        self.record_start, self.pair_start, self.verdict_start = (column("q") for _ in range(3))
        self.pair, self.pair_prob, self.pair_weight = column("q"), column("d"), column("d")
        self.verdict, self.good, self.verdict_weight = column("q"), column("b"), column("d")
        self.item, self.item_tier, self.list_weight = column("q"), column("i"), column("d")
        self.list_start, self.ranking_start = column("q"), column("q")
        self.score, self.drawn, self.rated, self.member = column("d"), column("b"), column("q"), column("d")
        self.members = 0  # of the ensemble, once a response has shown them
        self.where = Places()
        for starts in (self.start, self.record_start, self.pair_start, self.verdict_start, self.list_start, self.ranking_start):
            starts.extend((0,))

    def segment(self, ids: Sequence[int], trained: Sequence[bool], parent: int, response: int, *, score: float | None = None,
                drawn: bool = False) -> int:  # fmt: skip
        self.score.extend((math.nan if score is None else score,))
        self.drawn.extend((drawn,))
        self.tokens.extend(ids)
        self.trained.extend(trained)
        self.start.extend((len(self.tokens),))
        self.parent.extend((parent,))
        self.response.extend((response,))
        return len(self.parent) - 1

    def prompt(self, ids: Sequence[int]) -> int:
        """A segment that nothing comes before and nobody trains."""
        return self.segment(ids, (False,) * len(ids), -1, CONTEXT)

    def rate(self, segment: int, response: Response, record: Record) -> None:
        """Note what an ensemble says of a response. Raises DataError where it has another number of members than those before."""
        if found := scores_of(response):
            if len(found) != (self.members or len(found)):
                path, _, line = record.where.rpartition(":")
                raise DataError(f"an ensemble of {len(found)} members after one of {self.members}; score all responses with the same one",
                                path=path or None, line=int(line) if line.isdigit() else None, field="source.scores")  # fmt: skip
            self.members = len(found)
            self.rated.extend((segment,))
            self.member.extend(found)

    def close(self, record: Record, root: int) -> None:
        """End a record whose prompt is segment `root`: what is said of its responses, and where it stands."""
        for pair in pairs(record):
            self.pair.extend((root + 1 + pair.chosen, root + 1 + pair.rejected))
            self.pair_prob.extend((pair.prob,))
            self.pair_weight.extend((pair.weight,))
        for index, good, weight in verdicts(record):
            self.verdict.extend((root + 1 + index,))
            self.good.extend((good,))
            self.verdict_weight.extend((weight,))
        for ranking in rankings(record):
            tiers = (*enumerate(ranking.order), (BELOW, ranking.below))
            self.item.extend(root + 1 + i for _, tier in tiers for i in tier)
            self.item_tier.extend(number for number, tier in tiers for _ in tier)
            self.list_start.extend((len(self.item),))
            self.list_weight.extend((ranking.weight,))
        self.record_start.extend((len(self.parent),))
        self.pair_start.extend((len(self.pair_prob),))
        self.verdict_start.extend((len(self.verdict),))
        self.ranking_start.extend((len(self.list_weight),))
        self.where.append(record.where or record.id)

    def freeze(self) -> Store:
        return Store(
            tokens=self.tokens.freeze(), trained=self.trained.freeze(), start=self.start.freeze(), parent=self.parent.freeze(),
            response=self.response.freeze(), record_start=self.record_start.freeze(), pair=self.pair.freeze().reshape(-1, 2),
            pair_prob=self.pair_prob.freeze(), pair_weight=self.pair_weight.freeze(), pair_start=self.pair_start.freeze(),
            verdict=self.verdict.freeze(), verdict_good=self.good.freeze(), verdict_weight=self.verdict_weight.freeze(),
            verdict_start=self.verdict_start.freeze(), score=self.score.freeze(), item=self.item.freeze(),
            item_tier=self.item_tier.freeze(),
            list_start=self.list_start.freeze(), list_weight=self.list_weight.freeze(), ranking_start=self.ranking_start.freeze(),
            drawn=self.drawn.freeze(), rated=self.rated.freeze(),
            member=self.member.freeze().reshape(len(self.rated), self.members), where=self.where)  # fmt: skip


def unfit(records: Iterable[Record], codec: Codec, *, max_length: int | None) -> list[bool]:
    """Per record whether `build` would leave it out."""
    return [isinstance(result, DataError) or too_long(record, result, max_length) is not None
            for record, result in encode(records, codec)]  # fmt: skip


def build(records: Iterable[Record], codec: Codec, *, max_length: int | None, mismatched: bool = False,
          folder: Path | None = None, members: bool = False, weights: str | None = None,
          nested: bool = False) -> tuple[Store, Intake]:  # fmt: skip
    """Encode records into a store, one at a time. What cannot be encoded or does not fit is left out, counted by reason and listed.

    Args:
        max_length: longest prompt+response in tokens, or None for no limit. Nothing is ever cut.
        mismatched: give each record one more segment, another record's response after this record's prompt (KTO's baseline).
        folder: keep large arrays there in files without names, mapped into memory. None: in memory.
        members: also keep what an ensemble says of each response. weights: fingerprint of the reference, whose own samples are marked.
        nested: a response that begins with the whole of an earlier one continues its segment, so that an answer in steps is read once. Only
            for what is read at the last token of a response: its targets are no longer all of its tokens.

    Raises:
        DataError: members of different number.
    """
    intake, columns = Intake(), _Columns(folder)
    kept = _kept(records, codec, max_length, intake)
    for record, encoded, others in _with_others(kept) if mismatched else ((r, e, ()) for r, e in kept):
        root = columns.prompt(encoded.prompt)
        for i, (ids, trained) in enumerate(zip(encoded.responses, encoded.trained, strict=True)):
            response = record.responses[i]
            drawn = weights is not None and draw_of(response) == weights
            above, begin = _continued(encoded.responses[:i], ids) if nested else (-1, 0)
            segment = columns.segment(ids[begin:], trained[begin:], root + 1 + above, i, score=response.score, drawn=drawn)
            if members:
                columns.rate(segment, response, record)
        # The first of the records after this one whose response fits: a fixed partner, so that its reference column can be built.
        for other in others:
            if not max_length or len(encoded.prompt) + len(other.responses[0]) <= max_length:
                columns.segment(other.responses[0], other.trained[0], root, MISMATCHED)
                break
        columns.close(record, root)
    return columns.freeze(), intake


def _continued(before: Sequence[tuple[int, ...]], ids: tuple[int, ...]) -> tuple[int, int]:
    """The longest of earlier answers with which these ids begin and then go on, and its length; -1 and 0 where there is none."""
    found = [(len(one), i) for i, one in enumerate(before) if len(one) < len(ids) and ids[: len(one)] == one]
    size, index = max(found, default=(0, -1))
    return index, size


def _kept(records: Iterable[Record], codec: Codec, max_length: int | None, intake: Intake) -> Iterator[tuple[Record, Encoded]]:
    """What can be used, the rest entered into `intake`."""
    for index, (record, result) in enumerate(encode(records, codec)):
        intake.read += 1
        if isinstance(result, DataError):
            intake.drop(kind_of(result), result)
            continue
        intake.lengths.append(len(result.prompt) + max(map(len, result.responses), default=0))
        if reason := too_long(record, result, max_length):
            path, _, line = record.where.rpartition(":")
            found = f"{intake.lengths[-1]} tokens; the limit is {max_length}"
            intake.drop(reason, DataError(f"{reason}: {found}", path=path or None, line=int(line) if line.isdigit() else None))
            continue
        intake.cases.update(result.cases)
        intake.kept.append(index)
        yield record, result


def _with_others(kept: Iterable[tuple[Record, Encoded]]) -> Iterator[tuple[Record, Encoded, list[Encoded]]]:
    """Each record with the (up to) 31 after it; those of the last ones are the first ones."""
    head: list[Encoded] = []
    window: deque[tuple[Record, Encoded]] = deque()
    count = 0
    for record, encoded in kept:
        count += 1
        if len(head) < 31:
            head.append(encoded)
        window.append((record, encoded))
        if len(window) == 32:
            first = window.popleft()
            yield (*first, [e for _, e in window])
    while window:
        first = window.popleft()
        yield (*first, [*(e for _, e in window), *head][: min(count, 32) - 1])


def from_ids(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]],
             said: Sequence[Record] | None = None, drawn: Sequence[int] = ()) -> Store:  # fmt: skip
    """A store of rollouts: token ids as they were sampled, never re-tokenised text. One record a prompt.

    Args:
        prompts: per record its ids. responses: per record, per sample, its ids (none empty).
        said: per record what was said of its responses: judgements, labels, scores; their texts are not read. Default: nothing.
        drawn: which of a record's responses are samples of the reference.
    """
    columns = _Columns()
    for prompt, answers, record in zip(prompts, responses, said or [Record("", ())] * len(prompts), strict=True):
        root = columns.prompt(prompt)
        for i, ids in enumerate(answers):
            score = record.responses[i].score if record.responses else None
            columns.segment(ids, (True,) * len(ids), root, i, score=score, drawn=i in drawn)
        columns.close(record, root)
    return columns.freeze()
