"""Where the time of a training step goes, as text: once with every prompt computed once, once with a row per response.

    python bench/hotspots.py [long-bf16] [--threads 2]      # writes bench/results/profile-WORKLOAD.txt

The model and records are those of bench/speed.py. Operators by their own CPU time over three steps after one to warm up.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
STEPS, ROWS = 3, 14


def profiled(shape: dict[str, Any], dtype: str, folder: Path, *, share: bool) -> str:
    """The table of one way of computing the same steps."""
    import numpy as np
    import speed
    from torch.profiler import ProfilerActivity, profile

    from preftune import engine, models, objectives, store
    from preftune.batches import Order
    from preftune.records import Judgement, Record, Response
    from preftune.tokens import make_codec

    model, tokenizer = models.load(str(folder), dtype=dtype, offline=True)
    codec = make_codec(tokenizer, template="auto", bos="auto", finish="always")
    data = [Record(prompt=r["prompt"], responses=tuple(Response(text=t) for t in r["responses"]), judgements=(Judgement(((0,), (1,))),))
            for r in speed.records(shape, (STEPS + 1) * shape["records"])]  # fmt: skip
    kept, _ = store.build(data, codec, max_length=None)
    column = {"reference": np.zeros(len(kept.tokens), np.float32)}
    objective = objectives.preference([(1.0, "sigmoid", {"beta": 0.1})])
    state = engine.make_state(model, rate=lambda step: 1e-5, clip=1.0)
    order = Order(len(kept), shape["records"], 1, 0)
    steps = engine.steps(kept, np.arange(len(kept)), order, start=0, total=order.steps, micro_tokens=8192, columns=column, share=share,
                         device="cpu")  # fmt: skip
    run = engine.train(state, steps, objective)
    next(run)
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        taken = len(list(run))
    assert taken == STEPS
    seconds = (time.perf_counter() - began) / STEPS
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    lines = [f"{'a prompt once' if share else 'a row per response'}: {seconds:.2f} s a step (with the profiler), "
             f"{state.tokens / (STEPS + 1):,.0f} tokens a step"]  # fmt: skip
    lines += [f"  {row.self_cpu_time_total / whole:6.1%}  {row.self_cpu_time_total / 1e6 / STEPS:7.3f} s  {row.count // STEPS:6d} calls  "
              f"{row.key}" for row in rows[:ROWS]]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    import speed
    import torch

    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("workload", nargs="?", default="long-bf16", choices=speed.WORKLOADS)
    reader.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = reader.parse_args()
    torch.set_num_threads(options.threads)
    name, dtype = options.workload.rsplit("-", 1)
    with tempfile.TemporaryDirectory() as place:
        speed.write_model(speed.SHAPES[name], Path(place))
        tables = [profiled(speed.SHAPES[name], dtype, Path(place), share=share) for share in (False, True)]
    head = f"{options.workload}, {options.threads} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    text = "\n\n".join([head, *tables]) + "\n"
    (ROOT / "bench" / "results" / f"profile-{options.workload}.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
