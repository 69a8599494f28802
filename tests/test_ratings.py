"""Ratings: closed forms, published values, a second formulation (Hunter's MM), brute force, coverage, refusals, and the verb itself."""

from __future__ import annotations

import csv
import itertools
import json
import re
import xml.dom.minidom

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import preftune
from preftune import ratings
from preftune.cli import main
from preftune.errors import DataError
from preftune.ratings import Ballot, apart, bootstrap, compare, design, estimates, fit, fits, pack, paired, rate, unrated
from preftune.ratings.rows import of_record, of_row, table_kind
from preftune.records import Judgement, Message, Record, Response

# The testbed W3: WINS[i, j] = i beat j, and ties. Values to all digits were computed outside of this project.
WINS = np.array([[0, 8, 5], [2, 0, 6], [5, 4, 0]])
TIES = {(0, 1): 4, (0, 2): 3, (1, 2): 2}
NAMES = ("a", "b", "c")


def of_wins(wins, ties=None, names=None):
    first, second = np.nonzero(wins)
    count, outcome = wins[first, second], np.ones(len(first))
    for (i, j), many in (ties or {}).items():
        first, second = np.append(first, i), np.append(second, j)
        count, outcome = np.append(count, many), np.append(outcome, 0.5)
    return paired(
        first, second, outcome, names or tuple(f"p{i}" for i in range(len(wins))) if names is None else names, count=count
    )


def simulated(generator, ability, n, *, order=0.0):
    """Games between random pairs; the first has an advantage of `order`."""
    k = len(ability)
    i = generator.integers(k, size=n)
    j = (i + 1 + generator.integers(k - 1, size=n)) % k
    won = generator.random(n) < 1 / (1 + np.exp(ability[j] - ability[i] - order))
    return i, j, won.astype(float)


def errors(board):
    return [next(line.se for line in board.lines if line.name == name) for name in board.fit.design.players]


# --- values known to all digits -------------------------------------------------------------------------------------------------


def test_bradley_terry_on_the_testbed():
    board = rate(of_wins(WINS, names=NAMES), "bradley-terry", scale="logit")
    assert board.fit.theta == pytest.approx([0.41316648, -0.27539705, -0.13776942], abs=1e-8)
    assert board.fit.nll == pytest.approx(19.84601902, abs=1e-8) and board.fit.gradient < 1e-10
    assert errors(board) == pytest.approx([0.312727, 0.307220, 0.304112][:1] + [0.307220, 0.304112], abs=1e-6)
    found, _ = compare(board, "a", "b")
    assert found.se[0] == pytest.approx(0.540260, abs=1e-6)
    assert errors(rate(of_wins(WINS, names=NAMES), "bradley-terry", scale="logit", intervals="sandwich")) == pytest.approx(
        [0.309458, 0.294816, 0.318327], abs=1e-6
    )
    elo = {line.name: line.rating for line in rate(of_wins(WINS, names=NAMES), "bradley-terry").lines}
    assert [elo[n] for n in NAMES] == pytest.approx([1071.77, 952.16, 976.07], abs=0.005)
    # Score equations: every player's expected wins are those it has (13, 8, 9).
    s = board.fit.theta
    expected = ((WINS + WINS.T) / (1 + np.exp(s[None] - s[:, None]))).sum(1)
    assert expected == pytest.approx([13, 8, 9], abs=1e-9)


@pytest.mark.parametrize(
    ("method", "ties", "s", "extra", "nll"),
    [
        ("bradley-terry", "half", [0.300303, -0.198462, -0.101841], [], None),
        ("davidson", "refuse", [0.393955, -0.260358, -0.133597], [("nu", 0.618795)], 40.956471),
        ("rao-kupper", "refuse", [0.308691, -0.201484, -0.107207], [("theta", 1.629490)], 40.983648),
    ],
)
def test_ties_on_the_testbed(method, ties, s, extra, nll):
    board = rate(of_wins(WINS, TIES), method, ties=ties, scale="logit")
    assert board.fit.theta[:3] == pytest.approx(s, abs=1e-6)
    assert [(e.name, round(e.value, 6)) for e in board.effects] == extra
    assert nll is None or board.fit.nll == pytest.approx(nll, abs=1e-6)


def test_davidson_score_equations():
    """Wins and half the ties are its sufficient statistics: observed 16.5, 11, 11.5."""
    board = rate(of_wins(WINS, TIES), "davidson", scale="logit")
    p, nu = np.exp(board.fit.theta[:3]), np.exp(board.fit.theta[3])
    expected = np.zeros(3)
    for i, j in itertools.permutations(range(3), 2):
        n = WINS[i, j] + WINS[j, i] + TIES[min(i, j), max(i, j)]
        tie = nu * np.sqrt(p[i] * p[j])
        expected[i] += n * (p[i] + tie / 2) / (p[i] + p[j] + tie)
    assert expected == pytest.approx([16.5, 11, 11.5], abs=1e-9)


def test_half_wins_are_a_quasi_likelihood():
    """With ties as halves the Fisher error is too large; the sandwich says so (values computed outside)."""
    games = of_wins(WINS, TIES)
    for intervals, wanted in (("fisher", [0.2633, 0.2660, 0.2696]), ("sandwich", [0.2234, 0.2265, 0.2482])):
        assert errors(rate(games, "bradley-terry", ties="half", scale="logit", intervals=intervals)) == pytest.approx(
            wanted, abs=5e-5
        )


@pytest.mark.parametrize(("method", "theta"), [("davidson", None), ("rao-kupper", 1.5)])
def test_equal_strength_gives_closed_forms(method, theta):
    """Two equals, 2 of 5 games each, one tie: nu = 0.5, theta = 1.5 (win 0.4, tie 0.2)."""
    board = rate(of_wins(np.array([[0, 4], [4, 0]]), {(0, 1): 2}), method, scale="logit")
    assert board.fit.theta[:2] == pytest.approx([0, 0], abs=1e-12)
    assert board.effects[0].value == pytest.approx(theta or 0.5, abs=1e-10)


def test_two_players_in_closed_form():
    """The ability is the logit of the share won, its error sqrt(1/won + 1/lost)."""
    board = rate(of_wins(np.array([[0, 7], [3, 0]]), names=("x", "y")), "bradley-terry", scale="logit", anchor=("y", 0.0))
    top = board.lines[0]
    assert (top.name, top.rating, top.se) == (
        "x",
        pytest.approx(np.log(7 / 3), abs=1e-12),
        pytest.approx(np.sqrt(1 / 7 + 1 / 3), abs=1e-12),
    )
    assert top.low == pytest.approx(top.rating - 1.959963985 * top.se, abs=1e-9)
    assert (board.lines[1].rating, board.lines[1].se) == (0.0, 0.0)


def test_a_chain_has_the_sum_of_its_variances():
    """a - b - c, where a and c never met: s_a - s_c adds, and so do the variances. The errors of single ratings do not show that."""
    board = rate(of_wins(np.array([[0, 6, 0], [2, 0, 5], [0, 5, 0]]), names=NAMES), "bradley-terry", scale="logit")
    found, _ = compare(board, "a", "c")
    assert found.value[0] == pytest.approx(np.log(3), abs=1e-12)
    assert found.se[0] ** 2 == pytest.approx(1 / 6 + 1 / 2 + 1 / 5 + 1 / 5, abs=1e-12)


def test_ridge_on_an_unbeaten_player():
    games = of_wins(np.array([[0, 3, 0], [0, 0, 2], [0, 1, 0]]))
    for prior, wanted in (
        (1e-3, (4.5554, -1.9331, -2.6223)),
        (0.1, (1.9490, -0.7177, -1.2312)),
        (1.0, (0.7568, -0.3297, -0.4271)),
    ):
        board = rate(games, "bradley-terry", prior=prior)
        assert board.fit.theta == pytest.approx(wanted, abs=1e-4) and "without the prior" in board.notes[0]


# --- published --------------------------------------------------------------------------------------------------------------------


def table(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return pack(b for row in rows for b in of_row(row, table_kind(rows[0])))


@pytest.fixture
def published(shared_data):
    folder = shared_data / "bradley-terry"
    if not folder.is_dir():
        pytest.skip("no published tables beside this checkout")
    return folder


def test_baseball_as_published(published):
    """Agresti 2002, table 10.11: log-abilities against Baltimore and errors, to the digits printed there."""
    games = table(published / "baseball.csv")
    board = rate(games, "bradley-terry", scale="logit", anchor=("Baltimore", 0.0))
    assert [f"{line.rating:.2f}" for line in board.lines[:6]] == ["1.58", "1.44", "1.29", "1.25", "1.11", "0.68"]
    assert {f"{line.se:.1f}" for line in board.lines[:6]} == {"0.3"}
    home = rate(games, "bradley-terry", order_effect=True, scale="logit")
    assert f"{home.effects[0].value:.3f}" == "0.302" and home.effects[0].name == "shown first"


def test_citations_as_published(published):
    board = rate(table(published / "citations.csv"), "bradley-terry", scale="logit", anchor=("Biometrika", 0.0))
    assert {line.name: f"{line.rating:.4f}" for line in board.lines} == {
        "Comm Statist": "-2.9491",
        "JASA": "-0.4796",
        "JRSS-B": "0.2690",
        "Biometrika": "0.0000",
    }


# --- second formulations ----------------------------------------------------------------------------------------------------------


def minorised(wins, rounds=20000):
    """Hunter 2004, eq. 3: p_i <- W_i / sum_j n_ij / (p_i + p_j)."""
    p, met, won = np.ones(len(wins)), wins + wins.T, wins.sum(1)
    for _ in range(rounds):
        new = won / (met / (p[:, None] + p[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / p)).max() < 1e-14:
            break
        p = new
    return np.log(p)


def minorised_rankings(orders, k, rounds=20000):
    """Hunter 2004, eq. 30: p_i <- (rankings in which i is not last) / sum over places up to which i is left of 1 / sum of p left."""
    p = np.ones(k)
    won = np.bincount([i for order in orders for i in order[:-1]], minlength=k)
    for _ in range(rounds):
        below = np.zeros(k)
        for order in orders:
            for place in range(len(order) - 1):
                below[list(order[place:])] += 1 / p[list(order[place:])].sum()
        new = won / below
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / p)).max() < 1e-13:
            break
        p = new
    return np.log(p)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_newton_equals_mm(k, seed):
    wins = np.random.default_rng(seed).integers(1, 9, size=(k, k)) * (1 - np.eye(k, dtype=int))
    found = fit(design(of_wins(wins), "bradley-terry"))
    assert np.abs(found.theta - minorised(wins)).max() < 1e-8
    assert found.gradient <= 1e-10 * max(1, wins.sum(1).max() * 2) and found.iterations < 15


def test_newton_equals_mm_on_rankings():
    generator = np.random.default_rng(3)
    ability = np.array([1.0, 0.3, 0.0, -0.5, -0.8])
    orders = [tuple(np.argsort(-(ability + generator.gumbel(size=5)))[: generator.integers(2, 6)]) for _ in range(60)]
    games = pack(Ballot(tuple(str(i) for i in order), tuple(range(len(order)))) for order in orders)
    found = fit(design(games, "plackett-luce"))
    theirs = minorised_rankings(orders, 5)
    assert [found.theta[games.players.index(str(i))] for i in range(5)] == pytest.approx(theirs, abs=1e-8)


def brute(ballot, p, method, delta=None, ties="breslow"):
    """-log P of one ballot by its definition: p abilities exp(s) by name."""
    left, out = list(ballot.players), 0.0
    for r in sorted(set(ballot.ranks)):
        tier = [n for n, rank in zip(ballot.players, ballot.ranks, strict=True) if rank == r]
        if ballot.open_end and r == max(ballot.ranks):
            break
        if method == "davidson":
            if len(left) > 1:
                strength = lambda group: delta.get(len(group), 0.0) * np.prod([p[n] for n in group]) ** (1 / len(group))  # noqa: E731
                every = [c for size in range(1, len(left) + 1) for c in itertools.combinations(left, size)]
                out -= np.log(strength(tier) / sum(map(strength, every)))
        else:
            for done, name in enumerate(tier):
                if len(left) > 1:
                    below = sum(p[n] for n in left) - (done / len(tier) * sum(p[n] for n in tier) if ties == "efron" else 0)
                    out -= np.log(p[name] / below)
        left = [n for n in left if n not in tier]
    return out


BALLOTS = [
    Ballot(("a", "b", "c", "d"), (0, 1, 2, 3)),
    Ballot(("d", "a", "c"), (0, 1, 2)),
    Ballot(("b", "d"), (0, 1)),
    Ballot(("c", "a"), (0, 1)),
    Ballot(("b", "c", "a", "d"), (0, 1, 2, 2), open_end=True),
    Ballot(("d", "b", "c"), (0, 1, 1), open_end=True),
    Ballot(("c", "b", "a"), (0, 1, 2)),
]
TIED = [
    *BALLOTS,
    Ballot(("a", "b", "c", "d"), (0, 0, 1, 2)),
    Ballot(("c", "d"), (0, 0)),
    Ballot(("a", "b", "c", "d"), (1, 0, 0, 0)),
    Ballot(("a", "d", "b"), (0, 1, 1)),
]


@pytest.mark.parametrize(
    ("ballots", "method", "ties"),
    [
        (BALLOTS, "plackett-luce", "refuse"),
        (TIED, "plackett-luce", "breslow"),
        (TIED, "plackett-luce", "efron"),
        (TIED, "davidson", "refuse"),
    ],
)
def test_likelihood_gradient_and_hessian_by_definition(ballots, method, ties):
    """At a random point, against the formula of the literature and its finite differences; Efron up to a constant."""
    d = design(pack(ballots), method, ties=ties)
    generator = np.random.default_rng(0)
    theta, weight = generator.normal(size=len(d.names)) * 0.5, d.share.copy()
    n = len(d.players)

    def nll(x):
        p = dict(zip(d.players, np.exp(x[:n]), strict=True))
        delta = {1: 1.0} | {int(name.split()[-1]): np.exp(v) for name, v in zip(d.ties, x[n:], strict=True)}
        return sum(brute(b, p, method, delta, ties) for b in ballots)

    value, _, p = fits._objective(d, theta, weight, 0.0, 0.0)
    constant = fits._objective(d, 0 * theta, weight, 0.0, 0.0)[0] - nll(0 * theta) if ties == "efron" else 0.0
    assert value - constant == pytest.approx(nll(theta), abs=1e-10)
    gradient, hessian = fits._derivatives(d, theta, p, weight, 0.0, 0.0)
    step = 1e-4 * np.eye(len(theta))
    numeric = np.array([(nll(theta + e) - nll(theta - e)) / 2e-4 for e in step])
    assert gradient == pytest.approx(numeric, abs=1e-6)
    curves = np.array(
        [[(nll(theta + e + f) - nll(theta + e - f) - nll(theta - e + f) + nll(theta - e - f)) / 4e-8 for f in step] for e in step]
    )
    assert hessian.toarray() == pytest.approx(curves, abs=1e-5)


def test_rao_kupper_by_definition():
    """The product form in `designs` against p_i / (p_i + theta p_j) and the tie that is left over."""
    d = design(of_wins(WINS, TIES), "rao-kupper")
    theta = np.array([0.3, -0.5, 0.2, 0.4])
    p, t = np.exp(theta[:3]), np.exp(theta[3])
    wanted = 0.0
    for i, j in itertools.permutations(range(3), 2):
        wanted -= WINS[i, j] * np.log(p[i] / (p[i] + t * p[j]))
    for (i, j), many in TIES.items():
        wanted -= many * np.log(1 - p[i] / (p[i] + t * p[j]) - p[j] / (p[j] + t * p[i]))
    weight = d.share * d.count[d.unit]
    value, _, prob = fits._objective(d, theta, weight, 9.0, 0.0)
    assert value == pytest.approx(wanted, abs=1e-10)
    gradient, hessian = fits._derivatives(d, theta, prob, weight, 9.0, 0.0)
    at = lambda x: fits._objective(d, x, weight, 9.0, 0.0)[0]  # noqa: E731
    step = 1e-4 * np.eye(4)
    assert gradient == pytest.approx([(at(theta + e) - at(theta - e)) / 2e-4 for e in step], abs=1e-6)
    assert hessian == pytest.approx(
        np.array(
            [[(at(theta + e + f) - at(theta + e - f) - at(theta - e + f) + at(theta - e - f)) / 4e-8 for f in step] for e in step]
        ),
        abs=1e-4,
    )


def test_plackett_luce_of_two_is_bradley_terry():
    """Value, gradient, abilities and errors; also for a top-1 of two."""
    generator = np.random.default_rng(1)
    i, j, won = simulated(generator, np.array([0.8, 0.0, -0.3, -0.5]), 300)
    two = [
        Ballot((f"p{a}", f"p{b}"), (0, 1) if w else (1, 0), open_end=bool(k % 2))
        for k, (a, b, w) in enumerate(zip(i, j, won, strict=True))
    ]
    plain = [b._replace(open_end=False) for b in two]
    one, other = design(pack(plain), "bradley-terry"), design(pack(two), "plackett-luce")
    theta = generator.normal(size=4)
    values = [fits._objective(d, theta, d.share, 0.0, 0.0) for d in (one, other)]
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-14)
    gradients = [fits._derivatives(d, theta, v[2], d.share, 0.0, 0.0)[0] for d, v in zip((one, other), values, strict=True)]
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-12)
    boards = [
        rate(pack(ballots), method, intervals="sandwich")
        for ballots, method in ((plain, "bradley-terry"), (two, "plackett-luce"))
    ]
    for x, y in zip(boards[0].lines, boards[1].lines, strict=True):
        assert (x.name, x.games) == (y.name, y.games) and (x.rating, x.se) == pytest.approx((y.rating, y.se), abs=1e-8)


def test_probabilities_of_all_orders_sum_to_one():
    p = {"a": 1.0, "b": 2.5, "c": 0.4, "d": 1.7}
    orders = [Ballot(tuple("abcd"), ranks) for ranks in itertools.permutations(range(4))]
    total = 0.0
    for ballot in orders:
        d = design(pack([ballot]), "plackett-luce")
        total += np.exp(-fits._objective(d, np.log([p[n] for n in d.players]), d.share, 0.0, 0.0)[0])
    assert total == pytest.approx(1.0, abs=1e-13)


def test_the_counted_hessian_is_the_product():
    """`_gram` counts products into cells where rows are alike; else it multiplies sparse matrices. Both against the definition."""
    generator = np.random.default_rng(7)
    for order, filled in ((False, 2), (True, 3)):
        i, j, won = simulated(generator, np.zeros(6), 50)
        rows = design(paired(i, j, won, tuple("abcdef")), "bradley-terry", order_effect=order).rows
        assert (np.diff(rows.indptr) == filled).all()
        weight, full = generator.random(50), rows.toarray()
        counted = fits._gram(rows, weight)
        assert isinstance(counted, np.ndarray) and counted == pytest.approx(full.T @ (weight[:, None] * full), abs=1e-12)
        rows.data[0] = 0
        rows.eliminate_zeros()
        full = rows.toarray()
        product = fits._gram(rows, weight)
        assert not isinstance(product, np.ndarray) and product.toarray() == pytest.approx(
            full.T @ (weight[:, None] * full), abs=1e-12
        )


def test_sparse_and_dense_factors_agree(monkeypatch):
    generator = np.random.default_rng(5)
    games = paired(*simulated(generator, generator.normal(size=40), 3000, order=0.3), tuple(map(str, range(40))))
    boards = {}
    for dense in (3000, 10):
        monkeypatch.setattr(fits, "DENSE", dense)
        for prior in (0.0, 0.5):
            for order in (False, True):
                boards[dense, prior, order] = rate(games, "bradley-terry", prior=prior, order_effect=order, intervals="sandwich")
    for prior, order in itertools.product((0.0, 0.5), (False, True)):
        one, other = boards[3000, prior, order], boards[10, prior, order]
        assert one.fit.theta == pytest.approx(other.fit.theta, abs=1e-9)
        assert [(x.rating, x.se) for x in one.lines] == [pytest.approx((y.rating, y.se), abs=1e-7) for y in other.lines]


# --- properties -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(["bradley-terry", "davidson", "rao-kupper"]), st.integers(0, 2**32 - 1))
def test_symmetry_transitivity_and_the_gauge(method, seed):
    """Renaming and turning the data changes nothing; reversing all results negates; the odds of i over j multiply."""
    generator = np.random.default_rng(seed)
    i, j, outcome = simulated(generator, generator.normal(size=5) * 0.5, 200)
    if method != "bradley-terry":
        outcome = np.where(generator.random(200) < 0.2, 0.5, outcome)
    for a, b in itertools.permutations(range(5), 2):  # everybody beats everybody once: ratings exist
        i, j, outcome = np.append(i, a), np.append(j, b), np.append(outcome, 1.0)
    base = fit(design(paired(i, j, outcome, tuple("abcde")), method))
    turned = fit(design(paired(j, i, 1 - outcome, tuple("abcde")), method))
    assert turned.theta == pytest.approx(base.theta, abs=1e-9)
    order = generator.permutation(5)
    renamed = fit(design(paired(order[i], order[j], outcome, tuple("abcde")), method))
    assert renamed.theta[order] == pytest.approx(base.theta[:5], abs=1e-9)
    reverse = fit(design(paired(i, j, 1 - outcome, tuple("abcde")), method))
    assert reverse.theta[:5] == pytest.approx(-base.theta[:5], abs=1e-9) and reverse.theta[5:] == pytest.approx(
        base.theta[5:], abs=1e-9
    )
    assert base.theta[:5].sum() == pytest.approx(0, abs=1e-9)
    board = rate(paired(i, j, outcome, tuple("abcde")), method, scale="logit")
    chance = {(a, b): compare(board, a, b)[1] for a, b in itertools.permutations("abcde", 2)}
    odds = lambda a, b: chance[a, b] / chance[b, a]  # noqa: E731
    for a, b, c in itertools.permutations("abcde", 3):
        assert odds(a, b) * odds(b, c) == pytest.approx(odds(a, c), rel=1e-10)
        assert not (chance[a, b] > 0.5 and chance[b, c] > 0.5) or chance[a, c] > 0.5


@pytest.mark.parametrize("intervals", ["fisher", "bootstrap"])
def test_ranks_are_those_of_the_difference_intervals(intervals):
    """Neighbours whose own intervals overlap may still be told apart: the covariance is in it."""
    generator = np.random.default_rng(11)
    games = paired(*simulated(generator, np.linspace(0.9, -0.9, 6), 700), tuple("abcdef"))
    board = rate(games, "bradley-terry", intervals=intervals, draws=200, anchor=("f", 0.0))
    for line in board.lines:
        found = [compare(board, line.name, other.name)[0] for other in board.lines if other is not line]
        assert line.first == 1 + sum(e.high[0] < 0 for e in found) and line.last == 6 - sum(e.low[0] > 0 for e in found)
    surely = [(x, y) for x, y in itertools.combinations(board.lines, 2) if compare(board, x.name, y.name)[0].low[0] > 0]
    assert any(x.low < y.high for x, y in surely)


def test_scales_and_anchors_are_affine():
    games = of_wins(WINS, names=NAMES)
    plain, anchored = rate(games, "bradley-terry", scale="logit"), rate(games, "bradley-terry", anchor=("b", 1500.0))
    base = {line.name: line.rating for line in plain.lines}
    for line in anchored.lines:
        assert line.rating == pytest.approx(1500 + 400 / np.log(10) * (base[line.name] - base["b"]), abs=1e-9)
    # A difference does not know the anchor; the error of a rating does.
    one, other = compare(plain, "a", "c")[0], compare(anchored, "a", "c")[0]
    assert other.se[0] == pytest.approx(one.se[0] * 400 / np.log(10), rel=1e-12)
    assert next(line for line in anchored.lines if line.name == "b").se == 0


def test_counts_are_repeated_rows_and_weights_are_not():
    """A count of 3 is three games; a weight of 3 has the same estimate, but the sandwich takes it for one observation."""
    rows = [(f, s, o) for f, s, o in zip(*[[0, 1, 1, 2, 0, 2], [1, 0, 2, 1, 2, 0], [1.0] * 6], strict=True)]
    f, s, o = (np.array(column) for column in zip(*rows, strict=True))
    many = np.array([5, 3, 4, 2, 3, 3])
    counted = paired(f, s, o, NAMES, count=many)
    repeated = paired(np.repeat(f, many), np.repeat(s, many), np.repeat(o, many), NAMES)
    weighed = paired(f, s, o, NAMES, weight=many)
    boards = {
        (k, i): rate(g, "bradley-terry", scale="logit", intervals=i)
        for k, g in enumerate((counted, repeated, weighed))
        for i in ("fisher", "sandwich")
    }
    for i in ("fisher", "sandwich"):
        assert errors(boards[0, i]) == pytest.approx(errors(boards[1, i]), rel=1e-10)
    assert errors(boards[2, "fisher"]) == pytest.approx(errors(boards[0, "fisher"]), rel=1e-10)
    ratio = np.array(errors(boards[2, "sandwich"])) / errors(boards[0, "sandwich"])
    assert (ratio > 1.5).all() and boards[2, "fisher"].fit.theta == pytest.approx(boards[0, "fisher"].fit.theta, abs=1e-10)


def test_clusters_of_one_are_no_clusters_and_copies_are_one():
    generator = np.random.default_rng(2)
    i, j, won = simulated(generator, np.array([0.5, 0.0, -0.5]), 200)
    alone = rate(paired(i, j, won, NAMES), "bradley-terry", intervals="sandwich")
    single = rate(paired(i, j, won, NAMES, cluster=np.arange(200)), "bradley-terry", intervals="sandwich")
    copies = rate(
        paired(np.tile(i, 4), np.tile(j, 4), np.tile(won, 4), NAMES, cluster=np.tile(np.arange(200), 4)),
        "bradley-terry",
        intervals="sandwich",
    )
    blind = rate(paired(np.tile(i, 4), np.tile(j, 4), np.tile(won, 4), NAMES), "bradley-terry", intervals="sandwich")
    assert errors(single) == pytest.approx(errors(alone), rel=1e-9)
    assert errors(copies) == pytest.approx(errors(alone), rel=1e-9)
    assert np.array(errors(blind)) * 2 == pytest.approx(errors(alone), rel=1e-9)


def test_the_bootstrap_agrees_with_the_sandwich():
    generator = np.random.default_rng(4)
    i, j, won = simulated(generator, np.array([0.5, 0.0, -0.5]), 900)
    cluster = np.arange(900) // 3
    games = paired(i, j, won, NAMES, cluster=cluster)
    drawn = rate(games, "bradley-terry", intervals="bootstrap", draws=200, seed=0)
    again = rate(games, "bradley-terry", intervals="bootstrap", draws=200, seed=0)
    assert drawn.lines == again.lines
    assert errors(drawn) == pytest.approx(errors(rate(games, "bradley-terry", intervals="sandwich")), rel=0.15)
    for line in drawn.lines:
        assert (
            line.low < line.rating < line.high and (line.first, line.last) == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}[line.name]
        )


def test_a_bootstrap_of_scarce_games_is_refused():
    with pytest.raises(DataError, match="bootstrap draws have no finite ratings"):
        rate(of_wins(np.array([[0, 2, 1], [1, 0, 2], [2, 1, 0]])), "bradley-terry", intervals="bootstrap", draws=100)
    one = fit(
        design(
            paired(np.array([0, 1]), np.array([1, 0]), np.ones(2), ("a", "b"), cluster=np.zeros(2, dtype=int)), "bradley-terry"
        )
    )
    with pytest.raises(DataError, match="two clusters"):
        bootstrap(one, draws=100, seed=0)
    with pytest.raises(ValueError, match="without draws"):
        estimates(one, np.array([[1.0, -1.0]]), intervals="bootstrap")
    with pytest.raises(AssertionError, match="contrast of the level"):
        estimates(one, np.array([[1.0, 0.0]]), intervals="fisher")


# --- order and covariates ---------------------------------------------------------------------------------------------------------


def styled(generator, n, *, mean=0.0, ability=(0.6, 0.1, -0.2, -0.5), effect=0.4):
    """Games in which the answer with the larger value is favoured; players differ in their mean value."""
    ability, habit = np.array(ability), np.array([0.5, -0.5, 0.3, -0.3])
    i = generator.integers(4, size=n)
    j = (i + 1 + generator.integers(3, size=n)) % 4
    x, y = habit[i] + mean + generator.normal(size=n), habit[j] + generator.normal(size=n)
    won = generator.random(n) < 1 / (1 + np.exp(-(ability[i] - ability[j] + effect * (x - y))))
    return [
        Ballot((f"p{a}", f"p{b}"), (0, 1) if w else (1, 0), values=((u,), (v,)))
        for a, b, w, u, v in zip(i, j, won, x, y, strict=True)
    ]


def test_covariates_recover_what_made_the_games_and_turning_changes_nothing():
    ballots = styled(np.random.default_rng(0), 6000)
    board = rate(pack(ballots, ("style",)), "bradley-terry", scale="logit")
    truth = dict(zip(("p0", "p1", "p2", "p3"), (0.6, 0.1, -0.2, -0.5), strict=True))
    for line in board.lines:
        assert abs(line.rating - truth[line.name]) < 3 * line.se
    effect = board.effects[0]
    assert abs(effect.value / float(effect.unit) - 0.4) < 3 * effect.se
    turned = [b._replace(players=b.players[::-1], ranks=b.ranks[::-1], values=b.values[::-1]) for b in ballots]
    again = rate(pack(turned, ("style",)), "bradley-terry", scale="logit")
    theta = dict(zip(again.fit.design.names, again.fit.theta, strict=True))
    assert [theta[n] for n in board.fit.design.names] == pytest.approx(board.fit.theta, abs=1e-10)
    blind = rate(pack([b._replace(values=()) for b in ballots]), "bradley-terry", scale="logit")
    off = {line.name: line.rating - truth[line.name] for line in blind.lines}
    assert off["p0"] > 0.1 and off["p1"] < -0.1  # what the covariate is for


def test_a_mean_difference_does_not_become_an_advantage():
    """The trap of standardising with the mean taken off: the first's values are 2 larger on average."""
    ballots = styled(np.random.default_rng(1), 6000, mean=2.0)
    board = rate(pack(ballots, ("style",)), "bradley-terry", scale="logit")
    truth = dict(zip(("p0", "p1", "p2", "p3"), (0.6, 0.1, -0.2, -0.5), strict=True))
    assert all(abs(line.rating - truth[line.name]) < 3 * line.se for line in board.lines)
    assert abs(board.effects[0].value / float(board.effects[0].unit) - 0.4) < 3 * board.effects[0].se
    shifted = [b._replace(values=tuple((v[0] + 7,) for v in b.values)) for b in ballots]
    scaled = [b._replace(values=tuple((v[0] * 1000,) for v in b.values)) for b in ballots]
    for other in (shifted, scaled):
        again = rate(pack(other, ("style",)), "bradley-terry", scale="logit")
        assert again.fit.theta == pytest.approx(board.fit.theta, abs=1e-8)


def test_covariates_of_rankings():
    """Of two answers each, a ranking is a game: the same numbers."""
    ballots = styled(np.random.default_rng(2), 800)
    one, other = (rate(pack(ballots, ("style",)), method, scale="logit") for method in ("bradley-terry", "plackett-luce"))
    assert other.fit.theta == pytest.approx(one.fit.theta, abs=1e-8) and other.effects[0].se == pytest.approx(
        one.effects[0].se, rel=1e-8
    )


@pytest.mark.parametrize(
    ("values", "names", "fragment"),
    [
        (lambda b, g: tuple((1.0,) for _ in b.players), ("x",), "the same for both sides"),
        (lambda b, g: tuple((float(n[1]),) for n in b.players), ("x",), "x: each player has one value of its own"),
        (
            lambda b, g: tuple((v[0], 3 * v[0] + float(n[1])) for n, v in zip(b.players, b.values, strict=True)),
            ("x", "y"),
            "x and y: one follows",
        ),
    ],
)
def test_collinear_covariates_are_refused(values, names, fragment):
    generator = np.random.default_rng(0)
    ballots = [b._replace(values=values(b, generator)) for b in styled(generator, 400)]
    with pytest.raises(DataError, match=fragment):
        rate(pack(ballots, names), "bradley-terry")


def test_order_effect_is_recovered_and_turns_with_the_data():
    i, j, won = simulated(np.random.default_rng(6), np.array([0.5, 0.0, -0.5]), 5000, order=0.4)
    board = rate(paired(i, j, won, NAMES), "bradley-terry", order_effect=True, scale="logit")
    assert abs(board.effects[0].value - 0.4) < 3 * board.effects[0].se
    turned = rate(paired(j, i, 1 - won, NAMES), "bradley-terry", order_effect=True, scale="logit")
    assert turned.effects[0].value == pytest.approx(-board.effects[0].value, abs=1e-9)
    assert [x.rating for x in turned.lines] == pytest.approx([x.rating for x in board.lines], abs=1e-9)


def test_an_effect_that_explains_everything_is_refused():
    """Whoever was shown first won: the graph is strongly connected, and still nothing finite exists."""
    games = paired(np.array([0, 1, 2, 1, 2, 0]), np.array([1, 2, 0, 0, 1, 2]), np.ones(6), NAMES)
    assert unrated(games) == ""
    with pytest.raises(DataError, match="'shown first' grow without bound"):
        rate(games, "bradley-terry", order_effect=True)
    # a beat b, b tied with c, c tied with a: every cycle has more ties than wins, so nu has no finite value.
    tied = paired(np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([1, 0.5, 0.5]), NAMES)
    for method in ("davidson", "rao-kupper"):
        with pytest.raises(DataError, match="grow without bound"):
            rate(tied, method)


# --- existence --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "fragments"),
    [
        (
            [[0, 3, 0], [0, 0, 2], [0, 1, 0]],
            ["never beaten by the others: {p0}", "never beat the others: {p1, p2}", "2 components"],
        ),
        ([[0, 1, 1], [1, 0, 1], [0, 0, 0]], ["never beaten by the others: {p0, p1}", "never beat the others: {p2}"]),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], ["no game joins these 2 groups", "{p0, p1}; {p2, p3}"]),
    ],
)
def test_ratings_that_do_not_exist_are_refused_with_names(wins, fragments):
    games = of_wins(np.array(wins))
    for method in ("bradley-terry", "plackett-luce"):
        with pytest.raises(DataError) as error:
            rate(games, method)
        assert all(fragment in str(error.value) for fragment in fragments) and "--prior" in str(error.value)
    assert np.isfinite(rate(games, "bradley-terry", prior=0.5).fit.theta).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_ratings_exist_exactly_where_newton_finds_them(k, seed):
    """Strong connectivity against the iteration itself, which knows nothing of graphs."""
    generator = np.random.default_rng(seed)
    wins = (generator.random((k, k)) < 0.4) * generator.integers(1, 4, size=(k, k)) * (1 - np.eye(k, dtype=int))
    if not wins.any():
        return
    games = of_wins(wins)
    try:
        found = fit(design(games, "bradley-terry"))
    except DataError:
        assert unrated(games)
    else:
        assert not unrated(games) and np.abs(found.theta).max() < 20


def test_a_ranking_joins_and_an_open_end_does_not():
    full = pack([Ballot(("a", "b", "c"), (0, 1, 2)), Ballot(("c", "a"), (0, 1))])
    assert unrated(full) == ""
    top = pack([Ballot(("a", "b", "c"), (0, 1, 1), open_end=True), Ballot(("b", "a"), (0, 1))])
    assert "{c}" in unrated(top)
    tie = pack([Ballot(("a", "b", "c"), (0, 1, 1)), Ballot(("b", "a"), (0, 1))])
    assert unrated(tie) == ""
    soft = pack([Ballot(("a", "b"), (0, 1), prob=0.8)])
    assert unrated(soft) == "" and fit(design(soft, "bradley-terry")).theta[0] == pytest.approx(np.log(4) / 2, abs=1e-10)


# --- coverage ---------------------------------------------------------------------------------------------------------------------


def coverage(sets, *, games=400, seed=0):
    """Share of simulated sets in which the 95% interval holds the truth, of each ability and of each difference."""
    generator, k = np.random.default_rng(seed), 5
    ability = np.array([0.8, 0.4, 0.0, -0.4, -0.8])
    contrasts = np.array([*(np.eye(k) - 1 / k), *(np.eye(k)[i] - np.eye(k)[j] for i, j in itertools.combinations(range(k), 2))])
    pairs = np.array(list(itertools.combinations(range(k), 2)))
    each = games // len(pairs)
    hits = np.zeros(len(contrasts))
    for _ in range(sets):
        won = generator.binomial(each, 1 / (1 + np.exp(ability[pairs[:, 1]] - ability[pairs[:, 0]])))
        wins = np.zeros((k, k), dtype=int)
        wins[pairs[:, 0], pairs[:, 1]], wins[pairs[:, 1], pairs[:, 0]] = won, each - won
        found = estimates(fit(design(of_wins(wins), "bradley-terry")), contrasts, intervals="fisher")
        hits += (found.low <= contrasts @ ability) & (contrasts @ ability <= found.high)
    return hits / sets


def within(share, sets):
    return np.abs(share - 0.95) <= 3 * np.sqrt(0.95 * 0.05 / sets)


def test_intervals_cover_in_200_sets():
    assert within(coverage(200), 200).all()


@pytest.mark.soak
def test_intervals_cover_in_2000_sets():
    share = coverage(2000)
    assert within(share, 2000).all(), share


def test_clusters_cover_where_fisher_does_not():
    """Prompts that favour one model: four games share each. 200 sets; the Fisher interval is far too short, that of clusters covers."""
    generator, hits = np.random.default_rng(9), np.zeros(2)
    contrast = np.array([[1.0, -1.0]])
    for _ in range(200):
        lean = np.repeat(generator.choice([-1.5, 1.5], size=150), 4)
        won = generator.random(600) < 1 / (1 + np.exp(-lean))
        games = paired(
            np.zeros(600, dtype=int), np.ones(600, dtype=int), won.astype(float), ("a", "b"), cluster=np.arange(600) // 4
        )
        found = fit(design(games, "bradley-terry"))
        for k, intervals in enumerate(("fisher", "sandwich")):
            e = estimates(found, contrast, intervals=intervals)
            hits[k] += e.low[0] <= 0 <= e.high[0]  # the lean is even, so the marginal odds are
    assert hits[0] / 200 < 0.9 and within(hits[1] / 200, 200)


# --- what files hold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "wanted"),
    [
        ({"winner": "a", "loser": "b"}, "winner-loser", [(("a", "b"), (0, 1), 1)]),
        ({"winner": "a", "loser": "b", "tie": "true", "count": "3"}, "winner-loser", [(("a", "b"), (0, 0), 3)]),
        ({"winner": 1, "loser": 2, "count": 0}, "winner-loser", []),
        ({"model_a": "x", "model_b": "y", "winner": "model_b"}, "model-pair", [(("x", "y"), (1, 0), 1)]),
        ({"model_a": "x", "model_b": "y", "winner": "tie (bothbad)"}, "model-pair", [(("x", "y"), (0, 0), 1)]),
        ({"model_a": "x", "model_b": "y", "winner": "y"}, "model-pair", [(("x", "y"), (1, 0), 1)]),
        (
            {"home": "x", "away": "y", "home_wins": "2", "away_wins": "0", "ties": "1"},
            "tally",
            [(("x", "y"), (0, 1), 2), (("x", "y"), (0, 0), 1)],
        ),
        ({"player1": "x", "player2": "y", "win1": 0, "win2": 4}, "tally", [(("x", "y"), (1, 0), 4)]),
        ({"ranking": ["a", ["b", "c"]], "below": ["d"]}, "ranking", [(("a", "b", "c", "d"), (0, 1, 1, 2), 1)]),
        ({"ranking": "a > b = c > d"}, "ranking", [(("a", "b", "c", "d"), (0, 1, 1, 2), 1)]),
        ({"cited": "x", "x": "9", "y": "3", "z": "0"}, "cross", [(("x", "y"), (0, 1), 3)]),
    ],
)
def test_rows_are_read(row, kind, wanted):
    assert table_kind(row) == kind
    assert [(b.players, b.ranks, b.times) for b in of_row(row, kind)] == wanted


@pytest.mark.parametrize(
    ("row", "kind", "fragment"),
    [
        ({"winner": "", "loser": "b"}, "winner-loser", "winner: empty, expected a name"),
        ({"winner": None, "loser": "b"}, "winner-loser", "winner: None, expected a name"),
        ({"winner": "a", "loser": "b", "count": "2.5"}, "winner-loser", "count: '2.5', expected a whole number"),
        ({"winner": "a", "loser": "b", "weight": 0}, "winner-loser", "weight: 0, expected a number above 0"),
        ({"winner": "a", "loser": "b", "weight": "nan"}, "winner-loser", "weight: 'nan', expected a number"),
        ({"winner": "a", "loser": "b", "tie": "perhaps"}, "winner-loser", "tie: 'perhaps', expected true or false"),
        ({"winner": "a"}, "winner-loser", "loser: no such column"),
        ({"model_a": "x", "model_b": "y", "winner": "z"}, "model-pair", "winner: 'z', expected model_a, model_b, tie"),
        ({"model_a": "x", "model_b": "tie", "winner": "tie"}, "model-pair", "the name of a model"),
        ({"model_a": "model_b", "model_b": "model_a", "winner": "model_a"}, "model-pair", "the name of a model"),
        ({"model_a": "x", "model_b": "x", "winner": "x"}, "model-pair", "winner: 'x', expected"),
        ({"ranking": ["a", "b", "a"]}, "ranking", "ranking: 'a' stands twice"),
        ({"ranking": ["a"]}, "ranking", "expected two names or more"),
        ({"ranking": 7}, "ranking", "ranking: 7, expected names"),
        ({"cited": "w", "x": "1", "y": "1"}, "cross", "cited: 'w' is not among the columns"),
        ({"cited": "x", "x": "1", "y": "-1"}, "cross", "y: '-1', expected a whole number"),
        ({"home": "x"}, "tally", "home: not the columns of the first row"),
    ],
)
def test_rows_are_refused_with_their_column(row, kind, fragment):
    with pytest.raises(DataError) as error:
        of_row(row, kind)
    assert fragment in str(error.value)


def record(*judgements, sources=("m1", "m2", "m3"), texts=("one", "two **b**", "# h\n- x\n- y")):
    return Record(
        "q",
        tuple(Response(t, source={"model": s} if s else None) for t, s in zip(texts, sources, strict=True)),
        judgements,
        where="f.jsonl:4",
        meta={"user": "u1"},
    )


def test_records_are_read():
    found = of_record(
        record(
            Judgement(((1,), (0, 2)), weight=2.0, by="ann"),
            Judgement(((2,),), below=(0, 1)),
            Judgement(((2,),)),
            Judgement(((0,), (1,)), prob=0.7),
        ),
        cluster="prompt",
    )
    assert [(b.players, b.ranks, b.open_end, b.prob, b.weight, b.cluster, b.shown) for b in found] == [
        (("m2", "m1", "m3"), (0, 1, 1), False, None, 2.0, "q", False),
        (("m3", "m1", "m2"), (0, 1, 1), True, None, 1.0, "q", False),
        (("m1", "m2"), (0, 1), False, 0.7, 1.0, "q", False),
    ]
    assert [b.cluster for b in of_record(record(Judgement(((0,), (1,)), by="ann")), cluster="by")] == ["ann"]
    assert [b.cluster for b in of_record(record(Judgement(((0,), (1,)))), cluster="user")] == ["u1"]
    styles = of_record(record(Judgement(((1,), (2,)))), covariates=("length", "bold", "headers", "lists"))[0].values
    assert np.expm1(styles) == pytest.approx(np.array([[9, 1, 0, 0], [11, 0, 1, 2]]))
    said = Record(
        "q",
        (
            Response((Message("assistant", "abc"), Message("user", "zzzz")), source={"model": "m"}),
            Response("d", source={"model": "n"}),
        ),
        (Judgement(((0,), (1,))),),
    )
    assert np.expm1(of_record(said, covariates=("length",))[0].values) == pytest.approx(np.array([[3], [1]]))


@pytest.mark.parametrize(
    ("given", "options", "fragment"),
    [
        (
            record(Judgement(((0,), (1,))), sources=("m1", None, "m3")),
            {},
            "responses[1].source: does not say which model wrote it",
        ),
        (record(Judgement(((0,), (1,)))), {"cluster": "by"}, "no 'by', which --cluster asks for"),
        (record(Judgement(((0,), (1, 2)), prob=0.5)), {}, "more than two answers"),
        (record(Judgement(((0,), (1,)))), {"covariates": ("lenght",)}, "did you mean 'length'?"),
    ],
)
def test_records_are_refused(given, options, fragment):
    with pytest.raises(DataError) as error:
        of_record(given, **options)
    assert fragment in str(error.value)


def test_rankings_taken_apart():
    games = apart(pack([Ballot(("a", "b", "c", "d"), (0, 1, 2, 2), open_end=True), Ballot(("a", "b"), (0, 0))]))
    found = [
        (games.players[i], games.players[j], x, y)
        for (i, j), (x, y) in zip(games.player.reshape(-1, 2), games.rank.reshape(-1, 2), strict=True)
    ]
    assert found == [("a", "b", 0, 1), ("a", "c", 0, 2), ("a", "d", 0, 2), ("b", "c", 1, 2), ("b", "d", 1, 2), ("a", "b", 0, 0)]
    assert games.cluster.tolist() == [0, 0, 0, 0, 0, 1] and games.ties == 1 and games.first_ranking == ""
    with pytest.raises(DataError, match="cannot be taken apart"):
        apart(pack([Ballot(("a", "b", "c"), (0, 1, 2), times=2)]))


def test_equal_games_are_merged_without_a_trace(monkeypatch):
    generator = np.random.default_rng(8)
    i, j, won = simulated(generator, np.zeros(3), 500)
    outcome = np.where(generator.random(500) < 0.2, 0.5, won)
    games = paired(i, j, outcome, NAMES)
    small, ordered = ratings.merged(games, keep_order=False), ratings.merged(games, keep_order=True)
    assert len(small.start) - 1 <= 9 < len(ordered.start) - 1 <= 18 and small.total == ordered.total == 500
    for ties in ("half",):
        whole = [fit(design(g, "bradley-terry", ties=ties)) for g in (games, small, ordered)]
        assert whole[1].theta == pytest.approx(whole[0].theta, abs=1e-10) and whole[2].nll == pytest.approx(
            whole[0].nll, rel=1e-12
        )
    monkeypatch.setattr(ratings.games, "MOST_KEYS", 0)  # by sorting instead of counting
    for order, other in ((False, small), (True, ordered)):
        again = ratings.merged(games, keep_order=order)
        assert (again.player == other.player).all() and (again.rank == other.rank).all() and (again.count == other.count).all()
    numbers = [ratings.played(g) for g in (games, small)]
    assert numbers[0][0] == pytest.approx(numbers[1][0]) and numbers[0][1] == pytest.approx(numbers[1][1])
    assert numbers[0][0].sum() == 1000 and (numbers[0][0] * numbers[0][1]).sum() == pytest.approx(500)


# --- the verb ---------------------------------------------------------------------------------------------------------------------

ARENA = "model_a,model_b,winner,prompt,length_a,length_b\n" + "".join(
    f"{a},{b},{w},q{k % 9},{100 + 37 * k % 91},{90 + 53 * k % 77}\n"
    for k, (a, b, w) in enumerate(
        [
            ("x", "y", "model_a"),
            ("y", "z", "model_b"),
            ("z", "x", "model_b"),
            ("x", "z", "model_b"),
            ("y", "x", "model_a"),
            ("z", "y", "model_b"),
            ("x", "y", "model_b"),
            ("y", "z", "model_a"),
            ("z", "x", "model_a"),
            ("x", "y", "model_a"),
        ]
        * 6
    )
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "arena.csv").write_text(ARENA)
    return tmp_path


def rated(words):
    return main(["rate", *words.split()])


def test_rate_from_a_table(here, capsys):
    assert rated("arena.csv --anchor x=1000 --compare x y --json r.json --output r.html") == 0
    out = capsys.readouterr().out
    facts = json.loads((here / "r.json").read_text())
    assert [line["name"] for line in facts["ratings"]] == re.findall(r"^([xyz])  ", out, re.MULTILINE) and "x - y: " in out
    assert facts["comparisons"] == 60 and facts["anchor"] == {"name": "x", "rating": 1000.0}
    games = table(here / "arena.csv")
    board = rate(games, "bradley-terry", anchor=("x", 1000.0))
    assert [line["rating"] for line in facts["ratings"]] == [line.rating for line in board.lines]
    rows = {line["name"]: k for k, line in enumerate(facts["ratings"])}
    found = facts["differences"][rows["x"]][rows["y"]]
    assert (found["value"], found["low"]) == (pytest.approx(facts["compared"]["value"]), pytest.approx(facts["compared"]["low"]))
    page = (here / "r.html").read_text()
    assert "<script" not in page and "http-equiv" in page and "src=" not in page and 'href="http' not in page


def test_rate_from_python(here):
    assert rated("arena.csv --json r.json --order-effect") == 0
    assert preftune.rate(data="arena.csv", order_effect=True) == json.loads((here / "r.json").read_text())


def test_rate_writes_a_folder_and_keeps_an_old_one(here, capsys):
    assert (
        rated("arena.csv --output board --covariates length --order-effect --intervals bootstrap --cluster prompt --draws 100")
        == 0
    )
    assert sorted(p.name for p in (here / "board").iterdir()) == ["forest.svg", "ratings.html", "ratings.json"]
    facts = json.loads((here / "board" / "ratings.json").read_text())
    assert facts["clusters"] == 9 and [e["name"] for e in facts["effects"]] == ["length", "shown first"] and facts["draws"] == 100
    xml.dom.minidom.parse(str(here / "board" / "forest.svg"))
    before = (here / "board" / "ratings.json").read_bytes()
    assert rated("arena.csv --output board") == 2 and "not empty" in capsys.readouterr().err
    assert (here / "board" / "ratings.json").read_bytes() == before


def test_rate_from_records_of_rankings(here, capsys):
    rows = []
    for k, order in enumerate(itertools.permutations(range(3))):
        answers = [{"text": f"answer {i} {'x' * (k + i)}", "source": {"model": f"m{i}"}} for i in range(3)]
        rows.append(
            {"prompt": f"q{k}", "responses": answers, "judgements": [{"order": [[i] for i in order], "by": f"judge{k % 2}"}]}
        )
    (here / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["rate", "ranks.jsonl"]) == 2 and "--method plackett-luce reads rankings" in capsys.readouterr().err
    assert rated("ranks.jsonl --method plackett-luce --scale logit --json r.json") == 0
    assert [line["rating"] for line in json.loads((here / "r.json").read_text())["ratings"]] == pytest.approx([0, 0, 0], abs=1e-9)
    assert rated("ranks.jsonl --pairs --intervals sandwich --cluster by") == 0
    assert "fewer" not in capsys.readouterr().out
    assert rated("ranks.jsonl --method plackett-luce --order-effect") == 2


HOSTILE = ['<script>alert("1")</script>', "$\\frac{a}{b}$", "a]]>&amp;", "\u202eevil", "[red]rich[/red]", "名字", "x" * 300, "$1"]


def test_hostile_names_are_shown_and_not_obeyed(here, capsys):
    rows = [{"winner": a, "loser": b} for a, b in itertools.permutations(HOSTILE, 2)]
    (here / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rated("games.jsonl --output out") == 0
    out, err = capsys.readouterr()
    assert "[red]rich[/red]" in out and "<U+202E>evil" in out and "\u202e" not in out and "Warning" not in err
    page, plot = (here / "out" / "ratings.html").read_text(), (here / "out" / "forest.svg").read_text()
    for text in (page, plot):
        assert (
            "<script" not in text
            and "\u202e" not in text
            and "$\\frac{a}{b}$" in text
            and "名字" in text
            and "&lt;script&gt;" in text
        )
    xml.dom.minidom.parseString(plot)
    assert json.loads((here / "out" / "ratings.json").read_text())["ratings"][0]["name"] in HOSTILE


@pytest.mark.parametrize(
    ("content", "words", "code", "fragment"),
    [
        ("winner,loser\na,b\na,c\nb,c\nc,b\n", "", 3, "no finite ratings exist: never beaten by the others: {a}"),
        (
            "winner,loser\na,b\nb,a\nc,d\nd,c\n",
            "",
            3,
            "no game joins these 2 groups, so nothing says how they compare: {a, b}; {c, d}",
        ),
        ("winner,loser\na,b\n,a\n", "", 3, "games.csv:3: winner: empty, expected a name"),
        ("winner,loser\na,b\nb,a,c\n", "", 3, "games.csv:3: 3 cells, but the header names 2"),
        ("winner,loser,tie\na,b,0\nb,a,1\n", "", 2, "1 ties, first games.csv:3: bradley-terry has none; --method davidson"),
        ("winner,loser\na,b\nb,a\n", "--method davidson", 2, "use --method bradley-terry"),
        ("winner,loser\na,b\nb,a\n", "--order-effect", 2, "do not say who was shown first"),
        ("winner,loser\na,b\nb,a\n", "--anchor A=1", 2, "--anchor: nobody is called 'A'"),
        ("winner,loser\na,b\nb,a\n", "--compare a c", 2, "--compare: nobody is called 'c'"),
        ("winner,loser\na,b\nb,a\n", "--covariates length", 3, "games.csv:2: length_winner: no such column"),
        ("winner,loser\na,b\nb,a\n", "--intervals sandwich --cluster judge", 3, "games.csv:2: judge: no such column"),
        ("winner,loser\na,a\n", "", 3, "only 'a' plays"),
        ("winner,loser\n", "", 3, "games.csv: empty: it holds no row"),
        ("winner,loser,count\na,b,0\n", "", 3, "no comparison: nothing to rate"),
        ("ganador,perdedor\na,b\n", "", 3, "no known layout"),
    ],
)
def test_refusals_say_what_where_and_what_else(here, capsys, content, words, code, fragment):
    (here / "games.csv").write_text(content)
    assert main(["rate", "games.csv", *words.split()]) == code
    out, err = capsys.readouterr()
    assert fragment in err and len(err.splitlines()) <= 3 and out == ""


def test_bad_rows_are_left_out_only_on_request_and_counted(here, capsys):
    (here / "games.csv").write_text("winner,loser\na,b\n,a\nb,a\n")
    assert main(["rate", "games.csv"]) == 3
    assert main(["rate", "games.csv", "--skip-bad"]) == 0
    assert "1 left out: winner: empty" in capsys.readouterr().out
