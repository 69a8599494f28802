"""One grid: every way of computing a step gives the same loss and the same gradients, for every loss of the table.

The oracle is plain: one row per response through the model's own forward pass, padded by nothing, log-probs from its own logits.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import make
import numpy as np
import pytest
import torch

from preftune import attention, engine, models, readout, reference
from preftune.batches import make_batch, make_step
from preftune.errors import NumericsError
from preftune.losses import LOSSES, arguments
from preftune.objectives import Columns, preference, supervised, total
from preftune.readout import hidden_states, token_logps
from preftune.selfcheck import own_logps

NAMES = (*(name for name in LOSSES if name != "nominal"), "sigmoid+0.5*nll", "aot+0.5*ld-dpo+wpo", "supervised")
RECORDS = [3, 0, 7, 5, 1]
RELATIVE = 1e-5


def objective_of(name: str) -> Any:
    if name == "supervised":
        return supervised()
    parts = [p.split("*") if "*" in p else ("1", p) for p in name.split("+")]
    return preference([(float(w), n, arguments(n)) for w, n in parts], label_smoothing=0.1 if name == "sigmoid" else 0.0)


@pytest.fixture(scope="module")
def store():
    return make.store(9, k=3, mismatched=True)


@pytest.fixture(scope="module")
def policy():
    return models.prepare(make.model(seed=1))


@pytest.fixture(scope="module")
def frozen():
    return models.prepare(make.model(seed=2))


@pytest.fixture(scope="module")
def column(frozen, store):
    return reference.compute(frozen, store, micro_tokens=100)


@pytest.fixture(autouse=True)
def blocks_everywhere(monkeypatch):
    """Attention by blocks even where masks would be quicker: these trees are small. `masks_everywhere` is the other way."""
    monkeypatch.setattr(attention, "CALL", 0)


def masks_everywhere(monkeypatch: Any) -> None:
    monkeypatch.setattr(attention, "CALL", 1 << 60)


def gradients(model: Any, step: Any, objective: Any) -> tuple[float, dict[str, torch.Tensor]]:
    state = engine.make_state(model, rate=lambda s: 0.0, clip=0.0)
    for p in model.parameters():
        p.grad = None
    loss, *_ = engine.accumulate(state, step, objective)
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def learning(name: str, policy: Any) -> Any:
    """The policy, beside a value model where the loss learns one."""
    if "value" not in objective_of(name).needs:
        return policy
    learner = readout.with_value(policy, "head", device="cpu")
    torch.nn.init.normal_(learner.value.head.weight, generator=torch.Generator().manual_seed(3))
    return learner


def plain(model: Any, store: Any, columns: Any, objective: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle: the whole step at once, log-probs by own_logps from single plain rows."""
    whole, model = model, getattr(model, "policy", model)
    for p in whole.parameters():
        p.grad = None
    step = make_step(store, RECORDS, micro_tokens=10**6, columns=columns, share=False)
    batch = step.micro[0]
    logps = own_logps(model, store, batch)
    ref = readout.response_sums(batch.columns["reference"], batch)
    ref = ref if objective.reference != "none" else None
    scored = Columns(readout.response_sums(logps, batch), ref, readout.response_sums(torch.ones_like(logps), batch).detach(),
                     *inside(model, batch, logps, objective.needs), score=batch.table.score, member=batch.table.member,
                     kl=distance(model, objective.frozen, batch) if "kl" in objective.needs else None,
                     value=at_prompts(whole, batch) if "value" in objective.needs else None)  # fmt: skip
    loss = total(objective.terms(scored, batch.table, objective.carry), step.totals)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}


def at_prompts(learner: Any, batch: Any) -> torch.Tensor:
    """What the head says of the state before each response's first token, row by row."""
    first = [int(batch.hidden[batch.response == r][0]) for r in range(batch.responses)]
    rows = [next((a, b) for a, b in batch.segments.trees if a <= h < b) for h in first]
    states = [learner.policy.get_decoder()(input_ids=batch.tokens[None, a:b], use_cache=False).last_hidden_state[0, h - a]
              for h, (a, b) in zip(first, rows, strict=True)]  # fmt: skip
    return learner.value.head(torch.stack(states).detach())[:, 0].double()


def inside(model: Any, batch: Any, logps: torch.Tensor, needs: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Token log-ratios as rows and the sums of log sum_v pi(v)^2, response by response in plain loops."""
    mine = [(batch.response == r).nonzero()[:, 0] for r in range(batch.responses)]
    tokens = collision = None
    if "tokens" in needs:
        ratio = logps.double() - batch.columns["reference"].double()
        tokens = torch.nn.utils.rnn.pad_sequence([ratio[i] for i in mine], batch_first=True)
    if "collision" in needs:
        with torch.no_grad():
            probs = [model(input_ids=batch.tokens[None, a:b], use_cache=False).logits[0].softmax(-1) for a, b in batch.segments.trees]
            collision = torch.stack([(torch.cat(probs)[batch.hidden[i]].double() ** 2).sum(-1).log().sum() for i in mine])
    return tokens, collision


def distance(model: Any, frozen: Any, batch: Any) -> torch.Tensor:
    """Sums over prefixes of KL(ref||pi), row by row from the models' own logits."""
    with torch.no_grad(), readout.as_reference(model, frozen) as still:
        theirs = torch.cat([still(input_ids=batch.tokens[None, a:b], use_cache=False).logits[0] for a, b in batch.segments.trees])
    ours = torch.cat([model(input_ids=batch.tokens[None, a:b], use_cache=False).logits[0] for a, b in batch.segments.trees])
    q, p = theirs[batch.hidden].double().log_softmax(-1), ours[batch.hidden].double().log_softmax(-1)
    return readout.response_sums((q.exp() * (q - p)).sum(-1), batch)


def same(got: tuple[float, dict], want: tuple[float, dict]) -> None:
    assert got[0] == pytest.approx(want[0], rel=RELATIVE, abs=RELATIVE)
    largest = max(float(g.abs().max()) for g in want[1].values())
    assert largest > 0 and got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert float((got[1][name] - gradient).abs().max()) <= RELATIVE * largest, name


LORA = [(name, "all-linear") for name in ("sigmoid", "kto", "tdpo1")] + [(name, "q_proj,lm_head") for name in ("sigmoid", "tdpo2")]

MODES: dict[str, dict[str, Any]] = {
    "packed, whole step": {"micro_tokens": 10**6},
    "packed, every record its own pass": {"micro_tokens": 1},
    "packed, two passes or three": {"micro_tokens": 150},
    "one row per response": {"micro_tokens": 10**6, "share": False},
    "one row per response, cut": {"micro_tokens": 120, "share": False},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_mode_equals_the_plain_path(name, policy, frozen, store, column, monkeypatch):
    objective, columns = replace(objective_of(name), frozen=frozen), {"reference": column}
    policy = learning(name, policy)
    want = plain(policy, store, columns, objective)
    swept = 0
    for mode in MODES.values():
        same(gradients(policy, make_step(store, RECORDS, columns=columns, **mode), objective), want)
        swept += 1
    live = reference.compute(frozen, store, micro_tokens=10**6)  # another packing of the reference
    same(gradients(policy, make_step(store, RECORDS, columns={"reference": live}, micro_tokens=150), objective), want)
    with monkeypatch.context() as few:
        few.setattr(readout, "LOGITS", 262 * 7)  # the head seven targets at a time
        masks_everywhere(few)
        same(gradients(policy, make_step(store, RECORDS, columns=columns, micro_tokens=150), objective), want)
    checkpointed = copy.deepcopy(policy)
    models.checkpoint_layers(getattr(checkpointed, "policy", checkpointed))
    same(gradients(checkpointed, make_step(store, RECORDS, columns=columns, micro_tokens=150), objective), want)
    same(gradients(policy, make_step(store, RECORDS[::-1], columns=columns, micro_tokens=150), objective), want)
    assert swept == 5 and len(NAMES) == len(LOSSES) + 2 >= 37


def test_doubling_the_batch_changes_nothing(policy, frozen, store, column):
    plainly = policy
    for name in NAMES:
        objective, columns = replace(objective_of(name), frozen=frozen), {"reference": column}
        policy = learning(name, plainly)
        once = gradients(policy, make_step(store, RECORDS, columns=columns, micro_tokens=150), objective)
        twice = gradients(policy, make_step(store, RECORDS * 2, columns=columns, micro_tokens=150), objective)
        same(twice, once)


def test_with_lora_the_reference_is_the_base_model(frozen, store, column):
    model = models.add_lora(copy.deepcopy(frozen), rank=4, alpha=None, targets="all-linear", seed=0)
    fresh = reference.compute(model, store, micro_tokens=10**6)
    assert np.abs(fresh - column).max() < 1e-5  # B = 0: policy = reference
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.3)
    moved = reference.compute(model, store, micro_tokens=10**6)
    with readout.as_reference(model, None) as off:
        assert np.abs(reference.compute(off, store, micro_tokens=10**6) - column).max() < 1e-5
    assert np.abs(moved - column).max() > 0.05


@pytest.mark.parametrize(("name", "targets"), LORA)
def test_lora_steps_equal_in_every_cut(name, targets, frozen, store, column):
    model = models.add_lora(copy.deepcopy(frozen), rank=4, alpha=None, targets=targets, seed=0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    objective, columns = objective_of(name), {"reference": column}
    want = plain(model, store, columns, objective)
    for mode in MODES.values():
        same(gradients(model, make_step(store, RECORDS, columns=columns, **mode), objective), want)


def test_bf16_gradients_gather_in_fp32(store, column):
    model = models.prepare(make.model(seed=1).to(torch.bfloat16))
    objective = objective_of("sigmoid")
    state = engine.make_state(model, rate=lambda s: 1e-3, clip=0.0)
    step = make_step(store, RECORDS, columns={"reference": column}, micro_tokens=60)
    assert len(step.micro) > 2
    engine.accumulate(state, step, objective)
    gathered = {n: m.grad.clone() for n, m in state.masters.items()}
    for m in state.masters.values():
        m.grad = None
    engine.accumulate(state, make_step(store, RECORDS, columns={"reference": column}, micro_tokens=10**6), objective)
    largest = max(float(m.grad.abs().max()) for m in state.masters.values())
    assert all(float((gathered[n] - m.grad).abs().max()) < 0.05 * largest for n, m in state.masters.items())
    assert all(m.dtype == torch.float32 and m.grad.dtype == torch.float32 for m in state.masters.values())
    assert all(w.dtype == torch.bfloat16 and w.grad is None for w in state.weights.values())
    before = {n: m.clone() for n, m in state.masters.items()}
    next(engine.train(state, [step], objective))
    assert any(not torch.equal(before[n], m) for n, m in state.masters.items())
    assert all(torch.equal(w, state.masters[n].to(torch.bfloat16)) for n, w in state.weights.items())


@pytest.mark.parametrize("kind", sorted(k for k in make.SIZES))
def test_packed_equals_own_forward_for_every_architecture(kind, monkeypatch):
    model = models.prepare(make.model(kind))
    store = make.store(5, k=3)
    share = readout.packs(model)
    assert share == (kind != "bloom"), "ALiBi models accept a custom attention and never call it: one row per response"
    for change in (lambda few: None, masks_everywhere):
        batch = make_batch(store, range(5), share=share)
        with torch.no_grad(), monkeypatch.context() as few:
            change(few)
            mine = token_logps(model, hidden_states(model, batch), batch)
            own = own_logps(model, store, batch)
        assert float((mine - own).abs().max()) < 2e-5
    longest = batch.segments.ends[-1] - batch.segments.starts[-1]
    assert longest > 8, "rows must be longer than the sliding windows for this to test them"


def test_a_wrong_mask_would_be_seen():
    """The grid's own test: let a response see its sibling and the difference is large."""
    model = models.prepare(make.model())
    store = make.store(5, k=3)
    batch = make_batch(store, range(5))
    causal = {(a, b): torch.ones(b - a, b - a, dtype=torch.bool).tril() for a, b in batch.segments.trees}
    for plan in (tuple((slice(a, b), slice(a, b), True) for a, b in causal), causal):
        batch.segments.plans[None] = plan
        with torch.no_grad():
            wrong = token_logps(model, hidden_states(model, batch), batch)
            assert float((wrong - own_logps(model, store, batch)).abs().max()) > 1e-2


def test_no_tensor_of_targets_by_vocabulary_exists(policy, store, column, monkeypatch):
    """With small chunks no logits larger than a chunk are made, forward or backward."""
    monkeypatch.setattr(readout, "LOGITS", 262 * 5)
    seen: list[int] = []
    head = policy.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, i, o: seen.append(o.shape[0]))
    gradients(policy, make_step(store, RECORDS, columns={"reference": column}, micro_tokens=10**6), objective_of("sigmoid"))
    handle.remove()
    assert max(seen) == 5 and len(seen) > 10


def test_a_non_finite_loss_stops_before_the_step_and_names_the_records(store, column):
    model = models.prepare(make.model(seed=1))
    state = engine.make_state(model, rate=lambda s: 1e-3, clip=1.0)
    poisoned = column.copy()
    poisoned[store.trained.nonzero()[0][:3]] = np.nan
    before = {n: m.clone() for n, m in state.masters.items()}
    step = make_step(store, [4, 0], columns={"reference": poisoned}, micro_tokens=10**6)
    with pytest.raises(NumericsError, match=r"step 1.*made:5, made:1"):
        next(engine.train(state, [step], objective_of("sigmoid"), where=store.where))
    assert all(torch.equal(before[n], m) for n, m in state.masters.items()) and state.step == 0


def test_an_infinite_gradient_with_a_finite_loss_stops_too(store, column):
    model = models.prepare(make.model(seed=1))
    state = engine.make_state(model, rate=lambda s: 1e-3, clip=1.0)
    handle = model.get_output_embeddings().weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(NumericsError, match="gradient norm"):
        next(
            engine.train(
                state, [make_step(store, [4], columns={"reference": column}, micro_tokens=10**6)], objective_of("sigmoid")
            )
        )
    handle.remove()
    assert state.step == 0


def test_schedules():
    rate = engine.schedule("linear", 1.0, steps=10, warmup=0.2)
    assert [round(rate(s), 3) for s in range(10)] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert engine.schedule("constant", 2.0, steps=10, warmup=0)(9) == 2.0
    assert engine.schedule("cosine", 1.0, steps=10, warmup=0)(5) == pytest.approx(0.5)
    assert engine.auto_rate(260_032, lora=False)[0] == 1e-4 and engine.auto_rate(7_000_000_000, lora=True)[0] == 5e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_equals_the_cpu(policy, store, column):
    objective, columns = objective_of("sigmoid"), {"reference": column}
    want = gradients(policy, make_step(store, RECORDS, columns=columns, micro_tokens=150), objective)
    step = make_step(store, RECORDS, columns=columns, micro_tokens=150)
    moved = replace(step, micro=tuple(b.to("cuda") for b in step.micro))
    loss, grads = gradients(copy.deepcopy(policy).to("cuda"), moved, objective)
    assert loss == pytest.approx(want[0], rel=1e-4)
    largest = max(float(g.abs().max()) for g in want[1].values())
    assert all(float((grads[n].cpu() - g).abs().max()) < 1e-3 * largest for n, g in want[1].items())
