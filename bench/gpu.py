"""A step of ours and of TRL's on a GPU: half a billion random weights, 151,936 words, rows of 2k and 8k tokens. Never run yet.

    python bench/gpu.py                     # every workload; writes bench/results/gpu.json
    python bench/gpu.py 8k --systems ours,ours-flex

bf16 on both sides, the reference computed before, no gradient checkpointing; TRL with its own fused head. The systems stay alive in
turn, one process each; peak memory is that of torch's allocator. 'share' is the operations that a step of ours needs (6 a weight and
token, without attention) over those that a matrix product does in the same seconds. Needs a CUDA device and the extra `[bench]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import speed

MODEL = (151936, 896, 24, 14, 2, 4864)  # as Qwen2.5-0.5B: vocabulary, hidden, layers, heads, key heads, intermediate
SHAPES: dict[str, dict[str, Any]] = {
    "2k": {"model": MODEL, "prompt": (1024, 1024), "response": (1023, 1023), "records": 4, "k": 2},
    "8k": {"model": MODEL, "prompt": (6144, 6144), "response": (2047, 2047), "records": 1, "k": 2},
}
SYSTEMS = ("ours", "ours-flex", "ours-compiled", "trl", "trl-pure")


def matrix_rate() -> float:
    """TFLOP/s of a large matrix product in bf16 on this device now."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for turn in range(30):
        if turn == 10:
            torch.cuda.synchronize()
            began = time.perf_counter()
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("workloads", nargs="*", default=list(SHAPES))
    reader.add_argument("--systems", default=",".join(SYSTEMS))
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--each", type=int, default=5, help="steps a round")
    reader.add_argument("--count", type=int, default=32, help="records")
    options = reader.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"bench/gpu.py needs a CUDA device, and torch {torch.__version__} finds none; bench/speed.py measures on a processor")
    speed.SHAPES |= SHAPES
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                               "versions": versions, "tflops": matrix_rate(), "workloads": {}}  # fmt: skip
    for name in options.workloads:
        found = speed.measure(f"{name}-bf16", options.rounds, options.each, options.count, 8, options.systems.split(","), device="cuda")
        for label, row in found.items():
            if label.startswith("ours"):
                tokens = SHAPES[name]["records"] * (SHAPES[name]["prompt"][0] + 2 * (SHAPES[name]["response"][0] + 1))
                row["share"] = 6 * row["weights"] * tokens / row["median"] / (results["tflops"] * 1e12)
            print(f"{name:4} {label:14} " + "  ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float)), flush=True)
        results["workloads"][name] = found
    place = Path(__file__).resolve().parent / "results" / "gpu.json"
    place.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
