"""`preftune sft`: fine-tune a model on answers; `--preferred` on the preferred answers of preference data (Preferred-FT).

The loss is the mean cross-entropy over the trained tokens of a step: only the answers' tokens, never the prompt's.
What happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from dataclasses import replace

from .. import pipeline
from ..config import Sft
from ..errors import DataError
from ..intake import Seen
from ..objectives import Objective, supervised
from ..records import Record, Response


def run(options: Sft) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: Sft) -> Objective:
    """Cross-entropy over tokens."""
    return supervised()


def select(record: Record, options: Sft) -> Record | None:
    """What to imitate: all responses of data without judgements; with --preferred those of the best tier."""
    if not options.preferred:
        return record
    good = preferred(record) if record.judgements or record.labels is not None else ()
    return replace(record, responses=good, judgements=(), labels=None) if good else None


def refuse(seen: Seen, options: Sft) -> None:
    """Raises DataError: judged data without --preferred (rejected answers would be imitated too), or --preferred without judgements."""
    if not options.preferred and seen.judged:
        raise DataError(f"{seen.judged} of {seen.read} records say which answer is better (the first: {seen.first_judged}); "
                        "--preferred imitates the preferred answers only")  # fmt: skip
    if options.preferred and not seen.kept:
        raise DataError("--preferred: no record says which answer is preferred; without it all answers are imitated")


def preferred(record: Record) -> tuple[Response, ...]:
    """The desirable responses, or those in the best tier of some judgement, each once, in their order."""
    if record.labels is not None:
        return tuple(r for r, label in zip(record.responses, record.labels, strict=True) if label is True)
    best = {i for judgement in record.judgements for i in judgement.order[0]}
    return tuple(r for i, r in enumerate(record.responses) if i in best)


TASK = pipeline.Task("sft", Sft, objective, select, lambda folder: f"preftune dpo --model {folder} --data PAIRS --output RUN",
                     refuse=refuse)  # fmt: skip
