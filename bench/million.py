"""One million synthetic preference records: read, audited, tokenised into a mapped store and started on, within bounded memory. The second
stage is a run's own preparation (`pipeline.prepare` with a loss that needs no reference column) and its first optimiser step.

    python bench/million.py [RECORDS]

Each stage runs in a process of its own; peak memory is that process's. The base line is the same process with a thousand records, so
that what libraries take is not counted: the last column is memory per record. Writes bench/results/million.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BASE = 1000
STAGES = ("check", "prepare and first step")


def write(path: Path, count: int) -> None:
    """Prompts of some 40, answers of some 80 and 40 characters."""
    with path.open("w") as out:
        for i in range(count):
            a, b = i % 977, i % 31
            row = {"prompt": f"Question {i}: what is the sum of {a} and {b}?", "rejected": f" I do not know {i % 7919} of them, sorry.",
                   "chosen": f" It is {a + b}, because {a} and {b} make {a + b}; ask me for more like {i}."}  # fmt: skip
            out.write(json.dumps(row) + "\n")


def run(stage: str, path: Path, folder: Path) -> dict[str, float]:
    """One stage in this process."""
    begin = time.perf_counter()
    from preftune import audit, formats

    facts: dict[str, float] = {}
    if stage == "check":
        found = audit.inspect(formats.stream([path], formats.Tally()))
        facts = {"records": found.records, "pairs": found.pairs, "equal": len(found.equal)}
    else:
        import make

        from preftune import engine, pipeline
        from preftune.config import Dpo
        from preftune.readout import packs
        from preftune.stages import dpo

        os.environ["PREFTUNE_CACHE"] = str(folder / "cache")
        make.write_model(folder / "model", max_position_embeddings=512)
        options = Dpo(model=str(folder / "model"), data=[str(path)], output=str(folder / "run"), loss="simpo", batch_size=8, threads=1,
                      holdout=0.001, eval_prompts=8)  # fmt: skip
        setup = pipeline.prepare(dpo.TASK, options)
        ready = time.perf_counter() - begin
        state = engine.make_state(setup.model, rate=lambda step: setup.lr, clip=1.0)
        steps = engine.steps(setup.store, setup.train, setup.order, start=0, total=1, micro_tokens=4096, columns=setup.columns,
                             share=packs(setup.model), device="cpu")  # fmt: skip
        line = next(engine.train(state, steps, setup.objective, where=setup.store.where))
        counts = setup.manifest["records"]
        facts = {"records": counts["read"], "kept": counts["kept"], "train": counts["train"], "held_out": counts["held_out"],
                 "tokens": len(setup.store.tokens), "ready_after": ready, "loss": line["loss"], "grad_norm": line["grad_norm"],
                 "bytes_on_disk": sum(x.nbytes for x in vars(setup.store).values() if hasattr(x, "nbytes"))}  # fmt: skip
    anonymous = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return facts | {"seconds": time.perf_counter() - begin, "peak_mb": peak / 1024, "own_mb_at_end": anonymous / 1024}


def measure(stage: str, count: int) -> dict[str, float]:
    """The stage in a fresh process on a fresh file."""
    with tempfile.TemporaryDirectory(prefix="preftune-million-") as name:
        path, folder = Path(name) / "data.jsonl", Path(name) / "store"
        folder.mkdir()
        write(path, count)
        words = [sys.executable, __file__, "--stage", stage, str(path), str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps(run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    results = {}
    for stage in STAGES:
        small, large = measure(stage, BASE), measure(stage, count)
        own = (large["own_mb_at_end"] - small["own_mb_at_end"]) * 2**20 / (count - BASE)
        results[stage] = {"base": small, "large": large, "own_bytes_per_record": own}
        peaks = f"peak {large['peak_mb']:.0f} MB (with {BASE:,}: {small['peak_mb']:.0f} MB)"
        print(f"{stage}: {count:,} records in {large['seconds']:.0f} s; {peaks}; "
              f"{own:.0f} bytes of own memory a record")  # fmt: skip
    if count >= 1_000_000:
        (ROOT / "bench" / "results" / "million.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
