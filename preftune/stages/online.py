"""`preftune online`: pairs of the policy's own answers, judged by a reward while it learns; any loss of the table on them.

Each round samples answers from the policy as it stands, scores them, and takes steps on a pair of each prompt's. The reference is the
model as it was given, or follows by --reference-update; KL is always reported to the former. XPO is `--k 1 --loss sigmoid+1e-5*optimism`.
What else happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from functools import partial

from .. import pipeline, rollouts
from ..config import OnlineDpo, loss_terms, reads_draws
from ..errors import UsageError
from ..objectives import Objective, preference


def run(options: OnlineDpo) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: OnlineDpo) -> Objective:
    """The losses that the options name. Raises UsageError for one that pairs of a round, and a sample of the reference, cannot feed."""
    found = preference(loss_terms(options), label_smoothing=options.label_smoothing)
    if found.mismatched or found.reads not in ("pairs", "lists", "scores") or "values" in found.also or {"member", "value"} & found.needs:
        raise UsageError(f"--loss {options.loss} does not learn from pairs alone: online takes losses over pairs, such as sigmoid")
    if reads_draws(options) and options.temperature != 1:
        raise UsageError(f"--loss {options.loss} reads samples of the reference itself: it needs --temperature 1")
    return found


def moving(options: OnlineDpo) -> tuple[float, int] | None:
    """Share of the policy in each update of the training reference, and the steps between updates; None where it stands still."""
    alpha = {"none": None, "soft": options.reference_alpha, "hard": 1.0}[options.reference_update]
    return None if alpha is None else (alpha, options.reference_every)


def make(options: OnlineDpo) -> rollouts.Make:
    """How a round is made."""
    needed = objective(options).reference != "none"
    return partial(rollouts.paired, best_worst=options.pairs == "best-worst", reference=needed, drawn=reads_draws(options))


TASK = pipeline.Task(
    "online", OnlineDpo, objective, pipeline.prompt_alone, lambda folder: f"preftune chat {folder}", moving,
    rolls=pipeline.Rolls(lambda options: options.k or 2, lambda options: rollouts.Kept(), make))  # fmt: skip
