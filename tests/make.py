"""Small things that tests stand on, made here and nowhere downloaded: tokenisers, random models, preference files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from preftune import checkpoints
from preftune.records import Judgement, Record, Response
from preftune.store import Store, build
from preftune.tokens import make_codec

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(BYTES) + 4  # bytes, <s>, </s>, <|user|>, <|end|>

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def tokenizer(*, template: str | None = None, bos: bool = True, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """A byte tokeniser with two merges ('th', 'the'), so that a boundary can be straddled."""
    vocab = {c: i for i, c in enumerate(BYTES)} | {
        "<s>": 256,
        "</s>": 257,
        "<|user|>": 258,
        "<|end|>": 259,
        "th": 260,
        "the": 261,
    }
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|user|>", "<|end|>"])
    out = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>")
    out.chat_template = template
    return out


SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
}


def model(kind: str = "llama", *, seed: int = 0, vocab: int = 262, **extra: Any) -> Any:
    """A random two-layer model of 32 dimensions, weights large enough that positions and masks matter."""
    ends = {"vocab_size": vocab, "bos_token_id": 256, "eos_token_id": 257}
    base: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "max_position_embeddings": 128, "tie_word_embeddings": False} | ends  # fmt: skip
    if kind == "gpt2":
        base = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | ends
    if kind == "bloom":
        base = {"hidden_size": 32, "n_layer": 2, "n_head": 4} | ends
    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **(base | SIZES[kind] | extra))
    net = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return net.eval()


def write_model(folder: Path, *, template: str | None = None, **kwargs: Any) -> Path:
    """A model folder on disk, as users have them."""
    model(**kwargs).save_pretrained(folder)
    tokenizer(template=template).save_pretrained(folder)
    return folder


WORDS = ["the", "cat", "then", "thanks", "a", "dog", "that", "thinks", "so", "they", "walk", "home", "and", "there", "bright"]


def records(count: int = 12, *, seed: int = 0, k: int = 2) -> list[Record]:
    """Records with prompts and responses of different lengths; with k > 2 all pairs of a ranking."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        prompt = f"{i}: " + " ".join(rng.choice(WORDS, rng.integers(1, 6)))
        responses = tuple(Response(f" {j}" + "".join(f" {w}" for w in rng.choice(WORDS, rng.integers(1, 7)))) for j in range(k))
        order = tuple((int(j),) for j in rng.permutation(k))
        out.append(Record(prompt, responses, (Judgement(order, weight=float(rng.integers(1, 4))),), where=f"made:{i + 1}"))
    return out


def scored(found: list[Record], *, seed: int = 0) -> list[Record]:
    """The same with a score and an ensemble of two at each response; all but the last of each are samples of the weights 'made'."""
    rng, out = np.random.default_rng([seed, 1]), []
    for record in found:
        responses = []
        for i, response in enumerate(record.responses):
            drawn = {"weights": "made", "temperature": 1.0, "top_p": 1.0 if i + 1 < len(record.responses) else 0.9}
            source = drawn | {"scores": rng.normal(size=2).tolist()}
            responses.append(replace(response, score=float(rng.normal()), source=source))
        out.append(replace(record, responses=tuple(responses)))
    return out


def store(count: int = 12, *, mismatched: bool = False, **kwargs: Any) -> Store:
    """The same as token ids, scored."""
    return build(scored(records(count, **kwargs)), make_codec(tokenizer()), max_length=128, mismatched=mismatched, members=True,
                 weights="made")[0]  # fmt: skip


def write_pairs(path: Path, count: int = 40, *, seed: int = 0) -> Path:
    """A prompt/chosen/rejected file in which the chosen side says 'thanks': something a tiny model can learn."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        tail = " ".join(rng.choice(WORDS, 2))
        lines.append(json.dumps({"prompt": f"{i} {tail}", "chosen": f" thanks {tail}", "rejected": f" no {tail}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_scored(path: Path, weights: str, count: int = 20) -> Path:
    """Records of four samples of the weights with this fingerprint, scored, also by an ensemble of two; best against worst is judged."""
    rng, lines = np.random.default_rng(0), []
    for i in range(count):
        score = (np.arange(4) / 5 + rng.normal(scale=0.1, size=4)).round(3).tolist()
        source = {"weights": weights, "temperature": 1.0, "top_p": 1.0}
        responses = [{"text": f" {'thanks ' * j}{rng.choice(WORDS)}", "score": s, "source": source | {"scores": [s + 0.1, s * 1.1]}}
                     for j, s in enumerate(score)]  # fmt: skip
        judged = [{"order": [[int(np.argmax(score))], [int(np.argmin(score))]]}]
        lines.append(json.dumps({"prompt": f"{i} {rng.choice(WORDS)}", "responses": responses, "judgements": judged}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Stopped(BaseException):
    """As a kill would: nothing in the house catches it."""


def stop_after(run: Callable[[Any], Any], options: Any, step: int) -> None:
    """Run until the checkpoint of `step` stands, then no further: on the disk is what a kill at that moment leaves."""
    saved = checkpoints.save

    def save_and_stop(folder: Any, at: int, *args: Any, **kwargs: Any) -> Any:
        path = saved(folder, at, *args, **kwargs)
        if at == step:
            raise Stopped
        return path

    checkpoints.save = save_and_stop
    try:
        run(options)
    except Stopped:
        return
    finally:
        checkpoints.save = saved
    raise AssertionError(f"the run ended before step {step}")


@contextmanager
def what_was_detached(kept: list[torch.Tensor], monkeypatch: Any) -> Iterator[None]:
    """Every `x.detach()` inside gives what it gave the first time: what a loss holds constant stays so under finite differences."""
    real, replay = torch.Tensor.detach, iter(list(kept))

    def detach(x: torch.Tensor) -> torch.Tensor:
        if kept and (old := next(replay, None)) is not None:
            return old
        kept.append(real(x).clone())
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", detach)
        yield


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
