"""The frontier's numbers against enumeration and the exact testbed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import exact
from preftune.frontier import Point, area, best_of_n, best_of_n_kl, height, hull, over_seeds, points_of, table

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
    rows = [{"step": 0} | evaluation | {"kl_sequence_rb": 0.0}, {"step": 1, "loss": 1.0, "num_tokens": 50, "seconds": 2.5},
            {"step": 1} | evaluation]  # fmt: skip
    start, end = points_of(rows, method="dpo", setting="beta 0.1", seed=3)
    assert (start.kl, start.tokens, start.last) == (0.0, 0, False)
    assert (end.kl, end.tokens, end.seconds, end.last) == (0.5, 50, 2.5, True)


def point(method, seed, kl, reward, step=1, last=True):
    return Point(method, "", seed, step, last, kl, 0.1, reward, 0.1, 100 * step, 1.0)


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
    assert found["methods"]["b"]["best"]["reward"] == 1.1 and found["methods"]["a"]["tokens"] == 100
