"""`preftune pair`: scores into judgements, or into the responses worth keeping, or into pairs worth asking a person about.

Canonical records in and out; whatever is left out is counted with its reason. Loads no model.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import pairing
from ..config import Pair
from ..errors import DataError, UsageError
from ..files import dumps, publish_file
from ..formats import read, to_json
from ..records import Judgement, Record, Response, inexact, scores_of
from ..screen import clean, say

JUDGED = ("best-worst", "best-random", "all", "ranking")


def run(options: Pair) -> int:
    """Read, choose, write; prints what was made and what was left out. Raises UsageError, DataError."""
    output = Path(str(options.output))
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name a new file")
    reading = read(options.data, format=options.format, skip_bad=options.skip_bad, max_records=options.max_records)
    count = Counter({reason.removeprefix("skipped: "): n for reason, n in reading.counts.items() if reason.startswith("skipped: ")})
    records = reading.records
    if not any(response.score is not None for record in records for response in record.responses):
        raise DataError(f"no response has a score: preftune score --data {options.data[0]} --reward SPEC --output scored.jsonl makes them")
    if options.ask is not None:
        made = _worth(records, options, count)
    elif options.how in JUDGED:
        made = _judged(records, options, count)
    else:
        made = (_rejected if options.how == "rejection" else _best)(records, options, count)
    for reason, n in sorted(count.items()):
        if n:
            say(f"left out {n}: {clean(reason)}")
    if not made:
        raise DataError("nothing is left to write")
    if options.dry_run:
        say(f"nothing was written; without --dry-run: {len(made)} records -> {clean(str(output))}")
        return 0

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as out:
            for record in made:
                out.write(dumps(to_json(record), record.where) + "\n")

    publish_file(output, write)
    say(f"{len(made)} records -> {output}")
    return 0


def _chance(options: Pair, number: int) -> np.random.Generator:
    """A record's own lots: a function of the seed and its number."""
    return np.random.default_rng([options.seed, number])


def _scored(record: Record, count: Counter[str]) -> tuple[list[int], np.ndarray]:
    """(the responses that have a score, their scores)."""
    found = [i for i, response in enumerate(record.responses) if response.score is not None]
    count["responses: no score"] += len(record.responses) - len(found)
    return found, np.array([record.responses[i].score for i in found], dtype=float)


def _text(response: Response) -> str:
    return response.text if isinstance(response.text, str) else "\x1e".join(f"{m.role}\x1f{m.content}" for m in response.text)


def _distinct(record: Record, count: Counter[str]) -> tuple[list[int], np.ndarray]:
    """The same without responses that repeat an earlier one, word for word or nearly: a pair of two equal texts teaches nothing."""
    found, scores = _scored(record, count)
    first, equal, near = pairing.repeats([_text(record.responses[i]) for i in found])
    count["responses: equal to another of the prompt"] += equal
    count["responses: equal to another but for case, space and punctuation"] += near
    return [found[i] for i in first], scores[first]


def _only(record: Record, numbers: list[int], how: dict[str, Any]) -> tuple[tuple[Response, ...], dict[int, int]]:
    """The responses of these numbers, and where each of them is now. Where some are left out, each of the others says how it was kept:
    together they are no plain samples any more."""
    chosen, at = tuple(record.responses[i] for i in numbers), {i: at for at, i in enumerate(numbers)}
    return chosen if len(numbers) == len(record.responses) else _marked(chosen, how), at


def _marked(responses: Sequence[Response], how: dict[str, Any]) -> tuple[Response, ...]:
    return tuple(replace(r, source={**(r.source or {}), "kept": how}) for r in responses)


def _as_judged(record: Record, options: Pair) -> bool:
    return bool(record.judgements or record.labels is not None) and not options.replace


# --- judgements -----------------------------------------------------------------------------------------------------------------


def _judged(records: list[Record], options: Pair, count: Counter[str]) -> list[Record]:
    """Records with judgements made of their scores, each with the responses that these name."""
    made, passed, pairs = [], 0, 0
    by = "scores" if not options.replace else "scores, again"
    for number, record in enumerate(records):
        if _as_judged(record, options):
            passed += 1
            made.append(record)
            continue
        found, scores = _distinct(record, count)
        if options.how == "ranking":
            orders = [pairing.tiers(scores)] if len(set(scores.tolist())) > 1 else []
            chosen = [(Judgement(tuple(tuple(found[i] for i in tier) for tier in order), by=by)) for order in orders]
        else:
            couples = pairing.choose(scores, options.how, margin=options.margin, limit=options.limit, chance=_chance(options, number))
            chosen = [Judgement(((found[a],), (found[b],)), prob=_prob(scores[a] - scores[b], options), by=by) for a, b in couples]
        if not chosen:
            few = "fewer than two different scored responses" if len(found) < 2 else "no two scores differ" if np.ptp(scores) == 0 else ""
            count[f"prompts: {few or f'no two scores differ by --margin {options.margin:g}'}"] += 1
            continue
        named = sorted({i for judgement in chosen for tier in judgement.order for i in tier})
        responses, at = _only(record, named, {"how": options.how})
        moved = tuple(replace(j, order=tuple(tuple(at[i] for i in tier) for tier in j.order)) for j in chosen)
        made.append(replace(record, responses=responses, judgements=moved, labels=None, meta=_meta(record, options)))
        pairs += len(chosen)
    what = "rankings" if options.how == "ranking" else "pairs"
    say(f"{pairs} {what} of {len(records) - passed} prompts")
    if passed:
        say(f"{passed} records are judged already and went through as they are; --replace judges them by their scores")
    return made


def _prob(difference: float, options: Pair) -> float | None:
    return pairing.soft(float(difference), options.soft) if options.soft else None


def _meta(record: Record, options: Pair) -> dict[str, Any]:
    how = {"how": options.how if options.ask is None else f"ask by {options.ask_by}"}
    how |= {name: value for name in ("margin", "soft", "limit") if (value := getattr(options, name))}
    return {**record.meta, "paired": how}


# --- responses that are kept ----------------------------------------------------------------------------------------------------


def _unjudged(records: list[Record], options: Pair, count: Counter[str]) -> list[tuple[int, Record, list[int], np.ndarray]]:
    """(number, record, scored responses, scores) of the records that may be chosen from. Repeated texts stay: each is a draw."""
    usable = []
    for number, record in enumerate(records):
        if _as_judged(record, options):
            count["prompts: judged already; --replace chooses by the scores"] += 1
            continue
        found, scores = _scored(record, count)
        if len(found):
            usable.append((number, record, found, scores))
        else:
            count["prompts: no scored response"] += 1
    return usable


def _kept(record: Record, numbers: list[int], how: dict[str, Any], options: Pair) -> Record:
    """The record with these responses only, each of which says how it was kept: it is no plain sample any more."""
    responses = _marked([record.responses[i] for i in numbers], how)  # also where all were accepted: what was not, elsewhere, is missing
    return replace(record, responses=responses, judgements=(), labels=None, meta=_meta(record, options))


def _best(records: list[Record], options: Pair, count: Counter[str]) -> list[Record]:
    """The best of each n responses of a prompt."""
    made, sizes, usable = [], [], _unjudged(records, options, count)
    for number, record, found, scores in usable:
        n = options.of or len(found)
        kept = [found[i] for i in pairing.best_of(scores, n, _chance(options, number))]
        count["responses: do not fill a group of --of"] += len(found) - n * len(kept)
        sizes.append(len(found))
        if kept:
            made.append(_kept(record, kept, {"how": "best-of-n", "n": n}, options))
        else:
            count[f"prompts: fewer than --of {options.of} scored responses"] += 1
    fewest = min(sizes, default=0)
    for n in sorted({1, 2, 4, 8, 16, 32, 64, fewest} & set(range(1, fewest + 1))):
        values = [pairing.best_of_n_reward(scores, n) for *_, scores in usable]
        se = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        say(f"best of {n:<3} expected reward {statistics.fmean(values):.4f}{se} (unbiased, from all scored responses)")
    return made


def _require_exact(usable: list[tuple[int, Record, list[int], np.ndarray]], options: Pair) -> None:
    """Raises DataError where a response is not an exact draw of one and the same model. See docs/rejection.md."""
    wanted = ""
    if options.reference:
        from ..models import weights_fingerprint

        wanted = weights_fingerprint(options.reference, offline=options.offline)
    for _, record, found, _ in usable:
        for i in found:
            source = record.responses[i].source
            why = inexact(source)
            weights = (source or {}).get("weights", "")
            if not why and wanted and weights != wanted:
                named = f"--reference {options.reference}" if options.reference else "that of the first response"
                why = f"its weights are {str(weights)[:8]}, not {wanted[:8]} ({named})"
            if why:
                raise DataError(f"not an exact sample of the reference: {why}; preftune sample at --temperature 1 and --top-p 1 makes them",
                                path=record.where or None, field=f"responses[{i}]")  # fmt: skip
            wanted = wanted or str(weights)


def _rejected(records: list[Record], options: Pair, count: Counter[str]) -> list[Record]:
    """Draws of pi* ~ ref exp(r/beta) out of draws of ref, in one pass."""
    usable, beta = _unjudged(records, options, count), float(options.beta or 0)
    _require_exact(usable, options)
    made, rates, accepted, drawn, best, cut = [], [], 0, 0, 0, 0
    for number, record, found, scores in usable:
        ceiling = float(scores.max()) if options.r_max == "prompt" else float(options.r_max)
        if scores.max() > ceiling:
            raise DataError(f"a score of {scores.max():g} is above --r-max {ceiling:g}: an acceptance probability above 1",
                            path=record.where or None)  # fmt: skip
        take = np.flatnonzero(pairing.accept(scores, _chance(options, number).random(len(scores)), beta=beta, ceiling=ceiling))
        rates.append(pairing.acceptance(scores, beta=beta, ceiling=ceiling))
        drawn, accepted, best = drawn + len(scores), accepted + len(take), best + int((scores[take] == ceiling).sum())
        cut += sum(record.responses[i].finished is False for i in found)
        if not len(take):
            count["prompts: nothing accepted"] += 1
            continue
        kept = take[: options.limit]
        count["responses: accepted beyond --limit"] += len(take) - len(kept)
        how = {"how": "rejection", "beta": beta, "r_max": ceiling, "of": len(scores)}
        made.append(_kept(record, [found[i] for i in kept], how, options))
    se = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else 0.0
    say(f"accepted {accepted} of {drawn}; acceptance rate {statistics.fmean(rates):.4f} ± {se:.4f}: mean of exp((r - r_max) / {beta:g})")
    _warn(accepted / max(1, len(usable)), best / max(1, accepted), cut, options)
    return made


def _warn(each: float, best: float, cut: int, options: Pair) -> None:
    """What stands between what was accepted and pi*."""
    if options.r_max == "prompt" and each < pairing.ENOUGH:
        say(f"warning: {each:.1f} accepted a prompt, and {best:.0%} of them are their prompt's best, accepted for certain: with the "
            "largest reward estimated from so few samples this is nearer to best-of-K than to pi*; below "
            f"{pairing.ENOUGH} a prompt: sample more, a larger --beta, or a true --r-max (docs/rejection.md)")  # fmt: skip
    if options.limit and options.limit > each / 4:
        say(f"warning: --limit {options.limit} is not far below the {each:.1f} accepted a prompt: prompts with few acceptances keep fewer")
    if cut:
        say(f"{cut} samples were cut at their longest length: pi* is that of responses cut so")


# --- whom to ask ----------------------------------------------------------------------------------------------------------------


def _members(record: Record, found: list[int], count: Counter[str]) -> np.ndarray | None:
    """(M, K) what each of several rewards, or members of an ensemble, said, as `preftune score` left it in source.scores."""
    each = [scores_of(record.responses[i]) for i in found]
    if not each or len({len(row) for row in each}) > 1 or len(each[0]) < 2:
        count["prompts: no scores of several rewards in source.scores"] += 1
        return None
    return np.array(each).T


def _worth(records: list[Record], options: Pair, count: Counter[str]) -> list[Record]:
    """The pairs that a person's answer would tell most about: a record each, without a judgement."""
    every = []
    for number, record in enumerate(records):
        found, scores = _distinct(record, count)
        members = _members(record, found, count) if options.ask_by == "disagreement" else None
        if len(found) < 2 or (options.ask_by == "disagreement" and members is None):
            count["prompts: fewer than two different scored responses"] += len(found) < 2
            continue
        couples = [each for each in pairing.doubts(scores, members) if abs(scores[each[1]] - scores[each[2]]) >= options.margin]
        every += [(doubt, number, found[a], found[b]) for doubt, a, b in couples[: options.limit or 1]]
    every.sort(key=lambda each: (-each[0], each[1]))
    count["pairs: less doubtful than the --ask best"] += max(0, len(every) - (options.ask or 0))
    made = []
    for doubt, number, a, b in every[: options.ask]:
        responses, _ = _only(records[number], [a, b], {"how": "ask"})
        meta = _meta(records[number], options)
        meta["paired"] |= {"doubt": doubt}
        made.append(replace(records[number], responses=responses, judgements=(), labels=None, meta=meta))
    say(f"{len(made)} pairs to ask about" + (f"; doubt from {every[0][0]:.4g} to {every[len(made) - 1][0]:.4g}" if made else ""))
    return made
