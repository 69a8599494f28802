"""What a step waits for. On the meta device a tensor has no values: whatever reads one raises there, as it would wait on a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preftune import engine, estimate, models, reference
from preftune.batches import Order, make_step
from preftune.losses import LOSSES
from preftune.objectives import preference, supervised

# Which items a loss compares hangs on data that these losses look up on the device, a few times a pass (docs/speed.md).
WAITS = {
    "plackett-luce", "plackett-luce-breslow", "plackett-luce-davidson", "lipo", "s-dpo", "davidson", "rao-kupper",  # lists
    "d2po", "soft", "soft-square", "soft-kl", "soft-reverse-kl", "soft-pessimistic", "rebel", "grades", "square",  # scores
    "value", "value-learned", "value-quantile", "anchor", "optimism",  # samples of the reference
    "nominal", "ld-dpo", "beta-dpo",  # classes, tokens, earlier steps
}  # fmt: skip


class Copies(TorchDispatchMode):
    """Counts copies from the processor to the meta device, and those of them that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.waiting = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        source = args[1] if function is torch.ops.aten.copy_.default else args[0] if args else None
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and out.device.type == "meta" and source.device.type == "cpu":
            self.all += 1
            self.waiting += not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))
        return out


@pytest.fixture(scope="module")
def store():
    return make.store(9, k=3, mismatched=True)


@pytest.fixture(scope="module")
def column(store):
    return reference.compute(models.prepare(make.model(seed=2)), store, micro_tokens=1000)


@pytest.fixture(scope="module")
def ghost():
    return estimate.ghost(models.prepare(make.model(seed=1)))


def steps_on_meta(store: Any, column: Any, model: Any, objective: Any, monkeypatch: Any, *, micro: int,
                  count: int) -> tuple[list[int], Copies]:  # fmt: skip
    """Whole steps without a value anywhere: (how many numbers each `read` asked for, copies)."""
    asked: list[int] = []

    def read(values: Any) -> list[float]:
        asked.append(len(values))
        return [1.0] * len(values)

    monkeypatch.setattr(engine, "read", read)
    state = engine.make_state(model, rate=lambda step: 1e-3, clip=0.5, optimiser="rmsprop")  # torch has no fused AdamW for this device
    made = make_step(store, range(4), micro_tokens=micro, columns={"reference": column})
    with Copies() as copies:
        step = replace(made, micro=tuple(batch.to("meta") for batch in made.micro))
        assert len(list(engine.train(state, [step] * count, objective, ahead=True))) == count
    return asked, copies


def test_steps_read_their_numbers_in_one_go(store, column, ghost, monkeypatch):
    """Two steps of several passes; losses over the statistics of a step, which take two forward passes, too."""
    for name in ("sigmoid", "aot", "kto"):
        objective = preference([(1.0, name, {}), (0.1, "nll", {})])
        asked, copies = steps_on_meta(store, column, ghost, objective, monkeypatch, micro=120, count=2)
        assert len(asked) == 2 and min(asked) > 4, "one read a step"
        assert copies.all > 60 and not copies.waiting


def test_which_losses_wait(store, column, ghost, monkeypatch):
    waits = set()
    for name in (*LOSSES, "supervised"):
        objective = supervised() if name == "supervised" else replace(preference([(1.0, name, {})]), frozen=ghost)
        try:
            asked, copies = steps_on_meta(store, column, ghost, objective, monkeypatch, micro=10**6, count=1)
            assert len(asked) == 1 and not copies.waiting, name
        except (RuntimeError, NotImplementedError) as error:
            assert "meta" in str(error).lower(), name
            waits.add(name)
    assert waits == WAITS and len(LOSSES) - len(WAITS) > 35


def test_the_next_step_is_made_while_this_one_is_under_way(store, column, monkeypatch):
    """Its batches are asked for when the passes are launched and before a number is read."""
    real = engine.read
    for ahead in (True, False):
        happened: list[str] = []
        monkeypatch.setattr(engine, "read", lambda values, happened=happened: happened.append("read") or real(values))
        model = models.prepare(make.model(seed=1))
        model.get_decoder().register_forward_pre_hook(lambda *_, happened=happened: happened.append("pass"))
        state = engine.make_state(model, rate=lambda step: 1e-3, clip=1.0)
        state.optimizer.register_step_pre_hook(lambda *_, happened=happened: happened.append("moved"))

        def steps(happened: list[str] = happened) -> Any:
            for step in engine.steps(store, torch.arange(9).numpy(), Order(9, 3, 1, 0), start=0, total=3, micro_tokens=10**6,
                                     columns={"reference": column}, share=True, device="cpu"):  # fmt: skip
                happened.append("made")
                yield step

        lines = list(engine.train(state, steps(), preference([(1.0, "sigmoid", {})]), ahead=ahead))
        between = ["pass", "made", "read", "moved"] if ahead else ["pass", "read", "moved", "made"]
        assert happened == ["made", *between * 2, "pass", "read", "moved"] and len(lines) == 3


def test_a_step_ahead_is_the_same_step(store, column):
    found = []
    for ahead in (True, False):
        state = engine.make_state(models.prepare(make.model(seed=1)), rate=lambda step: 1e-3, clip=1.0)
        steps = engine.steps(store, torch.arange(9).numpy(), Order(9, 3, 1, 0), start=0, total=3, micro_tokens=150,
                             columns={"reference": column}, share=True, device="cpu")  # fmt: skip
        lines = list(engine.train(state, steps, preference([(1.0, "sigmoid", {})]), ahead=ahead))
        found.append(([(line["loss"], line["grad_norm"]) for line in lines], state.masters))
    (one, weights), (other, others) = found
    assert one == other and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_bench_for_gpus_says_that_there_is_none():
    place = Path(__file__).parents[1] / "bench" / "gpu.py"
    done = subprocess.run([sys.executable, str(place), "8k"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_but_the_read_waits(store, column, monkeypatch):
    """torch's own watch for waits, off only while the numbers are read."""
    real = engine.read

    def read(values: Any) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        found = real(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    model = models.prepare(make.model(seed=1)).to("cuda")
    state = engine.make_state(model, rate=lambda step: 1e-3, clip=1.0)
    steps = engine.steps(store, torch.arange(9).numpy(), Order(9, 3, 2, 0), start=0, total=6, micro_tokens=150,
                         columns={"reference": column}, share=True, device="cuda")  # fmt: skip
    run = engine.train(state, steps, preference([(1.0, "sigmoid", {})]), ahead=True)
    next(run)  # the optimiser makes its state
    monkeypatch.setattr(engine, "read", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(run)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
