"""Metrics rows sent on to TensorBoard, trackio or Weights & Biases, as they are written. `metrics.jsonl` stays the source of truth.

A tracker's library is imported only when it is asked for. Keys are read by these libraries from the environment, never by an option.
Files and the environment; no torch.

    with tracking(["tensorboard"], Path("runs/x"), rows) as track:
        track(row)   # as often as a row is added to metrics.jsonl
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import read_json, write_json

Row = Mapping[str, Any]
Send = Callable[[int, dict[str, float]], None]  # step, values by name


def require(names: Sequence[str], *, offline: bool) -> None:
    """Raises UsageError for a tracker that is not installed, or that would need the network where it is refused or has no key."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name}: {name} is not installed: pip install 'preftune[track]'")
    if "wandb" in names and os.environ.get("WANDB_MODE") != "offline":
        if offline:
            raise UsageError("--track wandb: needs the network, which --offline refuses; WANDB_MODE=offline keeps it in the run folder")
        if not os.environ.get("WANDB_API_KEY"):
            raise UsageError("--track wandb: no WANDB_API_KEY in the environment; WANDB_MODE=offline needs none")
    remote = next((key for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(key)), None)
    if "trackio" in names and offline and remote:
        raise UsageError(f"--track trackio: {remote} sends it over the network, which --offline refuses")


@contextmanager
def tracking(names: Sequence[str], folder: Path, rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
    """A function that sends a new row of metrics.jsonl to every tracker.

    Args:
        rows: those that stand in metrics.jsonl already, after a resumed run has cut it.

    TensorBoard's files are written again from `rows`. The others outlive the run folder: `tracking.json` counts what they got, counted
    before it is sent, and a row that a resumed run computes again is not sent again (it is the same, bit for bit).
    """
    if not names:
        yield lambda row: None
        return
    place = folder / "tracking.json"
    known: Any = read_json(place) if place.is_file() else {"id": uuid.uuid4().hex[:8], "sent": {}}
    line = 0
    with ExitStack() as stack:
        sends = {name: stack.enter_context(TRACKERS[name](folder, known["id"])) for name in names}

        def track(row: Row) -> None:
            nonlocal line
            line += 1
            values = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
            for name, send in sends.items():
                if name == "tensorboard":
                    send(int(row["step"]), values)
                elif line > known["sent"].get(name, 0):
                    known["sent"][name] = line
                    write_json(place, known)
                    send(int(row["step"]), values)

        for row in rows:
            track(row)
        yield track


@contextmanager
def _tensorboard(folder: Path, run: str) -> Iterator[Send]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    place = folder / "tensorboard"
    shutil.rmtree(place, ignore_errors=True)
    writer = EventFileWriter(str(place))

    def send(step: int, values: dict[str, float]) -> None:
        tags = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=tags)))

    try:
        yield send
    finally:
        writer.close()


@contextmanager
def _trackio(folder: Path, run: str) -> Iterator[Send]:
    import trackio

    opened = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "preftune"), name=f"{folder.name}-{run}", resume="allow", embed=False)
    try:
        yield lambda step, values: opened.log(values, step=step)
    finally:
        opened.finish()


@contextmanager
def _wandb(folder: Path, run: str) -> Iterator[Send]:
    import wandb

    settings = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True)
    opened = wandb.init(project=os.environ.get("WANDB_PROJECT", "preftune"), id=run, name=folder.name, dir=str(folder), resume="allow",
                        settings=settings)  # fmt: skip
    try:
        yield lambda step, values: opened.log(values, step=step)
    finally:
        opened.finish()


TRACKERS: dict[str, Callable[[Path, str], Any]] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
