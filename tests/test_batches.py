"""Batches: the segment table, positions, targets and masks, written out by hand; order and cuts."""

from __future__ import annotations

import make
import numpy as np
import pytest
import torch

from preftune.attention import tree_mask
from preftune.batches import Order, join, make_batch, make_step, split, tokens_of
from preftune.records import Judgement, Record, Response
from preftune.store import MISMATCHED, build, from_ids
from preftune.tokens import make_codec


def abc_store():
    """Prompt 'ab' (BOS a b), responses 'cd' and 'e', both finished."""
    record = Record("ab", (Response("cd"), Response("e")), (Judgement(((1,), (0,))),), where="x:1")
    return build([record], make_codec(make.tokenizer()), max_length=None)[0]


def test_by_hand():
    a, b, c, d, e = (make.BYTES.index(x) for x in "abcde")
    batch = make_batch(abc_store(), [0])
    assert batch.tokens.tolist() == [256, a, b, c, d, 257, e, 257]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert batch.segments.starts == (0, 3, 6) and batch.segments.ends == (3, 6, 8) and batch.segments.prefix == (-1, 0, 0)
    # Both first tokens are read from the prompt's last state (2): gathered, not shifted. The prompt is never a target.
    assert batch.hidden.tolist() == [2, 3, 4, 2, 6] and batch.target.tolist() == [c, d, 257, e, 257]
    assert batch.response.tolist() == [0, 0, 0, 1, 1] and batch.table.pair.tolist() == [[1, 0]]
    expected = ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxx...x.", "xxx...xx"]
    mask = tree_mask(batch.segments, batch.segments.trees[0], None, torch.device("cpu"))
    assert ["".join("x" if v else "." for v in row) for row in mask.tolist()] == expected


def test_window_is_a_distance_in_positions():
    batch = make_batch(abc_store(), [0])
    mask = tree_mask(batch.segments, batch.segments.trees[0], 2, torch.device("cpu"))
    assert ["".join("x" if v else "." for v in row) for row in mask.tolist()] == [
        "x.......", "xx......", ".xx.....", "..xx....", "...xx...", "....xx..", "..x...x.", "......xx"]  # fmt: skip
    assert tree_mask(make_batch(abc_store(), [0], share=False).segments, (0, 6), 6, torch.device("cpu")) is None


def test_unshared_rows_carry_the_same_targets():
    store = make.store(5)
    shared, rows = make_batch(store, range(5)), make_batch(store, range(5), share=False)
    assert shared.slot.tolist() == rows.slot.tolist() and shared.target.tolist() == rows.target.tolist()
    assert rows.tokens[rows.hidden].tolist() == shared.tokens[shared.hidden].tolist()
    assert all(p == -1 for p in rows.segments.prefix) and len(rows.tokens) > len(shared.tokens)


def test_every_trained_token_is_a_target_once():
    store = make.store(9, k=3)
    batch = make_batch(store, range(9))
    assert np.array_equal(np.sort(batch.slot.numpy()), np.flatnonzero(store.trained))


def test_columns_ride_along():
    store = make.store(4)
    column = np.arange(len(store.tokens), dtype=np.float32)
    assert torch.equal(
        make_batch(store, [2, 0], columns={"reference": column}).columns["reference"], make_batch(store, [2, 0]).slot.float()
    )


@pytest.mark.parametrize("micro", [1, 60, 150, 10_000])
def test_any_cut_has_the_same_totals_and_tables(micro):
    store = make.store(10, k=3, mismatched=True)
    records = [7, 2, 9, 0, 5]
    whole, cut = make_step(store, records, micro_tokens=10_000), make_step(store, records, micro_tokens=micro)
    assert whole.totals == cut.totals and len(whole.micro) == 1
    joined = join([b.table for b in cut.micro])
    for name, value in vars(whole.micro[0].table).items():
        assert torch.equal(value.nan_to_num(), getattr(joined, name).nan_to_num()), name
    assert [r for g in split(store, records, micro) for r in g] == records
    assert all(len(b.tokens) <= max(micro, max(tokens_of(store, records))) for b in cut.micro)


def test_order_is_a_permutation_per_epoch_and_a_function_of_the_step():
    order = Order(records=10, batch_size=4, epochs=2.5, seed=3)
    assert (order.per_epoch, order.steps) == (3, 8)
    first, second = ([r for s in steps for r in order.records_of(s).tolist()] for steps in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(10)) and [len(order.records_of(s)) for s in range(3)] == [4, 4, 2]
    assert order.records_of(4).tolist() == Order(10, 4, 2.5, 3).records_of(4).tolist()
    assert first != second


def test_mismatched_segments_belong_to_other_records():
    store = make.store(6, mismatched=True)
    for record in range(6):
        segments = range(store.record_start[record], store.record_start[record + 1])
        extra = [s for s in segments if store.response[s] == MISMATCHED]
        assert len(extra) == 1 and store.parent[extra[0]] == segments.start
    batch = make_batch(store, range(6))
    assert len(batch.table.mismatched) == 6 and not set(batch.table.mismatched.tolist()) & set(
        batch.table.pair.flatten().tolist()
    )


def test_rollouts_keep_their_ids():
    store = from_ids([[5, 6], [7]], [[[1, 2], [3]], [[4]]])
    batch = make_batch(store, [0, 1])
    assert batch.target.tolist() == [1, 2, 3, 4] and batch.tokens.tolist() == [5, 6, 1, 2, 3, 7, 4]


def test_what_does_not_fit_is_counted_by_side_and_nothing_is_cut():
    texts = [("short", " a", " b"), ("short", " " + "x" * 40, " b"), ("short", " b", " " + "x" * 40), ("y" * 60, " a", " b"),
             ("short", " " + "x" * 40, " " + "z" * 40)]  # fmt: skip
    made = [
        Record(p, (Response(c), Response(r)), (Judgement(((0,), (1,))),), where=f"f:{i}") for i, (p, c, r) in enumerate(texts)
    ]
    store, intake = build(made, make_codec(make.tokenizer()), max_length=30)
    assert dict(intake.dropped) == {
        "chosen too long": 1,
        "rejected too long": 1,
        "prompt too long": 1,
        "both responses too long": 1,
    }
    assert intake.read == 5 and len(store) == 1 and list(intake.kept) == [0] and "f:1" in str(intake.refused[0])


def test_even_groups_are_as_few_and_the_largest_is_as_small_as_can_be():
    """Every limit below the one found needs one group more."""
    store = make.store(10, k=3)
    cost = {r: int(c) for r, c in enumerate(tokens_of(store, range(10)))}
    for micro in (1, 70, 100, 170, 260, 10_000):
        plain, even = split(store, range(10), micro), split(store, range(10), micro, even=True)
        assert [r for g in even for r in g] == list(range(10)) and len(even) == len(plain)
        largest = [max(sum(cost[r] for r in g) for g in groups) for groups in (plain, even)]
        assert largest[1] <= largest[0]
        if largest[1] > max(cost.values()):
            assert len(split(store, range(10), largest[1] - 1)) > len(even)
