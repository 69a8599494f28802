"""The tables of the documents say what the code does: learning rates, exit codes, layouts, options; translations keep up."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from test_commands import PAGES, steps

from preftune import cli, config, errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


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
    assert table == codes and len(codes) == 11


def test_the_reference_is_what_the_program_knows():
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    page = maker.page()
    assert all(f"\n## preftune {verb}\n" in page for verb in cli.VERBS)
    flags = {option.flag for verb in cli.VERBS.values() for option in config.specs(verb.options)}
    assert len(flags) >= 60 and all(f"| `{flag}` |" in page for flag in flags)
    if page != (DOCS / "reference.md").read_text(encoding="utf-8"):
        pytest.fail("docs/reference.md is not what the options say: run .venv/bin/python docs/make_reference.py", pytrace=False)


def test_translations_stand_beside_their_originals():
    """A Chinese page links to its original and back, has its sections and its commands; only the data may be in another language."""
    translated = [*ROOT.glob("*.zh.md"), *DOCS.glob("*.zh.md")]
    assert len(translated) >= 2
    for page in translated:
        original = page.with_name(page.name.replace(".zh.md", ".md"))
        texts = [each.read_text(encoding="utf-8") for each in (page, original)]
        assert f"]({original.name})" in texts[0] and f"]({page.name})" in texts[1]
        ours, theirs = ([step.line.replace(" --language zh", "") for step in steps(each)] for each in (page, original))
        assert ours == theirs
        assert {link for link in re.findall(r"\]\((docs/images/[^)]+)\)", texts[1])} <= set(re.findall(r"\]\(([^)]+)\)", texts[0]))


def test_commands_that_are_not_run_are_few_read_and_say_why():
    every = [step for page in PAGES for step in steps(page)]
    left_out = [step for step in every if step.not_run]
    assert len(every) >= 100 and len(left_out) <= len(every) / 5
    for step in left_out:
        assert len(step.not_run.split()) >= 2, step.where
        words = step.line.split()
        if words[0].endswith("preftune"):
            verb, rest = cli.split_verb(words[1:])
            cli.read_words(rest, cli.VERBS[verb].options)
    marks = sum(len(re.findall("^<!-- not run:", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert marks == len({step.where for step in left_out}), "a mark without a console block under it"


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
