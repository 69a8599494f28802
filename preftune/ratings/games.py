"""Comparisons as arrays: who met whom, in which order they were shown, who came out where.

A ballot is one comparison of two or more players by one judge; a game of two is a ballot of two. Touches numpy, scipy and `errors`.

    >>> pack([Ballot(("a", "b"), (0, 1)), Ballot(("b", "a"), (0, 0))]).ties
    1
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from ..errors import DataError

MOST_KEYS = 20_000_000  # cells of a table of players, by players, by outcomes, for counting in it
Array = Any  # numpy's types say nothing of shapes; docstrings do


class Ballot(NamedTuple):
    """One comparison.

    Args:
        players: in the order in which they were shown, where `shown`; a player may stand twice (two answers of one model).
        ranks: of each player, 0 is best; equal ranks are a tie.
        open_end: the last rank says only 'worse than the others', not 'a tie'.
        prob: P(the first rank is preferred) of a game of two, or None for a verdict without doubt.
        weight: multiplies its log-likelihood; one comparison, however many votes it stands for.
        times: how many such comparisons were independently made.
        cluster: what it shares with others (a prompt, a judge); None where nothing was asked for.
        values: covariates, one tuple per player.
        shown: whether `players` is the order of showing.
        where: 'file:line' for messages.
    """

    players: tuple[str, ...]
    ranks: tuple[int, ...]
    open_end: bool = False
    prob: float | None = None
    weight: float = 1.0
    times: int = 1
    cluster: str | None = None
    values: tuple[tuple[float, ...], ...] = ()
    shown: bool = True
    where: str = ""


@dataclass(frozen=True)
class Games:
    """n ballots in ragged arrays; ballot b has the entries start[b] .. start[b + 1].

    Args:
        players: names, in order of appearance.
        start: (n + 1,) first entry of each ballot. player, rank: (entries,). values: (entries, covariates).
        open_end, prob (NaN: no doubt), weight, count: (n,).
        cluster: (n,) number of its cluster, or None: every ballot stands for itself.
        shown: every ballot says who was shown first.
        ties: comparisons (counted) that hold a tie. first_tie, first_ranking: 'file:line' of the first tie and of the first ballot of
            more than two, or ''.
    """

    players: tuple[str, ...]
    start: Array
    player: Array
    rank: Array
    values: Array
    open_end: Array
    prob: Array
    weight: Array
    count: Array
    cluster: Array | None
    shown: bool
    ties: int
    first_tie: str
    first_ranking: str
    covariates: tuple[str, ...] = ()

    @property
    def sizes(self) -> Array:
        """(n,) players of each ballot."""
        return np.diff(self.start)

    @property
    def total(self) -> int:
        """Comparisons, counts included."""
        return int(self.count.sum())


def pack(ballots: Iterable[Ballot], covariates: tuple[str, ...] = ()) -> Games:
    """Ballots as arrays. Raises DataError where there is none; ballots without a cluster make a Games without clusters."""
    names: dict[str, int] = {}
    groups: dict[str | None, int] = {}
    start, player, rank, values = array("q", [0]), array("i"), array("i"), array("d")
    open_end, prob, weight, count, cluster = array("b"), array("d"), array("d"), array("q"), array("q")
    shown, ties, first_tie, first_ranking = True, 0, "", ""
    for ballot in ballots:
        for name in ballot.players:
            player.append(names.setdefault(name, len(names)))
        rank.extend(ballot.ranks)
        for row in ballot.values:
            values.extend(row)
        start.append(len(player))
        open_end.append(ballot.open_end)
        prob.append(float("nan") if ballot.prob is None else ballot.prob)
        weight.append(ballot.weight)
        count.append(ballot.times)
        cluster.append(groups.setdefault(ballot.cluster, len(groups)))
        shown = shown and ballot.shown
        judged = [r for r in ballot.ranks if not ballot.open_end or r < max(ballot.ranks)]
        if len(set(judged)) < len(judged):
            ties += ballot.times
            first_tie = first_tie or ballot.where
        if len(ballot.players) > 2:
            first_ranking = first_ranking or ballot.where or "a ranking"
    if not count:
        raise DataError("no comparison: nothing to rate")
    return Games(
        tuple(names),
        np.array(start),
        np.array(player, dtype=np.int64),
        np.array(rank, dtype=np.int64),
        np.array(values).reshape(len(player), len(covariates)),
        np.array(open_end, dtype=bool),
        np.array(prob),
        np.array(weight),
        np.array(count, dtype=float),
        None if set(groups) == {None} else np.array(cluster),
        shown,
        ties,
        first_tie,
        first_ranking,
        covariates,
    )


def paired(
    first: Array,
    second: Array,
    outcome: Array,
    players: tuple[str, ...],
    *,
    count: Array | None = None,
    weight: Array | None = None,
    cluster: Array | None = None,
) -> Games:
    """Games of two from arrays of length n: numbers of the players, and 1 (first won), 0 (second won) or 0.5 (a tie)."""
    n = len(first)
    outcome = np.asarray(outcome, dtype=float)
    rank = np.stack([outcome < 0.5, outcome > 0.5], axis=1).astype(np.int64)
    ones = np.ones(n)
    count = ones if count is None else np.asarray(count, dtype=float)
    return Games(
        players,
        np.arange(0, 2 * n + 1, 2),
        np.stack([first, second], axis=1).astype(np.int64).ravel(),
        rank.ravel(),
        np.zeros((2 * n, 0)),
        np.zeros(n, dtype=bool),
        np.full(n, np.nan),
        ones if weight is None else np.asarray(weight, dtype=float),
        count,
        cluster,
        True,
        int(count[outcome == 0.5].sum()),
        "a tie" if (outcome == 0.5).any() else "",
        "",
    )


def apart(games: Games) -> Games:
    """Rankings as all the games of two that they imply, the games of one ballot in one cluster; equal players give a tie, an open end none.

    A pseudo-likelihood: its Fisher information takes dependent games for independent ones, clusters do not.
    """
    if (games.sizes == 2).all():
        return games
    if (games.count > 1).any():
        raise DataError("rankings with counts cannot be taken apart; repeat their rows instead")
    entries: list[tuple[int, int]] = []
    owner: list[int] = []
    for b, (begin, end) in enumerate(zip(games.start[:-1], games.start[1:], strict=True)):
        last = games.rank[begin:end].max() if games.open_end[b] else -1
        for i in range(begin, end):
            entries += [(i, j) for j in range(i + 1, end) if not games.rank[i] == games.rank[j] == last]
        owner += [b] * (len(entries) - len(owner))
    at, own = np.array(entries, dtype=np.int64).ravel(), np.array(owner, dtype=np.int64)
    same = games.rank[at].reshape(-1, 2)
    tied = same[:, 0] == same[:, 1]
    return replace(
        games,
        start=np.arange(0, len(at) + 1, 2),
        player=games.player[at],
        rank=games.rank[at],
        values=games.values[at],
        open_end=np.zeros(len(own), dtype=bool),
        prob=games.prob[own],
        weight=games.weight[own],
        count=games.count[own],
        cluster=own if games.cluster is None else games.cluster[own],
        ties=int(games.count[own][tied].sum()),
        first_ranking="",
    )


def merged(games: Games, *, keep_order: bool) -> Games:
    """Equal games of two as one with their summed count; as it is where clusters, covariates or rankings tell them apart.

    Args:
        keep_order: who was shown first matters. Where it does not, the winner is put first.
    """
    if games.cluster is not None or games.covariates or (games.sizes != 2).any() or games.open_end.any():
        return games
    pairs, ranks = games.player.reshape(-1, 2), games.rank.reshape(-1, 2)
    if not keep_order:
        turn = (ranks[:, 0] > ranks[:, 1]) | ((ranks[:, 0] == ranks[:, 1]) & (pairs[:, 0] > pairs[:, 1]))
        pairs = np.where(turn[:, None], pairs[:, ::-1], pairs)
        ranks = np.where(turn[:, None], ranks[:, ::-1], ranks)
    n = len(games.players)
    if np.isnan(games.prob).all() and (games.weight == games.weight[0]).all():
        key = (pairs[:, 0] * n + pairs[:, 1]) * 3 + np.sign(ranks[:, 1] - ranks[:, 0]) + 1
        if 3 * n * n <= MOST_KEYS:  # counting is quicker than sorting
            table = np.bincount(key, weights=games.count, minlength=3 * n * n)
            last = np.zeros(3 * n * n, dtype=np.int64)
            last[key] = np.arange(len(key))
            kept = np.flatnonzero(table)
            return _some(games, pairs, ranks, last[kept], table[kept])
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    else:
        table = np.column_stack([pairs, ranks, np.nan_to_num(games.prob, nan=-1.0), games.weight])
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return _some(games, pairs, ranks, first, np.bincount(inverse.ravel(), weights=games.count))


def _some(games: Games, pairs: Array, ranks: Array, kept: Array, count: Array) -> Games:
    """The games `kept` (m,) alone, with new counts (m,)."""
    return replace(
        games,
        start=np.arange(0, 2 * len(kept) + 1, 2),
        player=pairs[kept].ravel(),
        rank=ranks[kept].ravel(),
        values=np.zeros((2 * len(kept), 0)),
        open_end=np.zeros(len(kept), dtype=bool),
        prob=games.prob[kept],
        weight=games.weight[kept],
        count=count,
    )


def played(games: Games) -> tuple[Array, Array]:
    """(players,) comparisons of each player and its score in them: the share of the others that it came before, ties half, from 0 to 1.

    A comparison with itself counts as one for each side. Players that an open end leaves unordered among themselves are not compared.
    """
    number, score = np.zeros(len(games.players)), np.zeros(len(games.players))
    for size in np.unique(games.sizes):
        at = games.start[:-1][games.sizes == size][:, None] + np.arange(size)
        who, rank, count = games.player[at], games.rank[at], games.count[games.sizes == size]
        prob, last = games.prob[games.sizes == size], np.where(games.open_end[games.sizes == size], rank.max(axis=1), -1)
        for i in range(size):
            for j in range(size):
                known = count * ((rank[:, i] != rank[:, j]) | (rank[:, i] != last)) * (i != j)
                won = np.where(np.isnan(prob), 1.0, prob)
                gain = np.where(rank[:, i] < rank[:, j], won, np.where(rank[:, i] > rank[:, j], 1 - won, 0.5))
                number += np.bincount(who[:, i], weights=known, minlength=len(number))
                score += np.bincount(who[:, i], weights=known * gain, minlength=len(number))
    return number, np.divide(score, number, out=np.full(len(number), np.nan), where=number > 0)


def beaten(games: Games) -> sparse.csr_matrix:
    """(players, players) with an entry (i, j) where i came before j or level with it at least once; a doubtful verdict counts both ways."""
    rows, columns = [], []
    for size in np.unique(games.sizes):
        mask = (games.sizes == size) & (games.count * games.weight > 0)
        at = games.start[:-1][mask][:, None] + np.arange(size)
        who, rank = games.player[at], games.rank[at]
        doubt = (games.prob[mask] > 0) & (games.prob[mask] < 1)
        turned = games.prob[mask] == 0
        last = np.where(games.open_end[mask], rank.max(axis=1), -1)
        for i in range(size):
            for j in range(size):
                before = np.where(turned, rank[:, i] > rank[:, j], rank[:, i] < rank[:, j]) | (doubt & (rank[:, i] != rank[:, j]))
                level = (rank[:, i] == rank[:, j]) & (rank[:, i] != last)
                hit = (before | level) & (who[:, i] != who[:, j])
                rows.append(who[hit, i])
                columns.append(who[hit, j])
    r, c = np.concatenate(rows), np.concatenate(columns)
    n = len(games.players)
    return sparse.csr_matrix((np.ones(len(r), dtype=np.int32), (r, c)), shape=(n, n))


def _names(players: Iterable[str]) -> str:
    found = sorted(players)
    more = f" and {len(found) - 6} more" if len(found) > 7 else ""
    return "{" + ", ".join(found if not more else found[:6]) + more + "}"


def unrated(games: Games) -> str:
    """'' where finite ratings exist, else why not, with the components named.

    Ford (1957), for rankings Hunter (2004), assumption 1: the maximum of the likelihood is attained, and once only, where the graph with
    an edge from each player to all that it beat (or tied with) is strongly connected.
    """
    graph = beaten(games)
    many, strong = csgraph.connected_components(graph, directed=True, connection="strong")
    if many == 1:
        return ""
    groups, weak = csgraph.connected_components(graph, directed=False)
    name = np.array(games.players, dtype=object)
    if groups > 1:
        parts = sorted((_names(name[weak == k]) for k in range(groups)), key=lambda text: (len(text), text))
        shown = "; ".join(parts[:4]) + (f"; and {groups - 4} more" if groups > 4 else "")
        return f"no game joins these {groups} groups, so nothing says how they compare: {shown}"
    edges = graph.tocoo()
    crossing = strong[edges.row] != strong[edges.col]
    losers = set(strong[edges.col[crossing]])
    winners = set(strong[edges.row[crossing]])
    # Of a weakly connected graph at least one component has no edge into it, and one no edge out of it.
    tops = [_names(name[strong == k]) for k in range(many) if k not in losers]
    bottoms = [_names(name[strong == k]) for k in range(many) if k not in winners]
    return (
        f"never beaten by the others: {', '.join(tops[:3])}{' ...' * (len(tops) > 3)}; never beat the others: "
        f"{', '.join(bottoms[:3])}{' ...' * (len(bottoms) > 3)}; {many} components in all"
    )
