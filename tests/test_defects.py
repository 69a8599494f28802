"""A file with every kind of bad record that we know: each is named with file:line, field and reason; by default it is refused; with
--skip-bad the rest trains and the manifest counts each."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import make
import pytest

from preftune.cli import main
from preftune.config import Dpo
from preftune.errors import DataError
from preftune.formats import read
from preftune.stages import dpo


def row(**change) -> str:
    return json.dumps({"prompt": "p", "chosen": " yes", "rejected": " no"} | change)


def without(name: str, **more) -> str:
    return json.dumps({k: v for k, v in json.loads(row()).items() if k != name} | more)


ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
DEFECTS: list[tuple[str | bytes, str, str]] = [  # line, field ('' for the row as a whole), words of the reason
    ('{"prompt": "x", "chosen": " ye', "", "not valid JSON: Unterminated string"),
    ("{'prompt': 'x'}", "", "not valid JSON: Expecting property name enclosed in double quotes"),
    (row() + row(), "", "not valid JSON: Extra data"),
    ("{}", "prompt", "missing"),
    ("[1, 2]", "", "a list, expected an object with columns"),
    ('"prompt"', "", "text, expected an object"),
    ("17", "", "a number, expected an object"),
    ("null", "", "null, expected an object"),
    ('{"prompt": "a", "prompt": "b", "chosen": " y", "rejected": " n"}', "", "key twice in one object: 'prompt'"),
    (row(prompt="x").replace('"x"', "NaN"), "", "not a JSON number: NaN"),
    (row(prompt="x").replace('"x"', "-Infinity"), "", "not a JSON number: -Infinity"),
    (row(prompt="x").replace('"x"', "1e999"), "", "number too large"),
    (row(prompt="x").replace('"x"', "9" * 5000), "", "not valid JSON: a number too long"),
    (row(meta="x").replace('"x"', "[" * 60 + "]" * 60), "meta", "nested too deeply"),
    (b'{"prompt": "caf\xe9", "chosen": " y", "rejected": " n"}', "", "not UTF-8: byte 0xe9"),
    (row(prompt="a\0b"), "prompt", "control character: \\u0000"),
    (row(rejected="a\ud800b"), "rejected", "lone surrogate: \\ud800"),
    (row(chosen=None), "chosen", "null, expected text or messages"),
    (row(rejected=5), "rejected", "a number, expected text or messages"),
    (row(chosen=True), "chosen", "true, expected text or messages"),
    (row(prompt=[1]), "prompt[0]", "a number, expected a message"),
    (row(prompt=[]), "prompt", "empty, expected messages"),
    (row(chosen=""), "chosen", "empty, expected text"),
    (row(prompt=" \n"), "prompt", "only white space"),
    (without("rejected", rejectd=" n"), "rejected", "missing (did you mean 'rejectd'?)"),
    (row(extra="x"), "", "columns differ from the first row's: with 'extra'"),
    (row(chosen={"role": "assistant"}), "chosen", "a message without 'content'"),
    (row(prompt=[ASK], chosen=[SAY | {"role": "asistant"}]), "chosen[0]", "unknown role: 'asistant' (did you mean 'assistant'?)"),
    (row(prompt=[ASK], chosen=[SAY, ASK]), "chosen", "not an answer: it runs from assistant to user"),
    (row(prompt=[ASK, SAY]), "prompt", "ends with an assistant message"),
    (row(chosen=[SAY]), "chosen", "messages, but the prompt is text"),
    (row(prompt=[ASK], chosen=[SAY | {"tool_calls": [{}]}]), "chosen[0]", "a message with 'tool_calls'"),
    (row(score_chosen="high"), "score_chosen", "text, expected a number or null"),
]
UNFIT = [(row(chosen="same  x", rejected="same x"), "equal"), (row(chosen=" </s>"), "control token in the text"),
         (row(prompt="z" * 200), "prompt too long"), (row(chosen="z" * 200), "chosen too long"),
         (row(rejected="z" * 200), "rejected too long"),
         (row(chosen="y" * 200, rejected="z" * 200), "both responses too long")]  # fmt: skip
GOOD = [row(prompt=f"p{i}") for i in range(12)]


@pytest.fixture
def planted(tmp_path) -> Path:
    rows = [*GOOD, *(line for line, *_ in DEFECTS), *(line for line, _ in UNFIT)]
    path = tmp_path / "planted.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in rows))
    return path


@pytest.fixture
def options(tmp_path, planted, monkeypatch) -> Dpo:
    monkeypatch.setitem(os.environ, "PREFTUNE_CACHE", str(tmp_path / "cache"))
    model = make.write_model(tmp_path / "model")
    return Dpo(model=str(model), data=[str(planted)], output=str(tmp_path / "run"), max_steps=2, batch_size=4, eval_prompts=0, report=False,
               threads=1)  # fmt: skip


def test_there_are_thirty_kinds_of_bad_rows():
    assert len({(field, words) for _, field, words in DEFECTS}) == len(DEFECTS) >= 30


@pytest.mark.parametrize(("line", "field", "words"), DEFECTS, ids=[f"{field or 'row'}: {words}"[:50] for _, field, words in DEFECTS])
def test_each_alone_is_refused_with_place_field_and_reason(line, field, words, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_bytes(GOOD[0].encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError) as caught:
        read([path])
    assert str(caught.value).startswith(f"{path}:2: {field + ': ' if field else ''}{words}"), str(caught.value)
    assert (caught.value.line, caught.value.field or "") == (2, field)


def test_the_file_is_refused_by_default_and_nothing_is_written(options):
    with pytest.raises(DataError, match=rf"planted\.jsonl:{len(GOOD) + 1}: not valid JSON"):
        dpo.run(options)
    assert not Path(options.output).exists()


def test_skip_bad_trains_on_the_rest_and_the_manifest_counts_each(options, planted):
    assert dpo.run(replace(options, skip_bad=True)) == 0
    records = json.loads((Path(options.output) / "manifest.json").read_text())["records"]
    assert records["unreadable"] == len(DEFECTS) == sum(records["unreadable_by_reason"].values())
    shown = records["shown"]
    assert len(shown) == len(DEFECTS)
    for number, (said, (_, field, words)) in enumerate(zip(shown, DEFECTS, strict=True), start=len(GOOD) + 1):
        assert said.startswith(f"{planted}:{number}: {field + ': ' if field else ''}{words}")
    kinds = Counter(f"{f.split('[')[0]}: " * bool(f) + w.split(":")[0].split(",")[0].split(" (")[0] for _, f, w in DEFECTS)
    assert records["unreadable_by_reason"] == kinds
    assert records["equal_left_out"] == 1 and records["dropped"] == dict(Counter(kind for _, kind in UNFIT[1:]))
    assert [int(r.split(":")[1]) for r in records["refused"]] == [len(GOOD) + len(DEFECTS) + i for i in range(2, len(UNFIT) + 1)]
    assert records["read"] == len(GOOD) + len(UNFIT) and records["train"] + records["held_out"] == len(GOOD)


def test_data_check_names_every_one(options, planted, capsys):
    assert main(["data", "check", str(planted), "--model", str(options.model), "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    findings = [f for f in findings if f["name"] not in ("shared_prompts", "duplicates")]
    named = sorted(int(w.rpartition(":")[2]) for f in findings for w in f["where"])
    assert named == list(range(len(GOOD) + 1, len(GOOD) + len(DEFECTS) + len(UNFIT) + 1))
