"""The one loop: `train(state, steps, objective)` yields a dict of metrics per optimiser step. No callbacks, no subclass.

Everything that a resumed run needs lives in `State`: weights, optimiser, counters. The learning rate is a function of the step.
A loss or gradient that is not finite stops before the optimiser moves. Touches objectives and batches; no file.

    for metrics in train(state, steps(store, records, order, start=state.step, ...), objective): ...
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import reference
from .batches import Order, Step, join, make_step
from .errors import CheckpointError, NumericsError, OutOfMemoryError, UsageError
from .files import free_memory, size_text
from .objectives import Columns, Objective, join_columns, total
from .store import Store


@dataclass
class State:
    """A run in flight.

    Args:
        model: the policy. weights: its trained parameters by name. masters: fp32 copies of those that are not fp32, else the same.
        optimizer: over the masters. rate: step -> learning rate. clip: largest gradient norm, 0 for none.
        step: optimiser steps taken. tokens: tokens of forward passes so far. seconds: training time so far.
        carry: what the objective carries from step to step, by name; empty before the first.
        watch: what `watch_held_out` keeps, and under `gate` what `monitors.note` does; empty before the first evaluation.
        normal: the latest losses that were no spikes. level: their size at the beginning, 0 until it is known. leaps: spikes in a row.
        micro_tokens: tokens of the passes that later steps are cut into, once one did not fit; 0 before that.
        moving: a reference that follows the policy, or None: the batches' reference column stands.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    masters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    clip: float
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    carry: dict[str, float] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)
    normal: list[float] = field(default_factory=list)
    level: float = 0.0
    leaps: int = 0
    micro_tokens: int = 0
    moving: reference.Moving | None = None


def watch_held_out(state: State, loss: float, *, least: float) -> bool:
    """Note an evaluation; returns whether its loss is the lowest so far.

    `best_loss` and `best_step` are the lowest and the first step that had it. `waited` counts evaluations since the loss last fell by
    `least` (by anything, for 0) below `mark`, where it stood then.
    """
    watch = state.watch
    best = "best_loss" not in watch or loss < watch["best_loss"]
    if best:
        watch |= {"best_loss": loss, "best_step": state.step}
    moved = "mark" not in watch or (loss <= watch["mark"] - least and loss < watch["mark"])
    state.watch = watch | ({"mark": loss, "waited": 0} if moved else {"waited": watch["waited"] + 1})
    return best


def make_state(model: nn.Module, *, rate: Callable[[int], float], clip: float, weight_decay: float = 0.0,
               betas: tuple[float, float] = (0.9, 0.999), optimiser: str = "adamw",
               factor: Callable[[str], float] = lambda name: 1.0) -> State:  # fmt: skip
    """An optimiser over every parameter that requires a gradient, with fp32 masters for those in a shorter format.

    Args:
        optimiser: 'adamw'; 'rmsprop', torch's defaults (decay 0.99, no momentum) as the DPO paper's code has it; 'adamw-8bit',
            whose moments are kept in 8 bits by bitsandbytes. weight_decay, betas: of the two AdamW.
        factor: name of a weight -> what its learning rate is multiplied by.

    Raises:
        UsageError: 'adamw-8bit' without bitsandbytes.
    """
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: p if p.dtype in (torch.float32, torch.float64) else p.detach().float() for n, p in weights.items()}
    adam = {"betas": betas, "weight_decay": weight_decay}
    arguments = {"adamw": adam | {"fused": True}, "adamw-8bit": adam, "rmsprop": {}}[optimiser]
    groups: dict[float, list[Tensor]] = {}
    for name, master in masters.items():
        groups.setdefault(factor(name), []).append(master)
    chosen = optimiser_named(optimiser)([{"params": each, "factor": f} for f, each in groups.items()], lr=rate(0), **arguments)
    return State(model, weights, masters, chosen, rate, clip)


def optimiser_named(name: str) -> Any:
    """The class of an optimiser; bitsandbytes is imported only when asked for. Raises UsageError where it is missing or too old."""
    if name != "adamw-8bit":
        return {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[name]
    try:
        import bitsandbytes
    except ImportError as error:
        raise UsageError(f"--optimiser {name} needs bitsandbytes: pip install 'preftune[8bit]' ({error})") from None
    if tuple(map(int, bitsandbytes.__version__.split(".")[:2])) < (0, 50):
        raise UsageError(f"--optimiser {name} needs bitsandbytes 0.50 or newer, here is {bitsandbytes.__version__}")
    return bitsandbytes.optim.AdamW8bit


def warm_steps(warmup: float, steps: int) -> int:
    """Steps over which the learning rate rises."""
    return math.ceil(warmup * steps)


def schedule(kind: str, peak: float, *, steps: int, warmup: float) -> Callable[[int], float]:
    """Learning rate of step 0, 1, ...: a linear rise over `warmup` of the steps, then 'linear', 'cosine' (to 0) or 'constant'."""
    rise = warm_steps(warmup, steps)

    def rate(step: int) -> float:
        if step < rise:
            return peak * (step + 1) / rise
        left = (steps - step) / max(1, steps - rise)
        return peak * {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[kind]

    return rate


# (parameters below, full, LoRA): docs/learning-rate.md says where each row comes from.
LEARNING_RATES = ((1e6, 1e-4, 1e-3), (1e7, 1e-4, 1e-3), (1e8, 1e-5, 1e-4), (4e9, 1e-6, 1e-5), (4e10, 5e-7, 5e-6), (math.inf, 2e-7, 2e-6))

SUPERVISED_RATES = ((1e7, 3e-3, 1e-2), (1e8, 1e-3, 3e-3), (1e9, 2e-4, 5e-4), (4e9, 2e-5, 2e-4), (4e10, 1e-5, 1e-4), (math.inf, 2e-6, 2e-5))

REWARD_RATES = ((1e7, 3e-3, 1e-2), (1e8, 3e-4, 1e-3), (1e9, 3e-5, 3e-4), (4e9, 1e-5, 1e-4), (4e10, 5e-6, 5e-5), (math.inf, 2e-6, 2e-5))


def auto_rate(parameters: int, *, lora: bool, supervised: bool = False, reward: bool = False) -> tuple[float, str]:
    """The learning rate that `--lr auto` means for a model of this size, and the reason in words."""
    table = REWARD_RATES if reward else SUPERVISED_RATES if supervised else LEARNING_RATES
    below, full, adapter = next(row for row in table if parameters < row[0])
    rate = adapter if lora else full
    bound = f"under {below:,.0f}" if below < math.inf else f"of {table[-2][0]:,.0f} or more"
    return rate, f"{rate:g} for models {bound} parameters ({parameters:,} here), {'LoRA' if lora else 'all weights'}"


def steps(store: Store, records: np.ndarray, order: Order, *, start: int, total: int, micro_tokens: int, columns: Mapping[str, np.ndarray],
          share: bool, device: str) -> Iterator[Step]:  # fmt: skip
    """The optimiser steps `start` to `total` of a run: each a function of the order and its number alone."""

    def cut(index: int, size: int) -> Step:
        step = make_step(store, records[order.records_of(index)], micro_tokens=size, columns=columns, share=share)
        return replace(step, micro=tuple(b.to(device) for b in step.micro), again=partial(cut, index))

    for index in range(start, total):
        yield cut(index, micro_tokens)


def train(state: State, steps: Iterable[Step], objective: Objective, *, where: Sequence[str] = (),
          auto_micro: bool = False, ahead: bool = False) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Take every step; yield its metrics after the weights have moved.

    A device is waited for once a step, by `read`: when all of its passes and, with `ahead`, the next step's batches are on their way to it.

    Args:
        where: per store record its 'file:line', to name the records of a step that went wrong.
        auto_micro: take a step that does not fit again in passes of half the size, and all later ones in such passes.
        ahead: ask for the next step before this one's weights have moved; only for steps that do not depend on them.

    Raises:
        NumericsError: the loss or the gradient norm is not finite; weights and optimiser are as before the step.
        OutOfMemoryError: the step did not fit; the message says what to lower.
    """
    source = iter(steps)
    step = next(source, None)
    while step is not None:
        began = time.perf_counter()
        lr = state.rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        failed, step = list[int](), _cut(state, step)
        while (got := _attempt(state, step, objective, auto_micro=auto_micro)) is None:
            failed.append(_largest(step))
            state.micro_tokens = _halved(step)
            step = _cut(state, step)
        unread, means, carry = got
        numbers = [unread, _norm(list(state.masters.values())), *means.values()]
        after = next(source, None) if ahead else None
        loss, norm, *values = read(numbers)
        sums = dict(zip(means, values, strict=True))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(f"step {state.step + 1}: loss {loss:g}, gradient norm {norm:g}: not finite, so the step was not taken. "
                                f"Its records: {some([_name(r, where) for r in step.records])}")  # fmt: skip
        if state.clip and norm > state.clip:
            torch._foreach_mul_([m.grad for m in state.masters.values() if m.grad is not None], state.clip / norm)
        state.optimizer.step()
        publish(state)
        state.step, state.carry = state.step + 1, carry
        if state.moving and state.step % state.moving.every == 0:
            reference.follow(state.moving, state.model, state.masters)
        tokens, seconds = sum(len(b.tokens) for b in step.micro), time.perf_counter() - began
        state.tokens += tokens
        state.seconds += seconds
        limit = spike(state, loss)
        leap: dict[str, Any] = {} if limit is None else {"spike_limit": limit, "spike_records": [_name(r, where) for r in step.records]}
        sums |= {f"carry/{name}": value for name, value in carry.items()}
        yield {"step": state.step, "loss": loss, **step.facts, **sums, "grad_norm": norm, "learning_rate": lr, "num_tokens": state.tokens,
               "tokens_per_second": tokens / seconds, "seconds": state.seconds, **leap,
               **({"micro_tokens": state.micro_tokens} if state.micro_tokens else {}),
               **({"did_not_fit": failed} if failed else {})}  # fmt: skip
        step = after if ahead else next(source, None)


def read(values: Sequence[Tensor]) -> list[float]:
    """Numbers () as numbers of Python, in one go: on a device this waits for all that was asked of it."""
    return [float(x) for x in torch.stack([x.double() for x in values]).tolist()]


def _largest(step: Step) -> int:
    return max(len(b.tokens) for b in step.micro)


def _halved(step: Step) -> int:
    """Half of the step's largest pass of several records; 0 where each stands alone: a record is never cut."""
    return max((len(b.tokens) for b in step.micro if len(b.table.record.unique()) > 1), default=0) // 2


def _cut(state: State, step: Step) -> Step:
    """The step in passes of the size that memory was found to hold."""
    if not (state.micro_tokens and step.again and _largest(step) > state.micro_tokens):
        return step
    return replace(step.again(state.micro_tokens), facts=step.facts)


def _attempt(state: State, step: Step, objective: Objective, *,
             auto_micro: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, float]] | None:  # fmt: skip
    """What `accumulate` returns; None where the step did not fit and smaller passes can be tried. Raises OutOfMemoryError."""
    for tensor in (*state.weights.values(), *state.masters.values()):
        tensor.grad = None
    try:
        if state.moving:
            step = replace(step, micro=tuple(reference.live(state.moving, batch) for batch in step.micro))
        return accumulate(state, step, objective)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        if not (auto_micro and step.again and _halved(step)):
            raise OutOfMemoryError(f"step {state.step + 1}: {_too_large(error, step)}") from error
    return None  # outside the except, whose traceback keeps the tensors of the pass alive


def _name(record: int, where: Sequence[str]) -> str:
    return where[record] if where else f"#{record}"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# A spike is far above the latest losses by two measures, neither of which the noise of a healthy run reaches in thousands of steps (tests):
# NOISE robust standard deviations, which heavy tails do reach, and REACH times the farthest that any of them went, which a steady loss
# does reach. And it rises by at least RISE of what the loss was at the beginning: near zero, nothing is a catastrophe.
WINDOW, FEWEST, NOISE, REACH, RISE, NEW_LEVEL = 64, 20, 10.0, 4.0, 1.0, 8


def spike(state: State, loss: float) -> float | None:
    """Note a step's loss; the limit that it leapt over, or None. After NEW_LEVEL leaps in a row the new level counts as normal."""
    limit = math.inf
    if len(state.normal) >= FEWEST:
        middle = statistics.median(state.normal)
        state.level = state.level or abs(middle)
        noise = 1.4826 * statistics.median(abs(x - middle) for x in state.normal)
        limit = middle + max(NOISE * noise, REACH * (max(state.normal) - middle), RISE * state.level)
    if loss <= limit:
        state.normal, state.leaps = [*state.normal, loss][-WINDOW:], 0
        return None
    state.leaps += 1
    if state.leaps == NEW_LEVEL:
        state.normal, state.leaps = [], 0
    return limit


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: torch's own class is CUDA's, the processor's is a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error) or "not enough memory" in str(error)


def _needed(error: BaseException) -> str:
    """What was asked for and what there is, as far as the error and the machine tell."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?[A-Za-z]+)", str(error))
    number = re.fullmatch(r"(\d+) ?bytes", asked[1]) if asked else None
    amount = size_text(int(number[1])) if number else asked[1] if asked else ""
    free = torch.cuda.mem_get_info()[0] if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available() else free_memory()
    return f"{f'{amount} more needed' if amount else 'memory is used up'}{f', {size_text(free)} free' if free else ''}"


def _too_large(error: BaseException, step: Step) -> str:
    """The pass that did not fit, what it needed, and which option to lower to what. One record is never cut."""
    sizes = [(len(b.tokens), len(b.table.record.unique())) for b in step.micro]
    largest, records = max(sizes)
    advice = f"--micro-tokens {largest // 2} or --auto-micro (neither changes the result), or --gradient-checkpointing"
    if records == 1:
        advice = f"one record is that long: --gradient-checkpointing, --max-length {largest // 2} or --lora 16"
    return f"{largest} tokens in one pass did not fit ({_needed(error)}); {advice}"


@contextmanager
def fits(folder: str = "") -> Iterator[None]:
    """Memory that runs out anywhere inside becomes an OutOfMemoryError; `folder`: the run that can be continued."""
    again = f"; what was saved stands: --resume {folder} with the lower value and --allow-change config goes on" if folder else ""
    try:
        yield
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error}{again}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemoryError(f"{_needed(error)}; lower --micro-tokens (half of it needs about half), --eval-prompts or "
                               f"--eval-samples{again}") from error  # fmt: skip


def accumulate(state: State, step: Step, objective: Objective) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Gradients of the step's loss into the masters' .grad (fp32); returns the loss, the mean metrics (numbers that are not read yet: a
    device may still be at work on them), and what is to be carried on.

    Separable terms: each micro-batch forward and backward once. Batch statistics over several micro-batches: all columns first
    without gradient, the gradient of the loss with respect to the columns, then each micro-batch again with that gradient.
    """
    several = len(step.micro) > 1 and not objective.separable
    carry = {**objective.carry, **state.carry}
    slopes = _column_slopes(state.model, step, objective, carry) if several else [None] * len(step.micro)
    parts, columns = list[Tensor](), []
    for batch, slope in zip(step.micro, slopes, strict=True):
        scored = objective.score(state.model, batch)
        columns.append(scored.each(Tensor.detach))
        if slope is None:
            part = total(objective.terms(scored, batch.table, carry), step.totals)
            parts.append(part.detach())
            part.backward()
        else:
            torch.autograd.backward(*zip(*((x, slope[name]) for name, x in _columns(scored) if x.requires_grad), strict=True))
        collect(state)
    whole, table = join_columns(columns), join([b.table for b in step.micro])
    terms = objective.terms(whole, table, carry)
    loss = total(terms, step.totals) if several else sum(parts[1:], parts[0])
    sums = {name: values.mean() for name, values in objective.metrics(whole, table).items() if len(values)}
    if len(terms) > 1:
        sums |= {f"loss/{name}": value.detach() / step.totals[den] for name, (value, den) in terms.items() if step.totals[den]}
    return loss, sums, objective.advance(whole, table, carry)


def _columns(columns: Columns) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in vars(columns).items() if x is not None]


def _column_slopes(model: Any, step: Step, objective: Objective, carry: Mapping[str, float]) -> list[dict[str, Tensor]]:
    """d loss / d column of every micro-batch, for every column there is."""
    with torch.no_grad():
        columns = [objective.score(model, batch).each(Tensor.requires_grad_) for batch in step.micro]
    whole = total(objective.terms(join_columns(columns), join([b.table for b in step.micro]), carry), step.totals)
    leaves = [x for c in columns for _, x in _columns(c)]
    slopes = iter(torch.autograd.grad(whole, leaves, allow_unused=True, materialize_grads=True))
    return [{name: next(slopes) for name, _ in _columns(c)} for c in columns]


def collect(state: State) -> None:
    """Add gradients of weights in a short format to their fp32 masters."""
    for name, weight in state.weights.items():
        master = state.masters[name]
        if master is not weight and weight.grad is not None:
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None


def publish(state: State) -> None:
    """Copy the masters into the weights that the forward pass uses."""
    with torch.no_grad():
        for name, weight in state.weights.items():
            if state.masters[name] is not weight:
                weight.copy_(state.masters[name])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    grads = [t.grad for t in tensors if t.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).double().norm() if grads else tensors[0].new_zeros(())


# ---------------------------------------------------------------- saving and restoring


def state_tensors(state: State) -> dict[str, dict[str, Tensor]]:
    """The run's tensors by file: the trained weights (masters), the optimiser's moments, and the weights of a reference that moves."""
    moments: dict[str, Tensor] = {}
    for name, master in state.masters.items():
        for key, value in state.optimizer.state.get(master, {}).items():
            # bitsandbytes counts in plain ints and shares its tables between weights; a file holds tensors, each its own.
            moments[f"{name}|{key}"] = value.clone() if key.startswith("qmap") else torch.as_tensor(value)
    anchor = {"reference": dict(state.moving.masters)} if state.moving else {}
    return {"weights": {n: m.detach() for n, m in state.masters.items()}, "optimizer": moments} | anchor


def state_numbers(state: State) -> dict[str, Any]:
    """The run's counters."""
    return {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "carry": state.carry,
            "watch": state.watch, "normal": state.normal, "level": state.level, "leaps": state.leaps,
            "micro_tokens": state.micro_tokens}  # fmt: skip


def restore_weights(state: State, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's trained weights back, bit for bit. Raises CheckpointError where it holds other weights than this run trains."""
    ours, theirs = ({n: tuple(t.shape) for n, t in group.items()} for group in (state.masters, weights))
    if ours != theirs:
        name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise CheckpointError(f"the checkpoint holds other weights than this run trains: {name} {theirs.get(name)}, now {ours.get(name)}")
    with torch.no_grad():
        for name, master in state.masters.items():
            master.copy_(weights[name])
    publish(state)


def restore(state: State, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], numbers: Mapping[str, Any],
            anchor: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
    """Put a checkpoint back, bit for bit: weights, moments, counters, and the weights of a reference that moves."""
    restore_weights(state, weights)
    if state.moving:
        assert anchor is not None and anchor.keys() == state.moving.masters.keys(), "the checkpoint holds another reference"
        with torch.no_grad():
            for name, master in state.moving.masters.items():
                master.copy_(anchor[name])
        reference.publish(state.moving)
    for key, value in moments.items():
        name, _, slot = key.rpartition("|")
        plain = value.dtype == torch.int64 and not value.ndim  # see state_tensors; torch's own counters are float32
        state.optimizer.state[state.masters[name]][slot] = int(value) if plain else value.clone()
    state.step, state.tokens, state.seconds = int(numbers["step"]), int(numbers["tokens"]), float(numbers["seconds"])
    state.normal, state.level, state.leaps = list(numbers["normal"]), numbers["level"], numbers["leaps"]
    state.micro_tokens = int(numbers["micro_tokens"])
    state.carry = {name: float(value) for name, value in numbers["carry"].items()}
    state.watch = dict(numbers["watch"])
