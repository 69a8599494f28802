"""Records: merging rows that share a prompt, and judgements made of scores. Votes are counted before and after."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.records import Judgement, Message, Record, Response, judge_by_scores, merge, pairs, prompt_key, verdicts


def pair(prompt, good, bad, **more) -> Record:
    return Record(prompt, (Response(good), Response(bad)), (Judgement(((0,), (1,)), **more.pop("judgement", {})),), **more)


def said(records) -> Counter:
    """Votes by prompt and texts: what merging must keep."""
    votes: Counter = Counter()
    for r in records:
        for p in pairs(r):
            votes[prompt_key(r), r.responses[p.chosen].text, r.responses[p.rejected].text, p.prob] += p.weight
    return votes


def test_rows_that_share_a_prompt_become_one_record():
    rows = [pair("p", "a", "b", where="f:1", id="one", meta={"k": 1}), pair("q", "a", "b", where="f:2"),
            pair("p", "c", "a", where="f:3", meta={"k": 2}, judgement={"weight": 3.0, "by": "x"}),
            pair("p", "b", "a", where="f:4")]  # fmt: skip
    whole, other = merge(rows)
    assert other is rows[1]
    assert [r.text for r in whole.responses] == ["a", "b", "c"] and (whole.where, whole.id) == ("f:1", "one")
    assert whole.judgements == (Judgement(((0,), (1,))), Judgement(((2,), (0,)), weight=3.0, by="x"), Judgement(((1,), (0,))))
    others = [{"where": "f:3", "id": "", "meta": {"k": 2}}, {"where": "f:4", "id": "", "meta": {}}]
    assert whole.meta == {"k": 1, "merged": others}
    assert said([whole, other]) == said(rows)  # the contradiction of f:1 and f:4 stands


def test_what_is_one_response_and_what_is_not():
    cut, ended = Response("a", finished=False), Response("a", finished=True)
    whole = merge([Record("p", (cut, Response("b"))), Record("p", (ended, Response("b", score=2.0, source={"m": 1})))])[0]
    assert whole.responses == (cut, Response("b", score=2.0, source={"m": 1}), ended)
    equal = merge([pair("p", "a", "a"), pair("p", "a", "b")])[0]  # two equal sides stay two
    assert [r.text for r in equal.responses] == ["a", "a", "b"] and equal.judgements[0].order == ((0,), (1,))
    assert len(merge([pair("p", "a", "b"), pair((Message("user", "p"),), "a", "b")])) == 2


def test_every_label_is_a_vote_of_its_own():
    rows = [Record("p", (Response("a"),), labels=(label,)) for label in (True, True, False)] + [pair("p", "a", "b")]
    whole = merge(rows)[0]
    assert whole.labels == (True, True, False, None, None) and [r.text for r in whole.responses] == ["a", "a", "a", "a", "b"]
    assert [good for _, good, _ in verdicts(whole)] == [True, True, False]


TEXTS = st.sampled_from("abcd")


@st.composite
def rows(draw) -> Record:
    texts = draw(st.lists(TEXTS, min_size=2, max_size=4))
    order = draw(st.permutations(range(len(texts))))
    cut = draw(st.integers(1, len(order)))
    judgement = Judgement(tuple((i,) for i in order[:cut]), tuple(order[cut:]), weight=draw(st.integers(1, 3)))
    return Record(draw(st.sampled_from("pq")), tuple(map(Response, texts)), (judgement,))


@settings(max_examples=200, deadline=None)
@given(st.lists(rows(), max_size=6))
def test_merging_keeps_every_vote_and_is_done_once(records):
    merged = merge(records)
    assert said(merged) == said(records)
    assert [r.prompt for r in merged] == list(dict.fromkeys(r.prompt for r in records))
    for judgement in (j for r in merged for j in r.judgements):
        named = [i for tier in (*judgement.order, judgement.below) for i in tier]
        assert len(set(named)) == len(named)
    assert merge(merged) == merged


def test_scores():
    def judged(scores, how):
        return judge_by_scores(Record("p", tuple(Response(str(i), score=s) for i, s in enumerate(scores))), how).judgements

    assert judged([1, 3, 2], "all") == (Judgement(((1,), (2,), (0,))),) and judged([1, 3, 2], "best-worst") == (Judgement(((1,), (0,))),)
    assert judged([3, None, 3, 1, 1], "best-worst") == (Judgement(((0,), (3,))),)
    assert judged([2, 2], "all") == judged([None, 2], "best-worst") == ()
    labelled = Record("p", (Response("a", score=1.0), Response("b", score=2.0)), labels=(True, False))
    assert judge_by_scores(labelled, "all") is labelled


def test_a_doubtful_pair_is_votes_for_and_against_as_verdicts():
    record = Record("p", (Response("a"), Response("b")), (Judgement(((0,), (1,)), prob=0.25, weight=4.0),))
    assert list(verdicts(record)) == [(0, True, 1.0), (0, False, 3.0), (1, False, 1.0), (1, True, 3.0)]
    sure = Record("p", record.responses, (Judgement(((0,), (1,)), weight=2.0),))
    assert list(verdicts(sure)) == [(0, True, 2.0), (1, False, 2.0)]
