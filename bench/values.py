"""Where the value model of PPO begins: a head of zeros, a copy of the policy, the reward model. What each explains, and what it is worth.

    python bench/values.py                          # some minutes on one core; writes bench/results/values.txt
    python bench/values.py head@0.1:0-3 copy:3-6    # a start, its learning rate in those of the policy, seeds from and to

The demo's grammar: a model from scratch, a reward model of its size trained on judged samples, PPO against it with each start and seed. By
round: the share of the variance of rewards to come that the values explain (`val/explained`), and the reward model's score; at the
end the hidden judge's reward and the KL on held-out prompts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataclasses import replace  # noqa: E402

from preftune import grammar, models  # noqa: E402
from preftune.config import Ppo, Reward  # noqa: E402
from preftune.files import read_json, read_jsonl  # noqa: E402
from preftune.formats import to_json  # noqa: E402
from preftune.stages import demo, ppo, reward  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "values.txt"
BETA = 0.1
SPANS = ((1, 1), (2, 4), (5, 12), (13, 24))  # rounds


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ("head:0-3", "head@0.1:0-3", "copy:0-3", "reward:0-3")
    train, held = grammar.split("en", 0)
    recipe, lines = replace(demo.RECIPE, sft_steps=1000), []
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        model, codec = demo._base(recipe, "en", train, 0)
        models.save(model, codec.tokenizer, folder / "base")
        (folder / "judge.py").write_text(demo.JUDGE)
        for part, asked, count in (("pairs", train, 40), ("held", held, 8)):
            records = demo._judged(model, codec, "en", asked, recipe, count, samples=count)
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(to_json(r)) + "\n" for r in records))
        common = {"model": str(folder / "base"), "data": [str(folder / "pairs.jsonl")], "eval_data": [str(folder / "held.jsonl")],
                  "threads": 1, "offline": True, "report": False}  # fmt: skip
        reward.run(Reward(**common, output=str(folder / "reward"), epochs=3, lr=recipe.reward_rate, batch_size=recipe.reward_batch,
                          adam_beta2=0.98, eval_every=200))  # fmt: skip
        after = read_json(folder / "reward" / "results.json")["after"]
        lines += [f"{models.parameters_of(model):,} weights, {len(train)} prompts, beta {BETA}; the reward model gets "
                  f"{after['eval/rewards/accuracies']:.1%} of {after['eval/pairs']} held-out pairs right", ""]  # fmt: skip
        spans = "  ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in SPANS)
        lines += [f"start     seed   explained in rounds {spans}   score in rounds {spans}   judge   KL    judge - beta KL"]
        ends: dict[str, list[float]] = {}
        for start, _, span in (words.partition(":") for words in wanted):
            for seed in range(*map(int, span.split("-"))):
                run = folder / f"{start}-{seed}"
                kind, _, factor = start.partition("@")
                ppo.run(Ppo(**common, output=str(run), reward=f"model:{folder / 'reward'}",
                            eval_reward=f"python:{folder / 'judge.py'}:judge", value=kind, value_lr=float(factor or 1), seed=seed,
                            beta=BETA, lr=1e-3, batch_size=32, rollout_prompts=64, passes=2, epochs=6, sample_tokens=40,
                            eval_prompts=len(held), eval_samples=8, eval_every=1000, save_every=1000))  # fmt: skip
                rounds = [row for row in read_jsonl(run / "metrics.jsonl") if "val/explained" in row]
                told = read_json(run / "results.json")["after"]
                table = {of: [np.mean([row[of] for row in rounds[a - 1 : b]]) for a, b in SPANS]
                         for of in ("val/explained", "objective/scores")}  # fmt: skip
                whole = told["reward"] - BETA * told["kl_sequence_rb"]
                ends.setdefault(start, []).append(whole)
                shown = ("  ".join(f"{x:5.2f}" for x in table[of]) for of in table)
                lines.append(f"{start:9} {seed:4}   {'   '.join(shown)}   {told['reward']:.2f} ± {told['reward_se']:.2f}   "
                             f"{told['kl_sequence_rb']:.2f}   {whole:.2f}   ({len(rounds)} rounds)")  # fmt: skip
                print(lines[-1], flush=True)
        lines += ["", *(f"{start}: {np.mean(found):.3f} (seeds {min(found):.3f} to {max(found):.3f})" for start, found in ends.items()),
                  "", f"{time.perf_counter() - began:.0f} s in all, torch {torch.__version__}, one thread, {time.strftime('%Y-%m-%d')}"]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
