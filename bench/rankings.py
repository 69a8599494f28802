"""Are rankings more efficient than pairs at an equal label budget? Log-linear policies, exact regret, our own losses.

    python bench/rankings.py [SEEDS]

A world has prompts with 16 answers each, features phi(x, y) and a reward r = w*.phi in Bradley-Terry logits. The policy is
ref(y|x) exp(w.phi/beta)/Z, so the KL-constrained optimum is in reach. Judges rank K random answers of a prompt by Plackett-Luce, each
prompt once; w is fitted by minimising a loss of the table; what it costs is J(pi*) - J(pi) on 400 other prompts, summed over all 16
answers, in reward units. A "careless" judge picks the best like the others and orders the rest at random.

How many judgements of one random pair a ranking is worth: the number of pairs with the same mean regret, between those that were run. The
intervals are 95% percentiles over 1,000 resamples of the worlds. Writes bench/results/rankings.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from preftune.losses import LOSSES, Side  # noqa: E402
from preftune.losses.lists import Rankings  # noqa: E402

ANSWERS, FEATURES, BETA, FRESH, LISTS = 16, 8, 0.5, 400, 64
# K -> what one ranking may be said to cost, in pairs: one judgement, answers read, places decided, comparisons of the best sort, all pairs.
COSTS = {4: {"judgement": 1, "answers read": 2, "places": 3, "comparisons": 5, "implied pairs": 6},
         8: {"judgement": 1, "answers read": 4, "places": 7, "comparisons": 16, "implied pairs": 28}}  # fmt: skip
FITS = (("plackett-luce", "plackett-luce", 0), ("best two and below", "plackett-luce", 2), ("s-dpo", "s-dpo", 0),
        ("all pairs", "sigmoid", 0))  # fmt: skip


class World:
    """Prompts, a reward and a reference, all drawn from a seed."""

    def __init__(self, seed: int, prompts: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.phi = torch.tensor(self.rng.normal(size=(prompts, ANSWERS, FEATURES)) / FEATURES**0.5)
        self.truth = torch.tensor(self.rng.normal(size=FEATURES))
        self.reference = torch.tensor(self.rng.normal(size=(prompts, ANSWERS))).log_softmax(1)
        self.reward = self.phi @ self.truth

    def policy(self, w: Tensor) -> Tensor:
        return (self.reference + self.phi @ w / BETA).log_softmax(1)

    def regret(self, w: Tensor) -> float:
        """J(pi*) - J(pi), J = E r - beta KL(pi||ref), over the last FRESH prompts."""
        def objective(log_pi: Tensor) -> Tensor:
            return (log_pi.exp() * (self.reward - BETA * (log_pi - self.reference)))[-FRESH:].sum(1).mean()

        with torch.no_grad():
            return float(objective(self.policy(self.truth)) - objective(self.policy(w)))

    def judged(self, lists: int, size: int, *, careless: bool = False) -> np.ndarray:
        """(lists, size) answers of the first prompts, best first."""
        chosen = np.argsort(self.rng.random((lists, ANSWERS)), 1)[:, :size]
        noisy = np.take_along_axis(self.reward[:lists].numpy(), chosen, 1) + self.rng.gumbel(size=chosen.shape)
        order = np.argsort(-noisy, 1)
        if careless:
            order[:, 1:] = np.take_along_axis(order[:, 1:], np.argsort(self.rng.random((lists, size - 1)), 1), 1)
        return np.take_along_axis(chosen, order, 1)


def fit(world: World, order: np.ndarray, loss: str, top: int = 0) -> Tensor:
    """The w that minimises a loss over these rankings; for losses over pairs over all pairs of each. `top`: only that many in order."""
    lists, size = order.shape
    at, answers = torch.arange(lists).repeat_interleave(size), torch.from_numpy(order).flatten()
    place = torch.arange(size).repeat(lists)
    said = Rankings(at, torch.where((place >= top) & (top > 0), -1, place))
    good, bad = (torch.from_numpy(k).repeat(lists) + size * torch.arange(lists).repeat_interleave(len(k)) for k in np.triu_indices(size, 1))
    w = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-8, line_search_fn="strong_wolfe")
    phi, reference = world.phi[:lists], world.reference[:lists]

    def closure() -> Tensor:
        solver.zero_grad()
        log_pi = (reference + phi @ w / BETA).log_softmax(1)
        side = Side(log_pi[at, answers], reference[at, answers], torch.ones(lists * size))
        pairs = LOSSES[loss].kind == "pairs"
        values = LOSSES[loss].function(*((side[good], side[bad]) if pairs else (side, said)), beta=BETA)
        # One part in a thousand of a judge who knows nothing keeps w finite where the data never contradict a direction.
        value = values.sum() / lists + 1e-3 * (w**2).sum()
        value.backward()
        return value

    solver.step(closure)
    return w.detach()


def worlds(seeds: int) -> dict[str, np.ndarray]:
    """Regret of every way to judge and to fit, by seed."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        world = World(seed, LISTS * 28 + FRESH)
        for size in COSTS:
            for careless in (False, True):
                order = world.judged(LISTS, size, careless=careless)
                for name, loss, top in FITS:
                    key = f"{size}{' careless' if careless else ''} {name}"
                    found.setdefault(key, []).append(world.regret(fit(world, order, loss, top)))
        for cost in sorted({cost for costs in COSTS.values() for cost in costs.values()}):
            pairs = world.judged(LISTS * cost, 2)
            found.setdefault(f"pairs {cost}", []).append(world.regret(fit(world, pairs, "sigmoid")))
    return {name: np.array(values) for name, values in found.items()}


def worth(regret: dict[str, np.ndarray], name: str, rows: np.ndarray) -> float:
    """Pairs a ranking is worth: where the line through (log pairs, log mean regret) meets the ranking's regret."""
    counts = np.array(sorted(int(key.split()[1]) for key in regret if key.startswith("pairs ")))
    line = np.log([regret[f"pairs {c}"][rows].mean() for c in counts])
    return float(np.exp(np.interp(-np.log(regret[name][rows].mean()), -line, np.log(counts))))


def interval(function, seeds: int) -> list[float]:
    rng = np.random.default_rng(0)
    drawn = [function(rng.integers(seeds, size=seeds)) for _ in range(1000)]
    return [round(float(x), 4) for x in (function(np.arange(seeds)), *np.percentile(drawn, [2.5, 97.5]))]


def main() -> None:
    torch.set_num_threads(1)
    seeds, begin = int(sys.argv[1]) if len(sys.argv) > 1 else 100, time.perf_counter()
    regret = worlds(seeds)
    report: dict = {"seeds": seeds, "lists": LISTS, "answers": ANSWERS, "features": FEATURES, "beta": BETA, "torch": torch.__version__}
    report["regret"] = {name: interval(lambda rows, v=values: v[rows].mean(), seeds) for name, values in regret.items()}
    report["worth in pairs"] = {name: interval(lambda rows, n=name: worth(regret, n, rows), seeds) for name in regret
                                if not name.startswith("pairs") and "careless" not in name}  # fmt: skip

    def ratio(size: int, cost: int, rows: np.ndarray) -> float:
        return regret[f"{size} plackett-luce"][rows].mean() / regret[f"pairs {cost}"][rows].mean()

    report["regret of plackett-luce over that of as many pairs as it costs"] = {
        f"{size} by {what}": interval(lambda rows, s=size, c=cost: ratio(s, c, rows), seeds)
        for size, costs in COSTS.items() for what, cost in costs.items()}  # fmt: skip
    report["seconds"] = round(time.perf_counter() - begin, 1)
    text = json.dumps(report, indent=1)
    (ROOT / "bench" / "results" / "rankings.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
