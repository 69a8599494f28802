"""Models in and out: safetensors only, no remote code, an allow-list for packed attention; LoRA through peft.

model, tokenizer = load("path/to/model", dtype="fp32", device="cpu")
save(model, tokenizer, "runs/x/model")
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import attention
from .config import is_path_like
from .errors import ModelError, UsageError, nearest
from .files import fingerprint, sha256_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

# Architectures whose packed log-probs were compared with their own forward pass (tests/test_readout.py does it again).
PACKS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "qwen3_moe",
    "gpt2",
    "gpt_neox",
)
# Frequencies that depend on the longest row of a batch would make a response depend on its neighbours.
ROPE = ("default", "linear", "llama3", "yarn")


def resolve(name: str, *, offline: bool = False) -> str:
    """A model folder, a run folder (its `model/`) or a hub name. An existing path wins; path-like text never reaches the network.

    Raises:
        ModelError: a path that is not there (the nearest folder is named) or holds no model. UsageError: a hub name with --offline.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.yaml").is_file() and not (path / "config.json").is_file():  # a run folder
            if not (path / "model").is_dir():
                raise ModelError(f"{name}: this run has not written a model yet; resume it with 'preftune dpo --resume {name}'")
            path = path / "model"
        return str(path)
    if is_path_like(name) or path.exists():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"{name}: no such model folder{nearest(path.name, here)}")
    if offline:
        raise UsageError(f"--model {name}: is not a folder here, and --offline refuses the hub")
    return name


def _check_folder(folder: Path) -> dict[str, Any]:
    """Refuse what could run code or is incomplete, before transformers sees it."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    try:
        spec = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config}: not valid JSON: {error}") from error
    forbidden = sorted(_code_keys(spec))
    if forbidden:
        raise ModelError(f"{config}: {', '.join(forbidden)} asks for code from the model folder; preftune never runs it")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        extra = f"; {pickles[0]} is a pickle and is never read: convert it to safetensors" if pickles else ""
        raise ModelError(f"{folder}: no .safetensors file{extra}")
    return spec


def _code_keys(spec: Any) -> set[str]:
    """Keys, at any depth, by which a configuration can ask for code."""
    if isinstance(spec, list):
        return set().union(*map(_code_keys, spec)) if spec else set()
    if not isinstance(spec, dict):
        return set()
    here = {
        k for k in spec if k in ("auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation_internal") and spec[k]
    }
    return here.union(*map(_code_keys, spec.values())) if spec else here


def load(name: str, *, dtype: str = "fp32", device: str = "cpu", offline: bool = False) -> tuple[nn.Module, Any]:
    """The model, with dropout off, and its tokeniser. An adapter folder is merged into its base: the model exactly as given.

    Raises:
        ModelError: missing, malformed, unsafe or non-finite. UsageError: the hub with `offline`.
    """
    where = resolve(name, offline=offline)
    local = Path(where).is_dir()
    if local and (Path(where) / "adapter_config.json").is_file() and not (Path(where) / "config.json").is_file():
        return _load_adapter(Path(where), dtype=dtype, device=device, offline=offline)
    if local:
        _check_folder(Path(where))
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=local or offline
            )
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local or offline)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {first}") from error
    except Exception as error:  # safetensors' own error class derives from Exception alone
        raise ModelError(f"{name}: a weight file is malformed: {error}") from error
    bad = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if bad:
        raise ModelError(f"{name}: weight {bad} holds values that are not finite")
    return prepare(model.to(device)), tokenizer


def load_tokenizer(name: str, *, offline: bool = False) -> tuple[Any, int | None]:
    """The tokeniser of a model, and its window, without its weights. Raises as `load` does."""
    where = resolve(name, offline=offline)
    local = Path(where).is_dir()
    if local and (Path(where) / "adapter_config.json").is_file() and not (Path(where) / "config.json").is_file():
        adapter = json.loads((Path(where) / "adapter_config.json").read_text(encoding="utf-8"))
        return load_tokenizer(str(adapter.get("base_model_name_or_path")), offline=offline)
    if local:
        _check_folder(Path(where))
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(where, local_files_only=local or offline)
            return AutoTokenizer.from_pretrained(where, local_files_only=local or offline), window_of(config)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name}: its tokeniser cannot be loaded: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and remarks off: what a user must know, preftune says."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and transformers rename things between each other
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _load_adapter(folder: Path, *, dtype: str, device: str, offline: bool) -> tuple[nn.Module, Any]:
    from peft import PeftModel

    spec = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = spec.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder}/adapter_config.json: names no base model")
    model, tokenizer = load(base, dtype=dtype, device=device, offline=offline)
    return prepare(PeftModel.from_pretrained(model, str(folder)).merge_and_unload()), tokenizer


def prepare(model: nn.Module) -> nn.Module:
    """Evaluation mode (dropout off, always) and the packed attention where the architecture is on the allow-list."""
    model.eval()
    for module in model.modules():  # so that train mode, which gradient checkpointing asks for, changes nothing either
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    model.reads_segments = packing_refusal(model.config) is None
    if model.reads_segments:
        model.set_attn_implementation(attention.NAME)
    return model


def packing_refusal(config: Any) -> str | None:
    """Why this architecture gets one row per response, or None where prompts can be shared."""
    if config.model_type not in PACKS:
        return f"architecture {config.model_type!r} is not on the list of those whose packed attention was checked"
    rope = getattr(config, "rope_parameters", None) or {}
    for spec in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if spec.get("rope_type", "default") not in ROPE:
            return f"rope type {spec['rope_type']!r} depends on the longest row"
    return None


def pick_device(name: str) -> str:
    """'auto' is cuda where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device here; use cpu")
    return name


def window_of(config: Any) -> int | None:
    """Positions that the model has, or None where its configuration does not say."""
    return getattr(config, "max_position_embeddings", None)


def add_lora(model: nn.Module, *, rank: int, alpha: float | None, targets: str, seed: int) -> nn.Module:
    """A peft model whose adapter is the only thing that trains; dropout stays off.

    Raises:
        UsageError: no module name ends with one of `targets`.
    """
    from peft import LoraConfig, get_peft_model

    chosen: Any = targets if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__}
    for target in chosen if isinstance(chosen, list) else []:
        if target not in names:
            raise UsageError(
                f"--lora-targets {target}: no such linear module{nearest(target, names)}; here are {', '.join(sorted(names))}"
            )
    torch.manual_seed(seed)
    spec = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=chosen, lora_dropout=0.0, bias="none",
                      task_type="CAUSAL_LM")  # fmt: skip
    with _quiet():
        wrapped = get_peft_model(model, spec)
    wrapped.reads_segments = model.reads_segments
    return wrapped.eval()


def freeze(model: nn.Module, names: str) -> list[str]:
    """Stop training what `names` says; returns the names of the parameters that stay as they are.

    Args:
        names: comma-separated: 'embed', 'head', 'layers.3', 'layers.0-11', or parameter names: whole, their beginning up to a dot, or
            with * and ?.

    Raises:
        UsageError: a name that no parameter has (the nearest is named), 'embed' without 'head' where they are one tensor, or
            nothing left to train.
    """
    known = dict(model.named_parameters())
    chosen: set[str] = set()
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        found = _named(model, name, known)
        if not found:
            words = {"embed", "head", "layers.0"} | {n.rsplit(".", cut)[0] for n in known for cut in range(n.count(".") + 1)}
            raise UsageError(f"--freeze {name}: no weight of this model has such a name{nearest(name, words)}")
        chosen |= found
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied and ("embed" in asked) != ("head" in asked):
        raise UsageError(f"--freeze {names}: embed and head are one tensor in this model; freeze both (embed,head) or neither")
    if chosen == known.keys():
        raise UsageError(f"--freeze {names}: nothing would train: all {len(known)} weights of the model are named")
    for name in chosen:
        known[name].requires_grad_(False)
    return sorted(chosen)


def _named(model: nn.Module, name: str, known: dict[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that one word of --freeze means. Raises UsageError for a layer that is not there."""
    ends = {"embed": model.get_input_embeddings, "head": model.get_output_embeddings}
    if name in ends:
        wanted = {id(p) for p in ends[name]().parameters()}
        return {n for n, p in known.items() if id(p) in wanted}
    if match := re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", name, re.ASCII):
        depth = int(model.config.num_hidden_layers)
        stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < depth:
            raise UsageError(f"--freeze {name}: this model has layers 0 to {depth - 1}")
        wanted = {id(p) for layer in stack[first : last + 1] for p in layer.parameters()}
        return {n for n, p in known.items() if id(p) in wanted}
    return {n for n in known if n == name or n.startswith(f"{name}.") or fnmatch.fnmatchcase(n, name)}


def weights_fingerprint(name: str, *, offline: bool = False) -> str:
    """Identity of the weights as given: hashes of the configuration and every safetensors file of the folder (hub: of its cache)."""
    where = resolve(name, offline=offline)
    if not Path(where).is_dir():
        from huggingface_hub import snapshot_download

        where = snapshot_download(where, local_files_only=offline, allow_patterns=["*.json", "*.safetensors"])
    files = sorted(
        p for p in Path(where).iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json")
    )
    base = {}
    if (Path(where) / "adapter_config.json").is_file():
        base = {
            "base": weights_fingerprint(json.loads((Path(where) / "adapter_config.json").read_text())["base_model_name_or_path"])
        }
    return fingerprint("weights-1", {p.name: sha256_file(p) for p in files}, base)


def save(model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """A folder that plain transformers loads: LoRA merged (a copy; the trained model is left as it is), safetensors, tokeniser."""
    import copy

    merged = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.config.use_cache = True
    with _quiet():
        merged.save_pretrained(folder, safe_serialization=True)
    merged.config.use_cache = False
    tokenizer.save_pretrained(folder)


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute each layer in the backward pass. transformers does so in train mode only; dropout is zero: nothing else changes."""
    with warnings.catch_warnings():  # renamed in 5.23; 5.10 has only the old name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def parameters_of(model: nn.Module) -> int:
    """Number of weights, trained or not."""
    return sum(p.numel() for p in model.parameters())
