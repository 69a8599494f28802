"""Checkpoints that are whole or not there: `checkpoints/step-000100/` with tensors, state and a manifest of hashes.

A checkpoint is written into a staging folder, forced to the disk, then renamed; so a kill at any moment leaves the ones before
it. The loader believes a folder only after every size and SHA-256 agrees. No pickle: safetensors and JSON. This room touches
`files` and `errors`, torch and safetensors. Try it: `pytest tests/test_checkpoints.py`.

    save(run, 100, {"weights": weights, "optimizer": moments}, {"epoch": 0.5}, keep=2)
    found = latest(run)          # Checkpoint(step=100, ...) or None
    weights = found.tensors("weights")
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError, DataError, DiskError, nearest
from .files import disk, disk_error, dumps, free_bytes, read_json, sha256_file, size_text, sync, wrapped

Groups = Mapping[str, Mapping[str, torch.Tensor]]  # {"weights": {name: tensor}, ...}

STAGING = ".tmp-step-"
# '-replaced': a checkpoint that stands aside for the moment in which one of the same step takes its place.
NAME = re.compile(r"step-(\d{6,})(-replaced)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file agreed with its manifest.

    Args:
        step: optimiser steps done when it was written.
        path: its folder.
        state: what `save` was given as `state`.
        skipped: one line per newer checkpoint that was passed over: name and reason.
    """

    step: int
    path: Path
    state: Mapping[str, Any]
    skipped: tuple[str, ...] = ()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """One named group of tensors, on the CPU. Raises CheckpointError where there is no such group or it is malformed."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            known = sorted(p.stem for p in self.path.glob("*.safetensors"))
            holds = ", ".join(known) or "none"
            raise CheckpointError(f"{self.path}: no tensors called {name!r}{nearest(name, known)}; it holds {holds}")
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _candidates(base: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first; of one step the current before the replaced. Links are not followed."""
    found = []
    for entry in os.scandir(base) if base.is_dir() else ():
        if (match := NAME.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
            found.append((int(match[1]), match[2] is None, Path(entry.path)))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _manifest(folder: Path) -> Mapping[str, Any]:
    """Step and files of a manifest of our form; raises CheckpointError with the reason otherwise."""
    if (folder / "manifest.json").is_symlink():
        raise CheckpointError("manifest.json: a link, expected a file")
    try:
        manifest = read_json(folder / "manifest.json")
    except DataError as error:
        raise CheckpointError(f"manifest.json: {error.reason}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    plain = isinstance(files, dict) and "state.json" in files and all(
        isinstance(entry, dict) and name not in (".", "..") and name == os.path.basename(name) for name, entry in files.items()
    )
    if not plain or not isinstance(manifest.get("step"), int):
        raise CheckpointError("manifest.json: not the manifest of a checkpoint")
    return manifest


def verify(folder: Path, step: int) -> None:
    """Compare every file with the manifest: there, of its size, of its SHA-256. Raises CheckpointError with the first fault."""
    manifest = _manifest(folder)
    if manifest["step"] != step:
        raise CheckpointError(f"manifest.json: says step {manifest['step']}")
    for name, entry in manifest["files"].items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{name}: missing")
        size = file.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{name}: {size} bytes, the manifest says {entry.get('size')}")
        try:
            digest = sha256_file(file)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
        if digest != entry.get("sha256"):
            raise CheckpointError(f"{name}: its content has changed since it was written (SHA-256 differs)")


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that verifies, or None where none was ever written.

    Raises CheckpointError that names each checkpoint and its fault where there are some and none verifies.
    """
    skipped: list[str] = []
    for step, path in _candidates(Path(folder) / "checkpoints"):
        try:
            verify(path, step)
            state = read_json(path / "state.json")
        except (CheckpointError, DataError) as error:
            skipped.append(f"{path.name}: {error}")
        else:
            return Checkpoint(step, path, state, tuple(skipped))
    if skipped:
        raise CheckpointError(f"{folder}: no checkpoint can be used ({'; '.join(skipped)}); start a new run")
    return None


def _write(staging: Path, step: int, tensors: Groups, state: str) -> None:
    """Fill the staging folder and force it to the disk, the manifest last."""
    names = []
    for name, group in tensors.items():
        try:
            save_file({key: value.detach().contiguous() for key, value in group.items()}, staging / f"{name}.safetensors")
        except SafetensorError as error:
            raise wrapped(error) or OSError(str(error)) from error
        names.append(f"{name}.safetensors")
    (staging / "state.json").write_text(state, encoding="utf-8")
    names.append("state.json")
    files = {}
    for name in names:
        sync(staging / name)
        files[name] = {"size": (staging / name).stat().st_size, "sha256": sha256_file(staging / name)}
    (staging / "manifest.json").write_text(dumps({"step": step, "files": files}, staging, indent=1), encoding="utf-8")
    sync(staging / "manifest.json")
    sync(staging)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _read_back(staging: Path, tensors: Groups) -> None:
    """Compare what the files hold with what is in memory, bit for bit. Raises CheckpointError."""
    for name, group in tensors.items():
        found = Checkpoint(0, staging, {}).tensors(name)
        for key, value in group.items():
            same = key in found and found[key].dtype == value.dtype and found[key].shape == value.shape
            if not same or not torch.equal(_bytes(found[key]), _bytes(value)):
                raise CheckpointError(f"{staging}: {name}.safetensors: {key} was read back differently from what was written")


def _publish(staging: Path, final: Path) -> None:
    """Give the staging folder its name. One of the same step stands aside first, under a name that `latest` still knows."""
    if final.exists():
        aside = final.with_name(f"{final.name}-replaced")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(final, aside)
    os.rename(staging, final)
    sync(final.parent)


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises CheckpointError where it is missing or does not verify."""
    path = Path(folder) / "checkpoints" / f"step-{step:06d}"
    try:
        verify(path, step)
        return Checkpoint(step, path, read_json(path / "state.json"))
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"{path}: cannot be used: {error}") from error


def _needs(path: Path) -> list[int]:
    """Steps of the other checkpoints that one cannot do without: `needs` in its state."""
    try:
        return list(read_json(path / "state.json").get("needs", []))
    except DataError:
        return []


def _prune(base: Path, step: int, keep: int) -> None:
    """Remove what is older than the `keep` newest up to `step` and needed by none of them. Newer ones are none of ours and stay."""
    found = [(number, path) for number, path in _candidates(base) if number < step]
    stay = [base / f"step-{step:06d}", *(path for _, path in found[: keep - 1])]
    needed = {number for path in stay for number in _needs(path)}
    older = [path for number, path in found[keep - 1 :] if number not in needed]
    replaced = [path for number, path in _candidates(base) if number == step and path.name.endswith("-replaced")]
    for path in (*replaced, *older):
        doomed = base / f"{STAGING}{path.name}-old"  # no kill leaves half a checkpoint under a checkpoint's name
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def save(folder: Path, step: int, tensors: Groups, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `checkpoints/step-000100/` of a run folder; when this returns it is on the disk and has been read back.

    Args:
        folder: the run folder; the caller holds its lock.
        step: optimiser steps done.
        tensors: groups by name, each written to `{name}.safetensors`; no two tensors may share memory.
        state: JSON-able, written to `state.json`. Its `needs`, a list of steps, keeps those checkpoints for as long as this one stays.
        keep: how many checkpoints stay; older ones are removed after the new one was read back and equals the memory.

    Raises DiskError (space, permission; earlier checkpoints stand and the staging folder is gone), CheckpointError where what was
    read back differs, NumericsError where `state` holds NaN or infinity.
    """
    assert keep >= 1 and step >= 0
    base = Path(folder) / "checkpoints"
    final, staging = base / f"step-{step:06d}", base / f"{STAGING}{step:06d}-{os.getpid()}"
    text = dumps(state, final / "state.json")
    needed = sum(value.nbytes for group in tensors.values() for value in group.values()) + len(text)
    with disk(base):
        base.mkdir(parents=True, exist_ok=True)
        for stale in base.glob(f"{STAGING}*"):
            shutil.rmtree(stale)
    if (free := free_bytes(base)) < needed:
        missing = f"{size_text(needed)} needed, {size_text(free)} free, {size_text(needed - free)} missing"
        raise DiskError(f"{final}: no room for a checkpoint: {missing}; what was there before is intact")
    try:
        staging.mkdir()
        _write(staging, step, tensors, text)
        _read_back(staging, tensors)
        _publish(staging, final)
    except OSError as error:
        raise disk_error(error, final, needed=needed) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with disk(base):
        _prune(base, step, keep)
    return final
