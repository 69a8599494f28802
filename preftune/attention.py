"""Attention over segments: a token sees its prefix chain in full and its own segment causally.

Registered with transformers as the attention implementation 'preftune'. The segment table arrives as a forward argument of every
layer, never as a global: a checkpointed backward pass runs the layer again and must see the same table. Without a table the function
is transformers' own SDPA, so that the same loaded model also generates. Two ways, equal in tests: `merged` on a CPU, which computes
only what is seen and needs no mask; one masked SDPA per tree elsewhere, for small trees and where a sliding window cuts a chain. torch and
transformers' two registries only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .batches import Segments
from .errors import ModelError

NAME = "preftune"
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


def tree_mask(segments: Segments, tree: tuple[int, int], window: int | None, device: torch.device) -> Tensor | None:
    """(n, n) bool, True where a token of the tree may look; None where plain causal attention says the same.

    With a sliding window, distance is counted in positions along the chain, so a packed response sees what it would see in a row.
    """
    start, end = tree
    members = [s for s in range(len(segments.starts)) if start <= segments.starts[s] < end]
    longest = max(_length(segments, s) for s in members)
    if len(members) == 1 and (window is None or longest <= window):
        return None
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    position = torch.empty(end - start, dtype=torch.long)
    for s in members:
        a, b = segments.starts[s] - start, segments.ends[s] - start
        depth = 0
        for c in segments.chain(s)[:-1]:
            mask[a:b, segments.starts[c] - start : segments.ends[c] - start] = True
            depth += segments.ends[c] - segments.starts[c]
        mask[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        position[a:b] = torch.arange(depth, depth + b - a)
    if window is not None and longest > window:
        mask &= position[:, None] - position[None, :] < window
    return mask.to(device)


def _length(segments: Segments, segment: int) -> int:
    """Tokens of a segment and all before it."""
    return sum(segments.ends[c] - segments.starts[c] for c in segments.chain(segment))


def _plan(segments: Segments, window: int | None, query: Tensor) -> tuple[Block, ...] | dict[tuple[int, int], Tensor | None]:
    """How this batch is attended to, made once for all layers with this window: blocks for `merged`, or a mask per tree.

    Blocks where they save more scores than their calls cost; on small trees a mask is quicker.
    """
    if window not in segments.plans:
        parts = blocks(segments)
        seen = sum((q.stop - q.start) * (k.stop - k.start) // (2 if causal else 1) for q, k, causal in parts)
        saved = (sum((b - a) ** 2 for a, b in segments.trees) - seen) * query.shape[1] * query.shape[3]
        short = window is None or all(_length(segments, s) <= window for s in range(len(segments.starts)))
        worth = saved > (len(parts) - len(segments.trees)) * CALL
        segments.plans[window] = (parts if short and worth and query.device.type == "cpu" else
                                  {tree: tree_mask(segments, tree, window, query.device) for tree in segments.trees})  # fmt: skip
    return segments.plans[window]


def segment_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, segments: Segments | None = None,
                      sliding_window: int | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one layer.

    Args:
        query: (1, H, T, d) where a table is given. key, value: (1, H_kv, T, d).
        segments: the table, or None for an ordinary forward or generation.
        sliding_window: the layer's window in positions, or None.

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
    plan = _plan(segments, sliding_window, query)
    if isinstance(plan, tuple):
        return merged(query, key, value, plan, scaling).contiguous(), None
    return masked(query, key, value, plan, scaling), None


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


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
