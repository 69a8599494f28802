"""`preftune compare`: two models on the same prompts. Who answers better, how sure that is, every answer side by side on a page.

Answers come from models (the same seeds for both), from files or from votes; a reward, people or a judge decide each comparison. What
is sampled is kept as it comes: the same command goes on where a stopped one was.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import certainty, endpoints, judges, models, report, runs
from ..config import Compare, resolved_yaml
from ..errors import DataError, UsageError
from ..evaluate import speak
from ..files import atomic_write, fingerprint, new_folder, read_json, read_jsonl, sha256_file, write_json
from ..formats import FORBIDDEN, read, read_prompts, to_json
from ..formats.layouts import parse_prompt
from ..formats.sources import BLANK, rows
from ..records import Judgement, Message, Record, Response, Text, as_text, prompt_key
from ..report.evaluated import comparison_page
from ..rewards import scorer
from ..screen import bar, clean, say, with_interval
from ..tokens import encode_prompt, make_codec

TOKENS = 256  # of an answer, where nothing says otherwise
CHUNK = 64  # prompts between two moments at which finished answers are on the disk
# What may differ where a stopped comparison goes on: no number depends on it.
FREE = ("output", "device", "threads", "batch_size", "concurrency", "retries", "timeout", "key_variable", "price_in", "price_out",
        "skip_bad")  # fmt: skip
FEW = 10  # prompts below which nothing is called better
DIFFERENT = 0.05  # a win rate that moves by more at equal length is worth a sentence


@dataclass(frozen=True)
class Duel:
    """One comparison: both answers to a prompt, and what A got of it: 1, 0.5 (a tie), 0; None where nobody decided. `shown` is the
    place at which A stood before whoever decided, or None."""

    prompt: Text
    a: Response
    b: Response
    wins: float | None = None
    shown: int | None = None


# ---------------------------------------------------------------- answers


def _began(name: str) -> Mapping[str, Any]:
    """The options of the run folder that a model's name is; empty for any other model."""
    return report.read_run(Path(name)).options if (Path(name) / "config.yaml").is_file() else {}


def resolved(options: Compare) -> Compare:
    """The options with what run A knows: the model that it began from as B, and how long it sampled."""
    if options.answers:
        return options
    if not options.model:
        raise UsageError(f"two models, or --answers A.json B.json, must be given, for example:\n  {Compare.EXAMPLE}")
    own = _began(options.model[0])
    found: dict[str, Any] = {}
    if len(options.model) == 1:
        if not own.get("model"):
            raise UsageError(f"{options.model[0]}: is no run folder, so name the model to compare it with")
        found["model"] = [options.model[0], str(own["model"])]
        say(f"B is what the run began from: {clean(found['model'][1])}")
    if options.sample_tokens is None:
        found["sample_tokens"] = int(own.get("sample_tokens") or TOKENS)
    return replace(options, **found)


def _prompts(options: Compare) -> list[Text]:
    """Those of the files, or the held-out ones that run A sampled, each once. Raises UsageError where there are neither."""
    if options.prompts:
        found = read_prompts(options.prompts, max_records=options.max_records)
        if len(set(found)) < len(found):
            say(f"{len(found) - len(set(found))} prompts stand there twice: each is answered once (--k N for several answers)")
        return list(dict.fromkeys(found))
    samples = report.read_run(Path(options.model[0])).samples if _began(options.model[0]) else []
    shown = list(dict.fromkeys(parse_prompt(row["prompt"], "prompt") for row in samples))[: options.max_records]
    if not shown:
        raise UsageError(f"--prompts FILE must be given: {options.model[0]} is no run that sampled held-out prompts")
    say(f"prompts: the {len(shown)} held-out ones of {clean(options.model[0])}")
    return shown


def sampled(options: Compare, folder: Path | None) -> list[Duel]:
    """Both models' answers to every prompt. With a folder each is kept there as AlpacaEval's rows, and not sampled again."""
    prompts = _prompts(options)
    if options.dry_run:
        count = 2 * options.k * len(prompts)
        by = clean(options.reward or options.judge or "nobody")
        say(f"{len(prompts):,} prompts, {count:,} answers of at most {options.sample_tokens} tokens "
            f"({count * int(options.sample_tokens or 0):,} at most); decided by {by}; nothing was done")  # fmt: skip
        return []
    one = _answers(options.model[0], prompts, options, folder and folder / "a.json")
    two = _answers(options.model[1], prompts, options, folder and folder / "b.json")
    return [Duel(prompt, a, b) for prompt, ours, theirs in zip(prompts, one, two, strict=True)
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip


def _answers(name: str, prompts: Sequence[Text], options: Compare, path: Path | None) -> list[list[Response]]:
    """k answers of a model to each prompt."""
    device = models.pick_device(options.device)
    kept = _kept(path) if path else []
    if len(kept) == len(prompts) * options.k:
        return [kept[i : i + options.k] for i in range(0, len(kept), options.k)]
    model, tokenizer = models.load(name, dtype=options.dtype, device=device, offline=options.offline)
    models.use_threads(model, options.threads)
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, control_tokens=options.control_tokens)
    longest, window = max(len(encode_prompt(codec, p)) for p in prompts), models.window_of(model.config)
    if window and longest + int(options.sample_tokens or 0) > window:
        raise DataError(f"{name}: the longest prompt has {longest} tokens, --sample-tokens is {options.sample_tokens}, and the model has "
                        f"{window} positions")  # fmt: skip
    source = {"model": name, "weights": models.weights_fingerprint(name, offline=options.offline), "temperature": options.temperature,
              "top_p": options.top_p, "seed": options.seed, "max_tokens": options.sample_tokens}  # fmt: skip
    if any(dict(r.source or {}) != source for r in kept):
        raise UsageError(f"{path}: holds answers of another model or other settings; name another --output")
    out, first = list(kept), len(kept) // options.k
    with bar(f"sampling {clean(Path(name).name)}", len(prompts)) as advance:
        for a in range(first, len(prompts), CHUNK):
            part = prompts[a : a + CHUNK]
            spoken = speak(model, codec, part, max_tokens=int(options.sample_tokens or 0), k=options.k, seed=options.seed,
                           temperature=options.temperature, top_p=options.top_p, rows_at_once=options.batch_size,
                           numbers=range(a, a + len(part)))  # fmt: skip
            out += [replace(r, source=source) for r in spoken.responses()]
            if path:
                _keep(path, prompts, out, options.k)
            advance(min(a + CHUNK, len(prompts)), len(prompts))
    return [out[i : i + options.k] for i in range(0, len(out), options.k)]


def _keep(path: Path, prompts: Sequence[Text], responses: Sequence[Response], k: int) -> None:
    """Answers as AlpacaEval's rows, with what is known of them beside."""
    table = [{"instruction": as_text(prompts[i // k]), "output": as_text(r.text), "generator": dict(r.source or {}).get("model", ""),
              "finished": r.finished, "source": dict(r.source or {})} for i, r in enumerate(responses)]  # fmt: skip
    atomic_write(path, json.dumps(table, ensure_ascii=False, indent=1) + "\n")


def _kept(path: Path) -> list[Response]:
    """What a stopped comparison left."""
    return [Response(row["output"], row["finished"], source=row["source"]) for row in read_json(path)] if path.is_file() else []


def from_files(paths: Sequence[str]) -> tuple[list[Duel], list[str]]:
    """Answers of two files of AlpacaEval's rows, matched by instruction, in the order of the first; and the generators' names.

    Raises DataError (file:line) for a row of another form, or where no instruction stands in both.
    """
    tables, names = [], []
    for path in paths:
        table: dict[str, list[str]] = {}
        name = ""
        for line, number, row in rows(Path(path)):
            if row is BLANK:
                continue
            if isinstance(row, DataError):
                raise DataError(row.reason, path=path, line=line)
            cells = row if isinstance(row, dict) else {}
            if wrong := next((key for key in ("instruction", "output") if not isinstance(cells.get(key), str)), None):
                what = f" (row {number} of the array)" if number else ""
                raise DataError(f"no text, expected rows with instruction, output, generator{what}", path=path, line=line, field=wrong)
            table.setdefault(row["instruction"], []).append(row["output"])
            name = name or str(row.get("generator") or "")
        tables.append(table)
        names.append(name or Path(path).stem)
    one, two = tables
    both = [text for text in one if text in two]
    alone = [sum(len(answers) for text, answers in mine.items() if text not in other) for mine, other in ((one, two), (two, one))]
    uneven = sum(abs(len(one[text]) - len(two[text])) for text in both)
    if not both:
        raise DataError("no instruction stands in both files", path=", ".join(paths))
    if any(alone) or uneven:
        say(f"left out {sum(alone) + uneven} answers whose instruction the other file has not, or not so often")
    if names[0] == names[1]:
        names = [f"{names[0]} ({Path(path).name})" for path in paths]
    return [Duel(text, Response(a), Response(b)) for text in both for a, b in zip(one[text], two[text], strict=False)], names


def _ranks(record: Record) -> Iterator[tuple[dict[int, int], frozenset[int]]]:
    """What each voice says of a record's answers: answer -> rank, 0 the best; and those whose order among themselves it leaves open.

    Raises DataError for votes that are not whole.
    """
    for judgement in record.judgements:
        if judgement.weight != 1 or judgement.prob is not None:
            path, _, line = record.where.rpartition(":")
            raise DataError("a vote with a weight or a probability, expected one voice each", path=path, line=int(line), field="judgements")
        tiers = {i: rank for rank, tied in enumerate(judgement.order) for i in tied}
        yield tiers | dict.fromkeys(judgement.below, len(judgement.order)), frozenset(judgement.below)
    if record.labels is not None:
        yield {i: 1 - int(label) for i, label in enumerate(record.labels) if isinstance(label, bool)}, frozenset()


def from_votes(paths: Sequence[str], names: Sequence[str]) -> list[Duel]:
    """Comparisons that people or judges decided: every voice on records with an answer of each model; both good or both bad is a tie.

    Raises DataError where no record compares the two, with the names that there are.
    """
    duels, seen, skipped = [], set(), 0
    for record in read(paths).records:
        speakers = [str(dict(r.source or {}).get("model", "")) for r in record.responses]
        ours, theirs = ([i for i, name in enumerate(speakers) if name == wanted] for wanted in names)
        seen |= set(speakers)
        found = [(a, b, rank[a], rank[b]) for rank, open_ in _ranks(record) for a in ours for b in theirs
                 if a in rank and b in rank and not {a, b} <= open_]  # fmt: skip
        duels += [Duel(record.prompt, record.responses[a], record.responses[b], 0.5 + 0.5 * ((x < y) - (x > y)), int(a > b))
                  for a, b, x, y in found]  # fmt: skip
        skipped += not found
    if not duels:
        known = ", ".join(sorted(filter(None, seen))[:6]) or "nobody named"
        raise DataError(f"no record compares {names[0]!r} with {names[1]!r}; the answers are of {known}", path=", ".join(paths))
    if skipped:
        say(f"{skipped} records do not compare the two: not counted")
    return duels


# ---------------------------------------------------------------- who won


def decided(duels: Sequence[Duel], options: Compare) -> list[Duel]:
    """Every comparison with its rewards and who has the larger one. The same text twice is a tie."""
    if options.reward is None:
        return list(duels)
    rule = scorer(options.reward, device=models.pick_device(options.device), dtype=options.dtype, offline=options.offline)
    prompts = [d.prompt for d in duels for _ in range(2)]
    say(f"deciding {len(duels):,} comparisons by {clean(rule.name)}")
    scores = rule(prompts, [r for d in duels for r in (d.a, d.b)]).reshape(-1, 2)
    out = []
    for duel, (one, two) in zip(duels, scores.tolist(), strict=True):
        gap = 0.0 if as_text(duel.a.text) == as_text(duel.b.text) or abs(one - two) <= options.margin else one - two
        out.append(replace(duel, a=replace(duel.a, score=one), b=replace(duel.b, score=two), wins=0.5 + 0.5 * np.sign(gap)))
    return out


def verdicts(duels: Sequence[Duel], options: Compare, folder: Path) -> list[Duel]:
    """What a judge says of each comparison in both orders: a tie where the order changes the verdict, or both answers are one text.

    Every verdict is kept in verdicts.jsonl as it comes; what is there is not asked again. One that is missing for good (--skip-bad) leaves
    the comparison out. Raises EndpointError where verdicts are missing.
    """
    question = Path(options.question).read_text(encoding="utf-8").strip() if options.question else ""
    sides = [(as_text(d.a.text), as_text(d.b.text)) for d in duels]
    differ = [n for n, (a, b) in enumerate(sides) if a != b]
    path, asked = folder / "verdicts.jsonl", 2 * len(differ)
    if not path.is_file():
        endpoint, jobs = endpoints.connect(str(options.judge), options), {}
        for i, n in enumerate(differ):
            for turned, (left, right) in enumerate((sides[n], sides[n][::-1])):
                text = judges.comparison(as_text(duels[n].prompt), left, right, question=question)
                number = 2 * i + turned
                jobs[number] = endpoints.body(endpoint, (Message("user", text),), temperature=0.0, top_p=1.0,
                                              max_tokens=options.judge_tokens, seed=endpoints.seed_of(0, number))  # fmt: skip
        with runs.draft(path, {"jobs": fingerprint(jobs)}) as found:
            endpoints.gather(endpoint, jobs, lambda answer: judges.read_verdict(answer.text), found, "judging",
                             leave_out=options.skip_bad)  # fmt: skip
            found.publish(lambda: ({"comparison": differ[i // 2], "turned": bool(i % 2), "verdict": found.item(i)} for i in range(asked)))
    said = [row["verdict"] for row in read_jsonl(path)]
    wins = {"first": 1.0, "second": 0.0, "tie": 0.5}
    out = {n: None if None in pair else wins[judges.both_orders(*pair)]
           for n, pair in zip(differ, zip(said[::2], said[1::2], strict=True), strict=True)}  # fmt: skip
    if missing := sum(x is None for x in out.values()):
        say(f"left out {missing} comparisons: without both verdicts")
    if duels and missing == len(duels):
        raise DataError("no comparison has both verdicts", path=path)
    return [replace(d, wins=out.get(n, 0.5)) for n, d in enumerate(duels) if out.get(n, 0.5) is not None]


def results(duels: Sequence[Duel], names: Sequence[str], by: str | None, *, seed: int) -> dict[str, Any]:
    """Everything that is said of A against B: win rate with intervals, tests, rate at equal length, rewards, lengths, a sentence."""
    _, cluster = np.unique([prompt_key(Record(d.prompt, ())) for d in duels], return_inverse=True)
    size = np.array([[len(as_text(d.a.text)), len(as_text(d.b.text))] for d in duels], float)
    gap = size[:, 0] - size[:, 1]
    facts: dict[str, Any] = {"a": names[0], "b": names[1], "decided_by": by, "prompts": int(cluster.max()) + 1, "comparisons": len(duels),
                             "identical": sum(as_text(d.a.text) == as_text(d.b.text) for d in duels), "unit": "characters"}  # fmt: skip
    for side, column in (("a", size[:, 0]), ("b", size[:, 1])):
        facts[f"length_{side}"], facts[f"length_{side}_se"] = certainty.mean_of(column, cluster)
    facts["length_difference"], facts["length_low"], facts["length_high"] = certainty.interval_of(gap, cluster)
    wins = np.array([np.nan if d.wins is None else d.wins for d in duels], float)
    if np.isnan(wins).all():
        return facts | {"wins": None, "sentence": "nobody decided: give --reward, --judge or --votes"}
    facts |= _rate(wins, cluster, gap, seed)
    scores = np.array([[np.nan if r.score is None else r.score for r in (d.a, d.b)] for d in duels])
    if not np.isnan(scores).any():
        difference = scores[:, 0] - scores[:, 1]
        facts["reward"] = dict(zip(("difference", "low", "high"), certainty.interval_of(difference, cluster), strict=True)) | {
            "a": float(scores[:, 0].mean()), "b": float(scores[:, 1].mean()), "p": certainty.paired_t(difference, cluster)}  # fmt: skip
    shown = [d for d in duels if d.shown is not None and d.wins not in (None, 0.5)]
    if len({d.shown for d in shown}) == 2:  # where A stood first each time, the place and A cannot be told apart
        first = np.array([(d.wins == 1) == (d.shown == 0) for d in shown], float)
        share, low, high = certainty.share_of(first, np.arange(len(first)))
        facts["first_shown_won"] = {"share": share, "low": low, "high": high, "count": len(first)}
    return facts | {"sentence": sentence(facts)}


def _rate(wins: np.ndarray, cluster: np.ndarray, gap: np.ndarray, seed: int) -> dict[str, Any]:
    """The win rate of A, ties half, and how sure it is."""
    rate, error = certainty.mean_of(wins, cluster)
    _, low, high = certainty.share_of(wins, cluster)
    better, worse = certainty.signs(wins - 0.5, cluster)
    several = int(cluster.max()) > 0
    boot = certainty.bootstrap_mean(wins, cluster, seed=seed) if several else (None, None)
    equal = certainty.at_equal_length(wins, gap, cluster)
    clear = (wins != 0.5) & (gap != 0)
    longer, longer_low, longer_high = certainty.share_of(((wins == 1) == (gap > 0))[clear].astype(float), cluster[clear])
    return {
        "wins": int((wins == 1).sum()), "losses": int((wins == 0).sum()), "ties": int((wins == 0.5).sum()), "win_rate": rate,
        "win_rate_se": error, "low": low, "high": high, "bootstrap_low": boot[0], "bootstrap_high": boot[1],
        "prompts_better": better, "prompts_worse": worse, "p_sign": certainty.sign_test(better, worse),
        "p_paired": certainty.paired_t(wins - 0.5, cluster),
        "needed": None if error is None else certainty.prompts_needed(rate - 0.5, error, int(cluster.max()) + 1),
        "equal_length": None if equal is None else vars(equal),
        "longer_won": {"share": longer, "low": longer_low, "high": longer_high, "count": int(clear.sum())},
    }  # fmt: skip


def sentence(facts: Mapping[str, Any]) -> str:
    """What the numbers say, in one sentence or two; that they say nothing, where it is so."""
    rate, low, high = facts["win_rate"], facts["low"], facts["high"]
    if low is None:
        return f"not enough data to tell: one prompt says nothing of others (A wins {100 * rate:.0f}% of its comparisons)"
    span = f"{100 * rate:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {facts['prompts']:,} prompts, ties half"
    if (low > 0.5 or high < 0.5) and facts["prompts"] >= FEW:
        text = f"{'A' if low > 0.5 else 'B'} is better: A wins {span}"
    else:
        text = f"not enough data to tell: A wins {span}"
        if facts["needed"]:
            count = max(facts["needed"], facts["prompts"] + 1, FEW)
            text += f"; if that is the true rate, about {count:,} prompts would tell (four times in five)"
        else:
            text += "; at exactly one half no number of prompts would tell"
    equal = facts["equal_length"]
    if equal and abs(equal["rate"] - rate) > DIFFERENT:
        text += f". At equal length it would be {100 * equal['rate']:.1f}% [{100 * equal['low']:.1f}, {100 * equal['high']:.1f}]"
    return text


def unfit(text: str) -> bool:
    """Whether an answer would be refused where records are read."""
    return not text.strip() or FORBIDDEN.search(text) is not None


def record_of(duel: Duel, by: str | None) -> Record:
    """The comparison as a record, with its judgement where there is one: what `rate`, `dpo` and `score` read."""
    orders = {1.0: ((0,), (1,)), 0.0: ((1,), (0,)), 0.5: ((0, 1),)}
    judgements = () if duel.wins is None else (Judgement(orders[duel.wins], by=by),)
    return Record(duel.prompt, (duel.a, duel.b), judgements)


def annotated(duels: Sequence[Duel], by: str | None) -> list[dict[str, Any]]:
    """What was decided as AlpacaEval's rows: B is the baseline, 1 says that it is better, 2 that A is, 1.5 a draw."""
    return [{"instruction": as_text(d.prompt), "output_1": as_text(d.b.text), "generator_1": dict(d.b.source or {}).get("model", ""),
             "output_2": as_text(d.a.text), "generator_2": dict(d.a.source or {}).get("model", ""), "annotator": by,
             "preference": 1 + d.wins} for d in duels if d.wins is not None]  # fmt: skip


# ---------------------------------------------------------------- the verb


def compared(options: Compare) -> dict[str, Any]:
    """Sample or read, decide, count, write; everything that results.json holds. Raises DataError, ModelError, UsageError."""
    options = resolved(options)
    folder = _folder(options) if options.output and not options.dry_run else None
    names = list(options.model)
    if options.answers:
        duels, names = from_files(options.answers)
    elif options.votes:
        duels = from_votes(options.votes, names)
    else:
        duels = sampled(options, folder)
    if options.dry_run:
        return {"dry_run": True}
    duels = verdicts(duels, options, folder) if options.judge and folder else decided(duels, options)
    duels = [replace(d, a=_named(d.a, names[0]), b=_named(d.b, names[1])) for d in duels]
    by = options.reward or options.judge or ("votes" if options.votes else None)
    facts = results(duels, names, by, seed=options.seed)
    facts |= {"seed": options.seed, "command": runs.command("compare", options), "versions": runs.versions(),
              "sampling": None if options.answers or options.votes else {"temperature": options.temperature, "top_p": options.top_p,
              "k": options.k, "max_tokens": options.sample_tokens}}  # fmt: skip
    if folder:
        fit = [d for d in duels if not any(unfit(as_text(r.text)) for r in (d.a, d.b))]
        if len(fit) < len(duels):
            say(f"{len(duels) - len(fit)} comparisons are not in comparisons.jsonl: an answer is empty or holds what no data file may hold")
        atomic_write(folder / "comparisons.jsonl", "".join(json.dumps(to_json(record_of(d, by)), ensure_ascii=False) + "\n" for d in fit))
        write_json(folder / "results.json", facts)
        if facts["wins"] is not None:
            write_json(folder / "annotations.json", annotated(duels, by))
        shown = [{"prompt": as_text(d.prompt), "a": as_text(d.a.text), "b": as_text(d.b.text), "score_a": d.a.score, "score_b": d.b.score,
                  "won": {1.0: "a", 0.0: "b", 0.5: "tie", None: "open"}[d.wins]} for d in duels]  # fmt: skip
        atomic_write(folder / "compare.html", comparison_page(facts, shown))
        say(f"written       {clean(str(folder))}/compare.html, comparisons.jsonl, results.json")
    return facts


def _named(response: Response, name: str) -> Response:
    return response if response.source else replace(response, source={"model": name})


def _folder(options: Compare) -> Path:
    """The output folder: new, or that of the same command, which then goes on. Raises UsageError for any other."""
    folder, text = Path(str(options.output)), resolved_yaml(replace(options, **{n: getattr(Compare(), n) for n in FREE}))
    files = (*options.prompts, *options.answers, *options.votes, *([options.question] if options.question else []))
    made = {"options": fingerprint(text), "files": {name: sha256_file(name) for name in files}}
    if (folder / "made-from.json").is_file():
        if read_json(folder / "made-from.json") != made:
            raise UsageError(f"--output {folder}: holds a comparison of other options or files; name another folder")
        say(f"{clean(str(folder))}: going on")
        return folder
    new_folder(folder)
    atomic_write(folder / "config.yaml", resolved_yaml(options))
    write_json(folder / "made-from.json", made)
    return folder


def _show(facts: Mapping[str, Any]) -> None:
    """The lines that a person reads."""
    lines = [("A", str(facts["a"])), ("B", str(facts["b"]))]
    if facts["wins"] is not None:
        lines.append(("decided by", str(facts["decided_by"])))
        lines.append(("A won", f"{facts['wins']:,}, B {facts['losses']:,}, ties {facts['ties']:,} of {facts['comparisons']:,} comparisons "
                               f"on {facts['prompts']:,} prompts"))  # fmt: skip
        if facts["low"] is not None:
            drawn = f"bootstrap by prompt [{facts['bootstrap_low']:.3f}, {facts['bootstrap_high']:.3f}]"
            rate = with_interval(facts["win_rate"], facts["low"], facts["high"])
            lines.append(("win rate of A", f"{rate} ({drawn}), p {facts['p_sign']:.3g}"))
        if equal := facts["equal_length"]:
            out = "" if equal["inside"] else "; no pairs near equal length: an extrapolation"
            lines.append(("at equal length", with_interval(equal["rate"], equal["low"], equal["high"]) + out))
        if longer := facts["longer_won"]["count"]:
            lines.append(("longer one won", f"{facts['longer_won']['share']:.3f} of {longer:,} decided comparisons"))
    if found := facts.get("first_shown_won"):
        lines.append(("first shown won", f"{with_interval(found['share'], found['low'], found['high'])} of {found['count']:,}"))
    if found := facts.get("reward"):
        gap = with_interval(found["difference"], found["low"], found["high"], "+.3f")
        lines.append(("reward", f"A {found['a']:.3f}, B {found['b']:.3f}, difference {gap}"))
    gap = with_interval(facts["length_difference"], facts["length_low"], facts["length_high"], "+.0f")
    lines.append(("characters", f"A {facts['length_a']:.0f}, B {facts['length_b']:.0f}, difference {gap}"))
    for name, text in lines:
        print(clean(f"{name:<16}{text}"))
    print(clean(str(facts["sentence"])))


def run(options: Compare) -> int:
    """Compare and show."""
    facts = compared(options)
    if facts.get("dry_run"):
        return 0
    _show(facts)
    if facts["wins"] is None:
        pair = " ".join(shlex.quote(str(facts[side])) for side in "ab")
        say(f"next          preftune chat {clean(pair)} --votes votes.jsonl")
    return 0
