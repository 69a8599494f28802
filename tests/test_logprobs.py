"""`preftune logprobs` against a plain transformers forward with masks made by hand, on real English and Chinese records.

The shared story model has 512 positions; its rotary positions go on as far as one likes, so a copy with a larger window scores all.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.config import Logprobs
from preftune.stages import logprobs


@pytest.fixture(scope="module")
def wide(shared_data_or_skip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    for file in (shared_data_or_skip / "stories260K" / "hf").iterdir():
        shutil.copy(file, folder / file.name)
        (folder / file.name).chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return folder


@pytest.fixture(scope="module")
def shared_data_or_skip():
    folder = Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else pytest.skip("no shared data")


def by_hand(folder: Path, texts: list[tuple[str, str]]) -> list[float]:
    """log p(response + EOS | BOS + prompt) from transformers alone: right padding, attention mask, labels masked by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out: list[float] = []
    with torch.inference_mode():
        for i in range(0, len(texts), 4):
            rows, starts = [], []
            for prompt, response in texts[i : i + 4]:
                head = tokenizer(prompt, add_special_tokens=False).input_ids
                whole = tokenizer(prompt + response, add_special_tokens=False).input_ids
                assert whole[: len(head)] == head
                rows.append([1, *whole, 2])
                starts.append(1 + len(head))
            longest = max(map(len, rows))
            ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
            logits = model(input_ids=ids, attention_mask=mask).logits
            for row, start, logit in zip(rows, starts, logits, strict=True):
                logp = logit[start - 1 : len(row) - 1].double().log_softmax(-1)
                out.append(sum(logp[torch.arange(len(logp)), torch.tensor(row[start:])].tolist()))
    return out


def compare(folder: Path, data: Path, output: Path, texts: list[tuple[str, str]], count: int) -> None:
    options = Logprobs(model=str(folder), data=[str(data)], output=str(output), max_records=count, threads=1, finish="always")
    assert logprobs.run(options) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 2 * count
    worst = 0.0
    for row, expected in zip(rows, by_hand(folder, texts[: 2 * count]), strict=True):
        assert abs(row["logp"] - expected) <= max(1e-4, 1e-6 * abs(expected)), (row, expected)
        worst = max(worst, abs(row["logp"] - expected))
    print(f"{2 * count} responses, largest difference {worst:.2e} nats")


def test_200_hh_rlhf_records(wide, shared_data_or_skip, tmp_path):
    data = shared_data_or_skip / "hh-rlhf" / "harmless-base-test-first400.jsonl"
    texts = []
    for line in data.open(encoding="utf-8"):
        row = json.loads(line)
        if row["chosen"].endswith(("Assistant:", "Assistant: ")):
            continue  # an empty answer: left out and counted
        for side in ("chosen", "rejected"):
            cut = row[side].rindex("\n\nAssistant:") + len("\n\nAssistant:")
            texts.append((row[side][:cut], row[side][cut:]))
    compare(wide, data, tmp_path / "out.jsonl", texts, 200)


def test_100_chinese_records(wide, shared_data_or_skip, tmp_path):
    rows = json.loads((shared_data_or_skip / "llamafactory" / "dpo_zh_demo.json").read_text(encoding="utf-8"))
    names = {"human": "User", "gpt": "Assistant", "system": "System"}
    short = sorted(rows, key=lambda r: len(json.dumps(r)))
    data = tmp_path / "zh.json"
    data.write_text(json.dumps(short[:100], ensure_ascii=False), encoding="utf-8")
    texts = []
    for row in short[:100]:
        prompt = "\n\n".join(f"{names[t['from']]}: {t['value']}" for t in row["conversations"]) + "\n\nAssistant:"
        texts += [(prompt, " " + row[side]["value"]) for side in ("chosen", "rejected")]
    compare(wide, data, tmp_path / "out.jsonl", texts, 100)
