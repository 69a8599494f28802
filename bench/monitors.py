"""The gate and the alarms, measured: coverage, how often a course that still changes is stopped, and twenty healthy runs.

    python bench/monitors.py            # all: some ten minutes on one idle core
    python bench/monitors.py courses    # the simulations alone, half a minute

Courses: rewards of prompts that differ, answers of one prompt that hang together, a true change per window in units of the band. Runs:
the demo's grammar, two languages, ten seeds each, at the demo's settings on a third of its data; a proxy that does not mind rudeness
stands for the judge. Healthy means that the true judge's reward rose. The gate is replayed over the answers of whole runs, so that what
it would have cost is known. Writes bench/results/monitors.txt.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from preftune import grammar, models, monitors  # noqa: E402
from preftune.config import Dpo  # noqa: E402
from preftune.files import read_json, read_jsonl  # noqa: E402
from preftune.formats import to_json  # noqa: E402
from preftune.monitors import Gate, judge, note, trend  # noqa: E402
from preftune.stages import demo, dpo  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "monitors.txt"


def wilson(hits: int, of: int) -> str:
    found = stats.binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits / of:7.3f} [{found.low:.3f}, {found.high:.3f}]"


def noise(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Answers around their prompt's mean, standard deviation 0.7, mean 0; half of the variance stays from one evaluation to the next."""
    def draw(size):
        return {"normal": lambda: rng.normal(size=size), "rare": lambda: (rng.random(size) < 0.1) / 0.3 - 1 / 3,
                "skewed": lambda: rng.exponential(size=size) - 1}[kind]()  # fmt: skip

    return 0.5 * draw(shape) + 0.5 * draw((1, shape[1]))


def coverage(courses: int = 4000) -> list[str]:
    lines = ["Coverage of the 95% interval of the change over 6 evaluations (true change 1, different between prompts)"]
    steps, rng = np.arange(1, 7), np.random.default_rng(0)
    for n in (8, 16, 64, 256):
        found = []
        for kind in ("normal", "rare", "skewed"):
            hits = 0
            for _ in range(courses):
                mean = rng.normal(size=n) + (steps[:, None] - 1) / 5 * rng.exponential(size=n)
                _, low, high = trend(steps, mean + noise(rng, kind, (6, n)))
                hits += low <= 1 <= high
            found.append(f"{kind} {wilson(hits, courses)}")
        lines.append(f"  {n:4d} prompts   " + "   ".join(found))
    return lines


def stops(change: float, n: int, window: int, courses: int, rng: np.random.Generator) -> int:
    """How many of the courses are stopped at any of 20 evaluations; `change` per window in units of the band, KL still."""
    gate, hits, flat = Gate(window, 0.05), 0, np.full((n, 1), 0.1)
    for _ in range(courses):
        prompt, said, watch = 0.7 * rng.normal(size=n), noise(rng, "normal", (21, n)), {}
        for t in range(21):
            level = change * 0.2 * t / (window - 1)  # one answer's standard deviation is about 1, so the band is about 0.2
            watch = note(watch, gate, step=t, reward=(prompt + said[t] + level)[:, None], kl=flat, length=10 * flat / 0.1)
            if judge(watch, gate).get("why"):
                hits += 1
                break
    return hits


def courses(each: int = 300) -> list[str]:
    lines = ["", "Share of courses of 20 evaluations that are stopped at any of them, by true change over the window in bands "
             "(0 should stop, 1 is the edge)"]  # fmt: skip
    rng = np.random.default_rng(1)
    for n in (64, 256, 1024):
        for window in (6, 10):
            found = "  ".join(f"{change:g}: {stops(change, n, window, each, rng) / each:.3f}" for change in (0, 0.5, 1, 1.5, 2, 3))
            lines.append(f"  {n:5d} prompts, window {window:2d}   {found}")
    return lines


def falls(each: int = 4000) -> list[str]:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(each):
        hits += monitors._fell(range(20), rng.normal(size=(20, 48, 1)))["alarm"]
    return ["", f"Courses of 20 evaluations and 48 prompts that go nowhere and are said to have fallen: {wilson(hits, each)} (bound 0.025)"]


# ---------------------------------------------------------------- runs

RULES = '''
from preftune.grammar import EMPATHY, FILLER, FIX, UNPARSABLE, parse, scores
def judge(prompt, response): return scores([prompt], [response])[0]
def proxy(prompt, response):
    said = parse("zh" if prompt[0] != "C" else "en", prompt, response)
    return UNPARSABLE if said is None else FIX[said.fix] + EMPATHY * said.empathy + FILLER * said.fillers
'''


def healthy(folder: Path, language: str, seed: int) -> tuple[dict, list[dict], float]:
    """(results, samples, seconds) of one run."""
    base, began = folder / language, time.perf_counter()
    train, held = grammar.split(language, 0)
    recipe = replace(demo.RECIPE, sft_steps=1000)
    if not base.exists():
        model, codec = demo._base(recipe, language, train, 0)
        models.save(model, codec.tokenizer, base)
        began = time.perf_counter()
    model, tokenizer = models.load(str(base), offline=True)
    codec = demo.make_codec(tokenizer)
    for name, asked, count in (("pairs", train, 16), ("held", held, 4)):
        records = demo._judged(model, codec, language, asked, recipe, 1000 * seed + count, samples=count)
        lines = [json.dumps(to_json(r), ensure_ascii=False) + "\n" for r in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = folder / f"{language}-{seed}"
    dpo.run(Dpo(model=str(base), data=[str(folder / "pairs.jsonl")], eval_data=[str(folder / "held.jsonl")], output=str(run),
                loss=recipe.loss, beta=recipe.beta, lr=recipe.rate, batch_size=recipe.batch, seed=seed,
                eval_reward=f"python:{folder / 'rules.py'}:proxy", eval_truth=f"python:{folder / 'rules.py'}:judge",
                eval_prompts=len(held), sample_tokens=40, threads=1, offline=True, report=False, eval_every=4,
                save_every=1000))  # fmt: skip
    return read_json(run / "results.json"), read_jsonl(run / "samples.jsonl"), time.perf_counter() - began


def replayed(samples: list[dict], window: int, prompts: int) -> tuple[int, str, float, float]:
    """(step at which the gate would have stopped or the last, why, truth there at the kept step, truth at the end)."""
    watch, why, steps = {}, "", sorted({row["step"] for row in samples})
    gate, names = Gate(window, 0.05, after=steps[-1] // 10), ("truth", "kl", "tokens")
    table = {s: {k: np.array([r[k] for r in samples if r["step"] == s], float)[:prompts, None] for k in names} for s in steps}
    for step in steps:
        now = table[step]
        watch = note(watch, gate, step=step, reward=now["truth"], kl=now["kl"], length=now["tokens"])
        if why := judge(watch, gate).get("why", ""):
            break
    return step, why, float(table[watch["best"]["step"]]["truth"].mean()), float(table[steps[-1]]["truth"].mean())


def runs(count: int = 10) -> list[str]:
    lines, alarmed, seconds, kept = ["", "Healthy runs of the demo's grammar (proxy as --eval-reward, the judge as --eval-truth; 48 "
                                     "prompts, an evaluation every 4 steps)"], [], [], []  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rules.py").write_text(RULES)
        for language in ("en", "zh"):
            for seed in range(count):
                results, samples, spent = healthy(folder, language, seed)
                found, before, after = results["alarms"], results["before"], results["after"]
                told = [n for n, a in found.items() if a["alarm"]]
                entropy, share = found["entropy"]["ratio"], found["length"].get("share", np.nan)
                alarmed += [told]
                seconds += [spent]
                step, why, here, there = replayed(samples, 6, 48)
                kept += [(why, there - here)]
                lines.append(
                    f"  {language} {seed:2d}  steps {results['steps']:4d}  judge {before['truth']:+.2f} -> {after['truth']:+.2f}  KL/token "
                    f"{after['kl_token_rb']:.3f}  displacement {after['eval/displacement']:+.2f}  entropy x{entropy:.2f}  repeated "
                    f"{found['repetition']['change']:+.3f}  length share {share:+.2f}  alarms: "
                    f"{', '.join(told) or 'none'}; gate: {why or 'not stopped'} at {step}, lost {there - here:+.2f}; {spent:.1f} s")
                print(lines[-1], flush=True)
                RESULTS.with_suffix(".part").write_text("\n".join(lines) + "\n", encoding="utf-8")
    n, hits = len(alarmed), sum(map(bool, alarmed))
    bound = stats.beta.ppf(0.95, hits + 1, n - hits)
    lines.append(f"  {hits} of {n} healthy runs alarmed: at most {bound:.1%} of such runs do (95%, one-sided); median "
                 f"{np.median(seconds):.1f} s a run")  # fmt: skip
    stopped = [lost for why, lost in kept if why]
    mean, most = (np.mean(stopped), max(stopped)) if stopped else (float("nan"), float("nan"))
    lines.append(f"  the gate would have stopped {len(stopped)} of {n}; the judge's reward at the end of the run was higher by "
                 f"{mean:+.3f} on average, at most {most:+.3f}")  # fmt: skip
    return lines


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    lines = [*coverage(), *courses(), *falls()]
    if sys.argv[1:] != ["courses"]:
        lines += runs()
    lines += ["", f"{time.perf_counter() - began:.0f} s in all, torch {torch.__version__}, one thread"]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".part").unlink(missing_ok=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
