"""Chat templates come with models, so from strangers: they are rendered in a child process with limits on time, memory and output.

The child has no environment, opens no file and no socket, and knows jinja2's sandbox only. Its limits are the system's, which no
filter, loop or method of a template gets around: processor seconds (whatever else the machine does), address space, characters.

    render = Renderer("{% for m in messages %}{{ m.content }}{% endfor %}")
    render(messages=[{"role": "user", "content": "hi"}])    # 'hi'
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from typing import Any

from .errors import DataError, ModelError

# Templates that print today's date would change the data from day to day; the date is fixed and stored with the fingerprint.
DATE = "2025-01-01"
SECONDS = 5.0  # of the processor, for one dialogue
MEMORY = 2**30  # bytes of address space
CHARACTERS = 2**22  # that one dialogue may become


class Renderer:
    """A chat template as a function. Its process starts with the first call and ends with the object."""

    def __init__(self, source: str) -> None:
        self.source, self.owner = source, 0
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, **variables: Any) -> str:
        """The text. Raises DataError where the template refuses these variables, ModelError where it is no template or hits a limit."""
        if self.child is None or self.owner != os.getpid():  # a forked process needs its own
            self._start()
        answer = self._ask(variables)
        if "error" in answer:
            raise DataError(f"the chat template refuses this dialogue: {answer['error']}")
        return str(answer["text"])

    def _start(self) -> None:
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        places = os.pathsep.join([here, *(os.path.abspath(p) for p in sys.path if p)])
        command = [sys.executable, "-P", "-m", __name__, str(SECONDS), str(MEMORY), str(CHARACTERS)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": places})
        self.owner = os.getpid()
        weakref.finalize(self, _end, self.child)
        answer = self._ask(self.source)
        if "error" in answer:
            raise ModelError(f"the chat template cannot be read: {answer['error']}")

    def _ask(self, what: Any) -> dict[str, Any]:
        child = self.child
        assert child is not None and child.stdin is not None and child.stdout is not None
        line = b""
        try:
            child.stdin.write(json.dumps(what).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline(16 * CHARACTERS)
        except BrokenPipeError:
            pass
        answer = json.loads(line) if line.endswith(b"\n") else {"limit": "memory"}
        if "limit" in answer:
            self.child = None
            late = _end(child) == -signal.SIGPROF
            limits = {"memory": f"more than {MEMORY >> 20} MiB of memory", "output": f"more than {CHARACTERS:,} characters",
                      "time": f"more than {SECONDS:g} seconds"}  # fmt: skip
            raise ModelError(f"the chat template was stopped: it takes {limits['time' if late else answer['limit']]}")
        return dict(answer)


def _end(child: subprocess.Popen[bytes]) -> int:
    """Let the child end, and its pipes with it. Its exit status."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    return child.wait()


# --- the child ----------------------------------------------------------------------------------------------------------------


WARM_UP = r"""{%- macro f(x, y='\n') -%}{{ x|tojson(indent=2) }}{%- endmacro -%}{%- set n = namespace(a=1, b={'c': [1, 2.5]}) -%}
{%- for m in messages if m is mapping and 'content' in m -%}{{ f(m.content)|trim ~ "%s" % 1 }}{{ strftime_now('%d %b %Y') }}{{ m.get('x') }}
{%- set n.a = m.content.split('a')|map('upper')|select('equalto', 'B')|list|join(', ') -%}{{ loop.index0 }}{%- continue -%}{%- endfor -%}
{%- if n.b is defined and n.b|length > 3 or n.b.c[-1]|int == 2 -%}{{ n.b|dictsort }}{{ '{}'.format(1) }}
{{- 'x'|replace('x', 'é') }}{%- endif -%}"""


def _compile(source: str) -> Any:
    """The template in jinja2's sandbox: no attributes that begin with '_', no methods that change an argument, the date fixed."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, indent=kw.get("indent"))
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.date.fromisoformat(DATE).strftime(form))
    return environment.from_string(source)


def _rendered(template: Any, variables: dict[str, Any], most: int) -> dict[str, str]:
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > most:
            return {"limit": "output"}
        parts.append(part)
    return {"text": "".join(parts)}


def _serve(seconds: float, memory: int, characters: int) -> None:
    """Lines of JSON in, lines of JSON out: first the template, then one dialogue a line."""
    import jinja2.debug  # noqa: F401  jinja2 and Python import some modules when they are first needed, and later no file can be opened

    template: Any = None
    _rendered(_compile(WARM_UP), {"messages": [{"content": "a"}]}, characters)
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 3)):
        resource.setrlimit(kind, (most, most))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal: the process ends there
        try:
            if template is None:
                template, answer = _compile(json.loads(line)), {"text": ""}
            else:
                answer = _rendered(template, json.loads(line), characters)
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception as error:  # noqa: BLE001  a template may raise anything
            answer = {"error": f"{str(error)[:300] or type(error).__name__}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
