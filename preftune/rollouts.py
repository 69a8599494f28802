"""Answers of the current policy as optimiser steps: sample, score, read on the training path, give credit, hand out in batches.

A round is what happens between two looks at the policy: its prompts, k answers each as token ids, what each token needs to know (old
and reference log-probs, value, advantage, return) or the pair they make. Every draw is a function of (seed, round, row) alone. `Kept`
is all that a resumed run needs. Touches sampling, readout and losses; the reward comes from the caller; no file.

    for line in engine.train(state, steps(source, rounds, kept, make, start=state.step, total=total), objective): ...
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, Order, Step, Table, make_batch, make_step, split
from .errors import NumericsError
from .losses import onpolicy
from .objectives import Terms
from .readout import Learner, Value, as_reference, hidden_states, packs, token_logps, values_of
from .records import Judgement, Record, Response, Text
from .sampling import Sample, sample
from .store import Store, from_ids
from .tokens import Codec, end_ids

Scores = Callable[[Store, Codec, Sequence[Text]], np.ndarray]  # answers, whose ids they are, prompts -> (R,), higher is better
EXPLODED = {False: 10.0, True: 1000.0}  # mean of pi / pi_old over a step's tokens, or its whole answers: no step on these answers
COLLAPSED = 0.05  # of the entropy of the first round


# ---------------------------------------------------------------- which prompts when


@dataclass(frozen=True)
class Rounds:
    """Which records make which optimiser step, as `batches.Order` says it, with several steps on the answers of one round.

    Args:
        records: how many. size: prompts of a round; an epoch's last round may be smaller. batch_size: records a step. passes: over a round.
        epochs: over the records; may be a fraction. seed: of both orders.
    """

    records: int
    size: int
    batch_size: int
    passes: int
    epochs: float
    seed: int

    def _steps(self, prompts: int) -> int:
        return self.passes * math.ceil(prompts / self.batch_size)

    @property
    def per_epoch(self) -> int:
        whole, rest = divmod(self.records, self.size)
        return whole * self._steps(self.size) + self._steps(rest)

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.per_epoch * self.epochs - 1e-9))

    def place(self, step: int) -> tuple[int, int]:
        """(round, step inside it) of step 0, 1, ..."""
        epoch, index = divmod(step, self.per_epoch)
        number, inner = divmod(index, self._steps(self.size))
        return epoch * math.ceil(self.records / self.size) + number, inner

    def prompts_of(self, number: int) -> np.ndarray:
        """Records that round 0, 1, ... samples from."""
        return Order(self.records, self.size, 1, self.seed).records_of(number)

    def members(self, number: int, inner: int) -> np.ndarray:
        """Which of a round's prompts are in one of its steps: a seeded order per pass."""
        count = len(self.prompts_of(number))
        turn, index = divmod(inner, math.ceil(count / self.batch_size))
        order = np.random.default_rng([self.seed, 1, number, turn]).permutation(count)
        return order[index * self.batch_size : (index + 1) * self.batch_size]

    def records_of(self, step: int) -> np.ndarray:
        """Record indices of step 0, 1, ..."""
        number, inner = self.place(step)
        return self.prompts_of(number)[self.members(number, inner)]


# ---------------------------------------------------------------- a round


@dataclass(frozen=True)
class Source:
    """What rounds are made of.

    Args:
        policy: as it trains. value: its value model, or None. frozen: the reference, or None: the policy with its adapter off.
        store, texts: prompts as ids and as text, by record. scores: the reward (`rewards.Scorer.rollouts`). k: answers per prompt.
        max_tokens, temperature, seed: of the sampling. eos_penalty: what an answer without an end loses.
    """

    policy: Any
    value: Value | None
    frozen: Any | None
    codec: Codec
    store: Store
    texts: Callable[[int], Text]
    scores: Scores
    k: int
    max_tokens: int
    temperature: float
    eos_penalty: float
    seed: int
    micro_tokens: int
    device: str

    def prompt(self, record: int) -> tuple[int, ...]:
        """The ids of a record's prompt."""
        root = self.store.record_start[record]
        return tuple(self.store.tokens[self.store.start[root] : self.store.start[root + 1]].tolist())


@dataclass(frozen=True)
class Round:
    """The answers of a round.

    Args:
        records: (P,) of the source. ids: per prompt, per answer its ids. columns: per token of `store`, by name.
        pair: (P, 2) chosen and rejected answer of each prompt, -1 where it makes none; score: (P, K) rewards. None where answers are not
            paired. drawn: whether the last answer of each prompt is the reference's.
    """

    records: np.ndarray
    ids: list[list[tuple[int, ...]]]
    columns: dict[str, np.ndarray]
    store: Store
    pair: np.ndarray | None = None
    score: np.ndarray | None = None
    drawn: bool = False


@dataclass
class Kept:
    """What rounds leave to later rounds.

    Args:
        beta: the KL weight as it stands. count, mean, square: answers scored so far, their mean reward and the sum of squares about it.
        entropy: of the first round, nats per answer. told: alarms that were raised. round: the one under way.
    """

    beta: float = 0.0
    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    entropy: float = 0.0
    told: list[str] = field(default_factory=list)
    round: Round | None = None


def numbers(kept: Kept) -> dict[str, Any]:
    """What is kept that is not a tensor, for a checkpoint."""
    return {name: value for name, value in vars(kept).items() if name != "round"}


def tensors(kept: Kept) -> dict[str, Tensor]:
    """The round under way, for a checkpoint."""
    if (now := kept.round) is None:
        return {}
    flat = [ids for row in now.ids for ids in row]
    found = {"records": now.records, "answers": np.array([len(row) for row in now.ids]), "lengths": np.array([len(ids) for ids in flat]),
             "ids": np.array([i for ids in flat for i in ids]), "drawn": np.array([now.drawn])}  # fmt: skip
    found |= {name: values for name, values in (("pair", now.pair), ("score", now.score)) if values is not None}
    found |= {f"column/{name}": values for name, values in now.columns.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def restore(kept: Kept, source: Source, saved: Mapping[str, Any], rollout: Mapping[str, Tensor]) -> None:
    """Put back what a checkpoint holds, bit for bit."""
    for name, value in saved.items():
        setattr(kept, name, list(value) if isinstance(value, list) else value)
    if not rollout:
        return
    found = {name: values.numpy() for name, values in rollout.items()}
    flat = iter(np.split(found["ids"], np.cumsum(found["lengths"])[:-1]))
    ids = [[tuple(next(flat).tolist()) for _ in range(n)] for n in found["answers"]]
    columns = {name.removeprefix("column/"): values for name, values in found.items() if name.startswith("column/")}
    pair, score, drawn = found.get("pair"), found.get("score"), bool(found["drawn"][0])
    kept.round = Round(found["records"], ids, columns, _stored(source, found["records"], ids, pair, score, drawn), pair, score, drawn)


def _stored(source: Source, records: np.ndarray, ids: list[list[tuple[int, ...]]], pair: np.ndarray | None = None,
            score: np.ndarray | None = None, drawn: bool = False) -> Store:  # fmt: skip
    """The answers as a store, with what is said of them."""
    said = None
    if pair is not None and score is not None:
        said = [Record("", tuple(Response("", score=float(x)) for x in row), () if i < 0 else (Judgement(((int(i),), (int(j),))),))
                for row, (i, j) in zip(score, pair, strict=True)]  # fmt: skip
    return from_ids([source.prompt(int(r)) for r in records], ids, said, drawn=[len(ids[0]) - 1] if drawn else [])


def draw(source: Source, records: np.ndarray, number: int, *, reference: bool = False, k: int = 0) -> list[list[Sample]]:
    """Answers to these prompts, sampled from the policy or the reference in a stream of the round's own."""
    prompts, texts = [source.prompt(int(r)) for r in records], [source.texts(int(r)) for r in records]
    seed = int(np.random.SeedSequence([source.seed, number, int(reference)]).generate_state(1)[0])
    how: dict[str, Any] = {"ends": [end_ids(source.codec, text) for text in texts], "k": k or source.k, "max_tokens": source.max_tokens,
                           "temperature": source.temperature, "seed": seed}  # fmt: skip
    if not reference:
        return sample(source.policy, prompts, **how)
    with as_reference(source.policy, source.frozen) as frozen:
        return sample(frozen, prompts, **how)


def score(source: Source, records: np.ndarray, ids: Sequence[Sequence[Sequence[int]]], finished: np.ndarray) -> np.ndarray:
    """Reward of every answer, prompt by prompt, less the penalty of those that did not end: (R,) float64.

    Raises:
        NumericsError: a reward that is not a finite number.
    """
    prompts = [source.prompt(int(r)) for r in records]
    found = np.asarray(source.scores(from_ids(prompts, ids), source.codec, [source.texts(int(r)) for r in records]), dtype=np.float64)
    if not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found))[0])
        where = source.store.where[int(records[first // len(ids[0])])]
        raise NumericsError(f"the reward of an answer to {where} is {found[first]:g}, expected a finite number; the step was not taken")
    return found - source.eos_penalty * ~finished


def read(source: Source, store: Store, *, policy: bool, reference: bool) -> dict[str, np.ndarray]:
    """What the models say of every answer on the path that trains: 'old' and 'reference' log-probs, 'value'. Each (tokens of the store,).

    Raises:
        NumericsError: a number that is not finite.
    """
    share, out = packs(source.policy), dict[str, np.ndarray]()

    def put(name: str, batch: Batch, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise NumericsError(f"the {name} of an answer is {values[~torch.isfinite(values)][0]:g}, expected a finite number; the step "
                                "was not taken, the last checkpoint is from before")  # fmt: skip
        out.setdefault(name, np.zeros(len(store.tokens)))[batch.slot.cpu().numpy()] = values.double().cpu().numpy()

    with torch.inference_mode():
        for group in split(store, range(len(store)), source.micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(source.device)
            hidden = hidden_states(source.policy, batch) if policy else None
            if hidden is not None:
                put("old", batch, token_logps(source.policy, hidden, batch, temperature=source.temperature))
            if source.value is not None and hidden is not None:
                put("value", batch, values_of(source.value, hidden, batch))
            if reference:
                with as_reference(source.policy, source.frozen) as frozen:
                    theirs = token_logps(frozen, hidden_states(frozen, batch), batch, temperature=source.temperature if policy else 1.0)
                put("reference", batch, theirs)
    return out


def rows(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """(R, T) places in the store of each answer's tokens, and (R, T) bool, which of them are tokens of it."""
    answers = np.flatnonzero(store.response >= 0)
    start, size = store.start[answers], np.diff(store.start)[answers]
    place = np.arange(size.max())
    shown = place < size[:, None]
    return np.where(shown, start[:, None] + place, start[:, None]), shown


# ---------------------------------------------------------------- credit


@dataclass(frozen=True)
class Credit:
    """How rewards become advantages.

    Args:
        advantage: 'gae', 'rloo' or 'group'. in_reward: whether the KL stands in the reward. reference: whether it is read at all.
        target, horizon: nats per answer to steer to, None for a KL weight that stays; answers over which it may move.
        normalise: rewards by their running mean and deviation. whiten, discount, lam: of gae.
    """

    advantage: str = "gae"
    in_reward: bool = True
    reference: bool = True
    target: float | None = None
    horizon: int = 10000
    normalise: bool = False
    whiten: bool = True
    discount: float = 1.0
    lam: float = 0.95
    cap: float = 0.0


def credited(rules: Credit, source: Source, kept: Kept, records: np.ndarray, number: int) -> tuple[Round, dict[str, Any]]:
    """A round of PPO, RLOO or GRPO: every token with its old log-prob and advantage, and what is worth reporting."""
    began = time.perf_counter()
    samples = draw(source, records, number)
    ids = [[s.ids for s in row] for row in samples]
    raw = score(source, records, ids, np.array([s.finished for row in samples for s in row]))
    store = _stored(source, records, ids)
    sampled = np.array([p for row in samples for s in row for p in s.logps])
    columns, facts = credit(rules, source, kept, store, raw, sampled)
    gap = np.abs(sampled - columns["old"][store.trained])
    entropy = -sampled.sum() / len(raw)
    facts |= {"objective/entropy": entropy, "sampler/gap": gap.mean(), "sampler/gap_max": gap.max(),
              "rollout/length": len(sampled) / len(raw), "val/num_eos_tokens": sum(s.finished for row in samples for s in row),
              "alarms": alarms(kept, source, raw, samples, entropy)}  # fmt: skip
    return Round(records, ids, columns, store), plain(facts) | speed(began, sampled)


def credit(rules: Credit, source: Source, kept: Kept, store: Store, raw: np.ndarray,
           sampled: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:  # fmt: skip
    """What every token of these answers needs to know, and what is worth reporting.

    Args:
        store: one record a prompt, answers side by side. raw: (R,) rewards. sampled: of each of their tokens the log-prob that it was
            drawn with; None: that which is read here.
    """
    read_off = read(source, store, policy=True, reference=rules.reference)
    place, shown_ = rows(store)
    shown = torch.from_numpy(shown_)

    def row(name: str) -> Tensor:
        return torch.from_numpy(read_off[name][place]) if name in read_off else torch.zeros(place.shape, dtype=torch.float64)

    old, beta = row("old"), kept.beta
    ratio = torch.where(shown, old - row("reference"), 0) if rules.reference else torch.zeros_like(old)
    kl = ratio.sum(1)
    worth = torch.from_numpy(_normal(kept, raw) if rules.normalise else raw)
    weight = beta if rules.in_reward else 0.0
    columns, facts = {"old": old}, dict[str, Any]()
    if rules.cap and sampled is not None:
        drawn = torch.zeros_like(old).masked_scatter(shown, torch.from_numpy(sampled))
        counts = onpolicy.truncated(lead := torch.where(shown, old - drawn, 0).sum(1), cap=rules.cap)
        columns["weight"] = counts[:, None].expand_as(old)
        facts |= {"sampler/weight": counts.mean(), "sampler/weight_capped": (lead > math.log(rules.cap)).double().mean()}
    if rules.advantage == "gae":
        value = row("value")
        rewards = onpolicy.kl_in_reward(worth, ratio, shown, beta=weight)
        advantage = onpolicy.gae(rewards, value, shown, discount=rules.discount, lam=rules.lam)
        columns |= {"returns": advantage + value, "before": value}
        coming = onpolicy.gae(rewards, torch.zeros_like(value), shown, discount=rules.discount, lam=1.0)[shown]
        if spread := float(coming.var(unbiased=False)):
            facts["val/explained"] = 1 - float((coming - value[shown]).var(unbiased=False)) / spread
        advantage = onpolicy.whiten(advantage, shown) if rules.whiten else advantage
    else:
        whole = {"rloo": onpolicy.rloo, "group": onpolicy.group}[rules.advantage]((worth - weight * kl).reshape(len(store), -1))
        advantage = whole.reshape(-1, 1).expand(shown.shape)
    columns |= {"advantage": advantage} | ({"reference": row("reference")} if rules.reference and not rules.in_reward else {})
    flat = {}
    for name, values in columns.items():
        flat[name] = np.zeros(len(store.tokens))
        flat[name][place[shown_]] = values[shown].numpy()
    mean = float(kl.mean())
    facts |= {"objective/scores": raw.mean(), "objective/scores_std": raw.std(), "objective/kl": mean, "beta": beta,
             "objective/non_score_reward": -beta * mean, "objective/rlhf_reward": raw.mean() - beta * mean}  # fmt: skip
    if rules.target is not None:
        kept.beta = onpolicy.adaptive_kl(beta, mean, target=rules.target, horizon=rules.horizon, count=len(raw))
    return flat, facts


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of any library as Python's own."""
    return {name: value if isinstance(value, list) else float(value) for name, value in facts.items()}


def speed(began: float, sampled: np.ndarray) -> dict[str, float]:
    """Seconds that a round took, and its tokens in each."""
    seconds = time.perf_counter() - began
    return {"rollout/seconds": seconds, "rollout/tokens_per_second": len(sampled) / seconds}


def _normal(kept: Kept, raw: np.ndarray) -> np.ndarray:
    """Rewards less the running mean, over the running deviation, both with this round (Welford's update for a batch)."""
    count, gap = kept.count + len(raw), raw.mean() - kept.mean
    kept.square += float(((raw - raw.mean()) ** 2).sum() + gap**2 * kept.count * len(raw) / count)
    kept.mean += float(gap * len(raw) / count)
    kept.count = count
    return (raw - kept.mean) / math.sqrt(kept.square / count + onpolicy.EPSILON)


def alarms(kept: Kept, source: Source, raw: np.ndarray, samples: Sequence[Sequence[Sample]], entropy: float) -> list[str]:
    """What is wrong with a round, each said the first time only."""
    kept.entropy = kept.entropy or float(entropy)
    ended = any(s.finished for line in samples for s in line)
    found = {
        "constant-reward": (len(raw) > 1 and np.ptp(raw) == 0, f"every answer of the round has the reward {raw[0]:g}: there is nothing to "
                            "learn from it"),
        "no-end": (not ended, f"no answer of the round ended within {source.max_tokens} tokens: raise --sample-tokens, or charge for it by "
                   "--eos-penalty"),
        "entropy-collapse": (entropy < COLLAPSED * kept.entropy, f"the entropy of answers fell to {entropy:.3g} nats from "
                             f"{kept.entropy:.3g}: the policy says nearly always the same; a larger --beta or a smaller --lr holds it"),
    }  # fmt: skip
    new = [name for name, (true, _) in found.items() if true and name not in kept.told]
    kept.told += new
    return [f"{name}: {found[name][1]}" for name in new]


# ---------------------------------------------------------------- pairs


def paired(source: Source, kept: Kept, records: np.ndarray, number: int, *, best_worst: bool, reference: bool,
           drawn: bool) -> tuple[Round, dict[str, Any]]:  # fmt: skip
    """A round of online preference tuning: each prompt's answers as one pair, better by the reward.

    Args:
        best_worst: the best and the worst answer of each prompt; else two of them at random. reference: whether the loss reads it.
        drawn: one more answer per prompt comes from the reference; it may be half of a pair (XPO).
    """
    began = time.perf_counter()
    samples = draw(source, records, number)
    own = np.array([p for line in samples for s in line for p in s.logps])
    if drawn:
        samples = [[*mine, *theirs] for mine, theirs in zip(samples, draw(source, records, number, reference=True, k=1), strict=True)]
    ids = [[s.ids for s in row] for row in samples]
    raw = score(source, records, ids, np.array([s.finished for row in samples for s in row]))
    scores = raw.reshape(len(records), -1)
    pair, margin = pairs_of(scores, best_worst=best_worst, seed=[source.seed, 2, number])
    store = _stored(source, records, ids, pair, scores, drawn)
    columns = read(source, store, policy=False, reference=True) if reference else {}
    per = scores[:, : source.k]
    entropy = -own.sum() / per.size
    facts = {"objective/scores": per.mean(), "objective/scores_margin": margin.mean(), "objective/entropy": entropy,
             "objective/ties": (pair[:, 0] < 0).sum(), "val/num_eos_tokens": sum(s.finished for line in samples for s in line[: source.k]),
             "rollout/length": len(own) / per.size, "alarms": alarms(kept, source, raw, samples, entropy)}  # fmt: skip
    return Round(records, ids, columns, store, pair, scores, drawn), plain(facts) | speed(began, own)


def pairs_of(scores: np.ndarray, *, best_worst: bool, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(P, 2) chosen and rejected answer of each prompt, -1 -1 where the two are equal, and (P,) how much better the one is.

    Args:
        scores: (P, K). best_worst: the first best and the first worst; else two different answers at random.
    """
    if best_worst:
        pair = np.stack([scores.argmax(1), scores.argmin(1)], 1)
    else:
        chance = np.random.default_rng(seed)
        pair = np.stack([chance.permutation(scores.shape[1])[:2] for _ in scores])
    one, other = np.take_along_axis(scores, pair, 1).T
    pair = np.where((one < other)[:, None], pair[:, ::-1], pair)
    return np.where((one == other)[:, None], -1, pair), np.abs(one - other)


# ---------------------------------------------------------------- steps


Make = Callable[[Source, Kept, np.ndarray, int], tuple[Round, dict[str, Any]]]


def steps(source: Source, rounds: Rounds, kept: Kept, make: Make, train: np.ndarray, *, start: int, total: int) -> Iterator[Step]:
    """The optimiser steps `start` to `total` of a run, each with the policy as it stands when it is asked for.

    Args:
        make: (source, kept, records, number) -> a round and what is worth reporting. train: the store's records that rounds number.
    """
    share = packs(source.policy)

    def cut(chosen: np.ndarray, now: Round, size: int) -> Step:
        step = make_step(now.store, chosen, micro_tokens=size, columns=now.columns, share=share)
        return replace(step, micro=tuple(b.to(source.device) for b in step.micro), again=partial(cut, chosen, now),
                       records=tuple(int(r) for r in now.records[chosen]))  # fmt: skip

    for index in range(start, total):
        number, inner = rounds.place(index)
        facts: dict[str, Any] = {}
        if inner == 0:
            kept.round, facts = make(source, kept, train[rounds.prompts_of(number)], number)
        assert kept.round is not None, "a checkpoint inside a round holds the round"
        yield replace(cut(rounds.members(number, inner), kept.round, source.micro_tokens), facts=facts)


# ---------------------------------------------------------------- what a step minimises


@dataclass(frozen=True)
class Taken:
    """What is known of N tokens, or of R answers where an answer is one action. All float64.

    Args:
        policy, old, reference: log-probs, nats. advantage. value, before: the value now and when sampled. returns: what it should be.
        weight: what the terms of the policy count for (`onpolicy.truncated`).
    """

    policy: Tensor
    old: Tensor
    advantage: Tensor
    reference: Tensor | None = None
    value: Tensor | None = None
    before: Tensor | None = None
    returns: Tensor | None = None
    weight: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Taken:
        """The same with every column changed."""
        return Taken(**{name: None if x is None else change(x) for name, x in vars(self).items()})


@dataclass(frozen=True)
class Surrogate:
    """PPO's clipped objective, as the engine reads an objective (`objectives.Objective`).

    Args:
        whole: an answer is one action (RLOO); else a token is. clip_ratio, clip_value, value_weight: docs/ppo.md.
        kl: 'k2' or 'k3' as a loss at weight `beta`, or 'reward': no term here. temperature: of the sampling.
    """

    name: str
    whole: bool = False
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    value_weight: float = 0.1
    kl: str = "reward"
    beta: float = 0.0
    temperature: float = 1.0
    reads: str = "prompts"
    reference: str = "none"
    separable: bool = True
    mismatched: bool = False
    start: None = None
    needs: frozenset[str] = frozenset()
    carry: Mapping[str, float] = field(default_factory=dict)

    def score(self, model: Learner, batch: Batch) -> Taken:
        """Columns of a batch under the learner, with gradient where grad is enabled."""
        hidden = hidden_states(model.policy, batch)
        logps = token_logps(model.policy, hidden, batch, temperature=self.temperature).double()
        columns = {name: batch.columns[name].double() for name in ("old", "advantage", "reference", "before", "returns", "weight")
                   if name in batch.columns}  # fmt: skip
        if model.value is not None:
            columns["value"] = values_of(model.value, hidden, batch).double()
        if not self.whole:
            return Taken(policy=logps, **columns)
        sums = {name: torch.zeros(batch.responses, dtype=torch.float64, device=logps.device).index_add(0, batch.response, values)
                for name, values in (columns | {"policy": logps, "count": torch.ones_like(logps)}).items()}  # fmt: skip
        count = sums.pop("count")
        return Taken(**sums | {name: sums[name] / count for name in ("advantage", "weight") if name in sums})

    def terms(self, columns: Taken, table: Table, carry: Mapping[str, float] | None = None) -> Terms:
        """Unreduced losses summed, each with its denominator."""
        unit = "responses" if self.whole else "tokens"
        counts = torch.ones_like(columns.policy) if columns.weight is None else columns.weight
        policy = onpolicy.clipped_policy(columns.policy - columns.old, columns.advantage, clip=self.clip_ratio)
        out = {"policy_avg": ((counts * policy).sum(), unit)}
        if columns.value is not None and columns.before is not None and columns.returns is not None:
            value = onpolicy.clipped_value(columns.value, columns.before, columns.returns, clip=self.clip_value)
            out["value_avg"] = (self.value_weight * value.sum(), unit)
        if self.kl != "reward" and columns.reference is not None:
            estimate = {"k2": onpolicy.k2, "k3": onpolicy.k3}[self.kl](columns.policy - columns.reference)
            out["kl"] = (self.beta * (counts * estimate).sum(), unit)
        return out

    def metrics(self, columns: Taken, table: Table) -> Mapping[str, Tensor]:
        """TRL's names. Raises NumericsError where the policy has left the answers of this round: before the step is taken."""
        log_ratio = (columns.policy - columns.old).detach()
        ratio = log_ratio.exp()
        if not float(ratio.mean()) <= EXPLODED[self.whole]:
            raise NumericsError(f"the ratio to the policy that sampled exploded: {float(ratio.mean()):.3g} on average, "
                                f"{float(ratio.max()):.3g} at most; the step was not taken, the last checkpoint is from before. A smaller "
                                "--lr, fewer --passes or a larger --rollout-prompts")  # fmt: skip
        found = {"policy/approxkl_avg": log_ratio**2 / 2, "policy/clipfrac_avg": ((ratio - 1).abs() > self.clip_ratio).double(),
                 "val/ratio": ratio}  # fmt: skip
        if columns.value is not None and columns.before is not None:
            found["val/clipfrac_avg"] = ((columns.value - columns.before).abs() > self.clip_value).double()
        return found

    def advance(self, columns: Taken, table: Table, carry: Mapping[str, float]) -> dict[str, float]:
        """Nothing runs over steps here."""
        return {}
