"""LoRA adapters as given: one that goes on training, beside a frozen copy of itself; and what a run saves as `adapter/`.

An adapter that is only stood upon is merged into its base by `models.load`. peft and safetensors; tensors and folders, no options.

    model = go_on("runs/sft/adapter", dtype="fp32", device="cpu")   # trains; the copy under the name GIVEN is the reference
    save(model, "runs/x/adapter", given=Path("runs/sft/adapter"))
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import UsageError
from .models import adapters_of, load, no_dropout, resolve, with_adapter
from .readout import GIVEN


def go_on(name: str, *, dtype: str, device: str, offline: bool = False) -> nn.Module:
    """The base with the adapter `name`, which trains, and a frozen copy of it called GIVEN, which does not and is the reference.

    Raises:
        UsageError: not an adapter folder, or not plain LoRA. ModelError: as `models.load`.
    """
    base, _, chain = adapters_of(Path(resolve(name, offline=offline)))
    if not chain:
        raise UsageError(f"--adapter continue: {name} is not an adapter folder; --lora RANK makes a new adapter on it")
    model: Any = with_adapter(load(str(chain[-2] if len(chain) > 1 else base), dtype=dtype, device=device)[0], chain[-1], train=True)
    if why := stack_refusal(chain[-1]):
        raise UsageError(f"--adapter continue: {why}; --adapter merge stands on it")
    model.add_adapter(GIVEN, copy.deepcopy(model.peft_config["default"]))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for weight in (n for n in weights if ".default" in n):
            weights[weight.replace(".default", f".{GIVEN}")].copy_(weights[weight])
    model.set_adapter("default")
    model.reads_segments = model.get_base_model().reads_segments
    no_dropout(model)
    return model.eval()


def stack_refusal(folder: Path) -> str | None:
    """Why this adapter and another one on top of it are not one adapter on its base, or None where they are: plain LoRA throughout."""
    spec = _spec(folder)
    if any(spec.get(key) for key in UNPLAIN) or spec.get("bias", "none") != "none":
        return f"{folder} is not plain LoRA"
    if any(not _side(name) for name in load_file(folder / "adapter_model.safetensors")):
        return f"{folder} holds weights other than LoRA's"
    return None


def _spec(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


# What makes an adapter more than the sum of a product of two matrices, or gives modules scales of their own.
UNPLAIN = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices", "layer_replication",
           "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config")  # fmt: skip


def save(model: Any, folder: str | os.PathLike[str], *, given: Path | None) -> None:
    """The trained adapter as a folder that peft loads.

    Args:
        given: the adapter that the run was given, or None. Where it was merged into the model and this one put on it,
            W + s1 B1 A1 + s2 B2 A2 is saved as one adapter on W, [s1 B1, s2 B2] [A1; A2], whose rank is the sum.
    """
    folder = Path(folder)
    model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"])
    if given is None:
        return
    base = {"base_model_name_or_path": _spec(given)["base_model_name_or_path"]}
    if GIVEN in model.peft_config:
        _write_spec(folder, _spec(folder) | base)
        return
    parts = [(_spec(f), load_file(f / "adapter_model.safetensors")) for f in (given, folder)]
    ranks = [int(spec["r"]) for spec, _ in parts]
    joined: dict[str, Tensor] = {}
    for name in sorted(set(parts[0][1]) | set(parts[1][1])):
        side, dim = ("A", 0) if _side(name) == "A" else ("B", 1)
        like = next(tensors[name] for _, tensors in parts if name in tensors)
        pieces = []
        for (spec, tensors), rank in zip(parts, ranks, strict=True):
            shape = [rank if i == dim else n for i, n in enumerate(like.shape)]
            piece = tensors[name].float() if name in tensors else torch.zeros(shape)
            pieces.append(piece * (_scale(spec) if side == "B" else 1.0))
        joined[name] = torch.cat(pieces, dim=dim)
    modules = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in joined})
    spec = parts[1][0] | base | {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "target_modules": modules}
    save_file(joined, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_spec(folder, spec)


def _write_spec(folder: Path, spec: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(spec, indent=2, sort_keys=True), encoding="utf-8")


def _side(name: str) -> str:
    """'A' or 'B' of a LoRA tensor's name, '' of any other."""
    return next((side for side in "AB" if f".lora_{side}." in name or f".lora_embedding_{side}" in name), "")


def _scale(spec: dict[str, Any]) -> float:
    """What multiplies B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    return float(spec["lora_alpha"]) / (math.sqrt(spec["r"]) if spec.get("use_rslora") else spec["r"])
