"""`preftune report`: the page of a run, made again from the files of its folder. Loads no model."""

from __future__ import annotations

from pathlib import Path

from .. import report
from ..config import Report
from ..screen import clean


def run(options: Report) -> int:
    """Write the report and print where it is. Raises UsageError for a folder that no run made, DiskError."""
    path = report.write(Path(str(options.run)), options.output)
    print(clean(f"written       {path}"))
    return 0
