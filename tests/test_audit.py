"""The audit against a count that looks at every pair of records: slow, short, and without hashes."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from preftune.audit import Ledger, inspect, mean_of, share_of
from preftune.records import Judgement, Message, Places, Record, Response, pairs


def pair(prompt, good, bad, line=1, **judgement) -> Record:
    return Record(prompt, (Response(good), Response(bad)), (Judgement(((0,), (1,)), **judgement),), where=f"f.jsonl:{line}")


def slow(records) -> dict:
    """The same findings by comparing everything with everything before it."""
    said = [(i, r.prompt, " ".join(r.responses[p.chosen].text.split()), " ".join(r.responses[p.rejected].text.split()))
            for i, r in enumerate(records) for p in pairs(r)]  # fmt: skip
    true = [s for s in said if s[2] != s[3]]
    where = [r.where for r in records]
    twice = {b[0] for a, b in itertools.combinations(true, 2) if a[1:] == b[1:] and a[0] != b[0]}
    against = {b[0] for a, b in itertools.combinations(true, 2) if (a[1], a[2], a[3]) == (b[1], b[3], b[2])}
    over = {(p, a, b) for _, p, a, b in true} - {(p, b, a) for _, p, a, b in true}
    circular = set()
    for prompt in {p for p, _, _ in over}:
        reach = {(a, b) for p, a, b in over if p == prompt}
        for k in {x for edge in reach for x in edge}:  # Warshall
            reach |= {(a, b) for a, m in reach for n, b in reach if m == n == k}
        if any(a == b for a, b in reach):
            circular.add(prompt)
    return {"pairs": len(said), "equal": [where[s[0]] for s in said if s[2] == s[3]], "duplicates": [where[i] for i in sorted(twice)],
            "contradicting": [where[i] for i in sorted(against)], "cycles": len(circular),
            "shared_prompts": [r.where for i, r in enumerate(records) if any(r.prompt == b.prompt for b in records[:i])],
            "longer_chosen": sum(len(a) > len(b) for _, _, a, b in true) / max(1, len(true)),
            "length_gap": sum(len(a) - len(b) for _, _, a, b in true) / max(1, len(true))}  # fmt: skip


TEXTS = st.sampled_from(["a", "a ", "bb", "ccc", " bb"])


@st.composite
def rows(draw) -> Record:
    texts = draw(st.lists(TEXTS, min_size=2, max_size=3))
    judgements = [Judgement(tuple((i,) for i in draw(st.permutations(range(len(texts)))))) for _ in range(draw(st.integers(0, 2)))]
    return Record(draw(st.sampled_from("pq")), tuple(map(Response, texts)), tuple(judgements))


@settings(max_examples=400, deadline=None)
@given(st.lists(rows(), max_size=7))
def test_every_finding_is_that_of_the_slow_count(records):
    records = [Record(r.prompt, r.responses, r.judgements, where=f"f:{i + 1}") for i, r in enumerate(records)]
    found = inspect(records)
    for name, value in slow(records).items():
        mine = getattr(found, name)
        assert (len(mine) if name == "cycles" else list(mine) if isinstance(mine, tuple) else mine) == pytest.approx(value), name


def test_circles_name_their_records_and_two_judges_of_one_record_are_no_duplicate():
    ring = [pair("p", "a", "b", 1), pair("p", "b", "c", 2), pair("p", "x", "a", 3), pair("p", "c", "a", 4), pair("q", "c", "a", 5)]
    assert inspect(ring).cycles == ("f.jsonl:1 > f.jsonl:2 > f.jsonl:4",)
    assert inspect([*ring, pair("p", "a", "c", 6)]).cycles == ()  # now a contradicting pair, told once
    agree = Record("p", (Response("a"), Response("b")), (Judgement(((0,), (1,)), by="x"), Judgement(((0,), (1,)), by="y")), where="f:1")
    found = inspect([agree])
    assert found.duplicates == () and found.pairs == 2 and found.judges == {"x": 1, "y": 1}


def test_only_what_the_assistant_says_has_a_length():
    talk = (Message("assistant", "four  or 4"), Message("user", "sure?"), Message("assistant", "yes"))
    found = inspect([Record((Message("user", "2+2?"),), (Response(talk), Response("5")), (Judgement(((0,), (1,))),))])
    assert (found.chosen_characters, found.rejected_characters, found.length_gap) == (12, 1, 11)


def test_what_is_not_judged_is_counted():
    scored = Record("p", (Response("a", score=1.0), Response("b", score=2.0)))
    tied = Record("p", (Response("a", score=1.0), Response("b", score=1.0)))
    labelled = Record("p", (Response("a"), Response("b.")), labels=(True, None))
    found = inspect([scored, tied, labelled, pair("p", "One.", "two", by="judge")])
    assert (found.unjudged, found.scored, found.labels, found.judges) == (2, 1, 1, {"judge": 1})
    assert found.unfinished == 6 / 8
    empty = inspect([])
    assert empty.numbers()["records"] == 0 and empty.length_gap_low is None and empty.longer_chosen == 0


def test_intervals_are_the_usual_ones_where_every_record_has_one_pair():
    rng = np.random.default_rng(0)
    gap = rng.integers(-20, 30, 200).astype(float)
    mean, error = mean_of(gap, np.arange(200))
    assert mean == gap.mean() and error == pytest.approx(stats.sem(gap))
    share, low, high = share_of(gap > 0, np.arange(200))
    known = stats.binomtest(int((gap > 0).sum()), 200).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((known.low, known.high), abs=2e-3) and share == (gap > 0).mean()
    assert share_of(np.ones(50, bool), np.arange(50))[1:] == pytest.approx(stats.binomtest(50, 50).proportion_ci(method="wilson"))


def test_pairs_of_one_record_are_not_counted_as_independent():
    gap = np.repeat([1.0, 5.0, 3.0, 9.0], 6)
    assert mean_of(gap, np.repeat(np.arange(4), 6))[1] == pytest.approx(stats.sem([1, 5, 3, 9]))
    assert mean_of(gap, np.zeros(24, int)) == (4.5, None)


def test_intervals_hold_what_they_say():
    """Coverage of 95% intervals over 300 files of 60 records with 1 to 4 pairs that lean together."""
    rng, hits = np.random.default_rng(1), [0, 0]
    for _ in range(300):
        lean = rng.normal(0, 1, 60)
        cluster = np.repeat(np.arange(60), rng.integers(1, 5, 60))
        gap = 0.5 + lean[cluster] + rng.normal(0, 1, len(cluster))
        mean, error = mean_of(gap, cluster)
        hits[0] += abs(mean - 0.5) < 1.96 * error
        _, low, high = share_of(gap > 0, cluster)
        hits[1] += low < stats.norm.cdf(0.5 / math.sqrt(2)) < high
    assert all(0.91 < hit / 300 < 0.98 for hit in hits), hits


def test_leaks():
    train, held = Ledger(), Ledger()
    for i in range(5):
        train.add(pair(f"p{i}", "a", "b", i))
        held.add(pair(f"p{i + 4}", "a", "b", i))
    assert held.leaks(train) == ("f.jsonl:0",)


@given(st.lists(st.sampled_from(["a:1", "a:02", "a", "b:7", "x:y", "a:-3", "", ":", "a:1:2", "a:²", "a:" + "1" * 20]), max_size=9))
def test_places_are_kept_as_they_are(where):
    places = Places(where)
    assert list(places) == where and len(places) == len(where) and places[1:] == where[1:]


def test_a_record_costs_less_than_a_hundred_bytes():
    rng = random.Random(0)
    tracemalloc.start()
    ledger = Ledger()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(20_000):
        ledger.add(pair(f"prompt {i}", f"answer {rng.random()}", "no", i + 1))
    cost = (tracemalloc.get_traced_memory()[0] - before) / 20_000
    tracemalloc.stop()
    assert cost < 70, cost
    assert ledger.close().pairs == 20_000
