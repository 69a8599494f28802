"""What can go wrong for a user, one class per kind of remedy, each with its exit code.

This room imports nothing of ours and nothing heavy. A message says what was given, where (file:line, field or option),
what was expected and the nearest valid choice; `cli` prints it without a traceback. `assert` is for our own mistakes.

    >>> raise DataError("'chosen' is null, expected text", path="pairs.jsonl", line=7, field="chosen")
    Traceback (most recent call last):
    preftune.errors.DataError: pairs.jsonl:7: chosen: 'chosen' is null, expected text
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PreftuneError(ValueError):
    """A fault that the user can mend. `exit_code` is stable and documented in docs/errors.md."""

    exit_code = 1


class UsageError(PreftuneError):
    """A wrong option, key, value or combination; raised before any model or data is read."""

    exit_code = 2


class DataError(PreftuneError):
    """A record that cannot be used. Carries where it stands so that a caller can count and list it.

    Args:
        message: what was found and what was expected.
        path: the data file, or None for records made in memory.
        line: 1-based line in the file.
        field: the field at fault.
    """

    exit_code = 3

    def __init__(self, message: str, *, path: object = None, line: int | None = None, field: str | None = None):
        self.path, self.line, self.field, self.reason = path, line, field, message
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(f"{where}{f'{field}: ' if field else ''}{message}")


class EmptyText(DataError):
    """A prompt or response without text. A few in a large file are left out and counted; many mean a wrong column."""


class NumericsError(PreftuneError):
    """A loss, gradient or weight that is not finite. The step was not taken and no model was written."""

    exit_code = 4


class OutOfMemoryError(PreftuneError):
    """The step did not fit; the message names the option to lower and by how much."""

    exit_code = 5


class DiskError(PreftuneError):
    """No space, no permission, or another process holds the run directory. What was there is intact."""

    exit_code = 6


class CheckpointError(PreftuneError):
    """No checkpoint verifies, or what is being resumed has changed since."""

    exit_code = 7


class ModelError(PreftuneError):
    """A model folder that is missing, unsafe, malformed or of an architecture that is not allowed."""

    exit_code = 8


class SelfCheckError(PreftuneError):
    """The start-up self-check found numbers that disagree; training did not start."""

    exit_code = 9


class EndpointError(PreftuneError):
    """An endpoint that refuses, is down, or left answers out. What it did answer is kept, and the same command goes on."""

    exit_code = 10


class ReportError(PreftuneError):
    """The run is finished and its model and results stand; only its report could not be drawn."""

    exit_code = 11


class Interrupted(PreftuneError):
    """A signal stopped the run at a step boundary after a checkpoint was written. 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, *, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `choices`, or '' where nothing is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
