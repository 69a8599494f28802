"""Evidence about a reward model, worked by hand and against simulated judges."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from preftune import certainty
from preftune.calibration import Pairs, by_length, ceiling, groups, told


def pairs(gap, prob=None, weight=None, first=None, second=None, record=None, length=None) -> Pairs:
    n = len(gap)
    columns = (gap, prob, weight, first, second, record, length)
    usual = (None, np.ones(n), np.ones(n), np.arange(n) * 2, np.arange(n) * 2 + 1, np.arange(n), np.zeros(n, int))
    return Pairs(*(other if column is None else np.array(column) for column, other in zip(columns, usual, strict=True)))


def test_agreement_is_the_chance_that_a_drawn_label_says_the_same():
    assert pairs([1, -1, 0, 2], [1, 1, 0.9, 0.7]).agreement == pytest.approx([1, 0, 0.5, 0.7])
    assert pairs([1, -1], [0.2, 0.2]).agreement == pytest.approx([0.2, 0.8])


def test_the_ceiling_of_probabilities():
    found = ceiling(pairs([0, 0, 0], [0.9, 0.2, 1.0]))
    assert found == {"low": pytest.approx(0.9), "high": pytest.approx(0.9), "pairs": 3, "from": "probabilities"}
    assert ceiling(pairs([0, 0], [0.9, 0.6], weight=[3.0, 1.0]))["low"] == pytest.approx(0.825)


def test_the_ceiling_of_repeated_judgements_by_hand():
    """3 votes to 1 agree in (3 * 2 + 0)/(4 * 3) = 1/2 of the pairs of votes; 2 to 0 in all: A = .75, at most (1 + sqrt .5)/2."""
    twice = pairs([0] * 6, first=[0, 0, 0, 1, 2, 2], second=[1, 1, 1, 0, 3, 3])
    assert ceiling(twice) == {"low": 0.75, "high": pytest.approx((1 + 0.5**0.5) / 2), "pairs": 2, "from": "repeated judgements"}
    votes = pairs([0] * 3, first=[0, 1, 2], second=[1, 0, 3], weight=[3.0, 1.0, 2.0])
    assert ceiling(votes) == ceiling(twice)
    assert ceiling(votes, votes=False)["pairs"] == 1, "weights that are no votes: only the pair that was judged twice"
    assert ceiling(pairs([0, 0])) is None and ceiling(pairs([0], weight=[2.5])) is None
    assert ceiling(pairs([0, 0], first=[0, 1], second=[1, 0]))["low"] == 0.5, "less than a coin's share of agreements is noise"


def test_the_true_ceiling_lies_between_its_bounds():
    """2,000 pairs, three judges each: equally hard pairs reach the upper bound, unequal ones lie inside; both within noise."""
    rng = np.random.default_rng(0)
    for chance, low, high in ((np.full(2000, 0.7), -0.02, 0.02), (rng.choice([0.5, 1.0], 2000), 0.02, 0.2)):
        votes = rng.random((3, 2000)) < chance
        first = np.where(votes, 0, 1) + 2 * np.arange(2000)
        found = ceiling(pairs([0] * 6000, first=first.ravel(), second=(4 * np.arange(2000) + 1 - first).ravel()))
        assert found["pairs"] == 2000
        truth = np.maximum(chance, 1 - chance).mean()
        assert found["low"] - 0.02 < truth < found["high"] + 0.02 and low < found["high"] - truth < high


def test_by_length_and_by_group():
    agrees = pairs([1, -1, 1, 1, -1, 1, 1, 1, 1, 1], length=[-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    rows = by_length(agrees)
    assert [row["group"] for row in rows] == ["-5 to -4 tokens", "-3 to -2 tokens", "-1 to +1 tokens", "+2 to +3 tokens", "+4 to +5 tokens"]
    assert [row["agreement"] for row in rows] == [0.5, 1, 0.5, 1, 1]
    named = groups(np.array([1, 0, 1, 1.0]), np.arange(4), ["b", "a", "b", "b"])
    assert [(row["group"], row["pairs"], row["agreement"]) for row in named] == [("b", 3, 1), ("a", 1, 0)]
    many = groups(np.ones(45), np.arange(45), [str(i % 25) for i in range(45)])
    assert len(many) == 21 and many[-1]["group"] == "5 others" and sum(row["pairs"] for row in many) == 45
    assert told(pairs([3.0, -3.0], [1, 0]))["calibration"]["ece"] == pytest.approx(1 - 1 / (1 + np.exp(-3))), "sure of the order it gives"
    assert told(agrees)["by_group"] == [] and len(told(agrees, list("ab" * 5))["by_group"]) == 2


def test_the_calibration_told_is_that_of_its_gaps():
    """The one of `certainty`, soft labels as they are; which side was written first is no matter."""
    rng = np.random.default_rng(1)
    gap = rng.normal(scale=2, size=400)
    label = (rng.random(400) < 1 / (1 + np.exp(-gap))).astype(float)
    found = told(pairs(gap, label))["calibration"]
    assert found == asdict(certainty.calibration(gap, label, np.arange(400))) and found["slope_low"] < 1 < found["slope_high"]
    assert told(pairs(-gap, 1 - label))["calibration"]["ece"] == pytest.approx(found["ece"])
