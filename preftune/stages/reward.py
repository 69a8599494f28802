"""`preftune reward`: a language model and preferences (or labels, or scores) in, a score for every answer out.

A scalar head on the model, read at the last token of each answer, trained by `pipeline` like every other model. Beside the weights stands
reward.json: how texts become ids, and what is subtracted from a score. `--members N` trains an ensemble, a run folder for each member.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import calibration, certainty, models, pipeline, report, runs
from ..certainty import share_of
from ..config import Reward, data_source, going_on, resolved_yaml, scored_terms
from ..errors import DataError, UsageError, nearest
from ..files import atomic_write, read_json, read_jsonl, require_new, write_json
from ..formats import Tally, stream
from ..intake import Seen
from ..objectives import Objective, preference
from ..readout import log_odds
from ..records import Record
from ..report.findings import percent
from ..rewards import ENSEMBLE, scores_of
from ..screen import clean, say, with_interval
from ..store import Store

MOST = 2000  # training records whose responses set the level
HELD = "held_out.jsonl"  # in a run folder: the gap of every held-out pair


def run(options: Reward) -> int:
    """Train one model, or an ensemble. Raises PreftuneError with the exit code of what went wrong."""
    if options.resume is not None and (Path(options.resume) / ENSEMBLE).is_file():
        own, now = going_on(options)
        if replace(now, resume=None) != own:
            raise UsageError(f"--resume {options.resume}: an ensemble goes on as it began; its options cannot change")
        return ensemble(own, Path(options.resume))
    if options.members == 1:
        return pipeline.run(TASK, options)
    folder = Path(str(options.output))
    require_new(folder)
    try:
        return ensemble(options, folder)
    except BaseException:
        if not (folder / _name(1) / "config.yaml").is_file():  # the first member was refused: nothing has begun
            shutil.rmtree(folder, ignore_errors=True)
        raise


def objective(options: Reward) -> Objective:
    """The losses that the options name, over scores."""
    return preference(scored_terms(options), label_smoothing=options.label_smoothing, read="scalar")


def select(record: Record, options: Reward) -> Record | None:
    """Every record for preferences; else only those with labels, scores or classes. Raises DataError for a score outside of its range, a
    class that is not among --classes."""
    if options.target == "labels":
        return replace(record, judgements=()) if record.labels is not None else None
    if options.target == "classes":
        return _classed(record, options.classes)
    if options.target == "preferences":
        if "bradley-terry-margin" in (name for _, name, _ in scored_terms(options)):
            _all_scored(record)
        return record
    for _, name, numbers in scored_terms(options):
        for score in (r.score for r in record.responses if r.score is not None and name == "grades"):
            if not numbers["low"] <= score <= numbers["high"]:
                raise _at(record, f"a score of {score:g} is not between {numbers['low']:g} and {numbers['high']:g}; say --loss.low and "
                                  "--loss.high, or --loss square")  # fmt: skip
    return record if any(r.score is not None for r in record.responses) else None


def _all_scored(record: Record) -> None:
    judged = {i for j in record.judgements for tier in (*j.order, j.below) for i in tier}
    if any(record.responses[i].score is None for i in judged):
        raise _at(record, "a judged response has no score, and --loss bradley-terry-margin reads the difference of two")


def _classed(record: Record, classes: Sequence[str]) -> Record | None:
    """The record with the number of its class as the score of each response; labels stay, so that equal texts stay apart."""
    names = [label if isinstance(label, str) else None for label in record.labels or ()]
    for name in filter(None, names):
        if name not in classes:
            raise _at(record, f"the class {name!r} is not among --classes {', '.join(classes)}{nearest(name, classes)}", field="labels")
    if not any(names):
        return None
    numbers = [None if name is None else float(classes.index(name)) for name in names]
    return replace(record, judgements=(), responses=tuple(replace(r, score=n) for r, n in zip(record.responses, numbers, strict=True)))


def _at(record: Record, reason: str, field: str = "score") -> DataError:
    path, _, line = record.where.rpartition(":")
    return DataError(reason, path=path or None, line=int(line) if line.isdigit() else None, field=field)


def refuse(seen: Seen, options: Reward) -> None:
    """Raises DataError where no record has what the target asks for."""
    if not seen.kept:
        raise DataError(f"--target {options.target}: no record has {options.target}")


def wrap(model: Any, options: Reward) -> Any:
    """The model under a scalar head; members of an ensemble have heads of their own."""
    return models.with_scalar_head(model, seed=[options.seed, options.member], classes=options.classes)


def resample(store: Store, train: np.ndarray, prompts: np.ndarray, options: Reward) -> tuple[Store, np.ndarray]:
    """A member's training records: prompts drawn with replacement, as many as there are; one drawn twice counts twice.

    The count multiplies the votes of what was judged; for single scores a prompt that was drawn counts once.
    """
    if not options.member:
        return store, train
    chance = np.random.default_rng([options.seed, options.member])
    distinct, number = np.unique(prompts, return_inverse=True)
    drawn = np.bincount(chance.integers(len(distinct), size=len(distinct)), minlength=len(distinct))[number]
    times = np.zeros(len(store))
    times[train] = drawn

    def weighted(weight: np.ndarray, start: np.ndarray) -> np.ndarray:
        each = np.repeat(np.arange(len(store)), np.diff(start))
        return np.where(np.isin(each, train), weight * times[each], weight)

    changed = replace(store, pair_weight=weighted(store.pair_weight, store.pair_start),
                      verdict_weight=weighted(store.verdict_weight, store.verdict_start),
                      list_weight=weighted(store.list_weight, store.ranking_start))  # fmt: skip
    return changed, chance.permutation(train[drawn > 0])


# ---------------------------------------------------------------- what goes beside the weights


def publish(setup: pipeline.Setup, options: Reward, folder: Path, model: Path) -> dict[str, Any]:
    """reward.json beside the weights, the gaps of held-out pairs and the tables of the report; returns the evidence for results.json."""
    level = reference_level(setup, options)
    how = options.normalise or ("mean" if options.target == "preferences" else "none")
    moved = {"shift": level["mean"]} if how != "none" else {}
    moved |= {"scale": level["std"]} if how == "std" else {}
    moved |= {"classes": options.classes} if options.classes else {}
    if how == "std" and not level["std"] > 0:
        raise DataError("--normalise std: every training answer has the same score; use mean")
    codec = setup.codec.describe()
    write_json(model / models.REWARD, {"read": "last token of the response", "loss": setup.objective.name, "normalised": how, **moved,
                                       "reference": level, "codec": codec})  # fmt: skip
    found = evidence(setup, options, folder)
    if found:
        write_json(folder / "extra.json", sheets(found))
    return {"reward": found | {"normalised": how, "reference": level}}


def reference_level(setup: pipeline.Setup, options: Reward) -> dict[str, Any]:
    """Mean and deviation of the scores of training responses, each once: what the level of the model means."""
    chosen = np.sort(setup.train)[:: max(1, math.ceil(len(setup.train) / MOST))]
    scores = scores_of(setup.model, setup.store, micro_tokens=options.micro_tokens, device=setup.device, records=chosen)
    return {"mean": float(scores.mean()), "std": float(scores.std()), "responses": len(scores), "of": "training responses"}


def evidence(setup: pipeline.Setup, options: Reward, folder: Path) -> dict[str, Any]:
    """What held-out pairs (or labels) say; {} where there are none. Writes the gap of each pair to HELD."""
    store, held = setup.store, setup.held
    if not len(held):
        return {}
    segments = np.concatenate([np.arange(store.record_start[r], store.record_start[r + 1]) for r in held])
    value = np.full(len(store.response), np.nan)
    value[segments[store.response[segments] >= 0]] = scores_of(setup.model, store, micro_tokens=options.micro_tokens, device=setup.device,
                                                               records=held)  # fmt: skip
    if options.target == "classes":
        return _of_classes(setup, options, segments)
    if options.target == "labels":
        said = np.concatenate([np.arange(store.verdict_start[r], store.verdict_start[r + 1]) for r in held])
        good = store.verdict_good[said].astype(float)
        record = np.searchsorted(store.record_start, store.verdict[said], side="right") - 1
        return {"labels": len(said), "calibration": asdict(certainty.calibration(value[store.verdict[said]], good, record))}
    rows = np.concatenate([np.arange(store.pair_start[r], store.pair_start[r + 1]) for r in held])
    if options.target == "scores" or not len(rows):
        given = store.score[segments]
        known = ~np.isnan(given)
        return {"scored": int(known.sum()), "correlation": _correlation(value[segments][known], given[known])}
    first, second = store.pair[rows].T
    size = np.diff(store.start)
    record = np.searchsorted(store.record_start, first, side="right") - 1
    found = calibration.Pairs(value[first] - value[second], store.pair_prob[rows], store.pair_weight[rows], first, second, record,
                              size[first] - size[second])  # fmt: skip
    atomic_write(folder / HELD, "".join(f'{{"record": {r}, "gap": {g!r}, "prob": {p!r}}}\n' for r, g, p in zip(
        record.tolist(), found.gap.tolist(), found.prob.tolist(), strict=True)))  # fmt: skip
    weighted = any(data_source(name)[1] != 1 for name in (*options.data, *options.eval_data))  # then weights are no counts of votes
    names = column(options, [store.where[r] for r in record]) if options.by else None
    return calibration.told(found, names, votes=not weighted)


def _of_classes(setup: pipeline.Setup, options: Reward, segments: np.ndarray) -> dict[str, Any]:
    """How often the likeliest class is the one that the data says, of all and of each, and calibration of P(the wanted one)."""
    store = setup.store
    logits = scores_of(setup.model, store, micro_tokens=options.micro_tokens, device=setup.device, records=setup.held, outputs=True)
    answers = segments[store.response[segments] >= 0]
    known = ~np.isnan(store.score[answers])
    truth, logits = store.score[answers[known]].astype(int), logits[known]
    record = np.searchsorted(store.record_start, answers[known], side="right") - 1
    right = (logits.argmax(1) == truth).astype(float)
    share, low, high = share_of(right, record)
    odds = log_odds(torch.from_numpy(logits)).numpy()
    return {"classed": len(truth), "accuracy": share, "low": low, "high": high,
            "by_group": calibration.groups(right, record, [options.classes[i] for i in truth]),
            "calibration": asdict(certainty.calibration(odds, (truth == len(options.classes) - 1).astype(float), record))}  # fmt: skip


def _correlation(one: np.ndarray, two: np.ndarray) -> float | None:
    return float(np.corrcoef(one, two)[0, 1]) if len(one) > 1 and one.std() > 0 and two.std() > 0 else None


def column(options: Reward, places: Sequence[str]) -> list[str]:
    """The column --by of each of these rows ('file:line'), read again from the files. Raises DataError where no row has it."""
    wanted, name, found = set(places), str(options.by), dict[str, str]()
    for record in stream((*options.data, *options.eval_data), Tally(), format=options.format, skip_bad=True, max_records=None):
        if record.where in wanted and name in record.meta:
            found[record.where] = str(record.meta[name])
    if not found:
        raise DataError(f"--by {name}: no held-out row has this column")
    return [found.get(place, "(none)") for place in places]


def sheets(found: dict[str, Any]) -> dict[str, Any]:
    """The tables of the evidence, as `extra.json` has them."""

    def rows(entries: Sequence[dict[str, Any]], first: str, share: str) -> list[list[Any]]:
        return [[e[first], e.get("pairs", e.get("count")), e[share], e["low"], e["high"]] for e in entries]

    tables = []
    by = "by class" if "classed" in found else "by column"
    for name, caption in (("by_length", "by length of the preferred answer less that of the other"), ("by_group", by)):
        if found.get(name):
            tables.append({"caption": f"Agreement {caption}", "columns": ["", "pairs", "agreement", "95% from", "to"],
                           "rows": rows(found[name], "group", "agreement")})  # fmt: skip
    texts = []
    if "calibration" in found:
        sure = found["calibration"]
        tables.append({"caption": "Calibration", "columns": ["predicted", "count", "observed", "95% from", "to"],
                       "rows": rows(sure["bins"], "said", "came")})  # fmt: skip
        slope = "" if sure["slope"] is None else f"; slope {sure['slope']:.2f}: 1 is calibrated, below it is too sure of itself"
        texts.append(f"Expected calibration error {sure['ece']:.3f}, {sure['chance']:.3f} by chance alone{slope}.")
    if "agreement" in found:
        most = found["ceiling"]
        limit = "How much is possible is not known: no pair was judged twice, and none has a probability."
        if most:
            ends = pipeline.span(most["low"], most["high"])
            limit = f"The most that is possible with such labels: {ends}, from {most['from']} of {most['pairs']} pairs."
        texts.append(f"Agreement with a drawn label: {found['agreement']:.3f} of held-out pairs. {limit}")
    if "classed" in found:
        texts.append(f"The likeliest class is the right one in {percent(found['accuracy'])} of {found['classed']} held-out answers.")
    if "correlation" in found:
        texts.append(f"Correlation with {found['scored']} held-out scores: {report.plain(found['correlation'])}.")
    return {"title": "What the reward model knows", "paragraphs": texts, "tables": tables}


# ---------------------------------------------------------------- ensembles


def _name(member: int) -> str:
    return f"member-{member}"


def ensemble(options: Reward, folder: Path) -> int:
    """Train the members that are not finished, then what can be said of all of them together."""
    names = [_name(i + 1) for i in range(options.members)]
    if not (folder / ENSEMBLE).is_file():
        with runs.publish_folder(folder, owned=False) as staging:
            atomic_write(staging / "config.yaml", resolved_yaml(options))
            write_json(staging / ENSEMBLE, {"members": names})
    for i, name in enumerate(names):
        place = folder / name
        if (place / "results.json").is_file():
            say(f"{name}: finished before")
        elif (place / "config.yaml").is_file():
            pipeline.run(TASK, Reward(resume=str(place)))
        else:
            pipeline.run(TASK, replace(options, members=1, average=False, member=i + 1, output=str(place), resume=None))
    told = together(folder, names)
    if options.average and (found := averaged(options, folder, names)):
        told["average"] = found
    write_json(folder / ENSEMBLE, {"members": names, "held_out": told})
    of_all(options, folder, names, told)
    for key, value in told.items():
        share = isinstance(value, dict)
        print(clean(f"{key:<14}{with_interval(value['agreement'], value['low'], value['high']) if share else report.plain(value)}"))
    print(clean(f"written       {folder}"))
    print(clean(f"next          preftune sample --model MODEL --data PROMPTS --k 4 --output samples.jsonl --reward model:{folder}@min"))
    return 0


def of_all(options: Reward, folder: Path, names: Sequence[str], told: dict[str, Any]) -> None:
    """results.json, tables and report of an ensemble: those of the mean of its members, and each of them."""
    each = [read_json(folder / name / "results.json") for name in names]
    mean = told.get("mean", {})
    shares = {"rewards/accuracies": mean.get("agreement"), "accuracy_low": mean.get("low"), "accuracy_high": mean.get("high")}
    results = {key: sum(one[key] for one in each) for key in ("steps", "seconds", "tokens")}
    results |= {"stage": "reward", "loss": each[0]["loss"], "members": list(names), "after": {f"eval/{k}": v for k, v in shares.items()},
                "reward": mean and mean | {"ceiling": each[0]["reward"].get("ceiling")}, "command": runs.command("reward", options),
                "next": f"preftune score --data ANSWERS --reward model:{folder}@min --output scored.jsonl"}  # fmt: skip
    write_json(folder / "results.json", results)
    rows = [[name, share["agreement"], share["low"], share["high"]] for name, share in told.items() if isinstance(share, dict)]
    if rows:
        text = f"On a held-out pair the gap of two members differs by {told['spread']:.3f} (standard deviation, mean over pairs)."
        write_json(folder / "extra.json", {"title": "The members", "paragraphs": [text], "tables": [
            {"caption": "Agreement with held-out labels", "columns": ["", "agreement", "95% from", "to"], "rows": rows}]})  # fmt: skip
    if options.report:
        report.write(folder)


def together(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Agreement of each member and of their mean with the held-out labels, and how far members disagree; {} where nothing was held out."""
    if not all((folder / name / HELD).is_file() for name in names):
        return {}
    tables = [read_jsonl(folder / name / HELD) for name in names]
    gaps = np.array([[row["gap"] for row in rows] for rows in tables])
    prob, record = (np.array([row[key] for row in tables[0]]) for key in ("prob", "record"))

    def agreement(gap: np.ndarray) -> dict[str, Any]:
        share, low, high = share_of(np.where(gap > 0, prob, np.where(gap < 0, 1 - prob, 0.5)), record)
        return {"agreement": share, "low": low, "high": high}

    each = {name: agreement(gap) for name, gap in zip(names, gaps, strict=True)}
    return each | {"mean": agreement(gaps.mean(0)), "spread": float(gaps.std(0).mean())}


def averaged(options: Reward, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The mean of the members' weights, as `model/` of the ensemble.  arXiv:2401.12187 (WARM)."""
    setup = pipeline.prepare(TASK, replace(options, members=1, average=False, output=str(folder), resume=None), fresh=False)
    places = [str(folder / name) for name in names]
    setup = replace(setup, model=models.average_rewards(places, dtype=options.dtype, device=setup.device))
    with runs.publish_folder(folder / "model") as staging:
        models.save(setup.model, setup.tokenizer, staging)
        found = publish(setup, options, folder, staging)["reward"]
    return {key: found.get(key) for key in ("agreement", "low", "high")} if "agreement" in found else {}


TASK = pipeline.Task("reward", Reward, objective, select,
                     lambda folder: f"preftune sample --model MODEL --data PROMPTS --k 4 --output samples.jsonl --reward model:{folder}",
                     refuse=refuse, wrap=wrap, resample=resample, publish=publish)  # fmt: skip
