"""The kinds of files: each reader yields (line, number in an array or 0, row or the fault in its place). Never more of a file in memory
than a few rows need, JSON arrays excepted. Touches the standard library, `config`, `errors` and `files`; pyarrow and datasets only
for the files that need them.

    for line, number, row in rows(Path("pairs.jsonl")): ...
"""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import hashlib
import json
import math
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import data_source
from ..errors import DataError, UsageError, nearest
from ..files import json_decoder, sha256_file, size_text

LINE_LIMIT = 16 * 2**20  # bytes of one row; a longer line is not text that someone judged
ARRAY_LIMIT = 2**31  # bytes of one JSON array, which has to be in memory as a whole; JSONL has no limit
LINES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*LINES, *TABLES)
HUB = "hub:"
# Columns of CSV whose cells are JSON (a number, true, a list); an empty cell is null. All other cells are text as it stands.
JSON_CELLS = ("label", "labels", "completions", "ranks", "scores", "preference", "score_chosen", "score_rejected", "responses",
              "judgements", "messages", "conversations", "meta")  # fmt: skip

Found = tuple[int, int, Any]
BLANK = object()


def _missing(path: Path) -> UsageError:
    folder = path.parent
    if not folder.is_dir():
        return UsageError(f"{path}: no such file; the folder {folder} does not exist either")
    return UsageError(f"{path}: no such file{nearest(path.name, (entry.name for entry in folder.iterdir()))}")


def plain_name(name: str) -> str:
    """The name without .gz."""
    return name.removesuffix(".gz")


def _require_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """A regular file of a known ending. Never waits on a pipe. Raises UsageError."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if stat.S_ISDIR(mode):
        inside = sorted(entry.name for entry in path.iterdir() if plain_name(entry.name).endswith(suffixes))
        raise UsageError(f"{path}: a folder, expected a file; it holds {', '.join(inside[:5]) or 'no data file'}")
    known = f"{', '.join(s for s in suffixes if s not in TABLES)}, plain or .gz{', ' * (TABLES[0] in suffixes)}"
    known += ", ".join(s for s in suffixes if s in TABLES)
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: not a regular file (a pipe or a device), expected {known}")
    if not plain_name(path.name).endswith(suffixes) or path.name.endswith(tuple(f"{table}.gz" for table in TABLES)):
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}, expected {known}")


def _open(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Any:
    """A text file, opened; gzip is unpacked. Raises UsageError, DataError."""
    _require_file(path, suffixes)
    try:
        file: Any = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    zipped = file.peek(2)[:2] == b"\x1f\x8b"
    if zipped or path.name.endswith(".gz"):
        file.close()
        if not zipped:
            raise DataError("not gzip, although its name says so", path=path)
        file = gzip.open(path)  # noqa: SIM115 - the caller closes it
    return file


def _decode(data: bytes, offset: int, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise DataError(f"not UTF-8: byte 0x{data[at]:02x} at offset {offset + at}; convert the file, for example with "
                        "iconv -f latin1 -t utf-8", line=line + data.count(b"\n", 0, at)) from None  # fmt: skip


def _syntax(error: ValueError | RecursionError, size: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        cut = "; the text seems to be cut there" if error.pos >= size or error.msg.startswith("Unterminated") else ""
        return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}{cut}"
    return f"not valid JSON: {'nested too deeply' if isinstance(error, RecursionError) else 'a number too long to read'}"


def _lines(file: Any, offset: int) -> Iterator[Found]:
    """JSONL: never more than LINE_LIMIT bytes of a line in memory."""
    faults: list[str] = []
    decoder, line = json_decoder(faults), 0
    while data := file.readline(LINE_LIMIT + 1):
        line, start = line + 1, offset
        offset += len(data)
        if len(data) > LINE_LIMIT:
            while not data.endswith(b"\n") and (data := file.readline(2**20)):
                offset += len(data)
            yield line, 0, DataError(f"line too long: more than {size_text(LINE_LIMIT)}")
            continue
        faults.clear()
        try:
            text = _decode(data, start, line).strip(" \t\r\n")
            value = decoder.decode(text) if text else BLANK
        except DataError as error:
            value = error
        except (ValueError, RecursionError) as error:
            value = DataError(_syntax(error, len(text)))
        yield line, 0, DataError(faults[0]) if faults and not isinstance(value, DataError) else value


def _array(file: Any, offset: int) -> Iterator[Found]:
    """A JSON array, row by row, each with the line in which it begins. One that is no JSON ends it: the next has no beginning."""
    data = b"".join(islice(iter(lambda: file.read(2**20), b""), ARRAY_LIMIT >> 20))  # read(n) would set n bytes aside at once
    if file.read(1):
        raise DataError(f"array too long: more than {size_text(ARRAY_LIMIT)}; convert it to JSONL")
    faults: list[str] = []
    decoder, space = json_decoder(faults), re.compile(r"[ \t\r\n]*")
    text = _decode(data, offset, 1)
    at, line, number, counted = text.index("[") + 1, 1, 0, 0

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    at = skip(at)
    while text[at : at + 1] != "]" or number:
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        faults.clear()
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield line, number, DataError(f"{_syntax(error, len(text.rstrip()))}; nothing after it can be read")
            return
        if end - at > LINE_LIMIT:
            value = DataError(f"row too long: more than {size_text(LINE_LIMIT)}")
        yield line, number, DataError(faults[0]) if faults else value
        at = skip(end)
        if text[at : at + 1] != ",":
            break
        at = skip(at + 1)
    if text[at : at + 1] != "]" or skip(at + 1) != len(text):
        line += text.count("\n", counted, at)
        what = "text after the closing ']'" if text[at : at + 1] == "]" else "expected ',' or ']'"
        yield line, number, DataError(f"not valid JSON: {what}{'; the text seems to be cut there' if at >= len(text) else ''}")


def _cell(column: str, text: str) -> Any:
    """What a cell of CSV holds. Raises DataError."""
    if column not in JSON_CELLS:
        return text
    if not text.strip():
        return None
    faults: list[str] = []
    try:
        value = json_decoder(faults).decode({"True": "true", "False": "false"}.get(text.strip(), text))
    except (ValueError, RecursionError) as error:
        raise DataError(_syntax(error, len(text)), field=column) from None
    if faults:
        raise DataError(faults[0], field=column)
    return value


def _header(cells: list[str]) -> list[str]:
    """The names of the columns. Raises DataError."""
    names = [name.strip() for name in cells]
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"a header with {'a name twice' if all(names) else 'an empty name'}", line=1)
    return names


def _row_of_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{len(cells)} cells, but the header names {len(header)}")
    return {name: _cell(name, text) for name, text in zip(header, cells, strict=True)}


def _table_of_text(file: Any, offset: int, separator: str) -> Iterator[Found]:
    """CSV with a header: a row is named by the line in which it begins. Cells may hold line ends inside quotes."""
    faults: list[DataError] = []

    def texts(offset: int) -> Iterator[str]:
        line = 0
        while data := file.readline(LINE_LIMIT + 1):
            line += 1
            try:
                if len(data) > LINE_LIMIT:
                    raise DataError(f"line too long: more than {size_text(LINE_LIMIT)}", line=line)
                yield _decode(data, offset, line)
            except DataError as error:
                faults.append(error)
                yield "\n"
            offset += len(data)

    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(texts(offset), delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        faults.clear()
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if faults:
                raise faults[0]
            if header:
                yield line, 0, _row_of_cells(header, cells) if cells else BLANK
            header = header or _header(cells)
        except (csv.Error, DataError) as error:
            fault = error if isinstance(error, DataError) else DataError(f"not valid CSV: {error}", line=line)
            if not header:
                raise fault from None
            yield fault.line or line, 0, fault


def _as_json(value: Any, column: str) -> Any:
    """A value of a table as JSON would hold it. Raises DataError for what JSON cannot: bytes, NaN, infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"not a JSON number: {value}", field=column)
    if isinstance(value, list | tuple):
        return [_as_json(item, column) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item, column) for key, item in value.items()}
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"a value of type {type(value).__name__}, expected text, numbers, lists or objects", field=column)


def _numbered(found: Iterator[dict[str, Any]]) -> Iterator[Found]:
    """Rows of a table, counted from 1."""
    for number, row in enumerate(found, start=1):
        try:
            yield number, 0, {column: _as_json(value, column) for column, value in row.items()}
        except DataError as error:
            yield number, 0, error


def _table(path: Path) -> Iterator[Found]:
    """Parquet, or Arrow as a file or a stream (Feather 2 is an Arrow file); a few hundred rows in memory at a time."""
    import pyarrow
    from pyarrow import ipc, parquet

    _require_file(path, SUFFIXES)

    def batches() -> Iterator[Any]:
        if path.name.endswith(".parquet"):
            yield from parquet.ParquetFile(path, memory_map=True).iter_batches(batch_size=256)
            return
        with pyarrow.memory_map(str(path)) as file:
            try:
                found = ipc.open_file(file)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                yield from ipc.open_stream(file)
                return
            yield from (found.get_batch(i) for i in range(found.num_record_batches))

    def found() -> Iterator[dict[str, Any]]:
        for batch in batches():
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise DataError("a column name twice", path=path)
            for start in range(0, batch.num_rows, 256):
                yield from batch.slice(start, 256).to_pylist()

    try:
        yield from _numbered(found())
    except (pyarrow.ArrowException, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise DataError(f"not {path.suffix[1:].capitalize()}, although its name says so, or damaged: {said}", path=path) from None


def _hub(name: str) -> Iterator[Found]:
    """Rows of a data set on the hub: 'hub:OWNER/NAME' or 'hub:OWNER/NAME@SPLIT' (train). Downloads. Raises UsageError, DataError."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{name}: reading from the hub needs the package 'datasets': pip install 'preftune[hub]'") from None
    place, _, split = name.removeprefix(HUB).partition("@")
    try:
        found = datasets.load_dataset(place, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise DataError(f"cannot be had from the hub: {said}", path=name) from None
    yield from _numbered(iter(found))


def identity(text: str) -> list[Any]:
    """What the rows of a --data word depend on: the file's SHA-256 (of hub data, that of its rows) and the weight."""
    name, weight = data_source(text)
    if not name.startswith(HUB):
        return [sha256_file(name), weight]
    digest = hashlib.sha256()
    for _, _, row in _hub(name):
        digest.update(json.dumps(row if isinstance(row, dict) else str(row), sort_keys=True).encode())
    return [digest.hexdigest(), weight]


def _text_rows(path: Path) -> Iterator[Found]:
    """The rows of a text file. A fault that ends the file is yielded where there were rows before it."""
    line = 0
    with _open(path) as file:
        try:
            head = file.peek(4)[:4]
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) == 4 and (head[0] == 0) != (head[1] == 0)):
                raise DataError(f"not UTF-8: byte 0x{head[0]:02x} at offset 0 looks like UTF-16; convert the file, for example "
                                "with iconv -f utf-16 -t utf-8", line=1)  # fmt: skip
            offset = len(file.read(3)) if head[:3] == b"\xef\xbb\xbf" else 0
            kind: Callable[[Any, int], Iterator[Found]] = _lines
            if plain_name(path.name).endswith((".csv", ".tsv")):
                separator = "\t" if plain_name(path.name).endswith(".tsv") else ","
                kind = lambda file, offset: _table_of_text(file, offset, separator)  # noqa: E731
            elif file.peek(4096)[:4096].lstrip()[:1] == b"[":
                kind = _array
            for line, number, value in kind(file, offset):
                yield line, number, value
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield line + 1, 0, DataError(f"gzip is damaged or cut: {error}; nothing after this line can be read")
        except DataError as error:  # the file as a whole
            raise DataError(error.reason, path=path, line=error.line) from None


def rows(path: Path) -> Iterator[Found]:
    """The rows of one file, or of 'hub:OWNER/NAME'. Raises UsageError, and DataError about the file as a whole."""
    if str(path).startswith(HUB):
        return _hub(str(path))
    return _table(path) if path.name.endswith(TABLES) else _text_rows(path)


def plain_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """(line number, text or the fault in its place) of a .txt file, plain or gzip."""
    offset, number = 0, 0
    with _open(path, (".txt",)) as file:
        while data := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(data) > LINE_LIMIT:
                yield number, DataError(f"line too long: more than {size_text(LINE_LIMIT)}")
                return
            try:
                yield number, _decode(data, offset, number).removeprefix("\ufeff" if number == 1 else "").strip("\r\n")
            except DataError as error:
                yield number, error
            offset += len(data)
