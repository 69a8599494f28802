"""Every real file that holds preferences or dialogues: `data check`, `data show` and one training step as it lies there, and the counts of
all three against a few lines that know nothing of our code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from preftune.cli import main
from preftune.config import Dpo, Sft
from preftune.stages import dpo, sft


def raw(path: Path) -> list[dict]:
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def folded(text: str) -> str:
    return " ".join(text.split())


def last_turn(text: str) -> tuple[str, str]:
    at = text.rindex("\n\nAssistant:") + len("\n\nAssistant:")
    return text[:at], text[at:]


def pairs_of(name: str, rows: list[dict]) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of every pair, white space folded; rows that hold NUL or an empty answer are none."""
    found = []
    for row in rows:
        if "\\u0000" in json.dumps(row):
            continue
        if name.startswith("tinystories-sentiment/pairs"):
            found.append((row["prompt"], row["chosen"], row["rejected"]))
        elif name.startswith("tinystories-sentiment/kwise4"):
            best, worst = (f(row["responses"], key=lambda r: r["score"])["text"] for f in (max, min))
            found.append((row["prompt"], best, worst))
        elif name.startswith("hh-rlhf"):
            prompt, chosen = last_turn(row["chosen"])
            found.append((prompt, chosen, last_turn(row["rejected"])[1]))
        elif name.startswith("llamafactory"):
            found.append((json.dumps(row["conversations"]), row["chosen"]["value"], row["rejected"]["value"]))
        elif name.startswith("rasbt"):
            found.append((row["instruction"] + "\n\n" + row["input"], row["chosen"], row["rejected"]))
        elif name.startswith("LLMBar"):
            better = row["label"]
            found.append((row["input"], row[f"output_{better}"], row[f"output_{3 - better}"]))
        else:
            stack = [(row["prompt"], row["prompt"]["text"])]
            while stack:
                node, path = stack.pop()
                ranked = sorted((r for r in node["replies"] if r.get("rank") is not None), key=lambda r: r["rank"])
                found += [(path, a["text"], b["text"]) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
                stack += [(r, path + "\n" + r["text"]) for r in node["replies"]]
    return [(p, folded(c), folded(r)) for p, c, r in found if c.strip() and r.strip()]


FILES = ["tinystories-sentiment/pairs.jsonl", "tinystories-sentiment/kwise4.jsonl", "hh-rlhf/harmless-base-test-first400.jsonl",
         "llamafactory/dpo_en_demo.json", "llamafactory/dpo_zh_demo.json", "rasbt-preference/instruction-data-with-preference.json",
         "LLMBar/Natural.json", "oasst/en_100_tree.jsonl"]  # fmt: skip
UNPAIRED = {"llamafactory/kto_en_demo.json": "labels", "rasbt-preference/instruction-data.json": "demonstrations"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "PREFTUNE_CACHE", str(tmp_path / "cache"))


def checked(capsys, path: Path, *words: str) -> dict:
    assert main(["data", "check", str(path), "--json", *words]) in (0, 3)
    return json.loads(capsys.readouterr().out)


def shown(capsys, path: Path, model: Path, row: int) -> str:
    words = ["data", "show", "--model", str(model), "--data", str(path), "--row", str(row), "--skip-bad", "--offline"]
    assert main([*words, "--max-length", "100000"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_preferences(name, shared_data, tmp_path, capsys):
    path, model = shared_data / name, shared_data / "stories260K" / "hf"
    rows = raw(path)
    wanted = pairs_of(name, rows)
    source = path
    if "kwise4" in name:  # scores only, until judgements are made of them
        assert checked(capsys, path)["audit"]["scored"] == 1500
        source = tmp_path / "judged.jsonl"
        assert main(["data", "convert", "--data", str(path), "--output", str(source), "--from-scores", "best-worst"]) == 0
    facts = checked(capsys, source)
    audit, true = facts["audit"], [p for p in wanted if p[1] != p[2]]
    assert audit["pairs"] == len(wanted) and audit["equal"] == len(wanted) - len(true)
    assert audit["length_gap"] == pytest.approx(sum(len(c) - len(r) for _, c, r in true) / len(true))
    assert audit["longer_chosen"] == pytest.approx(sum(len(c) > len(r) for _, c, r in true) / len(true))
    assert audit["chosen_characters"] == pytest.approx(sum(len(c) for _, c, _ in wanted) / len(wanted))
    known = set()
    repeated = against = 0
    for prompt, chosen, rejected in true:
        repeated += (prompt, chosen, rejected) in known
        against += (prompt, rejected, chosen) in known
        known.add((prompt, chosen, rejected))
    assert (audit["duplicates"], audit["contradicting"]) == (repeated, against)
    assert facts["counts"]["rows"] == len(rows)
    text = shown(capsys, source, model, 1)
    assert re.search(r"^response 0: (better|worse) than ", text, re.MULTILINE) and "\n  trained " in text
    output = tmp_path / "run"
    scores = "kwise4" in name  # the one whose reference log-probs would take most of the time: a part of it
    options = Dpo(model=str(model), data=[str(path)], output=str(output), max_steps=1, batch_size=2, eval_prompts=0, report=False,
                  threads=1, skip_bad=True, allow=["equal"], holdout=0.0, micro_tokens=2048, max_records=200 if scores else None,
                  from_scores="best-worst" if scores else None)  # fmt: skip
    assert dpo.run(options) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    records = manifest["records"]
    assert manifest["audit"] == audit or (scores and manifest["audit"]["pairs"] == 200)
    assert records["read"] == records["merged"] + records["kept"] + sum(records["dropped"].values())
    assert records["train"] == records["kept"] and json.loads((output / "results.json").read_text())["steps"] == 1


@pytest.mark.parametrize("name", UNPAIRED)
def test_labels_and_demonstrations(name, shared_data, tmp_path, capsys):
    path, model, kind = shared_data / name, shared_data / "stories260K" / "hf", UNPAIRED[name]
    rows = raw(path)
    good = [r for r in rows if (r["messages"][-1]["content"] if kind == "labels" else r["output"]).strip()]
    facts = checked(capsys, path)
    assert facts["audit"]["labels"] == (len(good) if kind == "labels" else 0) and facts["audit"]["pairs"] == 0
    assert facts["counts"]["records"] == len(good) and facts["audit"]["unjudged"] == (0 if kind == "labels" else len(good))
    assert ("desirable" in shown(capsys, path, model, 1)) == (kind == "labels")
    output = tmp_path / "run"
    shared = {"model": str(model), "data": [str(path)], "output": str(output), "max_steps": 1, "batch_size": 2, "eval_prompts": 0,
              "report": False, "threads": 1, "skip_bad": True, "holdout": 0.0, "micro_tokens": 2048}  # fmt: skip
    assert (dpo.run(Dpo(**shared, loss="kto")) if kind == "labels" else sft.run(Sft(**shared))) == 0
    records = json.loads((output / "manifest.json").read_text())["records"]
    assert records["read"] == len(good) == records["merged"] + records["kept"] + sum(records["dropped"].values())
