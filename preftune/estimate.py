"""What a run will need of memory, told before its first step and refused where it is not there.

Nothing is guessed from an architecture: the run's own largest pass, backward pass, evaluation and sampling are gone through on
torch's meta device, where a tensor has a shape and no memory, and the bytes alive at once are counted. Works for whatever the model,
the adapter and the options make of it. Three moments: the step, the writing of a checkpoint, the evaluation. What the counting cannot
see (libraries, holes between blocks) is measured by `bench/memory.py`. Touches readout, batches, engine; reads /proc.

    needs = foresee(model, None, store, records, order, total=100, micro_tokens=8192, ...)
    require(needs, "cpu")
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import engine
from .attention import blocks
from .batches import Batch, Order, make_batch, split, tokens_of
from .errors import OutOfMemoryError
from .files import free_memory, size_text
from .readout import (
    Learner,
    as_reference,
    hidden_states,
    packs,
    prefix_kl,
    scalars,
    scores,
    token_logps,
    values_of,
    vocabulary_of,
)
from .store import Store, from_ids

MOMENTS = {"adamw": 8.0, "rmsprop": 4.0, "adamw-8bit": 2.1}  # bytes of a trained weight
# What no tensor accounts for, on a processor, fitted once to bench/memory.py: libraries' pages and tables touched for the first time; and,
# as a share of what a pass makes, glibc's holes between blocks, in short formats more.
# With adapters, whose many short-lived blocks lie between those that stay, the same run peaked at 817 to 1,197 MiB in five goes.
LIBRARIES, HOLES, HOLES_SHORT, HOLES_ADAPTER = 64 << 20, 0.10, 0.45, 0.60
STEPS = 1000  # of a run that are looked through for its largest pass
ROWS = 64  # sampled side by side (sampling.sample)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: `now`, and the most at any moment, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):  # a view of what was given, or that itself, is nothing new
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._note(tensor.untyped_storage())
        if function is torch.ops.aten.logsumexp.default:  # makes exp(x - max) inside, out of sight
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def ghost(model: nn.Module) -> Any:
    """A copy of the model on the meta device: shapes without memory."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def ghostly(batch: Batch, *read_by: Any) -> Batch:
    """A batch on the meta device, attended to by blocks as on a processor, which keep what a fused kernel of a GPU keeps too."""
    windows = {None, *(getattr(model.config, "sliding_window", None) for model in read_by)}
    return replace(batch.to("meta"), segments=replace(batch.segments, plans={w: blocks(batch.segments) for w in windows}))


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs beyond what the process held before its model.

    Args:
        held: weights that are loaded already. step, evaluation: the most in either, beyond `held`. fixed: what of both stays whatever the
            size of a pass: gradients, fp32 weights, moments. saving: what writing a checkpoint adds; an allocator keeps what a step freed.
        tokens: the largest pass. overhead: libraries and holes.
    """

    held: int
    step: int
    evaluation: int
    fixed: int
    saving: int
    tokens: int
    overhead: int

    @property
    def total(self) -> int:
        return self.held + max(self.step, self.evaluation) + self.saving + self.overhead

    def numbers(self) -> dict[str, int]:
        """For the manifest and results.json."""
        return {"estimated": self.total, **vars(self)}


def largest(store: Store, records: np.ndarray, order: Order, *, total: int, micro_tokens: int, share: bool) -> tuple[list[int], bool]:
    """The records of the largest pass among a run's first steps, and whether that step has several passes."""
    best, size, several = list[int](), -1, False
    for step in range(min(total, STEPS)):
        groups = split(store, records[order.records_of(step)], micro_tokens, share=share, even=True)
        for group in groups:
            if (tokens := int(tokens_of(store, group, share=share).sum())) > size:
                best, size, several = group, tokens, len(groups) > 1
    return best, several


def step_peak(model: Any, batch: Batch, *, several: bool, value: Any | None = None) -> tuple[int, int]:
    """(bytes at most in one step, of which gradients and fp32 copies of the weights), moments of the optimiser left out.

    Args:
        several: passes. value: a value model that trains with the policy, or None.
    """
    learner = Learner(model, value)
    learner.zero_grad()
    with Alive() as alive:
        state = engine.make_state(learner, rate=lambda step: 0.0, clip=0.0, optimiser="rmsprop")  # it never steps
        for _ in range(1 + several):  # with several passes the largest may find all gradients there
            _whole(model, value, batch).backward()
            engine.collect(state)
        return alive.peak, alive.now


def _whole(model: Any, value: Any | None, batch: Batch) -> Tensor:
    """A number whose backward pass goes where that of a loss goes."""
    hidden = hidden_states(model, batch)
    read = _read(model, hidden, batch).sum()
    return read if value is None else read + values_of(value, hidden, batch).sum()


def _read(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    return (scalars if scores(model) else token_logps)(model, hidden, batch)


def evaluation_peak(model: Any, other: Any | None, batch: Batch, *, divergence: bool) -> int:
    """Bytes at most while a batch is scored, with the divergence from the reference (`evaluate.score_samples`) or without."""
    with Alive() as alive, torch.no_grad():
        ours = hidden_states(model, batch)
        _read(model, ours, batch)
        if divergence:
            with as_reference(model, other) as frozen:
                theirs = hidden_states(frozen, batch)
                token_logps(frozen, theirs, batch)
            prefix_kl(model, ours, other, theirs, batch)
    return alive.peak


def sampling_peak(config: Any, rows: int, longest: int, vocabulary: int, element: int) -> int:
    """Bytes of a cache of keys and values, twice for the layer that grows, and of what a draw makes of the logits (five in float64)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * rows * longest * heads * size * element
    return layer * (config.num_hidden_layers + 1) + rows * vocabulary * (element + 4 + 5 * 8)


def foresee(model: Any, frozen: Any | None, store: Store, train: np.ndarray, held: np.ndarray, order: Order, *, total: int,
            micro_tokens: int, optimiser: str, prompts: Sequence[int], sample_tokens: int, samples: int, device: str,
            value: Any | None = None) -> Needs:  # fmt: skip
    """The needs of a run, before it.

    Args:
        model: the policy as it will train. frozen: a reference model beside it, or None. train, held: store records. total: steps.
        prompts: tokens of each prompt that is sampled from. samples: for each. value: a value model that trains with the policy.
    """
    share = packs(model)
    shape, other, critic = ghost(model), None if frozen is None else ghost(frozen), None if value is None else ghost(value)
    chosen, several = largest(store, train, order, total=total, micro_tokens=micro_tokens, share=share)
    trunk = getattr(value, "decoder", None)
    batch = ghostly(make_batch(store, chosen, share=share), model, *([] if trunk is None else [trunk]))
    weights = sum(p.nbytes for m in (model, frozen, value) if m is not None for p in m.parameters())
    trained = [p for m in (model, value) if m is not None for p in m.parameters() if p.requires_grad]
    moments = int(MOMENTS[optimiser] * sum(p.numel() for p in trained))
    peak, fixed = step_peak(shape, batch, several=several, value=critic)
    wide = sum(p.numel() * max(4, p.element_size()) for p in trained)
    evaluation = 0
    if len(held):
        big = max(split(store, held, micro_tokens, share=share), key=lambda group: int(tokens_of(store, group, share=share).sum()))
        evaluation = evaluation_peak(shape, other, ghostly(make_batch(store, big, share=share), model), divergence=False)
    if len(prompts):
        drawn = from_ids([(0,) * n for n in prompts], [[(0,) * sample_tokens] * samples for _ in prompts])
        group = max(split(drawn, range(len(drawn)), micro_tokens, share=share), key=len)
        scored = evaluation_peak(shape, other, ghostly(make_batch(drawn, group, share=share), model), divergence=True)
        sampled = sampling_peak(model.config, min(ROWS, samples * len(prompts)), max(prompts) + sample_tokens, vocabulary_of(model),
                                trained[0].element_size())  # fmt: skip
        evaluation = max(evaluation, scored, sampled)
    step, evaluation, saving = peak + moments, fixed + moments + evaluation, max(wide, moments)
    if device.startswith("cuda"):  # whose allocator is asked itself; a checkpoint goes through the processor's memory
        return Needs(weights, step, evaluation, fixed + moments, saving=0, tokens=len(batch.tokens), overhead=0)
    holes = HOLES if next(model.parameters()).element_size() >= 4 else HOLES_SHORT
    holes = HOLES_ADAPTER if hasattr(model, "peft_config") else holes
    overhead = LIBRARIES + int(holes * (max(step, evaluation) - fixed - moments))
    return Needs(weights, step, evaluation, fixed + moments, saving, len(batch.tokens), overhead)


def describe(needs: Needs) -> str:
    """One line for people."""
    name, most = ("a step", needs.step) if needs.step >= needs.evaluation else ("an evaluation", needs.evaluation)
    return (f"memory: about {size_text(needs.total)} at most: {size_text(needs.held)} weights, {size_text(most)} in {name} of up to "
            f"{needs.tokens} tokens a pass, {size_text(needs.saving)} to save, {size_text(needs.overhead)} around it")  # fmt: skip


def require(needs: Needs, device: str, *, checkpointing: bool) -> None:
    """Raises OutOfMemoryError where more is needed than is free, with what to lower and by how much."""
    free = int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else free_memory()
    more = needs.total - needs.held
    if not free or more <= free:  # 0: the system does not say
        return
    said = f"about {size_text(more)} more memory will be needed and {size_text(free)} are free"
    base, passes = needs.fixed + needs.saving + min(LIBRARIES, needs.overhead), max(needs.step, needs.evaluation) - needs.fixed
    if base >= free:
        raise OutOfMemoryError(f"{said}; gradients, optimiser and checkpoints alone take {size_text(base)}: try --lora 16, --freeze or "
                               "--optimiser rmsprop")  # fmt: skip
    if needs.evaluation > needs.step:
        raise OutOfMemoryError(f"{said}; an evaluation takes {size_text(passes)} of it: try a smaller --eval-prompts, --eval-samples or "
                               "--micro-tokens")  # fmt: skip
    fits = max(1, int(0.9 * needs.tokens * (free - base) / (more - base)))
    raise OutOfMemoryError(f"{said}, with passes of {needs.tokens} tokens: try --micro-tokens {fits}"
                           f"{'' if checkpointing else ' or --gradient-checkpointing'}")  # fmt: skip


# ---------------------------------------------------------------- measured


@dataclass(frozen=True)
class Meter:
    """The most memory held since it was made. base: what the process held then, bytes; None where the system does not say."""

    device: str
    base: int | None

    def peak(self) -> int | None:
        """Bytes above the base."""
        if self.device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated(self.device)) - (self.base or 0)
        most = _status("VmHWM")
        return None if most is None or self.base is None else most - self.base


def meter(device: str) -> Meter:
    """Begin to measure: forget the peak so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return Meter(device, int(torch.cuda.memory_allocated(device)))
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return Meter(device, None)
    return Meter(device, _status("VmRSS"))


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
