"""`preftune frontier`: several methods, KL weights and seeds on one file, each judged by one reward on the same prompts.

The folder holds `train.jsonl` and `held.jsonl` (one split for all; `held-unjudged.jsonl` for methods that imitate), a run folder per point
(each resumes by itself), the points, the table, the figure and the page. The same command goes on where a stopped one was; a run that
fails is named and the others go on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import frontier, models, runs
from ..certainty import mean_of
from ..config import Dpo, Frontier, Given, OnlineDpo, Options, Ppo, Sft, build, convert, hint, loss_facts, resolved_yaml, specs
from ..errors import Interrupted, PreftuneError, UsageError, nearest
from ..files import atomic_write, new_folder, read_json, read_jsonl, run_lock, write_json
from ..formats import read, to_json
from ..frontier import Point
from ..pairing import accept
from ..records import Record, prompt_key
from ..report.frontiers import frontier_page, frontier_svg
from ..rewards import scorer
from ..sampling import sample
from ..screen import bar, clean, say, with_interval
from ..store import from_ids
from ..tokens import encode_prompt, end_ids, make_codec
from . import dpo, online, ppo, sft


@dataclass(frozen=True)
class Method:
    """A line of the table of methods.

    Args:
        verb: what trains. settings: its options. betas: whether it has a KL weight. rewarded: whether it needs --reward.
        records: (records, options, beta) -> what it trains on, or None: the training records as they are.
    """

    verb: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    betas: bool = True
    rewarded: bool = False
    records: Callable[[Sequence[Record], Frontier, float], list[Record]] | None = None


def _unjudged(records: Sequence[Record], options: Frontier, beta: float) -> list[Record]:
    """The same responses, all alike."""
    return [replace(r, judgements=(), labels=None) for r in records]


def _accepted(records: Sequence[Record], options: Frontier, beta: float) -> list[Record]:
    """Responses accepted towards pi* by their scores, in one pass; each prompt's best stands for the best there is."""
    chance, out, seen = np.random.default_rng(options.seed), [], 0
    for record in records:
        scores = np.array([r.score for r in record.responses], float)
        if len(scores) < 2 or not np.isfinite(scores).all():
            continue
        seen += len(scores)
        kept = accept(scores, chance.random(len(scores)), beta=beta, ceiling=float(scores.max()))
        out.append(replace(record, responses=tuple(record.responses[i] for i in np.flatnonzero(kept)), judgements=(), labels=None))
    if not out:
        raise UsageError("rejection: no record has two scored responses or more; 'preftune score' scores them")
    say(f"rejection at beta {beta:g}: {sum(len(r.responses) for r in out)} of {seen} responses accepted")
    return out


METHODS: Mapping[str, Method] = {
    "sft": Method("sft", betas=False, records=_unjudged),
    "preferred-ft": Method("sft", {"preferred": True}, betas=False),
    "rejection": Method("sft", records=_accepted),
    "dpo": Method("dpo"),
    "online": Method("online", rewarded=True),
    "ppo": Method("ppo", rewarded=True),
    "rloo": Method("ppo", {"advantage": "rloo"}, rewarded=True),
    "grpo": Method("ppo", {"advantage": "group"}, rewarded=True),
}
BEST_OF_N = "best-of-n"
VERBS: Mapping[str, tuple[type[Options], Callable[[Any], int]]] = {
    "sft": (Sft, sft.run), "dpo": (Dpo, dpo.run), "online": (OnlineDpo, online.run), "ppo": (Ppo, ppo.run),
}  # fmt: skip


def named(options: Frontier) -> dict[str, list[float | None]]:
    """Methods by name, each with its KL weights: its own ('ppo:0.1,1') or --betas; [None] for one that has none. Raises UsageError."""
    common = _numbers(options.betas, "--betas", float)
    out: dict[str, list[float | None]] = {}
    for word in options.methods:
        name, colon, own = word.partition(":")
        if name in out:
            raise UsageError(f"--methods: {name} is named twice")
        if name == BEST_OF_N or not method(name).betas:
            if colon:
                raise UsageError(f"--methods {word}: {name} has no KL weight")
            out[name] = [None]
        else:
            out[name] = _numbers(own.split(","), f"--methods {word}:", float) if colon else common
    return out


def method(name: str) -> Method:
    """The method of a name: one of the table, or a loss of `dpo`. Raises UsageError with the nearest."""
    facts = loss_facts()
    if name in METHODS or name in facts:
        return METHODS.get(name) or Method("dpo", {"loss": name}, betas="beta" in facts[name].arguments)
    known = [*METHODS, BEST_OF_N, *facts]
    raise UsageError(f"--methods {name}: no such method{nearest(name, known)}; give {', '.join([*METHODS, BEST_OF_N])} or a loss")


@dataclass(frozen=True)
class Job:
    """One run to make: its folder, its place in the figure, and its options but for the files it trains on."""

    folder: Path
    method: str
    beta: float | None
    seed: int
    options: Any

    @property
    def setting(self) -> str:
        return "" if self.beta is None else f"beta {self.beta:g}"


# ---------------------------------------------------------------- what there is to do


def _numbers(words: Sequence[str], flag: str, kind: type) -> list[Any]:
    try:
        found = [kind(word) for word in words]
    except ValueError:
        found = []
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise UsageError(f"{flag} {' '.join(words)}: expected different {'whole ' * (kind is int)}numbers above 0")
    return found


def _settings(options: Frontier, methods: Sequence[str]) -> dict[str, Given]:
    """--set [METHOD.]OPTION=VALUE, by method; '' for those of all methods. Raises UsageError."""
    out: dict[str, Given] = {}
    for text in options.set_:
        label, (left, equals, right) = f"--set {text}:", text.partition("=")
        name, dot, key = left.rpartition(".")
        if not equals or not key:
            raise UsageError(f"{label} expected METHOD.OPTION=VALUE, such as ppo.lr=1e-4")
        if dot and name not in methods:
            raise UsageError(f"{label} {name} is not among --methods{nearest(name, methods)}")
        verbs = {method(name).verb} if dot else {method(m).verb for m in methods if m != BEST_OF_N}
        for cls in (VERBS[verb][0] for verb in verbs):
            spec = next((s for s in specs(cls) if s.key == key.replace("-", "_")), None)
            if spec is None:
                raise UsageError(f"{label} no such option of {cls.__name__.lower()}{hint(key, cls)}")
            value: Any = [convert(spec, w, label) for w in right.split(",")] if spec.kind == "texts" else convert(spec, right, label)
            out.setdefault(name, {})[spec.name] = (value, f"--set {left}")
    return out


def jobs(options: Frontier) -> list[Job]:
    """Every run that the options ask for, its own options checked. Raises UsageError before anything is read."""
    methods, folder = named(options), Path(str(options.output))
    more = _settings(options, list(methods))
    _numbers(options.best_of, "--best-of", int)
    out = []
    for name, betas in methods.items():
        if name == BEST_OF_N:
            continue
        this = method(name)
        if this.rewarded and not options.reward:
            raise UsageError(f"--methods {name}: needs --reward, which its answers are trained on")
        for beta in betas:
            for seed in range(options.seed, options.seed + options.seeds):
                place = folder / "runs" / f"{name}{'' if beta is None else f'-{beta:g}'}-{seed}"
                out.append(Job(place, name, beta, seed, _options(options, this, name, beta, seed, place, more)))
    return out


def _trains_on(place: Path, this: Method) -> Path:
    """The file that a run of this method reads."""
    return place.parent.parent / "train.jsonl" if this.records is None else place.with_name(f"{place.name}.jsonl")


def _options(options: Frontier, this: Method, name: str, beta: float | None, seed: int, place: Path, more: Mapping[str, Given]) -> Options:
    held = Path(str(options.output)) / ("held.jsonl" if this.records is None else "held-unjudged.jsonl")
    values: dict[str, Any] = {
        "model": options.model, "output": str(place), "data": [str(_trains_on(place, this))], "eval_data": [str(held)],
        "eval_reward": options.truth or options.reward, "eval_prompts": options.eval_prompts, "eval_samples": options.eval_samples,
        "sample_tokens": options.sample_tokens, "seed": seed, "keep": 1, "report": False, "device": options.device,
        "offline": options.offline, "threads": options.threads, **this.settings}  # fmt: skip
    if this.rewarded:
        values["reward"] = options.reward
    if beta is not None and this.records is None:
        values["beta"] = beta
    given: Given = {key: (value, f"--methods {name}: {key}") for key, value in values.items() if value is not None}
    cls = VERBS[this.verb][0]
    own = {spec.name for spec in specs(cls)}
    both = {key: value for key, value in more.get("", {}).items() if key in own}
    given |= both | more.get(name, {})
    return build(cls, given, files=False)


# ---------------------------------------------------------------- the split, once


def _split(options: Frontier, folder: Path) -> None:
    """train.jsonl and held.jsonl: prompts apart, by a seeded lot."""
    if (folder / "held.jsonl").is_file():
        return
    records = read(options.data, max_records=options.max_records).records
    keys = list(dict.fromkeys(prompt_key(r) for r in records))
    if len(keys) < 2:
        raise UsageError(f"--data: {len(keys)} prompt; two or more are needed, to train on some and measure on others")
    count = min(len(keys) - 1, max(1, round(options.holdout * len(keys))))
    held = {keys[i] for i in np.random.default_rng(options.seed).permutation(len(keys))[:count]}
    parts: dict[str, list[Record]] = {"train.jsonl": [], "held.jsonl": []}
    for record in records:
        parts["held.jsonl" if prompt_key(record) in held else "train.jsonl"].append(record)
    _write(folder / "held-unjudged.jsonl", _unjudged(parts["held.jsonl"], options, 0.0))
    for name, part in parts.items():  # held.jsonl is written last: its presence says that all are whole
        _write(folder / name, part)
    say(f"{len(parts['train.jsonl'])} records to train on, {len(parts['held.jsonl'])} held out ({count} of {len(keys)} prompts)")


def _write(path: Path, records: Sequence[Record]) -> None:
    atomic_write(path, "".join(json.dumps(to_json(r), ensure_ascii=False) + "\n" for r in records))


# ---------------------------------------------------------------- running


def _train(job: Job) -> None:
    """Make or go on with one run, here. Raises PreftuneError."""
    goes_on = (job.folder / "config.yaml").is_file()
    VERBS[method(job.method).verb][1](type(job.options)(resume=str(job.folder)) if goes_on else job.options)


def _train_apart(job: Job) -> None:
    """The same in a process of its own; what it says goes to NAME.log. Raises PreftuneError with its last line and exit code."""
    goes_on, verb = (job.folder / "config.yaml").is_file(), method(job.method).verb
    config, log = job.folder.with_name(f"{job.folder.name}.yaml"), job.folder.with_name(f"{job.folder.name}.log")
    atomic_write(config, resolved_yaml(job.options))
    words = ["--resume", str(job.folder)] if goes_on else ["--config", str(config)]
    with log.open("wb") as out:
        done = subprocess.run([sys.executable, "-m", "preftune", verb, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        said = f"{''.join(last)} ({log})"
        stopped = next((n for n in (signal.SIGINT, signal.SIGTERM) if done.returncode in (-n, 128 + n)), None)
        if stopped:
            raise Interrupted(said, signal_number=stopped)
        error = PreftuneError(said)
        error.exit_code = done.returncode if done.returncode > 0 else 128 - done.returncode
        raise error


def _make(todo: Sequence[Job], options: Frontier, train: Sequence[Record]) -> list[tuple[Job, PreftuneError]]:
    """Make what is missing, `--jobs` at a time; the runs that failed."""
    missing = [job for job in todo if not (job.folder / "results.json").is_file()]
    for job in missing:
        this = method(job.method)
        if this.records is not None and not (path := _trains_on(job.folder, this)).is_file():
            _write(path, this.records(train, options, job.beta or 0.0))
    failed: list[tuple[Job, PreftuneError]] = []

    def one(job: Job) -> None:
        say(f"{missing.index(job) + 1}/{len(missing)} {job.folder.name}")
        try:
            (_train if options.jobs == 1 else _train_apart)(job)
        except (UsageError, Interrupted):
            raise
        except PreftuneError as error:
            failed.append((job, error))
            say(f"{job.folder.name} failed: {clean(str(error))}")

    if options.jobs == 1:
        for job in missing:
            one(job)
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, missing))
    return sorted(failed, key=lambda item: todo.index(item[0]))


def _drawn_points(options: Frontier, folder: Path) -> list[Point]:
    """Best-of-n for every n and seed, from one set of draws of the start for each seed; kept in best-of-n.jsonl."""
    kept = folder / "best-of-n.jsonl"
    found = [Point(**row) for row in read_jsonl(kept)]
    sizes = _numbers(options.best_of, "--best-of", int)
    missing = sorted({*range(options.seed, options.seed + options.seeds)} - {p.seed for p in found})
    if not missing:
        return found
    device = models.pick_device(options.device)
    model, tokenizer = models.load(str(options.model), device=device, offline=options.offline)
    models.use_threads(model, options.threads)
    codec = make_codec(tokenizer)
    prompts = [r.prompt for r in read([folder / "held.jsonl"]).records][: options.eval_prompts]
    ids, ends = [encode_prompt(codec, p) for p in prompts], [end_ids(codec, p) for p in prompts]
    proxy, truth = (scorer(str(spec), device=device, offline=options.offline)
                    for spec in (options.reward or options.truth, options.truth or options.reward))  # fmt: skip
    many = options.best_of_samples
    for seed in missing:
        with bar(f"best of n, seed {seed}", len(ids) * many) as advance:
            drawn = sample(model, ids, ends=ends, k=many, max_tokens=options.sample_tokens, seed=seed, rows_at_once=64, progress=advance)
        store = from_ids(ids, [[s.ids for s in row] for row in drawn])
        judged = [score.rollouts(store, codec, prompts).reshape(len(ids), many) for score in (proxy, truth)]
        tokens = sum(len(s.ids) for row in drawn for s in row)
        for n in (1, *(n for n in sizes if n > 1)):  # one draw is the start
            pairs = np.array([frontier.best_of_n(p, t, n) for p, t in zip(*judged, strict=True)])
            (reward, reward_se), (kl, kl_se) = (mean_of(column, np.arange(len(pairs))) for column in pairs.T)
            found.append(Point(BEST_OF_N, f"n {n}", seed, int(n > 1), n == sizes[-1], kl, kl_se, reward, reward_se, None,
                               tokens * n // many, 0.0))  # fmt: skip
        atomic_write(kept, "".join(json.dumps(asdict(point)) + "\n" for point in found))  # a seed is there with every n, or not at all
    return found


def run(options: Frontier) -> int:
    """Run what is missing, then the table, the figure and the page. The exit code is that of the first run that failed, or 0."""
    todo, folder = jobs(options), Path(str(options.output))
    if not (options.truth or options.reward):
        raise UsageError("--truth (or --reward): what every policy is judged by")
    if options.dry_run:
        for job in todo:
            print(clean(runs.command(method(job.method).verb, job.options)))
        say(f"{len(todo)} runs{', and draws for best-of-n' if BEST_OF_N in options.methods else ''}: nothing was done")
        return 0
    _claim(options, folder)
    with run_lock(folder):
        _split(options, folder)
        train = read([folder / "train.jsonl"]).records
        points = _drawn_points(options, folder) if BEST_OF_N in options.methods else []
        failed = _make(todo, options, train)
        for job in todo:
            if (job.folder / "results.json").is_file():
                points += frontier.points_of(runs.Log(job.folder / "metrics.jsonl").rows(), method=job.method, setting=job.setting,
                                             seed=job.seed)  # fmt: skip
        _finish(options, folder, points, failed)
    return failed[0][1].exit_code if failed else 0


def _claim(options: Frontier, folder: Path) -> None:
    """A new folder, or one that the same options began. Raises UsageError."""
    text = resolved_yaml(replace(options, dry_run=False, jobs=1))
    if (folder / "frontier.yaml").is_file():
        if (folder / "frontier.yaml").read_text(encoding="utf-8") != text:
            raise UsageError(f"--output {folder}: holds a frontier of other options (frontier.yaml); name a new folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output {folder}: is not empty; name a new folder")
    new_folder(folder)
    new_folder(folder / "runs")
    atomic_write(folder / "frontier.yaml", text)


def _finish(options: Frontier, folder: Path, points: Sequence[Point], failed: Sequence[tuple[Job, PreftuneError]]) -> None:
    if not points:
        raise failed[0][1]
    extra = read_json(folder / "exact.json") if (folder / "exact.json").is_file() else None
    facts = frontier.table(points, limit=options.kl_limit, at=_numbers(options.at, "--at", float))
    facts |= {"points": [asdict(p) for p in points], "truth": options.truth or options.reward, "reward": options.reward,
              "failed": [{"run": job.folder.name, "why": str(error)} for job, error in failed], "exact": extra,
              "prompts": options.eval_prompts, "samples": options.eval_samples, "command": runs.command("frontier", options)}  # fmt: skip
    write_json(folder / "frontier.json", facts)
    atomic_write(folder / "frontier.svg", frontier_svg(facts, alone=True))
    atomic_write(folder / "frontier.html", frontier_page(facts))
    for line in lines(facts):
        print(clean(line))
    say(f"written       {folder}/frontier.html, frontier.svg, frontier.json")


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The table on the screen: area under each frontier, heights at the KLs asked for, the best point, what it cost."""
    heads = ["method", f"mean to {facts['limit']:g} nats", *(f"at {kl:g}" for kl in facts["at"]), "best", "at KL", "tokens", "seconds"]
    rows = [heads]
    for name, found in sorted(facts["methods"].items(), key=lambda item: -item[1]["area"]["mean"]):
        best = found["best"]
        rows.append([name, *(with_interval(x["mean"], x["low"], x["high"]) for x in (found["area"], *found["heights"])),
                     f"{best['reward']:.3f}" if best else "", f"{best['kl']:.2f}" if best else "", f"{found['tokens']:,.0f}",
                     f"{found['seconds']:.1f}"])  # fmt: skip
    width = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    out = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows]
    for name, found in facts["differences"].items():
        mean, low, high = (found["area"][key] for key in ("mean", "low", "high"))
        sure = low is not None and (low > 0 or high < 0)
        out.append(f"{name}: {with_interval(mean, low, high, '+.3f')}{'' if sure else ': not enough data to tell'}")
    return out
