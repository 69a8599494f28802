"""What moves while a run goes on: the numbers that beta-DPO carries, and TR-DPO's reference. Same in every cut, bitwise on resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import make
import pytest
import torch
from test_dpo import same_run

from preftune import adapters, checkpoints, engine, models, readout, reference
from preftune.batches import make_step
from preftune.config import Dpo
from preftune.errors import UsageError
from preftune.objectives import preference
from preftune.stages import dpo

STEPS = [[3, 0, 7, 5, 1], [2, 4, 6, 8, 0], [1, 2, 3, 4, 5]]


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def store():
    return make.store(9, k=3)


@pytest.fixture(scope="module")
def column(store):
    return reference.compute(models.prepare(make.model(seed=2)), store, micro_tokens=200)


@pytest.fixture
def options(tmp_path) -> Dpo:
    model, pairs = make.write_model(tmp_path / "model"), make.write_pairs(tmp_path / "pairs.jsonl", 24)
    return Dpo(model=str(model), data=[str(pairs)], output=str(tmp_path / "whole"), lr=2e-3, epochs=2, batch_size=5, sample_tokens=6,
               eval_prompts=2, holdout=0.2, report=False, threads=1, eval_every=3, save_every=1, keep=99)  # fmt: skip


# ---- what beta-DPO carries -------------------------------------------------------------------------------------------------


def walk(store, column, objective, micro_tokens: int) -> tuple[engine.State, list[dict[str, float]]]:
    state = engine.make_state(models.prepare(make.model(seed=1)), rate=lambda step: 1e-3, clip=0.0)
    steps = (make_step(store, records, columns={"reference": column}, micro_tokens=micro_tokens) for records in STEPS)
    return state, list(engine.train(state, steps, objective))


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_beta_dpo_is_the_same_in_every_cut_over_several_steps(keep, store, column):
    objective = preference([(1.0, "beta-dpo", {"keep": keep}), (0.5, "nll", {})], label_smoothing=0.1)
    whole, lines = walk(store, column, objective, 10**6)
    cut, others = walk(store, column, objective, 60)
    assert whole.carry.keys() == {"beta-dpo.mean", "beta-dpo.spread", "beta-dpo.steps"} and whole.carry["beta-dpo.steps"] == 3
    assert whole.carry == pytest.approx(cut.carry, rel=1e-4)
    for one, other in zip(lines, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["carry/beta-dpo.mean"] == pytest.approx(other["carry/beta-dpo.mean"], rel=1e-4) != 0
    assert not torch.allclose(next(iter(whole.masters.values())), next(iter(make.model(seed=1).parameters())), atol=1e-6)


def test_what_is_carried_moves_only_with_a_step_that_was_taken(store, column):
    objective = preference([(1.0, "beta-dpo", {})])
    state, _ = walk(store, column, objective, 10**6)
    before = dict(state.carry)
    step = make_step(store, STEPS[0], columns={"reference": column}, micro_tokens=10**6)
    engine.accumulate(state, step, objective)
    assert state.carry == before
    assert objective.terms(objective.score(state.model, step.micro[0]), step.micro[0].table)["beta-dpo"][0].item() != pytest.approx(
        objective.terms(objective.score(state.model, step.micro[0]), step.micro[0].table, before)["beta-dpo"][0].item(), rel=1e-6)


# ---- TR-DPO: a reference that moves ----------------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight as it acts, by plain loops: W + (alpha/rank) B A where there is LoRA."""
    if not hasattr(model, "get_base_model"):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            found[f"{name}.weight"] = module.base_layer.weight.detach() + module.scaling["default"] * up @ down
    return found


def policy(lora: int, kind: str = "llama", **extra) -> torch.nn.Module:
    model = models.prepare(make.model(kind, seed=1, **extra).double())
    return models.add_lora(model, rank=lora, alpha=None, targets="all-linear", seed=0).double() if lora else model


def moving_state(model, alpha: float, every: int, lr: float = 5e-3) -> engine.State:
    state = engine.make_state(model, rate=lambda step: lr, clip=0.0)
    state.moving = reference.moving(model, state.masters, alpha=alpha, every=every)
    return state


DPO = preference([(1.0, "sigmoid", {"beta": 0.5})])


def run_steps(state, store, columns, *, micro_tokens: int = 150, count: int = 6):
    steps = (make_step(store, STEPS[i % 3], columns=columns, micro_tokens=micro_tokens) for i in range(count))
    yield from engine.train(state, steps, DPO)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(("alpha", "every"), [(0.0, 1), (0.6, 100)])
def test_a_reference_that_never_moves_is_the_column(alpha, every, lora, store):
    """alpha 0, or no update within the run: loss, gradient norm and weights of the column's run to 1e-6, its margins too."""
    still, moved = (engine.make_state(policy(lora), rate=lambda step: 5e-3, clip=0.0), moving_state(policy(lora), alpha, every))
    columns = {"reference": reference.compute(still.model, store, micro_tokens=200)}
    for one, other in zip(run_steps(still, store, columns), run_steps(moved, store, {}), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "displacement"):
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    assert abs(one["rewards/margins"]) > 0.1, "the policy moved"
    for name, master in still.masters.items():
        assert float((master - moved.masters[name]).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(("alpha", "every"), [(0.3, 1), (0.6, 2), (1.0, 3)])
def test_the_soft_update_is_its_closed_form(alpha, every, lora, store):
    """ref_n = (1 - alpha)^n ref_0 + sum_k alpha (1 - alpha)^(n-k) pi_k, in float64, over weights gathered by another route; and the
    log-probs that training reads are those of a plain model that holds these weights."""
    model = policy(lora)
    state, seen = moving_state(model, alpha, every), []
    first = weights_of(model)
    for line in run_steps(state, store, {}):
        if line["step"] % every == 0:
            seen.append(weights_of(model))
        n = len(seen)
        expected = {name: (1 - alpha) ** n * w + sum(alpha * (1 - alpha) ** (n - 1 - k) * s[name] for k, s in enumerate(seen))
                    for name, w in first.items()}  # fmt: skip
        own = dict(state.moving.model.named_parameters())
        assert set(expected) == set(state.moving.masters) and len(expected) >= 14
        for name, weight in expected.items():
            torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-14)
            assert own[name].dtype == torch.float64
    assert n == 6 // every and max(float((first[name] - weight).abs().max()) for name, weight in expected.items()) > 1e-3
    plain = models.prepare(make.model(seed=1).double())
    plain.load_state_dict(expected, strict=False)
    step = make_step(store, STEPS[0], micro_tokens=10**6)
    found = reference.live(state.moving, step.micro[0]).columns["reference"].numpy()
    column = reference.compute(plain, store, micro_tokens=300)
    assert abs(found - column[step.micro[0].slot.numpy()]).max() < 1e-6
    assert not any(p.requires_grad for p in state.moving.model.parameters()) or not lora


@pytest.mark.parametrize("lora", [0, 4])
def test_hard_at_every_step_starts_anew_at_every_step(lora, store):
    """Margins are zero, the loss is ln 2 and the gradient -beta/2 (grad log pi_w - grad log pi_l), whatever the policy has become."""
    model = policy(lora)
    state, free = moving_state(model, 1.0, 1), preference([(1.0, "reference-free", {"beta": 0.5})])
    losses, off = [], 0.0
    for i in range(4):
        step = make_step(store, STEPS[i % 3], micro_tokens=150)
        slopes = {}
        for p in model.parameters():
            p.grad = None
        for batch in step.micro:  # grad of -beta/2 (log pi_w - log pi_l), written out
            columns, pair, votes = free.score(model, batch), batch.table.pair, batch.table.pair_weight
            (-0.25 * (votes * (columns.policy[pair[:, 0]] - columns.policy[pair[:, 1]])).sum() / step.totals["pairs"]).backward()
        slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        line = next(engine.train(state, [step], DPO))
        losses.append(line["loss"])
        assert abs(line["rewards/margins"]) < 1e-6 and abs(line["displacement"]) < 1e-5
        largest = max(float(g.abs().max()) for g in slopes.values())
        for name, gradient in slopes.items():
            off = max(off, float((state.masters[name].grad - gradient).abs().max()) / largest)
    assert losses == pytest.approx([0.6931471805599453] * 4, abs=1e-6) and off < 1e-5


def test_a_moving_reference_is_none_of_the_policy_s_business(store):
    """Training moves no weight of the reference, an update none of the policy; what does not train is one copy in memory."""
    model = policy(4)
    state = moving_state(model, 0.5, 100)
    before = {name: p.clone() for name, p in state.moving.model.named_parameters()}
    base = model.get_base_model()
    assert state.moving.model.get_input_embeddings().weight is base.get_input_embeddings().weight
    list(run_steps(state, store, {}, count=2))
    assert all(torch.equal(before[name], p) for name, p in state.moving.model.named_parameters())
    policy_before = {name: p.clone() for name, p in model.named_parameters()}
    reference.follow(state.moving, model, state.masters)
    assert all(torch.equal(policy_before[name], p) for name, p in model.named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in state.moving.model.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tied_heads_and_other_layers_follow_too(kind, store):
    """GPT-2's weights lie the other way round; a head tied to the embedding gets its own copy where only the head has LoRA."""
    model = models.prepare(make.model(kind, seed=1, tie_word_embeddings=True).double())
    model = models.add_lora(model, rank=2, alpha=None, targets="lm_head" if kind == "llama" else "c_attn", seed=0).double()
    state = moving_state(model, 1.0, 1)
    list(run_steps(state, store, {}, count=3))
    batch = make_step(store, STEPS[0], micro_tokens=10**6).micro[0]
    with torch.no_grad():
        wanted = DPO.score(model, reference.live(state.moving, batch))
    torch.testing.assert_close(wanted.policy, wanted.reference, rtol=0, atol=1e-4)
    with readout.as_reference(model, None) as off, torch.no_grad():
        assert float((DPO.score(off, reference.live(state.moving, batch)).policy - wanted.policy).abs().max()) > 1e-2


def test_a_bf16_reference_moves_in_fp32(store):
    """An update far below bf16's step of 1/256 still adds up."""
    model = models.prepare(make.model(seed=1).to(torch.bfloat16))
    state = moving_state(model, 1e-3, 1, lr=1e-2)
    name = "model.layers.0.mlp.up_proj.weight"
    before = state.moving.masters[name].clone()
    list(run_steps(state, store, {}, count=5))
    moved = (state.moving.masters[name] - before).abs()
    assert state.moving.masters[name].dtype == torch.float32 and 0 < float(moved.max()) < 1e-3
    own = dict(state.moving.model.named_parameters())[name]
    assert own.dtype == torch.bfloat16 and torch.equal(own, state.moving.masters[name].to(torch.bfloat16))
    assert state.moving.nbytes == sum(6 * m.numel() for m in state.moving.masters.values())


@pytest.mark.parametrize("lora", [0, 4])
def test_evaluations_stay_with_the_first_reference(lora, options):
    """hard, every step: training starts at ln 2 each time, while the held-out margins and the KL of samples keep growing."""
    assert dpo.run(replace(options, reference_update="hard", reference_every=1, lora=lora, epochs=3)) == 0
    lines = [json.loads(row) for row in (Path(options.output) / "metrics.jsonl").read_text().splitlines()]
    train, held = [row for row in lines if "loss" in row], [row for row in lines if "eval/loss" in row]
    assert [row["loss"] for row in train] == pytest.approx([0.693147] * len(train), abs=2e-5)
    assert held[-1]["eval/loss"] < 0.6 and held[-1]["eval/rewards/margins"] > 0.1
    assert held[-1]["kl_sequence_rb"] > 0.01 and held[0]["kl_sequence_rb"] == 0


@pytest.mark.parametrize("how", [{"reference_update": "hard"}, {"reference_update": "soft", "reference_alpha": 0.3}], ids=["hard", "soft"])
def test_an_adapter_as_given_goes_on_with_a_reference_that_follows_it(how, options, tmp_path):
    """Training starts at ln 2 against the adapter as given; the reference that moves is W + its delta in closed form; evaluations stay
    with the adapter as given; a stopped run ends in the same bits."""
    assert dpo.run(replace(options, lora=2, lr=2e-2, epochs=1, output=str(tmp_path / "given"))) == 0
    wanted = replace(options, model=str(tmp_path / "given" / "adapter"), adapter="continue", reference_every=1, lr=2e-2, **how)
    assert dpo.run(wanted) == 0
    whole = Path(wanted.output)
    lines = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in lines if "loss" in row]
    if how["reference_update"] == "hard":
        assert losses == pytest.approx([0.693147] * 8, abs=2e-5)
    else:
        assert losses[0] == pytest.approx(0.693147, abs=2e-5) and losses[-1] < 0.69
    held = [row for row in lines if "eval/loss" in row]
    assert held[0]["kl_sequence_rb"] == 0 and held[-1]["kl_sequence_rb"] > 0.01 and held[-1]["eval/loss"] < 0.68

    def acted(step: int) -> dict[str, torch.Tensor]:
        """W + its delta under the adapter of a checkpoint, by plain loops over the base's modules."""
        model = adapters.go_on(wanted.model, dtype="fp32", device="cpu")
        if step:
            own, kept = dict(model.named_parameters()), checkpoints.at(whole, step).tensors("weights")
            with torch.no_grad():
                for name, weight in kept.items():
                    own[name].copy_(weight)
        return weights_of(model)

    alpha = how.get("reference_alpha", 1.0)
    expected = acted(0)
    for step in range(1, 9):
        expected = {name: alpha * w + (1 - alpha) * expected[name] for name, w in acted(step).items()}
    found = checkpoints.at(whole, 8).tensors("reference")
    assert found.keys() == expected.keys() and len(found) >= 14
    assert max(float((found[name] - w).abs().max()) for name, w in expected.items()) < 1e-5
    cut = tmp_path / "cut"
    make.stop_after(dpo.run, replace(wanted, output=str(cut)), 3)
    dpo.run(Dpo(resume=str(cut)))
    same_run(whole, cut)


def test_a_reference_that_could_not_move_is_refused(options):
    with pytest.raises(UsageError, match="--reference-every 512: the run has 8 steps"):
        dpo.run(replace(options, reference_update="soft"))
    assert not Path(options.output).exists()


# ---- resume ----------------------------------------------------------------------------------------------------------------

MOVING = {
    "beta-dpo": {"loss": "beta-dpo", "loss_arguments": {"keep": 0.6}, "micro_tokens": 100},
    "soft, full": {"reference_update": "soft", "reference_alpha": 0.3, "reference_every": 1, "micro_tokens": 100},
    "hard, full, bf16": {"reference_update": "hard", "reference_every": 3, "dtype": "bf16"},
    "soft, lora": {"reference_update": "soft", "reference_every": 2, "lora": 4},
    "both": {"loss": "beta-dpo", "reference_update": "hard", "reference_every": 4, "lora": 4},
}


@pytest.mark.parametrize("name", MOVING)
def test_resume_is_bitwise(name, options, tmp_path):
    wanted = replace(options, **MOVING[name])
    assert dpo.run(wanted) == 0
    whole = Path(wanted.output)
    for stop in (1, 6):
        cut = tmp_path / f"cut{stop}"
        make.stop_after(dpo.run, replace(wanted, output=str(cut)), stop)
        dpo.run(Dpo(resume=str(cut)))
        same_run(whole, cut)
        one, two = checkpoints.latest(whole), checkpoints.latest(cut)
        assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())
        if "reference_update" in MOVING[name]:
            left, right = one.tensors("reference"), two.tensors("reference")
            assert left.keys() == right.keys() and len(left) >= 14 and all(torch.equal(left[k], right[k]) for k in left)
    if name == "beta-dpo":
        lines = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
        assert [row["carry/beta-dpo.steps"] for row in lines if "loss" in row] == list(range(1, 9))
        assert checkpoints.latest(whole).state["carry"]["beta-dpo.steps"] == 8
