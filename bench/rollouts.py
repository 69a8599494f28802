"""Sampling beside transformers' own generate: the same weights, prompts, ends and temperature, in turn, one thread.

    python bench/rollouts.py [REPEATS]

A random Llama (8,000 tokens) says an end token with a chance of about 2% a token, so rows end at different times, 50 tokens on average.
`generate` gets the prompts left-padded with `num_return_sequences` = k and its default cache; ours computes a prompt once for its k
answers and lets ended rows leave. Counted are tokens up to each answer's end; the ratio is of medians over REPEATS turns.
bench/results/rollouts.txt is what it printed.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from preftune import models, sampling  # noqa: E402

VOCABULARY, ENDS, MOST = 8000, tuple(range(1, 161)), 160
# (width, inner, layers, heads), prompts, their tokens from and to, k
CASES = (((64, 128, 2, 4), 16, 16, 48, 4), ((256, 704, 4, 4), 8, 64, 128, 8))


def network(width: int, inner: int, layers: int, heads: int) -> LlamaForCausalLM:
    """A random model whose next token is nearly uniform."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                                        num_attention_heads=heads, max_position_embeddings=1024)).eval()  # fmt: skip


def theirs(model: LlamaForCausalLM, prompts: list[list[int]], k: int, seed: int) -> int:
    """Tokens that `generate` made, up to each answer's end."""
    torch.manual_seed(seed)
    ids, mask = sampling._padded(prompts)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MOST,
                         num_return_sequences=k, eos_token_id=list(ENDS), pad_token_id=0)  # fmt: skip
    made = 0
    for row in out[:, ids.shape[1] :].tolist():
        made += next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))
    return made


def ours(model: LlamaForCausalLM, prompts: list[list[int]], k: int, seed: int) -> int:
    """Tokens that ours made."""
    found = sampling.sample(model, prompts, ends=[ENDS] * len(prompts), k=k, max_tokens=MOST, seed=seed, rows_at_once=256)
    return sum(len(s.ids) for row in found for s in row)


def main() -> None:
    """Every case, in turn."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"tokens per second on one thread, torch {torch.__version__}; medians of {repeats} turns [least, most]\n")
    print(f"{'model':<22}{'prompts x k':<14}{'prompt tokens':<16}{'generate':<26}{'ours':<26}{'ratio'}")
    for shape, count, low, high, k in CASES:
        plain, packed = network(*shape), models.prepare(network(*shape))
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(200, VOCABULARY, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator).tolist()
                   for _ in range(count)]  # fmt: skip
        speeds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(repeats + 1):
            for name, function, model in (("theirs", theirs, plain), ("ours", ours, packed)):
                began = time.perf_counter()
                with torch.inference_mode():
                    made = function(model, prompts, k, turn)
                if turn:  # the first warms up
                    speeds[name].append(made / (time.perf_counter() - began))
        middle = {name: statistics.median(found) for name, found in speeds.items()}
        shown = {name: f"{middle[name]:,.0f} [{min(found):,.0f}, {max(found):,.0f}]" for name, found in speeds.items()}
        size = models.parameters_of(plain) / 1e6
        print(f"{f'{size:.1f}M, {shape[2]} layers':<22}{f'{count} x {k}':<14}{f'{low}-{high}':<16}{shown['theirs']:<26}{shown['ours']:<26}"
              f"{middle['ours'] / middle['theirs']:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
