"""`preftune evaluate`: what one model does on held-out data, each number with its interval: a table, JSON, a page.

Held-out accuracy, loss, margins, calibration, displacement; KL both ways, entropy, length and repetition on fresh samples; the model's
implicit reward beside explicit ones. Nothing is trained and nothing kept but what --output and --page name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import certainty, evaluate, models, reference, report, runs
from ..config import Evaluate, Reward, data_source, learns_value, loss_terms, scored_terms
from ..errors import DataError, UsageError
from ..evaluate import Spoken, distinct, divergences, judged, kl_summary, read_out, repeated, speak
from ..files import atomic_write, write_json
from ..formats import read
from ..objectives import Objective, preference
from ..records import Record, Response, Text, as_text, prompt_key
from ..report.evaluated import evaluation_page
from ..rewards import Scorer, reward_codec, scorer
from ..screen import bar, clean, say, with_error, with_interval
from ..store import MISMATCHED, Store, build
from ..tokens import Codec, encode_prompt, make_codec
from .data import pieces

LONGER = "longer answer"  # what a rule without any sense of quality would say
GRAM = 4  # a sequence of so many tokens that comes again is a repetition
SURE = 1e-12


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the model, the reference beside it or None, and how both read text."""

    model: Any
    frozen: Any | None
    codec: Codec
    tokenizer: Any
    device: str
    weights: str  # fingerprint of the reference


def of_run(options: Evaluate) -> Evaluate:
    """The options with what a run folder given as --model knows of itself: its reference, loss and beta, where they were not given."""
    folder = Path(str(options.model))
    if not (folder / "config.yaml").is_file():
        return options
    own = report.read_run(folder).options
    found: dict[str, Any] = {}
    if options.reference is None and own.get("model"):
        found["reference"] = str(own["model"])
    if options.loss is None and own.get("loss"):
        found["loss"] = str(own["loss"])
        found["loss_arguments"] = {**(own.get("loss_arguments") or {}), **options.loss_arguments}
        if options.beta is None and own.get("beta") is not None and "beta" not in options.loss_arguments:
            found["beta"] = float(own["beta"])
        if options.label_smoothing is None:
            found["label_smoothing"] = float(own.get("label_smoothing") or 0)
    if found:
        say(f"{folder} says: {', '.join(f'{name} {value}' for name, value in found.items() if value not in ({}, 0.0))}")
    return replace(options, **found)


def of_judge(options: Evaluate) -> tuple[Evaluate, list[tuple[float, str, dict[str, float]]]]:
    """The options for a reward model, which scores answers and gives none, and the losses of its run, else Bradley-Terry's.

    Raises UsageError for what it has no use for.
    """
    usual, folder = Evaluate(), Path(str(options.model))
    own = report.read_run(folder).options if (folder / "config.yaml").is_file() else {}
    began = Reward(**{name: own[name] for name in ("target", "loss", "loss_arguments", "classes") if name in own})
    if began.target == "classes":
        raise UsageError(f"--model {options.model}: a model of classes; how often the likeliest is right stands in its run's results.json")
    for name in ("reference", "implicit", "tokens", "loss", "beta", "loss_arguments", "template", "bos", "finish", "control_tokens"):
        if getattr(options, name) != getattr(usual, name):
            flag = "--loss.NAME" if name == "loss_arguments" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} has no effect: {options.model} is a reward model, read as its reward.json says")
    return replace(options, sample_prompts=0), scored_terms(began)


def evaluated(options: Evaluate) -> dict[str, Any]:
    """Everything that --output writes, as a dict. Raises DataError (file:line), ModelError, UsageError."""
    for flag, name in (("--output", options.output), ("--page", options.page)):
        if name and Path(name).exists():
            raise UsageError(f"{flag} {name}: exists already; name a new file")
    judge = models.is_reward(str(options.model), offline=options.offline)
    options, terms = of_judge(options) if judge else (of_run(options), [])
    terms = terms or loss_terms(options)
    if learns_value(options):
        raise UsageError(f"--loss {options.loss}: its value model stays in the checkpoints of its run; name another, such as sigmoid")
    objective = preference(terms, label_smoothing=options.label_smoothing or 0.0, read="scalar" if judge else "logps")
    if options.reference is None and (objective.reference != "none" or options.implicit or options.tokens):
        what = "--implicit" if options.implicit else "--tokens" if options.tokens else f"the loss {objective.name}"
        raise UsageError(f"{what} needs --reference MODEL: {options.model} is no run folder that would name it")
    device = models.pick_device(options.device)
    rules = [scorer(spec, device=device, dtype=options.dtype, offline=options.offline) for spec in options.reward]
    readings = {data_source(name)[0]: read([name], format=options.format, skip_bad=options.skip_bad, max_records=options.max_records)
                for name in options.data}  # fmt: skip
    loading: dict[str, Any] = {"dtype": options.dtype, "device": device, "offline": options.offline}
    if judge:
        model, tokenizer, read_by = models.load_reward(str(options.model), **loading)
        codec = reward_codec(tokenizer, read_by, str(options.model))
    else:
        model, tokenizer = models.load(str(options.model), **loading)
        codec = make_codec(tokenizer, template=options.template, bos=options.bos, finish=options.finish,
                           control_tokens=options.control_tokens)  # fmt: skip
    models.use_threads(model, options.threads)
    frozen, weights = None, ""
    if options.reference is not None:
        frozen, _ = models.load(options.reference, **loading)
        weights = models.weights_fingerprint(options.reference, offline=options.offline)
    subject = Subject(model, frozen, codec, tokenizer, device, weights)
    beta = next((numbers[key] for _, _, numbers in terms for key in ("beta", "tau") if key in numbers), None)
    files = [_file(name, reading.records, subject, objective, rules, options, beta) for name, reading in readings.items()]
    facts: dict[str, Any] = {
        "model": options.model, "reference": options.reference, "loss": objective.name, "beta": beta, "implicit": options.implicit,
        "rewards": options.reward, "seed": options.seed, "sampling": {"temperature": 1.0, "top_p": 1.0, "k": options.k,
        "max_tokens": options.sample_tokens}, "window": options.max_length or models.window_of(model.config), "dtype": options.dtype,
        "versions": runs.versions(), "hardware": runs.hardware(device, torch.get_num_threads()), "files": files,
    }  # fmt: skip
    return facts | {"rewardbench": _rewardbench(facts, type(tokenizer).__name__, codec.template_name)}


def _file(name: str, records: Sequence[Record], subject: Subject, objective: Objective, rules: Sequence[Scorer],
          options: Evaluate, beta: float | None) -> dict[str, Any]:  # fmt: skip
    """Every number about one data file."""
    longest = options.max_length or models.window_of(subject.model.config)
    store, intake = build(records, subject.codec, max_length=longest, mismatched=objective.mismatched,
                          members="member" in objective.needs, weights=subject.weights or None)  # fmt: skip
    for reason, count in intake.dropped.most_common():
        say(f"{name}: left out {count}: {reason}")
    learn = np.flatnonzero(judged(store, objective)) if len(store) else np.array([], int)
    if not len(learn):
        first = f"; first refused: {intake.refused[0]}" if intake.refused else ""
        raise DataError(f"no record that the loss {objective.name} can read ({objective.reads}){first}", path=name)
    kept = [records[i] for i in intake.kept]
    _, prompt = np.unique([prompt_key(r) for r in kept], return_inverse=True)
    columns = {}
    if subject.frozen is not None:
        key = reference.identity(store, subject.weights, dtype=options.dtype, device=subject.device)
        with bar("reference", len(store)) as advance:
            columns["reference"], _ = reference.fetch(subject.frozen, store, key, micro_tokens=options.micro_tokens,
                                                      device=subject.device, progress=advance)  # fmt: skip
    # A loss without a reference still shows how far the answers' log-probs moved, and --implicit needs them.
    seeing = objective if subject.frozen is None or objective.reference != "none" else replace(objective, reference="token")
    seeing = replace(seeing, frozen=subject.frozen)
    with bar("scoring", len(learn)) as advance:
        whole, table, loss = read_out(subject.model, seeing, store, learn, columns, micro_tokens=options.micro_tokens,
                                      device=subject.device, progress=advance)  # fmt: skip
    found = {key: values.double().cpu().numpy() for key, values in objective.metrics(whole, table).items() if len(values)}
    facts: dict[str, Any] = {"file": name, "records": len(kept), "left_out": dict(intake.dropped), "prompts": len(set(prompt.tolist())),
                             "metrics": {"loss": loss}}  # fmt: skip
    pair = objective.compares(table).cpu().numpy()
    if len(pair):
        cluster = prompt[table.record.cpu().numpy()[pair[:, 0]]]
        prob = table.pair_prob.cpu().numpy() if objective.compares(table) is table.pair else np.ones(len(pair))
        facts |= _pairs(found, prob, cluster, options.seed)
        facts["subsets"] = _subsets(found["rewards/accuracies"], [kept[r] for r in table.record.cpu().numpy()[pair[:, 0]]], cluster)
        if options.implicit or rules:
            ratio = whole.ratio.cpu().numpy() if options.implicit else None
            facts |= _judges(ratio, rules, kept, store, learn, pair, cluster)
    if "labels/accuracies" in found:
        cluster = prompt[table.record.cpu().numpy()[table.verdict.cpu().numpy()]]
        share, low, high = certainty.share_of(found["labels/accuracies"], cluster)
        facts["labels"] = {"labels": len(cluster), "accuracy": share, "low": low, "high": high}
        said, good = whole.policy[table.verdict].cpu().numpy(), table.verdict_good.cpu().numpy().astype(float)
        facts["calibration"] = asdict(certainty.calibration(said, good, cluster, seed=options.seed))
    facts["metrics"] = {"loss": loss} | facts["metrics"] | {key: float(v.mean()) for key, v in found.items() if key not in facts["metrics"]}
    if options.tokens:
        facts["tokens"] = _credit(subject, store, learn[: options.tokens], columns["reference"], beta or 1.0, options)
    if options.sample_prompts:
        facts |= _samples(kept, subject, rules, options)
    return facts


def _credit(subject: Subject, store: Store, records: np.ndarray, column: np.ndarray, beta: float,
            options: Evaluate) -> list[dict[str, Any]]:  # fmt: skip
    """Every response of these records with what each of its tokens adds to beta (log pi - log ref); null where a token is not trained."""
    rewards = evaluate.token_rewards(subject.model, store, records, column, beta=beta, micro_tokens=options.micro_tokens,
                                     device=subject.device)  # fmt: skip
    out = []
    for record in records.tolist():
        for segment in range(store.record_start[record], store.record_start[record + 1]):
            if store.response[segment] >= 0:
                mine = slice(store.start[segment], store.start[segment + 1])
                chain = np.concatenate([store.tokens[store.start[s] : store.start[s + 1]] for s in store.chain(segment)])
                texts = pieces(subject.codec, chain.tolist())[-(mine.stop - mine.start) :]
                values = [None if np.isnan(v) else float(v) for v in rewards[mine]]
                out.append({"record": store.where[record], "response": int(store.response[segment]),
                            "reward": float(np.nansum(rewards[mine])), "tokens": [list(each) for each in zip(texts, values, strict=True)]})
    return out


def _pairs(found: Mapping[str, np.ndarray], prob: np.ndarray, cluster: np.ndarray, seed: int) -> dict[str, Any]:
    """Accuracy, means with errors, calibration of sigmoid(margin)."""
    wins = found["rewards/accuracies"]
    out: dict[str, Any] = {"rewards/accuracies": float(wins.mean()), "pairs": len(wins)}
    _, out["accuracy_low"], out["accuracy_high"] = certainty.share_of(wins, cluster)
    if len(np.unique(cluster)) > 1:
        out["accuracy_bootstrap_low"], out["accuracy_bootstrap_high"] = certainty.bootstrap_mean(wins, cluster, seed=seed)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "displacement"):
        if name in found:
            out[name], out[f"{name}_se"] = certainty.mean_of(found[name], cluster)
    margin = found["rewards/margins"]
    return {"metrics": out, "calibration": asdict(certainty.calibration(margin, prob, cluster, seed=seed))}


def _subsets(wins: np.ndarray, records: Sequence[Record], cluster: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy of every value of the column 'subset', as RewardBench has it; none where the data has no such column."""
    subset = np.array([str(r.meta.get("subset", "")) for r in records])
    out = {}
    for name in dict.fromkeys(filter(None, subset.tolist())):
        mine = subset == name
        share, low, high = certainty.share_of(wins[mine], cluster[mine])
        out[name] = {"accuracy": share, "low": low, "high": high, "pairs": int(mine.sum()), "strict": float((wins[mine] == 1).mean())}
    return out


def _judges(ratio: np.ndarray | None, rules: Sequence[Scorer], records: Sequence[Record], store: Store, learn: np.ndarray, pair: np.ndarray,
            cluster: np.ndarray) -> dict[str, Any]:  # fmt: skip
    """Accuracy of every judge on the pairs, and the paired differences to the first (the implicit reward where it is asked for)."""
    place = [(r, int(store.response[s])) for r in learn.tolist() for s in range(store.record_start[r], store.record_start[r + 1])
             if store.response[s] >= 0 or store.response[s] == MISMATCHED]  # fmt: skip
    said = [(records[r].prompt, records[r].responses[i] if i >= 0 else Response("")) for r, i in place]
    scores = {} if ratio is None else {"implicit": ratio}
    needed = np.unique(pair)
    with bar("rewards", len(rules)) as advance:
        for number, each in enumerate(rules):
            scores[each.name] = np.full(len(place), np.nan)
            scores[each.name][needed] = each([said[i][0] for i in needed], [said[i][1] for i in needed])
            advance(number + 1)
    scores[LONGER] = np.array([len(as_text(response.text)) for _, response in said], float)
    right = {}
    for name, score in scores.items():
        gap = score[pair[:, 0]] - score[pair[:, 1]]
        right[name] = np.where(np.abs(gap) <= SURE, 0.5, gap > 0)
    judges = []
    for name, wins in right.items():
        share, low, high = certainty.share_of(wins, cluster)
        judges.append({"judge": name, "accuracy": share, "low": low, "high": high, "ties": int((wins == 0.5).sum()),
                       "subsets": _subsets(wins, [records[place[i][0]] for i in pair[:, 0]], cluster)})  # fmt: skip
    first, *others = right
    return {"judges": judges, "differences": [_difference(first, other, right[first] - right[other], cluster) for other in others]}


def _difference(first: str, other: str, gap: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    value, low, high = certainty.interval_of(gap, cluster)
    better, worse = certainty.signs(gap, cluster)
    return {"first": first, "other": other, "difference": value, "low": low, "high": high, "better": better, "worse": worse,
            "p": certainty.sign_test(better, worse)}  # fmt: skip


def _samples(records: Sequence[Record], subject: Subject, rules: Sequence[Scorer], options: Evaluate) -> dict[str, Any]:
    """Fresh samples of the model, and of the reference, to the first prompts of the file: KL both ways, entropy, length, rewards."""
    prompts = list({prompt_key(r): r.prompt for r in records}.values())
    window = models.window_of(subject.model.config)
    fits = [p for p in prompts if not window or len(encode_prompt(subject.codec, p)) + options.sample_tokens <= window]
    if len(fits) < len(prompts):
        say(f"{len(prompts) - len(fits)} of {len(prompts)} prompts leave no room for --sample-tokens {options.sample_tokens}: not sampled")
    if not (fits := fits[: options.sample_prompts]):
        return {"samples": None}
    cluster = np.repeat(np.arange(len(fits)), options.k)

    def drawn(model: Any, label: str) -> Spoken:
        with bar(label, len(fits) * options.k) as advance:
            return speak(model, subject.codec, fits, max_tokens=options.sample_tokens, k=options.k, seed=options.seed, progress=advance)

    ours = drawn(subject.model, "sampling")
    theirs = None if subject.frozen is None else drawn(subject.frozen, "reference samples")
    flat = [ids for row in ours.ids for ids in row]
    length = ours.length.reshape(-1).astype(float)
    out: dict[str, Any] = {"sampled_prompts": len(fits), "samples_per_prompt": options.k}
    against = subject.model if subject.frozen is None else subject.frozen  # its own entropy needs no other model
    found = divergences(subject.model, against, ours.store(), micro_tokens=options.micro_tokens, device=subject.device)
    if theirs is not None:
        out |= kl_summary(found, length, cluster)
        back = divergences(against, subject.model, theirs.store(), micro_tokens=options.micro_tokens, device=subject.device)
        out |= kl_summary(back, theirs.length.reshape(-1).astype(float), cluster, name="kl_from_reference")
    out["entropy_token"], out["entropy_token_se"] = certainty.ratio_of(found["entropy"], length, cluster)
    for name, values in (("sample_length", length), ("sample_finished", ours.finished.reshape(-1).astype(float)),
                         (f"repeated_{GRAM}", np.array([repeated(ids, GRAM) for ids in flat]))):  # fmt: skip
        out[name], out[f"{name}_se"] = certainty.mean_of(values, cluster)
    out |= {f"distinct_{n}": distinct(flat, n) for n in (1, 2, 3)}
    return {"samples": out, "sampled_rewards": [_sampled_reward(each, fits, ours, theirs, cluster) for each in rules]}


def _sampled_reward(rule: Scorer, prompts: Sequence[Text], ours: Spoken, theirs: Spoken | None, cluster: np.ndarray) -> dict[str, Any]:
    """Mean reward of the samples, that of the reference's, and their difference on the same prompts."""
    asked = [prompts[i] for i in cluster]
    values = rule(asked, ours.responses())
    out: dict[str, Any] = {"reward": rule.name}
    out["mean"], out["se"] = certainty.mean_of(values, cluster)
    if theirs is not None:
        before = rule(asked, theirs.responses())
        out["reference_mean"], out["reference_se"] = certainty.mean_of(before, cluster)
        out["difference"], out["low"], out["high"] = certainty.interval_of(values - before, cluster)
        out["p"] = certainty.paired_t(values - before, cluster)
    return out


def _rewardbench(facts: Mapping[str, Any], tokenizer: str, template: str) -> dict[str, Any]:
    """The fields of RewardBench's own result file; a tie counts as wrong there."""
    subsets = {name: row for file in facts["files"] for name, row in file.get("subsets", {}).items()}
    count = sum(row["pairs"] for row in subsets.values())
    share = sum(row["strict"] * row["pairs"] for row in subsets.values()) / count if count else None
    return {"accuracy": share, "num_prompts": count, "model": facts["model"], "ref_model": facts["reference"], "tokenizer": tokenizer,
            "chat_template": template, "extra_results": {name: row["strict"] for name, row in subsets.items()}}  # fmt: skip


# ---------------------------------------------------------------- the screen


def lines(file: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the numbers that a person reads first."""
    metrics, samples, sure = file["metrics"], file.get("samples") or {}, file.get("calibration")
    out = [("loss", f"{metrics['loss']:.4f}")]
    if "rewards/accuracies" in metrics:
        out.insert(0, ("pairs", f"{metrics['pairs']:,} of {file['prompts']:,} prompts"))
        out.append(("accuracy", with_interval(metrics["rewards/accuracies"], metrics["accuracy_low"], metrics["accuracy_high"])))
        out.append(("margin", with_error(metrics["rewards/margins"], metrics["rewards/margins_se"], ".3f")))
    if told := file.get("labels"):
        out.append(("labels", f"{told['labels']:,} of {file['prompts']:,} prompts"))
        out.append(("label accuracy", with_interval(told["accuracy"], told["low"], told["high"])))
    if "displacement" in metrics:
        out.append(("displacement, nats", with_error(metrics["displacement"], metrics.get("displacement_se"), ".3f")))
    if sure:
        out.append(("calibration slope", with_interval(sure["slope"], sure["slope_low"], sure["slope_high"], ".2f")))
        out.append(("ECE (by chance)", f"{with_interval(sure['ece'], sure['low'], sure['high'])} ({sure['chance']:.3f})"))
    for name, label in (("kl_sequence_rb", "KL(model||ref), nats"), ("kl_token_rb", "  a token"),
                        ("kl_from_reference_sequence_rb", "KL(ref||model), nats"), ("entropy_token", "entropy, nats a token"),
                        ("sample_length", "length, tokens"), ("sample_finished", "finished"),
                        (f"repeated_{GRAM}", f"repeated {GRAM}-grams")):  # fmt: skip
        if name in samples:
            out.append((label, with_error(samples[name], samples[f"{name}_se"])))
    if "distinct_2" in samples:
        out.append(("distinct 2-grams", f"{samples['distinct_2']:.4f}"))
    for row in file.get("sampled_rewards", ()):
        out.append((f"reward {row['reward']}", with_error(row["mean"], row["se"], ".3f")))
        if "difference" in row:
            out.append(("  against the reference's", with_interval(row["difference"], row["low"], row["high"], "+.3f")))
    return out


def _show(facts: Mapping[str, Any]) -> None:
    """Metrics as rows, a column for each file; then the judges of each file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    console = Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    table, files = Table(box=None, pad_edge=False), facts["files"]
    table.add_column("")
    for file in files:
        table.add_column(Cell(clean(Path(file["file"]).name)), overflow="fold")
    rows = [dict(lines(file)) for file in files]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(Cell(clean(name)), *(row.get(name, "") for row in rows))
    console.print(table)
    for file in files:
        _show_parts(console, file, Table, Cell)


def _show_parts(console: Any, file: Mapping[str, Any], table_of: Any, cell: Any) -> None:
    """Subsets, judges and their differences of one file, where there are any."""
    if file.get("subsets"):
        table = table_of("subset", "pairs", "accuracy", box=None, pad_edge=False)
        for name, row in file["subsets"].items():
            table.add_row(cell(clean(name)), f"{row['pairs']:,}", with_interval(row["accuracy"], row["low"], row["high"]))
        console.print(table)
    if file.get("judges"):
        gaps = {row["other"]: row for row in file["differences"]}
        first = file["judges"][0]["judge"]
        table = table_of("judge", "accuracy", f"{clean(first)} minus it", "p", box=None, pad_edge=False,
                         title=cell(clean(file["file"])), title_justify="left")  # fmt: skip
        for row in file["judges"]:
            gap = gaps.get(row["judge"])
            shown = ("", "") if gap is None else (with_interval(gap["difference"], gap["low"], gap["high"]), f"{gap['p']:.3g}")
            table.add_row(cell(clean(row["judge"])), with_interval(row["accuracy"], row["low"], row["high"]), *shown)
        console.print(table)


def written(options: Evaluate) -> dict[str, Any]:
    """Evaluate and write what the options name; everything as a dict."""
    facts = evaluated(options) | {"command": runs.command("evaluate", options)}
    if options.output:
        write_json(options.output, facts)
        say(f"written       {clean(options.output)}")
    if options.page:
        atomic_write(options.page, evaluation_page(facts))
        say(f"written       {clean(options.page)}")
    return facts


def run(options: Evaluate) -> int:
    """Evaluate, write, show."""
    _show(written(options))
    return 0
