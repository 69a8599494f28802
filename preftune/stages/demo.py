"""`preftune demo`: the whole pipeline on a world of our own: a model from scratch, its replies, pairs, DPO, a reward model and PPO, and the
exact optimum beside them.

Offline, one CPU thread, about three minutes. Everything is left as ordinary folders: `base/` (the model before), `pairs.jsonl` and
`held_out.jsonl` (canonical records), `judge.py` (the hidden reward as a rule), `dpo/`, `reward/`, `ppo/` (run folders; the report is in
`dpo/`), `frontier.html`.

Because a customer can be told finitely many things, nothing about reward, KL and unparsable replies is estimated here: all replies
are enumerated under each model, and pi* = ref exp(r/beta)/Z is summed.
"""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import engine, frontier, grammar, models, report, runs
from ..audit import Z95
from ..batches import Order
from ..config import Demo, Dpo, Ppo, Reward
from ..evaluate import response_rows
from ..files import atomic_write, new_folder, read_json, require_new, write_json
from ..formats import to_json
from ..frontier import Point
from ..objectives import supervised
from ..records import Judgement, Record, Response
from ..report.frontiers import frontier_page
from ..rewards import scorer
from ..sampling import sample
from ..screen import bar, say
from ..store import build
from ..tokens import Codec, decode_response, encode_prompt, make_codec
from .dpo import run as run_dpo
from .ppo import run as run_ppo
from .reward import run as run_reward


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo; docs/demo.md has the seeds that were measured. `BREAK` turns the levers the wrong way.

    Args:
        width, inner: size of the two-layer model. sft_steps, sft_batch, sft_rate: training from scratch; 4 replies a record.
        samples: replies drawn per training prompt, judged in groups of `group`. passes: over the verdicts, of DPO and of the reward model.
        beta, rate, batch, loss: DPO. reward_rate, reward_batch: the reward model. against: whether it and PPO are trained at all.
        ppo_passes: over the prompts, at the same beta. ppo_round, ppo_batch: prompts of a round, and of a step, two passes over a round.
        ppo_answers: per prompt.
    """

    width: int = 64
    inner: int = 128
    sft_steps: int = 2000
    sft_batch: int = 16
    sft_rate: float = 5e-3
    samples: int = 48
    group: int = 8
    passes: int = 3
    beta: float = 0.3
    rate: float = 6e-4
    batch: int = 4
    loss: str = "sigmoid+0.2*nll"
    against: bool = True
    reward_rate: float = 3e-3
    reward_batch: int = 2
    ppo_passes: int = 3
    ppo_round: int = 32
    ppo_batch: int = 16
    ppo_answers: int = 4
    ppo_rate: float = 5e-4  # 1e-3 ended one of three runs: the ratio exploded


RECIPE = Recipe()
BREAK = Recipe(beta=0.1, rate=2e-3, loss="sigmoid", passes=1, against=False)  # what is spoilt is DPO
BEST_OF = (2, 4, 8, 16)  # what best-of-n is drawn at
HIDDEN = {f"best of {n}" for n in BEST_OF if n != 4}  # from the table: the KL of best of 4 is near that of DPO
OPTIMUM = "optimum pi*"
EXACT = np.geomspace(0.05, 20, 60)  # betas of the exact frontier
# So that `chat` takes a customer's words alone; the same characters as the prompts of the corpus.
TEMPLATE = (
    "{{%- for m in messages %}}{{%- if m['role'] == 'user' %}}{{{{ '{before}' + m['content'] + '{after}' }}}}{{%- else %}}"
    "{{{{ m['content'] + eos_token + '\\n' }}}}{{%- endif %}}{{%- endfor %}}"
)
JUDGE = '''"""The demo's hidden judge, as a rule that any verb takes: --eval-reward python:judge.py:judge"""

from preftune.grammar import scores


def judge(prompt: str, response: str) -> float:
    return scores([prompt], [response])[0]
'''


def run(options: Demo, recipe: Recipe | None = None) -> int:
    """Run the demo. Raises UsageError where the output folder is not empty."""
    recipe = recipe or (BREAK if options.break_ else RECIPE)
    folder, language, began = Path(options.output), options.language, time.monotonic()
    require_new(folder)
    torch.set_num_threads(options.threads or 1)
    new_folder(folder)
    train, held = grammar.split(language, options.seed)
    possible = len(grammar.replies(language, held[0]))
    say(f"1/6 a world: {len(train)} training prompts, {len(held)} held out, {possible} possible replies to each")
    model, codec = _base(recipe, language, train, options.seed)
    models.save(model, codec.tokenizer, folder / "base")
    say(f"2/6 a model from scratch: {models.parameters_of(model):,} weights -> {folder}/base")
    for name, asked, seed in (("pairs", train, options.seed), ("held_out", held, options.seed + 1)):
        records = _judged(model, codec, language, asked, recipe, seed, samples=recipe.samples if name == "pairs" else recipe.group)
        atomic_write(folder / f"{name}.jsonl", "".join(json.dumps(to_json(r), ensure_ascii=False) + "\n" for r in records))
    atomic_write(folder / "judge.py", JUDGE)
    say(f"3/6 pairs from its own replies, judged with Bradley-Terry noise -> {folder}/pairs.jsonl")
    ways = _train(folder, options, recipe, len(held))
    say("6/6 every possible reply under every model, and the exact optimum")
    world = make_world(language, held, model, codec)
    rows, told = _measured(world, folder, ways, recipe)
    facts = _frontier(world, rows, ways, options)
    results = read_json(folder / "dpo" / "results.json") | {"reward_model": told}
    write_json(folder / "dpo" / "extra.json", _extra(rows, recipe, options, results) | {"frontier": facts})
    atomic_write(folder / "frontier.html", frontier_page(facts))
    page, seconds = report.write(folder / "dpo"), time.monotonic() - began
    write_json(folder / "demo.json", {"rows": rows, "reward_model": told, "recipe": asdict(recipe), "seconds": seconds,
                                      "seed": options.seed, "language": language})  # fmt: skip
    say(f"{seconds:.0f} seconds in all")
    for line in _lines(rows, recipe, folder, page):
        print(line)
    return 0


def _train(folder: Path, options: Demo, recipe: Recipe, held: int) -> dict[str, Path]:
    """DPO on the pairs; a reward model on the same pairs, and PPO against it. Run folders by the method's name."""
    ways = {"DPO": folder / "dpo"} | ({"PPO": folder / "ppo"} if recipe.against else {})
    common: dict[str, Any] = {"model": str(folder / "base"), "data": [str(folder / "pairs.jsonl")],
                              "eval_data": [str(folder / "held_out.jsonl")], "seed": options.seed, "threads": options.threads or 1,
                              "offline": True}  # fmt: skip
    judged: dict[str, Any] = common | {"eval_reward": f"python:{folder / 'judge.py'}:judge", "eval_prompts": held, "eval_samples": 4,
                                       "sample_tokens": 40, "beta": recipe.beta}  # fmt: skip
    run_dpo(Dpo(**judged, output=str(ways["DPO"]), loss=recipe.loss, lr=recipe.rate, batch_size=recipe.batch,
                epochs=recipe.passes))
    say(f"4/6 DPO on the pairs -> {ways['DPO']}")
    if "PPO" in ways:
        run_reward(Reward(**common, output=str(folder / "reward"), epochs=recipe.passes, lr=recipe.reward_rate,
                          batch_size=recipe.reward_batch, adam_beta2=0.98, eval_every=100, report=False))  # fmt: skip
        run_ppo(Ppo(**judged, output=str(ways["PPO"]), reward=f"model:{folder / 'reward'}", lr=recipe.ppo_rate, epochs=recipe.ppo_passes,
                    rollout_prompts=recipe.ppo_round, batch_size=recipe.ppo_batch, k=recipe.ppo_answers, passes=2,
                    report=False))  # fmt: skip
        say(f"5/6 a reward model on the same pairs, and PPO against it -> {folder}/reward, {ways['PPO']}")
    return ways


# ---------------------------------------------------------------- the model before


def make_tokenizer(language: str) -> PreTrainedTokenizerFast:
    """The grammar's words, and bytes for everything else, so that any text can be typed into `chat`."""
    pieces = [("<unk>", -100.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in grammar.words(language))]
    backend = Tokenizer(Unigram(pieces + [(f"<0x{b:02X}>", -1.0) for b in range(256)], unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    table = grammar.table(language)
    template = TEMPLATE.format(before=table.before, after=table.after.replace("\n", "\\n"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False, chat_template=template)  # fmt: skip


def _base(recipe: Recipe, language: str, train: Sequence[str], seed: int) -> tuple[Any, Codec]:
    """A tiny model trained from scratch on the corpus, by the loop that trains everything else."""
    tokenizer = make_tokenizer(language)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=recipe.inner, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    model, codec = models.prepare(LlamaForCausalLM(config)), make_codec(tokenizer)
    said: dict[str, list[str]] = {}
    for prompt, reply in grammar.corpus(language, train, 4 * recipe.sft_batch * recipe.sft_steps // 2, seed):
        said.setdefault(prompt, []).append(reply)
    records = [Record(prompt, tuple(Response(r, True) for r in replies[i : i + 4])) for prompt, replies in said.items()
               for i in range(0, len(replies), 4)]  # fmt: skip
    store, _ = build(records, codec, max_length=None)
    order = Order(len(store), recipe.sft_batch, recipe.sft_steps * recipe.sft_batch / len(store), seed)
    rate = engine.schedule("linear", recipe.sft_rate, steps=recipe.sft_steps, warmup=0.1)
    state = engine.make_state(model, rate=rate, clip=1.0, betas=(0.9, 0.98))
    steps = engine.steps(store, np.arange(len(store)), order, start=0, total=recipe.sft_steps, micro_tokens=8192, columns={}, share=True,
                         device="cpu")  # fmt: skip
    with bar("training", recipe.sft_steps) as advance:
        for line in engine.train(state, steps, supervised()):
            advance(state.step, recipe.sft_steps, f"loss {line['loss']:.3f}")
    return model, codec


# ---------------------------------------------------------------- preferences


def _judged(model: Any, codec: Codec, language: str, asked: Sequence[str], recipe: Recipe, seed: int, *, samples: int) -> list[Record]:
    """The model's own replies, in groups, every pair of a group judged once by the noisy judge."""
    chance, ids = random.Random(f"judge {seed}"), [encode_prompt(codec, p) for p in asked]
    with bar("sampling", len(ids) * samples) as advance:
        drawn = sample(model, ids, ends=[(codec.eos,)] * len(ids), k=samples, max_tokens=40, seed=seed, rows_at_once=256, progress=advance)
    records = []
    for prompt, prompt_ids, row in zip(asked, ids, drawn, strict=True):
        for i in range(0, samples, recipe.group):
            replies = {(decode_response(codec, prompt_ids, list(s.ids), (codec.eos,)), s.finished) for s in row[i : i + recipe.group]}
            # A half-trained model may say nothing, or a control token: no text that a record could hold.
            usable = sorted(r for r in replies if r[0].strip() and "\0" not in r[0] and not codec.control.search(r[0]))
            records += _group(language, prompt, usable, chance)
    return records


def _group(language: str, prompt: str, replies: Sequence[tuple[str, bool]], chance: random.Random) -> list[Record]:
    """One record of distinct replies with all their pairs, or none where there is nothing to compare."""
    true = [grammar.reward(grammar.parse(language, prompt, text) if finished else None) for text, finished in replies]
    pairs = [(i, j) if grammar.prefers(true[i], true[j], chance) else (j, i) for i in range(len(replies)) for j in range(i)]
    if not pairs:
        return []
    judgements = tuple(Judgement(((better,), (worse,)), by="judge") for better, worse in pairs)
    return [Record(prompt, tuple(Response(text, finished) for text, finished in replies), judgements)]


# ---------------------------------------------------------------- the exact truth


@dataclass(frozen=True)
class World:
    """Every outcome of every held-out prompt: its 378 replies and, last, everything that is none of them, at the lowest reward.

    Args:
        prompts, reward: P prompts, and (P, N + 1) true rewards. start: (P, N + 1) log-probabilities before training. codec: of all models.
    """

    language: str
    prompts: Sequence[str]
    reward: np.ndarray
    start: np.ndarray
    codec: Codec

    def replies(self) -> list[tuple[str, Response]]:
        """All (prompt, reply), P x N."""
        return [(p, Response(r.text, True)) for p in self.prompts for r in grammar.replies(self.language, p)]


def make_world(language: str, held: Sequence[str], start: Any, codec: Codec) -> World:
    """The outcomes of these prompts under the model `start`."""
    reward = np.array([[*(grammar.reward(r.features) for r in grammar.replies(language, p)), grammar.reward(None)] for p in held])
    empty = World(language, held, reward, np.zeros_like(reward), codec)
    return replace(empty, start=log_probs(empty, start))


def log_probs(world: World, model: Any) -> np.ndarray:
    """(P, N + 1) log-probability of every outcome, a reply's end included."""
    said, size = world.replies(), 21  # replies of a record: they share its prompt
    groups = [Record(said[i][0], tuple(reply for _, reply in said[i : i + size])) for i in range(0, len(said), size)]
    store, _ = build(groups, world.codec, max_length=None)
    logp = np.array([row["logp"] for row in response_rows(model, store, micro_tokens=8192)]).reshape(len(world.prompts), -1)
    rest = np.log(np.maximum(1 - np.exp(logp).sum(1, keepdims=True), 1e-12))
    return np.concatenate([logp, rest], axis=1)


def tilted(world: World, beta: float) -> np.ndarray:
    """pi* = start exp(reward / beta) / Z, (P, N + 1) log-probabilities.  Eq. 4 of arXiv:2305.18290."""
    logp = world.start + world.reward / beta
    return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def proxy_of(world: World, folder: Path) -> np.ndarray:
    """What a reward model says of every outcome, (P, N + 1). Of what is no reply it cannot be asked: below all others."""
    asked, said = zip(*world.replies(), strict=True)
    scores = scorer(f"model:{folder}", offline=True)(asked, said).reshape(len(world.prompts), -1)
    return np.concatenate([scores, scores.min(1, keepdims=True) - 1], axis=1)


def best_of(world: World, proxy: np.ndarray, n: int) -> np.ndarray:
    """(P, N + 1) log-probabilities of the best of n draws of the start by `proxy`, equal ones by lot.

    A level of the proxy is reached with probability F^n - G^n, F and G the chance of one draw at most there and below it.
    """
    out = np.empty_like(world.start)
    for row, (start, score) in enumerate(zip(world.start, proxy, strict=True)):
        _, level = np.unique(score, return_inverse=True)
        mass = np.bincount(level, np.exp(start))
        won = np.diff(np.append(0.0, (np.cumsum(mass) / mass.sum()) ** n))
        with np.errstate(divide="ignore"):  # a level that no number of draws reaches
            out[row] = start + np.log(won / mass)[level]
    return out


def correlation(world: World, proxy: np.ndarray) -> float:
    """Of a reward model with the true reward over the replies to a prompt as the start gives them: the mean over prompts."""
    found = []
    for start, score, true in zip(world.start[:, :-1], proxy[:, :-1], world.reward[:, :-1], strict=True):
        (own, both), (_, other) = np.cov(score, true, aweights=np.exp(start))
        found.append(both / (own * other) ** 0.5)
    return float(np.mean(found))


def exact_rows(world: World, policies: Mapping[str, np.ndarray], *, beta: float) -> list[dict[str, Any]]:
    """What every policy, (P, N + 1) log-probabilities, is worth, each the mean over held-out prompts with 95%.

    reward: true. kl: to the start, nats a reply, over these outcomes (what happens inside the last is not seen). unparsable: its share.
    short: what is missing of the most that reward - beta KL can be.
    """
    best, rows = beta * np.logaddexp.reduce(world.start + world.reward / beta, axis=1), []
    for name, logp in policies.items():
        p = np.exp(logp)
        reward, kl = (p * world.reward).sum(1), np.where(p > 0, p * (logp - world.start), 0).sum(1)
        values = {"reward": reward, "kl": kl, "unparsable": p[:, -1], "short": best - reward + beta * kl}
        rows.append({"model": name} | {key: _interval(v) for key, v in values.items()})
    return rows


def _interval(values: np.ndarray) -> dict[str, float]:
    half = Z95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": float(values.mean()), "low": float(values.mean()) - half, "high": float(values.mean()) + half}


def _measured(world: World, folder: Path, ways: Mapping[str, Path], recipe: Recipe) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of every policy there is, and what is known of the reward model."""
    policies, told = {"before": world.start}, dict[str, Any]()
    if "PPO" in ways:
        proxy = proxy_of(world, folder / "reward")
        told = {"correlation": correlation(world, proxy)} | read_json(folder / "reward" / "results.json")["reward"]
        policies |= {f"best of {n}": best_of(world, proxy, n) for n in BEST_OF}
    policies |= {f"after {name}": log_probs(world, models.load(str(place / "model"), offline=True)[0]) for name, place in ways.items()}
    return exact_rows(world, policies | {OPTIMUM: tilted(world, recipe.beta)}, beta=recipe.beta), told


def _frontier(world: World, rows: Sequence[dict[str, Any]], ways: Mapping[str, Path], options: Demo) -> dict[str, Any]:
    """What the figure and its page show: evaluations on the way (sampled); best-of-n and where runs ended (exact); pi* at every beta."""
    exact = {row["model"]: row for row in rows}
    points: list[Point] = []
    for name, place in ways.items():
        first, *way, last = frontier.points_of(runs.Log(place / "metrics.jsonl").rows(), method=name, setting="", seed=options.seed)
        points += [_exactly(exact["before"], first), *way, _exactly(exact[f"after {name}"], last)]
    drawn = [n for n in BEST_OF if f"best of {n}" in exact]
    chosen = Point("best of n", "", options.seed, 1, True, 0.0, None, 0.0, None, None, 0, 0.0)
    points += [_exactly(exact[f"best of {n}"], replace(chosen, setting=f"n {n}")) for n in drawn]
    optima = exact_rows(world, {f"{beta}": tilted(world, beta) for beta in EXACT}, beta=1.0)
    facts = frontier.table(points, at=(0.5, 1.0))
    return facts | {"points": [asdict(p) for p in points], "truth": "the hidden judge", "reward": None, "failed": [],
                    "exact": [(row["kl"]["mean"], row["reward"]["mean"]) for row in optima], "prompts": len(world.prompts), "samples": 4,
                    "note": SUMMED, "command": runs.command("demo", options)}  # fmt: skip


def _exactly(row: Mapping[str, Any], point: Point) -> Point:
    """A point with what was summed over all replies in the place of what was sampled."""
    spread = {key: (row[key]["high"] - row[key]["mean"]) / Z95 for key in ("kl", "reward")}
    return replace(point, kl=row["kl"]["mean"], kl_se=spread["kl"], reward=row["reward"]["mean"], reward_se=spread["reward"])


# ---------------------------------------------------------------- telling it


def _cell(value: dict[str, float], percent: bool = False) -> str:
    scale, digits, sign = (100, 2, "%") if percent else (1, 3, "")
    mean, low, high = (scale * value[k] for k in ("mean", "low", "high"))
    return f"{mean:.{digits}f}{sign} [{low:.{digits}f}, {high:.{digits}f}]"


EXPLAINED = (
    "What was done: a model learned from scratch to talk like agents of whom half are good; it answered customers; a noisy judge said "
    "which of two replies is better; the model was tuned on these verdicts.",
    "This world has finitely many replies, so these numbers are exact: every reply to {prompts} held-out prompts was enumerated under "
    "each model, and the intervals are over prompts. pi* is the best any policy can do at beta {beta:g}: start times exp(reward / beta), "
    "normalised. Short of pi*: what a policy lacks of pi*'s reward - beta KL, which pi* maximises. DPO moved the reward by {gained:+.2f}, "
    "{share:.0%} of the way to pi*; of what can be had of reward - beta KL, it has {objective:.0%}.",
)
AGAINST = (
    "The other way from the same verdicts, at the same beta: a reward model, then PPO on the model's own answers. The reward model agrees "
    "with {agreement:.1%} of held-out verdicts; its scores correlate {correlation:.2f} with the hidden reward. PPO moved the reward by "
    "{gained:+.2f}, and has {objective:.0%} of what can be had. DPO and the reward model passed over the verdicts {passes} times each; "
    "what PPO drew and had scored comes on top (docs/dpo-or-ppo.md).",
    "Best of 4 trains no policy: four replies of the start, the best by the reward model; its distribution is summed as exactly as the "
    "others.",
    "The figure: dashed, pi* at every beta; nothing can be above it. Large marks are exact, small ones are samples taken while training.",
)
BROKEN = (
    "These settings are wrong on purpose: beta {beta:g} lets the policy go far from its start, and a learning rate of {rate:g} takes it "
    "there without care. The loss asks only for a gap between two answers: where both fall, the rejected one faster, it is content. "
    "Held-out chosen answers lost {lost:.1f} nats (displacement).",
    "A word that follows from the words before it is as good a place to lower a rejected answer as the word that was wrong; the weights "
    "are shared, so other sentences break there too. What both sides lose goes to replies that nobody judged, and almost all of those are "
    "broken: {broken}.",
    "Length: {shorter} tokens a sampled reply before, {longer} after. The log-probability of an answer is a sum over its tokens, so a "
    "longer rejected answer has more places where it can be lowered, and a broken reply need not end where a whole one does. The true "
    "reward alone hides this where the replies that can still be read got better.",
    "Levers: a larger beta, a smaller learning rate, a term for the chosen answer (--loss sigmoid+0.2*nll), and a start that seldom "
    "breaks.",
)
SUMMED = "Here large marks are exact as well: every reply was enumerated. Small marks are samples. 'best of n' goes by the reward model."
HEADS = ("model", "true reward", "KL to the start, nats", "unparsable", "short of pi*")


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[r["model"], _cell(r["reward"]), _cell(r["kl"]), _cell(r["unparsable"], percent=True), f"{max(0.0, r['short']['mean']):.3f}"]
            for r in rows if r["model"] not in HIDDEN]  # fmt: skip


def _gains(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """By how much a policy's reward rose, as a share of pi*'s rise, and the share of what can be had of reward - beta KL."""
    before, after, best = (next(r for r in rows if r["model"] == model) for model in ("before", name, OPTIMUM))
    gained, most = (r["reward"]["mean"] - before["reward"]["mean"] for r in (after, best))
    return {"gained": gained, "share": gained / most, "objective": 1 - after["short"]["mean"] / before["short"]["mean"]}


def _extra(rows: list[dict[str, Any]], recipe: Recipe, options: Demo, results: dict[str, Any]) -> dict[str, Any]:
    """What the report shows above its own findings. results: of DPO's run, with 'reward_model', what is known of that."""
    known = {"prompts": len(grammar.split(options.language, options.seed)[1]), "beta": recipe.beta}
    said = [text.format(**known, **_gains(rows, "after DPO")) for text in EXPLAINED]
    if any(r["model"] == "after PPO" for r in rows):
        said += [text.format(**results["reward_model"], passes=recipe.passes, **_gains(rows, "after PPO")) for text in AGAINST]
    if options.break_:
        start, end = (f"{r['unparsable']['mean']:.1%}" for r in rows[:2])
        before, after = results["before"], results["after"]
        words = {"beta": recipe.beta, "rate": recipe.rate, "lost": -after["eval/displacement"], "broken": f"{start} before, {end} after",
                 "shorter": f"{before['sample_length']:.1f}", "longer": f"{after['sample_length']:.1f}"}  # fmt: skip
        said += [text.format(**words) for text in BROKEN]
    shown = {"caption": "Means over held-out prompts with 95% intervals", "columns": list(HEADS), "rows": _table(rows)}
    return {"title": "Beside the exact optimum", "paragraphs": said, "tables": [shown]}


def _lines(rows: list[dict[str, Any]], recipe: Recipe, folder: Path, page: Path) -> list[str]:
    table = [list(HEADS), *_table(rows)]
    width = [max(len(row[i]) for row in table) for i in range(len(HEADS))]
    lines = ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in table), ""]
    return [*lines, f"report   {page}", f"figure   {folder}/frontier.html", f"talk     preftune chat {folder}/dpo {folder}/base",
            f"again    preftune dpo --model {folder}/base --data {folder}/pairs.jsonl --output runs/first "
            f"--loss {shlex.quote(recipe.loss)} --beta {recipe.beta:g} --lr {recipe.rate:g} --batch-size {recipe.batch}"]  # fmt: skip
