"""The reward-KL frontier: what each method reaches at which distance from the start. Numbers only; the stage trains and samples.

A method's frontier is the concave hull of its points and the start: who tosses a coin once per prompt between two policies gets the
chord of their rewards at no more than the chord of their KLs (KL is convex), so the hull can be had. numpy only.

    curve = hull([(0.0, 0.1), *((p.kl, p.reward) for p in points)])
    height(curve, 3.0), area(curve, limit=10.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .certainty import interval_of

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One policy: a run's evaluation, or a rule over samples of the start.

    Args:
        method: its name in the table. setting: what of it was varied, such as 'beta 0.1'. seed: of the run. step: of the evaluation.
        last: whether the run ended there. kl: nats a response, from the start, on the policy's own samples. reward: the true or held-out
        one; both with standard errors over prompts, or None where one prompt gives none. accuracy: on held-out pairs, where the method
        has one. tokens, seconds: what training to this point cost.
    """

    method: str
    setting: str
    seed: int
    step: int
    last: bool
    kl: float
    kl_se: float | None
    reward: float
    reward_se: float | None
    accuracy: float | None
    tokens: int
    seconds: float


def points_of(rows: Sequence[Mapping[str, Any]], *, method: str, setting: str, seed: int) -> list[Point]:
    """The evaluations of a run's metrics as points; the first is the start."""
    found, seen, tokens, seconds = [], [row for row in rows if "kl_sequence_rb" in row], 0, 0.0
    for row in rows:
        tokens, seconds = int(row.get("num_tokens", tokens)), float(row.get("seconds", seconds))
        if "kl_sequence_rb" in row:
            found.append(Point(method, setting, seed, int(row["step"]), row is seen[-1], row["kl_sequence_rb"], row["kl_sequence_rb_se"],
                               row["reward"], row["reward_se"], row.get("eval/rewards/accuracies"), tokens, seconds))  # fmt: skip
    return found


def hull(points: Sequence[tuple[float, float]]) -> Curve:
    """Corners of the least concave, non-decreasing curve on or above all (KL, reward), from the smallest KL to the highest reward."""
    out: Curve = []
    for kl, reward in sorted(points, key=lambda p: (p[0], -p[1])):
        if out and reward <= out[-1][1]:
            continue
        while len(out) > 1 and (out[-1][1] - out[-2][1]) * (kl - out[-1][0]) <= (reward - out[-1][1]) * (out[-1][0] - out[-2][0]):
            out.pop()
        if len(out) == 1 and kl == out[0][0]:
            out.pop()
        out.append((kl, reward))
    return out


def height(curve: Curve, kl: float) -> float:
    """The best reward at no more than this KL; level after the last corner. Raises ValueError before the first."""
    if kl < curve[0][0]:
        raise ValueError(f"no point at a KL of {kl:g} or less; the first is at {curve[0][0]:g}")
    return float(np.interp(kl, [x for x, _ in curve], [y for _, y in curve]))


def area(curve: Curve, limit: float) -> float:
    """Mean height over KL from 0 to `limit`, by exact trapezoids; the curve must begin at 0 or below."""
    if curve[0][0] > 0:
        raise ValueError("the curve does not begin at the start")
    corners = sorted({0.0, limit, *(kl for kl, _ in curve if 0 < kl < limit)})
    return float(np.trapezoid([height(curve, kl) for kl in corners], corners)) / limit


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean over seeds with Student's 95% interval; a single seed has none."""
    mean, low, high = interval_of(np.asarray(values, float), np.arange(len(values)))
    return {"mean": mean, "low": low, "high": high, "seeds": len(values)}


def best_of_n_kl(mass: np.ndarray, n: int) -> float:
    """KL(best of n || one draw), nats, exactly: `mass` are the probabilities of the levels of the reward, worst first; draws of one
    level are told apart by lot, so their ratio is one number. At most log n - (n-1)/n (arXiv:2401.01879).

    .4, .2, .3, .1 (testbed B4 by reward: 0, .5, 1, 2), n = 4:

    >>> round(best_of_n_kl(np.array([0.4, 0.2, 0.3, 0.1]), 4), 6)
    0.582539
    """
    above = np.append(0.0, np.cumsum(mass)) ** n
    won = np.diff(above)
    return float((won[won > 0] * np.log(won[won > 0] / np.asarray(mass)[won > 0])).sum())


def best_of_n(proxy: np.ndarray, truth: np.ndarray, n: int) -> tuple[float, float]:
    """(mean true reward, KL) of the best of n by `proxy`, from N >= n draws of one prompt, both (N,).

    The reward is the mean over all subsets of n draws, equal proxies by lot: without bias. The KL is that of the N draws taken as the
    whole of the reference, so it cannot exceed log N: take N well above n.
    """
    size = len(proxy)
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} from {size} draws")
    _, level, count = np.unique(proxy, return_inverse=True, return_counts=True)
    steps = np.arange(n)
    below = np.prod(np.clip(np.cumsum(count)[:, None] - steps, 0, None) / (size - steps), axis=1)  # C(c, n) / C(N, n)
    chosen = np.diff(np.append(0.0, below))
    mean = np.bincount(level, truth) / count
    return float(chosen @ mean), best_of_n_kl(count / size, n)


def table(points: Sequence[Point], *, limit: float | None = None, at: Sequence[float] = ()) -> dict[str, Any]:
    """What the points of several methods say: each seed's hull from its method's points and the start, then means over seeds.

    Args:
        limit: KL up to which areas are taken. Default: the largest KL of all points. at: KLs at which heights are compared.

    Returns:
        'limit', 'at'; 'methods': name -> {'area', 'heights' (one per `at`), 'best' (the point of highest reward), 'curve' (of all
        seeds together), 'points', 'tokens', 'seconds'}; 'differences': 'A - B' -> {'area', 'heights'}, paired by seed; 'ends': per
        method and setting, where its runs ended.
    """
    limit = limit or max(p.kl for p in points)
    at = [kl for kl in at if kl <= limit]
    start = {p.seed: p for p in points if p.step == 0}
    origin = float(np.mean([p.reward for p in start.values()])) if start else None
    names = list(dict.fromkeys(p.method for p in points))
    curves: dict[str, dict[int, Curve]] = {}
    for name in names:
        own = [p for p in points if p.method == name]
        curves[name] = {}
        for seed in sorted({p.seed for p in own}):
            first = start[seed].reward if seed in start else origin
            found = [(p.kl, p.reward) for p in own if p.seed == seed and p.step]
            curves[name][seed] = hull([*found, *([(0.0, first)] if first is not None else [])])
    methods = {}
    for name in names:
        own = [p for p in points if p.method == name and p.step]
        ends = [p for p in own if p.last]
        together = [corner for curve in curves[name].values() for corner in curve]
        methods[name] = {
            "area": over_seeds([area(curve, limit) for curve in curves[name].values()]),
            "heights": [over_seeds([height(curve, kl) for curve in curves[name].values()]) for kl in at],
            "best": asdict(max(own, key=lambda p: p.reward)) if own else None, "curve": hull(together), "points": len(own),
            "tokens": float(np.mean([p.tokens for p in ends])) if ends else 0.0,
            "seconds": float(np.mean([p.seconds for p in ends])) if ends else 0.0}  # fmt: skip
    differences = {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both = [(curves[one][s], curves[other][s]) for s in curves[one].keys() & curves[other].keys()]
            if both:
                differences[f"{one} - {other}"] = {
                    "area": over_seeds([area(a, limit) - area(b, limit) for a, b in both]),
                    "heights": [over_seeds([height(a, kl) - height(b, kl) for a, b in both]) for kl in at]}  # fmt: skip
    return {"limit": limit, "at": list(at), "methods": methods, "differences": differences, "ends": ends_of(points)}


def ends_of(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Per method and setting, in order: means over seeds of KL, reward, accuracy, tokens and seconds where the runs ended."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point.last or not point.seconds:  # best-of-n has no way there: every n is an end
            groups.setdefault((point.method, point.setting), []).append(point)
    out = []
    for (name, setting), own in groups.items():
        own = [p for p in own if p.step]
        if own:
            known = [p.accuracy for p in own if p.accuracy is not None]
            out.append({"method": name, "setting": setting, "kl": over_seeds([p.kl for p in own]),
                        "reward": over_seeds([p.reward for p in own]), "accuracy": over_seeds(known) if known else None,
                        "tokens": over_seeds([p.tokens for p in own])["mean"],
                        "seconds": over_seeds([p.seconds for p in own])["mean"]})  # fmt: skip
    return out
