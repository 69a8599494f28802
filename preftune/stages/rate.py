"""`preftune rate`: ratings with intervals from tables of games or from records; a table on the screen, JSON, a page, a forest plot.

Loads no torch. What was read and what was left out is counted; a number that the games do not determine is refused, not shown.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import ratings
from ..config import Rate, data_source
from ..errors import DataError
from ..files import atomic_write, new_folder, require_new, write_json
from ..formats import Tally, reason, stream
from ..formats.sources import BLANK, rows
from ..ratings.rows import BOTH_BAD
from ..report.forest import forest_svg, ratings_page
from ..screen import bar, clean, say

MOST_DIFFERENCES = 100  # players up to which the JSON holds all differences


def _table(options: Rate, path: str, weight: float, counts: Counter[str]) -> Iterator[ratings.Ballot]:
    """The comparisons of a table, with file:line in every refusal."""
    kind: str | None = None
    for line, number, row in rows(Path(path)):
        place = f"{path}:{line}"
        if row is BLANK:
            continue
        counts["rows"] += 1
        if counts["rows"] % 250_000 == 0:
            say(f"read {counts['rows']:,} rows")
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"not an object: {str(row)[:40]!r}")
            kind = kind or ratings.table_kind(row)
            found = ratings.of_row(row, str(kind), cluster=options.cluster, covariates=tuple(options.covariates), weight=weight)
        except DataError as error:
            what = error.reason + (f" (row {number} of the array)" if number else "")
            fault = DataError(what, path=path, line=line, field=error.field)
            if not options.skip_bad:
                raise fault from None
            counts[f"left out: {reason(fault)}"] += 1
            continue
        counts["called bad on both sides, read as ties"] += (
            sum(b.times for b in found) if str(row.get("winner")) in BOTH_BAD else 0
        )
        for ballot in found:
            yield ballot._replace(where=place)


def _records(options: Rate, path: str, weight: float, counts: Counter[str]) -> Iterator[ratings.Ballot]:
    """The comparisons of records of any layout."""
    tally = Tally()
    for record in stream([path if weight == 1 else f"{path}:{weight:g}"], tally, skip_bad=options.skip_bad):
        try:
            found = ratings.of_record(record, cluster=options.cluster, covariates=tuple(options.covariates))
        except DataError as error:
            name, _, line = record.where.rpartition(":")
            fault = DataError(error.reason, path=name, line=int(line), field=error.field)
            if not options.skip_bad:
                raise fault from None
            counts[f"left out: {reason(fault)}"] += 1
            continue
        counts["records without a judgement"] += not record.judgements
        yield from found
    counts["rows"] += tally.counts["rows"]
    counts.update(
        {name.replace("skipped:", "left out:"): many for name, many in tally.counts.items() if name.startswith("skipped:")}
    )


def _ballots(options: Rate, counts: Counter[str]) -> Iterator[ratings.Ballot]:
    for text in options.data:
        path, weight = data_source(text)
        first = next((row for _, _, row in rows(Path(path)) if isinstance(row, dict)), None)
        read = _table if first and ratings.table_kind(first) else _records
        before = counts["rows"]
        yield from read(options, path, weight, counts)
        if counts["rows"] == before:
            raise DataError("empty: it holds no row", path=path)


def _notes(games: ratings.Games, counts: Counter[str], options: Rate) -> list[str]:
    """What a reader of the numbers should know of the data."""
    same = games.player[games.start[:-1]] == games.player[games.start[:-1] + 1]
    alone = int(games.count[same & (games.sizes == 2)].sum())
    notes = [f"{many:,} {name}" for name, many in counts.items() if many and name != "rows"]
    notes += [f"{alone:,} comparisons of a model with itself say nothing of ratings"] if alone else []
    if games.cluster is None and options.intervals == "fisher" and (games.weight != 1).any():
        notes.append(
            "weights count as so many independent comparisons in fisher intervals; --intervals sandwich takes each row for one"
        )
    return notes


def _facts(board: ratings.Board, games: ratings.Games, options: Rate, notes: list[str]) -> dict[str, Any]:
    """Everything as JSON: the page is made of it."""
    lines = [
        {
            "name": x.name,
            "rating": x.rating,
            "se": x.se,
            "low": x.low,
            "high": x.high,
            "rank_first": x.first,
            "rank_last": x.last,
            "games": x.games,
            "score": x.score if np.isfinite(x.score) else None,
        }
        for x in board.lines
    ]
    elo = board.scale == "elo"
    facts: dict[str, Any] = {
        "method": board.method,
        "scale": board.scale,
        "unit": "Elo points (400: odds of ten to one)" if elo else "log-odds",
        "level": board.level,
        "intervals": board.intervals,
        "cluster": options.cluster,
        "clusters": None if games.cluster is None else len(np.unique(games.cluster)),
        "prior": options.prior,
        "anchor": {"name": board.anchor[0], "rating": board.anchor[1]} if board.anchor else None,
        "zero": board.anchor[1] if board.anchor else ratings.ELO_MEAN if elo else 0.0,
        "comparisons": games.total,
        "ties": games.ties,
        "data": options.data,
        "ratings": lines,
        "effects": [vars(effect) for effect in board.effects],
        "nll": board.fit.nll,
        "gradient": board.fit.gradient,
        "iterations": board.fit.iterations,
        "seed": options.seed if board.intervals == "bootstrap" else None,
        "draws": options.draws if board.intervals == "bootstrap" else None,
        "notes": notes,
        "compared": None,
        "differences": None,
    }
    if options.compare:
        a, b = options.compare
        found, chance = ratings.compare(board, a, b)
        facts["compared"] = {
            "a": a,
            "b": b,
            "value": float(found.value[0]),
            "se": float(found.se[0]),
            "low": float(found.low[0]),
            "high": float(found.high[0]),
            "odds_share": chance,
        }
    if len(lines) <= MOST_DIFFERENCES:
        facts["differences"] = ratings.differences(board)
    return facts


def _show(facts: dict[str, Any]) -> None:
    """The table on the screen; names of foreign data as they are, control characters shown."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    elo = facts["scale"] == "elo"
    number = lambda x: f"{x:.0f}" if elo else f"{x:.4f}"  # noqa: E731
    table = Table(box=None, pad_edge=False)
    for title, side in (
        ("name", "left"),
        ("rating", "right"),
        (f"{100 * facts['level']:g}% interval", "right"),
        ("error", "right"),
        ("ranks", "right"),
        ("games", "right"),
        ("won", "right"),
    ):
        table.add_column(title, justify=side, no_wrap=title != "name", overflow="fold")  # type: ignore[arg-type]
    for line in facts["ratings"]:
        first, last = line["rank_first"], line["rank_last"]
        ranks = "" if first is None else f"{first}" if first == last else f"{first}-{last}"
        won = "" if line["score"] is None else f"{line['score']:.1%}"
        table.add_row(
            Text(clean(line["name"])),
            number(line["rating"]),
            f"{number(line['low'])} to {number(line['high'])}",
            number(line["se"]),
            ranks,
            f"{line['games']:,}",
            won,
        )
    console = Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    console.print(table)
    for effect in facts["effects"]:
        unit = f" per {effect['unit']}" if effect["unit"] not in ("", "yes or no") else ""
        console.print(Text(clean(f"{effect['name']}: {effect['value']:.4g} [{effect['low']:.4g}, {effect['high']:.4g}]{unit}")))
    if found := facts["compared"]:
        odds = f"; odds alone: {found['odds_share']:.1%}"
        console.print(
            Text(
                clean(
                    f"{found['a']} - {found['b']}: {number(found['value'])} [{number(found['low'])}, {number(found['high'])}]{odds}"
                )
            )
        )
    how = f"{facts['method']}, {facts['comparisons']:,} comparisons, {facts['intervals']} intervals, {facts['unit']}"
    console.print(Text(how, style="dim"))
    for note in facts["notes"]:
        console.print(Text(clean(note), style="yellow"))


def rated(options: Rate) -> dict[str, Any]:
    """Read, fit, write the page; returns everything as `--json` writes it. Raises DataError (file:line), UsageError, DiskError."""
    folder = require_new(options.output) if options.output and not Path(options.output).suffix else None
    counts: Counter[str] = Counter()
    games = ratings.pack(_ballots(options, counts), tuple(options.covariates))
    name, _, value = (options.anchor or "").rpartition("=")
    with bar("bootstrap", options.draws) as advance:
        board = ratings.rate(
            ratings.apart(games) if options.pairs else games,
            options.method,
            ties=options.ties,
            order_effect=options.order_effect,
            prior=options.prior,
            intervals=options.intervals,
            level=options.level,
            draws=options.draws,
            seed=options.seed,
            scale=options.scale,
            anchor=(name, float(value)) if options.anchor else None,
            progress=advance,
        )
    facts = _facts(board, games, options, [*board.notes, *_notes(games, counts, options)])
    if folder is not None:
        new_folder(folder)
        write_json(folder / "ratings.json", facts)
        atomic_write(folder / "ratings.html", ratings_page(facts))
        atomic_write(folder / "forest.svg", forest_svg(facts, alone=True))
    elif options.output:
        atomic_write(options.output, ratings_page(facts) if options.output.endswith(".html") else forest_svg(facts, alone=True))
    return facts


def run(options: Rate) -> int:
    """Rate, show, write. Exit 3 where no finite ratings exist."""
    facts = rated(options)
    _show(facts)
    if options.json:
        write_json(options.json, facts)
    written = [
        options.json,
        options.output if not options.output or Path(options.output).suffix else f"{options.output}/ratings.html",
    ]
    for path in filter(None, written):
        say(f"written       {clean(path)}")
    return 0
