"""Memory: a step that does not fit is taken in smaller passes, with the same loss."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from test_dpo import same_run

from preftune import engine, models, reference, runs
from preftune.batches import Order
from preftune.config import Dpo
from preftune.errors import OutOfMemoryError
from preftune.objectives import preference
from preftune.stages import dpo


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("PREFTUNE_CACHE")
    os.environ["PREFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PREFTUNE_CACHE") if before is None else os.environ.update(PREFTUNE_CACHE=before)


@pytest.fixture(scope="module")
def store():
    return make.store(12)


@pytest.fixture(scope="module")
def column(store):
    return reference.compute(models.prepare(make.model(seed=2)), store, micro_tokens=200)


# ---- passes of half the size -----------------------------------------------------------------------------------------------


def small(model: torch.nn.Module, most: int) -> list[int]:
    """Make a model for whose passes above `most` tokens the allocator has no memory: a real refusal. Returns the sizes it refused."""
    refused: list[int] = []

    def before(module, arguments, given):
        size = given["input_ids"].numel()
        if size > most and torch.is_grad_enabled():
            refused.append(size)
            torch.empty(1 << 60, dtype=torch.uint8)

    model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    return refused


def walk(store, column, *, loss: str = "sigmoid", most: int | None = None, auto: bool = True):
    """Three steps of five records in passes of any size: (state, lines, sizes that did not fit)."""
    model = models.prepare(make.model(seed=1))
    refused = [] if most is None else small(model, most)
    state = engine.make_state(model, rate=lambda step: 1e-3, clip=1.0)
    steps = engine.steps(store, np.arange(len(store)), Order(len(store), 5, 2, 0), start=0, total=3, micro_tokens=10**6,
                         columns={"reference": column}, share=True, device="cpu")  # fmt: skip
    return state, list(engine.train(state, steps, preference([(1.0, loss, {})]), auto_micro=auto)), refused


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "beta-dpo"])
def test_a_step_that_does_not_fit_is_taken_in_halves_with_the_same_loss_and_weights(store, column, loss):
    whole, lines, _ = walk(store, column, loss=loss)
    largest = max(store.start[store.record_start[1:]] - store.start[store.record_start[:-1]])
    cut, others, refused = walk(store, column, loss=loss, most=int(largest))
    assert refused and others[0]["did_not_fit"] and "did_not_fit" not in lines[0]
    assert all(line["micro_tokens"] <= max(others[0]["did_not_fit"]) // 2 for line in others) and not whole.micro_tokens
    assert sum(len(line.get("did_not_fit", ())) for line in others) == len(refused)  # never twice with the same size
    assert cut.micro_tokens == others[-1]["micro_tokens"] == engine.state_numbers(cut)["micro_tokens"]
    for one, other in zip(lines, others, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5) and other["num_tokens"] == one["num_tokens"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    for name, weight in whole.masters.items():
        assert torch.allclose(weight, cut.masters[name], atol=1e-5, rtol=0), name
    start = {n: p.detach() for n, p in make.model(seed=1).named_parameters()}
    assert max(float((w - start[n]).abs().max()) for n, w in whole.masters.items()) > 1e-3  # the weights that agree have moved


def test_a_record_that_does_not_fit_alone_and_a_run_that_was_not_asked_stop_as_before(store, column):
    with pytest.raises(OutOfMemoryError, match=r"step 1: .*one record is that long: .*--max-length \d+"):
        walk(store, column, most=1)
    with pytest.raises(OutOfMemoryError, match=r"step 1: .*--micro-tokens \d+ or --auto-micro"):
        walk(store, column, most=60, auto=False)


def test_another_error_is_not_taken_for_memory(store, column, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(engine, "accumulate", broken)
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        walk(store, column)


def test_a_resumed_run_keeps_the_smaller_passes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    model, pairs = make.write_model(tmp_path / "model"), make.write_pairs(tmp_path / "pairs.jsonl", 24)
    options = Dpo(model=str(model), data=[str(pairs)], output=str(tmp_path / "whole"), lr=2e-3, epochs=1, batch_size=5, sample_tokens=6,
                  eval_prompts=0, holdout=0.2, report=False, threads=1, eval_every=2, save_every=1, keep=99, auto_micro=True)  # fmt: skip
    real, asked = engine.accumulate, []

    def limited(state, step, objective):  # the second step is the first for which there is no memory
        asked.append((state.step, max(len(b.tokens) for b in step.micro)))
        if state.step == 1 and asked[-1][1] > 100:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(state, step, objective)

    monkeypatch.setattr(engine, "accumulate", limited)
    dpo.run(options)
    whole = [row for row in runs.Log(Path(options.output) / "metrics.jsonl").rows() if "loss" in row]
    assert "micro_tokens" not in whole[0] and whole[1]["did_not_fit"] and all(row["micro_tokens"] <= 100 for row in whole[1:])
    assert "tokens in one pass did not fit: taken in passes of" in "".join(capsys.readouterr())
    assert all(size <= 100 for step, size in asked if step > 1)

    stopped = replace(options, output=str(tmp_path / "stopped"), max_steps=None)

    def killed(state, step, objective):
        if state.step == 3:
            raise KeyboardInterrupt
        return limited(state, step, objective)

    monkeypatch.setattr(engine, "accumulate", killed)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(stopped)
    monkeypatch.setattr(engine, "accumulate", real)
    asked.clear()
    dpo.run(Dpo(resume=stopped.output))
    same_run(Path(options.output), Path(stopped.output))
