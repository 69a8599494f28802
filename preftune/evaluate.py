"""Numbers about a model: held-out preference metrics, and reward and KL on fresh samples of the model itself.

Everything is a sum over items in float64 and its count, so batch sizes do not matter; every rate has an interval.

    held_out(model, objective, store, records, columns)      # {'loss': .., 'rewards/accuracies': .., ...}
    on_policy(model, reference, codec, prompts, rule=..., max_tokens=64, seed=0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .audit import Z95, share_of
from .batches import join, make_batch, split, totals_of
from .objectives import Objective, join_columns, total
from .readout import as_reference, hidden_states, packs, prefix_kl, response_sums, token_logps
from .records import Response, Text
from .sampling import sample
from .store import Store, from_ids
from .tokens import Codec, decode_response, encode_prompt, end_ids

Reward = Callable[[Sequence[Text], Sequence[Response]], np.ndarray]  # prompts, responses -> rewards (n,): `rewards.Scorer` is one


def mean_se(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean of at least one value and its standard error, None for one value."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def clustered(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and SE of (prompts, k) values: samples of one prompt are one observation."""
    return mean_se(np.asarray(values, dtype=float).mean(axis=1))


def held_out(model: Any, objective: Objective, store: Store, records: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray], *,
             micro_tokens: int, device: str = "cpu") -> dict[str, float | None]:  # fmt: skip
    """Loss and metrics of these records as one set, batch-statistic losses over all of them at once.

    Returns:
        the objective's metrics, 'loss', 'pairs', and 'accuracy_low', 'accuracy_high' where there are pairs: Wilson's 95% at the
        number of independent pairs that the error clustered by prompt stands for; None for a single prompt.
    """
    share, scored, tables, batches = packs(model), [], [], []
    with torch.inference_mode():
        for group in split(store, records, micro_tokens, share=share):
            batch = make_batch(store, group, columns=columns, share=share).to(device)
            scored.append(objective.score(model, batch))
            tables.append(batch.table)
            batches.append(batch)
        whole, table = join_columns(scored), join(tables)
        loss = float(total(objective.terms(whole, table), totals_of(batches, len(records))))
        found = objective.metrics(whole, table)
    out: dict[str, float | None] = {"loss": loss}
    out |= {name: float(values.mean()) for name, values in found.items() if len(values)}
    if "rewards/accuracies" in found:
        wins, prompt = found["rewards/accuracies"].cpu().numpy(), table.record[table.pair[:, 0]].cpu().numpy()
        _, out["accuracy_low"], out["accuracy_high"] = share_of(wins, prompt)
        out["pairs"] = len(wins)
    return out


@dataclass(frozen=True)
class Drawn:
    """Fresh samples of a policy: n prompts, k samples each. All arrays (n, k).

    Args:
        texts, ids, finished: the responses. length: tokens. reward: or None without a rule.
        kl_rb: sum over the response of KL(pi(.|s) || ref(.|s)), nats: the Rao-Blackwell estimate. kl_k1: log pi - log ref, nats.
    """

    texts: list[list[str]]
    ids: list[list[tuple[int, ...]]]
    finished: np.ndarray
    length: np.ndarray
    reward: np.ndarray | None
    kl_rb: np.ndarray
    kl_k1: np.ndarray


def score_samples(model: Any, reference: Any | None, store: Store, *, micro_tokens: int,
                  device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rao-Blackwell and k1 sequence KL of every response of a store of rollouts, in order: (R,), (R,) nats.

    Args:
        reference: the frozen model, or None: `model` with this run's adapter off.
    """
    share, rb, k1 = packs(model), [], []
    with torch.inference_mode():
        for group in split(store, range(len(store)), micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(device)
            ours = hidden_states(model, batch)
            with as_reference(model, reference) as frozen:
                theirs = hidden_states(frozen, batch)
                reference_logps = token_logps(frozen, theirs, batch)
            rb.append(response_sums(prefix_kl(model, ours, reference, theirs, batch), batch).cpu().numpy())
            gap = token_logps(model, ours, batch).double() - reference_logps.double()
            k1.append(response_sums(gap, batch).cpu().numpy())
    return np.concatenate(rb), np.concatenate(k1)


def draw(model: Any, reference: Any | None, codec: Codec, prompts: Sequence[Text], *, rule: Reward | None,
         max_tokens: int, k: int = 1, seed: int = 0, micro_tokens: int = 8192, device: str = "cpu") -> Drawn:  # fmt: skip
    """Sample the model at temperature 1 with nothing cut, and measure reward and KL to the reference on those samples.

    Truncation at `max_tokens` gives the KL of the truncated process: the same process that was sampled.
    """
    ids = [encode_prompt(codec, p) for p in prompts]
    ends = [end_ids(codec, p) for p in prompts]
    samples = sample(model, ids, ends=ends, k=k, max_tokens=max_tokens, seed=seed)
    shape = (len(prompts), k)
    texts = [[decode_response(codec, p, list(s.ids), e) for s in row] for p, row, e in zip(ids, samples, ends, strict=True)]
    rollouts = from_ids(ids, [[s.ids for s in row] for row in samples])
    rb, k1 = score_samples(model, reference, rollouts, micro_tokens=micro_tokens, device=device)
    reward = None
    if rule is not None:
        said = [Response(t, s.finished) for mine, row in zip(texts, samples, strict=True) for t, s in zip(mine, row, strict=True)]
        reward = rule([p for p in prompts for _ in range(k)], said).reshape(shape)
    return Drawn(texts, [[s.ids for s in row] for row in samples], np.array([[s.finished for s in row] for row in samples]),
                 np.array([[len(s.ids) for s in row] for row in samples]), reward, rb.reshape(shape), k1.reshape(shape))  # fmt: skip


def summary(drawn: Drawn) -> dict[str, float | None]:
    """The metrics of fresh samples, each mean with its standard error over prompts.

    `kl_token_rb` is the ratio of means, nats per token, with the delta method's standard error.
    """
    out: dict[str, float | None] = {}
    for name, values in (("kl_sequence_rb", drawn.kl_rb), ("kl_sequence_k1", drawn.kl_k1), ("sample_length", drawn.length),
                         *((("reward", drawn.reward),) if drawn.reward is not None else ())):  # fmt: skip
        out[name], out[f"{name}_se"] = clustered(values)
    length = float(drawn.length.mean())
    rate = float(drawn.kl_rb.mean()) / length
    error = clustered(drawn.kl_rb - rate * drawn.length)[1]
    out["kl_token_rb"], out["kl_token_rb_se"] = rate, None if error is None else error / length
    out["sample_finished"] = float(drawn.finished.mean())
    return out


def response_rows(model: Any, store: Store, *, micro_tokens: int, device: str = "cpu",
                  progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """One row per response of the store: where it stands, its tokens, its log-prob summed and per token."""
    rows: list[dict[str, Any]] = []
    share = packs(model)
    with torch.inference_mode():
        for group in split(store, range(len(store)), micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(device)
            sums = response_sums(token_logps(model, hidden_states(model, batch), batch), batch).cpu().numpy()
            counts = np.bincount(batch.response.cpu().numpy(), minlength=batch.responses)
            numbers = [int(store.response[s]) for r in group for s in range(store.record_start[r], store.record_start[r + 1])
                       if store.response[s] >= 0]  # fmt: skip
            for record, number, logp, count in zip(batch.table.record.tolist(), numbers, sums, counts, strict=True):
                rows.append({"record": store.where[record], "response": number, "tokens": int(count), "logp": float(logp),
                             "mean": float(logp) / int(count)})  # fmt: skip
            progress(group[-1] + 1, len(store))
    return rows


def paired_difference(before: np.ndarray, after: np.ndarray) -> dict[str, float] | None:
    """Mean of after - before over prompts with a 95% interval (normal, prompts as units); None for a single prompt."""
    difference, se = clustered(np.asarray(after) - np.asarray(before))
    if se is None:
        return None
    return {"difference": difference, "low": difference - Z95 * se, "high": difference + Z95 * se}
