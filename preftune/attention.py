"""Attention over segments: a token sees its prefix chain in full and its own segment causally.

Registered with transformers as the attention implementations NAME and FLEX. The segment table arrives as a forward argument of every
layer, never as a global: a checkpointed backward pass runs the layer again and must see the same table. Without a table the function
is transformers' own SDPA, so that the same loaded model also generates. Three ways, equal in tests: `merged` on a CPU, which computes
only what is seen and needs no mask; `flexed` on a GPU where it was asked for (--compile), which computes only blocks in which something
is seen; one masked SDPA per tree elsewhere, for small trees and where a sliding window cuts a chain. torch and transformers' two
registries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .batches import Segments, send
from .errors import ModelError

NAME, FLEX = "preftune", "preftune-flex"
BLOCK = 128  # scores on a side of a piece that FlexAttention takes or leaves as a whole
CALL = 1 << 19  # scores times head width that one more kernel call, forward and back, costs (bench: 0.12 ms against 0.14 us a score of 512)

Block = tuple[slice, slice, bool]  # queries, keys, whether causal (then both are the same tokens)


def blocks(segments: Segments) -> tuple[Block, ...]:
    """What is seen, as dense pieces: each segment over itself, causally, then each segment's descendants over it, in full.

    Descendants that stand side by side are one piece, so that K responses read their prompt's keys together.
    """
    spans = [slice(a, b) for a, b in zip(segments.starts, segments.ends, strict=True)]
    below: list[list[slice]] = [[] for _ in spans]
    for s, span in enumerate(spans):
        for ancestor in segments.chain(s)[:-1]:
            known = below[ancestor]
            if known and known[-1].stop == span.start:
                known[-1] = slice(known[-1].start, span.stop)
            else:
                known.append(span)
    across = [(queries, keys, False) for keys, many in zip(spans, below, strict=True) for queries in many]
    pieces = [(span, span, True) for span in spans] + across
    return tuple(piece for piece in pieces if all(part.stop > part.start for part in piece[:2]))


class _Merged(torch.autograd.Function):
    """Attention as a sum of blocks, each by the flash kernel, joined by their log-sum-exps.

    softmax over a union of keys is the blocks' softmaxes weighted by exp(lse_block - lse_all). Backward, a block's weights are
    exp(scores - lse_all): the kernel's own backward given the joint output and log-sum-exp (as in arXiv:2310.01889). It ignores the
    gradient of the log-sum-exp, which here is not an output. Keys of grouped heads are expanded, not copied.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: tuple[Block, ...], scale: float | None) -> Tensor:
        """query (G_kv, G, T, d), key and value (G_kv, 1, T, d) -> (G_kv, G, T, d)."""
        q, k, v = _wide(query), _wide(key), _wide(value)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = out.new_empty(out.shape[:-1])
        for rows, columns, causal in parts:
            piece, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, rows], _spread(k, columns, q), _spread(v, columns, q), 0.0, causal, scale=scale
            )
            if causal:
                out[:, :, rows], lse[:, :, rows] = piece, weight
            else:
                both = torch.logaddexp(lse[:, :, rows], weight)
                out[:, :, rows] *= (lse[:, :, rows] - both).exp_()[..., None]
                out[:, :, rows].addcmul_(piece, (weight - both).exp_()[..., None])
                lse[:, :, rows] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        q, k, v, slope = _wide(query), _wide(key), _wide(value), _wide(slope)
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for rows, columns, causal in ctx.parts:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                slope[:, :, rows], q[:, :, rows], _spread(k, columns, q), _spread(v, columns, q), out[:, :, rows], lse[:, :, rows],
                0.0, causal, scale=ctx.scale)  # fmt: skip
            grads[0][:, :, rows] += dq
            grads[1][:, :, columns] += dk.sum(1, keepdim=True)
            grads[2][:, :, columns] += dv.sum(1, keepdim=True)
        return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """fp32 for shorter formats: without matrix units for them the CPU kernel is slower in bf16 (docs/speed.md)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _spread(x: Tensor, columns: slice, query: Tensor) -> Tensor:
    """One key head for its group of query heads, without a copy."""
    return x[:, :, columns].expand(-1, query.shape[1], -1, -1)


def merged(query: Tensor, key: Tensor, value: Tensor, parts: tuple[Block, ...], scale: float | None = None) -> Tensor:
    """Attention over these blocks: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d). CPU only.

    Every query needs a causal block of its own, which comes before others of its rows.
    """
    heads, groups = query.shape[1], key.shape[1]
    out = _Merged.apply(query[0].unflatten(0, (groups, heads // groups)), key[0][:, None], value[0][:, None], parts, scale)
    return out.flatten(0, 1).transpose(0, 1)[None]


def sees(query: Sequence[Tensor], key: Sequence[Tensor], window: int | None) -> Tensor:
    """Which queries see which keys, bool: (number, end, position) of both as in `Segments.marks`, broadcast against each other.

    With a sliding window, distance is counted in positions along the chain, so a packed response sees what it would see in a row.
    """
    seen = (key[0] <= query[0]) & (query[0] < key[1]) & (key[2] <= query[2])
    return seen if window is None else seen & (query[2] - key[2] < window)


def tree_mask(segments: Segments, tree: tuple[int, int], window: int | None, device: torch.device) -> Tensor | None:
    """(n, n) bool, True where a token of the tree may look; None where plain causal attention says the same."""
    members = [s for s in range(len(segments.starts)) if tree[0] <= segments.starts[s] < tree[1]]
    longest = max(_length(segments, s) for s in members)
    if len(members) == 1 and (window is None or longest <= window):
        return None
    marks = send(segments.marks[:, slice(*tree)], device)
    return sees(marks[:, :, None], marks[:, None, :], None if window is None or longest <= window else window)


def _length(segments: Segments, segment: int) -> int:
    """Tokens of a segment and all before it."""
    return sum(segments.ends[c] - segments.starts[c] for c in segments.chain(segment))


def _plan(segments: Segments, window: int | None, query: Tensor, flex: bool) -> Any:
    """How this batch is attended to, made once for all layers with this window: blocks for `merged`, a mask for `flexed`, or one per tree.

    Blocks where they save more scores than their calls cost; on small trees a mask is quicker.
    """
    if window not in segments.plans:
        parts = blocks(segments)
        seen = sum((q.stop - q.start) * (k.stop - k.start) // (2 if causal else 1) for q, k, causal in parts)
        saved = (sum((b - a) ** 2 for a, b in segments.trees) - seen) * query.shape[1] * query.shape[3]
        short = window is None or all(_length(segments, s) <= window for s in range(len(segments.starts)))
        worth = saved > (len(parts) - len(segments.trees)) * CALL
        if flex:
            segments.plans[window] = block_mask(segments, None if short else window, query.device)
        elif short and worth and query.device.type == "cpu":
            segments.plans[window] = parts
        else:
            segments.plans[window] = {tree: tree_mask(segments, tree, window, query.device) for tree in segments.trees}
    return segments.plans[window]


def segment_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, segments: Segments | None = None,
                      sliding_window: int | None = None, flex: bool = False, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one layer.

    Args:
        query: (1, H, T, d) where a table is given. key, value: (1, H_kv, T, d).
        segments: the table, or None for an ordinary forward or generation.
        sliding_window: the layer's window in positions, or None. flex: whether `flexed` is to compute it.

    Returns:
        (1, T, H, d) and None for the weights.

    Raises:
        ModelError: the layer needs soft-capping or attention sinks, which SDPA does not do.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} needs attention soft-capping or sinks, which packed attention does not offer")
    if segments is None:
        if query.shape[2] == 1 and query.device.type == "cpu" and not dropout:
            return one_token(query, key, value, attention_mask, scaling).transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if segments.seen is not None:
        segments.seen.append(int(getattr(module, "layer_idx", -1)))
    plan = _plan(segments, sliding_window, query, flex)
    if isinstance(plan, tuple):
        return merged(query, key, value, plan, scaling).contiguous(), None
    return (masked if isinstance(plan, dict) else flexed)(query, key, value, plan, scaling), None


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of a single new token as two matrix products: what generation does at every step. On a CPU torch's kernel takes 4 to 18
    times as long for it in bf16, and copies the keys of grouped heads.

    Args:
        query: (B, H, 1, d). key, value: (B, H_kv, T, d). mask: (B or 1, 1, 1, T), True where seen or added to the scores, or None.

    Returns:
        (B, H, 1, d)
    """
    rows, heads, _, size = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.view(rows, key.shape[1], -1, size) @ key.transpose(-1, -2)).to(wide) * (size**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).view(rows, heads, 1, size)


def masked(
    query: Tensor, key: Tensor, value: Tensor, masks: dict[tuple[int, int], Tensor | None], scale: float | None = None
) -> Tensor:
    """The same attention by one SDPA per tree under its mask: shapes as `merged`."""
    groups = query.shape[1] // key.shape[1]
    out = []
    for tree, mask in masks.items():
        rows = slice(*tree)
        keys, values = repeat_kv(key[:, :, rows], groups), repeat_kv(value[:, :, rows], groups)
        out.append(F.scaled_dot_product_attention(query[:, :, rows], keys, values, attn_mask=mask, is_causal=mask is None,
                                                  scale=scale))  # fmt: skip
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def grid(tokens: int) -> int:
    """Tokens to compute where a kernel is compiled for a length: up to a multiple of BLOCK and of an eighth of the power of two above,
    so that packed batches of any size have few lengths."""
    step = max(BLOCK, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


def block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """What is seen, for `flexed`: pieces of BLOCK x BLOCK scores of which nothing, all or some is seen, and `sees` for the latter.

    Counted on the processor from the table alone; no score-sized tensor is made. What fills the grid up sees itself and is not seen.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (number, end, _), starts, ends = segments.kin, np.array(segments.starts), np.array(segments.ends)
    length = grid(int(ends[-1]))
    edges = np.arange(0, length, BLOCK)
    share = np.clip(np.minimum(ends[:, None], edges + BLOCK) - np.maximum(starts[:, None], edges), 0, None).astype(np.float64)
    below = (number[None] < number[:, None]) & (number[:, None] < end[None])  # of (descendant, ancestor)
    seen = share.T @ below @ share + np.tril(share.T @ share, -1)  # on the diagonal never all
    whole = (seen == BLOCK**2) & (window is None)
    some = ((seen > 0) | np.eye(len(edges), dtype=bool)) & ~whole
    rest = torch.arange(length - int(ends[-1]), dtype=torch.int32)
    fill = torch.stack([int(end.max()) + rest, int(end.max()) + rest + 1, rest])
    first, last, place = send(torch.cat([segments.marks, fill], 1), device)

    def rule(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees((first[q], last[q], place[q]), (first[k], last[k], place[k]), window)

    def listed(held: np.ndarray) -> Iterator[Tensor]:
        for values in (held.sum(-1), np.argsort(~held, axis=-1, kind="stable")):
            yield send(torch.from_numpy(values.astype(np.int32))[None, None], device)

    return BlockMask.from_kv_blocks(*listed(some), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length))


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flexed(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None = None) -> Tensor:
    """The same attention by FlexAttention under a `block_mask`: shapes as `merged`. On a processor it is not compiled: for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    length = query.shape[2]
    wide = [F.pad(x, (0, 0, 0, mask.seq_lengths[0] - length)) for x in (query, key, value)]
    attend = flex_attention if query.device.type == "cpu" else _compiled()
    out = attend(*wide, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out[:, :, :length].transpose(1, 2).contiguous()


AttentionInterface.register(NAME, segment_attention)
AttentionInterface.register(FLEX, partial(segment_attention, flex=True))
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(FLEX, sdpa_mask)
