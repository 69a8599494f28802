"""The reference as data: per-token log-probs of the frozen model, computed once, kept under a fingerprint, reused by every run. And the
reference that moves (TR-DPO): a second model whose log-probs are computed with every step.

The column is a float32 array parallel to the store's tokens. Its fingerprint covers final ids and masks, weights, and number format;
not beta, loss, seed, batch size or output folder. Touches readout and files; the model comes from the caller.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .batches import Batch, make_batch, split
from .files import disk, fingerprint, owned, publish_file
from .readout import hidden_states, packs, token_logps
from .store import Store

CHUNK, FINITE = 4096, 1 << 20  # records and tokens that are looked at in one go


def cache_folder() -> Path:
    """Where columns are kept: $PREFTUNE_CACHE, else the user's cache folder."""
    home = os.environ.get("PREFTUNE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "preftune"
    )
    return Path(home) / "reference"


def identity(store: Store, weights: str, *, dtype: str, device: str) -> str:
    """Fingerprint of a column. `weights` is `models.weights_fingerprint` of the model as given."""
    return fingerprint("reference-1", store.identity(), weights, dtype, device.split(":")[0], torch.__version__)


def compute(model: Any, store: Store, *, micro_tokens: int, device: str = "cpu", column: np.ndarray | None = None,
            progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:  # fmt: skip
    """log ref(token | prefix) at every trained token of the store, 0 elsewhere: (N,) float32.

    Args:
        column: (N,) float32 to fill; groups of records without a NaN are done already. Default: all of it, in memory.
        progress: called with (records done, records in all).
    """
    column = np.full(len(store.tokens), np.nan, np.float32) if column is None else column
    share, done = packs(model), 0
    for first in range(0, len(store), CHUNK):
        for group in split(store, range(first, min(first + CHUNK, len(store))), micro_tokens, share=share):
            mine = slice(store.start[store.record_start[group[0]]], store.start[store.record_start[group[-1] + 1]])
            if np.isnan(column[mine]).any():
                batch = make_batch(store, group, share=share).to(device)
                found = np.zeros(mine.stop - mine.start, np.float32)
                with torch.inference_mode():
                    logps = token_logps(model, hidden_states(model, batch), batch).float().cpu().numpy()
                found[batch.slot.cpu().numpy() - mine.start] = logps
                column[mine] = found
            done += len(group)
            progress(done, len(store))
    return column


def fetch(model: Any, store: Store, key: str, *, micro_tokens: int, device: str = "cpu",
          progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[np.ndarray, bool]:  # fmt: skip
    """The column from the cache, or computed and put there; mapped from the disk. Returns (column, whether it was reused).

    What is computed goes to a file as it comes, so that a pass that was stopped goes on where it was, with the same numbers.
    """
    path = cache_folder() / f"{key}.npy"
    if path.is_file():
        try:
            column = _mapped(path)
            if column.shape == store.tokens.shape and column.dtype == np.float32 and _finite(column):
                return column, True
        except (ValueError, EOFError):
            pass  # a damaged cache entry is computed again; the self-check compares a fresh sample in any case
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The grouping decides the last bits, so a pass with another one does not go on with this one's file.
    with _unfinished(path.with_name(f"{key}-{micro_tokens}.part"), len(store.tokens)) as kept:
        column = compute(model, store, micro_tokens=micro_tokens, device=device, column=kept, progress=progress)
        publish_file(path, lambda temporary: _write(temporary, column), needed=column.nbytes)
    return _mapped(path), False


@contextmanager
def _unfinished(path: Path, size: int) -> Iterator[np.ndarray | None]:
    """A float32 column on the disk, NaN where nothing was computed yet; gone when the block ends well. None where another process
    has it."""
    with disk(path, needed=4 * size), open(path, "a+b") as file:
        if not size or not owned(file.fileno()):
            yield None
            return
        if file.seek(0, os.SEEK_END) != 4 * size:
            file.truncate(0)
            for first in range(0, size, FINITE):
                np.full(min(FINITE, size - first), np.nan, np.float32).tofile(file)
            file.flush()
        yield np.memmap(path, np.float32, "r+", shape=(size,))
        path.unlink(missing_ok=True)


def _write(path: Path, column: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, column, allow_pickle=False)


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _finite(column: np.ndarray) -> bool:
    return all(np.isfinite(column[i : i + FINITE]).all() for i in range(0, len(column), FINITE))


# ---------------------------------------------------------------- a reference that moves


@dataclass(frozen=True)
class Moving:
    """A reference that follows the policy: ref <- alpha pi + (1 - alpha) ref, weight by weight, every `every` steps.  arXiv:2404.09656.

    Args:
        model: the reference as it stands. masters: those of its weights that move, in fp32 (or wider) by name, as `acting` names them.
        alpha: 1 replaces it (the paper's hard update). every: optimiser steps between updates.
    """

    model: Any
    masters: dict[str, torch.Tensor]
    alpha: float
    every: int

    @property
    def nbytes(self) -> int:
        """Memory beyond the policy's: the weights that move, and their wide copies where the forward pass uses a short format."""
        own = dict(self.model.named_parameters())
        return sum(t.nbytes for t in {id(t): t for name, m in self.masters.items() for t in (m, own[name])}.values())


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach() if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()


def acting(model: Any, masters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of everything that training moves, as it acts: `masters` of a full model; under LoRA W + its delta, one by one."""
    if not hasattr(model, "get_base_model"):
        yield from ((name, master.detach()) for name, master in masters.items())
        return
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            parts = [_wide(module.get_delta_weight(adapter)) for adapter in module.active_adapters]
            yield f"{name}.weight", torch.stack([_wide(module.base_layer.weight), *parts]).sum(0)


def moving(model: Any, masters: Mapping[str, torch.Tensor], *, alpha: float, every: int) -> Moving:
    """A reference that stands where the policy stands now. What does not train is shared with the policy, not copied."""
    moves = {id(p) for p in model.parameters() if p.requires_grad}
    frozen = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in moves})
    with torch.no_grad():
        if hasattr(frozen, "get_base_model"):  # a plain model with layers of its own where the policy has LoRA
            frozen = frozen.unload()
            for name, weight in acting(model, masters):
                place, _, leaf = name.rpartition(".")
                module = frozen.get_submodule(place)
                setattr(module, leaf, torch.nn.Parameter(weight.to(getattr(module, leaf).dtype, copy=True), requires_grad=False))
        own = dict(frozen.named_parameters())
        names = [name for name, _ in acting(model, masters)]
        wide = {name: own[name].requires_grad_(False) if _wide(own[name]).dtype == own[name].dtype else _wide(own[name]) for name in names}
    return Moving(frozen.eval(), wide, alpha, every)


def publish(moved: Moving) -> None:
    """Copy the masters into the weights that the forward pass uses."""
    own = dict(moved.model.named_parameters())
    with torch.no_grad():
        for name, master in moved.masters.items():
            if own[name] is not master:
                own[name].copy_(master)


def follow(moved: Moving, model: Any, masters: Mapping[str, torch.Tensor]) -> None:
    """One update of a moving reference."""
    with torch.no_grad():
        for name, weight in acting(model, masters):
            moved.masters[name].copy_(moved.alpha * weight + (1 - moved.alpha) * moved.masters[name])
    publish(moved)


def live(moved: Moving, batch: Batch) -> Batch:
    """The batch with the column of the reference as it stands: (N,) float32, without gradient."""
    with torch.no_grad():
        column = token_logps(moved.model, hidden_states(moved.model, batch), batch).float()
    return replace(batch, columns={**batch.columns, "reference": column})
