"""A round of rollouts, number by number: what is drawn, scored, credited, paired and told, each against a few plain lines of numpy."""

from __future__ import annotations

from dataclasses import replace

import make
import numpy as np
import pytest
import torch

from preftune import models, rollouts
from preftune.batches import make_batch
from preftune.errors import NumericsError
from preftune.losses import onpolicy
from preftune.rollouts import Credit, Kept, Surrogate, Taken
from preftune.sampling import Sample
from preftune.store import build
from preftune.tokens import make_codec

RECORDS = make.records(5)
CHOSEN, NUMBER = np.array([3, 0, 4]), 7


def lengths(store, codec, prompts) -> np.ndarray:
    """The reward: how many tokens an answer has; a third of one more for those of the first prompt asked about."""
    count = np.diff(store.start)[store.response >= 0].astype(float)
    return count + np.repeat([p == prompts[0] for p in prompts], len(count) // len(prompts)) / 3


@pytest.fixture(scope="module")
def source() -> rollouts.Source:
    """A policy that often ends, away from its reference."""
    codec = make_codec(make.tokenizer())
    policy, frozen = (models.prepare(make.model(seed=s)) for s in (0, 1))
    with torch.no_grad():
        for net in (policy, frozen):
            net.lm_head.weight[257] *= 8
    store, _ = build(RECORDS, codec, max_length=None)
    return rollouts.Source(policy, None, frozen, codec, store, lambda r: RECORDS[r].prompt, lengths, k=3, max_tokens=6, temperature=0.9,
                           eos_penalty=0.5, seed=1, micro_tokens=200, device="cpu")  # fmt: skip


def ids(samples) -> list[list[tuple[int, ...]]]:
    return [[s.ids for s in row] for row in samples]


def rewards(samples, prompts) -> np.ndarray:
    """Lengths less the penalty, written out; (P, K)."""
    return np.array([[len(s.ids) + (p == prompts[0]) / 3 - (0 if s.finished else 0.5) for s in row]
                     for row, p in zip(samples, prompts, strict=True)])  # fmt: skip


def test_every_round_model_and_seed_has_a_stream_of_its_own(source):
    first = ids(rollouts.draw(source, CHOSEN, NUMBER))
    assert first == ids(rollouts.draw(source, CHOSEN, NUMBER))
    same = replace(source, frozen=source.policy)
    others = [ids(rollouts.draw(*given)) for given in ((source, CHOSEN, NUMBER + 1), (replace(source, seed=2), CHOSEN, NUMBER),
                                                       (replace(source, temperature=3.0), CHOSEN, NUMBER))]  # fmt: skip
    others.append(ids(rollouts.draw(same, CHOSEN, NUMBER, reference=True)))
    assert all(other != first for other in others), "the same weights as a reference draw other answers"
    theirs = rollouts.draw(source, CHOSEN, NUMBER, reference=True, k=1)
    assert [len(row) for row in theirs] == [1] * 3
    assert ids(theirs) != ids(rollouts.draw(same, CHOSEN, NUMBER, reference=True, k=1)), "the reference's weights draw"
    assert {s.finished for row in rollouts.draw(source, CHOSEN, NUMBER) for s in row} == {True, False}


def test_rewards_prompt_by_prompt_and_the_penalty_of_what_has_no_end(source):
    samples = rollouts.draw(source, CHOSEN, NUMBER)
    finished = np.array([s.finished for row in samples for s in row])
    found = rollouts.score(source, CHOSEN, ids(samples), finished)
    assert found == pytest.approx(rewards(samples, [RECORDS[r].prompt for r in CHOSEN]).ravel())
    broken = replace(source, scores=lambda store, codec, prompts: np.array([0, 1, 2, 3, np.inf, 5, 6, 7, np.nan]))
    with pytest.raises(NumericsError, match=rf"answer to {source.store.where[0]} is inf"):
        rollouts.score(broken, CHOSEN, ids(samples), finished)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_round_of_one_action_by_hand(source, normalise):
    """RLOO with the KL in the reward, of three prompts with three answers each."""
    kept = Kept(beta=0.1)
    rules = Credit("rloo", target=2.0, horizon=50, normalise=normalise)
    made, facts = rollouts.credited(rules, source, kept, CHOSEN, NUMBER)
    samples = rollouts.draw(source, CHOSEN, NUMBER)
    assert made.ids == ids(samples) and made.records is CHOSEN and "reference" not in made.columns
    read = rollouts.read(source, made.store, policy=True, reference=True)
    answers = [slice(a, b) for a, b, r in zip(made.store.start, made.store.start[1:], made.store.response, strict=False) if r >= 0]
    kl = np.array([(read["old"][a] - read["reference"][a]).sum() for a in answers]).reshape(3, 3)
    raw = rewards(samples, [RECORDS[r].prompt for r in CHOSEN])
    worth = ((raw - raw.mean()) / np.sqrt(raw.var() + 1e-8) if normalise else raw) - 0.1 * kl
    wanted = worth - (worth.sum(1, keepdims=True) - worth) / 2
    for part, value in zip(answers, wanted.ravel(), strict=True):
        assert made.columns["advantage"][part] == pytest.approx(value, abs=1e-9)
    drawn = np.array([p for row in samples for s in row for p in s.logps])
    gap = np.abs(drawn - read["old"][made.store.trained])
    assert facts | {"alarms": 0} == pytest.approx({
        "objective/scores": raw.mean(), "objective/scores_std": raw.std(), "objective/kl": kl.mean(), "beta": 0.1,
        "objective/non_score_reward": -0.1 * kl.mean(), "objective/rlhf_reward": raw.mean() - 0.1 * kl.mean(),
        "objective/entropy": -drawn.sum() / 9, "sampler/gap": gap.mean(), "sampler/gap_max": gap.max(), "rollout/length": len(drawn) / 9,
        "val/num_eos_tokens": sum(s.finished for row in samples for s in row), "alarms": 0,
        "rollout/seconds": facts["rollout/seconds"], "rollout/tokens_per_second": len(drawn) / facts["rollout/seconds"],
    }, abs=1e-9)  # fmt: skip
    assert kept.beta == pytest.approx(onpolicy.adaptive_kl(0.1, kl.mean(), target=2.0, horizon=50, count=9)) != 0.1
    assert abs(kl.mean()) > 0.1 and len(set(wanted.ravel().round(6))) == 9


def test_a_round_of_tokens_by_hand(source):
    """GAE at lambda 1: what comes, KL and reward, is what the value should have said; the advantage is that less the value, whitened."""
    value = rollouts.Value(32)
    with torch.no_grad():
        value.head.weight += 0.1
    valued = replace(source, value=value)
    made, _ = rollouts.credited(Credit("gae", lam=1.0), valued, Kept(beta=0.1), CHOSEN, NUMBER)
    read = rollouts.read(valued, made.store, policy=True, reference=True)
    answers = [slice(a, b) for a, b, r in zip(made.store.start, made.store.start[1:], made.store.response, strict=False) if r >= 0]
    raw = rewards(rollouts.draw(source, CHOSEN, NUMBER), [RECORDS[r].prompt for r in CHOSEN]).ravel()
    coming = np.concatenate([r - 0.1 * np.cumsum((read["old"][a] - read["reference"][a])[::-1])[::-1]
                             for a, r in zip(answers, raw, strict=True)])  # fmt: skip
    trained, gap = made.store.trained, coming - read["value"][made.store.trained]
    assert made.columns["returns"][trained] == pytest.approx(coming) and made.columns["before"][trained] == pytest.approx(coming - gap)
    assert made.columns["advantage"][trained] == pytest.approx((gap - gap.mean()) / np.sqrt(gap.var() + 1e-8))
    assert gap.std() > 0.1 and abs(read["value"][trained]).max() > 0.1


def test_a_kl_that_is_a_loss_is_not_in_the_reward(source):
    made, _ = rollouts.credited(Credit("group", in_reward=False), source, Kept(beta=0.5), CHOSEN, NUMBER)
    raw = torch.from_numpy(rewards(rollouts.draw(source, CHOSEN, NUMBER), [RECORDS[r].prompt for r in CHOSEN]))
    ends = made.store.start[1:][made.store.response >= 0] - 1
    assert made.columns["advantage"][ends] == pytest.approx(onpolicy.group(raw).numpy().ravel(), abs=1e-9)
    assert made.columns["reference"][made.store.trained] == pytest.approx(
        rollouts.read(source, made.store, policy=True, reference=True)["reference"][made.store.trained])


def test_running_normalisation_is_that_of_all_answers_so_far():
    chance, kept, seen = np.random.default_rng(0), Kept(), np.zeros(0)
    for size in (4, 9, 2, 30):
        raw = chance.normal(5, 3, size)
        seen = np.concatenate([seen, raw])
        assert rollouts._normal(kept, raw) == pytest.approx((raw - seen.mean()) / np.sqrt(seen.var() + 1e-8), rel=1e-12)


def test_a_round_of_pairs_by_hand(source):
    """Three answers of the policy and one of the reference, which may be half of a pair but counts in none of the policy's numbers."""
    kept = Kept()
    made, facts = rollouts.paired(source, kept, CHOSEN, NUMBER, best_worst=True, reference=True, drawn=True)
    own, theirs = rollouts.draw(source, CHOSEN, NUMBER), rollouts.draw(source, CHOSEN, NUMBER, reference=True, k=1)
    assert made.ids == [[*a, *b] for a, b in zip(ids(own), ids(theirs), strict=True)] and made.drawn
    both = [[*a, *b] for a, b in zip(own, theirs, strict=True)]
    scores = rewards(both, [RECORDS[r].prompt for r in CHOSEN])
    tied = np.ptp(scores, axis=1) == 0
    assert made.score == pytest.approx(scores) and 0 < tied.sum() < 3
    assert made.pair.tolist() == [[-1, -1] if t else [r.argmax(), r.argmin()] for r, t in zip(scores, tied, strict=True)]
    assert made.store.drawn[made.store.response >= 0].tolist() == [False, False, False, True] * 3
    drawn = np.array([p for row in own for s in row for p in s.logps])
    wanted = {"objective/scores": scores[:, :3].mean(), "objective/scores_margin": np.ptp(scores, axis=1).mean(),
              "objective/ties": tied.sum(), "objective/entropy": -drawn.sum() / 9, "rollout/length": len(drawn) / 9,
              "val/num_eos_tokens": sum(s.finished for row in own for s in row)}  # fmt: skip
    assert {name: facts[name] for name in wanted} == pytest.approx(wanted)
    with torch.no_grad():  # what training reads of the reference: at temperature 1, the losses' own
        found = rollouts.read(replace(source, temperature=1.0), made.store, policy=False, reference=True)["reference"]
    assert made.columns["reference"] == pytest.approx(found) and set(made.columns) == {"reference"}
    for number in range(4):  # lots of each round's own
        drawn_lots, _ = rollouts.paired(source, Kept(), CHOSEN, number, best_worst=False, reference=False, drawn=False)
        lots, _ = rollouts.pairs_of(drawn_lots.score, best_worst=False, seed=[source.seed, 2, number])
        assert drawn_lots.pair.tolist() == lots.tolist()


def test_alarms_are_raised_once_and_at_their_thresholds(source):
    kept, raw = Kept(), np.array([1.0, 2.0])
    ended, cut = (Sample((1,), (0.0,), done) for done in (True, False))

    def told(entropy: float, raw=raw, samples=((ended, cut),)) -> list[str]:
        return [alarm.partition(":")[0] for alarm in rollouts.alarms(kept, source, raw, samples, entropy)]

    assert told(10.0) == [] and told(0.6) == [] and told(0.4) == ["entropy-collapse"] and told(0.1) == []
    assert told(10.0, samples=((cut, cut),)) == ["no-end"] and told(10.0, samples=((cut,),)) == []
    assert told(10.0, raw=np.array([1.0])) == [] and told(10.0, raw=np.array([3.0, 3.0])) == ["constant-reward"]
    assert kept.told == ["entropy-collapse", "no-end", "constant-reward"] and kept.entropy == 10.0


def test_what_a_surrogate_reports_and_weighs():
    """Ratios 1.5, .5, 1; values 0.5 and 0 off: clipped at 0.2 from both sides, at clip_value 0.3; terms by their formulas."""
    old, ratio = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64), torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64)
    value = torch.tensor([0.5, 0.1, -0.5], dtype=torch.float64)
    taken = Taken(policy=old + ratio.log(), old=old, advantage=torch.ones(3), reference=old - 0.3, value=value, before=0 * value,
                  returns=torch.ones(3))  # fmt: skip
    surrogate = Surrogate("x", clip_value=0.3, value_weight=0.25, kl="k2", beta=2.0)
    found = surrogate.metrics(taken, None)  # type: ignore[arg-type]
    assert found["policy/clipfrac_avg"].tolist() == [1, 1, 0] and found["val/clipfrac_avg"].tolist() == [1, 0, 1]
    assert torch.allclose(found["policy/approxkl_avg"], ratio.log() ** 2 / 2) and torch.allclose(found["val/ratio"], ratio)
    terms = surrogate.terms(taken, None)  # type: ignore[arg-type]
    assert {name: (float(x), unit) for name, (x, unit) in terms.items()} == {
        "policy_avg": (pytest.approx(-1.2 - 0.5 - 1.0), "tokens"),
        "value_avg": (pytest.approx(0.25 * (0.7**2 + 0.9**2 + 1.5**2) / 2), "tokens"),
        "kl": (pytest.approx(2 * float(((ratio.log() + 0.3) ** 2 / 2).sum())), "tokens")}  # fmt: skip
    assert replace(surrogate, whole=True).terms(taken, None)["kl"][1] == "responses"  # type: ignore[arg-type]
    for whole, fine, burst in ((False, 5.0, 20.0), (True, 500.0, 2000.0)):
        both = [replace(taken, policy=old + torch.tensor(x, dtype=torch.float64).log(), value=None) for x in (fine, burst)]
        assert replace(surrogate, whole=whole).metrics(both[0], None)["val/ratio"].mean() == pytest.approx(fine)  # type: ignore[arg-type]
        with pytest.raises(NumericsError, match="exploded"):
            replace(surrogate, whole=whole).metrics(both[1], None)  # type: ignore[arg-type]


def test_a_whole_answer_is_the_sum_of_its_tokens(source):
    """And its advantage, which stands at each of them, is counted once."""
    made, _ = rollouts.credited(Credit("rloo", in_reward=False), source, Kept(beta=0.1), CHOSEN, NUMBER)
    batch = make_batch(made.store, range(3), columns=made.columns)
    whole, token = (Surrogate("x", whole=w, kl="k2", temperature=0.9).score(rollouts.Learner(source.policy, None), batch)
                    for w in (True, False))  # fmt: skip
    for name in ("policy", "old", "reference"):
        sums = torch.zeros(9, dtype=torch.float64).index_add(0, batch.response, getattr(token, name))
        assert torch.allclose(getattr(whole, name), sums)
    first = [batch.response.tolist().index(r) for r in range(9)]
    assert torch.allclose(whole.advantage, token.advantage[first]) and torch.allclose(token.policy, token.old, atol=1e-5)
