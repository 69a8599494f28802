"""`preftune online`: pairs of the policy's own answers, judged by a reward while it learns; any loss of the table on them.

Each round samples answers from the policy as it stands, scores them, and takes steps on a pair of each prompt's. The reference is the
model as it was given, or follows by --reference-update; KL is always reported to the former. XPO is `--k 1 --optimism 1e-5`.
What else happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from .. import pipeline, rollouts
from ..batches import Table
from ..config import OnlineDpo, loss_terms
from ..errors import UsageError
from ..objectives import Columns, Objective, Terms, preference
from ..records import Record


def run(options: OnlineDpo) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: OnlineDpo) -> Objective:
    """The losses that the options name, and XPO's term. Raises UsageError for a loss that online pairs cannot feed."""
    found = preference(loss_terms(options), label_smoothing=options.label_smoothing)
    if found.mismatched or (options.optimism and found.reads != "pairs"):
        raise UsageError(f"--loss {options.loss} does not learn from pairs alone: online takes losses over pairs, such as sigmoid")
    return optimistic(found, options.optimism) if options.optimism else found


def optimistic(base: Objective, weight: float) -> Objective:
    """XPO: the loss and weight times log pi(y) of each prompt's answer from the reference, which is to become less likely.
    arXiv:2405.21046, algorithm 1. The reference's answers are those with a verdict."""

    def terms(columns: Columns, table: Table, carry: Mapping[str, float] | None = None) -> Terms:
        return {**base.terms(columns, table, carry), "optimism": (weight * columns.policy[table.verdict].sum(), "verdicts")}

    return replace(base, terms=terms, name=f"{base.name}+{weight:g}*optimism", start=None)


def select(record: Record, options: OnlineDpo) -> Record:
    """Its prompt."""
    return Record(record.prompt, (), where=record.where)


def moving(options: OnlineDpo) -> tuple[float, int] | None:
    """Share of the policy in each update of the training reference, and the steps between updates; None where it stands still."""
    alpha = {"none": None, "soft": options.reference_alpha, "hard": 1.0}[options.reference_update]
    return None if alpha is None else (alpha, options.reference_every)


def make(options: OnlineDpo) -> rollouts.Make:
    """How a round is made."""
    needed = objective(options).reference != "none"
    return partial(rollouts.paired, best_worst=options.pairs == "best-worst", reference=needed, optimism=options.optimism > 0)


def rounds(count: int, options: OnlineDpo) -> rollouts.Rounds:
    """Which prompts make which step."""
    size = options.rollout_prompts or options.batch_size
    return rollouts.Rounds(count, size, options.batch_size, options.passes, options.epochs, options.seed)


TASK = pipeline.Task(
    "online", OnlineDpo, objective, select, lambda folder: f"preftune chat {folder}", moving,
    rolls=pipeline.Rolls(rounds, lambda options: options.k or 2, lambda options: rollouts.Kept(), make))  # fmt: skip
