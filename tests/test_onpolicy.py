"""On-policy mathematics: each function against a slow second one, and T3's policy gradients through the code that real runs use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from preftune import engine, rollouts
from preftune.batches import make_batch, make_step
from preftune.exact import B4, BOS, T3, Problem, TableModel, optimum
from preftune.losses import onpolicy
from preftune.store import from_ids

BETA = 0.5
NEAR = {"rel": 0, "abs": 1e-10}


# ---- each formula against a slow one -----------------------------------------------------------------------------------------


def ragged(seed: int, rows: int = 7, longest: int = 9):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, longest + 1, rows)
    shown = np.arange(longest) < size[:, None]
    noise = rng.normal(size=(3, rows, longest)) + np.where(shown, 0, 1e6)  # what is not shown must not matter
    return (*map(torch.from_numpy, noise), torch.from_numpy(shown), size, rng)


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 1.0), (0.8, 0.0)])
def test_gae_is_its_sum(discount, lam):
    """A_t = sum_k (discount lam)^k d_{t+k}; lam 1: discounted rewards to come less the value; lam 0: the TD error."""
    reward, value, _, shown, size, _ = ragged(1)
    found = onpolicy.gae(reward, value, shown, discount=discount, lam=lam)
    for i, n in enumerate(size):
        r, v = reward[i].numpy(), [*value[i, :n].tolist(), 0.0]
        error = [r[t] + discount * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            assert float(found[i, t]) == pytest.approx(sum((discount * lam) ** k * error[t + k] for k in range(n - t)), **NEAR)
            if lam == 1:
                assert float(found[i, t]) == pytest.approx(sum(discount**k * r[t + k] for k in range(n - t)) - v[t], **NEAR)
            if lam == 0:
                assert float(found[i, t]) == pytest.approx(error[t], **NEAR)
        assert not found[i, n:].any()


def test_kl_in_the_reward_is_paid_per_token_and_the_score_at_the_end():
    ratio, _, _, shown, size, rng = ragged(2)
    score = torch.from_numpy(rng.normal(size=len(size)))
    found = onpolicy.kl_in_reward(score, ratio, shown, beta=0.3)
    for i, n in enumerate(size):
        row = [-0.3 * float(x) for x in ratio[i, :n]]
        row[-1] += float(score[i])
        assert found[i].tolist() == pytest.approx([*row, *[0.0] * (9 - n)], **NEAR)


def test_whitening_of_what_is_shown():
    values, *_, shown, _, _ = ragged(3)
    seen = values[shown].numpy()
    found = onpolicy.whiten(values, shown)
    assert found[shown].numpy() == pytest.approx((seen - seen.mean()) / np.sqrt(seen.var() + 1e-8), rel=1e-12)
    assert not found[~shown].any()
    unmoved = onpolicy.whiten(values, shown, shift=False)[shown].numpy()
    assert unmoved - seen.mean() == pytest.approx(found[shown].numpy()) and unmoved.mean() == pytest.approx(seen.mean())
    same = onpolicy.whiten(torch.full((2, 3), 7.0, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool))
    assert not same.any(), "equal values are 0, not NaN"
    assert onpolicy.whiten(torch.full((1, 1), 3.0), torch.ones(1, 1, dtype=torch.bool)).item() == 0


def test_advantages_against_the_other_answers():
    reward = torch.from_numpy(np.random.default_rng(4).normal(size=(5, 4)))
    for row, found, scaled in zip(reward.numpy(), onpolicy.rloo(reward).numpy(), onpolicy.group(reward).numpy(), strict=True):
        assert found == pytest.approx([x - np.delete(row, i).mean() for i, x in enumerate(row)], rel=1e-12)
        assert scaled == pytest.approx((row - row.mean()) / (np.std(row, ddof=1) + 1e-4), rel=1e-12)
    assert onpolicy.rloo(reward).sum(1).abs().max() < 1e-12
    assert not onpolicy.group(torch.ones(2, 3, dtype=torch.float64)).any()


def test_clipped_losses_case_by_case():
    rng = np.random.default_rng(5)
    log_ratio, advantage = rng.normal(0, 0.4, 200), rng.normal(size=200)
    found = onpolicy.clipped_policy(*map(torch.from_numpy, (log_ratio, advantage)), clip=0.2).numpy()
    for q, a, loss in zip(np.exp(log_ratio), advantage, found, strict=True):
        held = (1.2 if q > 1.2 else q) if a > 0 else (0.8 if q < 0.8 else q)  # only what would gain by going further is held
        assert loss == pytest.approx(-a * held, rel=1e-12)
    value, before, returns = rng.normal(size=(3, 200))
    found = onpolicy.clipped_value(*map(torch.from_numpy, (value, before, returns)), clip=0.3).numpy()
    for v, b, r, loss in zip(value, before, returns, found, strict=True):
        assert loss == pytest.approx(max((v - r) ** 2, (min(max(v, b - 0.3), b + 0.3) - r) ** 2) / 2, rel=1e-12)


def test_the_controller_steers_to_its_target():
    """KL that answers to beta as KL = 3 / beta settles at the target; a step never moves beta by more than a fifth."""
    beta = 1.0
    for _ in range(400):
        new = onpolicy.adaptive_kl(beta, 3 / beta, target=6.0, horizon=1000, count=64)
        assert abs(new / beta - 1) <= 0.2 * 64 / 1000 + 1e-12
        beta = new
    assert 3 / beta == pytest.approx(6.0, rel=1e-3)
    assert onpolicy.adaptive_kl(0.1, 6.0, target=6.0, horizon=10, count=5) == 0.1


def test_the_kl_functions_are_t3s_estimators():
    total = T3.logps(T3.policy) - T3.logps(T3.reference)
    known = T3.kl_estimates(T3.policy)
    for name in ("k1", "k2", "k3"):
        assert torch.allclose(getattr(onpolicy, name)(total), known[name], atol=1e-12)


# ---- T3 through the code of a run --------------------------------------------------------------------------------------------


def source(policy, **changed) -> rollouts.Source:
    nothing = dict.fromkeys(("value", "codec", "store", "texts", "scores"))
    usual = {"policy": policy, "frozen": TableModel.t3_reference(), "k": 1, "max_tokens": 4, "temperature": 1.0, "eos_penalty": 0.0,
             "seed": 0, "micro_tokens": 10_000, "device": "cpu"}  # fmt: skip
    return rollouts.Source(**nothing | usual | changed)


def said(logits: torch.Tensor, store) -> np.ndarray:
    """What T3 with these logits says of every token of the answers."""
    return rollouts.read(source(TableModel.from_t3(logits)), store, policy=True, reference=False)["old"][store.trained]


def slope(objective, rules, answers, rewards, term: str, drawn=None) -> torch.Tensor:
    """d (one term, summed) / d (T3's logits) of a step on these answers to one prompt: (7, 3). drawn: the sampler's logits, if others."""
    policy = TableModel.t3_policy()
    store = from_ids([[BOS]], [answers])
    columns, _ = rollouts.credit(rules, source(policy), rollouts.Kept(beta=BETA), store, np.array(rewards),
                                 None if drawn is None else said(drawn, store))  # fmt: skip
    (batch,) = make_step(store, [0], micro_tokens=10_000, columns=columns).micro
    learner = rollouts.Learner(policy, None)
    value, _ = objective.terms(objective.score(learner, batch), batch.table)[term]
    return torch.autograd.grad(value, policy.lm_head.weight)[0].T[:7]


def expected(objective, rules, term: str, drawn=None) -> torch.Tensor:
    """The same in expectation over answers of the policy, or of another sampler: all 15 with their probabilities."""
    chance = T3.logps(T3.policy if drawn is None else drawn).exp()
    return sum(p * slope(objective, rules, [y], [float(r)], term, drawn) for p, y, r in zip(chance, T3.sequences, T3.reward, strict=True))


def exact(value) -> torch.Tensor:
    """d value(logits) / d logits."""
    logits = T3.policy.clone().requires_grad_(True)
    return torch.autograd.grad(value(logits), logits)[0]


def kl_of(logits):
    return (T3.logps(logits).exp() * (T3.logps(logits) - T3.logps(T3.reference))).sum()


def forward_kl(logits):
    return (T3.logps(T3.reference).exp() * (T3.logps(T3.reference) - T3.logps(logits))).sum()


def reward_of(logits):
    return (T3.logps(logits).exp() * T3.reward).sum()


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


TO_GO = rollouts.Credit("gae", whiten=False, lam=1.0)
TRUE = exact(lambda logits: reward_of(logits) - BETA * kl_of(logits))


def test_with_ratio_1_the_policy_loss_is_reinforce_and_exact():
    """Section 5.4: reward-to-go with the KL in the reward is the gradient of J = E[r] - beta KL."""
    found = expected(rollouts.Surrogate("ppo"), TO_GO, "policy_avg")
    assert float(TRUE.norm()) == pytest.approx(0.624431, abs=1e-6)
    assert torch.allclose(-found, TRUE, atol=1e-12)


def test_one_action_with_the_others_as_baseline_is_exact_too():
    """RLOO over all 225 pairs of answers: the mean gradient of two answers is that of J."""
    objective, rules, chance = rollouts.Surrogate("rloo", whole=True), rollouts.Credit("rloo"), T3.logps(T3.policy).exp()
    found = torch.zeros(7, 3, dtype=torch.float64)
    for i, first in enumerate(T3.sequences):
        for j, second in enumerate(T3.sequences[: i + 1]):
            twice = 1 if i == j else 2
            rewards = [float(T3.reward[i]), float(T3.reward[j])]
            found += twice * chance[i] * chance[j] * slope(objective, rules, [first, second], rewards, "policy_avg") / 2
    assert torch.allclose(-found, TRUE, atol=1e-12)


ROWS = [  # kl, per answer or per token, cosine to grad KL(pi||ref), norm, exact gradient or None
    ("k2", True, 1.0, 0.3393, kl_of),
    ("k3", True, 0.9693, None, forward_kl),
    ("k2", False, 0.9954, 0.3285, None),
    ("k3", False, 0.9954, None, None),
]


@pytest.mark.parametrize(("name", "whole", "near", "norm", "function"), ROWS, ids=["k2 answer", "k3 answer", "k2 token", "k3 token"])
def test_kl_as_a_loss(name, whole, near, norm, function):
    """Section 6.3, the rows: k2 of answers is the gradient of KL(pi||ref), k3 of answers that of the other KL; per token partial."""
    rules = rollouts.Credit("gae", in_reward=False, whiten=False)
    found = expected(rollouts.Surrogate("x", whole=whole, kl=name, beta=1.0), rules, "kl")
    assert cosine(found, exact(kl_of)) == pytest.approx(near, abs=6e-5)
    if norm:
        assert float(found.norm()) == pytest.approx(norm, abs=6e-5)
    if function:
        assert torch.allclose(found, exact(function), atol=1e-12)


def test_k1_as_a_loss_has_no_gradient_on_average():
    chance = T3.logps(T3.policy).exp()
    found = exact(lambda logits: (chance * onpolicy.k1(T3.logps(logits) - T3.logps(T3.reference))).sum())
    assert float(found.norm()) < 1e-15


def test_grpos_form_is_close_and_not_equal():
    """Reward by policy gradient and KL as a k3 loss per token: cosine .99966 to the gradient of J, off by .0083 at most."""
    rules = rollouts.Credit("gae", in_reward=False, whiten=False, lam=1.0)
    objective = rollouts.Surrogate("grpo", kl="k3", beta=BETA)
    found = -expected(objective, rules, "policy_avg") - expected(objective, rules, "kl")
    assert cosine(found, TRUE) == pytest.approx(0.99966, abs=1e-5)
    assert float((found - TRUE).abs().max()) == pytest.approx(0.0083, abs=5e-5)


WRONG = T3.policy + 0.7 * torch.sin(2.0 * torch.arange(21, dtype=torch.float64)).view(7, 3)
"""A sampler that is not the policy: .27 nats from it, pi / mu of an answer from .19 to 3.4."""


def pairs_expected(rules, drawn) -> torch.Tensor:
    """RLOO's mean gradient over all pairs of answers that the sampler draws."""
    objective, chance = rollouts.Surrogate("rloo", whole=True), T3.logps(drawn).exp()
    found = torch.zeros(7, 3, dtype=torch.float64)
    for i, first in enumerate(T3.sequences):
        for j, second in enumerate(T3.sequences[: i + 1]):
            twice = 1 if i == j else 2
            rewards = [float(T3.reward[i]), float(T3.reward[j])]
            found += twice * chance[i] * chance[j] * slope(objective, rules, [first, second], rewards, "policy_avg", drawn) / 2
    return found


@pytest.mark.parametrize("name", ["ppo", "rloo", "k2 as a loss"])
def test_answers_of_a_wrong_sampler_are_counted_right(name):
    """Whole-answer weights without a cap give the policy's own gradient exactly; without them it is another; a cap lies between."""

    def found(cap: float) -> torch.Tensor:
        if name == "ppo":
            return -expected(rollouts.Surrogate("ppo"), replace(TO_GO, cap=cap), "policy_avg", WRONG)
        if name == "rloo":
            return -pairs_expected(rollouts.Credit("rloo", cap=cap), WRONG)
        rules = rollouts.Credit("gae", in_reward=False, whiten=False, cap=cap)
        return expected(rollouts.Surrogate("x", whole=True, kl="k2", beta=1.0), rules, "kl", WRONG)

    right = exact(kl_of) if name == "k2 as a loss" else TRUE
    assert torch.allclose(found(1e9), right, atol=1e-12)
    off = [float((found(cap) - right).norm() / right.norm()) for cap in (0.0, 1.2)]
    assert off[0] > 0.1 and 0.01 < off[1] < off[0], off


def test_the_weights_are_told():
    store = from_ids([[BOS]], [T3.sequences])
    _, facts = rollouts.credit(rollouts.Credit("rloo", cap=1.2), source(TableModel.t3_policy()), rollouts.Kept(beta=BETA), store,
                               T3.reward.numpy(), said(WRONG, store))  # fmt: skip
    ratio = (T3.logps(T3.policy) - T3.logps(WRONG)).exp().numpy()
    assert float(facts["sampler/weight"]) == pytest.approx(np.minimum(ratio, 1.2).mean(), rel=1e-12)
    assert float(facts["sampler/weight_capped"]) == pytest.approx((ratio > 1.2).mean()) and 0 < (ratio > 1.2).mean() < 1
    _, without = rollouts.credit(rollouts.Credit("rloo"), source(TableModel.t3_policy()), rollouts.Kept(beta=BETA), store,
                                 T3.reward.numpy(), said(WRONG, store))  # fmt: skip
    assert not any(name.startswith("sampler/") for name in without)


def test_what_the_value_explains():
    """1 - variance of (rewards to come less value) over that of rewards to come: 0 of a constant, 1 of the rewards to come themselves."""
    policy, store = TableModel.t3_policy(), from_ids([[BOS]] * 15, [[y] for y in T3.sequences])
    value = rollouts.Value(policy.config.hidden_size, dtype=torch.float64)
    rules, given = rollouts.Credit("gae", reference=False, whiten=False), (rollouts.Kept(), store, T3.reward.numpy())

    def explained() -> float:
        return float(rollouts.credit(rules, source(policy, value=value), *given)[1]["val/explained"])

    assert explained() == 0
    batch = make_batch(store, range(15))
    coming = np.concatenate([np.full(int(n), float(r)) for n, r in zip(np.diff(store.start)[store.response >= 0], T3.reward, strict=True)])
    states = policy.get_decoder()(batch.tokens[None], batch.positions[None], batch.segments).last_hidden_state[0][batch.hidden].numpy()
    design = np.concatenate([states, np.ones((len(states), 1))], 1)
    best, *_ = np.linalg.lstsq(design, coming, rcond=None)
    with torch.no_grad():
        value.head.weight.copy_(torch.from_numpy(best[:-1])[None])
        value.head.bias.fill_(best[-1])
    left = coming - design @ best
    assert explained() == pytest.approx(1 - left.var() / coming.var(), rel=1e-9) and explained() > 0.4


def test_steps_up_the_exact_gradient_reach_the_optimum():
    """Property 13's gradient, followed: J of pi* is beta log Z, and no start of the value model is needed for it."""
    policy = TableModel.t3_policy()
    state = engine.make_state(rollouts.Learner(policy, None), rate=lambda step: 0.2 * (1 - step / 80), clip=0.0)
    store = from_ids([[BOS]] * 15, [[y] for y in T3.sequences])
    for _ in range(80):
        columns, _ = rollouts.credit(TO_GO, source(policy), rollouts.Kept(beta=BETA), store, T3.reward.numpy())
        chance = np.exp(rollouts.read(source(policy), store, policy=True, reference=False)["old"])
        for r in range(15):  # the expectation: every answer with its probability
            mine = slice(store.start[store.record_start[r]], store.start[store.record_start[r + 1]])
            columns["advantage"][mine] *= chance[mine][store.trained[mine]].prod()
        list(engine.train(state, [make_step(store, range(15), micro_tokens=10_000, columns=columns)], rollouts.Surrogate("ppo")))
    with torch.no_grad():
        logits = policy.lm_head.weight.T[:7]
        best = BETA * torch.logsumexp(T3.logps(T3.reference) + T3.reward / BETA, 0)
        assert float(reward_of(logits) - BETA * kl_of(logits)) == pytest.approx(float(best), abs=6e-3)
        assert float(best) - float(reward_of(T3.policy) - BETA * kl_of(T3.policy)) > 0.5, "there was far to go"


# ---- any cut is the same step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [rollouts.Credit(), rollouts.Credit("rloo"), rollouts.Credit("group", in_reward=False)],
                         ids=lambda rules: rules.advantage)  # fmt: skip
def test_any_cut_into_micro_batches_is_the_same_step(rules):
    """Loss, gradient and metrics of a step of five prompts, in one pass and in passes of one prompt, away from ratio 1."""
    store = from_ids([[BOS]] * 5, [[T3.sequences[(3 * i + j) % 15] for j in range(3)] for i in range(5)])
    raw = np.random.default_rng(0).normal(size=15)
    objective = rollouts.Surrogate("x", whole=rules.advantage == "rloo", kl="reward" if rules.in_reward else "k3", beta=BETA)
    seen = []
    for size in (10_000, 1):
        policy = TableModel.t3_policy()
        value = rollouts.Value(policy.config.hidden_size, dtype=torch.float64) if rules.advantage == "gae" else None
        columns, _ = rollouts.credit(rules, source(policy, value=value, micro_tokens=size), rollouts.Kept(beta=BETA), store, raw)
        with torch.no_grad():
            policy.lm_head.weight += 0.3 * torch.sin(torch.arange(policy.lm_head.weight.numel())).view_as(policy.lm_head.weight)
        learner = rollouts.Learner(policy, value)
        state = engine.make_state(learner, rate=lambda step: 0.0, clip=0.0)
        step = make_step(store, range(5), micro_tokens=size, columns=columns)
        loss, metrics, _ = engine.accumulate(state, step, objective)
        seen.append((float(loss), {k: float(v) for k, v in metrics.items()}, {n: p.grad.clone() for n, p in learner.named_parameters()}))
        assert len(step.micro) == (1 if size > 1 else 5)
    (loss, metrics, grads), (other, others, slopes) = seen
    assert loss == pytest.approx(other, rel=1e-12) and metrics == pytest.approx(others, rel=1e-12)
    assert metrics["val/ratio"] != pytest.approx(1, abs=1e-3) and len(grads) == (3 if rules.advantage == "gae" else 1)
    for name, grad in grads.items():
        assert torch.allclose(grad, slopes[name], atol=1e-12) and grad.abs().max() > 0


def test_temperature_divides_the_logits_of_what_is_read():
    policy = TableModel.t3_policy()
    store = from_ids([[BOS]], [T3.sequences])
    found = rollouts.read(source(policy, temperature=0.7), store, policy=True, reference=True)
    batch = make_batch(store, [0])
    for name, logits in (("old", T3.policy), ("reference", T3.reference)):
        sums = np.zeros(15)
        np.add.at(sums, batch.response.numpy(), found[name][batch.slot.numpy()])
        assert sums == pytest.approx(T3.logps(logits / 0.7).numpy(), abs=1e-12)


def test_rounds_with_a_moving_reference_are_one_round_at_a_smaller_beta():
    """Property 16: T rounds to the optimum at beta, each from the last policy, end where one at beta / T does."""
    moved = B4
    for _ in range(3):
        moved = Problem(optimum(moved, beta=2.0), B4.reward)
    assert moved.reference == pytest.approx(optimum(B4, beta=2 / 3), abs=1e-12)
    assert moved.reference == pytest.approx([0.095775, 0.321925, 0.101378, 0.480922], abs=1e-6)
    assert optimum(B4, beta=2.0)[3] < 0.2
