"""Exact numbers demanded of the real code: T3's table as a model, through store, batch, readout, objective and engine."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from preftune import engine, evaluate, sampling
from preftune.batches import make_batch, make_step
from preftune.exact import BOS, T3, TableModel, bradley_terry, kl, optimum, plackett_luce
from preftune.losses import LOSSES
from preftune.objectives import preference
from preftune.readout import hidden_states, prefix_kl, response_sums, token_logps
from preftune.store import from_ids


def ranked_windows(size: int = 4):
    """Adds to a store every order of every `size` responses that stand together in a ring of 15, with its chance as votes.

    Of the last of every 24 lists that keep their best two in place the two others are `below`, with the chance of both orders.
    """
    sets = [[(first + i) % 15 for i in range(size)] for first in range(15)]
    orders = [[s[i] for i in order] for s in sets for order in itertools.permutations(range(size))]
    votes = np.array([plackett_luce(T3.reward.numpy(), order) for order in orders])
    tiers = [list(range(size))] * len(orders)
    for k in range(22, len(orders), 24):  # the last two of a window differ in the order of their last two responses
        tiers[k], votes[k], votes[k + 1] = [0, 1, -1, -1], votes[k] + votes[k + 1], 0
    keep = votes > 0
    return lambda store: replace(store, item=np.array(orders)[keep].flatten() + 1, item_tier=np.array(tiers, np.int32)[keep].flatten(),
                                 list_start=np.arange(keep.sum() + 1) * size, list_weight=votes[keep],
                                 ranking_start=np.array([0, keep.sum()]))  # fmt: skip


def t3_store():
    """All 15 sequences as responses of one record, all 105 pairs judged by Bradley-Terry, 345 lists of four by Plackett-Luce."""
    store = from_ids([[BOS]], [T3.sequences])
    chosen, rejected = np.triu_indices(15, k=1)
    prob = bradley_terry(T3.reward.numpy())[chosen, rejected]
    rng = np.random.default_rng(0)
    good = rng.random(15) < 0.5
    lists = ranked_windows()
    return replace(lists(store), pair=np.stack([chosen, rejected], 1) + 1, pair_prob=prob, pair_weight=np.ones(105),
                   pair_start=np.array([0, 105]),
                   score=np.concatenate([[np.nan], T3.reward.numpy()]), drawn=np.arange(16) % 4 == 1, rated=np.arange(15) + 1,
                   member=T3.reward.numpy()[:, None] + rng.normal(scale=0.3, size=(15, 3)),
                   verdict=np.arange(15) + 1, verdict_good=good, verdict_weight=np.ones(15), verdict_start=np.array([0, 15]))  # fmt: skip


def reference_column(store):
    batch = make_batch(store, [0])
    model = TableModel.t3_reference()
    column = np.zeros(len(store.tokens))
    with torch.no_grad():
        column[batch.slot.numpy()] = token_logps(model, hidden_states(model, batch), batch).numpy()
    return column


@pytest.mark.parametrize("share", [True, False])
def test_log_probs_and_prefix_kl_are_the_tables(share):
    store, policy, frozen = t3_store(), TableModel.t3_policy(), TableModel.t3_reference()
    batch = make_batch(store, [0], share=share)
    with torch.no_grad():
        ours, theirs = hidden_states(policy, batch), hidden_states(frozen, batch)
        logps = response_sums(token_logps(policy, ours, batch), batch)
        rb = response_sums(prefix_kl(policy, ours, frozen, theirs, batch), batch)
    assert torch.allclose(logps, T3.logps(T3.policy), atol=1e-12)
    assert torch.allclose(rb, T3.kl_estimates(T3.policy)["rao-blackwell"], atol=1e-12)
    expected = (T3.logps(T3.policy).exp() * rb).sum()
    assert float(expected) == pytest.approx(0.21789061, abs=1e-8)


def test_evaluates_kl_of_all_sequences():
    store = t3_store()
    rb, k1 = evaluate.score_samples(TableModel.t3_policy(), TableModel.t3_reference(), store, micro_tokens=10_000)
    weight = T3.logps(T3.policy).exp().numpy()
    assert (weight * rb).sum() == pytest.approx(0.21789061, abs=1e-8) and (weight * k1).sum() == pytest.approx(
        0.21789061, abs=1e-8
    )
    assert (weight * (rb - 0.21789061) ** 2).sum() == pytest.approx(0.003786, abs=1e-6)
    assert (weight * (k1 - 0.21789061) ** 2).sum() == pytest.approx(0.435748, abs=1e-5)


# Parts of these carry no gradient by design: tests/test_losses.py holds them, test_equal.py runs them.
HELD = {"wpo", "bco", "alpha-dpo", "beta-dpo", "tdpo2", "value-learned", "nominal"}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in HELD])
def test_gradients_by_finite_differences_in_float64(name):
    store = t3_store()
    objective = preference([(1.0, name, {})], label_smoothing=0.1 if LOSSES[name].soft == "swap" else 0.0)
    objective = replace(objective, frozen=TableModel.t3_reference())
    model = TableModel.t3_policy()
    step = make_step(store, [0], micro_tokens=10_000, columns={"reference": reference_column(store)})
    weight = model.lm_head.weight
    state = engine.make_state(model, rate=lambda s: 0.0, clip=0.0)
    engine.accumulate(state, step, objective)
    gradient = weight.grad.clone()
    free = [(v, k) for k in range(7) for v in range(3)]
    step_size = 1e-6
    for v, k in free:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[v, k] += sign * step_size
            weight.grad = None
            values.append(float(engine.accumulate(state, step, objective)[0]))
            with torch.no_grad():
                weight[v, k] -= sign * step_size
        slack = 1e-7 * max(1.0, abs(values[0]))
        assert (values[0] - values[1]) / (2 * step_size) == pytest.approx(float(gradient[v, k]), abs=slack)
    assert float(gradient[:, :7].abs().max()) > 1e-4


def test_columns_inside_a_response_are_the_tables():
    """Token log-ratios in rows and the collision sums, from T3's table: 15 responses of up to three free tokens and an end."""
    store = t3_store()
    objective = preference([(1.0, "ld-dpo", {}), (1.0, "wpo", {})])
    batch = make_batch(store, [0], columns={"reference": reference_column(store)})
    with torch.no_grad():
        found = objective.score(TableModel.t3_policy(), batch)
    ratio = T3.token_logps(T3.policy) - T3.token_logps(T3.reference)
    for row, (sequence, taken, stood) in enumerate(zip(T3.sequences, ratio, T3.visits, strict=True)):
        want = taken[[k for k, p in enumerate(T3.prefixes) if stood[k]]]  # prefixes stand in order of length
        assert torch.allclose(found.tokens[row, : len(want)], want, atol=1e-12)
        assert (found.tokens[row, len(want) :] == 0).all() and found.length[row] == len(sequence)
    inside = (2 * T3.policy.log_softmax(-1)).logsumexp(-1)  # a forced end collides with certainty: log 1 = 0
    assert torch.allclose(found.collision, T3.visits @ inside, atol=1e-12)
    assert found.tokens.shape == (15, 4)


@pytest.mark.parametrize(("name", "beta"), [("sigmoid", 0.5), ("sigmoid", 1.0), ("plackett-luce", 0.5), ("plackett-luce", 1.0)])
def test_population_dpo_through_the_engine_gives_the_exact_optimum(name, beta):
    store = t3_store()
    step = make_step(store, [0], micro_tokens=10_000, columns={"reference": reference_column(store)})
    objective = preference([(1.0, name, {"beta": beta})])
    assert name == "sigmoid" or sum(int(t) < 0 for t in step.micro[0].table.item_tier) == 30
    model = TableModel.t3_reference()
    state = engine.make_state(model, rate=lambda s: 0.0, clip=0.0)
    tight = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([model.lm_head.weight], **tight)

    def closure() -> float:
        model.lm_head.weight.grad = None
        return float(engine.accumulate(state, step, objective)[0])

    solver.step(closure)
    batch = make_batch(store, [0])
    with torch.no_grad():
        pi = response_sums(token_logps(model, hidden_states(model, batch), batch), batch).exp().numpy()
    best = optimum(T3.problem(), beta=beta)
    assert np.abs(pi - best).max() < 1e-6 and kl(pi, best) < 1e-9


def test_samples_follow_the_table_and_carry_its_log_probs():
    """20,000 draws from T3 by the sampler's own draw: frequencies by chi-square."""
    draws = draw_without_cache(TableModel.t3_policy(), 20_000)
    counts = np.array([draws.count(s) for s in T3.sequences])
    expected = T3.logps(T3.policy).exp().numpy() * 20_000
    assert counts.sum() == 20_000
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 36.1  # 0.1% point of chi-square with 14 degrees of freedom


def draw_without_cache(model: TableModel, count: int) -> list[tuple[int, ...]]:
    """sampling's own draw, token by token over the table's logits."""
    uniform = sampling._uniforms(7, range(count), 4)
    rows = [[BOS] for _ in range(count)]
    done = [False] * count
    for t in range(4):
        alive = [i for i in range(count) if not done[i]]
        table = {tuple(rows[i]): model(torch.tensor([rows[i]])).logits[0, -1] for i in alive}
        logits = torch.stack([table[tuple(rows[i])] for i in alive])
        ids, _ = sampling._draw(logits, uniform[alive, t], temperature=1.0, top_p=1.0)
        for i, token in zip(alive, ids.tolist(), strict=True):
            rows[i].append(token)
            done[i] = token == 2
    return [tuple(r[1:]) for r in rows]


def test_nucleus_and_greedy():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for u, expected in ((0.0, 0), (0.62, 0), (0.63, 1), (0.999, 1)):  # top_p .6 keeps {0, 1}: .625, .375
        ids, logp = sampling._draw(logits, torch.tensor([u]), temperature=1.0, top_p=0.6)
        assert int(ids) == expected and float(logp.exp()) == pytest.approx([0.625, 0.375][expected])
    assert int(sampling._draw(logits, torch.tensor([0.99]), temperature=0.0, top_p=1.0)[0]) == 0
