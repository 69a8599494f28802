"""sample -> score -> pair through the verbs on a tiny model: restarts without loss or repetition, counts, refusals, real files."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import child
import make
import numpy as np
import pytest
from scipy import stats
from test_scores import write_reward

from preftune import exact, models, runs
from preftune.cli import parse
from preftune.config import Dpo, Pair, Sample, Score
from preftune.errors import CheckpointError, DataError, DiskError, UsageError
from preftune.exact import B4
from preftune.files import write_json
from preftune.formats import read
from preftune.records import as_text, draw_of, scores_of
from preftune.rewards import scorer
from preftune.stages import dpo, pair, sample, score

PROMPTS = ["the cat", "a dog walks", "home", "they think so", "and", "so", "bright", "there", "that", "thanks"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def options(base, prompts, tmp_path) -> Sample:
    return Sample(model=str(base), data=[str(prompts)], output=str(tmp_path / "s.jsonl"), k=2, sample_tokens=6, batch_size=4, threads=1)


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- drafts ---------------------------------------------------------------------------------------------------------------------


def test_a_draft_goes_on_after_a_torn_line_and_refuses_what_changed(tmp_path):
    out, place = tmp_path / "o.jsonl", tmp_path / "o.jsonl.draft"
    with runs.draft(out, {"seed": 1}) as found:
        found.add({2: {"a": "ü"}, 0: [1]})
    whole = place.read_bytes()
    place.write_bytes(whole + b'[5, {"torn"')
    with runs.draft(out, {"seed": 1}) as found:
        assert found.places.keys() == {0, 2} and found.item(2) == {"a": "ü"} and place.read_bytes() == whole
        with pytest.raises(DiskError, match="another process"), runs.draft(out, {"seed": 1}):
            pass
        found.add({1: None})
    with pytest.raises(CheckpointError, match="seed 1 -> 2"), runs.draft(out, {"seed": 2}):
        pass
    with runs.draft(out, {"seed": 1}) as found:
        found.publish(lambda: ({"n": n, "item": found.item(n)} for n in range(3)))
    assert [row["item"] for row in lines(out)] == [[1], None, {"a": "ü"}] and not place.exists()
    with pytest.raises(UsageError, match="exists already"), runs.draft(out, {"seed": 1}):
        pass
    out.unlink()
    place.write_text("not ours\n")
    with pytest.raises(CheckpointError, match="draft:1: not a line that preftune wrote"), runs.draft(out, {}):
        pass


# --- sample ---------------------------------------------------------------------------------------------------------------------


def test_every_sample_says_where_it_came_from(options, base):
    assert sample.run(options) == 0
    rows = lines(options.output)
    assert [row["prompt"] for row in rows] == PROMPTS and all(len(row["responses"]) == 2 for row in rows)
    for row in rows:
        for response in row["responses"]:
            source = response["source"]
            assert source.pop("logp") < 0
            assert source == {"model": str(base), "weights": models.weights_fingerprint(str(base)), "temperature": 1.0, "top_p": 1.0,
                              "seed": 0, "max_tokens": 6}  # fmt: skip
    assert len({r["text"] for row in rows for r in row["responses"]}) > 15, "every sample has its own randomness"


def test_equal_prompts_in_different_passes_have_their_own_randomness(options, tmp_path):
    (tmp_path / "same.txt").write_text("home\n" * 4)
    sample.run(replace(options, data=[str(tmp_path / "same.txt")], k=1, batch_size=1))
    assert len({row["responses"][0]["text"] for row in lines(options.output)}) == 4


class Stopped(BaseException):
    """As a kill would."""


def stop_after(monkeypatch, times: int) -> None:
    """The draft takes so many groups, then the process is gone."""
    real, left = runs.Draft.add, [times]

    def add(self, items):
        real(self, items)
        left[0] -= -1 not in items
        if left[0] == 0:
            raise Stopped

    monkeypatch.setattr(runs.Draft, "add", add)


def test_a_stopped_sample_goes_on_and_ends_with_the_same_file(options, tmp_path, monkeypatch, capsys):
    sample.run(options)
    whole = Path(options.output).read_bytes()
    again = replace(options, output=str(tmp_path / "again.jsonl"))
    for times in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, times)
            sample.run(again)
        assert not Path(again.output).exists()
        draft = Path(again.output + ".draft")
        draft.write_bytes(draft.read_bytes()[:-9])  # the kill tore the last line: that prompt is sampled again, and no other
    capsys.readouterr()
    sample.run(again)
    assert "of 10 prompts are done already" in capsys.readouterr().err
    assert Path(again.output).read_bytes() == whole


def test_other_options_than_before_are_refused(options, prompts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 1)
        sample.run(options)
    other = tmp_path / "other.txt"
    other.write_text("home\n")
    for change, said in (({"seed": 3}, "seed 0 -> 3"), ({"k": 3}, "k 2 -> 3"), ({"batch_size": 8}, "batch_size 4 -> 8"),
                         ({"temperature": 0.5}, "temperature 1.0 -> 0.5"), ({"data": [str(other)]}, "prompts "),
                         ({"bos": "never"}, "bos auto -> never")):  # fmt: skip
        with pytest.raises(CheckpointError, match=said):
            sample.run(replace(options, **change))
    sample.run(options)
    assert len(lines(options.output)) == 10


def test_a_dry_run_counts_and_does_nothing(options, capsys):
    assert sample.run(replace(options, dry_run=True)) == 0
    said = capsys.readouterr().err
    assert "10 prompts of " in said and "at most 120 tokens to write" in said
    assert not Path(options.output).exists() and not Path(options.output + ".draft").exists()


# --- killed ---------------------------------------------------------------------------------------------------------------------


def rule_file(tmp_path: Path, body: str, name: str = "rule.py") -> str:
    (tmp_path / name).write_text(f"import time\ndef f(prompt, response):\n    {body}\n")
    return f"python:{tmp_path / name}:f"


def work(which: str, options) -> int:
    """What a child does."""
    return {"sample": sample, "score": score}[which].run(options)


def kill_until_done(children: child.Children, which: str, options, kills: int, chance: random.Random) -> int:
    """Kill the verb at random moments, start it again, let it end; how many kills met it at work."""
    met, before, draft = 0, b"", Path(options.output + ".draft")
    for _ in range(kills):
        if Path(options.output).exists():
            break
        pid = children.start(work, which, options)
        child.until(lambda kept=before: Path(options.output).exists() or (draft.exists() and draft.stat().st_size > len(kept)))
        time.sleep(chance.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        met += children.wait() == -signal.SIGKILL
        if draft.exists():
            now = draft.read_bytes()
            whole = now[: now.rfind(b"\n") + 1]
            numbers = [json.loads(line)[0] for line in whole.splitlines()]
            assert whole.startswith(before) and len(numbers) == len(set(numbers)), "a finished response was lost, or made twice"
            before = whole
    if not Path(options.output).exists():
        assert children.call(work, which, options) == 0, children.said()
    return met


def killed(children: child.Children, options: Sample, tmp_path: Path, kills: int) -> None:
    """`sample` and `score`, each killed so often, end with the bytes of the unbroken ones."""
    many = tmp_path / "many.txt"
    many.write_text("".join(f"{i} {p}\n" for i in range(kills) for p in PROMPTS))
    sampled = replace(options, data=[str(many)], output=str(tmp_path / "killed.jsonl"))
    sample.run(replace(sampled, output=str(tmp_path / "whole.jsonl")))
    met = kill_until_done(children, "sample", sampled, kills, random.Random(1))
    assert Path(sampled.output).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    answers = write(tmp_path / "many.jsonl", [{"prompt": f"{i} p", "responses": [f" a{i}", f" bb{i}"]} for i in range(96 * kills)])
    slow = rule_file(tmp_path, "time.sleep(0.0005); return float(len(response) % 5)")
    scored = Score(data=[str(answers)], reward=[slow], output=str(tmp_path / "scored.jsonl"))
    score.run(replace(scored, output=str(tmp_path / "whole-scored.jsonl")))
    met += kill_until_done(children, "score", scored, kills, random.Random(2))
    assert Path(scored.output).read_bytes() == (tmp_path / "whole-scored.jsonl").read_bytes()
    assert met >= kills, f"only {met} of {2 * kills} kills came in time to prove anything"


def test_killed_thrice_nothing_is_lost_or_repeated(children, options, tmp_path):
    killed(children, options, tmp_path, 3)


@pytest.mark.soak
def test_killed_twenty_times_nothing_is_lost_or_repeated(children, options, tmp_path):
    killed(children, options, tmp_path, 20)


# --- score ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(tmp_path) -> Path:
    """Four prompts with answers of known length."""
    return write(tmp_path / "answers.jsonl", [
        {"prompt": "p0", "responses": [" a", " bbb", " cc"]},
        {"prompt": "p1", "responses": [" same", " same", " Same!"]},
        {"prompt": "p2", "responses": [" xy", " yx"]},
        {"prompt": "p3", "responses": [" one", " eleven", " seventeen", " two"]},
    ])  # fmt: skip


@pytest.fixture
def length(tmp_path) -> str:
    return rule_file(tmp_path, "return float(len(response))", "length.py")


@pytest.fixture
def scored(answers, length, tmp_path) -> Path:
    path = tmp_path / "scored.jsonl"
    assert score.run(Score(data=[str(answers)], reward=[length], output=str(path))) == 0
    return path


def test_scores_and_who_gave_them(scored, length):
    rows = lines(scored)
    assert [[r["score"] for r in row["responses"]] for row in rows] == [[2, 4, 3], [5, 5, 6], [3, 3], [4, 7, 10, 4]]
    assert all(row["meta"]["scored"]["by"].keys() == {length} for row in rows)


def test_several_rewards_become_one_as_said(answers, length, tmp_path):
    other = rule_file(tmp_path, "return -1.0 if 'x' in response else 1.0", "x.py")
    with pytest.raises(UsageError, match="--combine mean or sum"):
        score.run(Score(data=[str(answers)], reward=[length, other], output=str(tmp_path / "o")))
    for how, wanted in (("sum", 2), ("mean", 1)):
        score.run(Score(data=[str(answers)], reward=[length, other], combine=how, output=str(tmp_path / f"{how}.jsonl")))
        row = lines(tmp_path / f"{how}.jsonl")[2]
        assert [r["score"] for r in row["responses"]] == [wanted, wanted], "each text holds an x"
        assert [r["source"]["scores"] for r in row["responses"]] == [[3, -1]] * 2 and row["meta"]["scored"]["combine"] == how
    score.run(Score(data=[str(tmp_path / "sum.jsonl")], reward=[length], output=str(tmp_path / "one.jsonl"), replace=True))
    assert all("source" not in r for row in lines(tmp_path / "one.jsonl") for r in row["responses"]), "what others said is gone"


def test_scores_are_replaced_only_where_asked(scored, length, tmp_path):
    with pytest.raises(DataError, match=r"4 records are scored already .*--replace"):
        score.run(Score(data=[str(scored)], reward=[length], output=str(tmp_path / "o")))
    score.run(Score(data=[str(scored)], reward=[length], output=str(tmp_path / "o"), replace=True))
    assert lines(tmp_path / "o") == lines(scored)
    with pytest.raises(UsageError, match="--reward or --judge must be given"):
        score.run(Score(data=[str(scored)], output=str(tmp_path / "o2")))


# --- pair -----------------------------------------------------------------------------------------------------------------------


def made(scored: Path, tmp_path: Path, **how) -> list[dict]:
    out = tmp_path / "made.jsonl"
    out.unlink(missing_ok=True)
    assert pair.run(Pair(data=[str(scored)], output=str(out), **how)) == 0
    read([out])  # what is written is read back
    return lines(out)


def told(row: dict) -> list[tuple]:
    return [tuple(tuple(row["responses"][i]["text"] for i in tier) for tier in j["order"]) for j in row["judgements"]]


def test_best_worst_by_hand(scored, tmp_path, capsys):
    rows = made(scored, tmp_path)
    assert [told(row) for row in rows] == [[((" bbb",), (" a",))], [((" seventeen",), (" one",))]]
    assert all(r["source"]["kept"] == {"how": "best-worst"} for row in rows for r in row["responses"]), "two of three are no plain samples"
    said = capsys.readouterr().err
    assert "2 pairs of 4 prompts" in said and "left out 1: prompts: no two scores differ" in said
    assert "left out 1: responses: equal to another of the prompt\n" in said and "but for case, space and punctuation" in said
    assert "left out 1: prompts: fewer than two different scored responses" in said
    assert rows[0]["meta"]["paired"] == {"how": "best-worst"} and "scored" in rows[0]["meta"]


def test_all_margins_limits_and_soft_labels(scored, tmp_path):
    rows = made(scored, tmp_path, how="all")
    assert [len(row["judgements"]) for row in rows] == [3, 5]
    rows = made(scored, tmp_path, how="all", margin=3.0)
    assert [told(row) for row in rows] == [[((" eleven",), (" one",)), ((" eleven",), (" two",)), ((" seventeen",), (" one",)),
                                            ((" seventeen",), (" eleven",)), ((" seventeen",), (" two",))]]  # fmt: skip
    assert [len(row["judgements"]) for row in made(scored, tmp_path, how="all", limit=2)] == [2, 2]
    rows = made(scored, tmp_path, soft=2.0)
    assert [j["prob"] for row in rows for j in row["judgements"]] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))])


def test_rankings_keep_ties(scored, tmp_path):
    rows = made(scored, tmp_path, how="ranking")
    assert told(rows[1]) == [((" seventeen",), (" eleven",), (" one", " two"))]


def test_what_is_judged_already_goes_through_or_is_judged_again(tmp_path, capsys):
    two = [{"text": " a", "score": 1}, {"text": " b", "score": 2}]
    rows = [{"prompt": "p", "responses": two, "judgements": [{"order": [[0], [1]]}]},
            {"prompt": "q", "responses": two, "labels": [True, False]},
            {"prompt": "r", "responses": [two[0], {"text": " b"}, {"text": " c", "score": 3}]}]  # fmt: skip
    path = write(tmp_path / "judged.jsonl", rows)
    found = made(path, tmp_path)
    assert found[0]["judgements"] == rows[0]["judgements"] and found[1]["labels"] == [True, False]
    assert told(found[2]) == [((" c",), (" a",))]
    said = capsys.readouterr().err
    assert "2 records are judged already" in said and "left out 1: responses: no score" in said
    again = made(path, tmp_path, replace=True)
    assert [told(row) for row in again[:2]] == [[((" b",), (" a",))]] * 2 and "labels" not in again[1]


def test_nothing_to_pair_is_told(answers, tmp_path):
    with pytest.raises(DataError, match="no response has a score: preftune score"):
        pair.run(Pair(data=[str(answers)], output=str(tmp_path / "o")))
    equal = write(tmp_path / "equal.jsonl", [{"prompt": "p", "responses": [{"text": " a", "score": 1}, {"text": " b", "score": 1}]}])
    with pytest.raises(DataError, match="nothing is left to write"):
        pair.run(Pair(data=[str(equal)], output=str(tmp_path / "o")))
    assert not (tmp_path / "o").exists()


def test_a_dry_pair_writes_nothing(scored, tmp_path, capsys):
    assert pair.run(Pair(data=[str(scored)], output=str(tmp_path / "o"), dry_run=True)) == 0
    assert not (tmp_path / "o").exists() and "2 pairs of 4 prompts" in capsys.readouterr().err


def draws(tmp_path: Path, count: int = 30, k: int = 8, **source) -> Path:
    """Scored draws of B4 as `sample` and `score` leave them."""
    drawn = np.random.default_rng(0).choice(4, (count, k), p=B4.reference)
    where = {"model": "m", "weights": "ab" * 32, "temperature": 1.0, "top_p": 1.0} | source
    return write(tmp_path / "draws.jsonl", [
        {"prompt": f"p{i}", "responses": [{"text": f" y{y}", "score": float(B4.reward[y]), "source": where} for y in row]}
        for i, row in enumerate(drawn)
    ])  # fmt: skip


def test_rejection_through_the_verb_is_pi_star(tmp_path, capsys):
    """With the true largest reward the kept texts follow pi*: chi-square of 40,000 draws; the printed rate is the known one."""
    rows = made(draws(tmp_path, 500, 80), tmp_path, how="rejection", beta=1.0, r_max=2.0)
    said = capsys.readouterr().err
    got = np.bincount([int(r["text"][2]) for row in rows for r in row["responses"]], minlength=4)
    assert stats.chisquare(got, exact.optimum(B4, beta=1.0) * got.sum()).pvalue > 1e-3
    assert float(said.split("acceptance rate ")[1].split()[0]) == pytest.approx(0.309124, abs=0.01) and "warning" not in said
    assert read([draws(tmp_path)]).records[0].responses[0].source["weights"] == draw_of(read([draws(tmp_path)]).records[0].responses[0])
    assert draw_of(read([tmp_path / "made.jsonl"]).records[0].responses[0]) is None, "the optimum's draws, not the reference's"
    assert rows[0]["responses"][0]["source"]["kept"] == {"how": "rejection", "beta": 1.0, "r_max": 2.0, "of": 80}
    assert "judgements" not in rows[0]


def test_rejection_warns_where_few_samples_bias_it_and_refuses_what_is_no_sample(tmp_path, capsys):
    rows = made(draws(tmp_path), tmp_path, how="rejection", beta=0.5, limit=2)
    said = capsys.readouterr().err
    assert "nearer to best-of-K than to pi*" in said and "--limit 2 is not far below" in said
    assert all(len(row["responses"]) <= 2 for row in rows) and "responses: accepted beyond --limit" in said
    kept = tmp_path / "kept.jsonl"
    (tmp_path / "made.jsonl").rename(kept)
    for change, why in (({"temperature": 0.7}, "temperature 0.7, not 1"), ({"weights": None}, "which weights wrote it")):
        with pytest.raises(DataError, match=rf"draws.jsonl:1: responses.0.: not an exact sample of the reference: .*{why}"):
            made(draws(tmp_path, **change), tmp_path, how="rejection", beta=0.5)
    with pytest.raises(DataError, match="selected by its score already"):
        made(kept, tmp_path, how="rejection", beta=0.5)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(draws(tmp_path, 3).read_text() + draws(tmp_path, 3, weights="cd" * 32).read_text())
    with pytest.raises(DataError, match="its weights are cdcdcdcd, not abababab"):
        made(mixed, tmp_path, how="rejection", beta=0.5)
    with pytest.raises(DataError, match=r"a score of 2 is above --r-max 1\.5"):
        made(draws(tmp_path), tmp_path, how="rejection", beta=0.5, r_max=1.5)


def test_rejection_knows_the_reference_by_its_weights(options, base, tmp_path, length):
    """sample -> score -> pair --how rejection --reference: the model itself passes, another one of the same shape does not."""
    sample.run(options)
    score.run(Score(data=[options.output], reward=[length], output=str(tmp_path / "scored.jsonl"), skip_bad=True))
    assert made(tmp_path / "scored.jsonl", tmp_path, how="rejection", beta=1.0, reference=str(base))
    other = make.write_model(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"its weights are .*, not .* \(--reference .*other\)"):
        made(tmp_path / "scored.jsonl", tmp_path, how="rejection", beta=1.0, reference=str(other))


def test_best_of_n_keeps_one_of_each_group_and_foresees_more(tmp_path, capsys):
    rows = made(draws(tmp_path), tmp_path, how="best-of-n", of=3)
    said = capsys.readouterr().err
    assert all(len(row["responses"]) == 2 for row in rows) and "left out 60: responses: do not fill a group" in said
    assert [line.split()[2] for line in said.splitlines() if line.startswith("best of")] == ["1", "2", "4", "8"]
    assert made(draws(tmp_path), tmp_path, how="best-of-n")[0]["responses"][0]["source"]["kept"] == {"how": "best-of-n", "n": 8}


def test_pairs_worth_asking_about(scored, answers, length, tmp_path, capsys):
    rows = made(scored, tmp_path, ask=2)
    assert [[r["text"] for r in row["responses"]] for row in rows] == [[" xy", " yx"], [" one", " two"]]
    assert all("judgements" not in row and row["meta"]["paired"]["how"] == "ask by margin" for row in rows)
    assert "left out 1: pairs: less doubtful" in capsys.readouterr().err
    other = rule_file(tmp_path, "return 9.0 if 'eleven' in response else 0.0", "eleven.py")
    score.run(Score(data=[str(answers)], reward=[length, other], combine="mean", output=str(tmp_path / "both.jsonl")))
    rows = made(tmp_path / "both.jsonl", tmp_path, ask=1, ask_by="disagreement")
    assert " eleven" in [r["text"] for r in rows[0]["responses"]]
    with pytest.raises(DataError, match="nothing is left"):
        made(scored, tmp_path, ask=1, ask_by="disagreement")


# --- real files as they lie there ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize(("place", "loss"), [
    ("oasst/en_100_tree.jsonl", "plackett-luce"),
    ("tinystories-sentiment/kwise4.jsonl", "sigmoid"),
    ("llamafactory/kto_en_demo.json", "kto"),
])  # fmt: skip
def test_rankings_scores_and_unpaired_labels_run_without_conversion(place, loss, shared_data, length, tmp_path):
    """Message trees, four scored stories a prompt, true and false labels: as they lie there through score, pair and a step of dpo."""
    wide, few = make.write_model(tmp_path / "wide", max_position_embeddings=2048), {"skip_bad": True, "max_records": 20}
    scored, paired = tmp_path / "scored.jsonl", tmp_path / "paired.jsonl"
    own = "kwise4" in place  # has scores already
    score.run(Score(data=[str(shared_data / place)], reward=[length], output=str(scored), replace=own, **few))
    before, after = read([shared_data / place], **few).records, read([scored]).records
    assert [(r.judgements, r.labels) for r in before] == [(r.judgements, r.labels) for r in after] and len(after) >= 15
    assert all(x.score == len(as_text(x.text)) for r in after for x in r.responses)
    pair.run(Pair(data=[str(scored)], output=str(paired), how="all", limit=3))
    made = read([paired]).records
    assert len(made) >= 15 and all(bool(r.judgements) == own or r.judgements == b.judgements for r, b in zip(made, before, strict=False))
    dpo.run(Dpo(model=str(wide), data=[str(paired)], output=str(tmp_path / "run"), max_steps=1, batch_size=4, eval_prompts=0, holdout=0,
                lr=1e-5, loss=loss, report=False, threads=1, skip_bad=True, allow=["equal"]))  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 1


def test_an_ensemble_scores_and_its_disagreement_asks(answers, tmp_path):
    """Members' scores stand in source.scores, centred by prompt; `score` is what the scorer itself says; --ask-by reads them."""
    for seed in (1, 2):
        write_reward(tmp_path / "both" / f"m{seed}", seed)
    spec = f"model:{tmp_path / 'both'}@lower"
    write_json(tmp_path / "both" / "ensemble.json", {"members": ["m1", "m2"]})
    out = tmp_path / "scored.jsonl"
    score.run(Score(data=[str(answers)], reward=[spec], output=str(out), device="cpu"))
    rows, found = read([out]).records, scorer(spec)
    for record in rows:
        prompts = [record.prompt] * len(record.responses)
        assert [r.score for r in record.responses] == pytest.approx(found(prompts, record.responses).tolist(), abs=1e-5)
        each = np.array([scores_of(r) for r in record.responses]).T
        assert each.shape == (2, len(prompts)) and each.mean(1) == pytest.approx(each.mean(), abs=1e-5), "one level for both members"
    asked = made(out, tmp_path, ask=9, ask_by="disagreement")
    doubts = [row["meta"]["paired"]["doubt"] for row in asked]
    assert doubts == sorted(doubts, reverse=True) and doubts[0] > 0
    with pytest.raises(UsageError, match="--device has no effect without a reward model"):
        parse(["--data", str(answers), "--reward", "lexicon:x", "--device", "cpu", "--output", "o"], Score)
