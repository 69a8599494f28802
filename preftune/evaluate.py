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

from .batches import Table, join, make_batch, split, totals_of
from .certainty import Z95, mean_of, ratio_of, share_of
from .objectives import HAS, Columns, Objective, join_columns, total
from .readout import as_reference, hidden_states, packs, prefix_entropy, prefix_kl, response_sums, token_logps
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


def judged(store: Store, objective: Objective) -> np.ndarray:
    """(R,) bool: the store's records with something to learn from, as this objective reads them."""
    return HAS[objective.reads](store)


def read_out(model: Any, objective: Objective, store: Store, records: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray], *,
             micro_tokens: int, device: str = "cpu",
             progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[Columns, Table, float]:  # fmt: skip
    """What the objective reads of these records, as one set: its columns, what is said of their responses, and the loss.

    Passes of `micro_tokens` only cut the work: every sum is taken over the whole set, so batch-statistic losses see all of it.
    """
    share, scored, tables, batches = packs(model), [], [], []
    with torch.inference_mode():
        for group in split(store, records, micro_tokens, share=share):
            batch = make_batch(store, group, columns=columns, share=share).to(device)
            scored.append(objective.score(model, batch))
            tables.append(batch.table)
            batches.append(batch)
            progress(sum(len(set(t.record.tolist())) for t in tables), len(records))
        whole, table = join_columns(scored), join(tables)
        loss = float(total(objective.terms(whole, table), totals_of(batches, len(records))))
    return whole, table, loss


def held_out(model: Any, objective: Objective, store: Store, records: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray], *,
             micro_tokens: int, device: str = "cpu") -> dict[str, float | None]:  # fmt: skip
    """Loss and metrics of these records as one set, batch-statistic losses over all of them at once.

    Returns:
        the objective's metrics, 'loss', 'pairs', and 'accuracy_low', 'accuracy_high' where there are pairs: Wilson's 95% at the
        number of independent pairs that the error clustered by prompt stands for; None for a single prompt.
    """
    whole, table, loss = read_out(model, objective, store, records, columns, micro_tokens=micro_tokens, device=device)
    found = objective.metrics(whole, table)
    out: dict[str, float | None] = {"loss": loss}
    out |= {name: float(values.mean()) for name, values in found.items() if len(values)}
    if "rewards/accuracies" in found:
        wins, prompt = found["rewards/accuracies"].cpu().numpy(), table.record[objective.compares(table)[:, 0]].cpu().numpy()
        _, out["accuracy_low"], out["accuracy_high"] = share_of(wins, prompt)
        out["pairs"] = len(wins)
    return out


def token_rewards(model: Any, store: Store, records: Sequence[int] | np.ndarray, column: np.ndarray, *, beta: float, micro_tokens: int,
                  device: str = "cpu") -> np.ndarray:  # fmt: skip
    """beta (log pi - log ref) of every trained token of these records, NaN elsewhere: (N,), parallel to the store's tokens.

    Summed over a response it is the implicit reward; at the optimum of a token-level reward it is r_t + V(s_t+1) - V(s_t).

    Args:
        column: (N,) the reference's log-probs.
    """
    out, share = np.full(len(store.tokens), np.nan), packs(model)
    with torch.inference_mode():
        for group in split(store, records, micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(device)
            logps = token_logps(model, hidden_states(model, batch), batch).double().cpu().numpy()
            slot = batch.slot.cpu().numpy()
            out[slot] = beta * (logps - column[slot])
    return out


@dataclass(frozen=True)
class Drawn:
    """Fresh samples of a policy: n prompts, k samples each. All arrays (n, k).

    Args:
        texts, ids, finished: the responses. length: tokens. reward, truth: or None without their rules.
        kl_rb: sum over the response of KL(pi(.|s) || ref(.|s)), nats: the Rao-Blackwell estimate. kl_k1: log pi - log ref, nats.
        entropy: sum over the response of H(pi(.|s)), nats. repeated: share of runs of four tokens that stood in it before.
    """

    texts: list[list[str]]
    ids: list[list[tuple[int, ...]]]
    finished: np.ndarray
    length: np.ndarray
    reward: np.ndarray | None
    kl_rb: np.ndarray
    kl_k1: np.ndarray
    truth: np.ndarray | None
    entropy: np.ndarray
    repeated: np.ndarray


KL = ("rb", "k1", "k3", "k3_tokens")  # estimators of a KL divergence from samples of its first argument


def divergences(model: Any, reference: Any | None, store: Store, *, micro_tokens: int, device: str = "cpu",
                entropy: bool = True) -> dict[str, np.ndarray]:  # fmt: skip
    """KL(model || reference) as each estimator sees it on each response of a store of rollouts that `model` sampled; (R,) nats, in order.

    'rb' sum_t KL(pi(.|s_t) || ref(.|s_t)); with l_t = log pi - log ref of the token taken and L = sum_t l_t: 'k1' L, 'k3' e^-L - 1 + L,
    'k3_tokens' sum_t (e^-l_t - 1 + l_t). Each is unbiased on samples of the model itself at temperature 1 with nothing cut, and on no
    others. 'entropy' is sum_t H(pi(.|s_t)), the same way.  http://joschu.net/blog/kl-approx.html, arXiv:2504.10637

    Args:
        reference: the frozen model, or None: `model` with this run's adapter off.
    """
    share, parts = packs(model), []
    with torch.inference_mode():
        for group in split(store, range(len(store)), micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(device)
            ours = hidden_states(model, batch)
            with as_reference(model, reference) as frozen:
                theirs = hidden_states(frozen, batch)
                reference_logps = token_logps(frozen, theirs, batch)
            gap = token_logps(model, ours, batch).double() - reference_logps.double()
            k1 = response_sums(gap, batch)
            parts.append({"rb": response_sums(prefix_kl(model, ours, reference, theirs, batch), batch), "k1": k1,
                          "k3": torch.expm1(-k1) + k1, "k3_tokens": response_sums(torch.expm1(-gap) + gap, batch)})  # fmt: skip
            if entropy:
                parts[-1]["entropy"] = response_sums(prefix_entropy(model, ours, batch), batch)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def score_samples(model: Any, reference: Any | None, store: Store, *, micro_tokens: int,
                  device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rao-Blackwell and k1 sequence KL of every response of a store of rollouts, in order: (R,), (R,) nats."""
    found = divergences(model, reference, store, micro_tokens=micro_tokens, device=device, entropy=False)
    return found["rb"], found["k1"]


@dataclass(frozen=True)
class Spoken:
    """Fresh samples: k of each of n prompts. prompts: ids. ids, texts: per prompt k. finished, length: (n, k)."""

    prompts: list[tuple[int, ...]]
    ids: list[list[tuple[int, ...]]]
    texts: list[list[str]]
    finished: np.ndarray
    length: np.ndarray

    def store(self) -> Store:
        """As rollouts: the ids that were sampled."""
        return from_ids(self.prompts, self.ids)

    def responses(self) -> list[Response]:
        """All n k of them, prompt by prompt."""
        return [Response(text, bool(done)) for texts, ends in zip(self.texts, self.finished, strict=True)
                for text, done in zip(texts, ends, strict=True)]  # fmt: skip


def speak(model: Any, codec: Codec, prompts: Sequence[Text], *, max_tokens: int, k: int = 1, seed: int = 0, temperature: float = 1.0,
          top_p: float = 1.0, rows_at_once: int = 64, numbers: Sequence[int] | None = None,
          progress: Callable[[int, int], None] = lambda done, total: None) -> Spoken:  # fmt: skip
    """k samples to each prompt; by default of the model itself: temperature 1, nothing cut. `numbers` as in `sampling.sample`."""
    ids = [encode_prompt(codec, p) for p in prompts]
    ends = [end_ids(codec, p) for p in prompts]
    samples = sample(model, ids, ends=ends, k=k, max_tokens=max_tokens, seed=seed, temperature=temperature, top_p=top_p,
                     rows_at_once=rows_at_once, numbers=numbers, progress=progress)  # fmt: skip
    texts = [[decode_response(codec, p, list(s.ids), e) for s in row] for p, row, e in zip(ids, samples, ends, strict=True)]
    return Spoken(ids, [[s.ids for s in row] for row in samples], texts, np.array([[s.finished for s in row] for row in samples]),
                  np.array([[len(s.ids) for s in row] for row in samples]))  # fmt: skip


def kl_summary(found: Mapping[str, np.ndarray], length: np.ndarray, cluster: np.ndarray, *, name: str = "kl") -> dict[str, float | None]:
    """Every estimator per sequence and per token (ratio of means), each with its standard error, clustered by prompt.

    Args:
        found: of `divergences`, (R,) each. length: (R,) tokens. cluster: (R,) prompts.
    """
    out: dict[str, float | None] = {}
    for estimator in KL:
        key = f"{name}_sequence_{estimator}"
        out[key], out[f"{key}_se"] = mean_of(found[estimator], cluster)
        key = f"{name}_token_{estimator}"
        out[key], out[f"{key}_se"] = ratio_of(found[estimator], length, cluster)
    return out


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has said before: 0 where none repeats or there are none; to 1 for a loop.

    >>> repeated([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n over all responses: different n-grams by n-grams; falls with the number of responses, so compare at equal numbers.

    >>> distinct([[1, 2, 3], [1, 2, 4]], n=2)
    0.75
    """
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def draw(model: Any, reference: Any | None, codec: Codec, prompts: Sequence[Text], *, rule: Reward | None,
         max_tokens: int, k: int = 1, seed: int = 0, micro_tokens: int = 8192, device: str = "cpu",
         truth: Reward | None = None) -> Drawn:  # fmt: skip
    """Sample the model at temperature 1 with nothing cut, and measure reward and KL to the reference on those samples.

    Truncation at `max_tokens` gives the KL of the truncated process: the same process that was sampled.
    """
    spoken = speak(model, codec, prompts, max_tokens=max_tokens, k=k, seed=seed)
    shape = (len(prompts), k)
    found = divergences(model, reference, spoken.store(), micro_tokens=micro_tokens, device=device)
    rb, k1, entropy = (found[name].reshape(shape) for name in ("rb", "k1", "entropy"))
    asked = [p for p in prompts for _ in range(k)]
    reward, true = (None if by is None else by(asked, spoken.responses()).reshape(shape) for by in (rule, truth))
    said = np.array([[repeated(ids) for ids in row] for row in spoken.ids])
    return Drawn(spoken.texts, spoken.ids, spoken.finished, spoken.length, reward, rb, k1, true, entropy, said)


def summary(drawn: Drawn) -> dict[str, float | None]:
    """The metrics of fresh samples, each mean with its standard error over prompts.

    `kl_token_rb` and `entropy_token` are ratios of means, nats per token, with the delta method's standard error.
    """
    out: dict[str, float | None] = {}
    for name, values in (("kl_sequence_rb", drawn.kl_rb), ("kl_sequence_k1", drawn.kl_k1), ("sample_length", drawn.length),
                         ("repeated_4", drawn.repeated), ("reward", drawn.reward), ("truth", drawn.truth)):  # fmt: skip
        if values is not None:
            out[name], out[f"{name}_se"] = clustered(values)
    length = float(drawn.length.mean())
    for name, sums in (("kl_token_rb", drawn.kl_rb), ("entropy_token", drawn.entropy)):
        rate = float(sums.mean()) / length
        error = clustered(sums - rate * drawn.length)[1]
        out[name], out[f"{name}_se"] = rate, None if error is None else error / length
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
