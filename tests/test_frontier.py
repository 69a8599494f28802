"""The frontier's numbers against enumeration and the exact testbed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import make
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import cli, exact, frontier, models
from preftune.frontier import Point, area, best_of_n, best_of_n_kl, height, hull, over_seeds, points_of, table

pytestmark = pytest.mark.usefixtures("private_cache")

B4 = {2: 0.157805, 4: 0.582539, 8: 1.078864, 16: 1.617670, 64: 2.292161, 128: 2.302563}  # algorithms' exact KL on four responses


@pytest.mark.parametrize("n", B4)
def test_the_kl_of_best_of_n_is_exact_and_below_its_bound(n):
    assert best_of_n_kl(np.array([0.4, 0.2, 0.3, 0.1]), n) == pytest.approx(B4[n], abs=1e-6)
    problem = exact.Problem(reference=np.array([0.4, 0.3, 0.2, 0.1]), reward=np.array([0.0, 1.0, 0.5, 2.0]))
    assert best_of_n_kl(np.array([0.4, 0.2, 0.3, 0.1]), n) == pytest.approx(exact.kl(exact.best_of_n(problem, n), problem.reference))
    assert best_of_n_kl(np.full(100_000, 1e-5), n) == pytest.approx(exact.best_of_n_bound(n), abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=7), st.integers(1, 4), st.randoms())
def test_the_best_of_n_is_the_mean_over_all_subsets(draws, n, chance):
    n = min(n, len(draws))
    proxy, truth = np.array([p for p, _ in draws], float), np.array([t for _, t in draws], float)
    slow = []
    for subset in combinations(range(len(draws)), n):
        top = max(proxy[i] for i in subset)
        slow.append(np.mean([truth[i] for i in subset if proxy[i] == top]))
    assert best_of_n(proxy, truth, n)[0] == pytest.approx(np.mean(slow))


def test_the_best_of_one_is_a_draw_and_of_a_constant_too():
    truth = np.array([1.0, 2.0, 6.0])
    assert best_of_n(np.array([3.0, 1.0, 2.0]), truth, 1) == pytest.approx((3.0, 0.0))
    assert best_of_n(np.zeros(3), truth, 3) == pytest.approx((3.0, 0.0))
    assert best_of_n(truth, truth, 3) == pytest.approx((6.0, best_of_n_kl(np.full(3, 1 / 3), 3)))
    with pytest.raises(ValueError, match="best of 4 from 3"):
        best_of_n(truth, truth, 4)


POINTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(-100, 100)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(POINTS)
def test_the_hull_is_the_best_mixture_of_two(points):
    points = [(0.0, 0.0), *((x / 100, y / 100) for x, y in points)]
    curve = hull(points)
    x, y = zip(*curve, strict=True)
    slopes = np.diff(y) / np.diff(x) if len(x) > 1 else np.zeros(0)
    assert (np.diff(x) > 0).all() and (slopes > 0).all() and (np.diff(slopes) <= 1e-9 * (1 + abs(slopes[1:]))).all()
    for kl in (0.0, 0.5, 3.0, 10.0):
        below = [p for p in points if p[0] <= kl]
        chords = [a[1] + (b[1] - a[1]) * (kl - a[0]) / (b[0] - a[0]) for a in below for b in points if b[0] > kl]
        assert height(curve, kl) == pytest.approx(max([p[1] for p in below] + chords), abs=1e-9)


def test_areas():
    curve = hull([(0.0, 0.0), (1.0, 1.0), (3.0, 2.0), (2.0, 1.0)])
    assert curve == [(0.0, 0.0), (1.0, 1.0), (3.0, 2.0)]
    assert area(curve, 1.0) == pytest.approx(0.5) and area(curve, 4.0) == pytest.approx((0.5 + 3.0 + 2.0) / 4)
    assert area([(0.0, 0.3)], 5.0) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="start"):
        area([(0.1, 0.3)], 5.0)


def test_no_policy_of_the_exact_problem_stands_above_the_exact_frontier():
    problem = exact.Problem(reference=np.array([0.4, 0.3, 0.2, 0.1]), reward=np.array([0.0, 1.0, 0.5, 2.0]))
    best = hull([(0.0, float(problem.reference @ problem.reward)), *map(tuple, exact.frontier(problem, np.geomspace(0.02, 50, 300)))])
    for n in B4:
        policy = exact.best_of_n(problem, n)
        assert policy @ problem.reward <= height(best, exact.kl(policy, problem.reference)) + 2e-3


def test_intervals_over_seeds():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and found["high"] - 2.0 == pytest.approx(4.302652729911275 / 3**0.5)
    assert over_seeds([1.0]) == {"mean": 1.0, "low": None, "high": None, "seeds": 1}


def test_points_are_a_runs_evaluations_with_what_they_cost():
    evaluation = {"kl_sequence_rb": 0.5, "kl_sequence_rb_se": 0.1, "reward": 0.2, "reward_se": 0.05}
    rows = [{"step": 0} | evaluation | {"kl_sequence_rb": 0.0}, {"step": 0, "loss": 1.0, "num_tokens": 20, "seconds": 1.0},
            {"step": 1, "loss": 1.0, "num_tokens": 50, "seconds": 2.5},
            {"step": 1} | evaluation, {"step": 2, "loss": 1.0, "num_tokens": 60, "seconds": 3.0}]  # fmt: skip
    start, end = points_of(rows, method="dpo", setting="beta 0.1", seed=3)
    assert (start.kl, start.tokens, start.last) == (0.0, 0, False)
    assert (end.kl, end.tokens, end.seconds, end.last) == (0.5, 50, 2.5, True)


def point(method, seed, kl, reward, step=1, last=True):
    return Point(method, "", seed, step, last, kl, 0.1, reward, 0.1, 0.75, 100 * step, 1.0)


def test_methods_are_compared_seed_by_seed_from_the_same_start():
    found = table([point("a", s, 0.0, 0.1 * s, step=0, last=False) for s in (0, 1)]
                  + [point("a", s, 2.0, 1.0 + 0.1 * s) for s in (0, 1)] + [point("b", s, 4.0, 1.0 + 0.1 * s) for s in (0, 1)],
                  at=(1.0, 2.0, 9.0))  # fmt: skip
    assert found["limit"] == 4.0 and found["at"] == [1.0, 2.0] and list(found["methods"]) == ["a", "b"]
    # a rises by 1 over 2 nats and stays; b rises by 1 over 4: areas 0.75 and 0.5 above the start, whatever the seed's own level
    assert found["methods"]["a"]["area"]["mean"] == pytest.approx(0.05 + 0.75)
    difference = found["differences"]["a - b"]
    assert [difference["area"][key] for key in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    assert [h["mean"] for h in difference["heights"]] == pytest.approx([0.25, 0.5])
    first, second = found["ends"]
    assert (first["method"], first["kl"]["mean"], second["reward"]["mean"], second["accuracy"]["mean"]) == ("a", 2.0, 1.05, 0.75)
    starts = [point(name, 0, 0.0, 0.5, step=0, last=False) for name in "an"]
    short = table([*starts, point("a", 0, 2.0, 0.1)], limit=1.0)
    assert short["limit"] == 1.0 and short["methods"]["a"]["points"] == 1 and short["methods"]["a"]["best"]["reward"] == 0.1
    assert short["methods"]["a"]["area"]["mean"] == 0.5 and [end["method"] for end in short["ends"]] == ["a"]
    assert found["methods"]["b"]["best"]["reward"] == 1.1 and found["methods"]["a"]["tokens"] == 100


# --- the verb -----------------------------------------------------------------------------------------------------------------

RULE = "def rule(prompt, response):\n    return min(len(response), 20) / 20\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    make.write_model(folder / "model")
    make.write_scored(folder / "scored.jsonl", models.weights_fingerprint(str(folder / "model"), offline=True))
    (folder / "rule.py").write_text(RULE)
    return folder


def words(place, output, *more, seeds=2):
    return ["frontier", "--model", str(place / "model"), "--data", str(place / "scored.jsonl"), "--output", str(place / output),
            "--truth", f"python:{place / 'rule.py'}:rule", "--eval-prompts", "3", "--eval-samples", "2", "--sample-tokens", "4",
            "--holdout", "0.2", "--seeds", str(seeds), "--offline", "--set", "batch_size=8", "eval_every=1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(place):
    given = words(place, "whole", "--methods", "preferred-ft", "best-of-n", "rejection:0.5", "dpo", "--betas", "0.1", "--best-of", "2", "4",
                  "--best-of-samples", "8", "--at", "0.01")  # fmt: skip
    assert cli.main(given) == 0
    return place / "whole", given


def test_every_method_stands_in_one_table_measured_alike(done):
    folder, _ = done
    facts = json.loads((folder / "frontier.json").read_text())
    assert list(facts["methods"]) == ["best-of-n", "preferred-ft", "rejection", "dpo"] and not facts["failed"]
    starts = [p for p in facts["points"] if p["step"] == 0 and p["method"] != "best-of-n"]
    assert len(starts) == 6 and all(abs(p["kl"]) < 1e-4 for p in starts)
    for seed in (0, 1):  # the same prompts, the same draws: every method's start is one point
        assert len({p["reward"] for p in starts if p["seed"] == seed}) == 1
    assert {p["setting"] for p in facts["points"] if p["method"] == "best-of-n"} == {"n 1", "n 2", "n 4"}
    train, held = ({json.loads(line)["prompt"] for line in (folder / name).open()} for name in ("train.jsonl", "held.jsonl"))
    assert not train & held and len(held) == 4
    accepted = [json.loads(line) for line in (folder / "runs" / "rejection-0.5-0.jsonl").open()]
    assert all(1 <= len(r["responses"]) <= 4 and max(x["score"] for x in r["responses"]) > 0 for r in accepted)
    assert all((folder / "runs" / f"dpo-0.1-{seed}" / "model" / "model.safetensors").is_file() for seed in (0, 1))


def test_the_figure_is_a_drawing_and_the_page_needs_nothing(done):
    folder, _ = done
    assert ElementTree.fromstring((folder / "frontier.svg").read_text()).tag.endswith("svg")
    page = (folder / "frontier.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert all(name in page for name in ("best-of-n", "preferred-ft", "rejection", "dpo"))


def test_the_same_command_goes_on_and_another_is_refused(done, capsys):
    folder, given = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    (folder / "runs" / "dpo-0.1-1" / "results.json").unlink()  # as a kill before the last file leaves it
    facts = (folder / "frontier.json").read_bytes()
    assert cli.main(given) == 0
    assert (folder / "frontier.json").read_bytes() == facts
    changed = {p.parent.parent.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert changed <= {"dpo-0.1-1"} and (folder / "runs" / "dpo-0.1-1" / "results.json").is_file()
    assert cli.main([*given, "--seed", "5"]) == 2
    assert "other options" in capsys.readouterr().err


def test_best_of_n_stopped_between_two_n_goes_on_with_every_n(place, monkeypatch):
    given = words(place, "drawn", "--methods", "best-of-n", "--best-of", "2", "4", "--best-of-samples", "8")
    calls, real = [], best_of_n

    def stop(proxy, truth, n):
        calls.append(n)
        if calls.count(4) > 3:  # three prompts: the first seed is done, of the second n = 1 and 2
            raise make.Stopped
        return real(proxy, truth, n)

    with monkeypatch.context() as patch, pytest.raises(make.Stopped):
        patch.setattr(frontier, "best_of_n", stop)
        cli.main(given)
    assert calls[-2:] == [2, 4] and cli.main(given) == 0
    points = json.loads((place / "drawn" / "frontier.json").read_text())["points"]
    assert [(p["seed"], p["setting"]) for p in points] == [(s, f"n {n}") for s in (0, 1) for n in (1, 2, 4)]


def test_a_run_that_fails_is_named_and_the_others_go_on(place, done):
    (place / "bad.py").write_text("def rule(prompt, response):\n    raise ValueError('no')\n")
    given = words(place, "part", "--methods", "preferred-ft", "online:0.1", "--reward", f"python:{place / 'bad.py'}:rule", seeds=1)
    assert cli.main([*given, "--jobs", "2"]) == 3
    facts = json.loads((place / "part" / "frontier.json").read_text())
    assert [f["run"] for f in facts["failed"]] == ["online-0.1-0"] and list(facts["methods"]) == ["preferred-ft"]
    assert "online-0.1-0" in (place / "part" / "frontier.html").read_text()
    assert "the function raised ValueError: no" in facts["failed"][0]["why"]
    before = json.loads((place / "whole" / "frontier.json").read_text())  # a run in a process of its own is the same run
    same = [[p for p in found["points"] if p["method"] == "preferred-ft" and p["seed"] == 0] for found in (before, facts)]
    assert [[p["kl"], p["reward"]] for p in same[0]] == [[p["kl"], p["reward"]] for p in same[1]]


REFUSALS = [
    (["--methods", "dpoo"], "nearest: dpo"), (["--methods", "ppo"], "needs --reward"), (["--methods", "dpo", "dpo:0.3"], "named twice"),
    (["--methods", "sft:0.1"], "no KL weight"), (["--betas", "0.1", "x"], "numbers above 0"), (["--set", "dpo.lrr=1"], "no such option"),
    (["--set", "ppo.lr=1"], "not among --methods"), (["--set", "lr"], "METHOD.OPTION=VALUE"), (["--set", "dpo.lr=-1"], "lr"),
    (["--best-of", "0"], "above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "says"), REFUSALS)
def test_what_cannot_be_run_is_refused_before_anything_is_made(place, capsys, more, says):
    assert cli.main(words(place, "never", *more)) == 2
    said = capsys.readouterr().err
    assert says.split(": ")[-1] in said and len(said.strip().splitlines()) <= 4, said
    assert not (place / "never").exists()


def test_a_dry_run_says_every_command_and_does_nothing(place, capsys):
    assert cli.main(words(place, "never", "--methods", "dpo", "simpo", "--dry-run")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preftune dpo")]
    assert len(lines) == 2 * 4 * 2 and not (place / "never").exists()
