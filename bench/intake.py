"""From a file to packed batches, ours against TRL's: records a second of one process, in one run.

    python bench/intake.py [RECORDS]           # writes bench/results/intake.json

Ours reads, checks (`data check`'s findings), encodes and packs every record; TRL reads, encodes and collates; both in one
process. The text is this project's own pages, cut into prompts and answers; the tokeniser a byte-level BPE trained on them; the
model tiny. Rounds alternate, each in a fresh process; libraries are imported before the clock starts. Needs the extra `[bench]`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
ROUNDS = 3


def write(folder: Path, count: int) -> None:
    """pairs.jsonl and model/: prompts of 20 to 60 words, answers of 20 to 60."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pages = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").rglob("*.md"))]
    words, rng = [w for page in pages for w in page.split() if w.isascii()], random.Random(0)

    def text() -> str:
        start, size = rng.randrange(len(words) - 60), rng.randint(20, 60)
        return " ".join(words[start : start + size])

    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(), "chosen": " " + text(), "rejected": " " + text()}) + "\n")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(pages, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder / "model")
    config = LlamaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(config).save_pretrained(folder / "model", safe_serialization=True)


def ours(folder: Path) -> None:
    from transformers import AutoTokenizer

    from preftune import audit, formats, store
    from preftune.batches import Order, make_step
    from preftune.tokens import make_codec

    codec = make_codec(AutoTokenizer.from_pretrained(folder / "model"), template="auto", bos="auto", finish="always")
    began = time.perf_counter(), time.process_time()
    records = formats.read([folder / "pairs.jsonl"]).records
    audit.inspect(records)
    built, intake = store.build(records, codec, max_length=None)
    order = Order(len(built), 8, 1, 0)
    tokens = sum(len(b.tokens) for i in range(order.steps) for b in make_step(built, order.records_of(i), micro_tokens=8192).micro)
    assert tokens == len(built.tokens) and not intake.dropped
    report(began, len(built))


def trl(folder: Path) -> None:
    import logging
    import warnings

    from datasets import load_dataset
    from datasets.utils import disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    config = DPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=8, report_to="none", max_length=None, use_cpu=True,
                       bf16=False, disable_tqdm=True, dataset_num_proc=None)  # fmt: skip
    began = time.perf_counter(), time.process_time()
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / f"cache{os.getpid()}"))
    trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    count = sum(len(batch["input_ids"]) // 2 for batch in trainer.get_train_dataloader())
    report(began, count)


def report(began: tuple[float, float], count: int) -> None:
    print(json.dumps({"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1], "records": count}), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        {"ours": ours, "trl": trl}[sys.argv[2]](Path(sys.argv[3]))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), count)
        for _ in range(ROUNDS):
            for system, rows in found.items():
                words = [sys.executable, __file__, "--serve", system, place]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
                rows.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
                assert rows[-1]["records"] == count, rows[-1]
    rates = {system: {kind: count / median(row[kind] for row in rows) for kind in ("wall", "cpu")} for system, rows in found.items()}
    ratio = {kind: rates["ours"][kind] / rates["trl"][kind] for kind in ("wall", "cpu")}
    versions = {name: metadata.version(name) for name in ("transformers", "tokenizers", "trl", "datasets")}
    result = {"date": time.strftime("%Y-%m-%d"), "records": count, "records_per_second": rates, "ratio": ratio, "rounds": found,
              "versions": versions}  # fmt: skip
    (ROOT / "bench" / "results" / "intake.json").write_text(json.dumps(result, indent=1) + "\n")
    for system, rate in rates.items():
        print(f"{system:5} {rate['wall']:7.0f} records/s of wall time, {rate['cpu']:7.0f} of CPU time")
    print(f"ratio {ratio['wall']:.2f}, by CPU time {ratio['cpu']:.2f}")


if __name__ == "__main__":
    main()
