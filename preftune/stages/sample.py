"""`preftune sample`: responses from a model, as canonical records with their provenance; KL and reward where asked.

Each line is a record: the prompt, k responses with `finished`, `score` (with --reward) and `source` (model, seed, settings, KL).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..config import Sample
from ..errors import DataError, UsageError
from ..evaluate import clustered, score_samples
from ..files import atomic_write
from ..formats import read_prompts, to_json
from ..records import Record, Response
from ..rewards import scorer
from ..sampling import sample
from ..screen import bar, say
from ..store import from_ids
from ..tokens import decode_response, encode_prompt, end_ids, make_codec


def run(options: Sample) -> int:
    """Sample and write one canonical record a prompt; prints means with standard errors."""
    output = Path(str(options.output))
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name a new file")
    device = models.pick_device(options.device)
    if options.reference and (options.temperature != 1 or options.top_p != 1):
        raise UsageError("--reference: KL is that of the policy itself, so it needs --temperature 1 and --top-p 1")
    scoring = scorer(options.reward, device=device, dtype=options.dtype, offline=options.offline) if options.reward else None
    prompts = read_prompts(options.data, max_records=options.max_records)
    model, tokenizer = models.load(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
    torch.set_num_threads(options.threads or (1 if models.parameters_of(model) < 1_000_000 else os.cpu_count() or 1))
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, control_tokens=options.control_tokens)
    ids, ends = [encode_prompt(codec, p) for p in prompts], [end_ids(codec, p) for p in prompts]
    window = models.window_of(model.config)
    long = [i for i, p in enumerate(ids) if window and len(p) + options.sample_tokens > window]
    if long:
        raise DataError(f"{len(long)} prompts plus --sample-tokens {options.sample_tokens} exceed the model's {window} positions "
                        f"(longest prompt: {max(map(len, ids))} tokens)")  # fmt: skip
    with bar("sampling", len(ids) * options.k) as advance:
        samples = sample(model, ids, ends=ends, k=options.k, max_tokens=options.sample_tokens, temperature=options.temperature,
                         top_p=options.top_p, seed=options.seed, rows_at_once=options.batch_size, progress=advance)  # fmt: skip
    texts = [[decode_response(codec, p, list(s.ids), e) for s in row] for p, row, e in zip(ids, samples, ends, strict=True)]
    shape, facts = (len(ids), options.k), {}
    if options.reference:
        frozen, _ = models.load(options.reference, dtype=options.dtype, device=device, offline=options.offline)
        rb, _ = score_samples(
            model, frozen, from_ids(ids, [[s.ids for s in row] for row in samples]), micro_tokens=8192, device=device
        )
        facts["kl"] = rb.reshape(shape)
    if scoring:
        said = [Response(texts[i][j], samples[i][j].finished) for i in range(len(ids)) for j in range(options.k)]
        facts["reward"] = scoring([p for p in prompts for _ in range(options.k)], said).reshape(shape)
    source = {"model": str(options.model), "temperature": options.temperature, "top_p": options.top_p, "seed": options.seed,
              "max_tokens": options.sample_tokens}  # fmt: skip
    lines = []
    for i, prompt in enumerate(prompts):
        responses = tuple(
            _response(texts[i][j], samples[i][j], source, {k: float(v[i, j]) for k, v in facts.items()}) for j in range(options.k)
        )
        lines.append(json.dumps(to_json(Record(prompt, responses)), ensure_ascii=False) + "\n")
    atomic_write(output, "".join(lines))
    for name, values in facts.items():
        mean, se = clustered(values)
        say(f"{name} {mean:.4f} ± {se:.4f}{' nats a response (Rao-Blackwell)' if name == 'kl' else ''}")
    say(f"{len(lines)} prompts x {options.k} -> {output}")
    return 0


def _response(text: str, drawn: Any, source: dict[str, Any], facts: dict[str, float]) -> Response:
    kl = {"kl": facts["kl"]} if "kl" in facts else {}
    return Response(text, drawn.finished, facts.get("reward"), source | kl | {"logp": sum(drawn.logps)})
