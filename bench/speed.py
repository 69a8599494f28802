"""Our training step against TRL's in one run: the same model, records, threads and number format, in turn.

    python bench/speed.py                      # every workload; writes bench/results/speed.json
    python bench/speed.py long-bf16 --rounds 3

Each system is a process of its own that stays alive; the rounds go through the systems in turn, a few steps each, so that a noisy
machine is noisy for all. TRL's step is measured inside its own trainer (`DPOTrainer.train`), held between rounds by a callback; its
collation falls outside the measured time, ours inside. Both use the precomputed reference, no gradient checkpointing, fused AdamW.
Peak memory is the process's high-water mark less what it was after the imports. Needs the extra `[bench]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
SEED = 0

# vocabulary, hidden, layers, heads, key heads, intermediate; prompt and response lengths in tokens; records a step; responses each
LLAMA = (8192, 512, 5, 8, 8, 1376)
WIDE = (131072, 128, 8, 4, 4, 384)
SHAPES: dict[str, dict[str, Any]] = {
    "long": {"model": LLAMA, "prompt": (128, 384), "response": (32, 128), "records": 4, "k": 2},
    "short": {"model": LLAMA, "prompt": (16, 48), "response": (64, 192), "records": 4, "k": 2},
    "lists": {"model": LLAMA, "prompt": (128, 384), "response": (32, 128), "records": 2, "k": 4},
    "wide": {"model": WIDE, "prompt": (128, 128), "response": (383, 383), "records": 8, "k": 2},
}
WORKLOADS = ("long-bf16", "long-fp32", "short-bf16", "short-fp32", "lists-bf16", "lists-fp32", "wide-fp32", "wide-bf16")


def records(shape: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Records of random words: a prompt, k responses (the first is best, the last worst), lengths uniform in their ranges."""
    import random

    rng = random.Random(SEED)

    def words(low: int, high: int) -> str:
        return "".join(f" w{rng.randrange(shape['model'][0] - 8)}" for _ in range(rng.randint(low, high)))

    return [{"prompt": words(*shape["prompt"]), "responses": [words(*shape["response"]) for _ in range(shape["k"])]}
            for _ in range(count)]  # fmt: skip


def write_model(shape: dict[str, Any], folder: Path) -> None:
    """A Llama with random weights and a tokeniser of whole words: text and ids are the same thing for both systems."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size, hidden, layers, heads, key_heads, inner = shape["model"]
    names = ["<pad>", "<eos>", "<unk>"] + [f" w{i}" for i in range(size - 3)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(" ", "merged_with_next"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, eos_token_id=1,
                         pad_token_id=0, num_key_value_heads=key_heads, intermediate_size=inner, max_position_embeddings=2048,
                         tie_word_embeddings=size > 100_000)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)


# ---------------------------------------------------------------- what runs in a process of its own


def memory(name: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most so far."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) / 1024


def serve(steps: Iterator[None], ready: dict[str, float], baseline: float, device: str = "cpu") -> None:
    """Answer 'N' on stdin with the seconds of N steps."""
    import torch

    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds, cpu = [], time.process_time()
        for _ in range(int(line)):
            began = time.perf_counter()
            next(steps)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = memory("VmHWM") - baseline if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "peak": peak}), flush=True)


def ours(shape: dict[str, Any], dtype: str, folder: Path, count: int, threads: int, device: str) -> None:
    import torch

    from preftune import engine, models, objectives, reference, store
    from preftune.batches import Order
    from preftune.records import Judgement, Record, Response
    from preftune.tokens import make_codec

    torch.set_num_threads(threads)
    baseline = memory("VmRSS")
    dtype, _, way = dtype.partition("-")
    model, tokenizer = models.load(str(folder), dtype=dtype, device=device, offline=True)
    if way == "flex":
        models.use_flex(model)
    for layer in model.get_decoder().layers if way == "compiled" else ():
        layer.compile(dynamic=True)
    began = time.perf_counter()
    codec = make_codec(tokenizer, template="auto", bos="auto", finish="always")
    k = shape["k"]
    orders = tuple(Judgement(order=((i,), (j,))) for i in range(k) for j in range(i + 1, k))
    data = [Record(prompt=r["prompt"], responses=tuple(Response(text=t) for t in r["responses"]), judgements=orders)
            for r in records(shape, count)]  # fmt: skip
    kept, intake = store.build(data, codec, max_length=None)
    assert len(kept) == count, intake.refused[0]
    encoded = time.perf_counter() - began
    column = {"reference": reference.compute(model, kept, micro_tokens=8192, device=device)}
    objective = objectives.preference([(1.0, "sigmoid", {"beta": 0.1})])
    state = engine.make_state(model, rate=lambda step: 1e-5, clip=1.0)
    order = Order(len(kept), shape["records"], 1000, SEED)
    import numpy as np

    batches = engine.steps(kept, np.arange(len(kept)), order, start=0, total=10**9, micro_tokens=8192, columns=column, share=True,
                           device=device)  # fmt: skip
    ready = {"encode": encoded, "prepare": time.perf_counter() - began, "tokens": float(len(kept.tokens)),
             "weights": float(models.parameters_of(model))}  # fmt: skip
    serve((None for _ in engine.train(state, batches, objective, ahead=True)), ready, baseline, device)


def trl(shape: dict[str, Any], dtype: str, folder: Path, count: int, threads: int, device: str) -> None:
    import logging
    import threading
    import warnings

    import torch
    from datasets import Dataset
    from datasets.utils import disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    torch.set_num_threads(threads)
    baseline = memory("VmRSS")
    weights, bf16 = {"fp32": ("float32", False), "bf16": ("float32", True), "bf16-pure": ("bfloat16", False)}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, weights))
    began = time.perf_counter()
    k = shape["k"]
    rows = [{"prompt": r["prompt"], "chosen": r["responses"][i], "rejected": r["responses"][j]}
            for r in records(shape, count) for i in range(k) for j in range(i + 1, k)]  # fmt: skip
    pairs = k * (k - 1) // 2
    config = DPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=shape["records"] * pairs, learning_rate=1e-5, bf16=bf16,
                       precompute_ref_log_probs=True, gradient_checkpointing=False, max_steps=10**6, save_strategy="no", report_to="none",
                       max_length=None, use_cpu=device == "cpu", disable_tqdm=True, logging_strategy="no", precompute_ref_batch_size=8,
                       dataloader_drop_last=True, optim="adamw_torch_fused")  # fmt: skip
    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    class Hold(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.acquire()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done.release()

    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Hold()],
                         processing_class=AutoTokenizer.from_pretrained(folder))  # fmt: skip
    encoded = time.perf_counter() - began
    trainer.get_train_dataloader()  # computes the reference column
    prepared = time.perf_counter() - began
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if "Printer" not in type(c).__name__]
    threading.Thread(target=trainer.train, daemon=True).start()

    def steps() -> Iterator[None]:
        while True:
            turn.release()
            done.acquire()
            yield

    serve(steps(), {"encode": encoded, "prepare": prepared}, baseline, device)


SYSTEMS = {"ours": ours, "trl": trl}


# ---------------------------------------------------------------- the parent


def measure(workload: str, rounds: int, each: int, count: int, threads: int, systems: list[str], device: str = "cpu") -> dict[str, Any]:
    """Every system's median seconds a step with quartiles, peak MB, preparation; and the ratios to the best TRL."""
    name, dtype = workload.rsplit("-", 1)
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(shape, folder)
        kinds = {"ours": ("ours", dtype), "trl": ("trl", dtype)} | ({"trl-pure": ("trl", "bf16-pure")} if dtype == "bf16" else {})
        kinds |= {f"ours-{way}": ("ours", f"{dtype}-{way}") for way in ("flex", "compiled")}
        kinds = {k: v for k, v in kinds.items() if k in systems}
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        workers, found = {}, {}
        for label, (system, kind) in kinds.items():
            words = [sys.executable, __file__, "--serve", system, name, kind, str(folder), str(count), str(threads), device]
            log = sys.stderr if os.environ.get("BENCH_LOG") else subprocess.DEVNULL
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
            workers[label] = process
            found[label] = {"seconds": [], "cpu": 0.0, **answer(process)}
        for turn in range(rounds + 1):  # the first round warms up
            for label, process in workers.items():
                process.stdin.write(f"{each}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                got = answer(process)
                found[label]["peak"] = got["peak"]
                found[label]["seconds"] += got["seconds"] if turn else []
                found[label]["cpu"] += got["cpu"] / (rounds * each) if turn else 0.0
        for process in workers.values():
            process.kill()
    out: dict[str, Any] = {}
    for label, values in found.items():
        ordered = sorted(values.pop("seconds"))
        low, median, high = (ordered[len(ordered) * q // 4] for q in (1, 2, 3))
        out[label] = values | {"median": median, "low": low, "high": high, "steps": len(ordered)}
    others = [label for label in out if label.startswith("trl")]
    if "ours" in out and others:
        fastest, smallest = min(others, key=lambda x: out[x]["median"]), min(others, key=lambda x: out[x]["peak"])
        out["ratio"] = {"speed": out[fastest]["median"] / out["ours"]["median"], "against": fastest,
                        "cpu": out[fastest]["cpu"] / out["ours"]["cpu"],
                        "memory": out["ours"]["peak"] / out[smallest]["peak"], "memory_against": smallest,
                        "same_format_speed": out["trl"]["median"] / out["ours"]["median"]}  # fmt: skip
    return out


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON; libraries may print other lines."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit(f"a measured process ended with {process.wait()}; run again with BENCH_LOG=1 to see why")


def machine_rates(threads: int) -> dict[str, float]:
    """GFLOP/s of a 1024x512x1376 matrix product on this machine now: the limit that a step is held against."""
    import torch

    torch.set_num_threads(threads)
    out = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(1024, 512, dtype=kind), torch.randn(512, 1376, dtype=kind)
        best = 1e9
        for _ in range(60):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
        out[name] = 2 * 1024 * 512 * 1376 / best / 1e9
    return out


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        system, name, dtype, folder, count, threads, device = sys.argv[2:]
        shape = SHAPES[name] if name in SHAPES else importlib.import_module("gpu").SHAPES[name]
        SYSTEMS[system](shape, dtype, Path(folder), int(count), int(threads), device)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=3, help="steps a round")
    parser.add_argument("--count", type=int, default=64, help="records")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--systems", default="ours,trl,trl-pure")
    parser.add_argument("--output", default=str(ROOT / "bench" / "results" / "speed.json"))
    options = parser.parse_args()
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": cpu_name(), "cores": os.cpu_count(),
                               "threads": options.threads, "versions": versions, "gflops": machine_rates(options.threads),
                               "workloads": {}}  # fmt: skip
    for workload in options.workloads:
        found = measure(workload, options.rounds, options.each, options.count, options.threads, options.systems.split(","))
        results["workloads"][workload] = found
        for label, row in found.items():
            if label == "ratio":
                print(f"{workload:12} {row['speed']:.2f}x as fast as {row['against']} ({row['cpu']:.2f}x by CPU seconds), "
                      f"{row['memory']:.2f} of its memory", flush=True)  # fmt: skip
                continue
            print(f"{workload:12} {label:9} {row['median']:.3f} s [{row['low']:.3f}, {row['high']:.3f}]  cpu {row['cpu']:.3f} s  "
                  f"peak {row['peak']:.0f} MB  encode {row['encode']:.2f} s  prepare {row['prepare']:.2f} s", flush=True)  # fmt: skip
    if tuple(options.workloads) == WORKLOADS or "--output" in " ".join(sys.argv):
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n")


def cpu_name() -> str:
    """The processor as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
