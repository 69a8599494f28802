"""Responses from a model: cached, batched, a prompt computed once for its responses, seeded per row.

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

SHRINK = 0.9  # rows leave the batch once this share of them is left: what is copied then, a step copies too


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
           temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, k: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Generate side by side, a token a step, until every row has ended or has `max_tokens`.

    A prompt is computed once for its k rows, and rows that have ended leave the batch.

    Args:
        prompts: P lists of ids. ends: per prompt, the ids that end its rows. rows: per row, the number that its randomness is drawn from:
            B = P k numbers, those of a prompt together. temperature: 0 takes the most probable token.

    Yields:
        (B,) ids, (B,) log-probs, (B,) bool alive before this token; what dead rows carry is meaningless.
    """
    device, size = next(model.parameters()).device, len(rows)
    ids, mask = (x.to(device) for x in _padded(prompts))
    mask = None if bool(mask.all()) else mask  # without padding the kernels need none
    position = torch.arange(ids.shape[1], device=device)[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    uniform, stops = _uniforms(seed, rows, max_tokens), [ends[i // k] for i in range(size)]
    live, alive = torch.arange(size), torch.ones(size, dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    for t in range(max_tokens):
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1].float().cpu()
            if t == 0 and k > 1:
                cache.batch_repeat_interleave(k)
                logits, position = logits.repeat_interleave(k, 0), position.expand(len(prompts), -1).repeat_interleave(k, 0)
                mask = None if mask is None else mask.repeat_interleave(k, 0)
        chosen, chances = _draw(logits, uniform[live, t], temperature=temperature, top_p=top_p)
        token, logp = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.float64)
        token[live], logp[live] = chosen, chances.double()
        yield token, logp, alive
        alive = alive & torch.tensor([t not in stop for t, stop in zip(token.tolist(), stops, strict=True)])
        if not alive.any():
            return
        position = position[:, -1:] + 1
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if (left := alive[live]).sum() <= SHRINK * len(live):
            stay = left.nonzero()[:, 0]
            live, there = live[stay], stay.to(device)
            cache.batch_select_indices(there)
            mask, position = None if mask is None else mask[there], position if len(position) == 1 else position[there]
        ids = token[live][:, None].to(device)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(P, longest) ids and mask: padding stands on the left, so that all prompts end together."""
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def sample(model: Any, prompts: Sequence[Sequence[int]], *, ends: Sequence[Sequence[int]], k: int = 1, max_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, rows_at_once: int = 64, numbers: Sequence[int] | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> list[list[Sample]]:  # fmt: skip
    """k responses to each prompt.

    Args:
        prompts: per prompt its ids. ends: per prompt the ids that end a response. max_tokens: longest response, end token included.
        rows_at_once: rows in one forward pass; those of a prompt and prompts of similar length go together. progress: (rows done, rows
            in all).
        numbers: per prompt the number that its randomness is drawn from. Default: its place. So a part of a file can be sampled alone.

    Returns:
        per prompt, its k samples.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[Sample | None]] = [[None] * k for _ in prompts]
    each, several = min(k, rows_at_once), max(1, rows_at_once // k)
    jobs = [(order[a : a + several], range(j, min(j + each, k))) for a in range(0, len(order), several) for j in range(0, k, each)]
    done = 0
    for group, copies in jobs:
        rows = [(i, j) for i in group for j in copies]
        got: list[list[tuple[int, float]]] = [[] for _ in rows]
        for token, logp, alive in stream(model, [prompts[i] for i in group], ends=[ends[i] for i in group], k=len(copies),
                                         rows=[numbers[i] * k + j for i, j in rows], max_tokens=max_tokens, temperature=temperature,
                                         top_p=top_p, seed=seed):  # fmt: skip
            ids, logps = token.tolist(), logp.tolist()
            for row in alive.nonzero()[:, 0].tolist():
                got[row].append((ids[row], logps[row]))
        for (i, j), pieces in zip(rows, got, strict=True):
            found = tuple(t for t, _ in pieces)
            out[i][j] = Sample(found, tuple(p for _, p in pieces), bool(found) and found[-1] in ends[i])
        done += len(rows)
        progress(done, len(prompts) * k)
    return out  # type: ignore[return-value]
