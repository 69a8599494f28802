"""The disk: whole files or none, appended lines that survive a kill, hashes, one owner per run folder.

This room touches only the standard library and `errors`. Everything that fails on the way to the disk becomes a `DiskError`
that names the path and, where the disk is full, what is missing. Try it: `pytest tests/test_files.py`.

    >>> fingerprint("data", {"rows": 3}) == fingerprint("data", {"rows": 4})
    False
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError, DiskError, NumericsError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"


def size_text(count: int) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'.

    >>> size_text(1536)
    '1.5 KiB'
    """
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def free_bytes(path: object) -> int:
    """Bytes that this user can still write where `path` is or will be."""
    place = Path(str(path)).absolute()
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize


def free_memory() -> int:
    """Bytes that this process can still get: what the machine has, or less where `ulimit -v` says so; 0 where nobody tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    except (OSError, StopIteration, ValueError):
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - used))


def disk_error(error: OSError, path: object, *, needed: int = 0) -> DiskError:
    """The DiskError that says what an OSError means for someone who writes `path`. `needed`: bytes, 0 where unknown."""
    if error.errno in FULL:
        free = free_bytes(path)
        amount = f"{size_text(needed)} needed, {size_text(free)} free" if needed else f"{size_text(free)} free"
        missing = f", {size_text(needed - free)} missing" if needed > free else ""
        what = f"the disk is full ({amount}{missing})" if error.errno == errno.ENOSPC else f"the disk quota is used up ({amount})"
    elif error.errno == errno.EFBIG:
        what = f"larger than a file may be here ({size_text(needed)} needed; see 'ulimit -f')"
    elif error.errno == errno.EROFS:
        what = "the file system is read-only"
    elif error.errno in (errno.EACCES, errno.EPERM):
        what = "no permission to write here"
    else:
        what = (error.strerror or str(error)).lower()
    return DiskError(f"{path}: cannot be written: {what}; what was there before is intact")


@contextlib.contextmanager
def disk(path: object, *, needed: int = 0) -> Iterator[None]:
    """Any OSError inside becomes a DiskError about `path`; so does one that a library wrapped in an error of its own."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, needed=needed) from error
    except Exception as error:
        if (system := wrapped(error)) is None:
            raise
        raise disk_error(system, path, needed=needed) from error


def wrapped(error: Exception) -> OSError | None:
    """The system's error in that of a library written in Rust: 'I/O error: No space left on device (os error 28)'."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _temporary(path: Path) -> Path:
    """A name beside `path` for this process; what killed processes of this host left under such names is removed."""
    host = socket.gethostname()
    stem = f".tmp-{path.name}@{host}-"
    for old in path.parent.glob(glob.escape(stem) + "*"):
        pid = old.name[len(stem) :]
        if pid.isdigit() and not _alive(int(pid)):
            old.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}")


def publish_file(path: object, write: Callable[[Path], None], *, needed: int = 0) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: readers see the old file or the whole new one.

    The bytes are on the disk before the name is, and the name before this returns. `needed` (bytes) is for the message.
    Raises DiskError; then the old file stands and the temporary one is gone.
    """
    path = Path(str(path))
    with disk(path, needed=needed):
        temporary = _temporary(path)
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """os.write until everything is written (it may take less than it is given)."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(handle, view) :]


def atomic_write(path: object, data: str | bytes) -> None:
    """Replace `path` by `data` (text as UTF-8) as a whole. Raises DiskError."""
    content = data.encode("utf-8") if isinstance(data, str) else data

    def write(temporary: Path) -> None:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        try:
            write_all(handle, content)
        finally:
            os.close(handle)

    publish_file(path, write, needed=len(content))


def dumps(obj: Any, path: object, *, indent: int | None = None) -> str:
    """JSON in our form: UTF-8 as it is, no NaN or infinity (they are not JSON): NumericsError that names `path`."""
    try:
        return json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError as error:
        raise NumericsError(f"{path}: a number to be written is not finite ({error})") from error


def write_json(path: object, obj: Any) -> None:
    """Replace `path` by `obj` as JSON, as a whole. Raises DiskError; NumericsError for NaN or infinity."""
    atomic_write(path, dumps(obj, path, indent=1) + "\n")


def json_decoder(faults: list[str]) -> json.JSONDecoder:
    """A strict decoder. What JSON allows but data should not hold is appended to `faults`, so that the reader can go on after it:
    a key that stands twice in one object (Python keeps the last), NaN and infinity, numbers too large for a float."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [name for name, _ in items]
            faults.append(f"key twice in one object: {next(n for n in found if names.count(n) > 1)!r}")
        return found

    def constant(name: str) -> None:
        faults.append(f"not a JSON number: {name}")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            faults.append(f"number too large: {digits[:40]}")
        return value

    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant, parse_float=number)


def _strict(text: str, path: object, line: int | None = None) -> Any:
    faults: list[str] = []
    try:
        value = json_decoder(faults).decode(text)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}", path=path, line=at) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path=path, line=line) from error
    if faults:
        raise DataError(faults[0], path=path, line=line)
    return value


def _content(path: object) -> bytes:
    try:
        return Path(str(path)).read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", path=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {(error.strerror or str(error)).lower()}", path=path) from error


def _decoded(content: bytes, path: object, line: int | None = None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", path=path, line=line) from error


def read_json(path: object) -> Any:
    """What a JSON file holds. Raises DataError with the line (missing, unreadable, malformed, a key twice, NaN)."""
    return _strict(_decoded(_content(path), path), path)


def _acknowledged(handle: int, size: int) -> int:
    """Where the last whole line ends."""
    end = size
    while end:
        start = max(0, end - 65536)
        at = os.pread(handle, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def append_jsonl(path: object, obj: Mapping[str, Any]) -> None:
    """Append one line. When this returns, the line is on the disk; a kill before that leaves at most a torn line, which
    `read_jsonl` drops and the next append removes. Raises DiskError (the file is as before), NumericsError."""
    line = (dumps(obj, path) + "\n").encode("utf-8")
    with disk(path, needed=len(line)):
        handle = os.open(str(path), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            end = _acknowledged(handle, size)
            if end < size:
                os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            try:
                write_all(handle, line)
            except OSError:
                os.ftruncate(handle, end)
                raise
            os.fdatasync(handle)
        finally:
            os.close(handle)
        if size == 0:
            sync(Path(str(path)).parent)


def read_jsonl(path: object) -> list[dict[str, Any]]:
    """The acknowledged lines of a file made by `append_jsonl`; none where there is no file. A torn last line is dropped.

    Raises DataError with the line for anything else that is wrong.
    """
    if not Path(str(path)).exists():
        return []
    rows = []
    for number, line in enumerate(_content(path).split(b"\n")[:-1], start=1):
        row = _strict(_decoded(line, path, number), path, number)
        if not isinstance(row, dict):
            raise DataError("not a JSON object", path=path, line=number)
        rows.append(row)
    return rows


def sha256_file(path: object) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; reads in blocks."""
    with open(str(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(digest: Any, part: Any) -> None:
    numpy = sys.modules.get("numpy")  # an array can only come from a loaded numpy: this room stays light
    if isinstance(part, Mapping):
        digest.update(b"{%d" % len(part))
        for name in sorted(part):
            _feed(digest, name)
            _feed(digest, part[name])
    elif isinstance(part, list | tuple):
        digest.update(b"[%d" % len(part))
        for item in part:
            _feed(digest, item)
    elif numpy is not None and isinstance(part, numpy.ndarray):
        assert not part.dtype.hasobject, "an array of Python objects has no stable bytes"
        _feed(digest, ["array", str(part.dtype.descr), list(part.shape)])
        if part.size:
            digest.update(memoryview(numpy.ascontiguousarray(part).reshape(-1).view("u1")))
    else:
        assert part is None or isinstance(part, str | int | float), f"a fingerprint of {type(part).__name__} is not defined"
        text = json.dumps(part).encode()
        digest.update(b"%d:" % len(text) + text)


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able parts and numpy arrays, in hexadecimal: the same on every machine and in every process.

    Keys are sorted; 1, 1.0, True and "1" differ; arrays differ by dtype, shape and bytes.
    """
    digest = hashlib.sha256()
    _feed(digest, parts)
    return digest.hexdigest()


def owned(handle: int) -> bool | None:
    """Whether the kernel's lock is ours now; None where the file system has none. A kill releases it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # empty, or torn by a kill
        return {}
    return owner if isinstance(owner, dict) else {}


@contextlib.contextmanager
def run_lock(folder: object) -> Iterator[None]:
    """Hold a run folder: nobody else may while this is open. A lock left by a killed process is taken over.

    Raises DiskError that names the holder's process and host. A stamp from another host is believed even where the kernel's lock
    is free, because not every network file system shares locks between hosts.
    """
    path, host = Path(str(folder)) / LOCK, socket.gethostname()
    with disk(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        taken, owner = owned(handle), _owner(handle)
        elsewhere = owner.get("host", host) != host
        unlocked = taken is None and isinstance(owner.get("pid"), int) and _alive(owner["pid"])
        if taken is False or elsewhere or unlocked:
            who = f"process {owner.get('pid', '?')} on {owner.get('host', host)}"
            hint = f"; if that process is gone, delete {path}" if elsewhere else ""
            raise DiskError(f"{folder}: {who} works in this run folder; stop it or choose another --output{hint}")
        with disk(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)  # emptied, not removed: a removed lock file can be held by two
    finally:
        os.close(handle)


def require_new(path: object) -> Path:
    """The path of a folder that is absent or empty. UsageError where something is there already."""
    folder = Path(str(path))
    with disk(folder):
        if folder.is_dir():
            found = sorted(entry.name for entry in folder.iterdir())
            if found:
                shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                raise UsageError(f"{folder}: not empty (holds {shown}); choose another, or --resume {folder} to continue a run")
        elif folder.exists() or folder.is_symlink():
            raise UsageError(f"{folder}: is a file, expected a folder that is new or empty")
    return folder


def new_folder(path: object) -> Path:
    """Make a folder, or take an empty one. UsageError where something is there already, DiskError where it cannot be made."""
    folder = require_new(path)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
