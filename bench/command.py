"""The whole command on real records, ours against TRL's: from start to saved model, each in a fresh process, in turn.

    python bench/command.py [FILE...] [--records 200] [--rounds 3] [--threads 2] [--dtype bf16]

FILE: preference data in any known layout; without one, pairs made of this project's own pages. Both read the same text rows, train
the same 10M-parameter Llama (random weights, a byte-level BPE trained on the rows) for one epoch with the same batch, rate and
precomputed reference, and write the model. Ours is measured twice: as it comes (audit, self-check, ten evaluations, samples with KL,
report, checkpoints) and bare (nothing held out or sampled, no report), which is what TRL's script does. Needs the extra `[bench]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
BATCH, RATE, WINDOW = 8, 1e-5, 2048
BARE = ("--holdout", "0", "--eval-prompts", "0", "--no-report", "--save-every", "1000000", "--keep", "1")


def rows(files: list[str], count: int) -> list[dict[str, str]]:
    """prompt, chosen, rejected as text; dialogues in the plain template, one pair a record."""
    from preftune.formats import read
    from preftune.records import pairs

    def text(part: Any) -> str:
        return part if isinstance(part, str) else " ".join(m.content for m in part)

    def asked(prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt) + "\n\nAssistant:"

    out = []
    for record in read(files, max_records=count).records:
        for pair in list(pairs(record))[:1]:
            chosen, rejected = (text(record.responses[i].text).strip() for i in (pair.chosen, pair.rejected))
            if chosen and rejected and chosen != rejected:
                out.append({"prompt": asked(record.prompt).rstrip(), "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return out


def write(folder: Path, files: list[str], count: int) -> int:
    """pairs.jsonl and model/; the number of pairs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not files:
        sys.path.append(str(ROOT / "bench"))
        import intake

        intake.write(folder, count)
        files = [str(folder / "pairs.jsonl")]
    found = rows(files, count)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(("".join(row.values()) for row in found), trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    model = folder / "model"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=backend.get_vocab_size(), hidden_size=320, num_hidden_layers=4, num_attention_heads=5, eos_token_id=1,
                         pad_token_id=0, intermediate_size=864, max_position_embeddings=WINDOW)  # fmt: skip
    network = LlamaForCausalLM(config)
    network.save_pretrained(model, safe_serialization=True)
    fits = [row for row in found if max(len(backend.encode(row["prompt"] + row[side]).ids) for side in ("chosen", "rejected")) < WINDOW]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fits), encoding="utf-8")
    print(f"{len(fits)} pairs ({len(found) - len(fits)} too long for the window, left out for both); "
          f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters", flush=True)  # fmt: skip
    return len(fits)


def trl(folder: Path, dtype: str) -> None:
    """TRL's own way from the same file to a saved model."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=tempfile.mkdtemp(dir=folder))
    output = tempfile.mkdtemp(dir=folder)
    weights = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=weights)
    config = DPOConfig(output_dir=output, per_device_train_batch_size=BATCH, learning_rate=RATE, num_train_epochs=1, bf16=False,
                       precompute_ref_log_probs=True, precompute_ref_batch_size=BATCH, gradient_checkpointing=False, report_to="none",
                       save_strategy="no", max_length=None, use_cpu=True, disable_tqdm=True, optim="adamw_torch_fused")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)


def command(system: str, folder: Path, dtype: str) -> list[str]:
    """The words that run a system once."""
    if system == "trl":
        return [sys.executable, __file__, "--serve", str(folder), dtype]
    output = tempfile.mkdtemp(dir=folder)
    words = [sys.executable, "-m", "preftune", "dpo", "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--output",
             f"{output}/run", "--batch-size", str(BATCH), "--lr", str(RATE), "--dtype", dtype, "--finish", "always", "--offline",
             "--threads", os.environ["OMP_NUM_THREADS"]]  # fmt: skip
    return words if system == "ours" else [*words, *BARE]


def once(system: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds of wall and CPU time of one run of a fresh process, and its peak memory in MB."""
    log = folder / f"{system}.log"
    cache = tempfile.mkdtemp(dir=folder)  # no run finds another's reference column
    with log.open("w") as out:
        began = time.perf_counter()
        child = subprocess.Popen(command(system, folder, dtype), stdout=out, stderr=out, env=os.environ | {"PREFTUNE_CACHE": cache})
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{system}: {log.read_text()[-2000:]}")
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        trl(Path(sys.argv[2]), sys.argv[3])
        return
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("files", nargs="*")
    reader.add_argument("--records", type=int, default=200)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--threads", type=int, default=os.cpu_count())
    reader.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    options = reader.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found: dict[str, list[dict[str, float]]] = {"ours": [], "bare": [], "trl": []}
    with tempfile.TemporaryDirectory() as place:
        pairs = write(Path(place), options.files, options.records)
        for _ in range(options.rounds):
            for system, runs in found.items():
                runs.append(once(system, Path(place), options.dtype))
    best = median(run["wall"] for run in found["trl"]), median(run["cpu"] for run in found["trl"])
    for system, runs in found.items():
        wall, cpu, peak = (median(run[kind] for run in runs) for kind in ("wall", "cpu", "peak"))
        low, high = min(run["wall"] for run in runs), max(run["wall"] for run in runs)
        print(f"{system:5} {wall:7.1f} s [{low:.1f}, {high:.1f}]  cpu {cpu:7.1f} s  "
              f"peak {peak:5.0f} MB  {pairs / wall:6.2f} pairs/s {best[0] / wall:.2f}x (CPU {best[1] / cpu:.2f}x)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
