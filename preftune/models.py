"""Models in and out: safetensors only, no remote code, an allow-list for packed attention; LoRA through peft; scalar heads.

model, tokenizer = load("path/to/model", dtype="fp32", device="cpu")
save(model, tokenizer, "runs/x/model")
reward, tokenizer, facts = load_reward("runs/reward")
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from . import attention
from .config import is_path_like
from .errors import ModelError, PreftuneError, UsageError, nearest
from .files import fingerprint, sha256_file
from .screen import clean, say

# The compiled code of products in bf16 is kept for the latest 1024 of their sizes, twice: 17 MB a step of packed batches, of which no two
# are equal (docs/speed.md). Read when the first product is made.
for _kept in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_kept, "32")

REWARD = "reward.json"  # beside a reward model's weights: how its scores are to be read
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

# Files of a model folder that libraries read as settings, and the keys in them, at any depth, by which they find code.
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json")
ASKS_FOR_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "_attn_implementation_internal",
                 "_experts_implementation_internal", "megatron_config")  # fmt: skip
# A hub name as a value makes transformers fetch a kernel; flash attention that is not installed does so too.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
FLOATS = ("F32", "BF16", "F16", "F64")
LAYERS = re.compile(r"(num_(hidden_|decoder_)?layers|n_layers?)")
SIZES = re.compile(r"(num_.*|n_(embd|head|inner)|.*_size|.*_dim)")
# adapter_config.json: what is read, and what may say anything since nothing depends on it here.
LORA_READ = ("r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias",
             "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters",
             "task_type")  # fmt: skip
LORA_PASSED_OVER = ("base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "lora_dropout",
                    "init_lora_weights")  # fmt: skip


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


def _json(path: Path) -> Any:
    """What a JSON file of a model folder holds. Raises ModelError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error


def _check_folder(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Refuse what could run code, hang or is incomplete, before transformers sees it. Returns config.json."""
    for entry in folder.iterdir():
        if not entry.is_file() and not entry.is_dir():
            raise ModelError(f"{entry}: not a regular file (a pipe, a device or a link to nothing)")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    for path in (folder / name for name in SETTINGS):
        spec = _json(path) if path.is_file() else {}
        if not isinstance(spec, dict):
            raise ModelError(f"{path}: expected a JSON object, not {type(spec).__name__}")
        if forbidden := sorted(_code_keys(spec)):
            raise ModelError(f"{path}: {', '.join(forbidden)} asks for code; preftune never runs any that comes with a model. Where "
                             "transformers knows the architecture by itself, delete that key")  # fmt: skip
    spec = _json(folder / "config.json")
    if weights:
        _check_sizes(folder, spec, _headers(folder, quantised=bool(spec.get("quantization_config"))))
    return spec


def _code_keys(spec: Any) -> set[str]:
    """Keys, at any depth, by which a configuration can ask for code: files of its folder, or kernels of a hub."""
    if isinstance(spec, list):
        return set().union(*map(_code_keys, spec)) if spec else set()
    if not isinstance(spec, dict):
        return set()
    here = {k for k, v in spec.items() if v and (k in ASKS_FOR_CODE or (k in IMPLEMENTATIONS and v not in ("eager", "sdpa")))}
    return here.union(*map(_code_keys, spec.values())) if spec else here


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, as transformers picks them. ModelError where an index leads elsewhere."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        extra = f"; {pickles[0]} is a pickle and is never read: convert it to safetensors" if pickles else ""
        raise ModelError(f"{folder}: no model.safetensors{extra}")
    table = _json(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: no 'weight_map' that says which file holds which weight")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: names {name!r}, expected a .safetensors file of the same folder")
        if not (folder / name).is_file():
            raise ModelError(f"{index}: names {name}, which is not there")
    return [folder / name for name in sorted(set(names.values()))]


def _headers(folder: Path, *, quantised: bool) -> dict[str, list[int]]:
    """Shapes of all weights by name, read off the headers. Raises ModelError for a malformed file or a weight that is no float."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with _readable(str(file), "malformed, so its weights cannot be read"), safe_open(file, "pt") as found:
            for name in found.keys():  # noqa: SIM118 (not a dict)
                entry = found.get_slice(name)
                shapes[name] = entry.get_shape()
                if entry.get_dtype() not in FLOATS and not quantised:
                    raise ModelError(f"{file}: {name} is of type {entry.get_dtype()}, expected one of {', '.join(FLOATS)}")
    return shapes


def _check_sizes(folder: Path, spec: Any, shapes: dict[str, list[int]]) -> None:
    """A configuration that speaks of more layers than there are weights, or of dimensions that no file holds, would never end."""
    total = sum(math.prod(shape) for shape in shapes.values())
    for key, value in spec.items():
        if isinstance(value, dict):
            _check_sizes(folder, value, shapes)
        most = len(shapes) if LAYERS.fullmatch(key) else total if SIZES.fullmatch(key) else None
        if most is not None and isinstance(value, int) and value > most:
            held = f"{len(shapes):,} weights with {total:,} numbers in all"
            raise ModelError(f"{folder}/config.json: {key} is {value:,}, but the weight files hold {held}")


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    """Whatever a library raises over a file from a stranger becomes a ModelError; of a Rust library's panic too."""
    try:
        yield
    except PreftuneError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines()
        said = " ".join(line.strip() for line in lines[:2])[:300]
        raise ModelError(f"{name}: {what}: {said or type(error).__name__}") from error


def _folder(name: str, *, offline: bool, weights: bool = True) -> Path:
    """The model's folder: where it lies, or where the hub's files were put. Raises as `resolve` does; ModelError for faults of the hub."""
    where = resolve(name, offline=offline)
    return Path(where) if Path(where).is_dir() else _from_hub(where, cached=False, weights=weights)


def _from_hub(name: str, *, cached: bool, weights: bool = True) -> Path:
    """The hub's files as a folder; never its code. cached=True: only what was downloaded before, no network."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights
    with _readable(name, "not among the models downloaded before" if cached else "cannot be had from the hub"):
        return Path(snapshot_download(name, local_files_only=cached, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))


def is_adapter(folder: Path) -> bool:
    """Whether this is a folder with an adapter and no model of its own."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def adapters_of(folder: Path) -> tuple[Path, str, list[Path]]:
    """(base folder, its name, adapters on it, innermost first). A file never reaches the network: a base by hub name must be downloaded.

    Raises:
        ModelError: an adapter that names no base, one that is not here, or itself.
    """
    name, chain = str(folder), list[Path]()
    while is_adapter(folder):
        if folder.resolve() in (p.resolve() for p in chain):
            raise ModelError(f"{folder}/adapter_config.json: names itself as its base")
        chain.append(folder)
        spec = _json(folder / "adapter_config.json")
        base = spec.get("base_model_name_or_path") if isinstance(spec, dict) else None
        if not isinstance(base, str) or not base:
            raise ModelError(f"{folder}/adapter_config.json: names no base model")
        if is_path_like(base) and not Path(base).is_dir():
            raise ModelError(f"{folder}/adapter_config.json: its base {base!r} is not a folder here")
        name, folder = base, Path(resolve(base)) if Path(base).is_dir() else _from_hub(base, cached=True)
    return folder, name, chain[::-1]


def load(name: str, *, dtype: str = "fp32", device: str = "cpu", offline: bool = False) -> tuple[nn.Module, Any]:
    """The model, with dropout off, and its tokeniser. An adapter folder is merged into its base: the model exactly as given.

    Raises:
        ModelError: missing, malformed, unsafe, incomplete or non-finite. UsageError: the hub with `offline`.
    """
    folder, base, adapters = adapters_of(_folder(name, offline=offline))
    if _scores(_check_folder(folder)):
        raise ModelError(f"{name}: a reward model, which scores answers and writes none; a language model is asked for here")
    model, tokenizer = _read(AutoModelForCausalLM, folder, name, dtype, "a causal language model")
    if not adapters and not Path(name).is_dir():
        model.name_or_path = model.config._name_or_path = base  # the hub's name, not the folder of its cache
    for adapter in adapters:
        model = with_adapter(model, adapter).merge_and_unload()
    return prepare(_finite(model, name).to(device)), tokenizer


def _read(kind: Any, folder: Path, name: str, dtype: str, what: str) -> tuple[Any, Any]:
    """A checked folder's model, of one of transformers' kinds, and tokeniser. Raises ModelError where weights are missing or odd."""
    with _readable(name, f"cannot be loaded as {what}"), _quiet():
        model, found = kind.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # What transformers only logs, and then begins with random numbers, is refused with its name.
    for weight, given, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(f"{name}: {weight} is {tuple(given)} in the weight file, the configuration asks for {tuple(wanted)}")
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{name}: the weight files lack {missing[0]}{more}")
    if surplus := sorted(found["unexpected_keys"]):
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        say(f"{clean(name)}: {type(model).__name__} has no place for {clean(surplus[0])}{more}: not loaded")
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = [t for t, number in tokenizer.get_vocab().items() if number >= rows and t != tokenizer.pad_token]  # padding is never used
    if beyond:
        raise ModelError(f"{name}: the tokeniser has ids that the model has not: {beyond[0]!r} and {len(beyond) - 1} more, from {rows} on")
    return model, tokenizer


def _finite(model: Any, name: str) -> Any:
    bad = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if bad:
        raise ModelError(f"{name}: weight {bad} holds values that are not finite")
    return model


# ---------------------------------------------------------------- reward models


def _scores(spec: dict[str, Any]) -> bool:
    """Whether a configuration is that of a model with a head for whole sequences."""
    kinds = spec.get("architectures")
    return any(str(kind).endswith("ForSequenceClassification") for kind in (kinds if isinstance(kinds, list) else ()))


def with_scalar_head(model: Any, *, seed: int | Sequence[int], classes: Sequence[str] = ()) -> nn.Module:
    """The decoder of a causal LM under a new linear head with one output, or one a class, N(0, 1/sqrt(d + 1)): transformers' own class.

    The decoder is taken over, not copied. Padding is unset where it is the end token: transformers looks for the last token that is no
    padding, and would read an answer that ends before its end.

    Raises:
        ModelError: transformers has no such class for this architecture.
    """
    kind = type(model.config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"transformers has no scalar head for {type(model).__name__} ({model.config.model_type!r}), so no other program "
                         "could load the reward model; take another architecture")  # fmt: skip
    config = copy.deepcopy(model.config)
    config.num_labels = len(classes) or 1
    if classes:
        config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.pad_token_id = None if config.pad_token_id in ends else config.pad_token_id
    with torch.device("meta"):
        out = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind](config)
    setattr(out, out.base_model_prefix, model.base_model)
    like, size = next(model.parameters()), out.score.in_features
    draws = torch.from_numpy(np.random.default_rng(seed).normal(0, 1 / math.sqrt(size + 1), (config.num_labels, size)))
    out.score = nn.Linear(size, config.num_labels, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        out.score.weight.copy_(draws)
    return prepare(out)


def is_reward(name: str, *, offline: bool = False) -> bool:
    """Whether a model, known by its configuration, is one that `load_reward` reads. Raises as `load` does."""
    folder = _folder(name, offline=offline, weights=False)
    return not is_adapter(folder) and _scores(_check_folder(folder, weights=False))


def load_reward(name: str, *, dtype: str = "fp32", device: str = "cpu", offline: bool = False) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A reward model, its tokeniser, and what reward.json says of it ({} for a model of another program).

    Args:
        name: a folder with a sequence classifier of one label (or as many as reward.json names classes), the run folder of one, a hub name.

    Raises:
        ModelError: as `load`; a language model, an adapter, a head of several outputs, or a reward.json that is not ours.
    """
    folder = _folder(name, offline=offline)
    if is_adapter(folder):
        raise ModelError(f"{name}: an adapter; give the model that the run wrote beside it")
    if not _scores(_check_folder(folder)):
        raise ModelError(f"{name}: no reward model (a sequence classifier with one label); 'preftune reward' trains one")
    model, tokenizer = _read(AutoModelForSequenceClassification, folder, name, dtype, "a reward model")
    facts = _json(folder / REWARD) if (folder / REWARD).is_file() else {}
    known = isinstance(facts, dict) and all(isinstance(facts.get(k, 0.0), (int, float)) for k in ("shift", "scale"))
    if not known or not facts.get("scale", 1.0) > 0 or not math.isfinite(facts.get("shift", 0.0)):
        raise ModelError(f"{folder / REWARD}: expected an object with numbers 'shift' and 'scale', the latter above 0")
    outputs = len(facts.get("classes") or [0])
    if model.config.num_labels != outputs or not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(f"{name}: {type(model).__name__} with {model.config.num_labels} outputs; expected one linear head with one output"
                         + (f" for each of the {outputs} classes of {REWARD}" if outputs > 1 else ""))  # fmt: skip
    return prepare(_finite(model, name).to(device)), tokenizer, facts


def average_rewards(names: Sequence[str], *, dtype: str, device: str) -> nn.Module:
    """A reward model whose weights are the mean of those of several with one origin; summed in float64.  arXiv:2401.12187.

    Raises:
        ModelError: weights of different names or shapes.
    """
    model, _, _ = load_reward(names[0], dtype=dtype, device=device)
    weights = dict(model.named_parameters())
    sums = {name: w.detach().double() for name, w in weights.items()}
    for other in names[1:]:
        found = dict(load_reward(other, dtype=dtype, device=device)[0].named_parameters())
        if odd := [n for n in {**weights, **found} if n not in found or n not in weights or found[n].shape != weights[n].shape]:
            raise ModelError(f"{other}: {odd[0]} is not a weight of {names[0]} too, or has another shape; only models of one origin can be")
        for name in sums:
            sums[name] += found[name].detach().double()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(sums[name] / len(names))
    return model


def load_tokenizer(name: str, *, offline: bool = False) -> tuple[Any, int | None]:
    """The tokeniser of a model, and its window, without its weights. Raises as `load` does."""
    folder, _, _ = adapters_of(_folder(name, offline=offline, weights=False))
    _check_folder(folder, weights=False)
    with _readable(name, "its tokeniser cannot be loaded"), _quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), window_of(config)


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


def with_adapter(model: nn.Module, folder: Path, *, train: bool = False) -> Any:
    """The model wrapped with a LoRA adapter, which trains or does not.

    Its configuration is read by an allow-list: peft would import a module that one names.

    Raises:
        ModelError: not LoRA, a pickle, an option that is not on the list, or weights that are not exactly those of its layers.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    place = folder / "adapter_config.json"
    spec, usual = _json(place), LoraConfig().to_dict()
    if spec.get("peft_type") != "LORA":
        raise ModelError(f"{place}: peft_type is {spec.get('peft_type')!r}, expected LORA; merge other adapters with peft first")
    odd = [k for k, v in spec.items() if k not in LORA_READ + LORA_PASSED_OVER and v and v != usual.get(k)]
    if odd:
        raise ModelError(f"{place}: {', '.join(odd)} is not supported; merge this adapter with peft first")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder}: no adapter_model.safetensors (a pickle such as adapter_model.bin is never read)")
    with _readable(str(folder), "cannot be loaded as a LoRA adapter"), _quiet():
        with safe_open(file, "pt") as found:
            given = set(found.keys())
        config = LoraConfig(**{k: spec[k] for k in LORA_READ if k in spec}, inference_mode=not train)
        wrapped = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=train)
        wanted = {k for k in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if "lora_" in k}
        if odd := sorted(wanted ^ {k for k in given if "lora_" in k}):
            raise ModelError(f"{file}: {'lacks' if odd[0] in wanted else 'holds a stray'} {odd[0]}")
        return wrapped


def prepare(model: nn.Module) -> nn.Module:
    """Evaluation mode (dropout off, always) and the packed attention where the architecture is on the allow-list."""
    model.eval()
    no_dropout(model)
    model.config.use_cache = False
    model.reads_segments = packing_refusal(model.config) is None
    if model.reads_segments:
        model.set_attn_implementation(attention.NAME)
    return model


def use_flex(model: nn.Module) -> nn.Module:
    """The packed attention by FlexAttention. Raises UsageError where the model is run one row per response."""
    if not model.reads_segments:
        raise UsageError(f"--attention flex has no effect: one row per response, since {packing_refusal(model.config)}")
    model.set_attn_implementation(attention.FLEX)
    return model


def no_dropout(model: nn.Module) -> None:
    """So that train mode, which gradient checkpointing asks for, changes nothing either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def packing_refusal(config: Any) -> str | None:
    """Why this architecture gets one row per response, or None where prompts can be shared."""
    if config.model_type not in PACKS:
        return f"architecture {config.model_type!r} is not on the list of those whose packed attention was checked"
    rope = getattr(config, "rope_parameters", None) or {}
    for spec in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if spec.get("rope_type", "default") not in ROPE:
            return f"rope type {spec['rope_type']!r} depends on the longest row"
    return None


def pick_device(name: str, *, flex: bool = False) -> str:
    """'auto' is cuda where there is one. Raises UsageError where there is none and the name or `flex` asks for it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device here; use cpu")
    if flex and not name.startswith("cuda"):
        raise UsageError(f"--attention flex: FlexAttention has no gradients but on CUDA, and here is {name}; leave it out")
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
    # As a sequence classifier peft trains and saves the head whole, beside the adapter.
    spec = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=chosen, lora_dropout=0.0, bias="none",
                      task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM")  # fmt: skip
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
    top = model.get_output_embeddings()  # none of a reward model
    tied = top is not None and model.get_input_embeddings().weight is top.weight
    if tied and ("embed" in asked) != ("head" in asked):
        raise UsageError(f"--freeze {names}: embed and head are one tensor in this model; freeze both (embed,head) or neither")
    if chosen == known.keys():
        raise UsageError(f"--freeze {names}: nothing would train: all {len(known)} weights of the model are named")
    for name in chosen:
        known[name].requires_grad_(False)
    return sorted(chosen)


def _named(model: nn.Module, name: str, known: dict[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that one word of --freeze means. Raises UsageError for a layer that is not there."""
    ends = {"embed": model.get_input_embeddings, "head": lambda: getattr(model, "score", None) or model.get_output_embeddings()}
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
    folder, _, adapters = adapters_of(_folder(name, offline=offline))
    files = sorted((*weight_files(folder), folder / "config.json", *folder.glob(REWARD)))
    over = [[sha256_file(a / n) for n in ("adapter_config.json", "adapter_model.safetensors")] for a in adapters]
    return fingerprint("weights-2", {p.name: sha256_file(p) for p in files}, over)


def save(model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """A folder that plain transformers loads: LoRA merged (a copy; the trained model is left as it is), safetensors, tokeniser."""
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


def use_threads(model: nn.Module, wanted: int | None) -> int:
    """Compute with so many threads; by default with one for a tiny model, which is slower with two, and else with one a core."""
    threads = wanted or (1 if parameters_of(model) < 1_000_000 else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    return threads
