"""A round of on-policy training beside TRL's in one run: sampling, scoring, reading, and the steps on what was sampled.

    python bench/ppo.py [ROUNDS]        # writes bench/results/ppo.txt

The same random Llama, prompts, answers per prompt, length of answers, passes, minibatches, reward (a function of the token ids), KL weight
and one thread. Each system is a process of its own that stays alive, and rounds go through them in turn (`speed.serve`). A round of TRL
is what its trainer does between two generations, held by a callback. TRL 1.16 has no PPO trainer any more: its RLOO stands beside our
RLOO, its GRPO beside our groups; our PPO, with a value model, is told alone. Answers hardly ever end before their limit, for either.
Needs the extra `[bench]`.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import speed

RESULTS = speed.ROOT / "bench" / "results" / "ppo.txt"
MODEL = (4096, 256, 4, 4, 4, 704)  # as speed.SHAPES has it: 5.3 million weights
PROMPTS, K, PASSES, PARTS, BETA, RATE = 8, 4, 2, 2, 0.05, 1e-5
SHAPES: dict[str, dict[str, Any]] = {
    "long prompts": {"model": MODEL, "prompt": (128, 256), "response": 32},
    "short prompts": {"model": MODEL, "prompt": (16, 48), "response": 48},
}
KINDS = {"rloo": ("ours", "trl"), "group": ("ours", "trl"), "gae": ("ours",)}


def prompts_of(shape: dict[str, Any], count: int = 256) -> list[list[int]]:
    """Random ids, lengths uniform in their range; the first three ids are special tokens."""
    rng = random.Random(speed.SEED)
    return [[rng.randrange(3, MODEL[0]) for _ in range(rng.randint(*shape["prompt"]))] for _ in range(count)]


def reward(ids: Sequence[int]) -> float:
    """Share of even ids."""
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


def ours(kind: str, shape: dict[str, Any], folder: Path) -> Iterator[None]:
    """A round at every call."""
    import numpy as np

    from preftune import engine, models, rollouts
    from preftune.store import Store, from_ids
    from preftune.tokens import make_codec

    (policy, tokenizer), (frozen, _) = (models.load(str(folder), offline=True) for _ in range(2))
    asked = from_ids(prompts_of(shape), [[(3,)]] * 256)
    order = rollouts.Rounds(len(asked), PROMPTS, PROMPTS // PARTS, PASSES, 1e9, speed.SEED)

    def scores(store: Store, codec: Any, texts: Any) -> np.ndarray:
        answers = np.flatnonzero(store.response >= 0)
        return np.array([reward(store.tokens[store.start[s] : store.start[s + 1]].tolist()) for s in answers])

    value = rollouts.Value(MODEL[1]) if kind == "gae" else None
    learner = rollouts.Learner(policy, value)
    source = rollouts.Source(policy, value, frozen, make_codec(tokenizer), asked, lambda record: "", scores, k=K,
                             max_tokens=shape["response"], temperature=1.0, eos_penalty=0.0, seed=speed.SEED, micro_tokens=8192,
                             device="cpu")  # fmt: skip
    credit = rollouts.Credit(kind, in_reward=kind != "group", cap=2.0)
    surrogate = rollouts.Surrogate(kind, whole=kind == "rloo", kl="k3" if kind == "group" else "reward", beta=BETA)
    state = engine.make_state(learner, rate=lambda step: RATE, clip=1.0)
    batches = rollouts.steps(source, order, rollouts.Kept(beta=BETA), partial(rollouts.credited, credit), np.arange(len(asked)), start=0,
                             total=10**9)  # fmt: skip
    trained = engine.train(state, batches, surrogate)
    while True:
        for _ in range(PASSES * PARTS):
            next(trained)
        yield


def trl(kind: str, shape: dict[str, Any], folder: Path) -> Iterator[None]:
    """The same of TRL's trainer."""
    import logging
    import threading
    import warnings

    from datasets import Dataset
    from datasets.utils import disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    config, trainer = {"rloo": (RLOOConfig, RLOOTrainer), "group": (GRPOConfig, GRPOTrainer)}[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": tokenizer.decode(ids)} for ids in prompts_of(shape)]
    assert all(tokenizer(row["prompt"]).input_ids == ids for row, ids in zip(rows, prompts_of(shape), strict=True)), "text is ids"
    options = config(output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS * K // PARTS, steps_per_generation=PARTS,
                     num_iterations=PASSES, num_generations=K, max_completion_length=shape["response"], beta=BETA, learning_rate=RATE,
                     lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, max_steps=10**6, save_strategy="no",
                     report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", optim="adamw_torch_fused",
                     seed=speed.SEED)  # fmt: skip
    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    class Hold(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.acquire()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done.release()

    def scored(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward(ids) for ids in completion_ids]

    made = trainer(model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=scored, args=options,
                   train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Hold()])  # fmt: skip
    made.callback_handler.callbacks = [c for c in made.callback_handler.callbacks if "Printer" not in type(c).__name__]
    threading.Thread(target=made.train, daemon=True).start()
    while True:
        for _ in range(PASSES * PARTS):
            turn.release()
            done.acquire()
        yield


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a round with least and most, and CPU seconds, of every system."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        speed.write_model(SHAPES[name], folder)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        log = sys.stderr if os.environ.get("BENCH_LOG") else subprocess.DEVNULL
        workers, found = {}, {}
        for kind, systems in KINDS.items():
            for system in systems:
                words = [sys.executable, __file__, "--serve", system, kind, name, str(folder)]
                process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
                workers[f"{kind} {system}"], found[f"{kind} {system}"] = process, {"seconds": [], "cpu": []}
                speed.answer(process)
        for turn in range(rounds + 1):  # the first round warms up
            for label, process in workers.items():
                process.stdin.write("1\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                got = speed.answer(process)
                if turn:
                    found[label]["seconds"] += got["seconds"]
                    found[label]["cpu"] += [got["cpu"]]
        for process in workers.values():
            process.kill()
    return found


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        import torch

        torch.set_num_threads(1)
        system, kind, name, folder = sys.argv[2:]
        speed.serve({"ours": ours, "trl": trl}[system](kind, SHAPES[name], Path(folder)), {}, 0.0)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl"))
    lines = [f"{speed.cpu_name()}, one thread each{options.note and ', ' + options.note}, {time.strftime('%Y-%m-%d')}; {versions}",
             f"python bench/ppo.py {options.rounds}",
             f"A round: {PROMPTS} prompts x {K} answers, {PASSES} passes of {PARTS} steps, beta {BETA:g}, fp32; 5.3M weights, {MODEL[0]} "
             "words. Medians [least, most] of one run, in turn", ""]  # fmt: skip
    for name, shape in SHAPES.items():
        lines.append(f"{name}: {shape['prompt'][0]}-{shape['prompt'][1]} tokens, answers of {shape['response']}")
        found = measure(name, options.rounds)
        for label, row in found.items():
            seconds, cpu = row["seconds"], row["cpu"]
            lines.append(f"  {label:11} {middle(seconds):6.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]   CPU {middle(cpu):6.2f} s "
                         f"[{min(cpu):.2f}, {max(cpu):.2f}]")  # fmt: skip
        for kind in ("rloo", "group"):
            one, two = found[f"{kind} ours"], found[f"{kind} trl"]
            ratio = {unit: middle(two[unit]) / middle(one[unit]) for unit in ("seconds", "cpu")}
            lines.append(f"  {kind}: {ratio['seconds']:.2f}x as fast as TRL, {ratio['cpu']:.2f}x by CPU seconds")
        print("\n".join(lines[-8:]), flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
