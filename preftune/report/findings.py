"""The numbers of a run as sentences: pure functions from metrics lines and results to findings.

Touches the standard library only.

    >>> line = {"step": 80, "eval/rewards/accuracies": 0.9, "eval/accuracy_low": 0.8, "eval/accuracy_high": 0.95}
    >>> findings([line], {"steps": 80})[0].title
    'Held-out accuracy beats chance'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Z95 = 1.959963984540054
KL_LIMIT = 0.05  # nats per token: the range in which the notes' KL limit makes sense for language models
SHORT_RUN = 50  # steps
LEVELS = ("alarm", "warn", "good", "note")  # the gravest first
LENGTH_DRIFT = 0.2  # relative change of the sampled length from which a reward may be a reward of length
BIASED = 0.1  # bias of a value, in spreads of the reward, from which it is worth a warning


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say. `level`: 'good', 'note', 'warn' or 'alarm'; `about`: the quantity it is about."""

    level: str
    title: str
    text: str
    about: str = ""


def value(row: Row | None, key: str) -> float | None:
    """A finite number of a metrics line, or None where it is absent, null or not finite."""
    return finite((row or {}).get(key))


def finite(found: object) -> float | None:
    """The number, or None for what is none or not finite."""
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found) else None


def evaluations(metrics: Iterable[Row]) -> list[dict[str, Any]]:
    """The evaluation lines, one per step, in order. A training line is one with 'loss'."""
    merged: dict[int, dict[str, Any]] = {}
    for row in metrics:
        if "loss" not in row and value(row, "step") is not None:
            merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def trainings(metrics: Iterable[Row]) -> list[Row]:
    """The training lines, one per step, in order."""
    lines = {row["step"]: row for row in metrics if "loss" in row and value(row, "step") is not None}
    return [lines[step] for step in sorted(lines)]


def findings(metrics: Sequence[Row], results: Row | None) -> list[Finding]:
    """What the numbers of a run say, the gravest first.

    Args:
        metrics: the lines of metrics.jsonl. results: results.json, or None for a run that did not finish.
    """
    scored, done = evaluations(metrics), results or {}
    before = done.get("before") or next((row for row in scored if row["step"] == 0), None)
    after = done.get("after") or (scored[-1] if scored and scored[-1]["step"] > 0 else None)
    later = [row for row in scored if row["step"] > 0]
    paired, alarms = done.get("paired_reward"), done.get("alarms") or {}
    judging = done.get("stage") == "reward"  # then there are no answers of its own
    found = [*_course(trainings(metrics), finished="steps" in done), *_accuracy(after),
             *(_reward_model(done.get("reward")) if judging else _reward(before, after, paired)),
             *_kl(after, done.get("gate")), *_displacement(later, after, paired, alarms), *_length(before, after), *_fit(scored),
             *_gate(done.get("gate")), *_alarms(alarms), *_partition(done.get("partition"))]  # fmt: skip
    if any(f.level == "good" for f in found):  # what was learned in few steps was learned
        found = [f for f in found if f.about != "short"]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def verdict(found: Sequence[Finding]) -> tuple[str, str]:
    """(level, headline) of the whole run."""
    level = {f.about: f.level for f in reversed(found)}
    alarm = next((f for f in found if f.level == "alarm"), None)
    ranks, pays = level.get("accuracy"), level.get("reward")
    price = next((f for f in found if f.level == "warn" and f.about in ("kl", "length", "fit")), None)
    if "reward_model" in level and not alarm:
        return next((f.level, f"{f.title}.") for f in found if f.about == "reward_model")
    if alarm:
        return "alarm", f"Look before you use this model: {alarm.title[0].lower()}{alarm.title[1:]}."
    if pays == "good" and price:
        return "warn", f"Its answers earn more reward, at a price: {price.title[0].lower()}{price.title[1:]}."
    if pays == "good":
        return "good", "The model got better." if ranks == "good" else "Its answers earn more reward than before."
    if ranks == "good" and pays is None:
        return "note", "The model learned the preferences; whether its answers got better was not measured."
    if ranks == "good":
        return "warn", "The model learned the preferences; its answers show no certain gain yet."
    if ranks or pays:
        return "warn", "Not enough data to tell whether the model got better."
    if level.keys() & {"kl", "displacement", "length", "fit", "unscored"}:
        return "note", "Whether the model got better was not measured."
    return "note", "This run was not evaluated after its start."


def _finding(level: str, about: str, title: str, *sentences: str) -> Finding:
    return Finding(level, title, " ".join(filter(None, sentences)), about)


def _course(lines: Sequence[Row], *, finished: bool) -> Iterator[Finding]:
    last = lines[-1]["step"] if lines else 0
    if not finished:
        yield _finding("warn", "course", "The run did not finish",
            f"There are no results; the last training step on record is {last:,}.",
            "'preftune dpo --resume' with this folder continues it.")  # fmt: skip
    if 0 < last < SHORT_RUN:
        yield _finding("note", "short", f"A short run: {last} step{'s' if last > 1 else ''}",
            f"Below {SHORT_RUN} steps there is little time to learn. More epochs or a smaller batch size would help.")
    broken = [row["step"] for row in lines if value(row, "loss") is None]
    if broken:
        yield _finding(
            "alarm", "loss", "The loss was not a number", f"First at step {broken[0]:,}. Nothing after it means anything."
        )


def _accuracy(after: Row | None) -> Iterator[Finding]:
    rate, low, high = (value(after, f"eval/{name}") for name in ("rewards/accuracies", "accuracy_low", "accuracy_high"))
    if rate is None or low is None or high is None:
        return
    pairs = value(after, "eval/pairs")
    of = f"{pairs:,.0f} " if pairs else ""
    text = (f"The trained model puts the preferred answer first in {percent(rate)} of {of}held-out pairs "
            f"(95% interval {percent(low)} to {percent(high)}); chance is 50%.")  # fmt: skip
    if low > 0.5:
        yield _finding("good", "accuracy", "Held-out accuracy beats chance", text)
    elif high < 0.5:
        yield _finding("alarm", "accuracy", "Held-out accuracy is below chance", text,
            "Look for preferred and rejected answers swapped in the data, or held-out data of another kind.")  # fmt: skip
    else:
        yield _finding("warn", "accuracy", "Held-out accuracy: not enough data to tell", text,
            "The interval includes chance. More held-out pairs narrow it; more training may move it.")  # fmt: skip


def _reward_model(evidence: Any) -> Iterator[Finding]:
    """What held-out data say of a reward model (`stages.reward.evidence`): how often it is right, of what is possible; how sure it is."""
    told = evidence if isinstance(evidence, Mapping) else {}
    inner = {key: found if isinstance(found := told.get(key), Mapping) else None for key in ("ceiling", "calibration")}
    rate, classed = value(told, "agreement"), value(told, "classed")
    rate, low, high = value(told, "accuracy") if classed else rate, value(told, "low"), value(told, "high")
    ends = f" (95% interval {percent(low)} to {percent(high)})" if low is not None and high is not None else ""
    if classed and rate is not None:
        yield _finding("note", "reward_model", "The reward model was measured on held-out classes",
            f"The likeliest class is the right one in {percent(rate)} of {classed:,.0f} answers{ends}.")  # fmt: skip
    elif rate is not None:
        sure, most = low is not None and low > 0.5, value(inner["ceiling"], "high")
        yield _finding("good" if sure else "warn", "reward_model",
            "The reward model learned the preferences" if sure else "The reward model: not enough data to tell",
            f"It agrees with a drawn label in {percent(rate)} of held-out pairs{ends}.",
            f"With such labels {percent(most)} is the most that is possible." if most is not None else "")  # fmt: skip
    slope, least, largest = (value(inner["calibration"], key) for key in ("slope", "slope_low", "slope_high"))
    if slope is not None and least is not None and largest is not None and (largest < 1 or least > 1):
        yield _finding("note", "reward_model", f"The reward model is {'too sure of itself' if largest < 1 else 'surer than it says'}",
            f"Its log-odds times {number(slope)} (95% interval {number(least)} to {number(largest)}) would be right as often as they say.",
            "Comparing answers is not touched by that; soft labels and a KL weight are.")  # fmt: skip


def _change(before: Row | None, after: Row | None, name: str) -> tuple[float, float, float] | None:
    """Difference of two means with a 95% interval from their standard errors, as if independent: wide rather than narrow."""
    a, b, sa, sb = value(before, name), value(after, name), value(before, f"{name}_se"), value(after, f"{name}_se")
    if a is None or b is None or sa is None or sb is None:
        return None
    half = Z95 * math.hypot(sa, sb)
    return b - a, b - a - half, b - a + half


def _paired(paired: Row | None) -> tuple[float, float, float] | None:
    difference, low, high = (value(paired, key) for key in ("difference", "low", "high"))
    return None if difference is None or low is None or high is None else (difference, low, high)


def _reward(before: Row | None, after: Row | None, paired: Row | None) -> Iterator[Finding]:
    change, how = _paired(paired), "on the same prompts"
    if change is None:
        change, how = _change(before, after, "reward"), "from the two means"
    if change is None:
        if after and value(after, "reward") is None:
            yield _finding("note", "unscored", "The sampled answers were not scored",
            "Held-out accuracy says how the model ranks given answers, not how it answers.",
            "--eval-reward scores its own answers before and after.")  # fmt: skip
        return
    difference, low, high = change
    start, end = value(before, "reward"), value(after, "reward")
    means = f"from {number(start)} to {number(end)}, " if start is not None and end is not None else ""
    text = (f"Mean reward of its own answers: {means}a change of {signed(difference)} "
            f"(95% interval {signed(low)} to {signed(high)}, {how}).")  # fmt: skip
    if low > 0:
        yield _finding("good", "reward", "The sampled reward rose", text)
    elif high < 0:
        yield _finding(
            "alarm", "reward", "The sampled reward fell", text, "Try a smaller learning rate, fewer epochs or a larger beta."
        )
    else:
        yield _finding("warn", "reward", "Sampled reward: not enough data to tell", text,
            "The interval includes 0. More --eval-prompts or --eval-samples narrow it.")  # fmt: skip


def _kl(after: Row | None, gate: Row | None) -> Iterator[Finding]:
    kl, se, token = (value(after, key) for key in ("kl_sequence_rb", "kl_sequence_rb_se", "kl_token_rb"))
    if kl is None:
        return
    error = f" ± {number(se)}" if se is not None else ""
    text = (f"{number(kl)}{error} nats per answer"
            f"{f', {number(token)} nats per token' if token is not None else ''}: how far the model is from its reference.")
    how = "Rao-Blackwell estimate on the model's own answers at temperature 1, nothing cut; ± is one standard error."
    limit = gate["limit"] if gate and gate.get("unit") == "token" else KL_LIMIT
    if token is not None and token > limit:
        yield _finding("warn", "kl", "The model has moved far from its reference", text, how,
            f"Above {limit:g} nats per token a reward may be bought with what it does not measure: read the samples.",
            "A larger beta or fewer epochs hold the model closer.")  # fmt: skip
    else:
        yield _finding("note", "kl", "Distance from the reference", text, how)
    plain, plain_se = value(after, "kl_sequence_k1"), value(after, "kl_sequence_k1_se")
    if plain is not None and plain_se is not None and se is not None and abs(kl - plain) > 4 * math.hypot(se, plain_se) > 0:
        yield _finding("warn", "kl", "Two estimates of the KL disagree",
            f"Rao-Blackwell {number(kl)} ± {number(se)}, Monte Carlo {number(plain)} ± {number(plain_se)} nats per answer:",
            "more than four standard errors apart, though both estimate one number. Trust neither before the cause is known.")


def _worse(later: Sequence[Row], after: Row | None, paired: Row | None, alarms: Row) -> list[str]:
    """What fell: accuracy below the interval of its best evaluation or below chance, reward below its best or its start.

    Where the samples were compared prompt by prompt (`monitors.alarms`), that decides about the reward.
    """
    out = []
    rate = value(after, "eval/rewards/accuracies")
    best = max(later, key=lambda row: _or(value(row, "eval/rewards/accuracies"), -math.inf), default=None)
    floor, ceiling = value(best, "eval/accuracy_low"), value(after, "eval/accuracy_high")
    if rate is not None and (rate < _or(floor, -math.inf) or _or(ceiling, 1.0) < 0.5):
        out.append("held-out accuracy")
    richest = max(later, key=lambda row: _or(value(row, "reward"), -math.inf), default=None)
    drop, change = _change(richest, after, "reward"), _paired(paired)
    told = alarms.get("reward_fell")
    fell = told["alarm"] if told else bool(drop and drop[2] < 0)
    if fell or (change and change[2] < 0):
        out.append("the sampled reward")
    return out


def _or(found: float | None, otherwise: float) -> float:
    return otherwise if found is None else found


def _displacement(later: Sequence[Row], after: Row | None, paired: Row | None, alarms: Row) -> Iterator[Finding]:
    moved = value(after, "eval/displacement")
    if moved is None:
        return
    times = f", {math.exp(abs(moved)):.3g} times {'more' if moved > 0 else 'less'} likely" if 0.01 <= abs(moved) < 20 else ""
    went = f"{'rose' if moved >= 0 else 'fell'} by {number(abs(moved))} nats"
    text = (f"The log-probability of preferred held-out answers {went} per answer "
            f"against the reference{times}.")  # fmt: skip
    if moved >= 0:
        yield _finding(
            "note",
            "displacement",
            "Preferred answers became more likely" if moved >= 0.01 else "Preferred answers kept their level",
            text,
        )
        return
    why = "Preference losses reward only the difference between the two answers, so both may fall while their margin grows."
    worse = _worse(later, after, paired, alarms)
    if worse:
        yield _finding("alarm", "displacement", "Preferred answers became less likely, and quality fell too", text, why,
            f"Here {' and '.join(worse)} fell with it: probability is moving to answers that nobody judged.",
            "Remedies: an NLL term on the preferred answer (--loss sigmoid+0.1*nll); a larger beta; a smaller learning rate or "
            "fewer steps; a loss that holds the level (DPO-Positive); pairs sampled from the model itself.")  # fmt: skip
    else:
        yield _finding("note", "displacement", "Preferred answers became less likely", text, why,
            "Neither accuracy nor reward fell with it: a quantity to watch, not a fault.")  # fmt: skip


def _length(before: Row | None, after: Row | None) -> Iterator[Finding]:
    change, finished = _change(before, after, "sample_length"), value(after, "sample_finished")
    cut = finished is not None and finished < 0.5
    if change:
        difference, low, high = change
        start = value(before, "sample_length") or 0.0
        text = (f"From {number(start)} to {number(start + difference)} tokens on average, a change of {signed(difference)} "
                f"(95% interval {signed(low)} to {signed(high)}).")  # fmt: skip
        longer = "longer" if difference > 0 else "shorter"
        if low <= 0 <= high and cut:
            pass  # cut answers have the length of the limit
        elif low <= 0 <= high:
            yield _finding("note", "length", "The length of answers did not change measurably", text)
        elif abs(difference) > LENGTH_DRIFT * start:
            yield _finding("warn", "length", f"Answers became much {longer}", text,
            "A gain in reward may be a change of length: compare answers of equal length before believing it.",
            "--loss sigmoid-norm counts per token.")  # fmt: skip
        else:
            yield _finding("note", "length", f"Answers became a little {longer}", text)
    if cut:
        yield _finding("note", "length", "Most sampled answers were cut",
            f"Only {percent(finished or 0.0)} ended by themselves, so their length says little. --sample-tokens sets the limit.")


def _fit(scored: Sequence[Row]) -> Iterator[Finding]:
    losses = [(found, row["step"]) for row in scored if (found := value(row, "eval/loss")) is not None]
    if len(losses) < 2:
        return
    (start, _), (end, last), (best, step) = losses[0], losses[-1], min(losses)
    text = f"{number(start)} at the start, lowest at step {step:,} ({number(best)}), {number(end)} at the end (step {last:,})."
    if end > start:
        yield _finding("warn", "fit", "Held-out loss ended above its start", text, "Too many steps or too high a learning rate.")
    elif end > best + 0.1 * (start - best):
        yield _finding(
            "note", "fit", "Held-out loss was lowest before the end", text, "Fewer steps would fit the held-out pairs better."
        )


def _partition(z: Row | None) -> Iterator[Finding]:
    """What is known of the error of Z, where a loss read it off samples (`objectives.partition`)."""
    bias, spread, count, samples = (value(z, key) for key in ("bias", "spread", "effective", "samples"))
    if bias is None or spread is None or count is None or samples is None:
        return
    large = abs(bias) > BIASED * spread
    yield _finding("warn" if large else "note", "partition", f"Values were too low by about {number(abs(bias))}",
        f"V = beta log Z was read off {number(samples)} samples a prompt, of which {number(count)} count; rewards of a prompt spread by "
        f"{number(spread)}. Every answer that was trained on, good or bad, was pushed up by as much.",
        "More samples a prompt or a larger beta make it smaller; --loss value-learned and value-quantile do without." if large else "")


def _within(found: Row) -> str:
    return f"{signed(found['change'])} (95% interval {signed(found['low'])} to {signed(found['high'])})"


def _over_optimised(found: Row) -> Finding:
    return _finding("alarm", "over_optimisation", "The reward went up while what it stands for went down",
        f"Since step {found['since']:,} the reward of its answers changed by {signed(found['reward']['change'])} and that of --eval-truth "
        f"by {signed(found['change'])}, both beyond doubt.",
        "The model has found what the proxy does not measure. Keep an earlier step (--stop plateau watches the truth), raise beta, or mend "
        "the reward: read the answers that it likes best.")  # fmt: skip


def _constant(found: Row) -> Finding:
    return _finding("alarm", "constant", "Every answer got the same reward",
        f"{found['answers']:,} sampled answers, all {number(found['value'])}: it tells nothing apart, so it cannot say whether the model "
        "got better.", "Look whether the rule reads what it should, and try it on two answers of which you know the better.")  # fmt: skip


def _bought(found: Row) -> Finding:
    longer = "longer" if found["change"] > 0 else "shorter"
    return _finding("alarm", "bought", f"The reward was earned with {longer} answers",
        f"At the start one token more was worth {signed(found['price'])}; the change of length by {_within(found)} tokens accounts for "
        f"{percent(found['share'])} of the gain in reward.",
        "Compare answers of equal length before believing it; a reward that does not count length, --loss sigmoid-norm, or pairs of equal "
        "length take the incentive away.")  # fmt: skip


def _narrow(found: Row) -> Finding:
    return _finding("alarm", "entropy", "The model says nearly the same thing every time",
        f"The entropy of its answers fell from {number(found['start'])} to {number(found['end'])} nats a token.",
        "A larger beta, fewer steps or a smaller learning rate keep more ways to answer; an earlier step has more of them.")  # fmt: skip


def _repeats(found: Row) -> Finding:
    return _finding("alarm", "repetition", "The answers repeat themselves",
        f"Of all runs of four tokens {percent(found['start'])} stood in the same answer before, now {percent(found['end'])}.",
        "Read the samples. A smaller learning rate or a larger beta helps; losses that count per token invite repetition.")  # fmt: skip


def _full(found: Row) -> Finding:
    return _finding("warn", "saturation", "The reward has no room left",
        f"{percent(found['share'])} of the last answers got {number(found['value'])}, the highest reward of all "
        f"({percent(found['before'])} at the start): it can no longer tell better from good.",
        "A finer reward or harder prompts would go on telling.")  # fmt: skip


# What monitors.alarms names -> its words; 'reward_fell' speaks through displacement.
ALARMS = {"over_optimisation": _over_optimised, "constant": _constant, "length": _bought, "entropy": _narrow, "repetition": _repeats,
          "saturation": _full}  # fmt: skip


def _alarms(alarms: Row) -> Iterator[Finding]:
    yield from (words(alarms[name]) for name, words in ALARMS.items() if alarms.get(name, {}).get("alarm"))


def gate_sentence(gate: Row) -> str:
    """Why --stop plateau stopped the run, or what it saw last."""
    reward, kl = gate["reward"], gate["kl"]
    unit = "a token" if gate["unit"] == "token" else "an answer"
    course = (f"{signed(reward['change'])} [{signed(reward['low'])}, {signed(reward['high'])}] from step {gate['first']:,} to "
              f"{gate['last']:,}, flat is within ±{number(reward['band'])}")  # fmt: skip
    now = f"{number(gate['kl_now'])} nats {unit}, limit {number(gate['limit'])}"
    moved = f"{signed(kl['change'])} [{signed(kl['low'])}, {signed(kl['high'])}]"
    return {
        "plateau": f"the reward is flat ({course}) and the KL stands still within its limit ({now})",
        "limit": f"the reward is flat ({course}) and the KL is above its limit ({now})",
        "drift": f"the reward is flat ({course}) while the KL goes on rising ({moved} over the same steps; {now})",
        "": f"the reward was not shown to be flat with a KL that stands still ({course}; KL {moved} over the same steps, {now})",
    }[gate["why"]]


def _gate(gate: Row | None) -> Iterator[Finding]:
    if not gate:
        return
    best = gate.get("best")
    kept = f"Within the limit the highest reward was {number(best['reward'])}, at step {best['step']:,}." if best else ""
    if "reward" not in gate:
        yield _finding("note", "gate", "The run ended before it could be stopped", "Too few evaluations were made to look for a plateau.")
    elif gate["why"] == "":
        text = gate_sentence(gate)
        needed = gate.get("prompts_needed")
        constant = "Every answer had the same reward, from the start on: that is no plateau." if gate.get("constant") else ""
        more = f"About {needed:,} prompts (--eval-prompts) would show a change of this size to be flat." if needed else ""
        yield _finding("note", "gate", "The run was not stopped", f"{text[0].upper()}{text[1:]}.", constant, more, kept)
    else:
        gained = f"Since the start the reward changed by {_within(gate['gained'])}."
        level, title = {"plateau": ("note", "Stopped: nothing more was gained"),
                        "limit": ("warn", "Stopped: flat beyond the KL limit"),
                        "drift": ("warn", "Stopped: it moved on and gained nothing")}[gate["why"]]  # fmt: skip
        text = gate_sentence(gate)
        yield _finding(level, "gate", title, f"{text[0].upper()}{text[1:]}.", gained, kept)


# ---------------------------------------------------------------- numbers as text


def number(x: float) -> str:
    """Three significant digits, a real minus sign.

    >>> number(1234.5), number(0.04567), number(-2.0)
    ('1,234', '0.0457', '−2.00')
    """
    digits = 2 if x == 0 else max(0, 2 - math.floor(math.log10(abs(x)))) if abs(x) >= 1e-4 else None
    return (f"{x:.2e}" if digits is None else f"{x:,.{digits}f}").replace("-", "−")


def signed(x: float) -> str:
    """`number` with its sign: '+0.310', '−2.00'."""
    return f"+{number(x)}" if x > 0 else number(x)


def percent(x: float) -> str:
    """0.7123 -> '71.2%'."""
    return f"{100 * x:.1f}%"


def duration(seconds: float) -> str:
    """4000 -> '1 h 7 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"
