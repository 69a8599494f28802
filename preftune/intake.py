"""From files to a store, in two passes and bounded memory: what every training verb does before it loads anything to train.

The first pass reads row by row, audits, and lays each record's text on a shelf: a file without a name, so that a kill leaves nothing and
nobody can change it. What stays in memory of a record is its prompt's hash, its place on the shelf and where it stood: some 80 bytes until
the audit is closed, 30 after it. The second pass takes records off the shelf, those that share a prompt together, and encodes them.

    taken = read_records(task, options, folder)
    store, kept = encode_records(taken, codec, options, window=1024)
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Protocol, overload

import numpy as np

from . import audit
from .config import Fitting, Training, data_source
from .errors import DataError, UsageError
from .files import disk
from .formats import Tally, stream
from .records import Judgement, Message, Record, Response, Text, merge
from .screen import clean, say
from .store import Intake, Store, build, unfit
from .tokens import Codec

SPOOL = 1 << 20  # bytes of text that stay in memory before the shelf becomes a file
SOURCE = ("weights", "temperature", "top_p", "kept", "scores")  # what training reads of where a response came from


@dataclass
class Seen:
    """What a verb's selection met: records read, how many say which answer is better, where the first of those stands, how many go on."""

    read: int = 0
    judged: int = 0
    first_judged: str = ""
    kept: int = 0


class Verb(Protocol):
    """What this room asks of a `pipeline.Task`."""

    @property
    def prompts(self) -> bool: ...
    @property
    def select(self) -> Any: ...
    @property
    def refuse(self) -> Any: ...


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [[m.role, m.content] for m in text]


def _provenance(response: Response) -> dict[str, Any] | None:
    return {name: response.source[name] for name in SOURCE if name in response.source} or None if response.source else None


def _text(plain: Any) -> Text:
    return plain if isinstance(plain, str) else tuple(Message(role, content) for role, content in plain)


class Shelf(Sequence[Record]):
    """Records on the disk in the order in which they were put there; in memory eight bytes each. Grows by `append`.

    Kept is what makes tokens and pairs: texts, `finished`, scores, judgements, labels, where, and what SOURCE names of a response's source;
    not the rest of that, nor id and meta.

    Args:
        folder: where the file without a name is made once there is more than SPOOL bytes of text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = SpooledTemporaryFile(max_size=0, dir=str(folder))  # noqa: SIM115 - lives as long as this object
        self.ends = array("q", (0,))
        self.spooled, self.writing = True, True

    def append(self, record: Record) -> None:
        """Put one more on the shelf. Raises DiskError."""
        row = [_plain(record.prompt), [[_plain(r.text), r.finished, r.score, _provenance(r)] for r in record.responses],
               [[j.order, j.below, j.prob, j.weight] for j in record.judgements], record.labels, record.where or record.id]  # fmt: skip
        data = json.dumps(row).encode()
        with disk(self.folder, needed=len(data)):
            if self.spooled and self.ends[-1] + len(data) > SPOOL:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file.rollover()
                self.spooled = False
            if not self.writing:
                self.file.seek(self.ends[-1])
            self.file.write(data)
        self.writing = True
        self.ends.append(self.ends[-1] + len(data))

    def __del__(self) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self.ends[index], self.ends[index + 1]
        with disk(self.folder):
            self.file.seek(start)
            data = self.file.read(end - start)
        self.writing = False
        prompt, responses, judgements, labels, where = json.loads(data)
        return Record(
            _text(prompt), tuple(Response(_text(text), *rest) for text, *rest in responses),
            tuple(Judgement(tuple(map(tuple, order)), tuple(below), prob, weight) for order, below, prob, weight in judgements),
            None if labels is None else tuple(labels), where=where)  # fmt: skip


@dataclass
class Taken:
    """What the first pass left.

    Args:
        shelf: the records that go on, those to train on before those held out. prompt: (N,) uint64, hash of each one's prompt.
        judged: (N,) bool, whether something is said of its responses. first: how many are to train on; -1: split later.
        facts: counts for the manifest. stamps: size and time of each file as it was read.
    """

    shelf: Shelf
    prompt: np.ndarray
    judged: np.ndarray
    first: int
    facts: dict[str, Any]
    stamps: dict[str, tuple[int, int]]


def stamps(words: Sequence[object]) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file among --data words."""
    paths = [data_source(str(word))[0] for word in words]
    return {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)}


def unchanged(taken: Taken, words: Sequence[object]) -> None:
    """Raises DataError where a file is no longer the one that was read, so that its fingerprint would be another's."""
    for path, stamp in stamps(words).items():
        if taken.stamps.get(path) != stamp:
            raise DataError("changed while it was read; start again", path=path)


class _Taker:
    """The first pass: every record into the ledger, what goes on onto the shelf."""

    def __init__(self, folder: Path, keep_equal: bool) -> None:
        self.ledger, self.shelf, self.keep_equal = audit.Ledger(), Shelf(folder), keep_equal
        self.prompt, self.judged = array("Q"), array("b")
        self.gone: list[str] = []  # the first few places of records with two equal sides
        self.equal = 0
        self.ends: Counter[bool] = Counter()  # of the responses of what goes on

    def take(self, task: Verb, options: Fitting, words: Sequence[object], max_records: int | None) -> tuple[Tally, Seen]:
        """Read files to their end."""
        tally, seen = Tally(), Seen()
        for record in stream(words, tally, format=options.format, skip_bad=options.skip_bad, max_records=max_records,
                             from_scores=options.from_scores, prompts=task.prompts):  # fmt: skip
            seen.read += 1
            if record.judgements or record.labels is not None:
                seen.judged += 1
                seen.first_judged = seen.first_judged or record.where
            if (chosen := task.select(record, options)) is not None:
                seen.kept += 1
                self._put(chosen)
        task.refuse(seen, options)
        return tally, seen

    def _put(self, record: Record) -> None:
        ledger, equal, ends = self.ledger, len(self.ledger.equal), self.ledger.ends.copy()
        ledger.add(record)
        if len(ledger.equal) > equal and not self.keep_equal:
            self.equal += 1
            self.gone += [record.where] if len(self.gone) < 8 else []
            return
        self.ends.update(ledger.ends - ends)
        self.prompt.append(ledger.prompt[-1])
        self.judged.append(bool(record.judgements) or record.labels is not None)
        self.shelf.append(record)


def read_records(task: Verb, options: Fitting, folder: Path) -> Taken:
    """Read and audit. Raises DataError where the files hold too much that is wrong, and says what was left out.

    Args:
        folder: where what does not stay in memory goes.
    """
    before = stamps((*options.data, *options.eval_data))
    taker = _Taker(folder, "equal" in options.allow)
    tally, seen = taker.take(task, options, options.data, options.max_records)
    marker = "skipped: "
    facts: dict[str, Any] = {
        "read": seen.read, "layout": ", ".join(tally.layouts), "unreadable": len(tally.skipped), "nothing_to_learn": seen.read - seen.kept,
        "unreadable_by_reason": {k.removeprefix(marker): n for k, n in tally.counts.items() if k.startswith(marker)},
        "shown": [str(e) for e in tally.skipped[:100]],
    }  # fmt: skip
    if tally.skipped:
        say(f"left out {len(tally.skipped)} unusable rows, the first: {clean(str(tally.skipped[0]))}")
    first = -1
    if options.eval_data:
        first, entered = len(taker.shelf), len(taker.ledger.prompt)
        taker.take(task, options, options.eval_data, None)
        shared = taker.ledger.shared_after(entered)
        if shared and "leak" not in options.allow:
            lines = audit.sample_lines(shared)
            raise DataError(
                f"{len(shared)} held-out prompts stand in the training data too ({lines}); remove them, or --allow leak"
            )
        facts["leaks"] = len(shared)
    found = taker.ledger.close()
    facts["audit"] = found.numbers()
    if taker.equal:
        if len(found.equal) > audit.EQUAL_SHARE * max(1, found.pairs) and not options.skip_bad:
            lines = audit.sample_lines(found.equal)
            raise DataError(f"{len(found.equal)} of {found.pairs} pairs have two equal sides ({lines}); mend the file, "
                            "or --skip-bad leaves them out, --allow equal trains on them")  # fmt: skip
        facts["equal_left_out"] = taker.equal
        say(f"left out {taker.equal} records whose two sides are equal: {audit.sample_lines(taker.gone, total=taker.equal)}")
    if found.contradicting and "contradicting" not in options.allow:
        say(f"{len(found.contradicting)} records contradict an earlier one: {audit.sample_lines(found.contradicting)}")
    share = taker.ends[False] / max(1, taker.ends.total())
    if options.finish == "auto" and share > 0.5:
        say(f"{share:.0%} of the responses do not end like a sentence; if they were cut, say --finish never")
    return Taken(taker.shelf, np.array(taker.prompt), np.array(taker.judged, bool), first, facts, before)


def split_by_prompt(prompts: np.ndarray, holdout: float, seed: int) -> np.ndarray:
    """True for records held out: a seeded share of the distinct prompts, at least one where `holdout` is above 0. (N,) of (N,) hashes."""
    _, at, number = np.unique(prompts, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(at))[number]  # prompts numbered as they first appear
    count = min(len(at) - 1, max(1, round(holdout * len(at)))) if holdout else 0
    chosen = np.zeros(len(at), bool)
    chosen[np.random.default_rng(seed).permutation(len(at))[:count]] = True
    return chosen[rank]


@dataclass
class Plan:
    """Which records of a shelf become one.

    Args:
        stands: (M,) the record where each one of the whole stands, in order. first: how many of them are to train on, or -1.
        group: member records of all groups, one group behind the other, each in order; leader: (G,) the first of each, ascending;
        start: (G+1,) where each group begins.
    """

    stands: np.ndarray
    first: int
    group: np.ndarray
    leader: np.ndarray
    start: np.ndarray

    def records(self, shelf: Shelf) -> Iterator[Record]:
        """The records as they are to be encoded, one at a time."""
        number = 0
        for i in map(int, self.stands):
            if number < len(self.leader) and self.leader[number] == i:
                members = self.group[self.start[number] : self.start[number + 1]]
                (record,) = merge([shelf[int(j)] for j in members])  # two prompts with one hash would not fit: 1 in 30 million files
                number += 1
                yield record
            else:
                yield shelf[i]


def merge_prompts(taken: Taken, codec: Codec, max_length: int | None) -> Plan:
    """Records that share a prompt as one record, on either side of the split, where the first of them stands.

    One that could not be used by itself stays by itself, so that its fault takes no other with it; so does one of which nothing is
    said where two or more with its prompt are judged.
    """
    n = len(taken.shelf)
    held = np.arange(n) >= (taken.first if taken.first >= 0 else n)
    number = np.unique(taken.prompt, return_inverse=True)[1]
    order = np.flatnonzero(taken.judged | (np.bincount(number, taken.judged)[number] <= 1))
    order = order[np.lexsort((order, taken.prompt[order], held[order]))]  # by side, prompt, place
    order = order[_repeated(taken.prompt[order], held[order])]
    fits = ~np.array(unfit((taken.shelf[int(i)] for i in order), codec, max_length=max_length), bool)
    order = order[fits]
    order = order[_repeated(taken.prompt[order], held[order])]
    new = np.ones(len(order), bool)
    new[1:] = ~_same(taken.prompt[order], held[order])
    stays = np.ones(n, bool)
    stays[order[~new]] = False
    first_of = order[new][np.cumsum(new) - 1]  # per record the first of its group: groups are taken in the order of these
    leader, sizes = np.unique(first_of, return_counts=True)
    plan = Plan(np.flatnonzero(stays), int(stays[: taken.first].sum()) if taken.first >= 0 else -1,
                order[np.lexsort((order, first_of))], leader, np.append(0, np.cumsum(sizes)))  # fmt: skip
    if gone := n - len(plan.stands):
        say(f"merged {gone} records into an earlier one with their prompt: {len(plan.stands)} left")
    return plan


def _same(prompt: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Per sorted record but the first whether it shares prompt and side with the one before it."""
    return (prompt[1:] == prompt[:-1]) & (held[1:] == held[:-1])


def _repeated(prompt: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Per sorted record whether a neighbour shares prompt and side with it."""
    out = np.zeros(len(prompt), bool)
    out[1:] |= (same := _same(prompt, held))
    out[:-1] |= same
    return out


def longest(options: Training, window: int | None, *, prompts: bool) -> int | None:
    """The most tokens that a record may have, None for no limit; prompts leave room for a sample. Raises UsageError."""
    if options.max_length and window and options.max_length > window:
        raise UsageError(f"--max-length {options.max_length}: the model has {window} positions")
    limit = options.max_length or window
    if not prompts or limit is None:
        return limit
    if limit <= options.sample_tokens + 1:
        raise UsageError(f"--sample-tokens {options.sample_tokens}: leaves no room for a prompt among {limit} positions")
    return limit - options.sample_tokens + 1


def encode_records(taken: Taken, plan: Plan, codec: Codec, options: Training, *, window: int | None, mismatched: bool,
                   folder: Path, members: bool = False, weights: str | None = None, nested: bool = False,
                   prompts: bool = False) -> tuple[Store, Intake]:  # fmt: skip
    """The store, or DataError where too much had to be left out."""
    limit = longest(options, window, prompts=prompts)
    store, intake = build(plan.records(taken.shelf), codec, max_length=limit, mismatched=mismatched, folder=folder,
                          members=members, weights=weights, nested=nested)  # fmt: skip
    reasons = ", ".join(f"{n} {reason}" for reason, n in intake.dropped.most_common())
    if not len(store):
        need = f"; the shortest record needs {min(intake.lengths)} tokens" if intake.lengths else ""
        raise DataError(f"no record can be used: {reasons}{need}; first: {intake.refused[0]}")
    unencodable = {k: v for k, v in intake.dropped.items() if not k.endswith("too long")}
    if unencodable and not options.skip_bad:
        first = next(e for e in intake.refused if "too long" not in e.reason)
        raise DataError(
            f"{sum(unencodable.values())} records cannot be encoded; first: {first} (--skip-bad leaves them out and counts them)"
        )
    if reasons:
        say(f"left out {sum(intake.dropped.values())} of {intake.read} records: {reasons}")
    return store, intake


def prompts_to_sample(taken: Taken, kept: np.ndarray, store: Store, held: np.ndarray, options: Training, window: int | None) -> list[Text]:
    """The first distinct held-out prompts after which a sample of full length still has positions.

    Args:
        kept: (R,) for each of the store's records the shelf's. held: (R,) bool.
    """
    size = np.diff(store.start)[store.record_start[:-1]]
    fits = held & (size + options.sample_tokens <= window) if window else held
    if options.eval_prompts and fits.sum() < held.sum():
        say(
            f"{held.sum() - fits.sum()} held-out prompts leave no room for --sample-tokens {options.sample_tokens} and are not sampled from"
        )
    places = kept[fits]
    firsts = np.sort(np.unique(taken.prompt[places], return_index=True)[1])[: options.eval_prompts]
    return [taken.shelf[int(places[i])].prompt for i in firsts]
