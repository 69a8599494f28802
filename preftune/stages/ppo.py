"""`preftune ppo`: reinforcement from a reward: PPO with a value model, RLOO, or GRPO's groups.

Of the data only prompts are read. Each round samples answers from the policy as it stands, scores them, and takes the steps of
`rollouts` on them. What else happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from functools import partial

from .. import pipeline, rollouts
from ..config import Ppo, kl_place
from ..readout import Learner, with_value
from ..records import Record

ANSWERS = {"gae": 1, "rloo": 4, "group": 4}  # per prompt, where --k does not say


def run(options: Ppo) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    return pipeline.run(TASK, options)


def objective(options: Ppo) -> rollouts.Surrogate:
    """The clipped objective."""
    return rollouts.Surrogate(
        {"gae": "ppo", "rloo": "rloo", "group": "grpo"}[options.advantage], whole=options.advantage == "rloo",
        clip_ratio=options.clip_ratio, clip_value=options.clip_value, value_weight=options.value_weight, kl=kl_place(options),
        beta=options.beta, temperature=options.temperature)  # fmt: skip


def select(record: Record, options: Ppo) -> Record:
    """Its prompt."""
    return Record(record.prompt, (), where=record.where)


def learner(setup: pipeline.Setup, options: Ppo) -> Learner:
    """The policy, and with --advantage gae its value model."""
    return with_value(setup.model, options.value, device=setup.device) if options.advantage == "gae" else Learner(setup.model, None)


def make(options: Ppo) -> rollouts.Make:
    """How a round is made."""
    credit = rollouts.Credit(
        options.advantage, in_reward=kl_place(options) == "reward", reference=options.beta > 0, target=options.kl_target,
        horizon=options.kl_horizon, normalise=options.normalise_rewards, whiten=options.whiten, discount=options.discount,
        lam=options.lam)  # fmt: skip
    return partial(rollouts.credited, credit)


def kept(options: Ppo) -> rollouts.Kept:
    """What rounds carry on, before the first."""
    return rollouts.Kept(beta=options.beta)


def rounds(count: int, options: Ppo) -> rollouts.Rounds:
    """Which prompts make which step."""
    size = options.rollout_prompts or options.batch_size
    return rollouts.Rounds(count, size, options.batch_size, options.passes, options.epochs, options.seed)


TASK = pipeline.Task(
    "ppo", Ppo, objective, select, lambda folder: f"preftune chat {folder}",
    rolls=pipeline.Rolls(rounds, lambda options: options.k or ANSWERS[options.advantage], kept, make), learner=learner,
    factor=lambda name, options: options.value_lr if name.startswith("value.") else 1.0)  # fmt: skip
