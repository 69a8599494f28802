"""Intervals, tests and calibration against scipy or a second formulation, and their coverage in simulated worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from preftune import certainty


def test_wilson_is_scipys_and_needs_no_whole_number():
    for wins, count in ((0, 10), (3, 10), (50, 50), (400, 805)):
        found = stats.binomtest(wins, count).proportion_ci(method="wilson")
        assert certainty.wilson(wins / count, count) == pytest.approx((found.low, found.high), abs=1e-12)
    low, high = certainty.wilson(0.5, 99.5)
    assert certainty.wilson(0.5, 99)[0] < low < certainty.wilson(0.5, 100)[0] and low + high == pytest.approx(1)
    wins = np.array([1.0] * 14 + [0.0] * 6)
    assert certainty.share_of(wins, np.arange(20)) == pytest.approx((0.7, *certainty.wilson(0.7, 19)))  # N - 1: variances over N - 1
    assert certainty.share_of(np.ones(20), np.arange(20) // 4) == (1.0, *certainty.wilson(1.0, 5))
    pairs = certainty.share_of(np.repeat(wins, 2), np.arange(40) // 2)  # 20 prompts said twice: as 19, wider by t / z
    assert pairs == pytest.approx((0.7, *certainty.wilson(0.7, 19 * (certainty.Z95 / stats.t.ppf(0.975, 19)) ** 2)))
    half = [(lambda ends: (ends[1] - ends[0]) / 2)(certainty.wilson(0.5, n)) for n in (100, 200, 500, 805, 1000)]
    assert [round(100 * h, 1) for h in half] == [9.6, 6.9, 4.4, 3.4, 3.1]


def test_exact_tests_are_scipys():
    for wins, losses in ((0, 0), (1, 0), (5, 5), (9, 1), (1, 9), (300, 250), (0, 40)):
        wanted = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert certainty.sign_test(wins, losses) == pytest.approx(wanted, rel=1e-9)
    gap = np.random.default_rng(0).normal(0.3, 1, 40)
    alone = np.arange(40)
    assert certainty.paired_t(gap, alone) == pytest.approx(stats.ttest_1samp(gap, 0).pvalue, rel=1e-9)
    value, low, high = certainty.interval_of(gap, alone)
    wanted = stats.t.interval(0.95, 39, loc=gap.mean(), scale=stats.sem(gap))
    assert (low, high) == pytest.approx(wanted) and value == pytest.approx(gap.mean())
    # two equal observations of one prompt are one observation
    assert certainty.interval_of(np.repeat(gap, 2), np.repeat(alone, 2)) == pytest.approx((value, low, high))
    assert certainty.paired_t(np.repeat(gap, 2), np.repeat(alone, 2)) == pytest.approx(certainty.paired_t(gap, alone))
    assert certainty.paired_t(np.ones(4), np.arange(4)) is None and certainty.interval_of(gap, np.zeros(40))[1:] == (None, None)


def test_signs_count_prompts():
    gap, cluster = np.array([1, -1, 0.5, 0.5, -1, 0, 0.5, 0]), np.array([0, 0, 1, 1, 2, 2, 3, 4])
    assert certainty.signs(gap, cluster) == (2, 1)  # prompt 0 and 4 are ties


def test_ratio_of_means_by_the_delta_method():
    rng = np.random.default_rng(1)
    below = rng.integers(1, 20, 400).astype(float)
    above = 0.3 * below + rng.normal(0, 1, 400)
    ratio, error = certainty.ratio_of(above, below, np.arange(400))
    assert ratio == pytest.approx(above.sum() / below.sum())
    sums = np.stack([above, below], 1)
    low, high = certainty.bootstrap(lambda drawn: drawn[:, 0] / drawn[:, 1], sums, seed=3)
    assert error == pytest.approx((high - low) / (2 * certainty.Z95), rel=0.08)


def test_bootstrap_of_clusters_equals_drawing_them_one_by_one():
    rng = np.random.default_rng(2)
    cluster = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    values = rng.random(len(cluster)) + 0.3 * rng.random(30)[cluster]
    low, high = certainty.bootstrap_mean(values, cluster, seed=0, draws=20_000)
    by_hand = []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        by_hand.append(np.concatenate([values[cluster == g] for g in drawn]).mean())
    assert [low, high] == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.012)
    assert certainty.bootstrap_mean(values, cluster, seed=0, draws=20_000) == (low, high), "the same seed"
    order = rng.permutation(len(values))
    assert certainty.bootstrap_mean(values[order], cluster[order] * 7, seed=0, draws=20_000) == pytest.approx((low, high))


@pytest.mark.parametrize("kind", ["wilson", "bootstrap", "t"])
def test_intervals_cover_in_simulated_worlds(kind):
    """200 prompts of 1 to 5 judged samples whose chances differ by prompt: the truth is inside 95% of intervals."""
    rng, inside, worlds = np.random.default_rng(3), 0, 400 if kind == "bootstrap" else 2000
    size = np.resize(np.arange(1, 6), 200)
    cluster = np.repeat(np.arange(200), size)
    truth = 2 / 3  # mean of Beta(2, 1); prompt sizes do not depend on the chances
    for world in range(worlds):
        chance = rng.beta(2, 1, 200)
        wins = (rng.random(len(cluster)) < chance[cluster]).astype(float)
        if kind == "wilson":
            _, low, high = certainty.share_of(wins, cluster)
        elif kind == "t":
            _, low, high = certainty.interval_of(wins, cluster)
        else:
            low, high = certainty.bootstrap_mean(wins, cluster, seed=world, draws=500)
        inside += low <= truth <= high
    error = math.sqrt(0.95 * 0.05 / worlds)
    assert abs(inside / worlds - 0.95) <= 3 * error, f"{inside / worlds:.3f}"


@pytest.mark.parametrize("prompts", [5, 15])
def test_few_prompts_of_several_samples_are_covered_too(prompts):
    rng, inside = np.random.default_rng(12), 0
    cluster = np.repeat(np.arange(prompts), 4)
    for _ in range(1500):
        wins = (rng.random(len(cluster)) < rng.beta(2, 1.5, prompts)[cluster]).astype(float)
        _, low, high = certainty.share_of(wins, cluster)
        inside += low <= 2 / 3.5 <= high
    assert inside / 1500 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1500)


def test_plain_wilson_covers_independent_observations():
    rng, inside = np.random.default_rng(4), 0
    for _ in range(2000):
        wins = (rng.random(120) < 0.6).astype(float)
        _, low, high = certainty.share_of(wins, np.arange(120))
        inside += low <= 0.6 <= high
    assert abs(inside / 2000 - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_intervals_that_take_answers_to_one_prompt_for_independent_do_not_cover():
    """What the clustering is for: 5 answers a prompt that agree."""
    rng, inside = np.random.default_rng(5), 0
    cluster = np.repeat(np.arange(60), 5)
    for _ in range(400):
        wins = (rng.random(60) < 0.6)[cluster].astype(float)
        inside += certainty.wilson(wins.mean(), len(wins))[0] <= 0.6 <= certainty.wilson(wins.mean(), len(wins))[1]
    assert inside / 400 < 0.8


# ---- how many prompts ------------------------------------------------------------------------------------------------------


def test_the_number_of_prompts_needed_has_the_power_it_claims():
    """A rate of 0.6 (no ties): about 200 prompts; at that number four tests in five tell."""
    error = math.sqrt(0.6 * 0.4 / 50)
    needed = certainty.prompts_needed(0.1, error, 50)
    assert needed == math.ceil((certainty.Z95 + stats.norm.ppf(0.8)) ** 2 * 0.6 * 0.4 / 0.1**2) == 189
    rng = np.random.default_rng(6)
    told = 0
    for _ in range(1500):
        wins = (rng.random(needed) < 0.6).astype(float)
        told += certainty.share_of(wins, np.arange(needed))[1] > 0.5
    assert abs(told / 1500 - 0.8) < 0.05
    assert certainty.prompts_needed(0.0, error, 50) is None and certainty.prompts_needed(0.1, 0.0, 50) is None


# ---- calibration -----------------------------------------------------------------------------------------------------------


def drawn_margins(rng, count=4000, true=1.0):
    """Margins of pairs whose first answer is better with sigmoid(true * margin): then the better one is called chosen."""
    margin = rng.normal(0, 2, count)
    first = rng.random(count) < expit(true * margin)
    return np.where(first, margin, -margin)


def test_a_calibrated_model_is_called_so_and_an_over_confident_one_is_not():
    rng = np.random.default_rng(7)
    label, alone = np.ones(4000), np.arange(4000)
    good = certainty.calibration(drawn_margins(rng), label, alone, draws=300)
    assert good.slope_low < 1 < good.slope_high and good.ece < 3 * good.chance
    assert sum(b.count for b in good.bins) == 4000 and all(b.least <= b.said <= b.most for b in good.bins)
    assert sum(b.low <= b.said <= b.high for b in good.bins) >= 8
    bad = certainty.calibration(drawn_margins(rng, true=0.4), label, alone, draws=300)
    assert bad.slope == pytest.approx(0.4, abs=0.05) and bad.slope_high < 1 and bad.ece > 5 * bad.chance
    assert bad.low < bad.ece < bad.high


def test_calibration_by_a_second_formulation():
    rng = np.random.default_rng(8)
    margin = drawn_margins(rng, 300, true=0.7)
    label = np.where(rng.random(300) < 0.1, 0.8, 1.0)
    cluster = np.repeat(np.arange(100), 3)
    found = certainty.calibration(margin, label, cluster, draws=200)
    fit = optimize.minimize_scalar(lambda b: (np.logaddexp(0, b * margin) - label * b * margin).sum(), bounds=(-5, 5), method="bounded",
                                   options={"xatol": 1e-10})  # fmt: skip
    assert found.slope == pytest.approx(fit.x, abs=1e-6)
    sure = expit(np.abs(margin))
    right = np.where(margin >= 0, label, 1 - label)
    ece = sum(abs((sure - right)[(sure >= a) & (sure < a + 0.05)].sum()) for a in np.arange(0.5, 1, 0.05)) / 300
    assert found.ece == pytest.approx(ece, abs=1e-12)
    other = certainty.calibration(-margin, 1 - label, cluster, draws=200)  # which answer is called chosen says nothing
    assert other.ece == pytest.approx(found.ece) and other.slope == pytest.approx(found.slope)


def test_no_finite_slope_is_said():
    found = certainty.calibration(np.array([0.5, 2.0, 1.0]), np.ones(3), np.arange(3))
    assert found.slope is None and found.slope_low is None
    assert certainty.calibration(np.zeros(5), np.ones(5), np.arange(5)).slope is None
    assert certainty.calibration(np.array([0.5, -2.0, 800.0]), np.ones(3), np.arange(3)).bins[-1].count == 1, "as sure as can be"
    assert certainty.calibration(np.array([0.5, -2.0]), np.ones(2), np.zeros(2)).low is None


def test_the_sandwich_of_a_constant_is_the_clustered_error_of_a_share():
    """theta = logit(p) has the error of p over p (1 - p); so has the rate at equal length where nothing hangs on the length."""
    rng = np.random.default_rng(13)
    wins, cluster = (rng.random(90) < 0.7).astype(float), np.arange(90) // 3
    value, covariance = certainty.logistic(np.ones((90, 1)), wins, cluster)
    share, error = certainty.mean_of(wins, cluster)
    assert value[0] == pytest.approx(math.log(share / (1 - share)))
    assert covariance[0, 0] ** 0.5 == pytest.approx(error / share / (1 - share))
    both = np.tile(wins, 2), np.repeat([5.0, -5.0], 90), np.tile(cluster, 2)
    found = certainty.at_equal_length(*both)
    half = stats.t.ppf(0.975, 29) * error / share / (1 - share)
    assert (found.rate, found.gamma) == pytest.approx((share, 0), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((expit(value[0] - half), expit(value[0] + half)))


def test_the_slopes_interval_covers():
    rng, inside = np.random.default_rng(9), 0
    for _ in range(400):
        margin = drawn_margins(rng, 300, true=0.8)
        _, low, high = certainty._slope(margin, np.ones(300), np.arange(300))
        inside += low <= 0.8 <= high
    assert abs(inside / 400 - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / 400)


# ---- equal length ----------------------------------------------------------------------------------------------------------


def world_of_lengths(rng, count, theta, gamma, mean):
    """Comparisons in which A's answers are longer by `mean` on average, and length sways the judge by gamma."""
    gap = rng.normal(mean, 60, count)
    scale = math.sqrt((gap**2).mean())
    wins = (rng.random(count) < expit(theta + gamma * np.tanh(gap / scale))).astype(float)
    return wins, gap


def test_equal_length_recovers_what_was_put_in():
    """A is no better, only longer: raw 0.62, at equal length 0.5. Recovered within three errors over worlds, and covered."""
    rng, rates, inside = np.random.default_rng(10), [], 0
    for _ in range(300):
        wins, gap = world_of_lengths(rng, 500, 0.0, 1.2, 40)
        found = certainty.at_equal_length(wins, gap, np.arange(500))
        rates.append(found.rate)
        inside += found.low <= 0.5 <= found.high
        assert found.inside and found.gamma > 0
    assert wins.mean() > 0.55
    assert abs(np.mean(rates) - 0.5) < 3 * np.std(rates) / math.sqrt(300)
    assert abs(inside / 300 - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / 300)


def test_exchanging_a_and_b_turns_the_rate_over_and_the_mean_is_not_taken_out():
    rng = np.random.default_rng(11)
    wins, gap = world_of_lengths(rng, 400, 0.7, 0.5, 50)
    wins[::9] = 0.5
    there = certainty.at_equal_length(wins, gap, np.arange(400) // 2)
    back = certainty.at_equal_length(1 - wins, -gap, np.arange(400) // 2)
    assert there.rate + back.rate == pytest.approx(1, abs=1e-10) and there.gamma == pytest.approx(back.gamma, abs=1e-8)
    assert (back.low, back.high) == pytest.approx((1 - there.high, 1 - there.low), abs=1e-10)
    columns = np.stack([np.ones(400), np.tanh(gap / there.scale)], 1)
    fit = optimize.minimize(lambda v: (np.logaddexp(0, columns @ v) - wins * (columns @ v)).sum(), np.zeros(2), tol=1e-12)
    assert there.rate == pytest.approx(expit(fit.x[0]), abs=1e-5) and there.gamma == pytest.approx(fit.x[1], abs=1e-4)


def test_equal_length_says_when_it_does_not_know():
    alone = np.arange(40)
    gap = np.linspace(-1, 1, 40)
    assert certainty.at_equal_length((gap > 0).astype(float), gap, alone) is None, "length separates wins from losses"
    assert certainty.at_equal_length(np.ones(40), gap, alone) is None, "A wins always"
    assert certainty.at_equal_length(np.tile([0.0, 1.0], 20), np.zeros(40), alone) is None, "all lengths are equal"
    assert certainty.at_equal_length(np.tile([0.0, 1.0], 20), gap, np.zeros(40)) is None, "one prompt"
    found = certainty.at_equal_length(np.tile([0.0, 1.0, 1.0, 0.5], 10), np.abs(gap) + 0.2, alone)
    assert found is None or not found.inside, "A is always longer: equal length lies outside the data"
