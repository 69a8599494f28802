"""How V is had in value regression: from samples, or learned; beside a loss without V. Log-linear policies, exact regret, our own losses.

    python bench/partition.py [SEEDS]

A world has prompts with 16 answers each, features phi(x, y) and a reward r = w*.phi without noise, of deviation about 1. The policy
is ref(y|x) exp(w.phi/beta)/Z, so that the KL-constrained optimum is in reach. K answers of each of 400 prompts are drawn from the reference
(or uniformly: others') and scored; w is fitted by minimising a loss of the table, with V where V is learned: linear in what a prompt
shows (mean and mean square of its features, and one), or a number for every prompt. What it costs is J(pi*) - J(pi) on 400 other prompts,
summed over all 16 answers, in units of the reward. Writes bench/results/partition.json.
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
from preftune.losses.values import Draws  # noqa: E402

ANSWERS, FEATURES, PROMPTS, FRESH = 16, 8, 400, 400
BETAS, COUNTS = (1.0, 0.3), (1, 2, 4, 8, 16)
WAYS = ("soft", "value", "value-learned, linear", "value-learned, a number a prompt", "value-learned, linear, others' answers")


class World:
    """Prompts, a reward and a reference, all drawn from a seed."""

    def __init__(self, seed: int, beta: float) -> None:
        rng, count = np.random.default_rng(seed), PROMPTS + FRESH
        self.beta, self.rng = beta, rng
        self.phi = torch.tensor(rng.normal(size=(count, ANSWERS, FEATURES)) / FEATURES**0.5)
        truth = rng.normal(size=FEATURES)
        self.truth = torch.tensor(truth / np.linalg.norm(truth) * FEATURES**0.5)
        self.reference = torch.tensor(rng.normal(size=(count, ANSWERS))).log_softmax(1)
        self.reward = self.phi @ self.truth
        often = self.reference.exp()[..., None]
        self.shown = torch.cat([torch.ones(count, 1), (often * self.phi).sum(1), (often * self.phi**2).sum(1)], 1).double()

    def policy(self, w: Tensor) -> Tensor:
        return (self.reference + self.phi @ w / self.beta).log_softmax(1)

    def regret(self, w: Tensor) -> float:
        """J(pi*) - J(pi), J = E r - beta KL(pi||ref), over the last FRESH prompts."""
        def objective(log_pi: Tensor) -> Tensor:
            return (log_pi.exp() * (self.reward - self.beta * (log_pi - self.reference)))[-FRESH:].sum(1).mean()

        with torch.no_grad():
            return float(objective(self.policy(self.truth)) - objective(self.policy(w)))


def fit(world: World, way: str, count: int) -> float:
    """The regret of one way with `count` answers a prompt."""
    name, _, how = way.partition(", ")
    chance = np.full((PROMPTS, ANSWERS), 1 / ANSWERS) if "others" in how else world.reference.exp().numpy()[:PROMPTS]
    lots = [np.random.default_rng([i, 7]) for i in range(PROMPTS)]
    answer = torch.tensor(np.array([lot.choice(ANSWERS, size=count, p=p / p.sum()) for lot, p in zip(lots, chance, strict=True)]))
    prompt = torch.arange(PROMPTS)[:, None].expand_as(answer)
    score, loss = world.reward[prompt, answer].flatten(), LOSSES[name].function
    w = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(PROMPTS if "number" in how else world.shown.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w, v], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    first, second = np.triu_indices(count, 1)

    def value() -> Tensor:
        policy, length = world.policy(w)[prompt, answer].flatten(), torch.ones(len(score), dtype=torch.float64)
        reference = world.reference[prompt, answer].flatten()
        if name == "value-learned":  # in units of beta, where the gradient of V and that of log pi are of one function
            says = v[prompt.flatten()] if "number" in how else (world.shown[:PROMPTS] @ v)[prompt.flatten()]
            return loss(Side(world.beta * policy, world.beta * reference, length, score=score, value=says), beta=1.0).mean()
        side = Side(policy, reference, length, score=score)
        if name == "value":
            return loss(side, Draws(prompt.flatten(), length), beta=world.beta).mean()
        place = torch.arange(len(score)).reshape(PROMPTS, count)
        return loss(side[place[:, first].flatten()], side[place[:, second].flatten()], beta=world.beta).mean()

    def closure() -> Tensor:
        solver.zero_grad()
        found = value()
        found.backward()
        return found

    if name != "soft" or count > 1:
        solver.step(closure)
    return world.regret(w.detach())


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    began, found = time.time(), {}
    for beta in BETAS:
        worlds = [World(seed, beta) for seed in range(seeds)]
        nothing = [world.regret(torch.zeros(FEATURES, dtype=torch.float64)) for world in worlds]
        print(f"beta {beta:g}: the reference itself costs {np.mean(nothing):.4f}")
        found[f"{beta:g}"] = {"reference": nothing}
        for way in WAYS:
            rows = {count: [fit(world, way, count) for world in worlds] for count in COUNTS}
            found[f"{beta:g}"][way] = rows
            print(f"  {way:42}", "  ".join(f"{np.mean(v):.4f}±{np.std(v, ddof=1) / len(v) ** 0.5:.4f}" for v in rows.values()))
    facts = {"seeds": seeds, "answers": list(COUNTS), "prompts": PROMPTS, "fresh": FRESH, "regret": found, "seconds": time.time() - began}
    (ROOT / "bench" / "results" / "partition.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
