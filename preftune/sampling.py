"""Responses from a model: cached, batched, seeded per row.

Every random draw of row i is a function of (seed, i) alone, so a sample does not depend on how rows are batched together.
Works on token ids; text comes in and goes out through `tokens`. The key-value cache is transformers'.

    rows = sample(model, [prompt_ids], ends=[(2,)], k=4, max_tokens=64, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response. `ids` include the end token where `finished`; `logps` are those of the sampling distribution, nats."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


def _uniforms(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """(rows, count) uniform numbers; row r's are its own stream."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, int(r)]).random(count) for r in rows]))


def _draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw from softmax(logits / temperature) cut to its `top_p` nucleus. (B, V), (B,) -> ids, log-probs."""
    if temperature == 0:
        best = logits.argmax(-1)
        return best, torch.zeros(len(best), dtype=torch.float64)
    logp = (logits.double() / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p  # mass before a token already reaches top_p
        logp = logp.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)
    mass = logp.exp().cumsum(-1)
    # Scaling by the total keeps the draw inside the vocabulary when rounding leaves the last sum just under one.
    ids = torch.searchsorted(mass, (uniform.to(mass) * mass[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids, logp.gather(-1, ids[:, None])[:, 0]


def stream(model: Any, prompts: Sequence[Sequence[int]], *, ends: Sequence[Sequence[int]], rows: Sequence[int], max_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Generate side by side, a token a step, until every row has ended or has `max_tokens`.

    Args:
        prompts: B lists of ids. ends: per row, the ids that end it. rows: per row, the number that its randomness is drawn from.
        temperature: 0 takes the most probable token.

    Yields:
        (B,) ids, (B,) log-probs, (B,) bool alive before this token; what dead rows carry is meaningless.
    """
    device = next(model.parameters()).device
    longest, size = max(map(len, prompts)), len(prompts)
    ids = torch.zeros(size, longest, dtype=torch.long)
    mask = torch.zeros(size, longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):  # left padding, hidden by the mask, with positions that start at the prompt
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    uniform = _uniforms(seed, rows, max_tokens)
    alive = torch.ones(size, dtype=torch.bool)
    cache, ids, mask = DynamicCache(config=model.config), ids.to(device), mask.to(device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for t in range(max_tokens):
        with torch.inference_mode():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        token, logp = _draw(out.logits[:, -1].float().cpu(), uniform[:, t], temperature=temperature, top_p=top_p)
        yield token, logp, alive
        alive = alive & torch.tensor([t not in stop for t, stop in zip(token.tolist(), ends, strict=True)])
        if not alive.any():
            return
        ids = token[:, None].to(device)
        mask = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
        position = position[:, -1:] + 1


def sample(model: Any, prompts: Sequence[Sequence[int]], *, ends: Sequence[Sequence[int]], k: int = 1, max_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, rows_at_once: int = 64, numbers: Sequence[int] | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> list[list[Sample]]:  # fmt: skip
    """k responses to each prompt.

    Args:
        prompts: per prompt its ids. ends: per prompt the ids that end a response. max_tokens: longest response, end token included.
        rows_at_once: rows in one forward pass; rows of similar prompt length go together. progress: (rows done, rows in all).
        numbers: per prompt the number that its randomness is drawn from. Default: its place. So a part of a file can be sampled alone.

    Returns:
        per prompt, its k samples.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    jobs = sorted(((len(p), i, j) for i, p in enumerate(prompts) for j in range(k)))
    out: list[list[Sample | None]] = [[None] * k for _ in prompts]
    for a in range(0, len(jobs), rows_at_once):
        group = [(i, j) for _, i, j in jobs[a : a + rows_at_once]]
        got: list[list[tuple[int, float]]] = [[] for _ in group]
        for token, logp, alive in stream(model, [prompts[i] for i, _ in group], ends=[ends[i] for i, _ in group],
                                         rows=[numbers[i] * k + j for i, j in group], max_tokens=max_tokens, temperature=temperature,
                                         top_p=top_p, seed=seed):  # fmt: skip
            for row in alive.nonzero()[:, 0].tolist():
                got[row].append((int(token[row]), float(logp[row])))
        for (i, j), pieces in zip(group, got, strict=True):
            ids = tuple(t for t, _ in pieces)
            out[i][j] = Sample(ids, tuple(p for _, p in pieces), bool(ids) and ids[-1] in ends[i])
        progress(min(a + rows_at_once, len(jobs)), len(jobs))
    return out  # type: ignore[return-value]
