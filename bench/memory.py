"""Memory as foreseen before a run and as measured in it, a fresh process for each shape and format.

    python bench/memory.py                  # all; writes bench/results/memory.json
    python bench/memory.py long-bf16        # one, its row put among the others

The whole command `preftune dpo` in this process: load, reference column, self-check, evaluation with samples, steps, checkpoints, model.
Measured: VmHWM at its end less VmRSS after the imports and before the model is loaded. Models and records are those of bench/speed.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import speed

HERE = Path(__file__).resolve().parent
SMALL = (1024, 128, 4, 4, 4, 352)
SHAPES: dict[str, dict[str, Any]] = {
    "long": speed.SHAPES["long"] | {"steps": 4},
    "small": {"model": SMALL, "prompt": (128, 384), "response": (32, 128), "records": 8, "k": 2, "steps": 4},
    "wide": speed.SHAPES["wide"] | {"steps": 2, "count": 18},
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "long-fp32": ("long", {}), "long-bf16": ("long", {"dtype": "bf16"}), "long-lora": ("long", {"lora": 8}),
    "small-fp32": ("small", {}), "small-bf16": ("small", {"dtype": "bf16"}),
    "wide-fp32": ("wide", {}), "wide-bf16": ("wide", {"dtype": "bf16"}),
}  # fmt: skip


def one(name: str) -> None:
    """Train, and print what results.json says of memory."""
    from preftune.config import Dpo
    from preftune.stages import dpo

    kind, extra = ROWS[name]
    shape = SHAPES[kind]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = [sys.executable, "-c", f"import memory, speed; from pathlib import Path; "
                                      f"speed.write_model(memory.SHAPES[{kind!r}], Path({str(folder / 'model')!r}))"]  # fmt: skip
        subprocess.run(made, check=True, cwd=HERE)
        rows = [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1]}
                for r in speed.records(shape, shape.get("count", 24))]  # fmt: skip
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.environ["PREFTUNE_CACHE"] = str(folder / "cache")
        dpo.run(Dpo(model=str(folder / "model"), data=[str(folder / "pairs.jsonl")], output=str(folder / "run"),
                    batch_size=shape["records"], epochs=4, max_steps=shape["steps"], holdout=0.1, eval_prompts=4, sample_tokens=32,
                    micro_tokens=16384, threads=1, report=False, finish="always", offline=True, **extra))  # fmt: skip
        print("RESULT " + json.dumps(json.loads((folder / "run" / "results.json").read_text())["memory"]))


def main() -> None:
    """Every row in a process of its own; a table and bench/results/memory.json."""
    import torch

    chosen = sys.argv[1:] or list(ROWS)
    rows = {}
    for name in chosen:
        words = [sys.executable, __file__, "--one", name]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
        rows[name] = found | {"ratio": round(found["estimated"] / found["peak"], 3)}
        mib = {k: f"{v / 2**20:.0f}" for k, v in found.items() if k != "tokens"}
        print(f"{name:11} estimated {mib['estimated']:>5} MiB  measured {mib['peak']:>5} MiB  ratio {rows[name]['ratio']:.2f}   {mib}",
              flush=True)  # fmt: skip
    place = HERE / "results" / "memory.json"
    before = json.loads(place.read_text())["rows"] if place.is_file() else {}
    out = {"made_by": "bench/memory.py", "date": time.strftime("%Y-%m-%d"), "machine": speed.cpu_name(), "cores": os.cpu_count(),
           "threads": 1, "torch": torch.__version__, "rows": before | rows}  # fmt: skip
    place.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["--one"] else main()
