"""Distilling rewards, values and their Z, against enumeration and second formulations; then through files and the real training path.

Try it: `pytest tests/test_distil.py`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import make
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import root
from scipy.special import expit, logsumexp
from test_dpo import same_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from preftune import api, checkpoints, engine, exact, models, readout
from preftune.batches import make_batch, make_step
from preftune.config import Dpo, Evaluate, OnlineDpo
from preftune.errors import DataError, UsageError
from preftune.exact import B4, T3, Problem, TableModel
from preftune.losses import LOSSES, Side, distill, expected, values
from preftune.objectives import partition, preference, readable
from preftune.records import Record, Response, draw_of, scores_of
from preftune.stages import dpo, evaluate, online
from preftune.store import build, from_ids
from preftune.tokens import make_codec

pytestmark = pytest.mark.usefixtures("private_cache")
f64 = torch.float64
REF = torch.tensor(np.log(B4.reference))
MATCHING = ["soft", "soft-square", "soft-kl", "soft-reverse-kl", "soft-pessimistic"]


def minimiser(name: str, problem: Problem = B4, **numbers) -> np.ndarray:
    """The policy at which a population loss is least, by L-BFGS from the reference."""
    theta = torch.tensor(np.log(problem.reference), requires_grad=True)
    solver = torch.optim.LBFGS([theta], max_iter=3000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = exact.population_loss(name, theta.log_softmax(-1), problem, **numbers)
        value.backward()
        return value

    solver.step(closure)
    return theta.detach().softmax(-1).numpy()


# ---- pairs of scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("name", MATCHING)
def test_distilling_gives_the_optimum(name, beta):
    """Property 7: on B4 every form's minimiser is pi*; with rewards twice as large and unit 2 it is the same one."""
    best = exact.optimum(B4, beta=beta)
    np.testing.assert_allclose(minimiser(name, beta=beta), best, atol=1e-8)
    np.testing.assert_allclose(minimiser(name, Problem(B4.reference, 2 * B4.reward), beta=beta, unit=2.0), best, atol=1e-8)


def test_rebel_is_mirror_descent():
    """From (.1, .2, .3, .4) with eta .7: pi exp(eta r)/Z; T rounds are one round of T eta; the square form at beta = 1/eta."""
    before = Problem(np.array([0.1, 0.2, 0.3, 0.4]), B4.reward)
    found = minimiser("rebel", before, eta=0.7)
    np.testing.assert_allclose(found, [0.039207, 0.157907, 0.166913, 0.635972], atol=1e-6)
    np.testing.assert_allclose(found, exact.optimum(before, beta=1 / 0.7), atol=1e-9)
    np.testing.assert_allclose(minimiser("rebel", Problem(found, B4.reward), eta=0.7), minimiser("rebel", before, eta=1.4), atol=1e-8)
    one, other = distill.WORKED
    square = distill.soft_square(one, other, beta=1 / 0.7)
    torch.testing.assert_close(distill.rebel(one, other, eta=0.7), square * 0.7**2)


@pytest.mark.parametrize("gap", [1e3, math.log(9), math.log(7), 0.3, 0.0])
def test_soft_labels_are_dpo_and_cdpo_to_the_last_bit(gap):
    """Value and gradient, pair by pair: s = 1 is `sigmoid`, s = 1 - e is `sigmoid` with its labels smoothed by e."""
    rng = np.random.default_rng(0)
    share = torch.sigmoid(torch.tensor(gap, dtype=f64))
    assert share == 1 or gap < 1e3
    for _ in range(20):
        policy = torch.tensor(rng.normal(-20, 9, size=2), requires_grad=True)
        reference = torch.tensor(rng.normal(-20, 9, size=2))
        score = torch.tensor([gap, 0.0], dtype=f64)
        side, one = Side(policy, reference, torch.ones(2, dtype=f64), score=score), torch.ones(1, dtype=f64)
        soft = distill.soft(side[[0]], side[[1]]).sum()
        hard = expected(LOSSES["sigmoid"], side[[0]], side[[1]], share * one, one)
        assert torch.equal(soft, hard)
        assert torch.equal(*(torch.autograd.grad(x, policy)[0] for x in (soft, hard)))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.kind == "scored"])
def test_nobody_is_chosen_and_only_differences_count(name):
    """Swapping the two, adding a number to all scores (or one to each member's): the same. The gradient is zero where m = d."""
    one, other = distill.WORKED
    function = LOSSES[name].function
    want = function(one, other)
    torch.testing.assert_close(function(other, one), want, rtol=1e-13, atol=1e-13)
    moved = [replace(s, score=s.score + 7, member=s.member + torch.tensor([3.0, -2.0])) for s in (one, other)]
    torch.testing.assert_close(function(*moved), want, rtol=1e-12, atol=1e-12)
    agree = [replace(s, member=s.score[:, None].repeat(1, 2)) for s in (one, other)]
    numbers = {"eta": 2.0} if name == "rebel" else {"beta": 0.5}
    policy = (agree[0].reference + agree[0].score / 0.5).requires_grad_()
    flat = function(replace(agree[0], policy=policy), replace(agree[1], policy=agree[1].reference + agree[1].score / 0.5), **numbers)
    assert torch.autograd.grad(flat.sum(), policy)[0].abs().max() < 1e-12


def test_kls_are_the_cross_entropy_less_entropy():
    """A second formulation: forward = cross-entropy - H(s); both are least, zero, at m = d and are KLs of the two coins."""
    one, other = distill.WORKED
    s, q = torch.sigmoid(one.score - other.score), torch.sigmoid(0.1 * (one.ratio - other.ratio))
    entropy = -(s * s.log() + (1 - s) * (1 - s).log())
    torch.testing.assert_close(distill.soft_kl(one, other), distill.soft(one, other) - entropy)
    torch.testing.assert_close(distill.soft_reverse_kl(one, other), q * (q / s).log() + (1 - q) * ((1 - q) / (1 - s)).log())


@pytest.mark.parametrize("gaps", [(0.5, 2.0), (-1.0, 2.0), (-0.7, -3.0), (1.2, 1.2)])
def test_pessimism_is_the_best_of_the_worst(gaps):
    """Two responses: over a fine grid of policies and of rewards between the members', max_pi min_r E_pi[r] - E_ref[r] - beta KL."""
    reference, beta = np.array([0.7, 0.3]), 0.5
    p = expit(np.linspace(-12, 12, 240_001))
    kl = p * np.log(p / reference[0]) + (1 - p) * np.log((1 - p) / reference[1])
    worst = np.min([(p - reference[0]) * d for d in np.linspace(*sorted(gaps), 41)], axis=0) - beta * kl
    member = torch.tensor([[*gaps], [0.0, 0.0]], dtype=f64)
    policy = torch.tensor(np.log(reference), requires_grad=True)
    solver = torch.optim.LBFGS([policy], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        side = Side(policy.log_softmax(-1), torch.tensor(np.log(reference)), torch.ones(2, dtype=f64), member=member)
        loss = distill.soft_pessimistic(side[[0]], side[[1]], beta=beta).sum()
        loss.backward()
        return loss

    solver.step(closure)
    assert policy.detach().softmax(-1)[0].item() == pytest.approx(p[worst.argmax()], abs=1e-4)


# ---- Z ---------------------------------------------------------------------------------------------------------------------

BIAS = {
    1.0: (0.825987, 0.6522, (-0.22599, -0.13626, -0.07571, -0.03968, -0.02019)),
    0.5: (2.154107, 3.2573, (-0.95411, -0.65012, -0.40136, -0.22174, -0.11112)),
    0.1: (17.697552, 8.9973, (-11.69755, -8.88086, -6.08394, -3.62835, -1.58039)),
}


def every_sample(size: int):
    """(chance, how often each of B4's four was drawn) of every sample of this size."""
    for first in itertools.combinations(range(size + 3), 3):  # stars and bars
        count = np.diff([-1, *first, size + 3]) - 1
        chance = math.factorial(size) * np.prod(B4.reference**count) / np.prod([math.factorial(int(c)) for c in count])
        yield chance, torch.tensor(count, dtype=f64)


@pytest.mark.parametrize("beta", BIAS)
def test_the_bias_of_log_z_by_enumeration(beta):
    """Property 15: mean of log Z^ - log Z over every sample of K; the mean of Z^ itself is Z; Jensen's sign; -chi2/(2K) at large K."""
    log_z, chi2, biases = BIAS[beta]
    score, group = torch.from_numpy(B4.reward) / beta, torch.zeros(4, dtype=torch.long)
    assert exact.log_partition(B4, beta=beta) == pytest.approx(log_z, abs=5e-7)
    best = exact.optimum(B4, beta=beta)
    assert (best**2 / B4.reference).sum() - 1 == pytest.approx(chi2, abs=5e-5)
    exactly = values.Draws(group, torch.from_numpy(B4.reference))
    assert float(exactly.log_mean_exp(score)) == pytest.approx(exact.log_partition(B4, beta=beta), abs=1e-12)
    for size, bias in zip((1, 2, 4, 8, 16), biases, strict=True):
        found = [(chance, float(values.Draws(group, count).log_mean_exp(score))) for chance, count in every_sample(size)]
        assert sum(chance for chance, _ in found) == pytest.approx(1, abs=1e-12)
        assert sum(chance * x for chance, x in found) - log_z == pytest.approx(bias, abs=1e-5)
        assert sum(chance * math.exp(x - log_z) for chance, x in found) == pytest.approx(1, abs=1e-6), "Z^ has no bias"
    if beta == 1.0:
        assert bias == pytest.approx(-chi2 / 32, rel=0.02)


def test_effective_samples():
    """(sum w)^2 / sum w^2 by hand, and on B4 itself the share 1/(1 + chi2): .605, .235, .100."""
    draws = values.Draws(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 1, 1, 0, 2], dtype=f64))
    x = torch.tensor([0.0, 0.0, math.log(2), 99.0, 3.0], dtype=f64)
    torch.testing.assert_close(draws.effective(x), torch.tensor([16 / 6, 2.0], dtype=f64))
    torch.testing.assert_close(draws.log_mean_exp(x), torch.tensor([math.log(4 / 3), 3.0], dtype=f64))
    exactly = values.Draws(torch.zeros(4, dtype=torch.long), torch.from_numpy(B4.reference))
    shares = [float((exactly.tilted(torch.from_numpy(B4.reward) / b)[0].sum() ** 2)
                    / (exactly.tilted(torch.from_numpy(B4.reward) / b)[0] ** 2 / exactly.weight).sum()) for b in BIAS]  # fmt: skip
    assert shares == pytest.approx([0.605, 0.235, 0.100], abs=1e-3)


def test_log_mean_exp_far_away_and_of_others():
    """Rewards in the hundreds of beta, as np.exp overflows; what others wrote enters nothing, however large."""
    rng = np.random.default_rng(3)
    group, weight, x = torch.arange(40) // 8, torch.tensor(rng.integers(0, 2, 40), dtype=f64), torch.tensor(rng.normal(0, 900, 40))
    weight[::8] = 1
    x[weight == 0] += 1e5
    found = values.Draws(group, weight).log_mean_exp(x)
    for g in range(5):
        mine = x[(group == g) & (weight > 0)].numpy()
        assert float(found[g]) == pytest.approx(logsumexp(mine) - math.log(len(mine)), abs=1e-9)


def test_value_regression_with_the_exact_z_is_the_optimum():
    """Over any weights of the responses; here the reference's. With V too low every response is pushed up: its residual is positive."""
    for beta in (0.5, 1.0):
        np.testing.assert_allclose(minimiser("value", beta=beta), exact.optimum(B4, beta=beta), atol=1e-8)
    score, a = torch.from_numpy(B4.reward), torch.tensor(np.log(exact.optimum(B4, beta=1.0) / B4.reference))
    residual = sum(chance * (score - values.Draws(torch.zeros(4, dtype=torch.long), count).log_mean_exp(score) - a)
                   for chance, count in every_sample(4))  # fmt: skip
    torch.testing.assert_close(residual, torch.full((4,), 0.07571, dtype=f64), atol=1e-5, rtol=0)


def test_quantile_rewards():
    """log Z of a uniform reward: by quadrature; what the authors' log beta + 1/beta leaves out; what B4's ties do to it."""
    for beta, error in ((0.1, 4.5e-5), (0.2, 0.0068), (0.5, 0.145), (1.0, 0.459)):
        middle = (np.arange(200_000) + 0.5) / 200_000
        assert values.log_z_of_quantiles(beta) == pytest.approx(logsumexp(middle / beta) - math.log(200_000), abs=1e-8)
        assert math.log(beta) + 1 / beta - values.log_z_of_quantiles(beta) == pytest.approx(error, rel=0.02)
    assert values.log_z_of_quantiles(0.1) == pytest.approx(7.69737, abs=1e-5)
    exactly = values.Draws(torch.zeros(4, dtype=torch.long), torch.from_numpy(B4.reference))
    middle = exactly.quantile(torch.from_numpy(B4.reward))
    torch.testing.assert_close(middle, torch.tensor([0.2, 0.75, 0.5, 0.95], dtype=f64))
    assert float(exactly.log_mean_exp(middle / 0.1)) == pytest.approx(7.55539, abs=1e-5)
    upper = middle + exactly.weight / 2
    assert float(exactly.log_mean_exp(upper / 0.1)) == pytest.approx(8.46297, abs=1e-5)


def test_quantiles_of_groups_by_plain_loops():
    rng = np.random.default_rng(1)
    group = torch.tensor(rng.permutation(np.arange(30) % 4))
    weight, x = torch.tensor(rng.integers(0, 3, 30), dtype=f64), torch.tensor(rng.integers(0, 6, 30), dtype=f64)
    found = values.Draws(group, weight).quantile(x)
    for i in range(30):
        mine = group == group[i]
        below = (weight * mine * ((x < x[i]).double() + 0.5 * (x == x[i]).double())).sum() / (weight * mine).sum()
        assert float(found[i]) == pytest.approx(float(below), abs=1e-14)


def test_anchor_is_the_forward_kl():
    """Over the reference's own samples -a averages to KL(ref||pi), and its gradient is that KL's, pi - ref."""
    theta = (REF + torch.tensor([0.4, -0.2, 0.1, 0.6])).requires_grad_()
    value = exact.population_loss("anchor", theta.log_softmax(-1), B4)
    pi = theta.detach().softmax(-1).numpy()
    assert value.item() == pytest.approx(exact.kl(B4.reference, pi), abs=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(value, theta)[0], pi - B4.reference, atol=1e-12)
    assert exact.population_loss("optimism", theta.log_softmax(-1), B4).item() == pytest.approx(-value.item(), abs=1e-15)


# ---- noise ----------------------------------------------------------------------------------------------------------------


def fitted(name: str, wins: np.ndarray, smoothing: float = 0.0, **numbers) -> np.ndarray:
    """Margins r(y) - r(0), r = beta log(pi/ref), fitted to counts wins[i, j] of i over j, beta 1."""
    pairs = exact.all_pairs(4)
    seen = np.array([wins[i, j] + wins[j, i] for i, j in pairs], dtype=float)
    share = np.array([wins[i, j] for i, j in pairs]) / seen
    share = (1 - smoothing) * share + smoothing * (1 - share)
    found = minimiser(name, pairs=pairs, weights=(seen / seen.sum()).tolist(), prob=share.tolist(), beta=1.0, **numbers)
    margin = np.log(found / B4.reference)
    return margin - margin[0]


def test_ten_thousand_noisy_prompts():
    """Each pair of B4 judged once in each of 10,000 prompts, a fifth of the verdicts turned round (e = .2).

    Robust recovers the clean rewards; DPO and conservative DPO each the minimiser of their own formula's population; soft labels from
    the reward see no label. Bounds: five standard errors of a margin, .017 for DPO and .042 for robust (30 repetitions).
    """
    rng, flip = np.random.default_rng(0), 0.2
    clean = exact.bradley_terry(B4.reward)
    seen = (1 - flip) * clean + flip * (1 - clean)
    wins = np.zeros((4, 4))
    for i, j in exact.all_pairs(4):
        right = rng.random(10_000) < clean[i, j]
        verdict = right ^ (rng.random(10_000) < flip)
        wins[i, j], wins[j, i] = verdict.sum(), (~verdict).sum()
    truth = B4.reward - B4.reward[0]
    cases = (("sigmoid", 0.0, {}, 0.085), ("sigmoid", 0.1, {}, 0.085), ("robust", 0.0, {"noise": flip}, 0.21))
    for name, smoothing, numbers, bound in cases:
        population = fitted(name, np.round(1e12 * seen), smoothing, **numbers)
        assert np.abs(fitted(name, wins, smoothing, **numbers) - population).max() < bound, (name, smoothing)
        if name == "robust":
            np.testing.assert_allclose(population, truth, atol=1e-6)
    shrunk, conservative = (fitted("sigmoid", np.round(1e12 * seen), e) for e in (0.0, 0.1))
    assert (np.abs(conservative[1:]) < np.abs(shrunk[1:])).all() and (np.abs(shrunk[1:]) < np.abs(truth[1:])).all()
    np.testing.assert_allclose(minimiser("soft", beta=1.0), exact.optimum(B4, beta=1.0), atol=1e-8)
    alone = {(i, j): (1 - flip) * clean[i, j] + flip * (1 - clean[i, j]) for i, j in exact.all_pairs(4)}
    for (i, j), p in alone.items():  # a pair by itself: logit((1-e)p + e(1-p)), and robust's logit((p~-e)/(1-2e))
        share = wins[i, j] / 10_000
        assert abs(math.log(share / (1 - share)) - math.log(p / (1 - p))) < 0.11
        back = (share - flip) / (1 - 2 * flip)
        assert abs(math.log(back / (1 - back)) - (B4.reward[i] - B4.reward[j])) < 0.3


# ---- files and the real path -------------------------------------------------------------------------------------------------


def test_what_counts_as_a_sample_of_the_reference():
    source = {"weights": "w", "temperature": 1.0, "top_p": 1.0}
    assert draw_of(Response("a", source=source)) == "w" and draw_of(Response("a", source=source | {"temperature": 1})) == "w"
    wrong = ({"temperature": 0.7}, {"top_p": 0.9}, {"weights": None}, {"temperature": None}, {"top_p": "1"}, {"kept": {"how": "best"}})
    for change in wrong:
        assert draw_of(Response("a", source=source | change)) is None
    assert draw_of(Response("a")) is None and draw_of(Response("a", source={"weights": "w"})) is None
    assert scores_of(Response("a", source={"scores": [1, 2.5]})) == (1.0, 2.5)
    for found in (None, [], ["1"], [True], [math.nan], 3, "12", [1, None]):
        assert scores_of(Response("a", source={"scores": found})) == ()


def scored_store(count: int = 6, **kwargs):
    return build(make.scored(make.records(count, k=3)), make_codec(make.tokenizer()), max_length=None, members=True, **kwargs)[0]


def test_only_the_weights_own_samples_are_drawn():
    assert not scored_store().drawn.any() and not scored_store(weights="others").drawn.any()
    mine = scored_store(weights="made")
    assert mine.drawn.sum() == 12 and np.isnan(mine.score).sum() == 6, "a prompt has no score"
    value = preference([(1.0, "value", {"beta": 2.0})])
    assert len(readable(mine, value, np.arange(6))) == 6
    with pytest.raises(DataError, match="a scored sample of the reference"):
        readable(scored_store(weights="others"), value, np.arange(6))
    with pytest.raises(DataError, match="a sample of the reference"):
        readable(scored_store(), preference([(1.0, "soft", {}), (0.1, "anchor", {})]), np.arange(6))


def test_partition_by_hand_and_its_refusal():
    """Two samples a prompt, w = e^(r1/beta), e^(r2/beta): (w1 + w2)^2/(w1^2 + w2^2); at a small beta it is 1 and refused."""
    store = scored_store(weights="made")
    found = partition(store, np.arange(6), preference([(1.0, "value", {"beta": 4.0})]))
    score = store.score[store.drawn].reshape(6, 2)
    w = np.exp(score / 4)
    effective = w.sum(1) ** 2 / (w**2).sum(1)
    middle = np.sort(effective)[2]  # torch takes the lower of two middles
    assert found["samples"] == 2 and found["effective"] == pytest.approx(middle)
    assert found["bias"] == pytest.approx(np.mean(-4 * (1 / effective - 0.5) / 2)) and found["spread"] == pytest.approx(score.std(1).mean())


def test_partition_refuses_and_names_a_beta_that_would_do():
    records = [Record(f"p{i}", tuple(Response(f" r{j}", score=float(j), source={"weights": "w", "temperature": 1, "top_p": 1})
                                     for j in range(4))) for i in range(3)]  # fmt: skip
    store = build(records, make_codec(make.tokenizer()), max_length=None, weights="w")[0]
    with pytest.raises(DataError, match=r"Z cannot be had at beta 0.1: of 4 samples a prompt 1.00 count; --beta ") as error:
        partition(store, np.arange(3), preference([(1.0, "value", {"beta": 0.1})]))
    wider = float(str(error.value).split("--beta ")[1].split(",")[0])
    assert partition(store, np.arange(3), preference([(1.0, "value", {"beta": wider})]))["effective"] >= 1.5
    single = replace(store, drawn=store.drawn & (store.response == 0))
    with pytest.raises(DataError, match="draw several samples a prompt"):
        partition(single, np.arange(3), preference([(1.0, "value", {"beta": 9.0})]))
    assert partition(store, np.arange(3), preference([(1.0, "value-quantile", {})])) == {}


def test_an_ensemble_of_another_size_is_refused():
    records = make.scored(make.records(3))
    odd = replace(records[2].responses[1], source={"scores": [1.0, 2.0, 3.0]})
    records[2] = replace(records[2], responses=(records[2].responses[0], odd))
    with pytest.raises(DataError, match="an ensemble of 3 members after one of 2"):
        build(records, make_codec(make.tokenizer()), max_length=None, members=True)
    build(records, make_codec(make.tokenizer()), max_length=None)  # nobody asked
    lacking = [replace(r, responses=tuple(replace(x, source=None) for x in r.responses)) if i == 1 else r
               for i, r in enumerate(make.scored(make.records(3)))]  # fmt: skip
    store = build(lacking, make_codec(make.tokenizer()), max_length=None, members=True)[0]
    with pytest.raises(DataError, match="1 records have scores without those of an ensemble.*made:2"):
        readable(store, preference([(1.0, "soft-pessimistic", {})]), np.arange(3))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    model = make.write_model(folder / "model")
    return model, make.write_scored(folder / "scored.jsonl", models.weights_fingerprint(str(model)), 24)


@pytest.mark.parametrize("loss", ["soft+0.1*anchor", "soft-pessimistic", "value", "value-quantile"])
def test_training_on_scores_from_a_file(loss, given, tmp_path):
    """The held-out loss falls, the higher score counts as chosen, and `value` says what its Z stands on."""
    model, data = given
    run = api.FUNCTIONS["dpo"](model=model, data=data, output=tmp_path / "run", loss=loss, beta=1.0, lr=3e-4, epochs=6, batch_size=8,
                               eval_prompts=0, report=False)  # fmt: skip
    before, after = run.results["before"], run.results["after"]
    assert after["eval/loss"] < before["eval/loss"] and after["eval/rewards/margins"] > 0.05
    assert after["eval/pairs"] == 2 * 6, "two held-out prompts of four scores"
    assert set(run.manifest["partition"]) == ({"samples", "effective", "beta", "bias", "spread"} if loss == "value" else set())
    if loss == "value":
        assert run.manifest["partition"]["samples"] == 4 and run.manifest["partition"]["bias"] < 0


def test_refusals_of_files(given, tmp_path):
    model, data = given
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        for response in row["responses"]:
            response["source"]["temperature"] = 0.7
    cold = tmp_path / "cold.jsonl"
    cold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"model": model, "output": tmp_path / "run", "report": False}
    with pytest.raises(DataError, match="at temperature 1 and top_p 1"):
        api.FUNCTIONS["dpo"](data=cold, loss="value", **common)
    with pytest.raises(DataError, match="Z cannot be had at beta 0.02"):
        api.FUNCTIONS["dpo"](data=data, loss="value", beta=0.02, **common)
    with pytest.raises(DataError, match="two scored responses"):
        api.FUNCTIONS["dpo"](data=make.write_pairs(tmp_path / "pairs.jsonl", 8), loss="soft", **common)
    with pytest.raises(UsageError, match="has no soft form"):
        api.FUNCTIONS["dpo"](data=data, loss="soft", label_smoothing=0.1, **common)
    with pytest.raises(UsageError, match="must stand still"):
        api.FUNCTIONS["dpo"](data=data, loss="value", reference_update="soft", **common)
    assert not (tmp_path / "run").exists()


# ---- a value that is learned -------------------------------------------------------------------------------------------------


def residual(theta: Tensor, value: Tensor, beta: float, reward: np.ndarray = B4.reward) -> Tensor:
    """`value-learned` on B4's four responses, (4,)."""
    score = torch.from_numpy(reward)
    return values.value_learned(Side(theta.log_softmax(-1), REF, torch.ones(4, dtype=f64), score=score, value=value.expand(4)), beta=beta)


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
def test_a_learned_value_has_one_minimum(beta):
    """Where both gradients are zero, found from far starts: pi* and beta log Z, whoever the responses are of."""
    chance = np.random.default_rng(0)
    for often in (B4.reference, np.array([0.1, 0.2, 0.3, 0.4])):

        def slopes(x: np.ndarray, often=often) -> np.ndarray:
            theta, value = torch.tensor(x[:4], requires_grad=True), torch.tensor(x[4], requires_grad=True)
            found = torch.autograd.grad((torch.from_numpy(often) * residual(theta, value, beta)).sum(), (theta, value))
            return np.append(found[0].numpy(), found[1])

        for _ in range(3):
            found = root(slopes, chance.normal(scale=2, size=5), method="lm", options={"xtol": 1e-14, "ftol": 1e-14})
            assert np.abs(slopes(found.x)).max() < 1e-9
            np.testing.assert_allclose(np.exp(found.x[:4]) / np.exp(found.x[:4]).sum(), exact.optimum(B4, beta=beta), atol=1e-7)
            assert found.x[4] == pytest.approx(exact.soft_value(B4, beta=beta), abs=1e-7)


def test_a_learned_value_at_its_best_is_the_square_over_pairs():
    """A second formulation: with weights w the least over V is the sum over pairs of w_i w_j (dr - m)^2/2, V the mean of r - beta a."""
    chance = np.random.default_rng(1)
    for beta in (0.3, 2.0):
        theta, often = torch.tensor(chance.normal(size=4)), torch.tensor(chance.dirichlet(np.ones(4)))
        score, ratio = torch.from_numpy(B4.reward), theta.log_softmax(-1) - REF
        best = (often * (score - beta * ratio)).sum()
        side = Side(theta.log_softmax(-1), REF, torch.ones(4, dtype=f64), score=score)
        i, j = torch.tensor(exact.all_pairs(4)).T
        pairs = (often[i] * often[j] * distill.soft_square(side[i], side[j], beta=beta)).sum() / 2
        assert float((often * residual(theta, best, beta)).sum()) == pytest.approx(float(pairs), rel=1e-12)
        for off in (-0.1, 0.1):
            assert (often * residual(theta, best + off, beta)).sum() > pairs


def test_with_one_answer_a_prompt_only_a_learned_value_learns(monkeypatch):
    """Two worlds of bench/partition.py: what the table of docs/distillation.md says of one answer a prompt, and of four."""
    monkeypatch.syspath_prepend(str(make.Path(__file__).resolve().parents[1] / "bench"))
    bench = importlib.import_module("partition")
    worlds = [bench.World(seed, 1.0) for seed in range(2)]
    cost = {(way, k): np.mean([bench.fit(world, way, k) for world in worlds]) for way in bench.WAYS[:3] for k in (1, 4)}
    nothing = np.mean([world.regret(torch.zeros(bench.FEATURES, dtype=f64)) for world in worlds])
    assert cost["soft", 1] == pytest.approx(nothing) and cost["value", 1] == pytest.approx(nothing) and nothing > 0.3
    assert cost["value-learned, linear", 1] < 0.01 and cost["soft", 4] < 1e-6 < cost["value-learned, linear", 4] < cost["value", 4]


def test_both_learn_from_the_bare_residual():
    """d = r - V - beta a: the gradient is -d by V and, over beta, -d by log pi (so a small KL weight does not slow the policy)."""
    policy, value = REF + 0.3, torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=f64)
    for beta in (0.1, 1.0, 4.0):
        p, v = policy.clone().requires_grad_(), value.clone().requires_grad_()
        side = Side(p, REF, torch.ones(4, dtype=f64), score=torch.from_numpy(B4.reward), value=v)
        d = torch.from_numpy(B4.reward) - value - beta * 0.3
        torch.testing.assert_close(values.value_learned(side, beta=beta), d**2 / 2)
        for slope in torch.autograd.grad(values.value_learned(side, beta=beta).sum(), (p, v)):
            torch.testing.assert_close(slope, -d)


def two_prompts() -> tuple[Any, Any, readout.Learner]:
    """T3's 15 sequences after two prompts, the second with rewards larger by 2; a step of all of them; a table and a head over both."""
    prompts = [(exact.BOS,), (exact.BOS, exact.BOS)]
    store = from_ids(prompts, [T3.sequences] * 2)
    rewards = T3.reward.numpy()
    store = replace(store, score=np.concatenate([[np.nan], rewards, [np.nan], rewards + 2]))
    forced = {prefix: (-1e4, -1e4, 0.0) for prefix in itertools.product((0, 1), repeat=exact.LIMIT)}
    rows = {**dict(zip(T3.prefixes, T3.reference.tolist(), strict=True)), **forced}
    table = torch.tensor([list(row) for _ in prompts for row in rows.values()], dtype=f64)
    policy = TableModel([(*prompt, *prefix) for prompt in prompts for prefix in rows], table)
    batch = make_batch(store, [0, 1])
    column = np.zeros(len(store.tokens))
    with torch.no_grad():
        column[batch.slot.numpy()] = readout.token_logps(policy, readout.hidden_states(policy, batch), batch).numpy()
    step = make_step(store, [0, 1], micro_tokens=30, columns={"reference": column})
    assert len(step.micro) == 2
    return store, step, readout.Learner(policy, readout.Value(len(policy.model.row), dtype=f64))


def test_through_the_engine_it_gives_the_exact_optimum_and_value():
    """Batches, heads and steps as they train: every prompt has its own V, beta log Z, and the sequences their pi*."""
    store, step, learner = two_prompts()
    objective = preference([(1.0, "value-learned", {"beta": 1.0})])
    state = engine.make_state(learner, rate=lambda s: 0.0, clip=0.0)
    assert "value.head.weight" in state.weights
    solver = torch.optim.LBFGS(list(learner.parameters()), max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> float:
        solver.zero_grad()
        return engine.accumulate(state, step, objective)[0]

    solver.step(closure)
    batch = make_batch(store, [0, 1], columns={"reference": np.zeros(len(store.tokens))})
    with torch.no_grad():
        found = objective.score(learner, batch)
    problem = T3.problem()
    for mine, moved in ((slice(0, 15), 0.0), (slice(15, 30), 2.0)):
        np.testing.assert_allclose(found.policy[mine].exp(), exact.optimum(problem, beta=1.0), atol=1e-5)
        np.testing.assert_allclose(found.value[mine].numpy(), exact.soft_value(problem, beta=1.0) + moved, atol=1e-5)


@pytest.fixture(scope="module")
def cold(given, tmp_path_factory):
    """The same answers, but nobody's samples."""
    rows = [json.loads(line) for line in given[1].read_text().splitlines()]
    plain = [{"prompt": r["prompt"], "responses": [{"text": x["text"], "score": 3 + x["score"]} for x in r["responses"]]} for r in rows]
    path = tmp_path_factory.mktemp("cold") / "cold.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return {"model": str(given[0]), "data": [str(path)]}


LEARNED = {"head": {}, "copy": {"value": "copy", "value_lr": 3.0}, "lora": {"lora": 4}}


@pytest.mark.parametrize("extra", LEARNED.values(), ids=LEARNED)
def test_a_learned_value_trains_resumes_and_stays_out_of_the_model(extra, cold, tmp_path):
    """V moves towards the rewards' level of 3; stopped twice it ends with the same bits; what is published is the policy alone."""
    wanted = Dpo(**cold, output=str(tmp_path / "whole"), loss="value-learned", beta=1.0, lr=1e-3, epochs=4, batch_size=8, eval_prompts=0,
                 report=False, threads=1, save_every=1, keep=99, eval_every=3, **extra)  # fmt: skip
    assert dpo.run(wanted) == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["eval/value"] == 0 and after["eval/value"] > 0.1 and after["eval/loss"] < before["eval/loss"]
    assert results["partition"] == {}
    last = checkpoints.latest(tmp_path / "whole")
    held = [name for name in last.tensors("weights") if name.startswith("value.")]
    assert "value.head.weight" in held and len(held) > 2 if "value" in extra else set(held) == {"value.head.weight", "value.head.bias"}
    places = [tmp_path / "whole" / "model", *([tmp_path / "whole" / "adapter"] if "lora" in extra else [])]
    saved = [name for place in places for path in place.glob("*.safetensors") for name in load_file(path)]
    assert saved and not any("value." in name or name.startswith("policy.") for name in saved)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    going = replace(wanted, output=str(tmp_path / "cut"))
    for stop in (5, 9):
        make.stop_after(dpo.run, going, stop)
        going = Dpo(resume=str(tmp_path / "cut"))
    dpo.run(going)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_refusals_of_a_learned_value(cold, given, tmp_path):
    dpo_of, common = api.FUNCTIONS["dpo"], cold | {"output": tmp_path / "run", "report": False}
    for more in ({"value": "copy"}, {"value_lr": 3.0}):
        with pytest.raises(UsageError, match="only --loss value-learned learns a value"):
            dpo_of(**common, **more)
    with pytest.raises(UsageError, match="must stand still"):
        dpo_of(**common, loss="value-learned", reference_update="soft")
    with pytest.raises(DataError, match="no training record has a scored response"):
        dpo_of(**common | {"data": [str(make.write_pairs(tmp_path / "pairs.jsonl", 8))]}, loss="value-learned")
    with pytest.raises(UsageError, match="its value model stays in the checkpoints"):
        evaluate.evaluated(Evaluate(**cold, reference=cold["model"], loss="value-learned"))
    with pytest.raises(UsageError, match="does not learn from pairs alone"):
        online.objective(OnlineDpo(loss="sigmoid+value-learned"))
