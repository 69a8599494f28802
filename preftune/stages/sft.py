"""`preftune sft`: fine-tune a model on answers; `--preferred` on the preferred answers of preference data (Preferred-FT).

The loss is the mean cross-entropy over the trained tokens of a step: only the answers' tokens, never the prompt's.
What happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from dataclasses import replace

from .. import pipeline
from ..config import Sft
from ..errors import DataError
from ..objectives import Objective, supervised
from ..records import Record, Response


def run(options: Sft) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: Sft) -> Objective:
    """Cross-entropy over tokens."""
    return supervised()


def select(records: list[Record], options: Sft) -> list[Record]:
    """What to imitate: all responses of data without judgements; with --preferred those of the best tier.

    Raises:
        DataError: judged data without --preferred (rejected answers would be imitated too), or --preferred without judgements.
    """
    judged = [r for r in records if r.judgements or r.labels is not None]
    if not options.preferred:
        if judged:
            raise DataError(f"{len(judged)} of {len(records)} records say which answer is better (the first: {judged[0].where}); "
                            "--preferred imitates the preferred answers only")  # fmt: skip
        return records
    kept = [replace(r, responses=good, judgements=(), labels=None) for r in judged if (good := preferred(r))]
    if not kept:
        raise DataError("--preferred: no record says which answer is preferred; without it all answers are imitated")
    return kept


def preferred(record: Record) -> tuple[Response, ...]:
    """The desirable responses, or those in the best tier of some judgement, each once, in their order."""
    if record.labels is not None:
        return tuple(r for r, label in zip(record.responses, record.labels, strict=True) if label)
    best = {i for judgement in record.judgements for i in judgement.order[0]}
    return tuple(r for i, r in enumerate(record.responses) if i in best)


TASK = pipeline.Task("sft", Sft, objective, select, lambda folder: f"preftune dpo --model {folder} --data PAIRS --output RUN")
