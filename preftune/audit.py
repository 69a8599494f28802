"""What is wrong with a preference file, found without a model: equal, duplicate, contradicting and circular judgements, shared prompts,
lengths, judges.

`Ledger` reads records one at a time and keeps some 40 bytes of each and 30 of each pair: texts are known by 64-bit hashes. The stage
decides what to refuse. numpy; torch-free.

    audit = inspect(records)
    audit.equal          # ('pairs.jsonl:7', ...)
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from hashlib import blake2b

import numpy as np

from .certainty import Z95, mean_of, share_of
from .records import Places, Record, Text, pairs, prompt_key

EQUAL_SHARE = 0.05  # above this share of equal pairs something is wrong with the file, not with a few rows


@dataclass(frozen=True)
class Audit:
    """Findings, each a list of 'file:line' of the records concerned.

    Args:
        records, pairs: how many there are. equal: pairs whose two sides are the same text, white space aside.
        duplicates: records whose pair another record has earlier. contradicting: records whose pair stands earlier the other way round.
        shared_prompts: records whose prompt an earlier one has. cycles: per prompt whose judgements form a circle (a over b over c over
            a) the records of one such circle; contradicting pairs are not counted again.
        longer_chosen: share of unequal pairs whose chosen side has more characters: what a rule 'prefer the longer' would predict.
        length_gap: chosen minus rejected, mean over unequal pairs, characters with white space folded.
        ..._low, ..._high: 95% intervals; records are taken as independent, pairs of one record are not. None with fewer than two.
        chosen_characters, rejected_characters: means over all pairs.
        judges: judgements by who made them ('' where the data does not say). labels: verdicts on single responses.
        unjudged: records of which nothing is said. scored: those among them with two unequal scores.
        unfinished: share of responses that neither say that they are finished nor end like a sentence.
    """

    records: int
    pairs: int
    equal: tuple[str, ...]
    duplicates: tuple[str, ...]
    contradicting: tuple[str, ...]
    shared_prompts: tuple[str, ...]
    cycles: tuple[str, ...]
    longer_chosen: float
    longer_low: float | None
    longer_high: float | None
    length_gap: float
    length_gap_low: float | None
    length_gap_high: float | None
    chosen_characters: float
    rejected_characters: float
    judges: Mapping[str, int]
    labels: int
    unjudged: int
    scored: int
    unfinished: float

    def numbers(self) -> dict[str, float | None]:
        """Counts and means for the manifest."""
        return {k: len(v) if isinstance(v, tuple | Mapping) else v for k, v in vars(self).items()}


def plain(text: Text) -> str:
    """The text, white space folded: what two responses are compared by."""
    whole = text if isinstance(text, str) else "\x1e".join(f"{m.role}\x1f{m.content}" for m in text)
    return " ".join(whole.split())


def characters(text: Text) -> int:
    """Length with white space folded; of messages, what the assistant says."""
    said = (text,) if isinstance(text, str) else (m.content for m in text if m.role == "assistant")
    return sum(len(" ".join(part.split())) for part in said)


def _hash(text: str) -> int:
    """64 bits: among a million texts two fall together by chance once in thirty million files."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Ledger:
    """Records, entered one at a time; `close` draws up the findings."""

    def __init__(self) -> None:
        self.places = Places()
        self.prompt = array("Q")  # per record
        self.record, self.judgement = array("I"), array("I")  # per unequal pair
        self.good, self.bad, self.gap = array("Q"), array("Q"), array("i")
        self.equal = array("I")  # per equal pair its record
        self.judges: Counter[str] = Counter()
        self.ends: Counter[bool] = Counter()
        self.sizes = [0, 0]
        self.judgements = self.labels = self.unjudged = self.scored = 0

    def add(self, record: Record) -> None:
        """Enter a record."""
        index = len(self.prompt)
        self.places.append(record.where or record.id)
        self.prompt.append(_hash(prompt_key(record)))
        self.ends.update(_ends(r.text) for r in record.responses if r.finished is None and isinstance(r.text, str))
        self.judges.update(j.by or "" for j in record.judgements)
        labels = sum(label is not None for label in record.labels or ())
        self.labels += labels
        if not record.judgements and not labels:
            self.unjudged += 1
            self.scored += len({r.score for r in record.responses if r.score is not None}) > 1
        texts = [plain(r.text) for r in record.responses] if record.judgements else []
        sizes = [characters(r.text) for r in record.responses] if record.judgements else []
        for judgement in record.judgements:
            self.judgements += 1
            for pair in pairs(Record("", record.responses, (judgement,))):
                good, bad = texts[pair.chosen], texts[pair.rejected]
                self.sizes[0] += sizes[pair.chosen]
                self.sizes[1] += sizes[pair.rejected]
                if good == bad:
                    self.equal.append(index)
                    continue
                self.record.append(index)
                self.judgement.append(self.judgements)
                self.good.append(_hash(good))
                self.bad.append(_hash(bad))
                self.gap.append(sizes[pair.chosen] - sizes[pair.rejected])

    def _where(self, records: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.places[int(i)] for i in records)

    def _order(self, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records with a pair that an earlier record has, and with one that stands earlier the other way round."""
        good, bad, record = _uint64(self.good), _uint64(self.bad), np.frombuffer(self.record, np.uint32)
        low, high, way = np.minimum(good, bad), np.maximum(good, bad), (good < bad).astype(int)
        order = np.lexsort((high, low, prompt))
        new = np.ones(len(order), bool)
        for key in (prompt, low, high):
            new[1:] &= key[order][1:] == key[order][:-1]
        new[1:] = ~new[1:]
        group = np.empty(len(order), np.int64)
        group[order] = np.cumsum(new) - 1
        first = np.full((len(order) + 1, 2), len(order), np.int64)
        at = np.arange(len(order))
        np.minimum.at(first, (group, way), at)
        mine, other = first[group, way], first[group, 1 - way]
        twice = (mine < at) & (record[np.minimum(mine, len(order) - 1)] != record)
        return np.unique(record[twice]), np.unique(record[other < at])

    def _cycles(self, prompt: np.ndarray) -> tuple[str, ...]:
        """One circle of every prompt whose judgements, contradicting pairs aside, cannot be put into one order."""
        judgement = np.frombuffer(self.judgement, np.uint32)
        order = np.argsort(prompt, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1)
        found = []
        for group in groups:
            if len(group) < 3 or judgement[group[0]] == judgement[group[-1]]:
                continue
            edges = {(self.good[i], self.bad[i]): i for i in map(int, group)}
            edges = {(good, bad): i for (good, bad), i in edges.items() if (bad, good) not in edges}
            sorter: TopologicalSorter[int] = TopologicalSorter()
            for good, bad in edges:
                sorter.add(bad, good)
            try:
                sorter.prepare()
            except CycleError as error:
                circle = list(zip(error.args[1], error.args[1][1:], strict=False))
                records = sorted({self.record[edges[edge if edge in edges else edge[::-1]]] for edge in circle})
                found.append(" > ".join(self._where(records)))
        return tuple(found)

    def close(self) -> Audit:
        """The findings."""
        prompts, record = _uint64(self.prompt), np.frombuffer(self.record, np.uint32)
        gap, count = np.frombuffer(self.gap, np.int32), len(self.record) + len(self.equal)
        twice, against = self._order(prompts[record])
        first = np.unique(prompts, return_index=True)[1]
        again = np.setdiff1d(np.arange(len(prompts)), first)
        mean, error = mean_of(gap.astype(float), record)
        low, high = (None, None) if error is None else (mean - Z95 * error, mean + Z95 * error)
        return Audit(
            len(prompts), count, self._where(self.equal), self._where(twice), self._where(against), self._where(again),
            self._cycles(prompts[record]), *share_of(gap > 0, record), mean, low, high,
            self.sizes[0] / max(1, count), self.sizes[1] / max(1, count), dict(self.judges.most_common()), self.labels, self.unjudged,
            self.scored, self.ends[False] / max(1, self.ends.total()))  # fmt: skip

    def shared_after(self, first: int) -> tuple[str, ...]:
        """Where records from number `first` on stand whose prompt one before it has too."""
        prompts = _uint64(self.prompt)
        return self._where(first + np.flatnonzero(np.isin(prompts[first:], prompts[:first])))

    def leaks(self, train: Ledger) -> tuple[str, ...]:
        """Where records of this ledger stand whose prompt the other has too."""
        return self._where(np.flatnonzero(np.isin(_uint64(self.prompt), _uint64(train.prompt))))


def _uint64(values: array) -> np.ndarray:
    return np.frombuffer(values, np.uint64)


def inspect(records: Iterable[Record]) -> Audit:
    """Read every record once."""
    ledger = Ledger()
    for record in records:
        ledger.add(record)
    return ledger.close()


def sample_lines(where: Sequence[str], most: int = 3, *, total: int | None = None) -> str:
    """'a:1, a:7, a:9 and 4 more'. `total`: how many there are, where only the first are given."""
    count = len(where) if total is None else total
    more = f" and {count - most} more" if count > most else ""
    return ", ".join(where[:most]) + more


def _ends(text: str) -> bool:
    return text.rstrip().endswith(
        (".", "!", "?", "…", "。", "！", "？", '"', "'", "”", "’", ")", "]", "}", "`", ":", ";", ">", "*", "|")
    )
