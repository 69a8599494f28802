"""`preftune demo`: the whole pipeline on a world of our own: a model from scratch, its pairs, DPO, and the exact optimum beside it.

Offline, one CPU thread, about two minutes. Everything is left as ordinary folders: `base/` (the model before), `pairs.jsonl` and
`held_out.jsonl` (canonical records), `judge.py` (the hidden reward as a rule), `dpo/` (a run folder with its report).

Because a customer can be told finitely many things, nothing about reward, KL and unparsable replies is estimated here: all replies
are enumerated under each model, and pi* = ref exp(r/beta)/Z is summed.
"""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import engine, grammar, models, report
from ..audit import Z95
from ..batches import Order
from ..config import Demo, Dpo
from ..evaluate import response_rows
from ..files import atomic_write, new_folder, read_json, require_new, write_json
from ..formats import to_json
from ..objectives import supervised
from ..records import Judgement, Record, Response
from ..sampling import sample
from ..screen import bar, say
from ..store import build
from ..tokens import Codec, decode_response, encode_prompt, make_codec
from .dpo import run as run_dpo


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo; docs/demo.md has the seeds that were measured. `BREAK` turns the levers the wrong way.

    Args:
        width, inner: size of the two-layer model. sft_steps, sft_batch, sft_rate: training from scratch; 4 replies a record.
        samples: replies drawn per training prompt, judged in groups of `group`. beta, rate, batch: DPO, one pass. loss: its loss.
    """

    width: int = 64
    inner: int = 128
    sft_steps: int = 2000
    sft_batch: int = 16
    sft_rate: float = 5e-3
    samples: int = 48
    group: int = 8
    beta: float = 0.3
    rate: float = 6e-4
    batch: int = 4
    loss: str = "sigmoid+0.2*nll"


RECIPE = Recipe()
BREAK = Recipe(beta=0.1, rate=2e-3, loss="sigmoid")
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
    say(f"1/5 a world: {len(train)} training prompts, {len(held)} held out, {possible} possible replies to each")
    model, codec = _base(recipe, language, train, options.seed)
    models.save(model, codec.tokenizer, folder / "base")
    say(f"2/5 a model from scratch: {models.parameters_of(model):,} weights -> {folder}/base")
    for name, asked, seed in (("pairs", train, options.seed), ("held_out", held, options.seed + 1)):
        records = _judged(model, codec, language, asked, recipe, seed, samples=recipe.samples if name == "pairs" else recipe.group)
        atomic_write(folder / f"{name}.jsonl", "".join(json.dumps(to_json(r), ensure_ascii=False) + "\n" for r in records))
    atomic_write(folder / "judge.py", JUDGE)
    say(f"3/5 pairs from its own replies, judged with Bradley-Terry noise -> {folder}/pairs.jsonl")
    run_dpo(Dpo(model=str(folder / "base"), data=[str(folder / "pairs.jsonl")], eval_data=[str(folder / "held_out.jsonl")],
                output=str(folder / "dpo"), loss=recipe.loss, beta=recipe.beta, lr=recipe.rate, batch_size=recipe.batch, seed=options.seed,
                eval_reward=f"python:{folder / 'judge.py'}:judge", eval_prompts=len(held), sample_tokens=40, threads=options.threads or 1,
                offline=True))  # fmt: skip
    say("4/5 DPO done; now every possible reply under both models, and the exact optimum")
    after, _ = models.load(str(folder / "dpo" / "model"), offline=True)
    rows = exact_rows(language, held, model, after, codec, beta=recipe.beta)
    write_json(folder / "dpo" / "extra.json", _extra(rows, recipe, options, read_json(folder / "dpo" / "results.json")))
    page = report.write(folder / "dpo")
    write_json(folder / "demo.json", {"rows": rows, "recipe": asdict(recipe), "seconds": time.monotonic() - began, "seed": options.seed,
                                      "language": language})  # fmt: skip
    say(f"5/5 {time.monotonic() - began:.0f} seconds in all")
    for line in _lines(rows, recipe, folder, page):
        print(line)
    return 0


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


def _log_probs(model: Any, codec: Codec, language: str, held: Sequence[str]) -> np.ndarray:
    """(prompts, replies) log-probability of every possible reply, its end included."""
    groups = [Record(prompt, tuple(Response(r.text, True) for r in grammar.replies(language, prompt)[i : i + 21]))
              for prompt in held for i in range(0, len(grammar.replies(language, prompt)), 21)]  # fmt: skip
    store, _ = build(groups, codec, max_length=None)
    return np.array([row["logp"] for row in response_rows(model, store, micro_tokens=8192)]).reshape(len(held), -1)


def exact_rows(language: str, held: Sequence[str], before: Any, after: Any, codec: Codec, *, beta: float) -> list[dict[str, Any]]:
    """True reward, KL and unparsable share of the start, the trained model and pi*, each the mean over held-out prompts with 95%.

    Unparsable replies are one outcome with the lowest reward: their mass is one minus that of all replies. KL is over these
    outcomes, nats a reply.
    """
    reward = np.array([[*(grammar.reward(r.features) for r in grammar.replies(language, p)), grammar.reward(None)] for p in held])
    ref, pi = (_with_rest(_log_probs(m, codec, language, held)) for m in (before, after))
    tilted = ref + reward / beta
    best = tilted - np.logaddexp.reduce(tilted, axis=1, keepdims=True)
    rows = []
    for name, logp in (("before", ref), ("after DPO", pi), ("optimum pi*", best)):
        p = np.exp(logp)
        values = {"reward": (p * reward).sum(1), "kl": (p * (logp - ref)).sum(1), "unparsable": p[:, -1]}
        rows.append({"model": name} | {key: _interval(v) for key, v in values.items()})
    return rows


def _with_rest(logp: np.ndarray) -> np.ndarray:
    rest = np.log(np.maximum(1 - np.exp(logp).sum(1, keepdims=True), 1e-12))
    return np.concatenate([logp, rest], axis=1)


def _interval(values: np.ndarray) -> dict[str, float]:
    half = Z95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": float(values.mean()), "low": float(values.mean()) - half, "high": float(values.mean()) + half}


# ---------------------------------------------------------------- telling it


def _cell(value: dict[str, float], percent: bool = False) -> str:
    scale, digits, sign = (100, 2, "%") if percent else (1, 3, "")
    mean, low, high = (scale * value[k] for k in ("mean", "low", "high"))
    return f"{mean:.{digits}f}{sign} [{low:.{digits}f}, {high:.{digits}f}]"


EXPLAINED = (
    "This world has finitely many replies, so these numbers are exact: every reply to {prompts} held-out prompts was enumerated under "
    "each model, and the intervals are over prompts. pi* is the best any policy can do at beta {beta:g}: start times exp(reward / beta), "
    "normalised. Training moved the reward by {gained:+.2f}, {share:.0%} of the way to pi*; of what can be had of reward - beta KL, which "
    "pi* maximises, it has {objective:.0%}."
)
BROKEN = (
    "These settings are wrong on purpose: beta {beta:g} lets the policy go far from its start, and a learning rate of {rate:g} takes it "
    "there without care. The loss asks only for a gap between two answers: where both fall, the rejected one faster, it is content. "
    "Held-out chosen answers lost {lost:.1f} nats (displacement). A word that follows from the words before it is as good a place to "
    "lower a rejected answer as the word that was wrong; the weights are shared, so other sentences break there too. What both sides "
    "lose goes to replies that nobody judged, and almost all of those are broken: {broken}.",
    "Length: {shorter} tokens a sampled reply before, {longer} after. The log-probability of an answer is a sum over its tokens, so a "
    "longer rejected answer has more places where it can be lowered, and a broken reply need not end where a whole one does. The true "
    "reward alone hides this where the replies that can still be read got better. Levers: a larger beta, a smaller learning rate, a "
    "term for the chosen answer (--loss sigmoid+0.2*nll), and a start that seldom breaks.",
)
HEADS = ("model", "true reward", "KL to the start, nats", "unparsable")


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[r["model"], _cell(r["reward"]), _cell(r["kl"]), _cell(r["unparsable"], percent=True)] for r in rows]


def _extra(rows: list[dict[str, Any]], recipe: Recipe, options: Demo, results: dict[str, Any]) -> dict[str, Any]:
    """What the report shows above its own findings."""
    reward = [r["reward"]["mean"] for r in rows]
    value = [r["reward"]["mean"] - recipe.beta * r["kl"]["mean"] for r in rows]
    said = [EXPLAINED.format(prompts=len(grammar.split(options.language, options.seed)[1]), beta=recipe.beta, gained=reward[1] - reward[0],
                             share=(reward[1] - reward[0]) / (reward[2] - reward[0]),
                             objective=(value[1] - value[0]) / (value[2] - value[0]))]  # fmt: skip
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
    return [*lines, f"report   {page}", f"talk     preftune chat {folder}/dpo {folder}/base",
            f"again    preftune dpo --model {folder}/base --data {folder}/pairs.jsonl --output runs/first "
            f"--loss {shlex.quote(recipe.loss)} --beta {recipe.beta:g} --lr {recipe.rate:g} --batch-size {recipe.batch}"]  # fmt: skip
