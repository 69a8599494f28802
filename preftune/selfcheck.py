"""Before the first step: do the numbers that this run stands on agree with a second way of getting them?

Packed log-probs against the model's own `forward().logits` on single rows; the loss at policy = reference against its analytic
start; the reference column against a fresh computation; masks, BOS and EOS. A failure stops the run and says what to do.

    check(model, store, records, objective, columns, codec, dtype="fp32")   # -> {'packed_error': 3e-6, ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .batches import Batch, make_batch, totals_of
from .errors import SelfCheckError
from .objectives import Columns, Objective, total
from .readout import hidden_states, log_odds, packs, scalars, token_logps
from .store import Store
from .tokens import Codec

# Largest difference of one token's log-prob between two correct ways of computing it. bf16 keeps 8 significant bits of a logit.
TOLERANCE = {"fp32": 1e-4, "fp64": 1e-8, "bf16": 0.5}
START_TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10, "bf16": 0.05}


def own_logps(model: Any, store: Store, batch: Batch) -> torch.Tensor:
    """log pi of every target of a batch by the model's own forward pass, one plain row a response: (N,)."""
    out = torch.empty(len(batch.slot), dtype=torch.float32, device=batch.tokens.device)
    slots = batch.slot.cpu().numpy()
    segments = np.searchsorted(store.start, slots, side="right") - 1
    for segment in np.unique(segments):
        ids = np.concatenate([store.tokens[store.start[s] : store.start[s + 1]] for s in store.chain(int(segment))]).astype(
            np.int64
        )
        row = torch.from_numpy(ids)[None].to(batch.tokens.device)
        logits = model(input_ids=row, use_cache=False).logits[0].float()
        mine = np.flatnonzero(segments == segment)
        offset = len(ids) - int(store.start[segment + 1])  # store slot -> place in the row
        place = torch.from_numpy(slots[mine] + offset).to(row.device)
        logp = logits[place - 1].log_softmax(-1)
        out[torch.from_numpy(mine).to(row.device)] = logp.gather(-1, row[0, place][:, None])[:, 0]
    return out


def probe(store: Store, records: Sequence[int] | np.ndarray, *, tokens: int = 2048, most: int = 4) -> list[int]:
    """A few records to check on: spread over the data, short enough to be quick."""
    chosen: list[int] = []
    spent = 0
    for r in np.asarray(records)[np.linspace(0, len(records) - 1, min(most * 4, len(records))).astype(int)]:
        cost = int(store.start[store.record_start[r + 1]] - store.start[store.record_start[r]])
        if int(r) not in chosen and (not chosen or spent + cost <= tokens):
            chosen.append(int(r))
            spent += cost
        if len(chosen) == most:
            break
    return chosen


def check(model: Any, store: Store, records: Sequence[int] | np.ndarray, objective: Objective,
          columns: Mapping[str, np.ndarray], codec: Codec, *, dtype: str, device: str, fresh: bool) -> dict[str, float]:  # fmt: skip
    """Run every check; `fresh` says that the policy is still the reference (not so on a resume).

    Returns:
        the largest differences seen, for the manifest.

    Raises:
        SelfCheckError: what disagreed, by how much, and what to do.
    """
    share = packs(model)
    batch = make_batch(store, probe(store, records), columns=columns, share=share).to(device)
    counted = replace(batch, segments=replace(batch.segments, seen=[], plans={}))
    found: dict[str, float] = {}
    with torch.inference_mode():
        logps = token_logps(model, hidden_states(model, counted), counted)
        found["packed_error"] = float((logps.float() - own_logps(model, store, batch)).abs().max())
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    if share and len(counted.segments.seen or []) != layers:
        seen = len(counted.segments.seen or [])
        raise SelfCheckError(
            f"{seen} of {layers} layers read the segment table: this model must not share prompts; please report it"
        )
    _within("packed log-probs and the model's own forward pass", found["packed_error"], TOLERANCE[dtype])
    _check_ids(store, batch, codec, drawn=not fresh)
    if fresh and "reference" in columns:
        found["reference_error"] = float((logps.float() - batch.columns["reference"]).abs().max())
        _within(
            "the reference column and a fresh computation (delete the cached column if it is old)",
            found["reference_error"],
            TOLERANCE[dtype],
        )
    if fresh and objective.start is not None and objective.read == "logps":
        with torch.inference_mode():
            totals = totals_of([batch], 1)
            loss = float(total(objective.terms(objective.score(model, batch), batch.table), totals))
        found["start_loss"], found["start_expected"] = loss, objective.start(batch.table, totals)
        scale = max(1.0, abs(found["start_expected"]))  # a start of 500,000 (SPPO) is not exact to 1e-5
        off = abs(loss - found["start_expected"]) / scale
        _within("the loss at policy = reference and its analytic value", off, START_TOLERANCE[dtype])
    return found


def check_scores(model: Any, store: Store, records: Sequence[int] | np.ndarray, objective: Objective, *, dtype: str,
                 device: str) -> dict[str, float]:  # fmt: skip
    """The scores of a reward model against its class's own forward pass on single rows, and the loss of equal scores against its value.

    Raises SelfCheckError. Returns the largest difference of a score, and that loss where a value is known.
    """
    share = packs(model)
    batch = make_batch(store, probe(store, records), share=share).to(device)
    with torch.inference_mode():
        found = scalars(model, hidden_states(model, batch), batch)
        segments = [s for r in dict.fromkeys(batch.table.record.tolist()) for s in range(store.record_start[r], store.record_start[r + 1])
                    if store.response[s] >= 0]  # fmt: skip
        rows = [np.concatenate([store.tokens[store.start[c] : store.start[c + 1]] for c in store.chain(s)]) for s in segments]
        own = [model(input_ids=torch.from_numpy(row.astype(np.int64))[None].to(device), use_cache=False).logits for row in rows]
    error = float((found - log_odds(torch.cat(own).double())).abs().max())
    _within("the scores and the model's own forward pass", error, TOLERANCE[dtype] * max(1.0, float(found.abs().max())))
    out = {"score_error": error}
    if objective.start is not None:
        zero, totals = torch.zeros_like(found), totals_of([batch], 1)
        equal = Columns(zero, zero, torch.ones_like(zero), score=batch.table.score)
        out["start_loss"] = float(total(objective.terms(equal, batch.table), totals))
        out["start_expected"] = objective.start(batch.table, totals)
        _within("the loss of equal scores and its analytic value", abs(out["start_loss"] - out["start_expected"]), START_TOLERANCE["fp64"])
    return out


def _within(what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # also catches NaN
        raise SelfCheckError(f"self-check: {what} differ by {difference:.3g}, more than {tolerance:g}; nothing was trained")


def _check_ids(store: Store, batch: Batch, codec: Codec, *, drawn: bool) -> None:
    """Targets are exactly the trained ids; the first is read from the prompt's last state; one BOS; an end token only at the end.

    drawn: the answers are the policy's own, in which a BOS is what it said.
    """
    tokens, slots = batch.tokens.cpu().numpy(), batch.slot.cpu().numpy()
    segments = np.searchsorted(store.start, slots, side="right") - 1
    for segment in np.unique(segments):
        where = f"record {store.where[int(np.searchsorted(store.record_start, segment, side='right')) - 1]}"
        a, b = int(store.start[segment]), int(store.start[segment + 1])
        mine = slots[segments == segment]
        if not np.array_equal(np.sort(mine), a + np.flatnonzero(store.trained[a:b])):
            raise SelfCheckError(f"self-check: {where}: the trained tokens are not the response's; please report it")
        before = np.concatenate([store.tokens[store.start[s] : store.start[s + 1]] for s in store.chain(int(segment))])
        hidden = batch.hidden.cpu().numpy()[segments == segment]
        place = mine - b + len(before)
        if not np.array_equal(tokens[hidden], before[place - 1]):
            raise SelfCheckError(f"self-check: {where}: a token is read from the wrong state; please report it")
        put = before[: len(before) - (b - a)] if drawn else before
        count = int((put == codec.bos).sum()) if codec.bos is not None else 1
        if count != 1:
            raise SelfCheckError(f"self-check: {where}: BOS stands {count} times; try --bos never, or a template without BOS")
        if (before[:-1] == codec.eos).any() and codec.template_name != "tokeniser" and codec.eos != codec.bos:
            raise SelfCheckError(f"self-check: {where}: EOS stands inside the text")
