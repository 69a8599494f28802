"""Attention over segments: blocks joined by their log-sum-exps against one masked softmax; values and gradients; both ways of the head."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import make
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from preftune import attention, models, readout
from preftune.batches import Segments, make_batch
from preftune.config import Dpo
from preftune.errors import UsageError
from preftune.stages import dpo

DTYPES = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2}


def inputs(tokens: int, heads: int, groups: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Query, key, value as a layer gives them (the query a transposed view), and a gradient for the output."""
    torch.manual_seed(seed)
    query = torch.randn(1, tokens, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(1, groups, tokens, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    return [query, key, value, torch.randn(1, tokens, heads, 8, dtype=dtype)]


def both(segments: Segments, tokens: int, heads: int, groups: int, dtype: torch.dtype, scale: float | None = None):
    """(value, gradients) by blocks and by masks."""
    query, key, value, slope = inputs(tokens, heads, groups, dtype)
    masks = {tree: attention.tree_mask(segments, tree, None, torch.device("cpu")) for tree in segments.trees}
    ways = (
        attention.merged(query, key, value, attention.blocks(segments), scale),
        attention.masked(query, key, value, masks, scale),
    )
    return [(out.detach(), *torch.autograd.grad((out * slope).sum(), (query, key, value))) for out in ways]


def table(lengths: list[int], prefix: list[int]) -> Segments:
    """Segments of these lengths, one after the other; a tree begins where a segment has no prefix."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    starts = [e - n for e, n in zip(ends, lengths, strict=True)]
    roots = [s for s, p in zip(starts, prefix, strict=True) if p < 0] + [ends[-1]]
    return Segments(tuple(starts), tuple(ends), tuple(prefix), tuple(pairwise(roots)))


def test_blocks_by_hand():
    """Prompt 0:3 with responses 3:5 and 5:9, the second continued by 9:10; then a row alone."""
    segments = table([3, 2, 4, 1, 6], [-1, 0, 0, 2, -1])
    own = [(0, 3), (3, 5), (5, 9), (9, 10), (10, 16)]
    assert attention.blocks(segments) == (*((slice(a, b), slice(a, b), True) for a, b in own),
                                          (slice(3, 10), slice(0, 3), False), (slice(9, 10), slice(5, 9), False))  # fmt: skip
    batch = make_batch(make.store(6, k=3), range(6))
    seen = sum((q.stop - q.start) * (k.stop - k.start) if not causal else (q.stop - q.start) * (q.stop - q.start + 1) // 2
               for q, k, causal in attention.blocks(batch.segments))  # fmt: skip
    masks = [attention.tree_mask(batch.segments, tree, None, torch.device("cpu")) for tree in batch.segments.trees]
    assert seen == sum(int(mask.sum()) for mask in masks), "blocks compute exactly what the mask lets through"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_blocks_equal_masks(dtype, groups):
    segments = table([3, 2, 4, 1, 6, 70, 40, 33], [-1, 0, 0, 2, -1, -1, 5, 5])
    mine, plain = both(segments, 159, 4, groups, dtype, scale=0.3)
    for a, b in zip(mine, plain, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert float((a - b).abs().max()) <= DTYPES[dtype] * max(1.0, float(b.abs().max()))


def forest(data: st.DataObject) -> tuple[list[int], list[int]]:
    """Lengths and parents of trees of any depth, empty segments too, where a child comes after its parent and inside its tree."""
    lengths, prefix, root = [], [], 0
    for i in range(data.draw(st.integers(1, 9))):
        new = i == 0 or data.draw(st.booleans())
        root = i if new else root
        prefix.append(-1 if new else data.draw(st.integers(root, i - 1)))
        lengths.append(data.draw(st.integers(1 if new else 0, 6)))
    return lengths, prefix


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_forest(data):
    lengths, prefix = forest(data)
    mine, plain = both(table(lengths, prefix), sum(lengths), 2, 1, torch.float64)
    assert all(float((a - b).abs().max()) < 1e-12 for a, b in zip(mine, plain, strict=True))


def test_gradients_are_those_of_finite_differences():
    segments = table([2, 2, 1], [-1, 0, 0])
    query, key, value, _ = inputs(5, 2, 1, torch.float64)
    parts = attention.blocks(segments)
    assert torch.autograd.gradcheck(lambda q, k, v: attention.merged(q, k, v, parts), (query, key, value))


def test_large_scores_stay_finite():
    """Scores in the thousands: the blocks' weights are differences of log-sum-exps, never sums of exponentials."""
    segments = table([3, 2, 4], [-1, 0, 0])
    query, key, value, _ = inputs(9, 2, 2, torch.float64)
    masks = {(0, 9): attention.tree_mask(segments, (0, 9), None, torch.device("cpu"))}
    for size in (1e3, 1e4):
        mine = attention.merged(query * size, key, value, attention.blocks(segments)).detach()
        assert torch.isfinite(mine).all()
        assert float((mine - attention.masked(query * size, key, value, masks).detach()).abs().max()) < 1e-8


def test_the_plan_is_blocks_where_they_save_work():
    """A prompt of 200 with two answers of 50 is cheaper in blocks; short ones, a window that cuts, and other devices take masks."""
    long, small = table([200, 50, 50], [-1, 0, 0]), table([20, 5, 5], [-1, 0, 0])
    wide = torch.empty(1, 8, 300, 64)
    assert isinstance(attention._plan(long, None, wide, False), tuple) and isinstance(attention._plan(long, 250, wide, False), tuple)
    assert isinstance(attention._plan(long, 249, wide, False), dict)
    assert isinstance(attention._plan(small, None, wide, False), dict)
    assert isinstance(attention._plan(table([200, 50, 50], [-1, 0, 0]), None, wide.to("meta"), False), dict)


# ---------------------------------------------------------------- FlexAttention


def chained(segments: Segments, tokens: int, window: int | None) -> torch.Tensor:
    """Who sees whom, token by token, from the chains alone."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in range(len(segments.starts)):
        row = [t for c in segments.chain(s) for t in range(segments.starts[c], segments.ends[c])]
        for i, q in enumerate(row):
            if q >= segments.starts[s]:
                mask[q, row[max(0, i + 1 - (window or i + 1)) : i + 1]] = True
    return mask


FOREST = table([130, 60, 90, 10, 300, 70, 40, 33, 0, 5], [-1, 0, 0, 2, -1, -1, 5, 5, 5, 8])


@pytest.mark.parametrize("window", [None, 1, 45, 200])
def test_block_masks_are_the_chains(window):
    """The rule is who sees whom, and the pieces are those that torch finds by asking the rule for every score."""
    mask = attention.block_mask(FOREST, window, torch.device("cpu"))
    length, tokens = mask.seq_lengths[0], FOREST.ends[-1]
    assert tokens == 738 and length == attention.grid(tokens) == 768
    seen = create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
    assert torch.equal(seen[:tokens, :tokens], chained(FOREST, tokens, window))
    assert torch.equal(seen[tokens:, tokens:], torch.eye(length - tokens, dtype=torch.bool)) and not seen[:tokens, tokens:].any()
    found = create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu")
    if window is None:
        assert int(found.full_kv_num_blocks.sum()) == 1 and int(found.kv_num_blocks.sum()) < 21
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                     "full_q_num_blocks", "full_q_indices"):  # fmt: skip
            assert torch.equal(getattr(mask, name), getattr(found, name)), name
    else:  # a window only narrows what the rule says: no piece counts as seen as a whole, none that holds something is left out
        assert not mask.full_kv_num_blocks.any() and not (found.to_dense().bool() & ~mask.to_dense().bool()).any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_forest_by_its_marks(data):
    lengths, prefix = forest(data)
    segments, window = table(lengths, prefix), data.draw(st.one_of(st.none(), st.integers(1, 9)))
    marks = segments.marks
    assert torch.equal(attention.sees(marks[:, :, None], marks[:, None], window), chained(segments, sum(lengths), window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "groups", "window"), [(4, 4, None), (4, 2, None), (4, 1, 45)])
def test_flex_equals_masks(heads, groups, window, monkeypatch):
    """Uncompiled, the same rule and the same gradients; torch refuses the latter on a processor though it can compute them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    query, key, value, slope = inputs(FOREST.ends[-1], heads, groups, torch.float32)
    masks = {tree: attention.tree_mask(FOREST, tree, window, torch.device("cpu")) for tree in FOREST.trees}
    ways = (attention.flexed(query, key, value, attention.block_mask(FOREST, window, torch.device("cpu")), 0.3),
            attention.masked(query, key, value, masks, 0.3))  # fmt: skip
    found = [(out.detach(), *torch.autograd.grad((out * slope).sum(), (query, key, value))) for out in ways]
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_a_model_by_flex_is_the_same_model(kind):
    """Grouped heads, and layers with a window of 8 beside layers with none; the table goes to the layers as before."""
    model, batch = models.prepare(make.model(kind)), make_batch(make.store(5, k=3), range(5))
    with torch.no_grad():
        plain = readout.token_logps(model, readout.hidden_states(model, batch), batch)
        again = replace(batch, segments=replace(batch.segments, plans={}))
        mine = readout.token_logps(model, readout.hidden_states(models.use_flex(model), again), again)
    assert float((mine - plain).abs().max()) < 1e-5 and {type(plan).__name__ for plan in again.segments.plans.values()} == {"BlockMask"}


def test_flex_is_refused_where_it_can_do_nothing(tmp_path):
    with pytest.raises(UsageError, match="--attention flex has no effect: one row per response, since architecture 'bloom'"):
        models.use_flex(models.prepare(make.model("bloom")))
    model, pairs = make.write_model(tmp_path / "model"), make.write_pairs(tmp_path / "pairs.jsonl", 6)
    with pytest.raises(UsageError, match="--attention flex: FlexAttention has no gradients but on CUDA, and here is cpu"):
        dpo.run(Dpo(model=str(model), data=[str(pairs)], output=str(tmp_path / "run"), attention="flex", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_lengths_on_the_grid_are_few():
    assert [attention.grid(n) for n in (1, 128, 129, 1000, 1025, 8191, 8192, 8193)] == [128, 128, 256, 1024, 1280, 8192, 8192, 10240]
    assert len({attention.grid(n) for n in range(4097, 8193)}) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("heads", "groups", "window"), [(4, 4, None), (4, 2, None), (4, 1, 45)])
def test_compiled_flex_on_a_gpu_equals_masks(heads, groups, window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, FOREST.ends[-1], 64, device="cuda", requires_grad=True) for h in (heads, groups, groups))
    slope = torch.randn(1, FOREST.ends[-1], heads, 64, device="cuda")
    masks = {tree: attention.tree_mask(FOREST, tree, window, query.device) for tree in FOREST.trees}
    ways = (attention.flexed(query, key, value, attention.block_mask(FOREST, window, query.device)),
            attention.masked(query, key, value, masks))  # fmt: skip
    found = [(out.detach(), *torch.autograd.grad((out * slope).sum(), (query, key, value))) for out in ways]
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 1e-2 * float(b.abs().max())  # TF32 inside the kernel


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, "seen", "added"])
def test_one_token_is_the_kernel_s_attention(dtype, groups, mask):
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 4, 1, 8, dtype=dtype), torch.randn(2, 3, groups, 5, 8, dtype=dtype)
    seen = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()[:, None, None]
    given = {None: None, "seen": seen, "added": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)}[mask]
    wanted = F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)), attn_mask=given if mask == "seen" or mask is None
                                            else given.double(), scale=0.7, enable_gqa=True)  # fmt: skip
    found = attention.one_token(query, key, value, given, 0.7)
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=DTYPES[dtype])
    through, _ = attention.segment_attention(torch.nn.Identity(), query, key, value, given, scaling=0.7)
    assert torch.equal(through, found.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 7, 29, 30, 1000])
def test_the_linear_head_equals_autograd(dtype, bias, size):
    """30 targets of 50 words in chunks of `size`: value and every gradient."""
    torch.manual_seed(0)
    states, weight = (torch.randn(n, 16, dtype=dtype, requires_grad=True) for n in (30, 50))
    shift = torch.randn(50, dtype=dtype, requires_grad=True) if bias else None
    target, slope = torch.randint(50, (30,)), torch.randn(30)
    asked = [x for x in (states, weight, shift) if x is not None]
    mine = readout._LinearLogps.apply(states, weight, shift, target, size)
    plain = readout._logps(lambda x: F.linear(x, weight, shift), states, target)
    assert mine.dtype == plain.dtype and float((mine - plain).detach().abs().max()) <= DTYPES[dtype]
    grads = [torch.autograd.grad((out * slope).sum(), asked) for out in (mine, plain)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= DTYPES[dtype] * float(b.abs().max())


def test_a_frozen_head_gets_no_gradient():
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    out = readout._LinearLogps.apply(states, weight, None, torch.tensor([0, 1, 2, 3, 4]), 2)
    out.sum().backward()
    assert states.grad is not None and weight.grad is None


def test_which_heads_are_plain():
    plain = models.prepare(make.model())
    assert readout._plain_linear(plain) is plain.get_output_embeddings()
    hooked = models.prepare(make.model())
    hooked.get_output_embeddings().register_forward_hook(lambda m, i, o: None)
    assert readout._plain_linear(hooked) is None
    scaled = models.prepare(make.model("granite"))
    assert readout._plain_linear(scaled) is None
    adapted = models.add_lora(models.prepare(make.model()), rank=2, alpha=None, targets="lm_head", seed=0)
    assert readout._plain_linear(adapted) is None
