"""`preftune logprobs`: log-probabilities of every response of a file, by the same path that training uses.

One JSON line per response: record, response, tokens, logp (sum, nats), mean (nats a token).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .. import models
from ..config import Logprobs
from ..errors import DataError
from ..evaluate import response_rows
from ..files import atomic_write
from ..formats import read
from ..screen import bar, say
from ..store import build
from ..tokens import make_codec


def run(options: Logprobs) -> int:
    """Score and write; exit 3 where nothing could be scored. What is left out is counted on stderr."""
    device = models.pick_device(options.device)
    reading = read(options.data, format=options.format, skip_bad=options.skip_bad, max_records=options.max_records)
    model, tokenizer = models.load(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
    models.use_threads(model, options.threads)
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, finish=options.finish,
                       control_tokens=options.control_tokens)  # fmt: skip
    store, intake = build(reading.records, codec, max_length=options.max_length or models.window_of(model.config))
    for reason, count in intake.dropped.most_common():
        say(f"left out {count}: {reason}")
    if not len(store):
        raise DataError(f"no record can be scored; first: {intake.refused[0]}")
    with bar("logprobs", len(store)) as advance:
        rows = response_rows(model, store, micro_tokens=options.micro_tokens, device=device, progress=advance)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.output == "-":
        sys.stdout.write(text)
    else:
        atomic_write(Path(str(options.output)), text)
        say(f"{len(rows)} responses -> {options.output}")
    return 0
