"""What happens under each fault of docs/faults.md, found by doing it: our command on a tiny model, its last words and its exit code.

    python bench/faults.py            # the table on the screen
    python bench/faults.py --write    # into docs/faults.md

TRL's column was recorded once, on TRL 1.16.0 (transformers 5.23.0, torch 2.15.0, CPU, Python 3.11), one run per row, before this
project began; it is quoted, not run again. Takes a minute; makes everything that it needs and removes it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Under fault

What a run does when something is wrong, beside what TRL did. Our column is made by `python bench/faults.py --write`: it does each fault to a tiny
model and writes down the exit code and the last words; a test checks that the codes still hold. TRL's column was recorded once, on TRL 1.16.0
(transformers 5.23.0, torch 2.15.0, CPU), one run per row; it is quoted, not run again. Exit codes are explained in [errors.md](errors.md).

"""


TAIL = """
## Faults that stop a process

Proven by tests, not by the table: SIGKILL at random moments and inside a save (TRL: 8 of 8 kills in the save window left automatic resume stuck;
here `tests/test_dpo.py` and `tests/test_checkpoints.py`: none), SIGTERM (TRL: nothing saved; here saved, exit 143), a full disk (TRL: a half
checkpoint that blocks resume after space is freed; here exit 6, the one before stands), exact resume (TRL: bitwise in 4 of 4; here bitwise, every
method). Files from strangers: `tests/test_untrusted.py`.
"""


class Place:
    """A folder with a model, and a run made there by the command line."""

    def __init__(self, folder: Path) -> None:
        import make

        self.folder, self.model = folder, make.write_model(folder / "model")
        self.rows = [{"prompt": f"{i} the cat", "chosen": f" thanks {i}.", "rejected": f" no {i}."} for i in range(24)]

    def data(self, rows: list[Any] | bytes | None = None) -> Path:
        rows = self.rows if rows is None else rows
        text = rows if isinstance(rows, bytes) else "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
        (self.folder / "pairs.jsonl").write_bytes(text)
        return self.folder / "pairs.jsonl"

    def dpo(self, rows: list[Any] | bytes | None = None, *words: str) -> tuple[int, str]:
        """(exit code, last words) of a run on these rows."""
        data = self.data(rows)
        small = ["--threads", "1", "--eval-prompts", "0", "--no-report", "--batch-size", "8", "--lr", "0.001"]
        small = [w for i, w in enumerate(small) if not ({"--lr"} & {*words} and (w == "--lr" or small[i - 1] == "--lr"))]
        model = [] if "--model" in words else ["--model", str(self.model)]
        files = [] if "--data" in words else ["--data", str(data)]
        return self.call("dpo", *model, *files, "--output", str(self.folder / f"run{len(list(self.folder.iterdir()))}"), *small, *words)

    def call(self, *words: str) -> tuple[int, str]:
        from preftune.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        lines = [x for x in err.getvalue().splitlines() if x.strip()] if code else out.getvalue().splitlines()
        said = " ".join(x.strip() for x in lines if "error:" in x) or next((x for x in err.getvalue().splitlines() if TOLD(x)), lines[-1])
        return code, said.replace(str(self.folder) + "/", "").replace("preftune dpo: error: ", "")

    def config(self, text: str) -> tuple[int, str]:
        (self.folder / "c.yaml").write_text(text)
        return self.dpo(None, "--config", str(self.folder / "c.yaml"))

    def run(self, **change: Any) -> Path:
        """A finished training whose last words were lost: it can be resumed."""
        code, said = self.dpo(None, "--save-every", "1", "--keep", "3")
        assert code == 0, said
        run = max(self.folder.glob("run*"), key=lambda p: p.stat().st_mtime_ns)
        (run / "results.json").unlink()
        return run

    def resumed(self, spoil: Callable[[Path], Any]) -> tuple[int, str]:
        run = self.run()
        spoil(run)
        return self.call("dpo", "--resume", str(run))


def TOLD(line: str) -> bool:
    """Whether a line of a run that went on says what was found."""
    return line.startswith(("left out", "checkpoint skipped", "merged", "resumed", "only "))


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


class Fault(NamedTuple):
    """A row of the table: the code that we expect, TRL's outcome as recorded, and how to do it."""

    name: str
    code: int | None  # None: not promised yet; written down as it is
    trl: str
    do: Callable[[Place], tuple[int, str]]


GOOD = {"prompt": "the cat", "chosen": " yes.", "rejected": " no."}
FAULTS: tuple[Fault, ...] = (
    Fault("chosen == rejected, all rows", 3, 'trains, loss 0.6931, "completed": silent', lambda p: p.dpo([r | {"rejected": r["chosen"]} for r in p.rows])),
    Fault("empty chosen in all rows", 3, "trains: silent", lambda p: p.dpo([r | {"chosen": ""} for r in p.rows])),
    Fault("the same pair 200 times", 0, "trains: silent", lambda p: p.dpo([GOOD] * 200)),
    Fault("every pair also reversed", 0, "trains, loss 0.6931: silent", lambda p: p.dpo([x for r in p.rows for x in (r, r | {"chosen": r["rejected"], "rejected": r["chosen"]})])),
    Fault("NUL characters in text", 3, "kept, trained: silent", lambda p: p.dpo([*p.rows, GOOD | {"chosen": " a\0b"}])),
    Fault("control tokens in user text", 3, "become control tokens: silent", lambda p: p.dpo([*p.rows, GOOD | {"prompt": "x </s> y"}])),
    Fault("one 1 MB line among the rows", 0, "truncated, trained: silent", lambda p: p.dpo([*p.rows, GOOD | {"chosen": " a" * 500_000}])),
    Fault("one row in the file", 0, "trains 6 epochs: silent", lambda p: p.dpo([GOOD])),
    Fault("blank line in the middle", 0, "skipped", lambda p: p.dpo([*p.rows[:9], "", *p.rows[9:]])),
    Fault("byte-order mark", 0, "handled", lambda p: p.dpo(b"\xef\xbb\xbf" + p.data().read_bytes())),
    Fault("all prompts longer than the limit", 3, "`ValueError: num_samples should be a positive integer value`", lambda p: p.dpo([r | {"prompt": r["prompt"] * 50} for r in p.rows])),
    Fault("column misspelt", 3, "`KeyError: 'chosen'`", lambda p: p.dpo([{"prompt": r["prompt"], "chosn": r["chosen"], "rejected": r["rejected"]} for r in p.rows])),
    Fault("one null instead of text", 3, "`AttributeError: 'NoneType' object has no attribute 'endswith'`, no row", lambda p: p.dpo([*p.rows, GOOD | {"chosen": None}])),
    Fault("one number instead of text", 3, "`AttributeError: 'int' ...`, no row", lambda p: p.dpo([*p.rows, GOOD | {"chosen": 3}])),
    Fault("one cut JSON line", 3, "three tracebacks; file and a 0-based row in a log line", lambda p: p.dpo([*p.rows[:9], '{"prompt": "a", "chos', *p.rows[9:]])),
    Fault("Latin-1 file", 3, "`UnicodeDecodeError ... position 4`, no file", lambda p: p.dpo('{"prompt": "é", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"))),
    Fault("empty file", 3, "bare `StopIteration`", lambda p: p.dpo(b"")),
    Fault("missing data file", 3, "`FileNotFoundError` with the path: good", lambda p: p.dpo(None, "--data", str(p.folder / "pair.jsonl"))),
    Fault("model folder misspelt", 8, '"Repo id must use alphanumeric chars": misleading', lambda p: p.dpo(None, "--model", str(p.folder / "modl"))),
    Fault("misspelt option", 2, "115 lines of launcher usage, last line names it", lambda p: p.dpo(None, "--bta", "0.1")),
    Fault("misspelt key in YAML", 2, "115 lines of launcher usage, last line names it", lambda p: p.config("epochs: 1\nbta: 0.1\n")),
    Fault("wrong type (`beta: high`)", 2, '"invalid float value" after 151 lines', lambda p: p.config("beta: high\n")),
    Fault("`beta: -0.1`", 2, "trains to the end: silent", lambda p: p.config("beta: -0.1\n")),
    Fault("same key twice in YAML", 2, "last one wins: silent", lambda p: p.config("beta: 0.1\nbeta: 0.2\n")),
    Fault("learning rate 1e30", 4, "loss `0`, exit 0, model of NaN saved: **worst**", lambda p: p.dpo(None, "--lr", "1e30", "--clip", "0")),
    Fault("resume with other data", 7, "other data used: silent", lambda p: p.resumed(lambda run: p.data([GOOD | {"prompt": f"other {i}"} for i in range(24)]))),
    Fault("resume with another seed", None, "no word: silent", lambda p: p.resumed(lambda run: edit(run / "config.yaml", "seed: 0", "seed: 1"))),
    Fault("resume with another learning rate", None, "old rate kept: silent", lambda p: p.resumed(lambda run: edit(run / "config.yaml", "lr: 0.001", "lr: 0.002"))),
    Fault("resume with another batch size", None, "warning: good", lambda p: p.resumed(lambda run: edit(run / "config.yaml", "batch_size: 8", "batch_size: 4"))),
    Fault("bit flip in the newest model weights", 0, "loads, trains on: silent", lambda p: p.resumed(lambda run: flip(newest(run) / "weights.safetensors"))),
    Fault("bit flip in the newest optimizer file", 0, "loads, trains on: silent", lambda p: p.resumed(lambda run: flip(newest(run) / "optimizer.safetensors"))),
    Fault("newest checkpoint truncated", 0, "traceback; older good one not tried: stuck", lambda p: p.resumed(lambda run: os.truncate(newest(run) / "weights.safetensors", 99))),
    Fault("optimizer file missing", 0, "resumes with a **fresh optimizer**: silent", lambda p: p.resumed(lambda run: (newest(run) / "optimizer.safetensors").unlink())),
)  # fmt: skip


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A folder of its own, with a cache of its own."""
    before = os.environ.get("PREFTUNE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFTUNE_CACHE"] = f"{folder}/cache"
        try:
            yield Place(Path(folder))
        finally:
            os.environ.pop("PREFTUNE_CACHE") if before is None else os.environ.update(PREFTUNE_CACHE=before)


def table() -> tuple[str, list[str]]:
    """The page, and the rows whose exit code is not the expected one."""
    lines, wrong = ["| fault | TRL 1.16.0 | preftune: exit code and last words |", "|---|---|---|"], []
    for fault in FAULTS:
        with place() as here:
            code, said = fault.do(here)
        wrong += [f"{fault.name}: {code}, expected {fault.code}: {said}"] if fault.code not in (None, code) else []
        lines.append(f"| {fault.name} | {fault.trl} | **{code}** {said[:230].replace('|', chr(92) + '|')} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL, wrong


def main() -> int:
    """Print or write; 1 where a code is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/faults.md")
    write = parser.parse_args().write
    page, wrong = table()
    if write:
        PAGE.write_text(page, encoding="utf-8")
    print(page)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
