"""The run directory: what a stage writes while it trains, and how it finds its place again.

config.yaml, manifest.json, metrics.jsonl, samples.jsonl, results.json, checkpoints/, model/; and files of lines that grow over several
lives of a process (`draft`). This room knows files, not mathematics.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import CheckpointError, DiskError, Interrupted, UsageError
from .files import append_jsonl, atomic_write, disk, dumps, free_bytes, owned, publish_file, read_jsonl, write_all

PACKAGES = ("preftune", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def hardware(device: str, threads: int) -> dict[str, Any]:
    """What the run ran on."""
    return {"platform": platform.platform(), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "device": device, "threads": threads}  # fmt: skip


def command(verb: str, options: Any) -> str:
    """The command line that gives these options: those that differ from their defaults."""
    words = ["preftune", verb]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value == default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "loss_arguments":
            words += [w for k, v in value.items() for w in (f"--loss.{k}", f"{v:g}")]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises DiskError where less than `needed` bytes are free for `what`."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskError(f"{folder}: {what} needs about {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")


@dataclass
class Log:
    """An append-only JSONL file with a line count, so that a resumed run can cut what came after its checkpoint."""

    path: Path
    lines: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        append_jsonl(self.path, dict(row))
        self.lines += 1

    def cut(self, lines: int) -> None:
        """Keep the first `lines` lines. Raises CheckpointError where fewer are there."""
        text = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if len(text) < lines:
            raise CheckpointError(
                f"{self.path}: holds {len(text)} lines, the checkpoint was written after {lines}; the file was changed"
            )
        atomic_write(self.path, "".join(text[:lines]))
        self.lines = lines

    def rows(self) -> list[dict[str, Any]]:
        """Every line, parsed."""
        return read_jsonl(self.path) if self.path.exists() else []


@dataclass
class Draft:
    """A file in the making: numbered items, kept as they are finished, in any order. Made by `draft`.

    Args:
        path: where it lies. output: where the whole will be. places: item -> (offset, length) of its JSON.
    """

    path: Path
    output: Path
    handle: int
    end: int
    places: dict[int, tuple[int, int]]

    def add(self, items: Mapping[int, Any]) -> None:
        """Keep items. When this returns they are on the disk. Raises DiskError (the draft is as before), NumericsError."""
        lines = [(number, dumps([number, item], self.path).encode("utf-8") + b"\n") for number, item in items.items()]
        data = b"".join(line for _, line in lines)
        with disk(self.path, needed=len(data)):
            try:
                os.lseek(self.handle, self.end, os.SEEK_SET)
                write_all(self.handle, data)
            except OSError:
                os.ftruncate(self.handle, self.end)
                raise
            os.fdatasync(self.handle)
        for number, line in lines:
            self.places[number] = (self.end, len(line))
            self.end += len(line)

    def item(self, number: int) -> Any:
        """An item that was kept."""
        start, length = self.places[number]
        return json.loads(os.pread(self.handle, length, start))[1]

    def publish(self, lines: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
        """Write the whole in its place, a line each, and remove the draft. Raises DiskError."""

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as out:
                for row in lines():
                    out.write(dumps(row, self.output) + "\n")

        publish_file(self.output, write)
        self.path.unlink()


@contextmanager
def draft(output: Path, made_from: Mapping[str, Any]) -> Iterator[Draft]:
    """The draft of `output`: begun, or gone on with where a process left it. A torn last line is cut off.

    Args:
        made_from: everything that the items depend on, for JSON. A draft begun from anything else is refused.

    Raises:
        UsageError: the output is there already. CheckpointError: what the items depend on has changed. DiskError: another process is
        at it, or no space.
    """
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name a new file")
    path = output.with_name(f"{output.name}.draft")
    with disk(path):
        output.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        if owned(handle) is False:
            raise DiskError(f"{path}: another process writes it; wait for that one, or choose another --output")
        with disk(path):
            first, places, end = _drafted(path)
            os.ftruncate(handle, end)
        found = Draft(path, output, handle, end, places)
        wanted = json.loads(dumps(made_from, path))
        if first is None:
            found.add({-1: wanted})
        elif changed := [name for name in dict.fromkeys((*first, *wanted)) if first.get(name) != wanted.get(name)]:
            told = "; ".join(f"{name} {_brief(first.get(name))} -> {_brief(wanted.get(name))}" for name in changed[:8])
            raise CheckpointError(f"{path}: changed since this was begun: {told}\n"
                                  "  give what was given then, or delete that file to begin anew")  # fmt: skip
        found.places.pop(-1, None)
        yield found
    finally:
        os.close(handle)


def _brief(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."


def _drafted(path: Path) -> tuple[dict[str, Any] | None, dict[int, tuple[int, int]], int]:
    """(what it is made from, place of every item, where its last whole line ends) of a draft. Raises CheckpointError for another file."""
    first, places, end = None, {}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                name, item = json.loads(line)
                first = dict(item) if number == 0 else first
                places[int(name)] = (end, len(line))
            except (ValueError, TypeError):
                raise CheckpointError(f"{path}:{number + 1}: not a line that preftune wrote; move that file away") from None
            end += len(line)
    return first, places, end


# Options that no number depends on: they are obeyed on --resume and written down.
FREE = ("keep", "save_every", "report", "offline", "track")
# Options that only say where something lies or how it is found: what is there is compared instead.
BY_CONTENT = ("data", "eval_data", "from_scores", "model", "template", "eval_reward", "eval_truth", "reward", "threads", "device")
# Options that no resumed run can change, and why.
FIXED = dict.fromkeys(("lora", "lora_targets", "adapter", "freeze"), "the checkpoints hold other weights")
FIXED |= dict.fromkeys(("seed", "holdout"), "prompts that were trained on would be held out")
FIXED |= dict.fromkeys(("target", "classes", "member", "members"), "the records that it trained on would be others")
FIXED |= {"optimiser": "the checkpoints hold another optimiser's moments"}
# Options that no resumed run can switch on or off, whatever else of them may change, and why.
SWITCHES: dict[str, tuple[Any, str]] = {
    "reference_update": ("none", "its checkpoints hold no reference that moved, or hold one that would be lost"),
    "eval_truth": (None, "answers of one run are scored by the same rewards from its start"),
}


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the run began. `kind`: what --allow-change calls it, '' where no number depends on it."""

    kind: str
    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.was} -> {self.now}"


def changed_options(own: Any, now: Any) -> list[Change]:
    """Options of a run against those with which it is to go on. Raises UsageError for one that no resumed run can change."""
    found = []
    for field in dataclasses.fields(own):
        was, is_, flag = getattr(own, field.name), getattr(now, field.name), f"--{field.name.replace('_', '-')}"
        if was == is_ or field.name in ("resume", "allow_change", "output"):
            continue
        if field.name in FIXED:
            raise UsageError(f"{flag} {is_}: the run has {was} and cannot change it: {FIXED[field.name]}; start a new run")
        if field.name in SWITCHES and (off := SWITCHES[field.name])[0] in (was, is_):
            raise UsageError(f"{flag} {is_ or 'none'}: the run has {was or 'none'} and cannot switch it: {off[1]}; start a new run")
        found.append(Change("" if field.name in FREE + BY_CONTENT else "config", flag, was, is_))
    return found


def changed_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What the manifest of a run says against what is there now: fingerprints (their first eight digits), threads, device, versions."""
    found = []
    one, two = before["fingerprints"], now["fingerprints"]
    for kind in dict.fromkeys((*one, *two)):
        if one.get(kind) != two.get(kind):
            names = ", ".join(f["name"] for f in now["files"] if f not in before["files"]) if kind == "data" else ""
            found.append(Change(kind, f"{kind}{f' ({names})' if names else ''}", str(one.get(kind))[:8], str(two.get(kind))[:8]))
    for kind in ("threads", "device"):
        if before["hardware"][kind] != now["hardware"][kind]:
            found.append(Change(kind, kind, before["hardware"][kind], now["hardware"][kind]))
    versions = {**before["versions"], **now["versions"]}
    found += [Change("versions", name, before["versions"].get(name), now["versions"].get(name)) for name in versions
              if before["versions"].get(name) != now["versions"].get(name)]  # fmt: skip
    return found


def refuse_changes(folder: Path, changes: Sequence[Change], allowed: Sequence[str]) -> None:
    """Raises CheckpointError that lists every change which is not allowed, and says how to allow them."""
    refused = [c for c in changes if c.kind and c.kind not in allowed]
    if refused:
        kinds = " ".join(dict.fromkeys([*allowed, *(c.kind for c in refused)]))
        listed = "; ".join(map(str, refused))
        raise CheckpointError(f"{folder}: changed since the run began: {listed}\n  a resumed run ends like one that never stopped; "
                              f"to go on with what is there now: --allow-change {kinds}")  # fmt: skip


def with_changes(manifest: Mapping[str, Any], before: Mapping[str, Any], changes: Sequence[Change], step: int) -> dict[str, Any]:
    """A manifest that remembers what changed after which step. One that a lost checkpoint undid happens again from where it resumes."""
    old = [c | {"step": min(c["step"], step)} for c in before.get("changes", [])]
    new = [{"step": step, "kind": c.kind or "no number depends on it", "name": c.name, "was": c.was, "now": c.now} for c in changes]
    return {**manifest, "changes": [*old, *(c for c in new if c not in old)]}


@contextmanager
def publish_folder(final: Path, *, owned: bool = True) -> Iterator[Path]:
    """A staging folder that becomes `final` when the block ends well, and disappears when it does not.

    `owned` says that no other process can be writing beside it, so what a killed one left there is taken over.
    """
    staging = final.with_name(f".{final.name}.staging" if owned else f".{final.name}-{os.getpid()}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with disk(final):
            staging.mkdir(parents=True)
            yield staging
            if owned:
                shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)  # onto nothing or an empty folder: what another process made there meanwhile stays
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass
class Stop:
    """Set by a signal; read at step boundaries."""

    number: int = 0

    def check(self, save: Callable[[], None], verb: str, folder: Path) -> None:
        """After a signal: save, then raise Interrupted with the command that continues."""
        if self.number:
            save()
            raise Interrupted(f"stopped by {signal.Signals(self.number).name}; nothing is lost: preftune {verb} --resume {folder}",
                              signal_number=self.number)  # fmt: skip


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop at the next step boundary; a second one ends the process at once.

    Only the main thread of a program may take signals: elsewhere they stay whose they are.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.number:
            os._exit(128 + number)
        stop.number = number
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
