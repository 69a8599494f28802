"""Memory: foreseen from shapes, refused where it is not there; a step that does not fit is taken in smaller passes, with the same loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from test_dpo import same_run

from preftune import engine, estimate, models, reference, runs
from preftune.batches import Order, make_batch
from preftune.config import Dpo
from preftune.errors import OutOfMemoryError
from preftune.objectives import preference
from preftune.readout import hidden_states, token_logps
from preftune.stages import dpo

pytestmark = pytest.mark.usefixtures("private_cache")


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
    assert max(float((w.detach() - start[n]).abs().max()) for n, w in whole.masters.items()) > 1e-3  # the weights that agree have moved


def test_nothing_of_the_attempt_that_failed_stays_in_the_gradients(store, column):
    """The second pass of the first step is refused after the first pass has left its gradients."""
    found = []
    for refuse in (0, 2):
        model, calls = models.prepare(make.model(seed=1)), []

        def before(module, arguments, calls=calls, refuse=refuse):
            calls.append(torch.is_grad_enabled())
            if len(calls) == refuse:
                torch.empty(1 << 60, dtype=torch.uint8)

        model.get_decoder().register_forward_pre_hook(before)
        state = engine.make_state(model, rate=lambda step: 1e-3, clip=0.0)
        steps = engine.steps(store, np.arange(len(store)), Order(len(store), 12, 1, 0), start=0, total=1, micro_tokens=250,
                             columns={"reference": column}, share=True, device="cpu")  # fmt: skip
        line = next(engine.train(state, steps, preference([(1.0, "sigmoid", {})]), auto_micro=True))
        assert all(calls) and len(calls) > 2 and ("did_not_fit" in line) == bool(refuse)
        found.append((line, {name: master.grad for name, master in state.masters.items()}))
    (one, whole), (other, cut) = found
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert all(torch.allclose(whole[name], cut[name], atol=1e-5, rtol=1e-4) for name in whole)


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
    said = "".join(capsys.readouterr())
    assert "tokens in one pass did not fit: taken in passes of" in said and "memory: about " in said
    found = json.loads((Path(options.output) / "results.json").read_text())["memory"]
    assert found["estimated"] > found["step"] > 0 and found["peak"] > 0
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


# ---- foreseen --------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama": lambda: models.prepare(make.model("llama")),
    "tied gpt2": lambda: models.prepare(make.model("gpt2")),
    "windowed": lambda: models.prepare(make.model("gemma3_text")),
    "a row a response": lambda: models.prepare(make.model("bloom")),
    "bf16": lambda: models.prepare(make.model("llama").bfloat16()),
    "lora": lambda: models.add_lora(models.prepare(make.model("llama")), rank=4, alpha=None, targets="all-linear", seed=0),
    "checkpointed": lambda: checkpointed(models.prepare(make.model("llama", num_hidden_layers=4))),
}


def trained_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    models.checkpoint_layers(model)
    return model


@pytest.mark.parametrize("several", [False, True], ids=["one pass", "several"])
@pytest.mark.parametrize("kind", MODELS)
def test_shapes_alone_give_the_bytes_of_a_real_step(store, kind, several):
    """The meta device against real tensors, counted alike: equal to the byte. By blocks in both; masks are near."""
    model = MODELS[kind]()
    batch = make_batch(store, range(8), share=bool(getattr(model, "reads_segments", False)))
    shape, thin = estimate.ghost(model), estimate.ghostly(batch, model)
    assert all(p.device.type == "meta" for p in shape.parameters()) and not any(p.device.type == "meta" for p in model.parameters())
    foreseen = estimate.step_peak(shape, thin, several=several)
    real = estimate.step_peak(model, replace(batch, segments=replace(thin.segments)), several=several)
    assert foreseen == real
    assert estimate.step_peak(model, batch, several=several)[0] == pytest.approx(real[0], rel=0.15)
    assert real[1] == (8 if kind == "bf16" else 4) * trained_of(model)  # fp32 gradients; in bf16 also fp32 weights
    assert real[0] > 1.5 * real[1]


def test_what_is_counted_as_alive_is_what_autograd_saves(store):
    """A second count of a forward pass: the storages that saved-tensor hooks are shown, weights and the batch's own left out."""
    model = models.prepare(make.model("llama"))
    batch = make_batch(store, range(8))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), batch.hidden, batch.target, batch.tokens)}
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with estimate.Alive() as alive, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = token_logps(model, hidden_states(model, batch), batch)
    counted = sum(size for place, size in saved.items() if place not in own)
    assert alive.now == pytest.approx(counted + logps.nbytes, rel=0.02) and counted > 10**6


SIZES = """
import torch
from preftune import models

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

weight = torch.randn(64, 64).bfloat16()
for rows in range(2, 12):
    torch.nn.functional.linear(torch.randn(rows, 64).bfloat16(), weight)
before = held()
for rows in range(100, 400):
    torch.nn.functional.linear(torch.randn(rows, 64).bfloat16(), weight)
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
def test_products_of_many_sizes_do_not_fill_the_memory():
    """300 sizes of a product in bf16: 190 MB of compiled code where all of it is kept, 26 where the latest is."""
    free = {key: value for key, value in os.environ.items() if not key.endswith("_CACHE_CAPACITY")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, env=free, cwd=Path(__file__).parents[1])
    assert float(done.stdout) < 80, done.stderr


def needs_of(model, store, micro_tokens: int = 10**6) -> estimate.Needs:
    return estimate.foresee(model, None, store, np.arange(8), np.arange(8, 12), Order(8, 8, 1, 0), total=1, micro_tokens=micro_tokens,
                            optimiser="adamw", prompts=[9, 12], sample_tokens=8, samples=2, device="cpu")  # fmt: skip


def test_what_a_refusal_advises_fits(store, monkeypatch):
    """Two thirds of what the passes take is free: the size named is enough, and more is refused."""
    model = MODELS["lora"]()
    needs = needs_of(model, store)
    shape, thin = estimate.ghost(model), estimate.ghostly(make_batch(store, range(8)), model)
    assert needs.step == estimate.step_peak(shape, thin, several=False)[0] + 8 * trained_of(model)
    assert estimate.step_peak(shape, thin, several=True)[0] > estimate.step_peak(shape, thin, several=False)[0]
    assert needs.step > needs.evaluation > needs.fixed > 0 and needs.tokens == len(make_batch(store, range(8)).tokens)
    trained = trained_of(model)
    assert needs.fixed == (4 + 8) * trained and needs.saving == 8 * trained  # gradients and two moments; the moments' file
    base = needs.fixed + needs.saving + estimate.LIBRARIES
    more = needs.total - needs.held
    monkeypatch.setattr(estimate, "free_memory", lambda: base + 2 * (more - base) // 3)
    with pytest.raises(OutOfMemoryError, match=r"memory will be needed and .* are free, with passes of \d+ tokens") as caught:
        estimate.require(needs, "cpu", checkpointing=False)
    advised = int(str(caught.value).split("--micro-tokens ")[1].split()[0])
    assert needs.tokens / 2 < advised < 0.66 * needs.tokens
    estimate.require(needs_of(model, store, advised), "cpu", checkpointing=False)
    monkeypatch.setattr(estimate, "free_memory", lambda: base)
    with pytest.raises(OutOfMemoryError, match="try --lora 16"):
        estimate.require(needs, "cpu", checkpointing=False)
    with pytest.raises(OutOfMemoryError, match="an evaluation takes .* smaller --eval-prompts"):
        monkeypatch.setattr(estimate, "free_memory", lambda: base + 1000)
        estimate.require(replace(needs, evaluation=2 * needs.step), "cpu", checkpointing=False)
    monkeypatch.setattr(estimate, "free_memory", lambda: 0)  # a system that does not say refuses nothing
    estimate.require(needs, "cpu", checkpointing=False)


def test_a_wide_vocabulary_never_costs_more_than_its_chunks(store):
    """128k entries: 64 targets or all of them cost two chunks of logits and the temporary of their log-sum-exp, no more."""
    model = models.prepare(make.model("llama", vocab=131072, hidden_size=8, intermediate_size=8, num_attention_heads=2))
    shape, peaks = estimate.ghost(model), []
    for count in (8, 12):
        batch = make_batch(store, range(count))
        assert len(batch.target) > 128
        peaks.append(estimate.step_peak(shape, estimate.ghostly(batch, model), several=False)[0])
    assert peaks[1] - peaks[0] < 1 << 23 and peaks[1] < 4 * (4 << 24) + 4 * 3 * 2 * 131072 * 8


def test_a_model_whose_passes_hang_on_values_is_trained_without_an_estimate(tmp_path, capsys):
    model, pairs = make.write_model(tmp_path / "model", kind="qwen3_moe"), make.write_pairs(tmp_path / "pairs.jsonl", 12)
    dpo.run(Dpo(model=str(model), data=[str(pairs)], output=str(tmp_path / "run"), max_steps=1, eval_prompts=0, report=False, threads=1))
    assert "memory: not estimated for Qwen3MoeForCausalLM" in "".join(capsys.readouterr())
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["memory"]) == ["peak"]
