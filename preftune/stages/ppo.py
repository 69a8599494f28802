"""`preftune ppo`: reinforcement from a reward: PPO with a value model, RLOO, or GRPO's groups.

Of the data only prompts are read. Each round samples answers from the policy as it stands, scores them, and takes the steps of
`rollouts` on them. What else happens, and what is written, is `pipeline`'s.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import models, pipeline, rollouts
from ..config import Ppo, kl_place
from ..errors import UsageError
from ..readout import Learner, Value, packs, scalar_head, with_value
from ..rewards import same_ids

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


def learner(setup: pipeline.Setup, options: Ppo) -> Learner:
    """The policy, and with --advantage gae its value model. Raises UsageError for a reward that no value model can begin as."""
    if options.advantage != "gae":
        return Learner(setup.model, None)
    if options.value == "reward":
        return Learner(setup.model, as_reward(setup, options).to(setup.device))
    return with_value(setup.model, options.value, device=setup.device)


def as_reward(setup: pipeline.Setup, options: Ppo) -> Value:
    """A value model that begins as the reward model. Raises UsageError where that is not one model which reads the policy's ids."""
    assert setup.reward is not None, "ppo has one"
    first, *others = setup.reward.members
    size = np.diff(setup.store.start)[setup.store.record_start[setup.train]]
    longest, why = int(size.max()) + options.sample_tokens, ""
    if others:
        why = f"is an ensemble of {len(others) + 1}, and a value model is one model: name a member, such as model:FOLDER/member-1"
    elif first.model is None or first.codec is None:
        why = "is no reward model"
    elif scalar_head(first.model).out_features > 1:
        why = "has an output for each class, and a value is one number"
    elif not same_ids(first.codec, setup.codec):
        why = "does not read the policy's ids: its tokeniser, template or BOS is another"
    elif packs(setup.model) and not packs(first.model):
        why = "cannot read a prompt once for its answers, as the policy does"
    elif first.window and longest > first.window:
        why = f"has {first.window} positions, and a prompt with its answer may have {longest} tokens"
    if why:
        raise UsageError(f"--value reward: {options.reward} {why}; --value head or copy asks for nothing")
    value = Value.begun(first.model, shift=first.shift, scale=first.scale)
    if options.gradient_checkpointing:
        models.checkpoint_layers(value.decoder)
    return value


def make(options: Ppo) -> rollouts.Make:
    """How a round is made."""
    credit = rollouts.Credit(
        options.advantage, in_reward=kl_place(options) == "reward", reference=options.beta > 0, target=options.kl_target,
        horizon=options.kl_horizon, normalise=options.normalise_rewards, whiten=options.whiten, discount=options.discount,
        lam=options.lam, cap=options.importance_cap)  # fmt: skip
    return partial(rollouts.credited, credit)


def kept(options: Ppo) -> rollouts.Kept:
    """What rounds carry on, before the first."""
    return rollouts.Kept(beta=options.beta)


TASK = pipeline.Task(
    "ppo", Ppo, objective, pipeline.prompt_alone, lambda folder: f"preftune chat {folder}",
    rolls=pipeline.Rolls(lambda options: options.k or ANSWERS[options.advantage], kept, make), learner=learner,
    factor=lambda name, options: options.value_lr if name.startswith("value.") else 1.0)  # fmt: skip
