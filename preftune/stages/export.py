"""`preftune export`: a run as a folder to publish: merged model or adapter, tokeniser, and a model card of what was measured.

Weights are copied byte for byte unless --dtype asks for another number format. Only what a model needs goes out: no optimiser, no
samples, no paths of this machine. Nothing is uploaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .. import report, runs
from ..config import Export
from ..errors import ModelError, UsageError
from ..files import disk, read_json, require_new, size_text, write_json
from ..report.card import bare, card, from_hub
from ..screen import clean, say

PARTS = (".json", ".jinja", ".safetensors", ".txt", ".model")  # what transformers and peft read, of a folder that they wrote
PATHS = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # where they write down a folder of this machine
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)


def run(options: Export) -> int:
    """Write the folder. Raises UsageError for a folder that no run made, a run without an adapter, or an output that is not empty;
    ModelError for a run that has not written its model; DiskError."""
    folder, final = Path(str(options.run)), Path(str(options.output))
    if (folder / "ensemble.json").is_file():
        raise UsageError(f"{folder}: an ensemble; export one of its members, such as {folder}/member-1")
    told = report.read_run(folder)
    stage = (told.results or {}).get("stage") or told.manifest.get("stage") or "dpo"
    if told.results is None or not (folder / "model" / "config.json").is_file():
        raise ModelError(f"{folder}: this run has not written a model yet; resume it with 'preftune {stage} --resume {folder}'")
    if told.faults:
        raise ModelError(f"{folder}: no card can be made: {told.faults[0]}")
    if options.adapter and not (folder / "adapter" / "adapter_config.json").is_file():
        raise UsageError(f"--adapter: {folder} has none, because it was not trained with --lora; leave --adapter out")
    require_new(final)
    text = card(told, final.resolve().name, adapter=options.adapter, dtype=options.dtype)
    source = folder / ("adapter" if options.adapter else "model")
    tokeniser = [p for p in _parts(folder / "model") if p.suffix != ".safetensors" and p.name not in WEIGHTS]
    whole = _parts(source) + (tokeniser if options.adapter else [])
    size = sum(p.stat().st_size for p in whole)
    runs.require_space(final, 2 * size, "the model")
    with disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with runs.publish_folder(final, owned=False) as staging:
        if options.dtype and not options.adapter:
            _converted(source, staging, options.dtype)
        else:
            for path in whole:
                shutil.copyfile(path, staging / path.name)
        if options.dtype and options.adapter:
            _recast(staging / "adapter_model.safetensors", options.dtype)
        for path in sorted(staging.glob("*.json")):
            _without_paths(path, hub=from_hub(told.manifest))
        (staging / "README.md").write_text(text, encoding="utf-8")
    left = sorted(p.name for p in source.iterdir() if p not in whole and p.name != "README.md")
    if left:
        say(f"not published: {clean(', '.join(left))}")
    kind = "adapter" if options.adapter else "model"
    print(
        clean(
            f"written       {final} ({kind}, tokeniser, README.md; {size_text(sum(p.stat().st_size for p in final.iterdir()))})"
        )
    )
    print(clean(f"look          {final}/README.md: read it before you publish; it names no licence"))
    return 0


def _parts(folder: Path) -> list[Path]:
    """The files of a model folder that go out, in order."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in PARTS)


def _converted(source: Path, target: Path, dtype: str) -> None:
    """The model in another number format, by the way that every model is loaded and saved. Raises ModelError where a value overflows."""
    from .. import models

    if not (source / models.REWARD).is_file():
        models.save(*models.load(str(source), dtype=dtype), target)
        return
    model, tokenizer, _ = models.load_reward(str(source), dtype=dtype)
    models.save(model, tokenizer, target)
    shutil.copyfile(source / models.REWARD, target / models.REWARD)


def _recast(path: Path, dtype: str) -> None:
    """Every tensor of a safetensors file in another number format."""
    from safetensors.torch import load_file, save_file

    from ..models import DTYPES

    save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def _without_paths(path: Path, hub: bool) -> None:
    """Rewrites a configuration in which a library wrote down a folder of this machine; others stay byte for byte."""
    if path.name in ("tokenizer.json", "model.safetensors.index.json"):
        return
    found: Any = read_json(path)
    named = {key: found[key] for key in PATHS if isinstance(found, dict) and isinstance(found.get(key), str)}
    told = {key: name if hub and not name.startswith("/") else bare(name) for key, name in named.items()}
    if told != named:
        write_json(path, found | told)
