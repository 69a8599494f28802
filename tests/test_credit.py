"""Token-level credit on T3, where soft values are known: TDPO, token rewards, branches after a common beginning. And through a transformer.

Try it: `pytest tests/test_credit.py`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import make
import numpy as np
import pytest
import torch
from test_exact_path import reference_column, t3_store

from preftune import api, engine, evaluate, models, readout, reference
from preftune.batches import make_batch, make_step
from preftune.config import Evaluate
from preftune.exact import BOS, T3, TableModel
from preftune.losses import LOSSES
from preftune.objectives import preference
from preftune.readout import forward_kl, hidden_states
from preftune.records import Judgement, Record, Response
from preftune.stages import evaluate as stage
from preftune.store import build, from_ids
from preftune.tokens import make_codec

pytestmark = pytest.mark.usefixtures("private_cache")

# ---- TDPO ------------------------------------------------------------------------------------------------------------------


def rows(logits: torch.Tensor) -> dict[tuple[int, ...], list[float]]:
    """Next-token probabilities of T3 at each prefix, in plain numbers."""
    out = {}
    for prefix, row in zip(T3.prefixes, logits.tolist(), strict=True):
        weight = [math.exp(x) for x in row]
        out[prefix] = [w / sum(weight) for w in weight]
    return out


def walked(sequence: tuple[int, ...]) -> tuple[float, float]:
    """(log pi - log ref, sum over prefixes of KL(ref||pi)) of a sequence, token by token."""
    pi, ref = rows(T3.policy), rows(T3.reference)
    ratio = distance = 0.0
    for t, token in enumerate(sequence):
        if sequence[:t] in pi:  # after three tokens the end is forced
            p, q = pi[sequence[:t]], ref[sequence[:t]]
            ratio += math.log(p[token] / q[token])
            distance += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return ratio, distance


@pytest.mark.parametrize(("name", "numbers"), [("tdpo1", {"beta": 0.3}), ("tdpo2", {"beta": 0.3, "alpha": 0.7})])
def test_tdpo_on_t3_by_plain_numbers(name, numbers):
    """All 105 pairs through store, batch and readout, against sums over prefixes in plain Python."""
    store = t3_store()
    objective = replace(preference([(1.0, name, numbers)]), frozen=TableModel.t3_reference())
    batch = make_batch(store, [0], columns={"reference": reference_column(store)})
    with torch.no_grad():
        columns = objective.score(TableModel.t3_policy(), batch)
    found = [walked(s) for s in T3.sequences]
    assert columns.kl.tolist() == pytest.approx([k for _, k in found], abs=1e-12)
    chosen, rejected = (columns[batch.table.pair[:, i]] for i in (0, 1))
    want = []
    for i, j in batch.table.pair.tolist():
        (a, k), (b, m) = found[i], found[j]
        margin = numbers["beta"] * (a - b - numbers.get("alpha", 1.0) * (m - k))
        want.append(math.log1p(math.exp(-margin)))
    assert LOSSES[name].function(chosen, rejected, **numbers).tolist() == pytest.approx(want, abs=1e-12)


def test_forward_kl_gradient_is_pi_minus_ref():
    """With respect to the logits of each prefix, as often as it is stood on; by chunks the same numbers."""
    policy, frozen = TableModel.t3_policy(), TableModel.t3_reference()
    batch = make_batch(from_ids([[BOS]], [T3.sequences]), [0])
    found = []
    for logits in (readout.LOGITS, 4 * 2 * 3):
        with pytest.MonkeyPatch.context() as few:
            few.setattr(readout, "LOGITS", logits)
            value = forward_kl(policy, hidden_states(policy, batch), frozen, hidden_states(frozen, batch), batch)
            found.append((value.detach(), *torch.autograd.grad(value.sum(), policy.lm_head.weight)))
    often = T3.visits.sum(0)
    want = often[:, None] * (T3.policy.softmax(-1) - T3.reference.softmax(-1))
    torch.testing.assert_close(found[0][1][:, :7].T, want, rtol=0, atol=1e-12)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_tdpo2_holds_the_chosen_side():
    """Its gradient by central differences with every K_w kept as it was; TDPO1's, whose value is the same at alpha 1, is another."""
    store, frozen, model = t3_store(), TableModel.t3_reference(), TableModel.t3_policy()
    step = make_step(store, [0], micro_tokens=10_000, columns={"reference": reference_column(store)})
    both = (("tdpo1", {}), ("tdpo2", {"alpha": 1.0}))
    objectives = [replace(preference([(1.0, name, numbers)]), frozen=frozen) for name, numbers in both]
    weight, gradients, losses = model.lm_head.weight, [], []
    for objective in objectives:
        weight.grad = None
        losses.append(float(engine.accumulate(engine.make_state(model, rate=lambda s: 0.0, clip=0.0), step, objective)[0]))
        gradients.append(weight.grad.clone())
    assert losses[0] == losses[1] and (gradients[0] - gradients[1]).abs().max() > 1e-3
    batch, table = step.micro[0], step.micro[0].table
    with torch.no_grad():
        held = objectives[1].score(model, batch).kl

        def value() -> float:
            columns, total = objectives[1].score(model, batch), 0.0
            for (w, x), p in zip(table.pair.tolist(), table.pair_prob.tolist(), strict=True):
                for good, bad, share in ((w, x, p), (x, w, 1 - p)):
                    margin = 0.1 * (columns.ratio[good] - columns.ratio[bad] - (columns.kl[bad] - held[good]))
                    total += share * math.log1p(math.exp(-float(margin)))
            return total / len(table.pair)

        assert value() == pytest.approx(losses[1], abs=1e-12)
        for token, prefix in ((0, 0), (2, 0), (1, 3), (0, 5)):
            found = []
            for sign in (1, -1):
                weight[token, prefix] += sign * 1e-5
                found.append(value())
                weight[token, prefix] -= sign * 1e-5
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(gradients[1][token, prefix]), abs=1e-8)


def test_no_distribution_of_all_targets_exists(monkeypatch):
    """With small chunks the largest logits of either model, in both passes, are of half a chunk."""
    policy, frozen = models.prepare(make.model(seed=1)), models.prepare(make.model(seed=2))
    store = make.store(4, k=2)
    column = reference.compute(frozen, store, micro_tokens=10**6)
    monkeypatch.setattr(readout, "LOGITS", 262 * 8)
    seen: list[int] = []
    heads = [m.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.shape[0])) for m in (policy, frozen)]
    objective = replace(preference([(1.0, "tdpo2", {})]), frozen=frozen)
    state = engine.make_state(policy, rate=lambda s: 0.0, clip=0.0)
    step = make_step(store, range(4), micro_tokens=10**6, columns={"reference": column})
    engine.accumulate(state, step, objective)
    for head in heads:
        head.remove()
    targets = int(step.totals["tokens"])
    assert targets > 40 and max(seen) <= 8 and sum(seen) > 3 * targets
    assert all(p.grad is None for p in frozen.parameters())


# ---- token rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_token_rewards_are_rewards_and_differences_of_values(beta):
    """Property 14 through the real path, pi* as the model: each token is r_t + V(s') - V(s), an answer sums to r - V()."""
    store = from_ids([[BOS]], [T3.sequences])
    value, best = T3.soft_values(beta=beta)
    model = TableModel.from_t3(best)
    found = evaluate.token_rewards(model, store, [0], reference_column(store), beta=beta, micro_tokens=10_000)
    at = dict(zip(T3.prefixes, value.tolist(), strict=True))
    assert np.isnan(found[0]), "the prompt"
    for segment, sequence in enumerate(T3.sequences, 1):
        mine = found[store.start[segment] : store.start[segment + 1]]
        want = []
        for t, token in enumerate(sequence):
            after = at.get(sequence[: t + 1], 0.0) if token != 2 else 0.0
            want.append(float(T3.token_reward[token]) + after - at[sequence[:t]] if sequence[:t] in at else 0.0)
        assert mine.tolist() == pytest.approx(want, abs=1e-12)
        assert mine.sum() == pytest.approx(float(T3.reward[segment - 1] - value[0]), abs=1e-12)


def test_evaluate_writes_tokens(tmp_path):
    """Their sum is the implicit reward, their text the answer; the page colours them and shows hostile text as text."""
    model, other = make.write_model(tmp_path / "model", seed=1), make.write_model(tmp_path / "reference", seed=2)
    data = tmp_path / "data.jsonl"
    pairs = [("a", " <script>x</script>", " no"), ("b", " thé end", " that"), ("c", " x", " y")]
    data.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in pairs), encoding="utf-8")
    common = {"model": str(model), "reference": str(other), "data": [str(data)], "sample_prompts": 0, "beta": 0.5, "finish": "never"}
    common |= {"loss": "sigmoid", "label_smoothing": 0.0}
    facts = stage.written(Evaluate(tokens=2, page=str(tmp_path / "page.html"), **common))
    rows = facts["files"][0]["tokens"]
    assert [(r["record"].rsplit(":", 1)[1], r["response"]) for r in rows] == [("1", 0), ("1", 1), ("2", 0), ("2", 1)]
    assert "".join(text for text, _ in rows[0]["tokens"]) == " <script>x</script>"
    assert "".join(text for text, _ in rows[2]["tokens"]) == " thé end"
    for row in rows:
        assert row["reward"] == pytest.approx(sum(value for _, value in row["tokens"]))
    every = stage.written(Evaluate(tokens=3, output=str(tmp_path / "all.json"), **common))
    rows = every["files"][0]["tokens"]
    chosen = np.mean([r["reward"] for r in rows if r["response"] == 0])
    assert chosen == pytest.approx(every["files"][0]["metrics"]["rewards/chosen"], abs=1e-5)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="credit"') == 4 and "color-mix" in page and "<script>" not in page


# ---- branches --------------------------------------------------------------------------------------------------------------


def judged(store, pairs):
    """A store whose one record judges these pairs of responses."""
    first = int(store.record_start[0]) + 1
    return replace(store, pair=np.array(pairs).reshape(-1, 2) + first, pair_prob=np.linspace(0.6, 1, len(pairs)),
                   pair_weight=np.ones(len(pairs)), pair_start=np.array([0, len(pairs)]))  # fmt: skip


@pytest.mark.parametrize("name", ["sigmoid", "ipo-sum", "hinge", "exo", "tdpo1"])
def test_a_common_beginning_in_the_prompt_is_the_same_loss(name):
    """T3, float64: the seven answers that begin with token 0, whole, and as branches after the prompt BOS 0: loss and gradients."""
    mine = [s for s in T3.sequences if s[0] == 0]
    pairs = [(i, j) for i in range(len(mine)) for j in range(i)]
    found = []
    for store in (judged(from_ids([[BOS]], [mine]), pairs), judged(from_ids([[BOS, 0]], [[s[1:] for s in mine]]), pairs)):
        column, model = np.zeros(len(store.tokens)), TableModel.t3_policy()
        still, batch = TableModel.t3_reference(), make_batch(store, [0])
        with torch.no_grad():
            column[batch.slot.numpy()] = readout.token_logps(still, hidden_states(still, batch), batch).numpy()
        step = make_step(store, [0], micro_tokens=10_000, columns={"reference": column})
        state = engine.make_state(model, rate=lambda s: 0.0, clip=0.0)
        loss, *_ = engine.accumulate(state, step, replace(preference([(1.0, name, {})]), frozen=still))
        found.append((float(loss), model.lm_head.weight.grad.clone(), step.totals["tokens"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)
    assert found[0][1].abs().max() > 1e-4 and found[0][2] == found[1][2] + len(mine), "and the beginning is trained in one of them only"


def test_branches_through_a_transformer():
    """The same with text, a tokeniser and attention: 'a dog' + branches against whole answers, gradients of every weight."""
    beginning, branches = " a dog so", (" thinks they walk", " home", " that the cat")
    order = Judgement(((1,), (0,), (2,)))
    whole = Record("x:", tuple(Response(beginning + b) for b in branches), (order,))
    steps = Record("x:" + beginning, tuple(Response(b) for b in branches), (order,))
    policy, frozen, found = models.prepare(make.model(seed=1)), models.prepare(make.model(seed=2)), []
    for record in (whole, steps):
        store = build([record], make_codec(make.tokenizer()), max_length=None)[0]
        column = reference.compute(frozen, store, micro_tokens=1000)
        state = engine.make_state(copy.deepcopy(policy), rate=lambda s: 0.0, clip=0.0)
        loss, *_ = engine.accumulate(state, make_step(store, [0], micro_tokens=1000, columns={"reference": column}),
                                     preference([(1.0, "sigmoid", {"beta": 0.5})]))  # fmt: skip
        found.append((float(loss), {n: m.grad for n, m in state.masters.items() if m.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    largest = max(float(g.abs().max()) for g in found[0][1].values())
    assert all(float((found[1][1][n] - g).abs().max()) < 1e-5 * largest for n, g in found[0][1].items())


@pytest.mark.parametrize("more", [{"lora": 4, "lr": 1e-2}, {"reference_update": "soft", "reference_every": 2, "lr": 3e-3}])
def test_tdpo_trains_from_files(more, tmp_path):
    """LoRA, and all weights with a reference that moves: it starts at ln 2 (the self-check), and the loss falls."""
    model, data = make.write_model(tmp_path / "model"), make.write_pairs(tmp_path / "pairs.jsonl", 24)
    run = api.FUNCTIONS["dpo"](model=model, data=data, output=tmp_path / "run", loss="tdpo2", epochs=3, batch_size=8, beta=0.5,
                               eval_prompts=0, eval_every=9, report=False, **more)  # fmt: skip
    assert run.results["before"]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.results["after"]["eval/loss"] < 0.6
