"""`preftune dpo`: a model and preferences in, a better model and the evidence that it is better out.

The whole offline family: `--loss` picks. What happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .. import pipeline, report
from ..config import Dpo, learns_value, loss_terms
from ..objectives import Objective, preference
from ..readout import with_value
from ..records import Record


def run(options: Dpo) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: Dpo) -> Objective:
    """The losses that the options name, with their arguments."""
    return preference(loss_terms(options), label_smoothing=options.label_smoothing)


def select(record: Record, options: Dpo) -> Record:
    """Every record: those without a judgement are counted once the loss has said what it reads."""
    return record


def moving(options: Dpo) -> tuple[float, int] | None:
    """TR-DPO: share of the policy in each update of the reference, and the steps between updates; None where it stands still."""
    alpha = {"none": None, "soft": options.reference_alpha, "hard": 1.0}[options.reference_update]
    return None if alpha is None else (alpha, options.reference_every)


def learner(setup: pipeline.Setup, options: Dpo) -> Any:
    """The policy, beside a value model where the loss learns one."""
    return with_value(setup.model, options.value, device=setup.device) if learns_value(options) else setup.model


def then(folder: Path) -> str:
    """What to do next: compare it with what it began from, by the reward that watched it; where nothing was sampled, talk to it."""
    run = report.read_run(folder)
    if not run.samples:
        return f"preftune chat {shlex.quote(str(folder))}"
    words = ["preftune", "compare", str(folder), *(("--reward", str(by)) if (by := run.options.get("eval_reward")) else ())]
    return shlex.join([*words, "--output", f"{folder}-compared"])


TASK = pipeline.Task("dpo", Dpo, objective, select, then, moving, learner=learner,
                     factor=lambda name, options: options.value_lr if name.startswith("value.") else 1.0)  # fmt: skip
