"""Scores into preferences, against exact enumeration on B4 and by properties: pairs, rejection sampling, best of n, whom to ask."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from preftune import exact
from preftune.exact import B4
from preftune.pairing import (
    accept,
    acceptance,
    best_of,
    best_of_n_reward,
    best_of_n_weights,
    choose,
    doubts,
    repeats,
    soft,
    tiers,
)
from preftune.records import Response, draw_of, inexact

RNG = np.random.default_rng

# --- rejection sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "rate"), [(0.5, 0.157884), (1.0, 0.309124), (2.0, 0.523584)])
def test_accepted_draws_are_pi_star_and_the_rate_is_known(beta, rate):
    """Rate = Z exp(-r_max/beta): at beta 1, Z = .4 + .3e + .2e^.5 + .1e^2 = 2.284134, times e^-2 = .309124."""
    chance, size, ceiling = RNG(0), 100_000, 2.0
    drawn = chance.choice(4, size, p=B4.reference)
    taken = accept(B4.reward[drawn], chance.random(size), beta=beta, ceiling=ceiling)
    assert math.exp(exact.log_partition(B4, beta=beta) - ceiling / beta) == pytest.approx(rate, abs=5e-7)
    assert taken.mean() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / size))
    got = np.bincount(drawn[taken], minlength=4)
    wanted = exact.optimum(B4, beta=beta)
    assert stats.chisquare(got, wanted * taken.sum()).pvalue > 1e-3
    assert stats.chisquare(got, exact.optimum(B4, beta=1.2 * beta) * taken.sum()).pvalue < 1e-6, "the test must tell a wrong beta"
    # the estimate without lots: unbiased for the same rate, and of smaller variance
    values = [acceptance(B4.reward[drawn[i : i + 8]], beta=beta, ceiling=ceiling) for i in range(0, size, 8)]
    assert np.mean(values) == pytest.approx(rate, abs=4 * np.std(values) / math.sqrt(len(values)))
    assert np.std(values) < math.sqrt(rate * (1 - rate) / 8)


def promptwise(size: int, beta: float) -> np.ndarray:
    """Exact distribution of an accepted draw where r_max is the largest of the K drawn: by enumeration of what was drawn."""
    out = np.zeros(4)
    for drawn in itertools.combinations_with_replacement(range(4), size):
        count = np.bincount(drawn, minlength=4)
        ways = math.factorial(size) / math.prod(math.factorial(int(c)) for c in count)
        top = B4.reward[list(drawn)].max()
        out += ways * np.prod(B4.reference**count) * count * np.exp((B4.reward - top) / beta) / size
    return out / out.sum()


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(p - q).sum() / 2)


def test_the_bias_of_an_estimated_largest_reward_is_that_of_enumeration_and_falls_with_k():
    """At beta .5 from B4; docs/rejection.md prints these numbers. K = 1 accepts everything: the reference itself."""
    wanted = exact.optimum(B4, beta=0.5)
    table = {k: distance(promptwise(k, 0.5), wanted) for k in (1, 2, 4, 8, 16, 32)}
    assert table[1] == pytest.approx(distance(B4.reference, wanted), abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(table.values()))
    assert [round(v, 3) for v in table.values()] == PROMPTWISE
    chance, size, k = RNG(1), 20_000, 8
    drawn = chance.choice(4, (size, k), p=B4.reference)
    scores = B4.reward[drawn]
    taken = accept(scores, chance.random((size, k)), beta=0.5, ceiling=scores.max(1, keepdims=True))
    got = np.bincount(drawn[taken], minlength=4) / taken.sum()
    assert distance(got, promptwise(k, 0.5)) < 0.01 < table[k]


PROMPTWISE = [0.533, 0.495, 0.43, 0.34, 0.206, 0.052]


def replacement_loop(scores: np.ndarray, wanted: int, beta: float, chance: np.random.Generator) -> list[int]:
    """Algorithm 1 of arXiv:2309.06657 as published: passes over what is left, each with its own maximum, until `wanted` are kept."""
    left, kept = list(range(len(scores))), []
    while len(kept) < wanted:
        top = scores[left].max()
        for i in list(left):
            if len(kept) < wanted and chance.random() < math.exp((scores[i] - top) / beta):
                kept.append(i)
                left.remove(i)
    return kept


@pytest.mark.parametrize(("size", "wanted", "bias", "rounds"), [(8, 1, 0.167, 4000), (64, 8, 0.031, 1200), (64, 32, 0.435, 300)])
def test_why_there_is_no_replacement_loop(size, wanted, bias, rounds):
    """Its total variation from pi* on B4 at beta .5 (knowledge: .167, .031, .435): it uses up the good ones and fills with bad ones."""
    chance, got = RNG(2), np.zeros(4)
    for _ in range(rounds):
        drawn = chance.choice(4, size, p=B4.reference)
        got += np.bincount(drawn[replacement_loop(B4.reward[drawn], wanted, 0.5, chance)], minlength=4)
    assert distance(got / got.sum(), exact.optimum(B4, beta=0.5)) == pytest.approx(bias, abs=0.025)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.1, 5))
def test_what_stands_at_the_ceiling_is_always_accepted(values, beta):
    scores = np.array(values)
    taken = accept(scores, np.full(len(scores), np.nextafter(1, 0)), beta=beta, ceiling=scores.max())
    assert taken[scores.argmax()] and 0 < acceptance(scores, beta=beta, ceiling=scores.max()) <= 1


def test_which_samples_may_stand_for_the_reference():
    good = {"model": "m", "weights": "abc", "temperature": 1.0, "top_p": 1.0}
    assert inexact(good) == "" == inexact({"weights": "abc", "temperature": 1, "top_p": 1})
    for change, why in (({"weights": None}, "weights"), ({"temperature": 0.7}, "temperature 0.7"), ({"top_p": 0.9}, "top_p 0.9"),
                        ({"kept": {"how": "best-of-n"}}, "selected"), ({"top_p": None}, "top_p None")):  # fmt: skip
        assert why in inexact(good | change) and draw_of(Response("y", source=good | change)) is None
    assert draw_of(Response("y", source=good)) == "abc", "the rule that training goes by is the same"
    assert "weights" in inexact(None)


# --- best of n ------------------------------------------------------------------------------------------------------------------

# n -> KL(best of n || ref) on B4, nats (knowledge, section 4.2)
BEST = {2: 0.157805, 4: 0.582539, 8: 1.078864, 16: 1.617670, 64: 2.292161, 128: 2.302563}


@pytest.mark.parametrize("n", BEST)
def test_best_of_n_has_the_exact_distribution_and_divergence(n):
    pmf = exact.best_of_n(B4, n)
    assert exact.kl(pmf, B4.reference) == pytest.approx(BEST[n], abs=5e-7) and exact.kl(pmf, B4.reference) < exact.best_of_n_bound(n)
    chance, groups = RNG(n), 4000
    drawn = chance.choice(4, groups * n, p=B4.reference)
    kept = best_of(B4.reward[drawn], n, chance)
    assert len(kept) == groups
    got = np.bincount(drawn[kept], minlength=4)
    assert np.allclose(got / groups, pmf, atol=5 * np.sqrt(pmf * (1 - pmf) / groups).max() + 1e-3)
    if n <= 16:
        assert stats.chisquare(got, pmf * groups).pvalue > 1e-3


def test_of_equals_the_best_is_drawn_by_lot():
    chance = RNG(0)
    got = np.bincount([best_of(np.array([1.0, 0.0, 1.0, 1.0]), 4, chance)[0] for _ in range(3000)], minlength=4)
    assert got[1] == 0 and stats.chisquare(got[[0, 2, 3]]).pvalue > 1e-3
    assert best_of(np.arange(7.0), 3, chance) == [2, 5] and best_of(np.arange(2.0), 3, chance) == []


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_the_best_of_n_estimate_is_the_mean_over_all_subsets(values, n):
    """Second formulation of C(i-1, n-1) / C(N, n): the largest of every subset of n, each as likely."""
    if n > len(values):
        return
    brute = np.mean([max(subset) for subset in itertools.combinations(values, n)])
    assert best_of_n_reward(np.array(values), n) == pytest.approx(brute, abs=1e-9)
    assert best_of_n_weights(len(values), n).sum() == pytest.approx(1, abs=1e-12)


def test_the_best_of_n_estimate_is_unbiased():
    """E over K = 6 draws of the estimate equals E[best of 3] of the exact pmf: on B4, enumerated."""
    chance = RNG(3)
    values = [best_of_n_reward(B4.reward[chance.choice(4, 6, p=B4.reference)], 3) for _ in range(20_000)]
    assert np.mean(values) == pytest.approx(exact.best_of_n(B4, 3) @ B4.reward, abs=4 * np.std(values) / math.sqrt(len(values)))


# --- pairs ----------------------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), min_size=0, max_size=7).map(np.array)


@given(SCORES, st.sampled_from(["best-worst", "best-random", "all"]), st.floats(0, 2), st.integers(1, 30), st.integers(0, 5))
def test_pairs_put_the_higher_score_first_by_the_margin_and_keep_the_limit(scores, how, margin, limit, seed):
    found = choose(scores, how, margin=margin, limit=limit, chance=RNG(seed))
    assert all(scores[a] > scores[b] and scores[a] - scores[b] >= margin for a, b in found)
    assert len(found) == len(set(found)) <= (limit if how == "all" else 1)
    every = {(a, b) for a in range(len(scores)) for b in range(len(scores)) if scores[a] > scores[b] and scores[a] - scores[b] >= margin}
    assert set(found) <= every and bool(found) == bool(every)
    if how == "all":
        assert len(found) == min(limit, len(every))
    elif found:
        assert scores[found[0][0]] == scores.max() and (how != "best-worst" or scores[found[0][1]] == scores.min())


@given(SCORES, st.floats(-3, 3))
def test_pairs_and_tiers_do_not_see_a_constant_of_the_prompt(scores, shift):
    moved = scores + round(shift * 4) / 4  # exact in binary
    assert tiers(scores) == tiers(moved) and choose(scores, "all", limit=None) == choose(moved, "all", limit=None)


@given(SCORES)
def test_tiers_hold_every_response_once_best_first_equal_together(scores):
    found = tiers(scores)
    assert sorted(i for tier in found for i in tier) == list(range(len(scores)))
    levels = [{float(scores[i]) for i in tier} for tier in found]
    assert all(len(level) == 1 for level in levels) and [max(level) for level in levels] == sorted({*scores.tolist()}, reverse=True)


@settings(max_examples=50)
@given(st.floats(-800, 800), st.floats(0.01, 100))
def test_soft_labels_are_bradley_terry(difference, scale):
    assert soft(difference, scale) + soft(-difference, scale) == pytest.approx(1, abs=1e-12)
    assert soft(math.log(3) * scale, scale) == pytest.approx(0.75)


def test_lots_are_fair_and_those_of_the_seed():
    got = [choose(np.array([3.0, 0.0, 1.0, 2.0]), "best-random", chance=RNG(seed))[0] for seed in range(600)]
    assert stats.chisquare(np.bincount([b for _, b in got], minlength=4)[1:]).pvalue > 1e-3 and {a for a, _ in got} == {0}
    one = choose(np.arange(6.0), "all", limit=4, chance=RNG(1))
    assert one == choose(np.arange(6.0), "all", limit=4, chance=RNG(1)) != choose(np.arange(6.0), "all", limit=4, chance=RNG(2))


def test_repeated_texts_are_told_apart_by_how_they_repeat():
    assert repeats(["Yes.", "yes", "No", "Yes.", "YES!", "no way"]) == ([0, 2, 5], 1, 2)
    assert repeats(["?", "!", "?"]) == ([0, 1], 1, 0), "texts without a word are compared as they stand"


# --- whom to ask ----------------------------------------------------------------------------------------------------------------


def test_the_most_doubtful_pair_comes_first():
    scores = np.array([0.0, 1.0, 1.25, 5.0])
    assert [pair[1:] for pair in doubts(scores)][:2] == [(1, 2), (0, 1)]
    members = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, -3.0]])
    first, *_ = doubts(scores, members)
    assert first[1:] in [(0, 3), (1, 3), (2, 3)] and first[0] == pytest.approx(3.0)
    shifted = doubts(scores, members + np.array([[7.0], [-2.0]]))
    assert [pair[1:] for pair in shifted] == [pair[1:] for pair in doubts(scores, members)], "a member's own zero does not count"
