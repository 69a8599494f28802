"""Objectives by hand: weights, soft labels, sums of losses, KTO's baseline, denominators, metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import make
import pytest
import torch

from preftune.batches import Table, join, make_batch
from preftune.objectives import Columns, join_columns, preference, supervised, total
from preftune.records import Judgement, Message, Record, Response
from preftune.store import build
from preftune.tokens import make_codec

f64 = torch.float64


def ranked(*lists: tuple[list[list[int]], list[int], float]) -> tuple[torch.Tensor, ...]:
    """item, item_list, item_tier and list_weight of (tiers, below, weight)s."""
    rows = [(i, row, t) for row, (tiers, below, _) in enumerate(lists) for t, tier in (*enumerate(tiers), (-1, below)) for i in tier]
    columns = (torch.tensor(column, dtype=torch.long) for column in (zip(*rows, strict=True) if rows else ((), (), ())))
    return (*columns, torch.tensor([weight for *_, weight in lists], dtype=f64))


def table(pairs=((0, 1), (2, 3)), prob=(1.0, 1.0), weight=(1.0, 1.0), verdicts=(), good=(), votes=(), mismatched=(), lists=(),
          score=(math.nan,) * 6, drawn=(0.0,) * 6, scored=(), valued=()) -> Table:  # fmt: skip
    return Table(torch.tensor(pairs).reshape(-1, 2), torch.tensor(prob, dtype=f64), torch.tensor(weight, dtype=f64),
                 torch.tensor(verdicts, dtype=torch.long), torch.tensor(good, dtype=torch.bool), torch.tensor(votes, dtype=f64),
                 torch.tensor(mismatched, dtype=torch.long), *ranked(*lists), record=torch.zeros(6, dtype=torch.long),
                 score=torch.tensor(score, dtype=f64), drawn=torch.tensor(drawn, dtype=f64), member=torch.zeros(6, 0, dtype=f64),
                 scored=torch.tensor(scored, dtype=torch.long).reshape(-1, 2), valued=torch.tensor(valued, dtype=torch.long))  # fmt: skip


# a = policy - reference: 1, -1, 0, 2, 3, -4
COLUMNS = Columns(torch.tensor([-2.0, -5, -3, -4, -1, -9], dtype=f64), torch.tensor([-3.0, -4, -3, -6, -4, -5], dtype=f64),
                  torch.tensor([2.0, 5, 3, 4, 1, 3], dtype=f64))  # fmt: skip


def ls(z: float) -> float:
    return -math.log1p(math.exp(-z))


def value(objective, table_: Table, **totals: float) -> float:
    own = {"pairs": float(table_.pair_weight.sum()), "lists": float(table_.list_weight.sum()),
           "orders": float(table_.list_weight[table_.compares].sum()), "tokens": 18.0,
           "verdicts": float(table_.verdict_weight.sum())}  # fmt: skip
    return float(total(objective.terms(COLUMNS, table_), own | totals))


def test_weights_and_the_denominator_of_the_step():
    dpo = preference([(1.0, "sigmoid", {"beta": 0.5})])
    first, second = -ls(0.5 * 2), -ls(0.5 * -2)
    assert value(dpo, table()) == pytest.approx((first + second) / 2)
    assert value(dpo, table(weight=(3.0, 1.0))) == pytest.approx((3 * first + second) / 4)
    assert value(dpo, table(), pairs=8.0) == pytest.approx((first + second) / 8)  # the denominator is the whole step's


def test_soft_labels_and_smoothing_are_cdpo():
    first, swapped = -ls(1.0), -ls(-1.0)
    soft = preference([(1.0, "sigmoid", {"beta": 0.5})])
    assert value(soft, table(pairs=((0, 1),), prob=(0.7,), weight=(1.0,))) == pytest.approx(0.7 * first + 0.3 * swapped)
    smooth = preference([(1.0, "sigmoid", {"beta": 0.5})], label_smoothing=0.1)
    assert value(smooth, table(pairs=((0, 1),), prob=(1.0,), weight=(1.0,))) == pytest.approx(0.9 * first + 0.1 * swapped)
    both = 0.7 * 0.9 + 0.3 * 0.1
    assert value(smooth, table(pairs=((0, 1),), prob=(0.7,), weight=(1.0,))) == pytest.approx(both * first + (1 - both) * swapped)


def test_smoothing_in_a_sum_reaches_only_terms_that_read_labels():
    first, swapped = -ls(1.0), -ls(-1.0)
    mixed = preference([(1.0, "sigmoid", {"beta": 0.5}), (2.0, "nll", {})], label_smoothing=0.2)
    one = table(pairs=((0, 1),), prob=(1.0,), weight=(1.0,))
    assert value(mixed, one) == pytest.approx(0.8 * first + 0.2 * swapped + 2 * 1)
    assert value(mixed, table(pairs=((0, 2),), prob=(0.1,), weight=(1.0,))) == pytest.approx(
        (0.1 * 0.8 + 0.9 * 0.2) * -ls(0.5) + (0.9 * 0.8 + 0.1 * 0.2) * -ls(-0.5) + 2 * 1)  # fmt: skip


def test_batch_statistics_are_of_the_step_with_its_votes():
    """BCO, beta 1: a = 1, -1 with three votes and 0, 2 with one: mean a = (3 * 0 + 1)/4 = .25 and no gradient through it."""
    bco = preference([(1.0, "bco", {"beta": 1.0})])
    first, second = -ls(0.75) - ls(1.25), -ls(-0.25) - ls(-1.75)
    assert value(bco, table(weight=(3.0, 1.0))) == pytest.approx((3 * first + second) / 4)
    assert not bco.separable and bco.needs == frozenset()
    assert preference([(1.0, "wpo", {}), (1.0, "ld-dpo", {})]).needs == {"tokens", "collision"}


def test_a_weighted_sum_of_losses():
    mixed = preference([(1.0, "sigmoid", {"beta": 0.5}), (0.2, "nll", {})])
    one = table(pairs=((0, 1),), prob=(1.0,), weight=(1.0,))
    assert mixed.name == "sigmoid+0.2*nll" and value(mixed, one) == pytest.approx(-ls(1.0) + 0.2 * (2 / 2))
    assert mixed.reference == "token" and mixed.separable and mixed.start is None


@pytest.mark.parametrize(("mismatched", "z0"), [((4, 5), 0.0), ((4,), 3.0), ((), 0.0)])
def test_ktos_baseline_reads_mismatched_responses_only_and_is_not_below_zero(mismatched, z0):
    kto = preference([(1.0, "kto", {"beta": 0.5})])
    said = table(pairs=(), prob=(), weight=(), verdicts=(0, 3), good=(True, False), votes=(1.0, 3.0), mismatched=mismatched)

    def sig(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    expected = (1 - sig(0.5 * (1 - z0))) + 3 * (1 - sig(0.5 * (z0 - 2)))
    assert value(kto, said) == pytest.approx(expected / 4)
    assert kto.mismatched and not kto.separable
    start = kto.start(said, {"verdicts": 4.0})
    assert start == pytest.approx(0.5)


def test_rankings_have_votes_and_their_own_denominator():
    """beta .5, s = .5, -.5, 0, 1, 1.5, -2: 0 > 1 with three votes; 3 = 2 > {1} by S-DPO: each of the two against the one."""
    one, two = ([[0], [1]], [], 3.0), ([[3, 2]], [1], 1.0)
    pl = preference([(1.0, "plackett-luce", {"beta": 0.5})])
    assert value(pl, table(lists=(one,))) == value(preference([(1.0, "sigmoid", {"beta": 0.5})]), table(((0, 1),), (1.0,), (3.0,)))
    tie = math.log((math.e + 1 + math.exp(-0.5)) * ((math.e + 1) / 2 + math.exp(-0.5)) / math.e)
    assert value(pl, table(lists=(one, two))) == pytest.approx((3 * -ls(1.0) + tie) / 4)
    s_dpo = preference([(1.0, "s-dpo", {"beta": 0.5})])
    assert value(s_dpo, table(lists=(one, two)), orders=8.0) == pytest.approx((3 * -ls(1.0) - ls(1.5) - ls(0.5)) / 8)
    mixed = preference([(0.5, "sigmoid", {}), (2.0, "kto", {}), (1.0, "plackett-luce", {})])
    assert pl.reads == mixed.reads == "lists" and pl.separable and not mixed.separable
    said = table(lists=(one, two), verdicts=(0, 1), good=(True, False), votes=(1.0, 1.0))
    totals = {"pairs": 2.0, "verdicts": 2.0, "lists": 4.0}
    assert mixed.start(said, totals) == pytest.approx(0.5 * math.log(2) + 2 * 0.5 + (3 * math.log(2) + math.log(6)) / 4)


def test_metrics_of_rankings():
    """a = 1, -1, 0, 2, 3, -4. 0 > 1 > 2: two of three pairs in order, tau 1/3; 4 > {0, 1}: all. A tie alone compares nothing."""
    pl = preference([(1.0, "plackett-luce", {})])
    said = table(lists=(([[0], [1], [2]], [], 1.0), ([[4]], [0, 1], 2.0), ([[2, 3]], [], 1.0)))
    found = pl.metrics(COLUMNS, said)
    assert found["rankings/tau"].tolist() == [pytest.approx(1 / 3), 1.0] and found["rankings/exact"].tolist() == [0.0, 1.0]
    assert found["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert "rankings/tau" not in preference([(1.0, "sigmoid", {})]).metrics(COLUMNS, said)


def test_metrics_are_one_value_a_pair_and_ties_count_half():
    dpo = preference([(1.0, "sigmoid", {"beta": 0.5})])
    said = table(pairs=((0, 1), (2, 3), (2, 2)), prob=(1.0,) * 3, weight=(1.0,) * 3)
    found = {k: (float(v.sum()), len(v)) for k, v in dpo.metrics(COLUMNS, said).items()}
    assert (
        found["rewards/accuracies"] == (1.5, 3)
        and found["rewards/chosen"] == (0.5 * 1, 3)
        and found["rewards/rejected"] == (0.5 * 1, 3)
    )
    assert found["displacement"] == (1.0, 3) and found["logps/chosen"] == (-8.0, 3)
    simpo = preference([(1.0, "simpo", {})])
    one = simpo.metrics(COLUMNS, table(pairs=((0, 2),), prob=(1.0,), weight=(1.0,)))
    assert float(one["rewards/accuracies"].sum()) == 0.5  # both have -1 a token: a tie for SimPO, not for the sums


def test_joining_micro_batches_is_the_whole():
    lists = (([[0], [1]], [], 1.0), ([[2]], [1, 0], 2.0))
    tables = [table(lists=lists), table(verdicts=(1,), good=(True,), votes=(1.0,), mismatched=(2,), lists=lists[1:])]
    whole = join(tables)
    assert (
        whole.pair.tolist() == [[0, 1], [2, 3], [6, 7], [8, 9]]
        and whole.verdict.tolist() == [7]
        and whole.mismatched.tolist() == [8]
    )
    assert whole.item.tolist() == [0, 1, 2, 1, 0, 8, 7, 6] and whole.item_list.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert whole.item_tier.tolist() == [0, 1, 0, -1, -1, 0, -1, -1] and whole.list_weight.tolist() == [1.0, 2.0, 2.0]
    assert torch.equal(join_columns([COLUMNS, COLUMNS]).policy, torch.cat([COLUMNS.policy] * 2))
    ragged = [replace(COLUMNS, tokens=torch.ones(6, n, dtype=f64), collision=COLUMNS.length) for n in (2, 5)]
    together = join_columns(ragged)
    assert together.tokens.shape == (12, 5) and together.tokens.sum(1).tolist() == [2.0] * 6 + [5.0] * 6
    assert join_columns([COLUMNS, COLUMNS]).tokens is None and together.collision.shape == (12,)


def test_supervised_is_the_mean_over_tokens():
    assert value(supervised(), table()) == pytest.approx(24 / 18)


def test_a_users_turn_inside_a_response_is_never_a_target():
    turns = (Message("assistant", "AAA"), Message("user", "bbb"), Message("assistant", "CCC"))
    record = Record((Message("user", "hi"),), (Response(turns), Response("x")), (Judgement(((0,), (1,))),))
    store = build([record], make_codec(make.tokenizer(template=make.TEMPLATE)), max_length=None)[0]
    batch = make_batch(store, [0])
    text = make.tokenizer().backend_tokenizer.decode(batch.target[batch.response == 0].tolist(), skip_special_tokens=False)
    assert text == "AAA<|end|>CCC<|end|>"
