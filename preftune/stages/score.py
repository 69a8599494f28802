"""`preftune score`: a reward for every response of a file, or a judge's verdicts on every two responses.

Records in, records out: `score` is filled in, `meta.scored` says who scored, with which fingerprint, `source.scores` what each of several
said. A judge that compares makes judgements instead. What is finished is on the disk at once; the same command goes on where a stopped
one was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .. import endpoints, judges
from ..config import Score
from ..errors import DataError, UsageError
from ..files import fingerprint
from ..formats import Reading, read, to_json
from ..models import pick_device
from ..records import Judgement, Message, Record, as_text
from ..rewards import Scorer, combine, scorer
from ..runs import Draft, draft
from ..screen import bar, clean, say

FREE = ("output", "data", "offline", "dry_run", "skip_bad", "question", "replace", "max_records", "format", "concurrency", "retries",
        "timeout", "key_variable", "price_in", "price_out")  # fmt: skip
CHUNK = 64  # records that a local reward takes at a time


def run(options: Score) -> int:
    """Score or judge every record of the files. Raises UsageError, DataError, EndpointError; what was finished is kept."""
    if not options.reward and not options.judge:
        raise UsageError("--reward or --judge must be given, for example:\n  " + options.EXAMPLE)
    if len(options.reward) > 1 and not options.combine:
        raise UsageError(f"--reward names {len(options.reward)} rewards: --combine mean or sum says how they become one score")
    if Path(str(options.output)).exists():
        raise UsageError(f"--output {options.output}: exists already; name a new file")
    reading = read(options.data, format=options.format, skip_bad=options.skip_bad, max_records=options.max_records)
    _tell_skipped(reading)
    records = reading.records
    taken = [r.where for r in records if (r.judgements if options.judge else any(a.score is not None for a in r.responses))]
    if taken and not options.replace:
        what = "judged" if options.judge else "scored"
        raise DataError(f"{len(taken)} records are {what} already (the first: {taken[0]}); --replace puts new ones in their place")
    made_from = {name: value for name, value in asdict(options).items() if name not in FREE}
    made_from |= {"question": _question(options), "records": fingerprint([to_json(r) for r in records])}
    return (_judge if options.judge else _score)(options, records, made_from)


def _tell_skipped(reading: Reading) -> None:
    for reason, count in reading.counts.items():
        if reason.startswith("skipped: "):
            say(f"left out {count}: {clean(reason.removeprefix('skipped: '))}")


def _question(options: Score) -> str:
    return Path(options.question).read_text(encoding="utf-8").strip() if options.question else ""


# --- rewards --------------------------------------------------------------------------------------------------------------------


def _score(options: Score, records: Sequence[Record], made_from: dict[str, Any]) -> int:
    flat = [(r, j) for r, record in enumerate(records) for j in range(len(record.responses))]
    start = np.cumsum([0, *(len(record.responses) for record in records)])
    asked = [spec.startswith("judge:") for spec in options.reward]
    endpoint = {spec: endpoints.connect(spec, options) for spec, far in zip(options.reward, asked, strict=True) if far}
    if options.dry_run:
        for spec in options.reward:
            say(f"{clean(spec)}: {len(flat)} responses of {len(records)} records")
            if spec in endpoint:
                _tell_price(endpoint[spec], _gradings(endpoint[spec], records, flat, options), options)
        say(f"nothing was done; without --dry-run: -> {clean(str(options.output))}")
        return 0
    scorers = {spec: scorer(spec, device=pick_device(options.device), dtype=options.dtype, offline=options.offline,
                            micro_tokens=options.micro_tokens) for spec in options.reward if spec not in endpoint}  # fmt: skip
    prints = {spec: scorers[spec].fingerprint if spec in scorers else fingerprint(judges.grading("", "", question=made_from["question"]))
              for spec in options.reward}  # fmt: skip
    with draft(Path(str(options.output)), made_from | {"rewards": prints}) as found:
        for number, spec in enumerate(options.reward):
            first = number * len(flat)
            if spec in scorers:
                _score_here(scorers[spec], records, start, first, found)
            else:
                jobs = {first + n: job for n, job in _gradings(endpoint[spec], records, flat, options).items()}
                endpoints.gather(endpoint[spec], jobs, lambda answer: [judges.read_score(answer.text)], found, "judging",
                                 leave_out=options.skip_bad)  # fmt: skip
        said = [[found.item(number * len(flat) + n) for n in range(len(flat))] for number in range(len(options.reward))]
        every = [[v and float(combine(np.array(v)[:, None], scorers[spec].how)[0] if spec in scorers else v[0]) for v in column]
                 for spec, column in zip(options.reward, said, strict=True)]  # fmt: skip
        one = _combined(every, options.combine)
        found.publish(lambda: _scored(records, start, said, one, options, prints))
    for name, column in ((*zip(options.reward, every, strict=True), *([(str(options.combine), one)] if len(every) > 1 else []))):
        _tell_mean(name, column, start)
    say(f"{len(records)} records -> {options.output}")
    return 0


def _score_here(scorer: Scorer, records: Sequence[Record], start: np.ndarray, first: int, found: Draft) -> None:
    """What every member says of every response, chunk by chunk, the same chunks whatever is done already."""
    with bar("scoring", len(records)) as advance:
        for a in range(0, len(records), CHUNK):
            group = records[a : a + CHUNK]
            numbers = range(first + int(start[a]), first + int(start[a + len(group)]))
            if any(n not in found.places for n in numbers):
                prompts, responses = [r.prompt for r in group for _ in r.responses], [x for r in group for x in r.responses]
                table = scorer.table(prompts, responses)
                found.add({n: v for n, v in zip(numbers, table.T.tolist(), strict=True) if n not in found.places})
            advance(a + len(group), len(records))


def _gradings(endpoint: endpoints.Endpoint, records: Sequence[Record], flat: Sequence[tuple[int, int]],
              options: Score) -> dict[int, dict[str, Any]]:  # fmt: skip
    question = _question(options)
    texts = (judges.grading(as_text(records[r].prompt), as_text(records[r].responses[j].text), question=question) for r, j in flat)
    return {n: _put(endpoint, text, n, options) for n, text in enumerate(texts)}


def _put(endpoint: endpoints.Endpoint, text: str, number: int, options: Score) -> dict[str, Any]:
    """One question to a judge, who answers with what is likeliest."""
    return endpoints.body(endpoint, (Message("user", text),), temperature=0.0, top_p=1.0, max_tokens=options.judge_tokens,
                          seed=endpoints.seed_of(0, number))  # fmt: skip


def _tell_price(endpoint: endpoints.Endpoint, jobs: dict[int, dict[str, Any]], options: Score) -> None:
    read = sum(endpoints.guess_tokens(job["messages"][0]["content"]) for job in jobs.values())
    most = len(jobs) * options.judge_tokens
    say(f"{len(jobs)} requests to {endpoint.address.url}, {endpoint.concurrency} at a time; about {read:,} tokens to read, at most "
        f"{most:,} to write{endpoints.cost_text(endpoint, read, most, 'at most')}")  # fmt: skip


def _combined(every: Sequence[Sequence[float | None]], how: str | None) -> list[float | None]:
    """One score a response; None where one of its rewards is missing."""
    one = [None if None in values else sum(v for v in values if v is not None) for values in zip(*every, strict=True)]
    return [None if v is None else v / len(every) for v in one] if how == "mean" else one


def _scored(records: Sequence[Record], start: np.ndarray, said: Sequence[Sequence[list[float] | None]], one: Sequence[float | None],
            options: Score, prints: dict[str, str]) -> Iterator[dict[str, Any]]:  # fmt: skip
    for r, record in enumerate(records):
        span = slice(int(start[r]), int(start[r + 1]))
        by: dict[str, Any] = {"by": prints} | ({"combine": options.combine} if options.combine else {})
        told = zip(*(column[span] for column in said), strict=True)
        responses = tuple(replace(x, score=v, source=_with_members(x.source, None if v is None else [m for each in t for m in each or ()]))
                          for x, v, t in zip(record.responses, one[span], told, strict=True))  # fmt: skip
        yield to_json(replace(record, responses=responses, meta={**record.meta, "scored": by}))


def _with_members(source: Mapping[str, Any] | None, told: list[float] | None) -> dict[str, Any] | None:
    """The source with what each of several rewards, or members of an ensemble, said: `records.scores_of` reads it."""
    rest = {k: v for k, v in (source or {}).items() if k != "scores"}
    return (rest | {"scores": told} if told and len(told) > 1 else rest) or None


def _tell_mean(name: str, column: Sequence[float | None], start: np.ndarray) -> None:
    """Mean over records of the mean over a record's responses, with its standard error."""
    rows = [[v for v in column[a:b] if v is not None] for a, b in pairwise(start.tolist())]
    means = np.array([np.mean(row) for row in rows if row])
    missing = sum(v is None for v in column)
    se = f" ± {means.std(ddof=1) / np.sqrt(len(means)):.4f}" if len(means) > 1 else ""
    say(f"{clean(name)}: mean {means.mean():.4f}{se}" + (f", {missing} without a score" if missing else "") if len(means) else
        f"{clean(name)}: no score")  # fmt: skip


# --- a judge that compares ------------------------------------------------------------------------------------------------------


def _couples(records: Sequence[Record]) -> tuple[list[tuple[int, int, int]], int]:
    """(record, response, response) of all that are compared, and how many were not because their texts are equal."""
    every = [(r, a, b) for r, record in enumerate(records) for b in range(len(record.responses)) for a in range(b)]
    apart = [(r, a, b) for r, a, b in every if records[r].responses[a].text != records[r].responses[b].text]
    return apart, len(every) - len(apart)


def _judge(options: Score, records: Sequence[Record], made_from: dict[str, Any]) -> int:
    couples, equal = _couples(records)
    if not couples:
        raise DataError("no record has two different responses: nothing to compare")
    endpoint, question = endpoints.connect(str(options.judge), options), made_from["question"]
    jobs = {}
    for n, (r, a, b) in enumerate(couples):
        prompt, (one, two) = as_text(records[r].prompt), (as_text(records[r].responses[i].text) for i in (a, b))
        for turned, (left, right) in enumerate(((one, two), (two, one))):
            jobs[2 * n + turned] = _put(endpoint, judges.comparison(prompt, left, right, question=question), 2 * n + turned, options)
    if options.dry_run:
        _tell_price(endpoint, jobs, options)
        say(f"nothing was done; without --dry-run: -> {clean(str(options.output))}")
        return 0
    with draft(Path(str(options.output)), made_from) as found:
        endpoints.gather(endpoint, jobs, lambda answer: judges.read_verdict(answer.text), found, "judging", leave_out=options.skip_bad)
        said = [(found.item(2 * n), found.item(2 * n + 1)) for n in range(len(couples))]
        made = _judgements(couples, said, f"judge {endpoint.address.name}")
        by = {"by": {str(options.judge): fingerprint(judges.comparison("", "", "", question=question))}}
        found.publish(lambda: (to_json(replace(record, judgements=tuple(made.get(r, ())), meta={**record.meta, "judged": by}))
                               for r, record in enumerate(records)))  # fmt: skip
    _tell_verdicts(said, equal)
    say(f"{len(records)} records, {sum(map(len, made.values()))} judgements -> {options.output}")
    return 0


def _judgements(couples: Sequence[tuple[int, int, int]], said: Sequence[tuple[str | None, str | None]],
                by: str) -> dict[int, list[Judgement]]:  # fmt: skip
    """Record -> its judgements: a pair, or a tie where the order changed the verdict. None where a verdict is missing."""
    made: dict[int, list[Judgement]] = {}
    for (r, a, b), (straight, turned) in zip(couples, said, strict=True):
        if straight is None or turned is None:
            continue
        orders = {"first": ((a,), (b,)), "second": ((b,), (a,)), "tie": ((a, b),)}
        made.setdefault(r, []).append(Judgement(orders[judges.both_orders(straight, turned)], by=by))
    return made


def _tell_verdicts(said: Sequence[tuple[str | None, str | None]], equal: int) -> None:
    whole = [pair for pair in said if None not in pair]
    outcome = Counter(judges.both_orders(str(a), str(b)) for a, b in whole)
    fickle = sum(a == b and a != "TIE" for a, b in whole)
    places = Counter(v for pair in whole for v in pair)
    say(f"{len(whole)} pairs in both orders: {outcome['first'] + outcome['second']} decided, {outcome['tie']} ties, "
        f"of which {fickle} because the verdict changed with the order")  # fmt: skip
    say(f"shown first won {places['A']}, shown second {places['B']}, tie {places['TIE']}")
    for count, what in ((len(said) - len(whole), "without both verdicts"), (equal, "not asked: equal texts")):
        if count:
            say(f"left out {count} pairs: {what}")
