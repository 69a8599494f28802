"""The demo does what it says: one whole run at its real settings, and a short one in Chinese on settings meant to break.

What other seeds give is measured in docs/demo.md.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preftune import cli, grammar
from preftune.config import Demo, Dpo
from preftune.errors import UsageError
from preftune.formats import read
from preftune.records import Message, Record, Response
from preftune.stages import demo
from preftune.tokens import encode, encode_prompt, make_codec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))


def test_the_whole_demo(tmp_path, capsys):
    """Fewer than 2% unparsable at the start, at most 3% after, reward up by an interval, below pi* and most of the way there."""
    folder = tmp_path / "demo"
    assert demo.run(Demo(output=str(folder), threads=1)) == 0
    told = json.loads((folder / "demo.json").read_text())
    before, after, best = told["rows"]
    assert before["unparsable"]["mean"] < 0.02 and after["unparsable"]["mean"] <= 0.03
    assert after["reward"]["low"] > before["reward"]["high"] and after["reward"]["high"] < best["reward"]["low"]
    gained = (after["reward"]["mean"] - before["reward"]["mean"]) / (best["reward"]["mean"] - before["reward"]["mean"])
    assert gained > 0.4 and 0 < after["kl"]["mean"] < best["kl"]["mean"] and best["unparsable"]["mean"] < 1e-3
    results = json.loads((folder / "dpo" / "results.json").read_text())
    assert results["paired_reward"]["low"] > 0
    # The estimate on fresh samples agrees with the sum over all replies.
    drawn = results["after"]
    assert abs(drawn["kl_sequence_rb"] - after["kl"]["mean"]) < 5 * drawn["kl_sequence_rb_se"] + 0.02
    assert abs(drawn["reward"] - after["reward"]["mean"]) < 4 * drawn["reward_se"]
    page = (folder / "dpo" / "report.html").read_text()
    assert "Beside the exact optimum" in page and "optimum pi*" in page
    out = capsys.readouterr().out
    assert "true reward" in out and "preftune chat" in out
    assert len(read([folder / "pairs.jsonl"]).records) > 200
    with pytest.raises(UsageError, match="not empty"):
        demo.run(Demo(output=str(folder)))


@pytest.mark.parametrize("recipe", [demo.RECIPE, demo.BREAK])
def test_again_is_the_command_that_was_run(recipe):
    """The last line printed, as the command line reads it, has the settings of the recipe and not those of another."""
    *_, line = demo._lines([], recipe, Path("runs/demo"), Path("report.html"))
    _, words = cli.split_verb(shlex.split(line)[2:])
    given, _ = cli.read_words(words, Dpo)
    found = tuple(given[name][0] for name in ("loss", "beta", "lr", "batch_size"))
    assert found == (recipe.loss, recipe.beta, recipe.rate, recipe.batch)


def test_the_report_says_how_much_of_the_optimum_was_reached():
    """Golden numbers: -0.4 -> 0.6 of 1.6 is 50%; at beta 0.5, KL 0.4 and 1.6, the objective goes -0.4 -> 0.4 of 0.8: 67%."""
    rows = [{"model": m, **{k: {"mean": v, "low": v, "high": v} for k, v in zip(("reward", "kl", "unparsable"), values, strict=True)}}
            for m, values in (("before", (-0.4, 0, 0.01)), ("after DPO", (0.6, 0.4, 0.25)), ("optimum pi*", (1.6, 1.6, 0)))]  # fmt: skip
    results = {"before": {"sample_length": 16.0}, "after": {"sample_length": 21.5, "eval/displacement": -3.25}}
    recipe = replace(demo.BREAK, beta=0.5)
    (plain,) = demo._extra(rows, recipe, Demo(), results)["paragraphs"]
    assert "by +1.00, 50% of the way" in plain and "it has 67%" in plain
    broken = " ".join(demo._extra(rows, recipe, Demo(break_=True), results)["paragraphs"])
    assert "beta 0.5" in broken and "learning rate of 0.002" in broken and "lost 3.2 nats" in broken
    assert "1.0% before, 25.0% after" in broken and "16.0 tokens a sampled reply before, 21.5 after" in broken


def test_a_short_chinese_demo_on_breaking_settings(tmp_path):
    recipe = replace(demo.BREAK, sft_steps=60, samples=8)
    assert demo.run(Demo(output=str(tmp_path / "zh"), language="zh", break_=True, threads=1), recipe) == 0
    page = (tmp_path / "zh" / "dpo" / "report.html").read_text()
    assert "wrong on purpose" in page and "(displacement)" in page and "tokens a sampled reply" in page
    assert len(json.loads((tmp_path / "zh" / "demo.json").read_text())["rows"]) == 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_chat_writes_the_prompts_that_the_model_was_trained_on(language):
    codec, table, prompt = make_codec(demo.make_tokenizer(language)), grammar.table(language), grammar.prompts(language)[100]
    said = prompt.removeprefix(table.before).removesuffix(table.after)
    assert encode_prompt(codec, (Message("user", said),)) == encode_prompt(codec, prompt)
    reply = grammar.replies(language, prompt)[7].text
    records = [Record(asked, (Response(reply, True),)) for asked in (prompt, (Message("user", said),))]
    (_, text), (_, turns) = encode(records, codec)
    assert text.responses == turns.responses and text.prompt == turns.prompt


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tokeniser_reads_back_every_dialogue(language):
    tokenizer = demo.make_tokenizer(language)
    swept = 0
    for prompt in grammar.prompts(language)[::17]:
        for reply in grammar.replies(language, prompt)[::11]:
            ids = tokenizer.backend_tokenizer.encode(prompt + reply.text, add_special_tokens=False).ids
            assert tokenizer.backend_tokenizer.decode(ids) == prompt + reply.text and tokenizer.unk_token_id not in ids
            swept += 1
    assert swept > 500
    odd = "toaster é 你 🙂"
    assert tokenizer.backend_tokenizer.decode(tokenizer.backend_tokenizer.encode(odd, add_special_tokens=False).ids) == odd


def test_the_optimum_beats_every_other_policy_at_its_beta():
    """exact_rows' pi* against random policies over one prompt's outcomes, by the objective it maximises."""
    rng = np.random.default_rng(0)
    ref = np.log(rng.dirichlet(np.ones(6)))
    reward, beta = rng.normal(size=6), 0.3
    tilted = ref + reward / beta
    best = tilted - np.logaddexp.reduce(tilted)

    def value(logp: np.ndarray) -> float:
        return float((np.exp(logp) * reward).sum() - beta * (np.exp(logp) * (logp - ref)).sum())

    assert value(best) == pytest.approx(beta * np.logaddexp.reduce(tilted))
    assert all(value(np.log(rng.dirichlet(np.ones(6)))) < value(best) for _ in range(200))


def test_break_is_the_same_world_with_the_levers_turned():
    changed = {k for k, v in vars(demo.BREAK).items() if v != vars(demo.RECIPE)[k]}
    assert changed == {"beta", "rate", "loss"}
    assert Path(demo.__file__).name == "demo.py"
