"""What a ballot says, as choices: each model of ratings is a chain of choices of one alternative out of several.

A choice of c from the alternatives a has the probability exp(x_c theta) / sum_a exp(x_a theta), so its negative log-likelihood is
log(1 + sum_(a != c) exp(d_a theta + offset_a)) with d_a = x_a - x_c: one sparse row per alternative that was not chosen. theta holds the
players' log-abilities s, then the effects (covariates, first position), then the tie parameters.

- bradley-terry: one choice, row s_loser - s_winner. Zermelo 1929; Bradley and Terry 1952.
- plackett-luce: a choice per place, from all that are not placed yet. Plackett 1975. Ties: Breslow 1974, Efron 1977.
- davidson: ties of a set S are an alternative of their own, log delta_|S| + mean of s over S. Davidson 1970; for rankings
  Turner et al. 2020 (Davidson-Luce).
- rao-kupper: P(i wins) = sig(s_i - s_j - c), P(tie) = (1 - exp(-2c)) sig(c - s_i + s_j) sig(c + s_i - s_j), c = log theta. Rao and
  Kupper 1967. So a win is one choice, a tie two and a term of c alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from math import comb

import numpy as np
from scipy import sparse

from ..errors import DataError, UsageError
from .games import Array, Games

METHODS = ("bradley-terry", "davidson", "rao-kupper", "plackett-luce")
MOST_ALTERNATIVES = 2000  # of one choice among tied sets; K = 20 players with ties of 3 have 1,350


@dataclass(frozen=True)
class Design:
    """m choices with r rows in all.

    Args:
        rows: (r, parameters) sparse, d_a of each alternative that was not chosen. offset: (r,) or None where all are 0.
        first: (m,) first row of each choice. choice: (r,) choice of each row.
        share: (m,) weight of a choice inside its ballot. unit: (m,) its ballot.
        weight, count, cluster: those of the ballots.
        players, effects, ties: names of the parameters, in the order of the columns.
        scale: (effects,) what the values of an effect were divided by.
        kupper: (ballots,) 1 for a tie under rao-kupper, or None for other methods.
    """

    rows: sparse.csr_matrix
    offset: Array | None
    first: Array
    choice: Array
    share: Array
    unit: Array
    weight: Array
    count: Array
    cluster: Array | None
    players: tuple[str, ...]
    effects: tuple[str, ...]
    ties: tuple[str, ...]
    scale: Array
    kupper: Array | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return (*self.players, *self.effects, *self.ties)


@dataclass
class _Rows:
    """Choices as they are collected. parts: (row, column, value) of the matrix; choices: (rows of each, share, unit)."""

    parts: list[tuple[Array, Array, Array]] = field(default_factory=list)
    choices: list[tuple[Array, Array, Array]] = field(default_factory=list)
    offsets: list[Array] = field(default_factory=list)
    many: int = 0

    def add(
        self, entries: list[tuple[Array, Array, Array]], sizes: Array, share: Array, unit: Array, offset: Array | None = None
    ) -> None:
        """Choices whose rows follow each other. entries: (row from 0, column, value)."""
        total = int(sizes.sum())
        self.parts += [(row + self.many, column, value) for row, column, value in entries]
        self.choices.append((sizes, share, unit))
        self.offsets.append(np.zeros(total) if offset is None else offset)
        self.many += total


def _plain(
    games: Games,
    out: _Rows,
    ballots: Array,
    chosen: Array,
    others: Array,
    share: Array,
    values: Array,
    width: int,
    offset: Array | None = None,
    extra: tuple[Array, Array] | None = None,
) -> None:
    """Choices of one entry out of several: chosen (m,), others (m, a) are entries of the games. extra: (column, value) of every row."""
    m, a = others.shape
    row = np.arange(m * a)
    pick, rest = np.repeat(chosen, a), others.ravel()
    one = np.ones(m * a)
    entries = [(row, games.player[rest], one), (row, games.player[pick], -one)]
    for k in range(values.shape[1]):
        entries.append((row, np.full(m * a, width + k), values[rest, k] - values[pick, k]))
    if extra is not None:
        entries.append((row, np.full(m * a, extra[0]), np.repeat(extra[1], a)))
    out.add(entries, np.full(m, a), share, ballots, offset)


def _ranked(games: Games, out: _Rows, values: Array, ties: str) -> None:
    """Plackett-Luce. Ballots without ties by size at once, those with ties one at a time."""
    n = len(games.players)
    for size in np.unique(games.sizes):
        ballots = np.flatnonzero(games.sizes == size)
        at = games.start[:-1][ballots][:, None] + np.arange(size)
        rank = games.rank[at]
        order = np.argsort(rank, axis=1, kind="stable")
        at, rank = np.take_along_axis(at, order, 1), np.take_along_axis(rank, order, 1)
        placed = (rank < rank[:, -1:]) | ~games.open_end[ballots][:, None]  # has a place of its own, or shares a told one
        tied = ((rank[:, 1:] == rank[:, :-1]) & placed[:, 1:]).any(axis=1)
        for k in range(size - 1):
            mask = ~tied & placed[:, k]
            if mask.any():
                _plain(games, out, ballots[mask], at[mask, k], at[mask, k + 1 :], np.ones(mask.sum()), values, n)
        for b in np.flatnonzero(tied):
            left, ranks = at[b], rank[b]
            for r in np.unique(ranks[placed[b]]):
                tier, left = left[ranks == r], left
                for done, chosen in enumerate(tier):
                    if len(left) == 1:
                        continue
                    if ties == "efron" and len(tier) > 1:
                        _efron(games, out, ballots[b], tier, left, done, values, n)
                    else:  # Breslow: each of the tier from all that are left
                        _plain(
                            games, out, ballots[b : b + 1], np.array([chosen]), left[left != chosen][None], np.ones(1), values, n
                        )
                left, ranks = left[ranks != r], ranks[ranks != r]


def _efron(games: Games, out: _Rows, ballot: int, tier: Array, left: Array, done: int, values: Array, width: int) -> None:
    """The factor `done` of Efron's product, prod(tier)^(1/t) / (sum(left) - done/t sum(tier)): each of the tier with share 1/t.

    The coefficients are divided by the chosen's own, 1 - done/t, so that it is 1 as everywhere: the likelihood lacks that constant.
    """
    keep = 1 - done / len(tier)
    for chosen in tier:
        others = left[left != chosen]
        offset = np.where(np.isin(others, tier), 0.0, -np.log(keep))
        _plain(games, out, np.array([ballot]), np.array([chosen]), others[None], np.array([1 / len(tier)]), values, width, offset)


def _davidson(games: Games, out: _Rows, values: Array, orders: list[int]) -> None:
    """Davidson, Davidson-Luce: all sets that a tie could be are alternatives."""
    n, width = len(games.players), values.shape[1]
    column = {size: n + width + k for k, size in enumerate(orders)}
    for b, (begin, end) in enumerate(zip(games.start[:-1], games.start[1:], strict=True)):
        left, rank = np.arange(begin, end), games.rank[begin:end]
        last = rank.max() if games.open_end[b] else -1
        for r in np.unique(rank):
            tier = left[rank == r]
            if len(left) == 1 or r == last:
                break
            if sum(comb(len(left), size) for size in (1, *orders)) > MOST_ALTERNATIVES:
                raise DataError(
                    f"davidson: {len(left)} players with ties of up to {orders[-1]} have more than {MOST_ALTERNATIVES} outcomes; "
                    "use --method plackett-luce --ties efron"
                )
            others = [np.array(s) for size in (1, *orders) for s in combinations(left, size) if set(s) != set(tier)]
            row, col, val = [], [], []
            for k, group in enumerate(others):
                for members, sign in ((group, 1.0), (tier, -1.0)):
                    each = sign / len(members)
                    row += [k] * len(members) * (1 + width)
                    col += [*games.player[members], *np.repeat(np.arange(n, n + width), len(members))]
                    val += [each] * len(members) + [each * v for v in values[members].T.ravel()]
                    if len(members) > 1:
                        row, col, val = [*row, k], [*col, column[len(members)]], [*val, sign]
            out.add([(np.array(row), np.array(col), np.array(val))], np.array([len(others)]), np.ones(1), np.array([b]))
            left, rank = left[rank != r], rank[rank != r]


def _games_of_two(games: Games, out: _Rows, values: Array, method: str) -> None:
    """Bradley-Terry (ties as half a win each way, doubtful verdicts as shares), Davidson and Rao-Kupper on pairs, all at once."""
    n, width = len(games.players), values.shape[1]
    at = games.start[:-1][:, None] + np.arange(2)
    better = np.argsort(games.rank[at], axis=1, kind="stable")
    at = np.take_along_axis(at, better, 1)
    tie = games.rank[at[:, 0]] == games.rank[at[:, 1]]
    prob = np.where(tie, 0.5, np.where(np.isnan(games.prob), 1.0, games.prob))
    b = np.arange(len(tie))
    if method == "bradley-terry":
        for side, share in ((0, prob), (1, 1 - prob)):
            m = share > 0
            _plain(games, out, b[m], at[m, side], at[m, 1 - side][:, None], share[m], values, n)
        return
    c = n + width  # the column of the tie parameter
    if method == "rao-kupper":
        # -log sig(s_i - s_j - c) for a win, both of -log sig(c -+ (s_i - s_j)) for a tie: the row is minus the argument of sig.
        for side, sign, m in ((0, 1.0, ~tie), (0, -1.0, tie), (1, -1.0, tie)):
            _plain(
                games,
                out,
                b[m],
                at[m, side],
                at[m, 1 - side][:, None],
                np.ones(m.sum()),
                values,
                n,
                extra=(c, np.full(m.sum(), sign)),
            )
        return
    for m, is_tie in ((~tie, False), (tie, True)):
        k, row, one = int(m.sum()), np.arange(int(m.sum())), np.ones(int(m.sum()))
        # A win against the loser and against a tie; a tie against either win. Rows 2k and 2k + 1.
        full = (2 * row, 1.0, 0.0) if not is_tie else (2 * row, 0.5, -1.0)
        half = (2 * row + 1, 0.5, 1.0) if not is_tie else (2 * row + 1, -0.5, -1.0)
        entries = []
        for place, slope, nu in (full, half):
            entries += [
                (place, games.player[at[m, 1]], slope * one),
                (place, games.player[at[m, 0]], -slope * one),
                (place, c + 0 * row, nu * one),
            ]
            entries += [(place, n + j + 0 * row, slope * (values[at[m, 1], j] - values[at[m, 0], j])) for j in range(width)]
        out.add(entries, np.full(k, 2), one, b[m])


def spread(games: Games, values: Array) -> Array:
    """(effects,) root mean square difference of each covariate between two players of one ballot. No mean is taken off: the model has no
    constant, so a mean difference would become one, and equal values must stay at 0."""
    start, sizes = games.start[:-1], games.sizes
    mean = np.add.reduceat(values, start, axis=0) / sizes[:, None]
    squares = np.add.reduceat((values - np.repeat(mean, sizes, axis=0)) ** 2, start, axis=0) * sizes[:, None]
    weight = games.weight * games.count
    return np.sqrt((weight[:, None] * squares).sum(0) / (weight * sizes * (sizes - 1) / 2).sum())


def design(games: Games, method: str, *, ties: str = "refuse", order_effect: bool = False) -> Design:
    """The choices that a method reads off the games.

    Args:
        method: one of METHODS.
        ties: 'refuse'; 'half' (bradley-terry: half a win each way, a quasi-likelihood); 'breslow' or 'efron' (plackett-luce).
        order_effect: add the advantage of being shown first, games of two only.

    Raises UsageError where the method cannot read these games (ties, rankings, doubtful verdicts, unknown order), DataError for a covariate
    that never differs.
    """
    _require(games, method, ties, order_effect)
    values, effects = games.values, list(games.covariates)
    scale = spread(games, values) if effects else np.zeros(0)
    for name, size in zip(effects, scale, strict=True):
        if not size > 0:
            raise DataError(f"--covariates {name}: the same for both sides of every comparison, so it has no effect to estimate")
    values = values / scale if effects else values
    if order_effect:
        shown_first = (np.arange(len(games.player)) % 2 == 0).astype(float)
        values, effects, scale = np.column_stack([values, shown_first]), [*effects, "shown first"], np.append(scale, 1.0)
    out, names = _Rows(), ["tie"] if method in ("davidson", "rao-kupper") else []
    if method == "plackett-luce":
        _ranked(games, out, values, ties)
    elif method == "davidson" and games.first_ranking:
        orders = sorted(_tie_sizes(games))
        names = [f"tie of {size}" for size in orders]
        _davidson(games, out, values, orders)
    else:
        _games_of_two(games, out, values, method)
    width = len(games.players) + len(effects) + len(names)
    row, column, value = (np.concatenate(part) for part in zip(*out.parts, strict=True))
    offset = np.concatenate(out.offsets)
    sizes, share, unit = (np.concatenate(part) for part in zip(*out.choices, strict=True))
    matrix = sparse.csr_matrix((value, (row, column)), shape=(out.many, width))
    matrix.eliminate_zeros()
    tied = games.rank[games.start[:-1]] == games.rank[games.start[:-1] + 1]
    return Design(
        matrix,
        offset if offset.any() else None,
        np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        np.repeat(np.arange(len(sizes)), sizes),
        share,
        unit,
        games.weight,
        games.count,
        games.cluster,
        games.players,
        tuple(effects),
        tuple(names),
        scale,
        tied.astype(float) if method == "rao-kupper" else None,
    )


def _tie_sizes(games: Games) -> set[int]:
    found = set()
    for b, (begin, end) in enumerate(zip(games.start[:-1], games.start[1:], strict=True)):
        ranks, many = np.unique(games.rank[begin:end], return_counts=True)
        found |= {
            int(size) for r, size in zip(ranks, many, strict=True) if size > 1 and not (games.open_end[b] and r == ranks[-1])
        }
    return found


def _require(games: Games, method: str, ties: str, order_effect: bool) -> None:
    """Refuses what a method has no reading of, with the option that has."""
    rankings, place = games.first_ranking, f", first {games.first_tie}" if games.first_tie else ""
    if rankings and method in ("bradley-terry", "rao-kupper"):
        raise UsageError(
            f"{rankings}: more than two in one comparison; {method} reads games of two: --method plackett-luce reads rankings, "
            "--pairs takes them apart"
        )
    if order_effect and rankings:
        raise UsageError(f"--order-effect: {rankings} holds more than two; being shown first is defined for games of two")
    if order_effect and not games.shown:
        raise UsageError("--order-effect: these files do not say who was shown first; tables with model_a, model_b, winner do")
    if games.ties and ties == "refuse" and method == "bradley-terry":
        raise UsageError(
            f"{games.ties} ties{place}: bradley-terry has none; --method davidson or rao-kupper models them, --ties half counts "
            "half a win for each"
        )
    if games.ties and ties == "refuse" and method == "plackett-luce":
        raise UsageError(
            f"{games.ties} rankings with ties{place}: --ties efron or breslow treats them as orders not told, --method davidson "
            "models them"
        )
    if not games.ties and method in ("davidson", "rao-kupper"):
        limit = "nu = 0" if method == "davidson" else "theta = 1"
        raise UsageError(
            f"--method {method}: there is no tie, so its tie parameter is at its limit ({limit}); "
            f"use --method {'plackett-luce' if rankings else 'bradley-terry'}"
        )
    doubt = np.flatnonzero(~np.isnan(games.prob) & (games.prob != 1))
    if len(doubt) and method != "bradley-terry":
        raise UsageError(f"{len(doubt)} comparisons have a probability below 1; only --method bradley-terry reads soft verdicts")
