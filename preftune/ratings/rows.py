"""Comparisons from what files hold: simple tables of games, and records whose answers say which model wrote them.

A row is read as it stands or refused with its column; the caller adds file:line.

    >>> of_row({"model_a": "x", "model_b": "y", "winner": "tie"}, "model-pair")[0].ranks
    (0, 0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DataError, nearest
from ..records import Judgement, Record, Response, prompt_key
from .games import Ballot

Row = Mapping[str, Any]

# Columns of games between a first and a second: (first, second, wins of the first, wins of the second, ties or '').
TALLIES = (
    ("home.team", "away.team", "home.wins", "away.wins", "ties"),
    ("home", "away", "home_wins", "away_wins", "ties"),
    ("player1", "player2", "win1", "win2", "ties"),
    ("player_a", "player_b", "wins_a", "wins_b", "ties"),
)
# kind: (columns that must be there, what a row is)
TABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "winner-loser": (("winner", "loser"), "a game won; with a true `tie`, a game that nobody won; `count`, `weight`"),
    "model-pair": (
        ("model_a", "model_b", "winner"),
        "arena files: `winner` is model_a, model_b, tie or tie (bothbad); `count`, `weight`",
    ),
    "tally": (
        ("home", "away", "home_wins", "away_wins"),
        "wins of either side, and `ties`; also home.team, player1 and player_a forms",
    ),
    "ranking": (
        ("ranking",),
        'names, best first, ties as inner lists, or text "a > b = c"; `below`: worse than these, unordered',
    ),
    "cross": ((), "a square table: how often the row's name beat the column's"),
}
BOTH_BAD = ("tie (bothbad)", "bothbad", "both_bad", "both bad")
# Covariates that are counts: their logarithm (of 1 + count) is used, so that a difference is a ratio.
COUNTS: dict[str, str] = {
    "length": r"(?s).",
    "headers": r"(?m)^#{1,6}\s",
    "bold": r"\*\*[^*\n]+\*\*",
    "lists": r"(?m)^\s*(?:[-*+]|\d{1,3}[.)])\s",
}


def table_kind(row: Row) -> str | None:
    """The kind of table that a row belongs to, or None: perhaps a record."""
    if "prompt" in row and "responses" in row:
        return None
    for kind, (columns, _) in TABLES.items():
        if columns and all(column in row for column in columns):
            return kind
    if any(all(column in row for column in names[:4]) for names in TALLIES):
        return "tally"
    first, *others = row
    if len(others) >= 2 and row[first] in others and all(_is_whole(row[name]) for name in others):
        return "cross"
    return None


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and re.fullmatch(r"\s*\d{1,15}\s*", value, re.ASCII) is not None)


def _name(row: Row, column: str) -> str:
    value = row[column]
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{'empty' if isinstance(value, str) else repr(value)}, expected a name", field=column)
    return value


def _whole(row: Row, column: str) -> int:
    value = row[column]
    if not _is_whole(value) or int(value) < 0:
        raise DataError(f"{value!r}, expected a whole number of at least 0 (a 'weight' may be any number above 0)", field=column)
    return int(value)


def _number(row: Row, column: str, *, above: float = -math.inf) -> float:
    value = row[column]
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > above):
        raise DataError(f"{value!r}, expected a number{f' above {above:g}' if above > -math.inf else ''}", field=column)
    return number


def _switch(row: Row, column: str) -> bool:
    value = row.get(column)
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False, "none": False}
    text = str(value).strip().lower()
    if text not in known:
        raise DataError(f"{value!r}, expected true or false", field=column)
    return known[text]


def _column(row: Row, column: str, option: str) -> Any:
    if column not in row:
        raise DataError(f"no such column{nearest(column, row)}, which {option} asks for", field=column)
    return row[column]


def _values(row: Row, covariates: tuple[str, ...], sides: tuple[str, str]) -> tuple[tuple[float, ...], ...]:
    """The covariates of either side: the columns NAME_SIDE."""
    out = []
    for side in sides if covariates else ():
        names = [f"{name}_{side}" for name in covariates]
        for column in names:
            _column(row, column, "--covariates")
        out.append(
            tuple(
                math.log1p(_number(row, c, above=-1)) if n in COUNTS else _number(row, c)
                for n, c in zip(covariates, names, strict=True)
            )
        )
    return tuple(out)


def of_row(
    row: Row, kind: str, *, cluster: str | None = None, covariates: tuple[str, ...] = (), weight: float = 1.0
) -> list[Ballot]:
    """The comparisons of a row of a table in TABLES; none where every count is 0.

    Args:
        cluster: column of what comparisons share. covariates: columns NAME_a, NAME_b (of winner-loser NAME_winner, NAME_loser).
        weight: multiplies the row's own.

    Raises DataError with the column.
    """
    if missing := [column for column in TABLES[kind][0] if column not in row and kind != "tally"]:
        raise DataError(f"no such column; the first row had {', '.join(TABLES[kind][0])}", field=missing[0])
    group = None if cluster is None else str(_column(row, cluster, "--cluster"))
    if "weight" in row and kind not in ("cross", "tally"):
        weight *= _number(row, "weight", above=0.0)
    count = _whole(row, "count") if "count" in row and kind not in ("cross", "tally") else 1
    out = []
    for players, ranks, open_end, shown, times, sides in _KINDS[kind](row):
        if covariates and len(sides) != 2:
            raise DataError(f"--covariates: a table of the kind {kind!r} has no columns NAME_a and NAME_b")
        values = _values(row, covariates, sides)  # type: ignore[arg-type]
        out.append(Ballot(players, ranks, open_end, None, weight, count * times, group, values, shown))
    return [ballot for ballot in out if ballot.times]


Found = Iterator[
    tuple[tuple[str, ...], tuple[int, ...], bool, bool, int, tuple[str, ...]]
]  # players, ranks, open end, shown, times, sides


def _winner_loser(row: Row) -> Found:
    tie = _switch(row, "tie") if "tie" in row else False
    yield (_name(row, "winner"), _name(row, "loser")), (0, 0 if tie else 1), False, False, 1, ("winner", "loser")


def _model_pair(row: Row) -> Found:
    a, b, won = _name(row, "model_a"), _name(row, "model_b"), _name(row, "winner")
    meaning = {"model_a": (0, 1), "model_b": (1, 0), "tie": (0, 0), **dict.fromkeys(BOTH_BAD, (0, 0))}
    names = {a: (0, 1), b: (1, 0)}
    ranks = meaning.get(won, names.get(won) if a != b else None)
    if won in meaning and won in names and meaning[won] != names[won]:
        raise DataError(f"{won!r} is a word for the outcome and the name of a model; rename the model", field="winner")
    if ranks is None:
        raise DataError(f"{won!r}, expected model_a, model_b, tie, tie (bothbad) or one of the two names", field="winner")
    yield (a, b), ranks, False, True, 1, ("a", "b")


def _tally(row: Row) -> Found:
    names = next((names for names in TALLIES if all(column in row for column in names[:4])), None)
    if names is None:
        raise DataError(f"not the columns of the first row; expected {', '.join(TALLIES[1][:4])}", field=TALLIES[1][0])
    players = _name(row, names[0]), _name(row, names[1])
    times = [_whole(row, column) if column in row else 0 for column in names[2:]]
    for ranks, many in zip(((0, 1), (1, 0), (0, 0)), times, strict=True):
        yield players, ranks, False, True, many, ("a", "b")


def _ranking(row: Row) -> Found:
    tiers, below = row["ranking"], row.get("below") or []
    if isinstance(tiers, str):
        tiers = [[name.strip() for name in tier.split(" = ")] for tier in tiers.split(" > ")]
    below = [name.strip() for name in below.split(" = ")] if isinstance(below, str) else below
    for column, value in (("ranking", tiers), ("below", below)):
        if not isinstance(value, list):
            raise DataError(f'{value!r}, expected names, best first, or text "a > b = c"', field=column)
    flat = [(name, rank) for rank, tier in enumerate(tiers) for name in (tier if isinstance(tier, list) else [tier])]
    flat += [(name, len(tiers)) for name in below]
    if len(flat) < 2 or not all(isinstance(name, str) and name.strip() for name, _ in flat):
        raise DataError(f"{row['ranking']!r}, expected two names or more", field="ranking")
    names = [name for name, _ in flat]
    if len(set(names)) < len(names):
        raise DataError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one ranking", field="ranking")
    yield tuple(names), tuple(rank for _, rank in flat), bool(below), False, 1, ()


def _cross(row: Row) -> Found:
    first, *others = row
    winner = _name(row, first)
    if winner not in others:
        raise DataError(f"{winner!r} is not among the columns: a table of this kind is square", field=first)
    for loser in others:
        times = _whole(row, loser)
        if loser != winner:
            yield (winner, loser), (0, 1), False, False, times, ()


_KINDS = {"winner-loser": _winner_loser, "model-pair": _model_pair, "tally": _tally, "ranking": _ranking, "cross": _cross}


def _text(response: Response) -> str:
    if isinstance(response.text, str):
        return response.text
    return "\n".join(message.content for message in response.text if message.role == "assistant")


def style(response: Response, name: str) -> float:
    """log(1 + count) of what COUNTS says of a text. Raises DataError for an unknown name."""
    if name not in COUNTS:
        raise DataError(f"--covariates {name}: of a text only {', '.join(COUNTS)} are counted{nearest(name, COUNTS)}")
    text = _text(response)
    return math.log1p(len(text) if name == "length" else len(re.findall(COUNTS[name], text)))


def of_record(record: Record, *, cluster: str | None = None, covariates: tuple[str, ...] = ()) -> list[Ballot]:
    """One comparison per judgement of a record, between the models that `source` says wrote the answers.

    Args:
        cluster: 'prompt', 'by' (the judge) or a key of `meta`. covariates: names in COUNTS, counted in the answers' texts.

    Judgements of a single answer, and those of weight 0, compare nothing. Raises DataError.
    """
    out = []
    for judgement in record.judgements:
        members = [i for tier in judgement.order for i in tier] + list(judgement.below)
        if len(members) < 2 or not judgement.weight:
            continue
        names = tuple(_model(record, i) for i in members)
        ranks = tuple(rank for rank, tier in enumerate((*judgement.order, judgement.below)) for _ in tier)
        if judgement.prob is not None and len(members) > 2:
            raise DataError("a probability over more than two answers has no reading as one comparison", field="judgements")
        values = tuple(tuple(style(record.responses[i], name) for name in covariates) for i in members) if covariates else ()
        out.append(
            Ballot(
                names,
                ranks,
                bool(judgement.below),
                judgement.prob,
                judgement.weight,
                1,
                _cluster(record, judgement, cluster),
                values,
                False,
                record.where,
            )
        )
    return out


def _model(record: Record, index: int) -> str:
    source = record.responses[index].source or {}
    name = source.get("model")
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            'does not say which model wrote it; expected "source": {"model": "NAME"}', field=f"responses[{index}].source"
        )
    return name


def _cluster(record: Record, judgement: Judgement, cluster: str | None) -> str | None:
    if cluster is None:
        return None
    found = {"prompt": prompt_key(record), "by": judgement.by}.get(cluster, record.meta.get(cluster))
    if found is None:
        raise DataError(f"no {cluster!r}, which --cluster asks for; expected prompt, by or a column", field=cluster)
    return str(found)
