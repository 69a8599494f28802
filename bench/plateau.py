"""The gate for real: runs of `dpo` and `ppo` that learn, flatten and are stopped, and runs that still learn and are not.

    python bench/plateau.py             # some minutes on one core; writes bench/results/plateau.txt

The demo's grammar and a model of it from scratch, the hidden judge as the reward that is looked at, a learning rate that stays (one that
falls makes its own plateau), 48 held-out prompts with four answers each, twenty evaluations a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataclasses import replace  # noqa: E402

from preftune import grammar, models  # noqa: E402
from preftune.config import Dpo, Ppo  # noqa: E402
from preftune.files import read_json, read_jsonl  # noqa: E402
from preftune.formats import to_json  # noqa: E402
from preftune.stages import demo, dpo, ppo  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "plateau.txt"
LIMIT = {"kl_limit": 4.0, "kl_unit": "sequence"}  # pi* at beta .3 is 1.6 nats away
# name -> (verb, options)
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dpo, long": (dpo, Dpo, {"lr": 6e-4, "epochs": 8, "batch_size": 4, "beta": 0.3, "loss": demo.RECIPE.loss, "eval_every": 12}),
    "dpo, slow": (dpo, Dpo, {"lr": 1e-4, "epochs": 1, "batch_size": 4, "beta": 0.3, "loss": demo.RECIPE.loss, "eval_every": 4}),
    "dpo, short": (dpo, Dpo, {"lr": 6e-4, "epochs": 1, "batch_size": 4, "beta": 0.3, "loss": demo.RECIPE.loss, "eval_every": 8}),
    "ppo, long": (ppo, Ppo, {"lr": 1e-3, "epochs": 16, "batch_size": 16, "rollout_prompts": 32, "k": 4, "passes": 2, "beta": 0.3}),
    "ppo, short": (ppo, Ppo, {"lr": 3e-4, "epochs": 3, "batch_size": 16, "rollout_prompts": 32, "k": 4, "passes": 2, "beta": 0.3}),
}


def main() -> None:
    torch.set_num_threads(1)
    train, held = grammar.split("en", 0)
    recipe, lines = replace(demo.RECIPE, sft_steps=1000), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, codec = demo._base(recipe, "en", train, 0)
        models.save(model, codec.tokenizer, folder / "base")
        (folder / "judge.py").write_text(demo.JUDGE)
        for part, asked, count in (("pairs", train, 16), ("held", held, 4)):
            records = demo._judged(model, codec, "en", asked, recipe, count, samples=count)
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(to_json(r)) + "\n" for r in records))
        judge = f"python:{folder / 'judge.py'}:judge"
        wanted = sys.argv[1:] or list(RUNS)
        for name in wanted:
            verb, cls, extra = RUNS[name]
            output = folder / name.replace(", ", "-")
            given = {"model": str(folder / "base"), "data": [str(folder / "pairs.jsonl")], "eval_data": [str(folder / "held.jsonl")],
                     "output": str(output), "eval_prompts": len(held), "eval_samples": 4, "sample_tokens": 40, "threads": 1,
                     "offline": True, "report": False, "schedule": "constant", "stop": "plateau", "save_every": 1000} | LIMIT  # fmt: skip
            began = time.perf_counter()
            verb.run(cls(**given, **({"reward": judge} if cls is Ppo else {"eval_reward": judge}), **extra))
            results, manifest = read_json(output / "results.json"), read_json(output / "manifest.json")
            rows = [row for row in read_jsonl(output / "metrics.jsonl") if "reward" in row]
            gate, total = results["gate"], manifest["records"]["train"]
            lines += [f"{name} ({total} training prompts, {time.perf_counter() - began:.0f} s): {gate['why'] or 'not stopped'} after "
                      f"{results['steps']} steps; kept is step {results['published']['step']}",
                      "  step: reward, KL   " + "  ".join(f"{r['step']}: {r['reward']:.2f}, {r['kl_sequence_rb']:.2f}" for r in rows)]
            if "reward" in gate:
                lines += [f"  over the last {gate['window']} evaluations the reward changed by {gate['reward']['change']:+.3f} "
                          f"[{gate['reward']['low']:+.3f}, {gate['reward']['high']:+.3f}], band {gate['reward']['band']:.3f}; the KL by "
                          f"{gate['kl']['change']:+.2f} [{gate['kl']['low']:+.2f}, {gate['kl']['high']:+.2f}]"]  # fmt: skip
            print("\n".join(lines[-3:]), flush=True)
    lines += ["", f"torch {torch.__version__}, one thread, {time.strftime('%Y-%m-%d')}"]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
