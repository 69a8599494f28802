"""What a person sees while a stage runs: bars on a terminal, plain lines in a log. rich only; honours NO_COLOR.

Text from models and data is hostile: `clean` makes control characters visible before anything is printed.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn"}


def clean(text: str) -> str:
    """The text with every control, bidi and zero-width character shown as <U+XXXX>; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else f"<U+{ord(c):04X}>" for c in text)


def with_interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    """'0.712 [0.650, 0.770]'; the value alone where it has no interval, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def with_error(value: float | None, error: float | None, form: str = ".4f", error_form: str = "") -> str:
    """'1.23 ± 0.04'; the value alone where it has no error, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{error_form or form}}")


def say(text: str = "") -> None:
    """A line on stderr: progress never mixes with what a verb writes to stdout."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[..., None]]:
    """`advance(done, total, note='')` moves a bar on a terminal; in a log it prints a line at most every 15 seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=total, note="")
            yield lambda done, total=total, note="": progress.update(task, completed=done, total=total, note=note)
        return
    last = time.monotonic()

    def advance(done: int, total: int = total, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last > 15:
            last = time.monotonic()
            say(f"{label} {done}/{total} {note}".rstrip())

    yield advance
