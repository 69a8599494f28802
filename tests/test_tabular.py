"""Sampled PPO, RLOO, GRPO and online DPO on testbed T3, through the code of a run, beside the exact pi*. `pytest tests/test_tabular.py -s`
prints the table of docs/dpo-or-ppo.md.

Every answer of T3 can be listed, so reward, KL, total variation and gap of a trained policy are sums, not estimates.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from preftune import engine, rollouts, sampling
from preftune.exact import BOS, EOS, T3, TableModel, objective, optimum, soft_value
from preftune.objectives import preference
from preftune.store import from_ids

BETA, PROMPTS, K, ROUNDS, RATE = 0.5, 16, 4, 60, 0.1


class Speaking(TableModel):
    """A table that `sampling` can ask: what its cache holds are the ids themselves."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.config = LlamaConfig(num_hidden_layers=1, vocab_size=3)

    def forward(self, input_ids, position_ids=None, segments=None, past_key_values=None, **_):
        if past_key_values is not None:
            keys = input_ids[:, None, :, None].double()
            input_ids, position_ids = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long(), None
        return super().forward(input_ids, position_ids, segments)


def test_samples_of_a_table_are_its_distribution():
    """12,000 draws through the cache: frequencies within five standard errors of exact probabilities, log-probs to fp32."""
    (found,) = sampling.sample(Speaking.from_t3(T3.policy), [[BOS]], ends=[(EOS,)], k=12_000, max_tokens=4, seed=0, rows_at_once=4000)
    index = {ids: i for i, ids in enumerate(T3.sequences)}
    counts, exact = np.zeros(15), T3.logps(T3.policy).numpy()
    for one in found:
        counts[index[one.ids]] += 1
        assert sum(one.logps) == pytest.approx(exact[index[one.ids]], abs=1e-6)
    chance = np.exp(exact)
    assert (np.abs(counts / 12_000 - chance) < 5 * np.sqrt(chance * (1 - chance) / 12_000)).all()


def scores(store, codec, texts) -> np.ndarray:
    answers = np.flatnonzero(store.response >= 0)
    return np.array([float(T3.token_reward[store.tokens[store.start[s] : store.start[s + 1]]].sum()) for s in answers])


# name -> (how a round is made, what a step minimises, whether there is a value model)
METHODS = {
    "PPO": (partial(rollouts.credited, rollouts.Credit(cap=2.0)), rollouts.Surrogate("ppo"), True),
    "RLOO": (partial(rollouts.credited, rollouts.Credit("rloo", cap=2.0)), rollouts.Surrogate("rloo", whole=True), False),
    "GRPO": (partial(rollouts.credited, rollouts.Credit("group", in_reward=False, cap=2.0)),
             rollouts.Surrogate("grpo", kl="k3", beta=BETA), False),
    "online, soft": (partial(rollouts.paired, best_worst=False, reference=True, drawn=False), preference([(1.0, "soft", {"beta": BETA})]),
                     False),
    "online, sigmoid": (partial(rollouts.paired, best_worst=False, reference=True, drawn=False),
                        preference([(1.0, "sigmoid", {"beta": BETA})]), False),
}  # fmt: skip


def trained(name: str, seed: int = 0) -> torch.Tensor:
    """(7, 3) logits after ROUNDS rounds from the reference."""
    make, minimised, valued = METHODS[name]
    policy, frozen = (Speaking.from_t3(T3.reference) for _ in range(2))
    value = rollouts.Value(policy.lm_head.in_features, dtype=torch.float64) if valued else None
    asked = from_ids([[BOS]] * PROMPTS, [[(EOS,)]] * PROMPTS)
    source = rollouts.Source(policy, value, frozen, SimpleNamespace(eos=EOS), asked, lambda record: "", scores, k=K, max_tokens=4,
                             temperature=1.0, eos_penalty=0.0, seed=seed, micro_tokens=10_000, device="cpu")  # fmt: skip
    rounds = rollouts.Rounds(PROMPTS, PROMPTS, PROMPTS, 1, ROUNDS, seed)
    learner = rollouts.Learner(policy, value) if isinstance(minimised, rollouts.Surrogate) else policy
    state = engine.make_state(learner, rate=engine.schedule("linear", RATE, steps=ROUNDS, warmup=0.1), clip=1.0)
    steps = rollouts.steps(source, rounds, rollouts.Kept(beta=BETA), make, np.arange(PROMPTS), start=0, total=ROUNDS)
    for _ in engine.train(state, steps, minimised):
        pass
    return policy.lm_head.weight.detach().T[:7]


def row(policy: np.ndarray) -> dict[str, float]:
    """Exact numbers of a distribution over the 15 answers."""
    problem = T3.problem()
    best = optimum(problem, beta=BETA)
    value, reward = objective(problem, policy, beta=BETA), float(policy @ problem.reward)
    return {"reward": reward, "KL": (reward - value) / BETA, "total variation": float(np.abs(policy - best).sum() / 2),
            "gap": soft_value(problem, beta=BETA) - value}  # fmt: skip


def test_sampled_policies_beside_pi_star():
    problem = T3.problem()
    table = {"start": row(problem.reference)} | {name: row(T3.logps(trained(name)).exp().numpy()) for name in METHODS}
    table["pi*"] = row(optimum(problem, beta=BETA))
    for name, found in table.items():
        print(f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in ("reward", "KL", "total variation", "gap")) + " |")
    assert table["pi*"]["gap"] == pytest.approx(0, abs=1e-12) and table["start"]["gap"] > 0.3
    for name in ("PPO", "RLOO", "online, soft"):
        assert table[name]["total variation"] < 0.12 and 0 <= table[name]["gap"] < 0.03, (name, table[name])
    for name in METHODS:
        assert table[name]["reward"] > table["start"]["reward"] + 0.3, (name, table[name])
    assert table["online, sigmoid"]["gap"] > 3 * table["online, soft"]["gap"], "hard labels have another optimum"
