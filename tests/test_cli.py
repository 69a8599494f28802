"""The command line as a person meets it: help, speed, errors, exit codes, `env`. Subprocesses where time or terminals matter."""

from __future__ import annotations

import dataclasses
import os
import platform
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import __version__, cli, errors, stages
from preftune.cli import VERBS, main, verb_help
from preftune.config import Env, loss_facts, specs

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def preftune(*words: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "preftune", *words]
    return subprocess.run(command, capture_output=True, text=True, env=PLAIN | (env or {}), cwd=cwd, timeout=60)


# --- help ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["--help", "dpo --help", "dpo --help-all", "dpo --help-losses", "dpo --bta 1"])
def test_help_and_refusals_are_quick(words, capsys):
    """Seconds of the processor: what a person waits for on a quiet machine (the goal: 0.3), and what a busy one does not change."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        preftune(*words.split())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    with capsys.disabled():
        print(f"\n  preftune {words}: {min(seconds):.3f} s", end="")
    assert min(seconds) <= 0.45


@pytest.mark.parametrize("words", [["--help"], ["dpo", "--help-all"], ["dpo", "--help-losses"],
                                   ["dpo", "--model", "m", "--data", __file__, "--output", "o", "--loss", "simpoo"]])  # fmt: skip
def test_no_heavy_import_before_the_stage(words):
    heavy = {"torch", "transformers", "tokenizers", "numpy", "scipy", "rich", "jinja2", "matplotlib"}
    program = f"import sys; from preftune.cli import main; main({words!r}); print('HEAVY', sorted({{*sys.modules}} & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=PLAIN, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


@pytest.mark.parametrize("name", VERBS)
def test_short_help_is_short_and_says_where_the_rest_is(name):
    text = verb_help(name)
    assert len(text.splitlines()) <= 60 and "\033" not in text
    assert all(len(line) <= 110 and line == line.rstrip() for line in text.splitlines())
    groups = {spec.group for spec in specs(VERBS[name].options)}
    if groups > {"main"}:
        assert f"preftune {name} --help-all" in text.splitlines()[-1]
    for spec in specs(VERBS[name].options):
        assert re.search(rf"(^| )--(\[no-\])?{re.escape(spec.flag[2:])}( |$)", text, re.MULTILINE), spec.flag


@pytest.mark.parametrize("name", VERBS)
def test_full_help_shows_every_option_with_its_text(name):
    text = verb_help(name, everything=True)
    flat = " ".join(text.split())
    swept = 0
    for spec in specs(VERBS[name].options):
        flag = spec.flag.replace("--", "--[no-]", 1) if spec.kind == "switch" else spec.flag
        assert f"\n  {flag}" in text, flag
        assert spec.help in flat
        assert spec.bounds.strip() in flat
        if spec.choices:
            assert all(choice in flat for choice in spec.choices)
        swept += 1
    assert swept == len(dataclasses.fields(VERBS[name].options))


def test_narrow_and_wide_terminals(monkeypatch):
    """Text wraps at 60 to 110 columns; the example command is one line, to be copied."""
    for columns, most in (("20", 70), ("80", 80), ("300", 110)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, verb_help("dpo", everything=True).splitlines())) <= most


def test_main_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and verb.help in " ".join(text.split()) for name, verb in VERBS.items())
    assert main([]) == 2 and capsys.readouterr().out == text
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"preftune {__version__}\n"
    assert preftune("--version").stdout == f"preftune {__version__}\n"


def test_help_wins_over_errors(capsys):
    assert main(["dpo", "--bta", "--help"]) == 0
    assert main(["dpo", "-h"]) == 0
    assert main(["chat", "--help-losses"]) == 2


def test_help_losses_shows_every_loss(capsys):
    assert main(["dpo", "--help-losses"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, facts in loss_facts().items():
        assert f" {name} {' '.join(facts.formula.split())}" in text and facts.source in text
        for argument, default in facts.arguments.items():
            assert f"--loss.{argument.replace('_', '-')} {default:g}" in text


def on_a_terminal(*words: str, **env: str) -> str:
    """What the command writes when stdout is a terminal."""
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in PLAIN.items() if name != "NO_COLOR"}
    subprocess.run([sys.executable, "-m", "preftune", *words], stdout=theirs, env=plain | {"TERM": "xterm"} | env, timeout=60)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal is gone: all was read
            break
        if not part:
            break
        out += part
    os.close(ours)
    return out.decode()


def test_colour_only_on_a_terminal_that_wants_it():
    assert "\033[1m" in on_a_terminal("--help")
    assert "\033" not in on_a_terminal("--help", NO_COLOR="1")
    assert "\033" not in on_a_terminal("--help", TERM="dumb")
    assert "\033" not in preftune("--help").stdout


# --- errors and exit codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "code", "line"), [
    (["dop"], 2, "preftune dop: error: there is no verb 'dop' (did you mean 'dpo'?); 'preftune --help' lists them"),
    (["--model", "x"], 2, "preftune: error: there is no verb '--model'; 'preftune --help' lists them"),
    (["dpo", "--bta", "1"], 2, "preftune dpo: error: unknown option --bta (did you mean '--beta'?)"),
    (["dpo", "--model", "m", "--data", "gone.jsonl", "--output", "o"], 3, "preftune dpo: error: gone.jsonl: no such file"),
    (["dpo", "--model", "./gone", "--data", __file__, "--output", "o"], 8, "preftune dpo: error: ./gone: no such model folder"),
    (["dpo", "--template", "\033]0;x\a", "--finish", "\033[31m"], 2,
     "preftune dpo: error: --finish must be one of auto, always, never, not '\\x1b[31m'"),
])  # fmt: skip
def test_an_error_is_one_line_with_its_code(words, code, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == "" and err == line + "\n"


def test_terminal_codes_in_names_are_shown_not_obeyed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "--model", "m", "--data", "\033[2J.jsonl", "--output", "o"]) == 3
    assert capsys.readouterr().err == "preftune dpo: error: <U+001B>[2J.jsonl: no such file\n"


STAGE = '''"""A stage that ends in the way that its environment says."""
import os, sys
from preftune import errors


def run(options):
    kind = os.environ["ENDS"]
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if kind == "RuntimeError":
        raise RuntimeError("first\\nsecond")
    if kind == "BrokenPipeError":
        print("x" * 100000)
        return None
    if kind == "Interrupted":
        raise errors.Interrupted("stopped", signal_number=15)
    if kind.isdigit():
        return int(kind)
    raise getattr(errors, kind)("one\\ntwo\\nthree\\nfour\\nfive" if kind == "DiskError" else "what, where, what to do")
'''


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """A verb `env` whose stage ends as asked: the real door, a real stage file."""
    (tmp_path / "env.py").write_text(STAGE)
    monkeypatch.setattr(stages, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "preftune.stages.env", raising=False)
    yield lambda kind: monkeypatch.setenv("ENDS", kind)
    sys.modules.pop("preftune.stages.env", None)


CODES = {"UsageError": 2, "DataError": 3, "EmptyText": 3, "NumericsError": 4, "OutOfMemoryError": 5, "DiskError": 6, "CheckpointError": 7,
         "ModelError": 8, "SelfCheckError": 9, "EndpointError": 10, "ReportError": 11, "Interrupted": 143, "KeyboardInterrupt": 130,
         "RuntimeError": 1, "0": 0, "7": 7}  # fmt: skip


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_every_end_has_its_code(kind, code, ends, capsys):
    ends(kind)
    assert main(["env"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) <= 3
    assert kind.isdigit() or err.startswith("preftune env: error: ")


def test_every_fault_class_was_tried():
    classes = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.PreftuneError)}
    assert classes - {"PreftuneError"} <= set(CODES)


def test_our_own_faults_say_so(ends, capsys):
    ends("RuntimeError")
    assert main(["env"]) == 1
    err = capsys.readouterr().err
    assert "this is our fault, not yours: RuntimeError: first (cli.py:" in err and "--debug" in err and "second" not in err


def test_long_messages_are_cut_and_say_so(ends, capsys):
    ends("DiskError")
    assert main(["env"]) == 6
    assert capsys.readouterr().err == "preftune env: error: one\ntwo\n  ... 3 more lines: run again with --debug\n"


@pytest.mark.parametrize("words", [["--debug", "env"], ["env", "--debug"]])
@pytest.mark.parametrize("kind", ["RuntimeError", "DiskError", "KeyboardInterrupt"])
def test_debug_shows_the_traceback(words, kind, ends, capsys):
    ends(kind)
    assert main(words) == CODES[kind]
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and ("five" in err or kind != "DiskError")


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "preftune", "dpo", "--help-all"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=PLAIN, timeout=60)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


def test_a_config_cannot_run_code_nor_reach_the_network(tmp_path):
    """The file is composed, never constructed; the marker would show otherwise."""
    (tmp_path / "run.yaml").write_text("model: !!python/object/apply:os.system ['touch marker']\n")
    done = preftune("dpo", "--config", "run.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("preftune dpo: error: run.yaml:1: model must be text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_options_reach_the_stage(ends, capsys, monkeypatch):
    seen = []
    ends("0")
    module = cli.importlib.import_module("preftune.stages.env")
    monkeypatch.setattr(module, "run", seen.append)
    assert main(["env"]) == 0 and seen == [Env()]


# --- env -------------------------------------------------------------------------------------------------------------------


def test_env_says_what_an_issue_needs_and_nothing_private(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    rows = {line[:14].strip(): line[14:] for line in text.splitlines()}
    assert {"preftune", "python", "system", "processor", "memory", "torch", "transformers", "torch threads", "cuda"} <= set(rows)
    assert rows["preftune"] == __version__ and rows["torch threads"][0].isdigit() and all(rows.values())
    assert rows["system"] == f"{platform.system()} {platform.release()} {platform.machine()}"  # and not the host's name
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.parametrize("fault", ["raise ImportError('libcudart.so is missing')", "raise OSError('no memory for a library')"])
def test_env_works_with_a_broken_torch(fault, tmp_path):
    (tmp_path / "torch.py").write_text(fault)
    done = preftune("env", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^torch import  failed: \w+Error: (libcudart|no memory)", done.stdout, re.MULTILINE)


def test_the_verbs_with_losses_list_them():
    found = [name for name, verb in VERBS.items() if any(spec.kind == "numbers" for spec in specs(verb.options))]
    assert {"dpo", "online", "evaluate"} <= set(found)
    assert all(f"preftune {name} --help-losses every loss" in verb_help(name) for name in found)
