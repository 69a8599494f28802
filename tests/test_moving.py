"""What moves while a run goes on: the numbers that beta-DPO carries, and TR-DPO's reference. Same in every cut, bitwise on resume."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import make
import pytest
import torch
from test_dpo import same_run, stop_after

from preftune import checkpoints, engine, models, reference
from preftune.batches import make_step
from preftune.config import Dpo
from preftune.objectives import preference
from preftune.stages import dpo

STEPS = [[3, 0, 7, 5, 1], [2, 4, 6, 8, 0], [1, 2, 3, 4, 5]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("PREFTUNE_CACHE")
    os.environ["PREFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PREFTUNE_CACHE") if before is None else os.environ.update(PREFTUNE_CACHE=before)


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


# ---- resume ----------------------------------------------------------------------------------------------------------------

MOVING = {
    "beta-dpo": {"loss": "beta-dpo", "loss_arguments": {"keep": 0.6}, "micro_tokens": 100},
}


@pytest.mark.parametrize("name", MOVING)
def test_resume_is_bitwise(name, options, tmp_path):
    wanted = replace(options, **MOVING[name])
    assert dpo.run(wanted) == 0
    whole = Path(wanted.output)
    for stop in (1, 6):
        cut = tmp_path / f"cut{stop}"
        stop_after(replace(wanted, output=str(cut)), stop)
        dpo.run(Dpo(resume=str(cut)))
        same_run(whole, cut)
        one, two = checkpoints.latest(whole), checkpoints.latest(cut)
        assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())
    if name == "beta-dpo":
        lines = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
        assert [row["carry/beta-dpo.steps"] for row in lines if "loss" in row] == list(range(1, 9))
        assert checkpoints.latest(whole).state["carry"]["beta-dpo.steps"] == 8
