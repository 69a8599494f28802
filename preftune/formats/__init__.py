"""The one door through which files become records: `sources` knows kinds of files, `layouts` what their rows mean.

A row is used as it stands or refused with file, line, field, what was found and what was expected. This room touches the standard
library, `config`, `files`, `errors` and `records`; pyarrow and datasets only for the files that need them. Try it:
`read(["pairs.jsonl"]).counts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import data_source
from ..errors import DataError, EmptyText, UsageError, nearest
from ..records import Record, Text, judge_by_scores, prompt_key
from .layouts import CANONICAL, FORBIDDEN, FORMATS, Format, detect, parse_prompt, parse_row, require_text, to_json
from .sources import BLANK, identity, plain_lines, plain_name, rows

__all__ = ["CANONICAL", "FORBIDDEN", "FORMATS", "Format", "Reading", "Tally", "detect", "identity", "read", "read_prompts", "reason",
           "stream", "to_json"]  # fmt: skip

EMPTY_SHARE = 0.05  # real files hold a few empty answers; above this share a column is wrong


@dataclass(slots=True)
class Tally:
    """What a stream has met so far.

    Args:
        layouts: records by the layout's name in FORMATS.
        skipped: the refused rows, where `skip_bad` allowed them.
        counts: 'rows', 'records', 'skipped', 'blank_lines', one 'skipped: REASON' for every reason, and 'rows_without_records' (a
            message tree that nobody ranked) where there are any.
    """

    layouts: dict[str, int] = field(default_factory=dict)
    skipped: list[DataError] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"rows": 0, "records": 0, "skipped": 0, "blank_lines": 0})

    def row(self, layout: str, item: tuple[Record, ...] | DataError | None) -> None:
        """Count a row: its records, its fault, or None for a blank line. Records are counted as they are handed out."""
        names = ["blank_lines" if item is None else "rows"]
        if isinstance(item, DataError):
            self.skipped.append(item)
            names += ["skipped", f"skipped: {reason(item)}"]
        elif item is not None:
            self.layouts[layout] = self.layouts.get(layout, 0) + len(item)
            names += [] if item else ["rows_without_records"]
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What `read` found: a tally and its records.

    Args:
        records: one per usable row (a message tree gives one for every ranked list), in order; `where` is 'file:line'.
        layout: the layout's name in FORMATS (several files may differ: names joined by ', ').
        skipped: the refused rows, where `skip_bad` allowed them.
        counts: those of the tally, and 'shared_prompts' (records whose prompt an earlier one has).
    """

    records: list[Record]
    layout: str
    skipped: list[DataError]
    counts: dict[str, int]


def _located(error: DataError, path: Path, line: int, number: int) -> DataError:
    """The same fault with its place. Rows of an array that is one line are told apart by their number."""
    what, *more = error.reason.split("\n")
    what += f" (row {number} of the array)" if number else ""
    return type(error)("\n".join([what, *more]), path=path, line=line, field=error.field)


def _parsed(path: Path, name: str, *, prompts: bool = False) -> Iterator[tuple[str, tuple[Record, ...] | DataError | None]]:
    """(layout, the records of a row, or the fault in their place, or None for a blank line) of one file.

    `prompts`: lines of text are prompts, and so are rows that hold nothing else; they become records without responses.
    """
    if prompts and plain_name(path.name).endswith(".txt"):
        yield from _prompt_lines(path)
        return
    first = frozenset[str]()
    for line, number, value in rows(path):
        item: tuple[Record, ...] | DataError | None = None
        try:
            if isinstance(value, DataError):
                raise value
            if prompts and _only_prompt(value):
                require_text(value)
                item = (Record(parse_prompt(value["prompt"], "prompt"), (), where=f"{path}:{line}"),)
            elif value is not BLANK:
                found, name, first = parse_row(value, name, first)
                item = tuple(replace(record, where=f"{path}:{line}") for record in found)
        except DataError as error:
            item = _located(error, path, line, number)
        yield name, item


def _only_prompt(row: object) -> bool:
    return isinstance(row, dict) and "prompt" in row and set(row) <= {"prompt", "id", "meta"}


def _prompt_lines(path: Path) -> Iterator[tuple[str, tuple[Record, ...] | DataError | None]]:
    """What `_parsed` gives, of a .txt file of prompts."""
    for number, text in plain_lines(path):
        item: tuple[Record, ...] | DataError | None = None
        try:
            if isinstance(text, DataError):
                raise text
            require_text({"prompt": text})
            item = (Record(text, (), where=f"{path}:{number}"),) if text.strip() else None
        except DataError as error:
            item = _located(error, path, number, 0)
        yield "prompts", item


def reason(error: DataError) -> str:
    """What kind of fault it is, without the particulars: 'chosen: null'. Rows are counted under it."""
    kind = re.split(r"[:;,(]", error.reason, maxsplit=1)[0].strip()
    field = re.sub(r"\[\d+\]", "", error.field) if error.field else ""
    return f"{field}: {kind}" if field else kind


def _weighed(record: Record, weight: float) -> Record:
    """The record with every judgement counted `weight` times."""
    if weight == 1:
        return record
    if record.labels is not None:
        raise UsageError(f"--data ...:{weight:g}: a weight multiplies judgements, and {record.where} holds labels; repeat its rows instead")
    return replace(record, judgements=tuple(replace(j, weight=j.weight * weight) for j in record.judgements))


def _sources(paths: Sequence[object]) -> list[tuple[Path, float]]:
    """(path, weight) of every --data word. UsageError where one file stands there twice."""
    if not paths:
        raise UsageError("--data: no file given")
    found = [data_source(str(name)) for name in paths]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UsageError(f"--data names {next(n for n in names if names.count(n) > 1)!r} twice; give it once, with the summed weight")
    return [(Path(name), weight) for name, weight in found]


def stream(paths: Sequence[object], tally: Tally, *, format: str = "auto", skip_bad: bool = False, max_records: int | None = None,
           from_scores: str | None = None, prompts: bool = False) -> Iterator[Record]:  # fmt: skip
    """The records of preference files, one at a time; what else was met stands in `tally`. Arguments and faults are those of `read`.

    Args:
        prompts: take also .txt files, a prompt a line, and rows with a prompt and nothing else: records without responses.
    """
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"--format: unknown layout {format!r}{nearest(format, FORMATS)}; known are auto, {', '.join(FORMATS)}")
    counts = tally.counts
    for path, weight in _sources(paths):
        before = counts["rows"]
        for layout, item in _parsed(path, format, prompts=prompts) if counts["records"] != max_records else ():
            if isinstance(item, DataError) and not (skip_bad or isinstance(item, EmptyText)):
                raise item
            room = None if max_records is None else max_records - counts["records"]
            item = item[:room] if isinstance(item, tuple) else item
            tally.row(layout, item)
            for record in item if isinstance(item, tuple) else ():
                counts["records"] += 1
                yield _weighed(judge_by_scores(record, from_scores) if from_scores else record, weight)
            if counts["records"] == max_records:
                break
        if counts["rows"] == before and counts["records"] != max_records:
            raise DataError("empty: it holds no row", path=path)
    if not skip_bad and counts["skipped"] > EMPTY_SHARE * counts["rows"]:
        raise tally.skipped[0]
    if not counts["records"]:
        first = f"; the first is refused so:\n{tally.skipped[0]}" if tally.skipped else ""
        raise DataError(f"no usable row among {counts['rows']}{first}", path=", ".join(map(str, paths)))


def read(paths: Sequence[object], *, format: str = "auto", skip_bad: bool = False, max_records: int | None = None,
         from_scores: str | None = None) -> Reading:  # fmt: skip
    """Read preference files of any layout in FORMATS and any kind that docs/data.md lists.

    Args:
        paths: at least one file; several may differ in layout and kind. 'FILE:2' counts its judgements twice.
        format: a name in FORMATS, or 'auto': the first row of each file decides.
        skip_bad: leave unusable rows out, listed and counted by reason, instead of stopping at the first. Rows with an empty text
            are left out and counted in any case, unless they are more than EMPTY_SHARE of the rows.
        max_records: stop after so many usable records.
        from_scores: make judgements of scores where nothing else was judged: 'best-worst' or 'all' (`records.judge_by_scores`).

    Raises UsageError (no file, unknown format, a path that is not a data file), DataError (file:line, field, what was expected).
    """
    tally = Tally()
    found = list(stream(paths, tally, format=format, skip_bad=skip_bad, max_records=max_records, from_scores=from_scores))
    counts = tally.counts | {"shared_prompts": len(found) - len({prompt_key(record) for record in found})}
    return Reading(found, ", ".join(tally.layouts), tally.skipped, counts)


def _plain_prompts(path: Path) -> Iterator[str]:
    """The lines of a .txt file that are not blank."""
    for number, line in plain_lines(path):
        try:
            if isinstance(line, DataError):
                raise line
            require_text({"prompt": line})
        except DataError as error:
            raise _located(error, path, number, 0) from None
        if line.strip():
            yield line


def read_prompts(paths: Sequence[object], *, max_records: int | None = None) -> list[Text]:
    """Prompts to sample from: a line each (.txt), rows with a 'prompt' and nothing judged, or the prompts of any layout.

    Raises UsageError, DataError (file:line) as `read` does.
    """
    prompts: list[Text] = []
    for path in (Path(str(name)) for name in paths):
        if plain_name(path.name).endswith(".txt"):
            prompts += _plain_prompts(path)
            continue
        name = "auto"
        for line, number, row in rows(path):
            try:
                if isinstance(row, DataError):
                    raise row
                if row is BLANK:
                    continue
                if isinstance(row, dict) and _only_prompt(row):
                    require_text(row)
                    prompts.append(parse_prompt(row["prompt"], "prompt"))
                else:
                    found, name, _ = parse_row(row, name, frozenset())
                    prompts += [record.prompt for record in found]
            except DataError as error:
                raise _located(error, path, line, number) from None
    if not prompts:
        raise DataError("no prompt in it", path=", ".join(map(str, paths)))
    return prompts[:max_records]
