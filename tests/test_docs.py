"""The tables of the documents say what the code does: learning rates and exit codes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from preftune import cli, config, errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def shown(heading: str) -> list[tuple[str, list[str]]]:
    """(page, words after `preftune`) of every command in the blocks that are headed so."""
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{heading}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = [line[2:].split() for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
            found += [(page.name, words[1:]) for words in lines if words[0].endswith("preftune")]
    return found


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def test_learning_rates_are_the_documented_ones():
    from preftune.engine import LEARNING_RATES, auto_rate

    section = (DOCS / "learning-rate.md").read_text(encoding="utf-8").split("## The table")[1].split("##")[0]
    table = rows(section)
    assert [(float(full), float(adapter)) for _, full, adapter, _ in table] == [row[1:] for row in LEARNING_RATES]
    unit = {"million": 1e6, "billion": 1e9}
    for (words, *_), (below, *_) in zip(table[:-1], LEARNING_RATES[:-1], strict=True):
        number, name = re.findall(r"(\d+) (million|billion)", words)[-1]
        assert float(number) * unit[name] == below
    assert LEARNING_RATES[-1][0] == math.inf
    # the bound belongs to the upper row, as the page says
    assert auto_rate(9_999_999, lora=False)[0] == 1e-4 and auto_rate(10_000_000, lora=False)[0] == 1e-5
    assert auto_rate(7_240_000_000, lora=True)[0] == 5e-6


def test_exit_codes_are_the_documented_ones():
    table = {row[1].strip("`"): int(row[0]) for row in rows((DOCS / "errors.md").read_text(encoding="utf-8")) if row[1]}
    codes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.PreftuneError) and kind is not errors.PreftuneError
    }
    assert codes.pop("Interrupted") == errors.PreftuneError.exit_code  # set from the signal
    assert table.pop("Interrupted") == errors.Interrupted("", signal_number=15).exit_code == 143
    assert table == codes and len(codes) == 9


def test_every_command_shown_is_one_that_the_program_reads():
    """Verbs, options and the types of their values; that the files are there is the tutorial's own test."""
    commands = [(page, words) for page, words in shown("console") if not {"--help", "--help-all", "--help-losses"} & set(words)]
    assert len(commands) >= 12
    for page, line in commands:
        verb, words = cli.split_verb(line)
        given, _ = cli.read_words(words, cli.VERBS[verb].options)
        assert given or not words, page
        if verb == "dpo":
            plain = {name: value for name, (value, _) in given.items() if not name.startswith("loss.")}
            arguments = {name.removeprefix("loss."): value for name, (value, _) in given.items() if name.startswith("loss.")}
            assert config.loss_terms(config.Dpo(**plain, loss_arguments=arguments))


def test_commands_shown_as_refused_are_refused():
    commands = shown("console refused")
    assert commands
    for _, line in commands:
        verb, words = cli.split_verb(line)
        with pytest.raises(errors.UsageError):
            cli.read_words(words, cli.VERBS[verb].options)


def test_layouts_and_their_rows_are_the_documented_ones(tmp_path):
    from preftune.formats import FORMATS, read
    from preftune.formats.sources import JSON_CELLS

    text = (DOCS / "data.md").read_text(encoding="utf-8")
    section = text.split("## Layouts")[1].split("\n## ")[0]
    wanted = [[f"`{name}`", ", ".join(f"`{column}`" for column in layout.required), layout.description] for name, layout in FORMATS.items()]
    assert rows(section) == wanted
    for line, (name, layout) in zip(section.split("```json\n")[1].split("\n```")[0].splitlines(), FORMATS.items(), strict=True):
        assert json.loads(line) == layout.example
        (tmp_path / "row.jsonl").write_text(line + "\n")
        assert read([tmp_path / "row.jsonl"]).layout == name
    assert all(f"`{column}`" in text.split("**CSV**")[1].split("**Parquet")[0] for column in JSON_CELLS)
