"""Processes that tests may kill: forked from a server that was started fresh and has one thread, never from pytest itself.

A fork of a process with threads (pytest-xdist, a tokeniser's pool, a loader's pool) may find any lock or pool in any state. The server
is a new interpreter; it imports the test's module once, checks that it has a single thread, and forks one child a call. torch's own
pool is made anew in the child before any thread can ask for it: torch does that on first use, without a lock, and two threads of
transformers' loader that come at once find "Invalid thread pool!" (one fork in twenty, measured; docs/decisions.md).

    children.call(work, "text", 3)      # module-level function, arguments that JSON can hold -> exit status
    pid = children.start(work); os.kill(pid, signal.SIGKILL); children.wait() == -signal.SIGKILL

A PreftuneError ends the child with its exit code, any other exception with 99 and a traceback in `children.said()`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CRASHED = 99
LIMIT = 240  # seconds after which a child counts as hung; only a fault gets there


class Children:
    """One server and at most one child at a time."""

    def __init__(self, folder: Path):
        self.log = folder / "child.log"
        here = Path(__file__).parent
        paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.server = subprocess.Popen([sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                       stderr=None, env=environment)  # fmt: skip
        self.pid = 0

    def start(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Begin `function(*arguments)` in a child; its process id. Options go as they are."""
        assert function.__qualname__ == function.__name__, "a module-level function"
        job = {"module": function.__module__, "function": function.__name__, "arguments": [_packed(a) for a in arguments],
               "environment": {k: v for k, v in os.environ.items() if k.startswith("PREFTUNE")}, "log": str(self.log)}  # fmt: skip
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = self._read()
        return self.pid

    def wait(self) -> int:
        """The child's exit status; minus the signal's number where one ended it."""
        return self._read()

    def call(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Run to the end."""
        self.start(function, *arguments)
        return self.wait()

    def said(self) -> str:
        """What the last child wrote to stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _read(self) -> int:
        if not select.select([self.server.stdout], [], [], LIMIT)[0]:
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"the child hangs; it said:\n{self.said()}")
        line = self.server.stdout.readline()
        assert line, "the server of child processes is gone"
        return int(line)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(LIMIT)


@contextmanager
def server(folder: Path) -> Iterator[Children]:
    found = Children(folder)
    try:
        yield found
    finally:
        found.close()


def until(happens: Callable[[], Any], seconds: float = LIMIT) -> None:
    """Wait for what another process does. Raises AssertionError where it never does."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def _packed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"options": type(value).__name__, "fields": dataclasses.asdict(value)}
    return str(value) if isinstance(value, Path) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"options", "fields"}:
        from preftune import config

        return getattr(config, value["options"])(**value["fields"])
    return value


def serve() -> None:
    """One line in, the child's process id out, its exit status out; until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        function = getattr(importlib.import_module(job["module"]), job["function"])
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"the server has {len(threads)} threads"
        pid = os.fork()
        if pid == 0:
            _child(function, job, answers)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def _child(function: Callable[..., Any], job: dict[str, Any], answers: Any) -> None:
    from preftune.errors import PreftuneError

    status = CRASHED
    try:
        os.close(answers.fileno())
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(job["environment"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        status = function(*map(_unpacked, job["arguments"])) or 0
    except PreftuneError as error:
        print(error, file=sys.stderr)
        status = error.exit_code
    except BaseException:  # noqa: BLE001  whatever it is must not come back into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
