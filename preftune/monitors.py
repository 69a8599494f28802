"""What a run's own answers say while it trains: when to stop, and what goes wrong. Arrays and metric rows in, numbers out.

Evaluations ask the same held-out prompts with the same random numbers, so everything is compared prompt by prompt: prompts are the
units, answers to one prompt are averaged first. The gate (`note`, `judge`) stops where the reward is shown to be flat, the findings
(`alarms`) are read off the samples at the end. numpy and scipy only; the words for these numbers are report/findings.py's.

    watch = note(watch, gate, step=40, reward=reward, kl=kl, length=length)     # arrays (prompts, answers each)
    judge(watch, gate)["why"]                                                  # '', 'plateau', 'limit' or 'drift'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
KL_LIMIT = 0.05  # nats per token: the notes' limit, read per token (docs/monitors.md)
REWARD_BAND = 0.2  # standard deviations of one answer's reward, over the window
KL_BAND = 0.2  # of the limit, over the window
FEWEST_PROMPTS = 16  # there the interval covers 94%, at 8 prompts 93% (bench/results/monitors.txt)


@dataclass(frozen=True)
class Gate:
    """When a run is over.

    Args:
        window: evaluations that are looked at. limit: of the KL, nats. unit: 'token' or 'sequence', of the limit.
        band: change of the mean reward over the window that counts as none; None: REWARD_BAND standard deviations of one answer.
        after: evaluations up to this step do not count: while the learning rate rises, a model that has hardly moved looks flat.
    """

    window: int
    limit: float
    unit: str = "token"
    band: float | None = None
    after: int = 0


def trend(steps: Sequence[int] | np.ndarray, values: np.ndarray, *, level: float = LEVEL) -> tuple[float, float, float]:
    """Change of the mean along a straight line from the first step to the last, with its interval.

    Every prompt has a least-squares slope of its own; they are independent, however the evaluations of one prompt hang together. Their
    mean has Student's interval with prompts - 1 degrees of freedom.

    Args:
        steps: (W,) at least two different ones. values: (W, prompts).

    Returns:
        change, low, high, in the values' unit.
    """
    at = np.asarray(steps, float) - np.mean(steps)
    each = (at * (steps[-1] - steps[0]) / (at @ at)) @ (np.asarray(values, float) - values[0])  # what never moves has a change of 0
    return interval(each, level=level)


def interval(each: np.ndarray, *, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of one number per prompt and Student's interval; infinite for a single prompt."""
    n, mean = len(each), float(np.mean(each))
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(each, ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return mean, mean - half, mean + half


def per_token(total: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(..., prompts) of sums and lengths -> values whose mean is the ratio of means and whose spread is its delta-method spread."""
    rate = total.mean(-1, keepdims=True) / length.mean(-1, keepdims=True)
    return rate + (total - rate * length) / length.mean(-1, keepdims=True)


# ---------------------------------------------------------------- the gate


def note(watch: Mapping[str, Any], gate: Gate, *, step: int, reward: np.ndarray, kl: np.ndarray, length: np.ndarray) -> dict[str, Any]:
    """What is kept after an evaluation: plain lists, for a checkpoint.

    Args:
        watch: of the evaluation before; empty before the first. reward, kl, length: (prompts, answers each), kl in nats per answer.

    Returns:
        `looks`: step, and per prompt reward, KL, length, of the last `window` evaluations that count; `start`: the same of the first
        of all; `best`: step, reward and KL of the highest mean reward within the limit, or None.
    """
    rate = float(kl.mean()) / (float(length.mean()) if gate.unit == "token" else 1.0)
    look = {"step": step, "variance": float(np.var(reward)), "reward": reward.mean(1).tolist(), "kl": kl.mean(1).tolist(),
            "length": length.mean(1).tolist()}  # fmt: skip
    found = dict(watch) or {"looks": [], "start": look, "best": None}
    if step > gate.after:
        found["looks"] = [*found["looks"], look][-gate.window :]
    if rate <= gate.limit and (found["best"] is None or float(reward.mean()) > found["best"]["reward"]):
        found["best"] = {"step": step, "reward": float(reward.mean()), "kl": rate}
    return found


def judge(watch: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether to stop after the evaluations of `watch`, and the numbers that say so. {} before the window is full.

    The reward is flat where the 95% interval of its change over the window lies within the band, not where it merely includes 0.

    Returns:
        `why`: 'plateau' (reward flat, KL flat and within its limit), 'limit' (reward flat, KL above its limit and not certainly
        falling), 'drift' (reward flat, KL certainly rising by more than its band), or ''. `first`, `last`: steps of the window;
        `reward`, `kl`: change, low, high, band; `gained`: change, low, high of the reward since the start; `kl_now`, `limit`, `unit`;
        `constant`: no answer ever had another reward, which is no plateau; `prompts_needed`: about how many prompts would show this
        change to be flat, or None.
    """
    looks = watch["looks"]
    if len(looks) < gate.window:
        return {}
    steps = [look["step"] for look in looks]
    reward, kl, length = (np.array([look[name] for look in looks]) for name in ("reward", "kl", "length"))
    values = per_token(kl, length) if gate.unit == "token" else kl
    spread = math.sqrt(np.mean([watch["start"]["variance"], *(look["variance"] for look in looks)]))
    start = np.array(watch["start"]["reward"])
    constant = spread == 0 and bool(np.all(reward == start))
    band = REWARD_BAND * spread if gate.band is None else gate.band
    change, low, high = trend(steps, reward)
    moved, least, most = trend(steps, values)
    kl_band, now = KL_BAND * gate.limit, float(values[-1].mean())
    flat, still = -band <= low and high <= band and not constant, -kl_band <= least and most <= kl_band
    reasons = {"limit": now > gate.limit and most >= 0, "drift": least > kl_band, "plateau": still and now <= gate.limit}
    why = next((name for name, holds in reasons.items() if holds and flat), "")
    room = band - abs(change)
    needed = None if flat or room <= 0 else math.ceil(reward.shape[1] * ((high - change) / room) ** 2)
    gained = dict(zip(("change", "low", "high"), interval(reward[-1] - start), strict=True))
    return {"why": why, "gained": gained, "first": steps[0], "last": steps[-1], "window": gate.window, "prompts": reward.shape[1],
            "reward": {"change": change, "low": low, "high": high, "band": band},
            "kl": {"change": moved, "low": least, "high": most, "band": kl_band}, "kl_now": now, "limit": gate.limit, "unit": gate.unit,
            "constant": constant, "prompts_needed": needed}  # fmt: skip


def line(verdict: Mapping[str, Any]) -> dict[str, float]:
    """The gate's numbers as metrics of an evaluation line: `plateau/reward_change`, `_low`, `_high`, `_band`, and the KL's."""
    return {f"plateau/{of}_{name}": verdict[of][name] for of in ("reward", "kl") for name in verdict.get(of, ())}


# ---------------------------------------------------------------- alarms


# Each threshold's false alarms on healthy runs: bench/results/monitors.txt.
LENGTH_DRIFT = 0.2  # relative change of the mean length
LENGTH_SHARE, LENGTH_SURE = 0.5, 0.25  # of the gain, explained by length: the estimate, and the low end of its interval
ENTROPY_LEFT = 0.25  # of the entropy per token at the start: the high end of its interval is below
REPETITION = 0.2  # rise of the share of repeated runs of four tokens: the low end of its interval is above
SATURATED = 0.9  # of the answers share the highest reward


@dataclass(frozen=True)
class Course:
    """The sampled answers of a run, the start first. Each array (evaluations, prompts, answers each); rewards None where not scored."""

    steps: tuple[int, ...]
    reward: np.ndarray | None
    truth: np.ndarray | None
    length: np.ndarray
    entropy: np.ndarray
    repeated: np.ndarray


def course(samples: Sequence[Mapping[str, Any]]) -> Course | None:
    """Lines of samples.jsonl, in order, as arrays; None where fewer than two evaluations or two prompts are there."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in samples:
        by_step.setdefault(row["step"], []).append(row)
    answers = 1 + max((row["sample"] for row in samples), default=0)
    if len(by_step) < 2 or len(samples) < 2 * answers * len(by_step):
        return None
    steps = sorted(by_step)

    def of(name: str) -> np.ndarray | None:
        if samples[0].get(name) is None:
            return None
        return np.array([[row[name] for row in by_step[step]] for step in steps], float).reshape(len(steps), -1, answers)

    length, entropy, repeated = of("tokens"), of("entropy"), of("repeated")
    assert length is not None and entropy is not None and repeated is not None
    return Course(tuple(steps), of("reward"), of("truth"), length, entropy, repeated)


def _named(found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("change", "low", "high"), found, strict=True))


def alarms(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What stands out in the answers of a run, by name, each with its numbers and `alarm`: whether it passes its threshold.

    Args:
        samples: lines of samples.jsonl, up to the evaluation of the model that was kept.
    """
    seen = course(samples)
    if seen is None:
        return {}
    found = {"entropy": _entropy(seen), "repetition": _repetition(seen)}
    if seen.reward is not None:
        found |= {"constant": _constant(seen.reward), "saturation": _saturation(seen.reward), "length": _length(seen),
                  "reward_fell": _fell(seen.steps, seen.reward)}  # fmt: skip
    if seen.truth is not None:
        found["over_optimisation"] = _over_optimised(seen)
    return found


def _fell(steps: Sequence[int], values: np.ndarray, risen: np.ndarray | None = None) -> dict[str, Any]:
    """The evaluation since which the mean has fallen furthest beyond doubt (and that of `risen` has risen).

    Every earlier evaluation is compared with the last at a level divided by their number, so that picking the highest is paid for:
    where nothing falls, one in forty courses is said to have fallen, at most.
    """
    earlier = len(steps) - 1
    level = 1 - (1 - LEVEL) / earlier
    worst: dict[str, Any] = {"alarm": False}
    for at in range(earlier):
        down = interval((values[-1] - values[at]).mean(-1), level=level)
        up = interval((risen[-1] - risen[at]).mean(-1), level=level) if risen is not None else (0.0, 1.0, 1.0)
        if down[2] < 0 < up[1] and down[0] < worst.get("change", 0.0):
            worst = {"alarm": True, "since": steps[at]} | _named(down) | ({} if risen is None else {"reward": _named(up)})
    return worst


def _over_optimised(seen: Course) -> dict[str, Any]:
    """The truth fell while the proxy rose, since one and the same evaluation."""
    assert seen.truth is not None
    return _fell(seen.steps, seen.truth, seen.reward)


def _constant(reward: np.ndarray) -> dict[str, Any]:
    """Every answer of every evaluation got the same reward: it tells nothing."""
    return {"alarm": bool(np.all(reward == reward.flat[0])), "value": float(reward.flat[0]), "answers": reward.size}


def _saturation(reward: np.ndarray) -> dict[str, Any]:
    """Nearly all answers of the last evaluation share the highest reward of all: it can no longer tell better from good."""
    share, before = (float(np.mean(at == reward.max())) for at in (reward[-1], reward[0]))
    return {"alarm": share >= SATURATED and before < SATURATED, "share": share, "before": before, "value": float(reward.max())}


def _length(seen: Course) -> dict[str, Any]:
    """How much of the gain in reward the change of length accounts for, at the price that a token had at the start.

    share = b (change of length) / (change of reward), b the slope of reward on length over the answers of step 0, its error by prompts.
    """
    assert seen.reward is not None
    grew, gained = ((x[-1] - x[0]).mean(-1) for x in (seen.length, seen.reward))
    more, reward, start = interval(grew), interval(gained), float(seen.length[0].mean())
    out: dict[str, Any] = {"alarm": False} | _named(more) | {"reward": _named(reward)}
    x = seen.length[0] - start
    if not (x**2).sum() or reward[1] <= 0 or more[1] <= 0 <= more[2]:
        return out
    price = float((x * seen.reward[0]).sum() / (x**2).sum())
    left = seen.reward[0] - seen.reward[0].mean() - price * x
    error = math.sqrt(float(((x * left).sum(-1) ** 2).sum())) / float((x**2).sum())
    scale = more[0] / reward[0]
    share, sure = price * scale, price * scale - stats.norm.ppf((1 + LEVEL) / 2) * error * abs(scale)
    drifted = abs(more[0]) >= LENGTH_DRIFT * start
    bought = bool(drifted and share >= LENGTH_SHARE and sure >= LENGTH_SURE)
    return out | {"alarm": bought, "share": share, "share_low": sure, "price": price}


def _entropy(seen: Course) -> dict[str, Any]:
    """Entropy per token of the last evaluation over the first's, of the distributions along its own samples; interval on the logarithm."""
    rate = [per_token(seen.entropy[at].mean(-1), seen.length[at].mean(-1)) for at in (0, -1)]
    start, end = (float(r.mean()) for r in rate)
    if start <= 0 or end <= 0:
        return {"alarm": bool(end <= 0 < start), "start": start, "end": end}
    ratio, low, high = (math.exp(x) for x in interval(rate[1] / end - rate[0] / start + math.log(end / start)))
    return {"alarm": high < ENTROPY_LEFT, "start": start, "end": end, "ratio": ratio, "low": low, "high": high}


def _repetition(seen: Course) -> dict[str, Any]:
    """Rise of the share of repeated runs of four tokens."""
    rise = interval((seen.repeated[-1] - seen.repeated[0]).mean(-1))
    return {"alarm": rise[1] > REPETITION, "start": float(seen.repeated[0].mean()), "end": float(seen.repeated[-1].mean())} | _named(rise)
