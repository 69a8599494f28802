"""The reference as data: per-token log-probs of the frozen model, computed once, kept under a fingerprint, reused by every run.

The column is a float32 array parallel to the store's tokens. Its fingerprint covers final ids and masks, weights, and number format;
not beta, loss, seed, batch size or output folder. Touches readout and files; the model comes from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .batches import make_batch, split
from .files import disk, fingerprint, owned, publish_file
from .readout import hidden_states, packs, token_logps
from .store import Store


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
    with torch.inference_mode():
        for group in split(store, range(len(store)), micro_tokens, share=share):
            mine = slice(store.start[store.record_start[group[0]]], store.start[store.record_start[group[-1] + 1]])
            if np.isnan(column[mine]).any():
                batch = make_batch(store, group, share=share).to(device)
                found = np.zeros(mine.stop - mine.start, np.float32)
                found[batch.slot.cpu().numpy() - mine.start] = (
                    token_logps(model, hidden_states(model, batch), batch).float().cpu().numpy()
                )
                column[mine] = found
            done += len(group)
            progress(done, len(store))
    return column


def fetch(model: Any, store: Store, key: str, *, micro_tokens: int, device: str = "cpu",
          progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[np.ndarray, bool]:  # fmt: skip
    """The column from the cache, or computed and put there. Returns (column, whether it was reused).

    What is computed goes to a file as it comes, so that a pass that was stopped goes on where it was, with the same numbers.
    """
    path = cache_folder() / f"{key}.npy"
    if path.is_file():
        try:
            column = np.load(path, allow_pickle=False)
            if column.shape == store.tokens.shape and column.dtype == np.float32 and np.isfinite(column).all():
                return column, True
        except (ValueError, EOFError):
            pass  # a damaged cache entry is computed again; the self-check compares a fresh sample in any case
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The grouping decides the last bits, so a pass with another one does not go on with this one's file.
    with _unfinished(path.with_name(f"{key}-{micro_tokens}.part"), len(store.tokens)) as kept:
        column = np.array(compute(model, store, micro_tokens=micro_tokens, device=device, column=kept, progress=progress))
        publish_file(path, lambda temporary: _write(temporary, column), needed=column.nbytes)
    return column, False


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
            np.full(size, np.nan, np.float32).tofile(file)
            file.flush()
        yield np.memmap(path, np.float32, "r+", shape=(size,))
        path.unlink(missing_ok=True)


def _write(path: Path, column: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, column, allow_pickle=False)
