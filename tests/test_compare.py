"""`preftune compare`: answers from models, files and votes; who won and how surely; stopped and gone on; a page that is safe to open."""

from __future__ import annotations

import json
import re

import make
import numpy as np
import pytest
from scipy import stats
from test_endpoints import Server, answer
from test_report import Page

from preftune import certainty
from preftune.config import Compare, Dpo
from preftune.errors import DataError, EndpointError, UsageError
from preftune.formats import read
from preftune.records import Response, pairs
from preftune.report.evaluated import MOST_SHOWN, comparison_page
from preftune.stages import compare, dpo

pytestmark = pytest.mark.usefixtures("private_cache")
PROMPTS = [f"{i} the cat" for i in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    make.write_model(folder / "one")
    make.write_model(folder / "two", seed=1)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "rule.py").write_text("def even(prompt, response):\n    return float(sum(map(ord, response)) % 7)\n"
                                    "def size(prompt, response):\n    return float(len(response))\n")  # fmt: skip
    return folder


def options(place, **given):
    words = {"model": [str(place / "one"), str(place / "two")], "prompts": [str(place / "prompts.txt")], "sample_tokens": 8, "threads": 1,
             "reward": f"python:{place}/rule.py:even"}  # fmt: skip
    return Compare(**(words | given))


def duels(wins, *, prompts=None, a="aa", b="bb"):
    prompts = [f"p{i}" for i in range(len(wins))] if prompts is None else prompts
    return [compare.Duel(p, Response(a), Response(b), float(w)) for p, w in zip(prompts, wins, strict=True)]


# ---- the numbers ---------------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_second_hand():
    rng = np.random.default_rng(0)
    wins = rng.choice([0, 0.5, 1], 200, p=[0.3, 0.2, 0.5])
    found = compare.results(duels(wins), ["x", "y"], "rule", seed=0)
    assert found["win_rate"] == pytest.approx((sum(wins == 1) + 0.5 * sum(wins == 0.5)) / 200)
    assert (found["wins"], found["losses"], found["ties"]) == (sum(wins == 1), sum(wins == 0), sum(wins == 0.5))
    assert found["p_sign"] == pytest.approx(stats.binomtest(int(sum(wins == 1)), int(sum(wins != 0.5))).pvalue)
    assert found["p_paired"] == pytest.approx(stats.ttest_1samp(wins, 0.5).pvalue)
    assert found["win_rate_se"] == pytest.approx(stats.sem(wins))
    assert found["low"] < found["bootstrap_low"] + 0.02 and abs(found["high"] - found["bootstrap_high"]) < 0.02
    assert found["sentence"].startswith("A is better: A wins ")
    other = compare.results(duels(1 - wins), ["y", "x"], "rule", seed=0)
    assert other["win_rate"] == pytest.approx(1 - found["win_rate"]) and other["low"] == pytest.approx(1 - found["high"])
    assert other["sentence"].startswith("B is better: A wins ")


def test_answers_to_one_prompt_are_one_observation():
    wins = np.tile([1, 1, 1, 0], 10)
    once = compare.results(duels(wins), ["x", "y"], "rule", seed=0)
    several = compare.results(duels(np.repeat(wins, 5), prompts=np.repeat([f"p{i}" for i in range(40)], 5)), ["x", "y"], "rule", seed=0)
    assert several["comparisons"] == 200 and several["prompts"] == 40
    assert several["win_rate_se"] == pytest.approx(once["win_rate_se"]) and several["p_sign"] == pytest.approx(once["p_sign"])
    assert several["low"] == pytest.approx(once["low"], abs=0.01)


@pytest.mark.parametrize(("wins", "said"), [
    ([1, 0, 1, 1, 0, 1, 1, 0, 1, 0] * 2, "not enough data to tell: A wins 60.0% [38.2, 78.5] of 20 prompts, ties half; if that is the "
                                          "true rate, about 199 prompts would tell (four times in five)"),
    ([1, 0] * 10, "not enough data to tell: A wins 50.0% [29.5, 70.5] of 20 prompts, ties half; at exactly one half no number of prompts "
                  "would tell"),
    ([1] * 8, "not enough data to tell: A wins 100.0% [67.6, 100.0] of 8 prompts"),
    ([1], "not enough data to tell: one prompt says nothing of others (A wins 100% of its comparisons)"),
    ([1] * 12, "A is better: A wins 100.0% [75.8, 100.0] of 12 prompts, ties half"),
])  # fmt: skip
def test_what_is_said(wins, said):
    assert compare.results(duels(wins), ["x", "y"], "rule", seed=0)["sentence"].startswith(said)


def test_the_count_that_is_asked_for_would_tell():
    """60% and an error of 20 prompts: at the stated number four of five repetitions say that A is better."""
    found = compare.results(duels([1, 0, 1, 1, 0] * 4), ["x", "y"], "rule", seed=0)
    rng = np.random.default_rng(1)
    told = [certainty.share_of((rng.random(found["needed"]) < 0.6).astype(float), np.arange(found["needed"]))[1] > 0.5 for _ in range(600)]
    assert abs(np.mean(told) - 0.8) < 0.06


def test_a_win_by_length_alone_is_said():
    rng = np.random.default_rng(2)
    sides = [("x" * int(rng.integers(5, 60)), "x" * int(rng.integers(5, 40))) for _ in range(300)]
    every = []
    for i, (a, b) in enumerate(sides):
        wins = float(rng.random() < 1 / (1 + np.exp(-3 * np.tanh((len(a) - len(b)) / 20))))
        every.append(compare.Duel(f"p{i}", Response(a), Response(b), wins))
    found = compare.results(every, ["x", "y"], "rule", seed=0)
    assert found["low"] > 0.5 and found["equal_length"]["low"] < 0.5 < found["equal_length"]["high"]
    assert found["longer_won"]["low"] > 0.6 and ". At equal length it would be " in found["sentence"]


def test_nobody_decided():
    found = compare.results([compare.Duel("p", Response("a"), Response("b"))], ["x", "y"], None, seed=0)
    assert found["wins"] is None and found["sentence"].startswith("nobody decided")


# ---- models ----------------------------------------------------------------------------------------------------------------------


def test_two_models_and_what_is_written(place, tmp_path, capsys):
    folder = tmp_path / "out"
    found = compare.compared(options(place, output=str(folder), k=2))
    assert found["prompts"] == 12 and found["comparisons"] == 24 and found["wins"] + found["losses"] + found["ties"] == 24
    assert json.loads((folder / "results.json").read_text())["win_rate"] == found["win_rate"]
    answers = json.loads((folder / "a.json").read_text())
    assert [row["instruction"] for row in answers] == [p for p in PROMPTS for _ in range(2)]
    assert {row["generator"] for row in answers} == {str(place / "one")} and len({row["output"] for row in answers}) > 12
    assert answers[0]["source"]["weights"] and answers[0]["source"]["max_tokens"] == 8
    records = read([folder / "comparisons.jsonl"]).records  # a random model says NUL, which no record may hold
    left_out = re.search(r"(\d+) comparisons are not in comparisons.jsonl", capsys.readouterr().err)
    assert len(records) == 24 - int(left_out[1] if left_out else 0) > 12 and all(r.responses[0].score is not None for r in records)
    won = [pair.chosen for record in records for pair in pairs(record)]
    # the files are read back: as answers and as votes they say the same
    table = [str(folder / "a.json"), str(folder / "b.json")]
    again = compare.compared(options(place, model=[], prompts=[], answers=table, sample_tokens=None))
    assert (again["win_rate"], again["low"], again["comparisons"]) == (found["win_rate"], found["low"], 24)
    votes = compare.compared(options(place, prompts=[], votes=[str(folder / "comparisons.jsonl")], reward=None, sample_tokens=None))
    assert (votes["wins"], votes["losses"], votes["comparisons"]) == (won.count(0), won.count(1), len(records))
    assert votes["decided_by"] == "votes" and "first_shown_won" not in votes, "A stands first everywhere"


def test_a_model_against_itself_is_a_tie(place):
    found = compare.compared(options(place, model=[str(place / "one"), f"{place}/./one"]))
    assert found["ties"] == 12 and found["identical"] == 12 and found["win_rate"] == 0.5


def test_margin_makes_ties(place):
    free, bound = compare.compared(options(place)), compare.compared(options(place, margin=100.0))
    assert free["ties"] < 12 and bound["ties"] == 12 and bound["reward"] == free["reward"]
    assert compare.compared(options(place, seed=1))["reward"] != free["reward"], "another seed, other answers"


def test_stopped_and_gone_on(place, tmp_path, monkeypatch, capsys):
    """Killed while B answers: the same command keeps A's answers and B's first part, and ends with the same bytes."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    plain = compare.compared(options(place, output=str(tmp_path / "plain")))
    monkeypatch.setattr(compare, "CHUNK", 5)
    assert compare.compared(options(place, output=str(whole)))["reward"] == plain["reward"], "an answer depends on no other's part"
    keep, calls = compare._keep, []

    def stop(path, *rest):
        keep(path, *rest)
        calls.append(path.name)
        if len(calls) == 4:
            raise make.Stopped

    with monkeypatch.context() as patch, pytest.raises(make.Stopped):
        patch.setattr(compare, "_keep", stop)
        compare.compared(options(place, output=str(part)))
    assert calls == ["a.json"] * 3 + ["b.json"] and len(json.loads((part / "b.json").read_text())) == 5
    asked = []
    speak = compare.speak
    monkeypatch.setattr(compare, "speak", lambda *three, **more: asked.append(len(three[2])) or speak(*three, **more))
    compare.compared(options(place, output=str(part)))
    assert asked == [5, 2] and "going on" in capsys.readouterr().err
    for name in ("a.json", "b.json", "comparisons.jsonl", "compare.html"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name
    with pytest.raises(UsageError, match="holds a comparison of other options or files"):
        compare.compared(options(place, output=str(part), seed=1))
    with pytest.raises(UsageError, match="not empty"):
        compare.compared(options(place, output=str(place)))


def test_what_the_command_line_prints(place, tmp_path, capsys):
    assert compare.run(options(place, dry_run=True, output=str(tmp_path / "none"))) == 0
    shown = capsys.readouterr()
    assert "12 prompts, 24 answers of at most 8 tokens (192 at most)" in shown.err and not (tmp_path / "none").exists() and shown.out == ""
    assert compare.run(options(place, reward=None)) == 0
    shown = capsys.readouterr()
    assert "nobody decided" in shown.out and f"preftune chat {place}/one {place}/two --votes votes.jsonl" in shown.err
    assert compare.run(options(place)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"win rate of A +0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\] \(bootstrap by prompt", shown)


def test_refusals(place, tmp_path):
    with pytest.raises(UsageError, match="is no run folder, so name the model to compare it with"):
        compare.compared(options(place, model=[str(place / "one")]))
    with pytest.raises(UsageError, match="--prompts FILE must be given"):
        compare.compared(options(place, prompts=[]))
    with pytest.raises(UsageError, match="two models, or --answers"):
        compare.compared(Compare())
    with pytest.raises(DataError, match=r"longest prompt has \d+ tokens, --sample-tokens is 500, and the model has 128 positions"):
        compare.compared(options(place, sample_tokens=500))


def test_a_run_knows_what_to_compare_with(place, tmp_path, capsys):
    folder = tmp_path / "run"
    make.write_pairs(tmp_path / "pairs.jsonl", 30)
    words = {"model": str(place / "one"), "data": [str(tmp_path / "pairs.jsonl")], "output": str(folder), "max_steps": 2, "lr": 1e-2,
             "batch_size": 8, "threads": 1, "sample_tokens": 6, "report": False, "eval_reward": f"python:{place}/rule.py:size"}  # fmt: skip
    assert dpo.run(Dpo(**words)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next          preftune compare {folder} --reward python:{place}/rule.py:size --output {folder}-compared"
    found = compare.compared(Compare(model=[str(folder)], reward=words["eval_reward"], threads=1))
    assert (found["a"], found["b"]) == (str(folder), str(place / "one")) and found["sampling"]["max_tokens"] == 6
    held = {json.dumps(json.loads(line)["prompt"]) for line in (folder / "samples.jsonl").read_text().splitlines()}
    assert found["prompts"] == len(held) == 3
    words |= {"output": str(tmp_path / "mute"), "eval_prompts": 0, "eval_reward": None}
    assert dpo.run(Dpo(**words)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next          preftune chat {tmp_path / 'mute'}"


# ---- files and votes -------------------------------------------------------------------------------------------------------------


def test_answers_are_matched_by_instruction(tmp_path, capsys):
    one = [{"instruction": "p", "output": "long", "generator": "x", "dataset": "d"}, {"instruction": "q", "output": "b", "generator": "x"},
           {"instruction": "only here", "output": "c", "generator": "x"}]  # fmt: skip
    two = [{"instruction": "q", "output": "bb", "generator": "y"}, {"instruction": "p", "output": "s", "generator": "y"},
           {"instruction": "p", "output": "t", "generator": "y"}]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(one))
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in two))
    found, names = compare.from_files([str(tmp_path / "x.json"), str(tmp_path / "y.jsonl")])
    assert names == ["x", "y"] and [(d.prompt, d.a.text, d.b.text) for d in found] == [("p", "long", "s"), ("q", "b", "bb")]
    assert "left out 2 answers" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text(json.dumps({"instruction": "p"}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: output: no text, expected rows with instruction, output, generator"):
        compare.from_files([str(tmp_path / "bad.jsonl"), str(tmp_path / "x.json")])
    (tmp_path / "z.json").write_text(json.dumps([{"instruction": "other", "output": "s", "generator": "y"}]))
    with pytest.raises(DataError, match="no instruction stands in both files"):
        compare.from_files([str(tmp_path / "x.json"), str(tmp_path / "z.json")])


def test_what_was_decided_is_alpacaevals_annotations_and_is_read_back(place, tmp_path):
    """B is the baseline: their win rate, the mean of preference - 1, is A's; as a data file the rows are votes and judgements again."""
    assert compare.run(options(place, output=str(tmp_path / "out"))) == 0
    rows, facts = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("annotations", "results"))
    assert len(rows) == 12 and np.mean([row["preference"] - 1 for row in rows]) == pytest.approx(facts["win_rate"])
    assert {(row["generator_1"], row["generator_2"]) for row in rows} == {(str(place / "two"), str(place / "one"))}
    assert {row["annotator"] for row in rows} == {f"python:{place}/rule.py:even"} and {row["preference"] for row in rows} <= {1.0, 1.5, 2.0}
    path = str(tmp_path / "out" / "annotations.json")
    kept = [d for d in compare.from_votes([path], [str(place / "one"), str(place / "two")])]
    assert compare.results(kept, ["A", "B"], "votes", seed=0)["win_rate"] == pytest.approx(facts["win_rate"])
    assert compare.run(options(place, reward=None, output=str(tmp_path / "open"))) == 0
    assert not (tmp_path / "open" / "annotations.json").exists(), "nobody decided"


def vote(order=None, labels=None, *, first="A", prompt="p", **more):
    sides = [{"text": "good", "source": {"model": first}}, {"text": "bad", "source": {"model": {"A": "B", "B": "A"}[first]}}]
    row = {"prompt": prompt, "responses": sides}
    return row | ({"judgements": [{"order": order, **more}]} if order else {}) | ({"labels": labels} if labels else {})


def test_votes_as_chat_writes_them(tmp_path):
    table = [vote([[0], [1]]), vote([[1], [0]], first="B", prompt="q"), vote([[0], [1]], first="B", prompt="r"), vote([[0, 1]], prompt="s"),
             vote(labels=[False, False], prompt="t"), vote([[1], [0]], prompt="u")]  # fmt: skip
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    found = compare.from_votes([str(tmp_path / "v.jsonl")], ["A", "B"])
    assert [d.wins for d in found] == [1, 1, 0, 0.5, 0.5, 0] and [d.shown for d in found] == [0, 1, 1, 0, 0, 0]
    assert found[1].a.text == "bad" and found[1].b.text == "good"
    numbers = compare.results(found, ["A", "B"], "votes", seed=0)
    assert numbers["first_shown_won"]["count"] == 4 and numbers["first_shown_won"]["share"] == 0.5
    with pytest.raises(DataError, match="no record compares 'A' with 'C'; the answers are of A, B"):
        compare.from_votes([str(tmp_path / "v.jsonl")], ["A", "C"])
    (tmp_path / "w.jsonl").write_text(json.dumps(vote([[0], [1]], weight=3)) + "\n")
    with pytest.raises(DataError, match=r"w.jsonl:1: judgements: a vote with a weight or a probability"):
        compare.from_votes([str(tmp_path / "w.jsonl")], ["A", "B"])


def test_what_a_ranking_leaves_open_is_not_counted(tmp_path):
    texts = [{"text": t, "source": {"model": m}} for t, m in (("x", "A"), ("y", "B"), ("z", "C"))]
    table = [{"prompt": "p", "responses": texts, "judgements": [{"order": [[2]], "below": [0, 1]}]},
             {"prompt": "q", "responses": texts, "judgements": [{"order": [[1], [2]], "below": [0]}]}]  # fmt: skip
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert [(d.prompt, d.wins) for d in compare.from_votes([str(tmp_path / "v.jsonl")], ["A", "B"])] == [("q", 0)]


def test_places_and_lengths_by_hand():
    """Shown first and won, three times of four; longer and won, once of the three of different lengths that were decided."""
    table = [("xx", "x", 1.0, 0), ("x", "xxx", 1.0, 0), ("xx", "x", 0.0, 1), ("x", "x", 0.0, 0), ("xx", "x", 0.5, 1)]
    found = compare.results([compare.Duel(f"p{i}", Response(a), Response(b), wins, shown) for i, (a, b, wins, shown) in enumerate(table)],
                            ["A", "B"], "votes", seed=0)  # fmt: skip
    assert (found["first_shown_won"]["share"], found["first_shown_won"]["count"]) == (0.75, 4)
    assert (found["longer_won"]["share"], found["longer_won"]["count"]) == (pytest.approx(1 / 3), 3)
    record = compare.record_of(compare.Duel("p", Response("good"), Response("bad"), 1.0), "me")
    assert record.judgements[0].order == ((0,), (1,)) and record.judgements[0].by == "me"


def test_a_reward_decides_by_hand(tmp_path):
    """Lengths 9 to 1, 9 to 2, 1 to 8, and one text twice: A has two, B one. A gap as wide as the margin is a tie; one text never wins."""
    for name, sizes in (("a", (9, 9, 1, 4)), ("b", (1, 2, 8, 4))):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": f"q{i}", "output": "x" * n, "generator": name}
                                                           for i, n in enumerate(sizes)]))  # fmt: skip
    (tmp_path / "rule.py").write_text("calls = []\ndef size(prompt, response):\n    calls.append(0)\n"
                                      "    return len(response) + len(calls) / 1000\n")  # fmt: skip
    given = {"answers": [str(tmp_path / "a.json"), str(tmp_path / "b.json")], "reward": f"python:{tmp_path / 'rule.py'}:size"}
    found = compare.compared(Compare(**given))
    assert (found["wins"], found["losses"], found["ties"], found["win_rate"]) == (2, 1, 1, 0.625)
    assert (found["reward"]["a"], found["reward"]["b"]) == pytest.approx((23 / 4, 15 / 4), abs=0.01)
    assert found["reward"]["difference"] == pytest.approx(2, abs=0.01) and found["length_difference"] == 2
    found = compare.compared(Compare(**given, margin=7.5))
    assert (found["wins"], found["losses"], found["ties"]) == (1, 0, 3)
    (tmp_path / "rule.py").write_text("def size(prompt, response):\n    return float(len(response))\n")
    assert compare.compared(Compare(**given, margin=7.0))["ties"] == 3, "no wider than the margin"


def test_a_judge_is_asked_in_both_orders_and_never_twice(place, tmp_path, monkeypatch, capsys):
    """A judge that likes the longer answer, and one that likes the first: who wins follows the one; the other ties everything."""
    table = [[{"instruction": f"q{i}", "output": "x" * n, "generator": g} for i, n in enumerate(sizes)]
             for g, sizes in (("A", (9, 9, 1, 4)), ("B", (1, 2, 8, 4)))]  # fmt: skip
    for name, rows in zip("ab", table, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    given = {"answers": [str(tmp_path / "a.json"), str(tmp_path / "b.json")], "output": str(tmp_path / "out"), "retries": 0}
    server = Server()
    try:
        texts = {f"{'x' * n}": n for n in (1, 2, 8, 9)}

        def longer(number, request):
            said = request["messages"][0]["content"]
            first, second = re.findall(r"^(x+)$", said, re.MULTILINE)
            return answer(f"VERDICT: {'A' if texts[first] > texts[second] else 'B'}", chat=True)

        server.say = lambda number, request: (500, {}, b"") if number == 3 else longer(number, request)
        with pytest.raises(EndpointError, match="1 of 6 answers are missing"):
            compare.compared(Compare(judge=server.spec, **given))
        server.say, before = longer, len(server.seen)
        found = compare.compared(Compare(judge=server.spec, **given))
        assert len(server.seen) == before + 1, "only the missing one is asked for"
        assert (found["wins"], found["losses"], found["ties"], found["identical"]) == (2, 1, 1, 1)
        assert compare.compared(Compare(judge=server.spec, **given)) == found and len(server.seen) == before + 1
        rows = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
        assert [(row["comparison"], row["turned"], row["verdict"]) for row in rows][:2] == [(0, False, "A"), (0, True, "B")]
        server.say = lambda number, request: answer("VERDICT: A", chat=True)
        assert compare.compared(Compare(judge=server.spec, **given | {"output": str(tmp_path / "first")}))["ties"] == 4
    finally:
        server.http.shutdown()
        server.http.server_close()


# ---- the page ----------------------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\u202e\x1b[31m"


def test_a_page_of_hostile_text_is_safe():
    every = [compare.Duel(HOSTILE, Response(HOSTILE, score=1.0), Response("fine", score=0.0), 1.0),
             compare.Duel("p", Response("a"), Response(HOSTILE), 0.5)]  # fmt: skip
    facts = compare.results(every, [HOSTILE, "y"], HOSTILE, seed=0) | {"sampling": None, "seed": 0}
    shown = [{"prompt": HOSTILE, "a": HOSTILE, "b": "fine", "score_a": 1.0, "score_b": 0.0, "won": "a"}]
    html = comparison_page(facts, shown)
    page = Page(html)
    assert "<script" not in html and "<img" not in html and "onerror" in page.text and "\x1b" not in html and "\u202e" not in html
    assert not re.search(r"<[^>]*(src|href)=|url\(|@import|https?://", html) and "default-src 'none'" in html
    assert html.count('type="radio"') == 4 and html.count('tabindex="0"') == 1 and "prefers-color-scheme: dark" in html


def test_a_long_page_says_what_it_leaves_out():
    facts = compare.results(duels([1, 0] * 20), ["x", "y"], "rule", seed=0) | {"sampling": None, "seed": 0}
    shown = [{"prompt": "p", "a": "a", "b": "b", "score_a": None, "score_b": None, "won": "tie"}] * (MOST_SHOWN + 7)
    html = comparison_page(facts, shown)
    assert html.count("<article") == MOST_SHOWN and f"The first {MOST_SHOWN} of {MOST_SHOWN + 7}" in html


def test_the_filters_need_no_script():
    """Each button's rule hides the articles of the others; buttons and articles stand side by side, as the rule asks."""
    facts = compare.results(duels([1, 0] * 20), ["x", "y"], "rule", seed=0) | {"sampling": None, "seed": 0}
    html = comparison_page(facts, [{"prompt": "p", "a": "a", "b": "b", "score_a": None, "score_b": None, "won": "a"}])
    for kind in ("a", "b", "tie"):
        assert f"#only-{kind}:checked ~ article:not(.won-{kind})" in html and f'for="only-{kind}"' in html and f'id="only-{kind}"' in html
    between = html[html.index('id="only-tie"/>') : html.index("<article")]
    assert between.count("<div") == between.count("</div") and "</main" not in between
