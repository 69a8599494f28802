"""Attention over segments: a token sees its prefix chain in full and its own segment causally.

Registered with transformers as the attention implementation 'preftune'. The segment table arrives as a forward argument of every
layer, never as a global: a checkpointed backward pass runs the layer again and must see the same table. Without a table the function
is transformers' own SDPA, so that the same loaded model also generates. torch and transformers' two registries only.
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


def tree_mask(segments: Segments, tree: tuple[int, int], window: int | None, device: torch.device) -> Tensor | None:
    """(n, n) bool, True where a token of the tree may look; None where plain causal attention says the same.

    With a sliding window, distance is counted in positions along the chain, so a packed response sees what it would see in a row.
    """
    start, end = tree
    members = [s for s in range(len(segments.starts)) if start <= segments.starts[s] < end]
    longest = max(sum(segments.ends[c] - segments.starts[c] for c in segments.chain(s)) for s in members)
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
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if segments.seen is not None:
        segments.seen.append(int(getattr(module, "layer_idx", -1)))
    groups = query.shape[1] // key.shape[1]
    out = []
    for tree in segments.trees:
        if (tree, sliding_window) not in segments.masks:
            segments.masks[tree, sliding_window] = tree_mask(segments, tree, sliding_window, query.device)
        mask, rows = segments.masks[tree, sliding_window], slice(*tree)
        keys, values = repeat_kv(key[:, :, rows], groups), repeat_kv(value[:, :, rows], groups)
        out.append(F.scaled_dot_product_attention(query[:, :, rows], keys, values, attn_mask=mask, is_causal=mask is None,
                                                  scale=scaling))  # fmt: skip
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
