"""Every command of the documents is run, page by page, in order, in a folder of its own; what a page shows as output is compared.

A page is a script. In ```console blocks a line that begins with "$ " is a command, what follows is what it prints, "..." stands for lines
that are left out; `cat > FILE <<'EOF'` makes a file. In ```console refused blocks the exit code must not be 0. A block under
`<!-- not run: reason -->` is only read. A model or file that a page names and does not make is put there (STAND_INS), made by the demo
at settings of seconds. Everything runs in this process, through `cli.main`.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import make
import pytest

from preftune import cli, config, grammar, models
from preftune.formats import to_json
from preftune.stages import demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: ([^>]+?) -->\s*)?```console( refused)?\n(.*?)```", re.DOTALL)
SHELL = {"head", "cat", "ls", "wc", "tail"}  # read only, run as they stand
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?![\w])")


class Step(NamedTuple):
    """One command of a page. `text` is what its here-document holds, `shown` the output printed under it."""

    where: str
    line: str
    text: str | None
    shown: list[str]
    refused: bool
    not_run: str | None


def steps(page: Path) -> list[Step]:
    """The commands of a page in order."""
    whole, found = page.read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(whole):
        number = whole.count("\n", 0, block.start(3)) + 1
        rest = block[3].replace("\\\n", "").splitlines()
        while rest:
            line = rest.pop(0)
            assert line.startswith("$ "), f"{page.name}:{number}: a console block begins with a command, not {line!r}"
            text, shown = None, []
            if line.endswith("<<'EOF'"):
                end = rest.index("EOF")
                text, rest = "\n".join(rest[:end]) + "\n", rest[end + 1 :]
            while rest and not rest[0].startswith("$ "):
                shown.append(rest.pop(0))
            where = f"{page.relative_to(ROOT)}:{number}"
            found.append(Step(where, line[2:], text, shown, bool(block[2]), block[1]))
    return found


# --- what a page may take for granted -------------------------------------------------------------------------------------------


class World:
    """Made once a session: the demo in each of its forms, and what stands in for a reader's own files."""

    def __init__(self, root: Path):
        self.root, self.printed = root, {}

    def demo(self, words: list[str], patch: pytest.MonkeyPatch) -> tuple[Path, str]:
        """(folder, what was printed) of `preftune demo WORDS`, run once for each kind of words: 16 prompts, 60 steps."""
        key = " ".join(words)
        folder = self.root / re.sub(r"\W+", "-", key or "plain") / "demo"
        if key not in self.printed:
            split = grammar.split
            with patch.context() as few:
                few.setattr(grammar, "split", lambda *which: (split(*which)[0][:16], split(*which)[1][:4]))
                few.setattr(demo, "BREAK", replace(demo.BREAK, sft_steps=60, samples=8, batch=16))
                few.setattr(demo, "RECIPE", replace(demo.RECIPE, sft_steps=60, samples=8, batch=16, passes=1, reward_batch=16,
                                                    ppo_passes=1))  # fmt: skip
                code, out = run(["demo", "--output", str(folder), *words])
            assert code == 0, out
            language = "zh" if "zh" in words else "en"
            train, held = grammar.split(language, 0)
            write_judged(folder.parent / "pairs.jsonl", language, train[:16])
            write_judged(folder.parent / "held_out.jsonl", language, held[:4])
            self.printed[key] = out.replace(str(folder), "runs/demo")
        return folder, self.printed[key]


def write_judged(path: Path, language: str, prompts: list[str]) -> None:
    """Pairs as the demo leaves them, of the grammar's own replies: what a model of 60 steps says differs from machine to machine."""
    chance = random.Random(0)
    spoken = [[(reply.text, True) for reply in chance.sample(grammar.replies(language, prompt), 8)] for prompt in prompts]
    records = [record for prompt, replies in zip(prompts, spoken, strict=True) for record in demo._group(language, prompt, replies, chance)]
    path.write_text("".join(json.dumps(to_json(record), ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def copy_demo(folder: Path, target: Path) -> None:
    """The demo with judged pairs of our own. Those that it was trained on stay where they are: its run can be resumed."""
    copy(folder, target)
    for name in ("pairs.jsonl", "held_out.jsonl"):
        copy(folder.parent / name, target / name)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def stand_in(name: str, world: World, patch: pytest.MonkeyPatch) -> bool:
    """Puts there what a page names and does not make; False for a name that nobody knows."""
    place = Path(name)
    if name in ("MODEL", "path/to/model"):
        copy(world.demo([], patch)[0] / "base", place)
    elif name.startswith("runs/demo"):
        copy_demo(world.demo([], patch)[0], Path("runs/demo"))
    elif name.startswith("runs/lora"):  # a finished run with adapters
        source = make.write_pairs(Path("pairs-of-lora.jsonl"), 12)
        code, out = run(["dpo", "--model", str(world.demo([], patch)[0] / "base"), "--data", str(source), "--output", "runs/lora",
                         "--lora", "4", "--no-report"])  # fmt: skip
        assert code == 0, out
    elif name.startswith("runs/"):  # a finished run
        copy(world.demo([], patch)[0] / "dpo", Path(*place.parts[:2]))
    elif name in ("pairs.jsonl", "votes.jsonl"):
        make.write_pairs(place, 30)
    elif name == "scored.jsonl":
        make.write_scored(place, models.weights_fingerprint(str(world.demo([], patch)[0] / "base")), 20)
    elif name == "held-out.jsonl":
        make.write_pairs(place, 8, seed=1)
    elif name == "prompts.txt":
        place.write_text("Customer: Hello. My phone has frozen.\nCustomer: Hi there. My radio is too hot.\n")
    elif name == "games.csv":
        place.write_text("winner,loser\nann,bob\nbob,cat\ncat,ann\nann,cat\nbob,ann\n")
    elif name == "pairs.csv":
        place.write_text("prompt,chosen,rejected\n2+2=,4,5\n2+3=,5,6\n")
    return place.exists()


# --- running --------------------------------------------------------------------------------------------------------------------


def run(words: list[str], stdin: str = "Hello\n1\n") -> tuple[int, str]:
    """(exit code, everything printed) of a command line of preftune, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(words)
    return code, out.getvalue()


def outputs(words: list[str]) -> set[str]:
    """What a command writes: it need not be there before."""
    return {after for flag, after in pairwise(words) if flag in ("--output", "--votes", "--html")}


def provide(words: list[str], world: World, patch: pytest.MonkeyPatch) -> set[str]:
    """Puts stand-ins in place for the files that a command reads; returns their names."""
    put = set()
    for word in words:
        name = config.data_source(word)[0] if not word.startswith("-") else ""
        for part in (name, name.rpartition(":")[0], name.partition(":")[2].rpartition(":")[0]):
            # Votes are on what a tiny model said, which may be no text at all: they are not trained on here.
            there = Path(part).exists() and part != "votes.jsonl"
            if part and part not in outputs(words) and not there and stand_in(part, world, patch):
                put.add(part)
    return put


def do(step: Step, world: World, patch: pytest.MonkeyPatch) -> tuple[int, str, bool]:
    """(exit code, what was printed, whether a stand-in was read) of one command of a page."""
    if step.text is not None:
        how = re.fullmatch(r"cat (>>?) (\S+) <<'EOF'", step.line)
        assert how, f"{step.where}: a here-document makes a file: cat > FILE <<'EOF'"
        with open(how[2], "a" if how[1] == ">>" else "w", encoding="utf-8") as file:
            file.write(step.text)
        return 0, "", False
    said, _, command = step.line.rpartition(" | ")
    stdin = shlex.split(said)[1].encode().decode("unicode_escape") if said.startswith("printf ") else "Hello\n1\n"
    words = shlex.split(command.replace("2>/dev/null", "") if not said or said.startswith("printf ") else step.line)
    if words[:2] == ["make", "demo"]:
        words = ["preftune", "demo", "--output", "runs/demo"]
    program, words = words[0].removeprefix(".venv/bin/"), words[1:]
    put = provide(words, world, patch)
    if program == "preftune" and words[0] == "demo":
        i = words.index("--output") if "--output" in words else len(words)
        folder, printed = world.demo(words[1:i] + words[i + 2 :], patch)
        copy_demo(folder, Path("".join(words[i + 1 : i + 2]) or "runs/demo"))
        return 0, printed, True
    if program == "preftune":
        return *run(words, stdin), bool(put)
    assert program in SHELL, f"{step.where}: {step.line}: neither run nor marked `<!-- not run: reason -->`"
    done = subprocess.run(["bash", "-c", step.line], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, True


def skeleton(line: str) -> str:
    """A line without its numbers and the width of its columns: a tiny model's differ from those shown."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip()


def missing(shown: list[str], printed: str, exact: bool) -> str | None:
    """The first shown line that was not printed, in order; '...' leaves lines out, ' ...' at the end of a line its rest."""
    lines = iter(printed.splitlines())
    form = str.rstrip if exact else skeleton
    for line in shown:
        if line.strip() in ("...", ""):
            continue
        start, wanted = line.endswith(" ..."), form(line.removesuffix(" ..."))
        if not any(form(got).startswith(wanted) if start else form(got) == wanted for got in lines):
            return line
    return None


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not step.not_run for step in steps(page))], ids=lambda page: page.stem
)
def test_every_command_of_the_page_runs(page, tmp_path, world, cache, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    for step in steps(page):
        if step.not_run:
            continue
        if page.parent.name == "losses" and re.match("preftune (dpo|sft|reward) ", step.line):
            # Drawing the report takes five sixths of a run of one step, and is the same on each of these pages.
            step = step._replace(line=f"{step.line} --no-report")
        code, printed, stood_in = do(step, world, monkeypatch)
        assert bool(code) == step.refused, f"{step.where}: $ {step.line}\nexit code {code}\n{printed}"
        exact = step.line.startswith("preftune data") and not stood_in
        line = missing(step.shown, printed, exact)
        assert line is None, f"{step.where}: $ {step.line}\nshows a line that was not printed:\n{line}\nprinted:\n{printed}"
