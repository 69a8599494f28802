"""Every option of every verb: frozen dataclasses whose fields are the command line, the YAML file and the documentation.

A field's metadata is its `--help` text, group, bounds and choices. `cli` builds the parser from these; a run writes its resolved
copy (`resolved_yaml`) to `config.yaml`. Values only: no code, no tags, no URLs, no environment. Numbers are checked when the object
is made; contradictions and missing options when a command line is read (`build`). Touches the YAML file, the text of losses/*.py and
nothing heavy.

    >>> parse_loss("sigmoid+0.1*nll")
    [(1.0, 'sigmoid'), (0.1, 'nll')]
    >>> Dpo(beta=-1)
    Traceback (most recent call last):
    preftune.errors.UsageError: beta must be a number above 0, not -1
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

import yaml

from .errors import DataError, ModelError, UsageError, nearest

DEVICE = (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")
REWARD = (r"lexicon:.+|python:.+\.py:[^\W\d]\w*|model:.+|implicit:.+@.+", "lexicon:FILE or python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE")
SCORER = (rf"{REWARD[0]}|judge:https?://.+#.+", f"{REWARD[1]}, or judge:http://HOST:PORT/v1#NAME")
ENDPOINT = (r"endpoint:https?://.+#.+", "endpoint:http://HOST:PORT/v1#NAME")
ANCHOR = (r".+=[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", "NAME=VALUE, such as gpt-2=1000")
# What a resumed run compares with its beginning, and --allow-change lets pass.
CHANGES = ("data", "tokeniser", "template", "base", "reference", "reward", "config", "threads", "device", "versions")
GROUPS = {
    "main": "options", "data": "data and tokens", "training": "training", "evidence": "evidence while training",
    "keeping": "what is kept", "endpoint": "a model behind an endpoint", "machine": "machine and network",
}  # fmt: skip


def option(default: Any, text: str, *, group: str = "main", choices: tuple[str, ...] | None = None, low: float | None = None,
           high: float | None = None, open_low: bool = False, open_high: bool = False, shows: str | None = None, required: bool = False,
           positional: bool = False, reads: str | None = None, pattern: tuple[str, str] | None = None) -> Any:  # fmt: skip
    """A dataclass field that carries its own documentation and bounds (inclusive unless `open_*`).

    Args:
        choices: the only texts; for a `float | str` field the words allowed beside numbers.
        shows: what `--help` calls the value. positional: may also stand without its flag.
        reads: 'data' for files that must be there, 'model' for a folder or a hub name, 'speaker' for those or an endpoint, 'endpoint' for
            a text that may name one. pattern: (regular expression, what it asks for).
    """
    meta = {"help": text, "group": group, "choices": choices, "low": low, "high": high, "open_low": open_low, "open_high": open_high,
            "shows": shows, "required": required, "positional": positional, "reads": reads, "pattern": pattern}  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=meta)
    return field(default=default, metadata=meta)


class Options:
    """What all options share: a value of the wrong type or out of bounds makes no object. EXAMPLE is a command that works."""

    EXAMPLE = ""

    def __post_init__(self) -> None:
        for spec in specs(type(self)):
            check(spec, getattr(self, spec.name), spec.name)


@dataclass(frozen=True, kw_only=True)
class Online(Options):
    """Whether a verb may use the network."""

    offline: bool = option(False, "never touch the network", group="machine")


@dataclass(frozen=True, kw_only=True)
class Machine(Online):
    """Where a verb runs."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="machine", shows="DEVICE", pattern=DEVICE)


@dataclass(frozen=True, kw_only=True)
class Wording(Options):
    """How text becomes tokens."""

    bos: str = option("auto", "put BOS before the prompt; auto: where the tokeniser has one that is not its EOS", group="data", choices=("auto", "always", "never"))
    template: str = option("auto", "chat template for messages: auto (the tokeniser's, else plain), plain, or a Jinja file", group="data")
    control_tokens: str = option("refuse", "text that spells a control token: refuse the record, or split the spelling into ordinary tokens", group="data", choices=("refuse", "split"))


@dataclass(frozen=True, kw_only=True)
class Texts(Wording, Machine):
    """A verb that runs a model on text."""


@dataclass(frozen=True, kw_only=True)
class Computing(Texts):
    """How a pass over many records is computed."""

    max_records: int | None = option(None, "read at most this many records", group="data", low=1)
    dtype: str = option("fp32", "number format of the forward pass; when training, bf16 keeps an fp32 master copy", group="machine", choices=("fp32", "bf16"))
    threads: int | None = option(None, "CPU threads. Default: 1 for models under a million parameters, else all cores", group="machine", low=1)


@dataclass(frozen=True, kw_only=True)
class Asking(Options):
    """How a model behind an OpenAI-compatible endpoint is asked."""

    concurrency: int = option(8, "requests at a time", group="endpoint", low=1)
    retries: int = option(5, "how often a request that failed is sent again, after longer and longer waits", group="endpoint", low=0)
    timeout: float = option(120.0, "seconds for one answer", group="endpoint", low=0, open_low=True)
    key_variable: str | None = option(None, "environment variable that holds the API key; its value is written nowhere", group="endpoint", shows="NAME", pattern=(r"[A-Za-z_]\w*", "the name of an environment variable, never the key itself"))
    price_in: float = option(0.0, "price of a million tokens read, in any currency", group="endpoint", low=0)
    price_out: float = option(0.0, "price of a million tokens written", group="endpoint", low=0)


@dataclass(frozen=True, kw_only=True)
class Judged(Computing):
    """How preference files are read and packed."""

    format: str = option("auto", "layout of the data; auto detects it", group="data")
    finish: str = option("auto", "whether a response ends with EOS where the data does not say", group="data", choices=("auto", "always", "never"))
    max_length: int | None = option(None, "longest record in tokens; longer ones are left out and counted. Default: the model's window", group="data", low=2)
    skip_bad: bool = option(False, "count and list unusable rows instead of stopping", group="data")
    micro_tokens: int = option(8192, "tokens in one forward pass; cuts a step, never changes it", group="machine", low=1)


@dataclass(frozen=True, kw_only=True)
class Fitting(Judged):
    """What every verb that trains on files takes."""

    model: str | None = option(None, "model folder, run folder or hub name", required=True, reads="model")
    data: list[str] = option([], "preference file(s): JSONL or JSON, plain or gzip; any known layout", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "run folder to make; must be empty or absent", shows="FOLDER", required=True)
    lr: float | str = option("auto", "peak learning rate, or 'auto': from the table in docs/learning-rate.md", low=0, open_low=True, choices=("auto",))
    epochs: float = option(1.0, "passes over the training records", low=0, open_low=True)
    batch_size: int = option(32, "records per optimiser step", low=1)
    seed: int = option(0, "seed of order, split, initialisation and sampling", low=0)
    resume: str | None = option(None, "continue this run folder; needs nothing else (docs/resume.md)", shows="RUN")
    # data
    eval_data: list[str] = option([], "held-out preference file(s) instead of a split", group="data", shows="FILE", reads="data")
    holdout: float = option(0.1, "share of prompts held out when no --eval-data is given", group="data", low=0, high=0.9)
    from_scores: str | None = option(None, "make judgements of scores where nothing else is judged: best-worst, or all pairs of unequal scores", group="data", choices=("best-worst", "all"))
    allow: list[str] = option([], "train although the audit found these: equal, contradicting, leak", group="data", choices=("equal", "contradicting", "leak"))
    # training
    lora: int = option(0, "LoRA rank; 0 trains all weights", group="training", low=0, shows="RANK")
    lora_alpha: float | None = option(None, "LoRA scale numerator. Default: twice the rank", group="training", low=0, open_low=True)
    freeze: str | None = option(None, "do not train these: embed, head, layers.0-11, or beginnings or patterns of weight names, with commas", group="training", shows="NAMES")
    lora_targets: str = option("all-linear", "modules that get LoRA: all-linear or comma-separated name endings", group="training", shows="NAMES")
    max_steps: int | None = option(None, "stop after this many optimiser steps", group="training", low=1)
    patience: int | None = option(None, "stop after this many evaluations without a lower held-out loss", group="training", low=1)
    min_improvement: float = option(0.0, "what the held-out loss must fall by to count for --patience", group="training", low=0)
    schedule: str = option("linear", "learning rate after warm-up", group="training", choices=("linear", "cosine", "constant"))
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", group="training", low=0, high=1)
    optimiser: str = option("adamw", "adamw, rmsprop (as in the DPO paper), or adamw-8bit (needs the extra [8bit])", group="training", choices=("adamw", "rmsprop", "adamw-8bit"))
    weight_decay: float = option(0.0, "AdamW weight decay", group="training", low=0)
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of gradients", group="training", low=0, high=1, open_high=True)
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients", group="training", low=0, high=1, open_high=True)
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", group="training", low=0)
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass: less memory, more time", group="training")
    attention: str = option("auto", "how answers attend to their shared prompt: auto, or flex: FlexAttention, compiled, on CUDA only (docs/speed.md)", group="machine", choices=("auto", "flex"))
    auto_micro: bool = option(False, "take a step that runs out of memory again in passes of half the size, and all later ones so; the loss is the same", group="machine")
    # evidence
    eval_every: int | None = option(None, "steps between evaluations. Default: ten evaluations a run, twenty with --stop plateau", group="evidence", low=1)
    # keeping
    save_every: int | None = option(None, "steps between checkpoints. Default: at every evaluation", group="keeping", low=1)
    keep: int = option(2, "checkpoints kept", group="keeping", low=1)
    publish: str | None = option(None, "which weights become model/: of the lowest held-out loss, of the highest sampled reward within --kl-limit, or of the last step. Default: reward with --stop plateau, best with --patience, else last", group="keeping", choices=("best", "reward", "last"))
    track: list[str] = option([], "also send metrics to these: tensorboard, trackio, wandb (the extra [track])", group="keeping", choices=("tensorboard", "trackio", "wandb"), shows="NAME")
    allow_change: list[str] = option([], f"with --resume: go on although these changed since: {', '.join(CHANGES)}", group="keeping", choices=CHANGES, shows="WHAT")
    report: bool = option(True, "write report.html at the end", group="keeping")


@dataclass(frozen=True, kw_only=True)
class Training(Fitting):
    """What every verb that trains a policy takes: one that is sampled from, and may be an adapter that goes on."""

    adapter: str = option("merge", "an adapter given as --model: merge it into its base (and train all weights, or a new adapter with --lora), or continue training it", group="training", choices=("merge", "continue"))
    stop: str | None = option(None, "plateau: stop once the sampled reward is shown to be flat (docs/monitors.md); needs --eval-reward", group="training", choices=("plateau",))
    plateau_window: int = option(6, "evaluations that --stop plateau looks at, the start not among them", group="training", low=4)
    plateau_band: float | None = option(None, "change of the mean reward over that window which counts as none. Default: 0.2 standard deviations of one answer's reward", group="training", low=0, open_low=True)
    kl_limit: float | None = option(None, "KL to the reference, in nats, above which no evaluation is kept by --stop plateau or --publish reward. Default: 0.05 per token", group="training", low=0, open_low=True)
    kl_unit: str = option("token", "whether --kl-limit is per token or per answer (sequence)", group="training", choices=("token", "sequence"))
    eval_reward: str | None = option(None, "score policy samples while training: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE (docs/reward.md)", group="evidence", shows="REWARD", pattern=REWARD)
    eval_truth: str | None = option(None, "a second reward, for which --eval-reward is only a proxy: told beside it, watched by --stop plateau, compared for over-optimisation", group="evidence", shows="REWARD", pattern=REWARD)
    eval_prompts: int = option(64, "held-out prompts to sample from", group="evidence", low=0)
    sample_tokens: int = option(64, "longest sampled response in tokens", group="evidence", low=1)
    eval_samples: int = option(1, "samples per prompt", group="evidence", low=1)


@dataclass(frozen=True, kw_only=True)
class Losses(Training):
    """What a verb takes that minimises a loss of the table against a reference."""

    loss: str = option("sigmoid", "a loss, or a weighted sum such as sigmoid+0.1*nll; 'preftune dpo --help-losses' lists them")
    beta: float | None = option(None, "KL weight: multiplies the log-ratio; short for --loss.beta. Default: the loss's own", low=0, open_low=True)
    loss_arguments: dict[str, float] = option({}, "arguments of the loss, such as --loss.gamma 0.5; an argument that it does not take is an error", group="training")
    reference_update: str = option("none", "a reference that follows the policy (TR-DPO): soft mixes the policy in, hard puts it in its place", group="training", choices=("none", "soft", "hard"))
    reference_alpha: float = option(0.6, "share of the policy in a soft update: ref <- alpha policy + (1 - alpha) ref", group="training", low=0, high=1, open_low=True)
    reference_every: int = option(512, "steps between updates of a moving reference", group="training", low=1)
    label_smoothing: float = option(0.0, "e: labels become (1-e) p + e (1-p) (cDPO)", group="training", low=0, high=0.5, open_high=True)


@dataclass(frozen=True, kw_only=True)
class Dpo(Losses):
    """Tune a model on preferences: the whole offline family; --loss picks."""

    EXAMPLE = "preftune dpo --model MODEL --data pairs.jsonl --output runs/first"
    value: str = option("head", "where a loss learns V (value-learned): by a head on the policy's states, which do not learn from it; or by a copy of the policy with a head", group="training", choices=("head", "copy"))
    value_lr: float = option(10.0, "learning rate of the value model, in learning rates of the policy", group="training", low=0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """Fine-tune a model on answers; with --preferred on the preferred answers of preference data."""

    EXAMPLE = "preftune sft --model MODEL --data pairs.jsonl --preferred --output runs/sft"
    preferred: bool = option(False, "train on the answers that judgements or labels prefer, not on all (Preferred-FT)", group="data")


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Training):
    """What a verb takes whose answers are the policy's own, scored by a reward. Of the data only prompts are read."""

    reward: str | None = option(None, "what scores the answers: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE (docs/reward.md)", shows="REWARD", required=True, pattern=REWARD)
    k: int | None = option(None, "answers per prompt. Default: 2; 1 for --advantage gae, 4 for rloo and group", low=1)
    rollout_prompts: int | None = option(None, "prompts that are sampled from before the policy moves. Default: --batch-size", group="training", low=1)
    passes: int = option(1, "passes over the answers of a round", group="training", low=1)
    temperature: float = option(1.0, "divides the logits when sampling, and wherever log-probs of these samples are read", group="training", low=0, open_low=True)
    eos_penalty: float = option(0.0, "what an answer loses of its reward that reached --sample-tokens without an end", group="training", low=0)


@dataclass(frozen=True, kw_only=True)
class Ppo(OnPolicy):
    """Tune a model by reinforcement from a reward, held near its start by KL: PPO, RLOO or GRPO."""

    EXAMPLE = "preftune ppo --model MODEL --data prompts.txt --reward python:judge.py:judge --output runs/ppo"
    beta: float = option(0.05, "KL weight, to begin with where --kl-target is given", low=0)
    advantage: str = option("gae", "gae: a value model and per-token advantages (PPO); rloo: against the prompt's other answers; group: the same over their spread (GRPO)", choices=("gae", "rloo", "group"))
    passes: int = option(4, "passes over the answers of a round", group="training", low=1)
    kl: str | None = option(None, "where KL stands: in the reward, or as a loss per token (k2, k3). Default: reward; k3 for --advantage group", group="training", choices=("reward", "k2", "k3"))
    kl_target: float | None = option(None, "nats per answer that --beta is steered to hold. Default: --beta stays", group="training", low=0, open_low=True)
    kl_horizon: int = option(10000, "answers over which a steered --beta may change by a fifth", group="training", low=1)
    clip_ratio: float = option(0.2, "how far the ratio to the sampling policy may go before a token or answer stops counting", group="training", low=0, high=1, open_low=True)
    importance_cap: float = option(2.0, "an answer counts by how much likelier it is where log-probs are read than where it was sampled, at most this; 0: every answer counts alike", group="training", low=0)
    normalise_rewards: bool = option(False, "rewards less their running mean, over their running standard deviation", group="training")
    whiten: bool = option(True, "advantages to mean 0 and variance 1 over a round (gae)", group="training")
    discount: float = option(1.0, "gamma of gae", group="training", low=0, high=1, open_low=True)
    lam: float = option(0.95, "lambda of gae: 1 trusts rewards alone, 0 the value alone", group="training", low=0, high=1)
    value: str = option("head", "value model: a head on the policy's states, which do not learn from it; a copy of the policy with a head; or a copy of the reward model, which begins with what that says of unfinished answers", group="training", choices=("head", "copy", "reward"))
    value_weight: float = option(0.1, "weight of the value loss", group="training", low=0, open_low=True)
    value_lr: float = option(1.0, "learning rate of the value model, in learning rates of the policy", group="training", low=0, open_low=True)
    clip_value: float = option(0.2, "how far a value may move in a round before its loss stops falling", group="training", low=0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class OnlineDpo(Losses, OnPolicy):
    """Tune a model on pairs of its own answers, judged by a reward while it learns: online DPO and any other pair loss."""

    EXAMPLE = "preftune online --model MODEL --data prompts.txt --reward python:judge.py:judge --output runs/online"
    pairs: str = option("best-worst", "which answers of a prompt make its pair: the best and the worst, or two at random", group="training", choices=("best-worst", "random"))


@dataclass(frozen=True, kw_only=True)
class Reward(Fitting):
    """Train a reward model: a score for every answer, from preferences, labels or scores. It rewards other verbs: model:RUN."""

    EXAMPLE = "preftune reward --model MODEL --data pairs.jsonl --output runs/reward"
    target: str = option("preferences", "what it learns from: preferences (judgements), labels (answers, or their steps, that are good or bad), scores (of single answers), or classes (labels that name one)", choices=("preferences", "labels", "scores", "classes"))
    classes: list[str] = option([], "the classes of --target classes; the last is the wanted one, whose log-odds are the score", shows="NAME")
    loss: str | None = option(None, "a loss, or a weighted sum such as bradley-terry+0.01*centre; 'preftune reward --help-losses' lists them. Default: bradley-terry; of labels binary, of scores grades, of classes nominal")
    members: int = option(1, "train an ensemble: each member with a head, an order and a resample of the prompts of its own", low=1)
    loss_arguments: dict[str, float] = option({}, "arguments of the loss, such as --loss.margin 0.5; an argument that it does not take is an error", group="training")
    label_smoothing: float = option(0.0, "e: labels become (1-e) p + e (1-p)", group="training", low=0, high=0.5, open_high=True)
    member: int = option(0, "be this member of an ensemble: decides head, order and the resample of the prompts; 0: all prompts as they are", group="training", low=0)
    average: bool = option(False, "also write the average of the members' weights as a model (WARM)", group="keeping")
    normalise: str | None = option(None, "what becomes of scores when the model is used: mean (of the training answers) to 0, std also divides by their deviation, none. Default: mean for preferences, else none", group="keeping", choices=("mean", "std", "none"))
    by: str | None = option(None, "also tell held-out accuracy by this column of the data", group="evidence", shows="COLUMN")


@dataclass(frozen=True, kw_only=True)
class Logprobs(Judged):
    """Log-probabilities of the responses in a data file, one line per response."""

    EXAMPLE = "preftune logprobs --model MODEL --data pairs.jsonl --output logprobs.jsonl"
    model: str | None = option(None, "model folder, run folder or hub name", required=True, reads="model")
    data: list[str] = option([], "file(s) with prompts and responses; any known layout", shows="FILE", required=True, reads="data")
    output: str = option("-", "JSONL file to write, or - for the screen", shows="FILE.jsonl")


@dataclass(frozen=True, kw_only=True)
class Sample(Computing, Asking):
    """Responses of a model to prompts, as canonical records. The same command goes on where a stopped one was."""

    EXAMPLE = "preftune sample --model MODEL --data prompts.txt --output samples.jsonl"
    model: str | None = option(None, "model folder, run folder or hub name, or endpoint:http://HOST:PORT/v1#NAME", required=True, reads="speaker")
    data: list[str] = option([], "prompts: one per line (.txt), JSONL with \"prompt\", or any known layout", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "JSONL file to write", shows="FILE.jsonl", required=True)
    k: int = option(1, "samples per prompt", low=1)
    sample_tokens: int = option(256, "longest response in tokens", low=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", low=0)
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this much probability; 1: among all", low=0, high=1, open_low=True)
    seed: int = option(0, "seed of the sampling", low=0)
    batch_size: int = option(16, "rows at once", low=1)
    reference: str | None = option(None, "also estimate each sample's KL from this model (Rao-Blackwell)", shows="MODEL", reads="model")
    reward: str | None = option(None, "score the samples: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE (docs/reward.md)", shows="REWARD", pattern=REWARD)
    dry_run: bool = option(False, "say what would be done, and do nothing")
    api: str = option("auto", "how prompts are put: chat, completions, or auto: messages as chat, text as completions", group="endpoint", choices=("auto", "chat", "completions"))
    skip_bad: bool = option(False, "leave out and count responses that the endpoint does not give, instead of keeping the file open for them", group="endpoint")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Judged):
    """Held-out accuracy, loss, calibration, KL, length, repetition of one model, each with its interval."""

    EXAMPLE = "preftune evaluate --model runs/first --data held-out.jsonl --output results.json"
    model: str | None = option(None, "model folder, run folder or hub name", required=True, reads="model")
    data: list[str] = option([], "held-out preference file(s), each a column of the result; any known layout", shows="FILE", required=True, reads="data")
    reference: str | None = option(None, "what log-ratios and KL are to. Default: what the run that --model is began from", shows="MODEL", reads="model")
    loss: str | None = option(None, "a loss, or a weighted sum. Default: that of the run that --model is, else sigmoid")
    beta: float | None = option(None, "KL weight; short for --loss.beta. Default: the run's, else the loss's own", low=0, open_low=True)
    loss_arguments: dict[str, float] = option({}, "arguments of the loss, such as --loss.gamma 0.5", group="evidence")
    label_smoothing: float | None = option(None, "of the loss, as in training. Default: the run's, else 0", group="evidence", low=0, high=0.5, open_high=True)
    implicit: bool = option(False, "the model's log-ratio as a reward model, beside every --reward: accuracies and their paired differences")
    reward: list[str] = option([], "judge the pairs and the samples: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE (docs/reward.md)", shows="REWARD", pattern=REWARD)
    sample_prompts: int = option(64, "prompts of each file to sample from; 0: none", group="evidence", low=0)
    k: int = option(1, "samples per prompt", group="evidence", low=1)
    sample_tokens: int = option(64, "longest sampled response in tokens", group="evidence", low=1)
    seed: int = option(0, "seed of the sampling and of bootstraps", group="evidence", low=0)
    tokens: int = option(0, "what each token of the answers to the first prompts of each file adds to the implicit reward; how many prompts", group="evidence", low=0)
    output: str | None = option(None, "write everything as JSON", shows="FILE.json")
    page: str | None = option(None, "write a page", shows="FILE.html")


@dataclass(frozen=True, kw_only=True)
class Score(Machine, Asking):
    """A reward for every response of a file, or verdicts of a judge on every two. The same command goes on where a stopped one was."""

    EXAMPLE = "preftune score --data samples.jsonl --reward lexicon:words.txt --output scored.jsonl"
    data: list[str] = option([], "file(s) with prompts and responses; any known layout", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "JSONL file to write", shows="FILE.jsonl", required=True)
    reward: list[str] = option([], "who scores; several are put together by --combine: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER, implicit:POLICY@REFERENCE, judge:http://HOST:PORT/v1#NAME", shows="SPEC", reads="endpoint", pattern=SCORER)
    combine: str | None = option(None, "one number of several rewards", choices=("mean", "sum"))
    judge: str | None = option(None, "instead of scores: a model compares every two responses in both orders, a tie where the order changes the verdict", shows="endpoint:URL#NAME", reads="endpoint", pattern=ENDPOINT)
    question: str | None = option(None, "text file: what the judge is asked to look for. Default: helpful, correct, clear", shows="FILE.txt", reads="data")
    judge_tokens: int = option(512, "longest answer of a judge in tokens", group="endpoint", low=1)
    replace: bool = option(False, "put new scores or judgements in the place of those that are there")
    dry_run: bool = option(False, "say what would be done, and do nothing")
    format: str = option("auto", "layout of the data; auto detects it", group="data")
    skip_bad: bool = option(False, "count and list unusable rows, and verdicts that a judge does not give, instead of stopping", group="data")
    max_records: int | None = option(None, "read at most this many records", group="data", low=1)
    micro_tokens: int = option(8192, "tokens in one forward pass of a reward model", group="machine", low=1)
    dtype: str = option("fp32", "number format of a reward model's forward pass", group="machine", choices=("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class Pair(Online):
    """Scores into judgements: pairs, rankings, the best of n, rejection sampling, or pairs worth a person's time. Loads no model."""

    EXAMPLE = "preftune pair --data scored.jsonl --how best-worst --output pairs.jsonl"
    data: list[str] = option([], "scored records; any known layout", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "JSONL file to write", shows="FILE.jsonl", required=True)
    how: str = option("best-worst", "judgements: best-worst, best-random, all, ranking; responses kept as they are: best-of-n, rejection", choices=("best-worst", "best-random", "all", "ranking", "best-of-n", "rejection"))
    ask: int | None = option(None, "instead: so many pairs most worth a person's time, unjudged, the most doubtful first", low=1, shows="N")
    ask_by: str = option("margin", "doubt is a small difference of scores, or disagreement of the rewards that were combined", choices=("margin", "disagreement"))
    margin: float = option(0.0, "leave out pairs whose scores differ by less, or not at all", low=0)
    limit: int | None = option(None, "at most so many pairs (drawn by lot), or accepted responses (the first), of a prompt", low=1)
    soft: float | None = option(None, "soft labels: P(better) = sigmoid(difference of scores / SCALE). Default: hard labels", low=0, open_low=True, shows="SCALE")
    of: int | None = option(None, "best-of-n: of how many, in groups in the order drawn. Default: all responses of a prompt", low=2)
    beta: float | None = option(None, "rejection: the KL weight of the policy that is drawn from; accepted with probability exp((r - r_max) / beta)", low=0, open_low=True)
    r_max: float | str = option("prompt", "rejection: the largest reward there can be, or prompt: the largest of each prompt's samples", choices=("prompt",))
    reference: str | None = option(None, "rejection: the model whose samples these must be, known by its weights. Default: any one model", shows="MODEL", reads="model")
    replace: bool = option(False, "judge again what is judged already. Default: such records go through as they are, counted")
    seed: int = option(0, "seed of the lots", low=0)
    dry_run: bool = option(False, "count, and write nothing")
    format: str = option("auto", "layout of the data; auto detects it", group="data")
    skip_bad: bool = option(False, "count and list unusable rows instead of stopping", group="data")
    max_records: int | None = option(None, "read at most this many records", group="data", low=1)


@dataclass(frozen=True, kw_only=True)
class Compare(Computing, Asking):
    """Two models on the same prompts: which answers better, how sure that is, and every answer side by side."""

    EXAMPLE = "preftune compare runs/first MODEL --prompts prompts.txt --output compared"
    model: list[str] = option([], "two models A and B: folders, runs or hub names. One run alone is compared with what it began from", positional=True, reads="model")
    prompts: list[str] = option([], "prompts: one per line (.txt), JSONL with \"prompt\", or any known layout. Default: the held-out ones that run A sampled", shows="FILE", reads="data")
    answers: list[str] = option([], "two files of answers instead of models: JSON rows with instruction, output, generator", shows="FILE", reads="data")
    votes: list[str] = option([], "people or judges decide: records that compare answers of the two models, as 'chat --votes' and 'score --judge' write them", shows="FILE", reads="data")
    reward: str | None = option(None, "a reward decides: lexicon:FILE, python:FILE.py:FUNCTION, model:FOLDER or implicit:POLICY@REFERENCE (docs/reward.md)", shows="REWARD", pattern=REWARD)
    judge: str | None = option(None, "a model behind an endpoint decides, asked in both orders: a tie where the order changes the verdict. Needs --output", shows="endpoint:URL#NAME", reads="endpoint", pattern=ENDPOINT)
    question: str | None = option(None, "text file: what the judge is asked to look for. Default: helpful, correct, clear", group="endpoint", shows="FILE.txt", reads="data")
    judge_tokens: int = option(512, "longest answer of a judge in tokens", group="endpoint", low=1)
    skip_bad: bool = option(False, "do without the comparisons that the judge gives no verdict on", group="endpoint")
    margin: float = option(0.0, "rewards closer than this are a tie", low=0)
    k: int = option(1, "answers per prompt and model, compared one by one", low=1)
    sample_tokens: int | None = option(None, "longest answer in tokens. Default: what run A sampled with, else 256", low=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", low=0)
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this much probability; 1: among all", low=0, high=1, open_low=True)
    seed: int = option(0, "seed of the sampling, the same for both models, and of bootstraps", low=0)
    batch_size: int = option(64, "rows at once", group="machine", low=1)
    dry_run: bool = option(False, "say what would be done, and do nothing")
    output: str | None = option(None, "folder for answers, comparisons, results and the page; the same command goes on where a stopped one was", shows="FOLDER")


@dataclass(frozen=True, kw_only=True)
class Frontier(Machine):
    """Several methods, KL weights and seeds on one file, each judged by one reward: what is reached at which KL from the start."""

    EXAMPLE = "preftune frontier --model MODEL --data scored.jsonl --truth lexicon:words.txt --output runs/frontier"
    model: str | None = option(None, "the start of every method, and the reference: model folder, run folder or hub name", required=True, reads="model")
    data: list[str] = option([], "preference file(s) that every method trains on; scored for rejection and losses that read scores", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "folder to make; the same command goes on in it", shows="FOLDER", required=True)
    methods: list[str] = option(["preferred-ft", "best-of-n", "dpo"], "sft, preferred-ft, best-of-n, rejection, dpo, online, ppo, rloo, grpo, or any loss of dpo; NAME:BETA,BETA for KL weights of its own", shows="NAME")
    betas: list[str] = option(["0.05", "0.1", "0.3", "1"], "KL weights of the methods that have one", shows="BETA")
    seeds: int = option(3, "runs of every method and KL weight; more give narrower intervals", low=1)
    truth: str | None = option(None, "the reward that judges every policy. Default: --reward", shows="SPEC", pattern=REWARD)
    reward: str | None = option(None, "the reward that online, ppo, rloo, grpo and best-of-n go by", shows="SPEC", pattern=REWARD)
    set_: list[str] = option([], "options of the runs: METHOD.OPTION=VALUE, or OPTION=VALUE for all that have it", shows="SETTING")
    seed: int = option(0, "the first seed, and that of the split", low=0)
    dry_run: bool = option(False, "print the commands of all runs, and do nothing")
    holdout: float = option(0.1, "share of prompts held out to measure on", group="data", low=0, high=0.9, open_low=True)
    max_records: int | None = option(None, "read at most this many records", group="data", low=2)
    eval_prompts: int = option(64, "held-out prompts to sample from", group="evidence", low=2)
    eval_samples: int = option(4, "samples per prompt", group="evidence", low=1)
    sample_tokens: int = option(64, "longest sampled response in tokens", group="evidence", low=1)
    best_of: list[str] = option(["2", "4", "8", "16"], "n of best-of-n", group="evidence", shows="N")
    best_of_samples: int = option(64, "draws per prompt that best-of-n is computed from; well above the largest n", group="evidence", low=1)
    at: list[str] = option(["1", "3", "10"], "KLs in nats at which methods are compared", group="evidence", shows="KL")
    kl_limit: float | None = option(None, "KL up to which areas are taken. Default: the largest of all points", group="evidence", low=0, open_low=True)
    jobs: int = option(1, "runs at a time, each in a process of its own; more than the cores help nobody", group="machine", low=1)
    threads: int | None = option(None, "CPU threads. Default: as every run chooses", group="machine", low=1)


@dataclass(frozen=True, kw_only=True)
class Rate(Options):
    """Ratings of many models, or players of any kind, from comparisons of few. Loads no model."""

    EXAMPLE = "preftune rate games.csv --output ratings.html"
    data: list[str] = option([], "tables of games or rankings (docs/rate.md), or records whose answers have a source", shows="FILE", required=True, positional=True, reads="data")
    method: str = option("bradley-terry", "games of two; with ties: davidson, rao-kupper; rankings: plackett-luce, davidson", choices=("bradley-terry", "davidson", "rao-kupper", "plackett-luce"))
    ties: str = option("refuse", "where the method has none: half a win each (bradley-terry), or breslow, efron (plackett-luce)", choices=("refuse", "half", "breslow", "efron"))
    anchor: str | None = option(None, "a player whose rating is fixed. Default: the mean is 1000 (elo) or 0 (logit)", shows="NAME=VALUE", pattern=ANCHOR)
    scale: str = option("elo", "elo: 400 points are odds of ten to one; logit: natural log-odds", choices=("elo", "logit"))
    intervals: str = option("fisher", "fisher (the model holds), sandwich (it need not), or bootstrap", choices=("fisher", "sandwich", "bootstrap"))
    cluster: str | None = option(None, "what comparisons share: prompt, by (the judge), or a column; for sandwich and bootstrap", shows="COLUMN")
    level: float = option(0.95, "coverage of the intervals", low=0, high=1, open_low=True, open_high=True)
    draws: int = option(1000, "draws of the bootstrap", low=100)
    seed: int = option(0, "seed of the bootstrap", low=0)
    prior: float = option(0.0, "precision of a normal prior on the ratings (natural units): finite ratings for the unbeaten; 0: none", low=0)
    order_effect: bool = option(False, "also estimate the advantage of being shown first")
    covariates: list[str] = option([], "also estimate effects: length, headers, bold, lists, or columns NAME_a and NAME_b", shows="NAME")
    pairs: bool = option(False, "take rankings apart into games of two")
    compare: list[str] = option([], "two names: the interval of their difference", shows="NAME")
    json: str | None = option(None, "write everything as JSON", shows="FILE.json")
    output: str | None = option(None, "page (.html) or forest plot (.svg); without an ending a new folder for both and the JSON", shows="FILE|FOLDER")
    skip_bad: bool = option(False, "count and list unusable rows instead of stopping")


@dataclass(frozen=True, kw_only=True)
class Chat(Texts):
    """Talk to a model, or to two side by side."""

    EXAMPLE = "preftune chat runs/first MODEL --votes votes.jsonl"
    model: list[str] = option([], "one model or two: model folder, run folder or hub name", required=True, positional=True, reads="model")
    sample_tokens: int = option(256, "longest answer in tokens", low=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", low=0)
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this much probability; 1: among all", low=0, high=1, open_low=True)
    seed: int = option(0, "seed of the sampling", low=0)
    votes: str | None = option(None, "append your votes between two models to this file, as records for 'preftune dpo'", shows="FILE.jsonl")


@dataclass(frozen=True, kw_only=True)
class Report(Options):
    """One self-contained HTML page from a run folder; opens offline."""

    EXAMPLE = "preftune report runs/first"
    run: str | None = option(None, "run folder to read", required=True, positional=True)
    output: str | None = option(None, "file to write. Default: report.html in the run folder", shows="FILE.html")


@dataclass(frozen=True, kw_only=True)
class Export(Options):
    """A folder to publish: the merged model, or only its adapter, the tokeniser, and a model card that says what was measured."""

    EXAMPLE = "preftune export runs/first --output published/first"
    run: str | None = option(None, "run folder to read", required=True, positional=True)
    output: str | None = option(None, "folder to make; must be empty or absent", shows="FOLDER", required=True)
    adapter: bool = option(False, "only the LoRA adapter, not the merged model")
    dtype: str | None = option(None, "number format of the stored weights. Default: as the run stored them", choices=("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """The whole pipeline on a tiny model and corpus made here: CPU, offline, minutes; ends with a report."""

    EXAMPLE = "preftune demo"
    output: str = option("runs/demo", "run folder to make; must be empty or absent", shows="FOLDER")
    seed: int = option(0, "seed of everything", low=0)
    language: str = option("en", "language of the corpus", choices=("en", "zh"))
    break_: bool = option(False, "train on bad settings, to see what the report says of a spoilt run")
    threads: int | None = option(None, "CPU threads. Default: 1", low=1)


@dataclass(frozen=True, kw_only=True)
class DataCheck(Wording, Online):
    """What is wrong with preference files, with file:line; with --model also what their tokens say. Exit code 3 where there are problems."""

    EXAMPLE = "preftune data check pairs.jsonl"
    data: list[str] = option([], "file(s) to read; any known layout and kind", shows="FILE", required=True, positional=True, reads="data")
    eval_data: list[str] = option([], "held-out file(s): prompts that stand on both sides are problems", shows="FILE", reads="data")
    model: str | None = option(None, "also look at tokens: lengths, what does not fit, how ids were found. Model folder or hub name", reads="model")
    json: bool = option(False, "every finding with every file:line as JSON")
    strict: bool = option(False, "warnings are problems too")
    format: str = option("auto", "layout of the data; auto detects it", group="data")
    max_records: int | None = option(None, "read at most this many records", group="data", low=1)
    max_length: int | None = option(None, "longest record in tokens. Default: the model's window", group="data", low=2)
    finish: str = option("auto", "whether a response ends with EOS where the data does not say", group="data", choices=("auto", "always", "never"))


@dataclass(frozen=True, kw_only=True)
class DataShow(Wording, Online):
    """One record as the very tensors that train: prompt, trained, masked, special and end tokens in colour."""

    EXAMPLE = "preftune data show --model MODEL --data pairs.jsonl --row 7"
    model: str | None = option(None, "model folder, run folder or hub name; only its tokeniser is loaded", required=True, reads="model")
    data: list[str] = option([], "file(s) to read; any known layout and kind", shows="FILE", required=True, reads="data")
    row: int = option(1, "which record, counted from 1", low=1)
    html: str | None = option(None, "write a page instead", shows="FILE.html")
    format: str = option("auto", "layout of the data; auto detects it", group="data")
    skip_bad: bool = option(False, "pass over unusable rows instead of stopping", group="data")
    max_length: int | None = option(None, "longest record in tokens. Default: the model's window", group="data", low=2)
    finish: str = option("auto", "whether a response ends with EOS where the data does not say", group="data", choices=("auto", "always", "never"))


@dataclass(frozen=True, kw_only=True)
class DataConvert(Online):
    """Any layout and kind of file as canonical JSONL."""

    EXAMPLE = "preftune data convert --data pairs.csv --output pairs.jsonl"
    data: list[str] = option([], "file(s) to read; any known layout and kind", shows="FILE", required=True, reads="data")
    output: str | None = option(None, "JSONL file to write; must not be there yet", shows="FILE.jsonl", required=True)
    format: str = option("auto", "layout of the data; auto detects it", group="data")
    max_records: int | None = option(None, "read at most this many records", group="data", low=1)
    skip_bad: bool = option(False, "count and list unusable rows instead of stopping", group="data")
    from_scores: str | None = option(None, "make judgements of scores where nothing else is judged: best-worst, or all pairs of unequal scores", group="data", choices=("best-worst", "all"))


@dataclass(frozen=True, kw_only=True)
class Env(Options):
    """Versions and hardware, to paste into an issue."""

    EXAMPLE = "preftune env"


# --- what a field accepts -----------------------------------------------------------------------------------------------------

KINDS: dict[Any, str] = {str: "text", int: "whole", float: "number", bool: "switch", list[str]: "texts", dict[str, float]: "numbers"}
TYPES: dict[str, tuple[type, ...]] = {"text": (str,), "texts": (str,), "whole": (int,), "number": (int, float), "switch": (bool,)}
WORDS = {"text": "text", "texts": "text", "whole": "a whole number", "number": "a number", "switch": "true or false"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)

# What other programs call our options, for the hint only.
ALSO_CALLED = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size", "model_name_or_path": "model", "base_model": "model", "dataset": "data", "dataset_name": "data",
    "train_data": "data", "prompts": "data", "output_dir": "output", "out": "output", "loss_type": "loss", "max_seq_length": "max_length",
    "max_grad_norm": "clip", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "lora_r": "lora", "lora_rank": "lora",
    "resume_from_checkpoint": "resume", "eval_steps": "eval_every", "save_steps": "save_every", "max_new_tokens": "sample_tokens",
    "max_tokens": "sample_tokens", "num_samples": "k", "n": "k", "save_total_limit": "keep", "chat_template": "template", "lang": "language",
    "early_stopping_patience": "patience", "early_stopping_threshold": "min_improvement", "load_best_model_at_end": "publish",
    "optim": "optimiser", "report_to": "track", "optimizer": "optimiser", "freeze_layers": "freeze",
    "kl_coef": "beta", "init_kl_coef": "beta", "cliprange": "clip_ratio", "epsilon": "clip_ratio", "cliprange_value": "clip_value",
    "vf_coef": "value_weight", "num_ppo_epochs": "passes", "ppo_epochs": "passes", "num_iterations": "passes", "gamma": "discount",
    "missing_eos_penalty": "eos_penalty", "num_generations": "k", "rloo_k": "k", "response_length": "sample_tokens",
    "max_completion_length": "sample_tokens", "reward_model_path": "reward", "reward_funcs": "reward", "normalize_rewards": "normalise_rewards",
    "kl_estimator": "kl", "horizon": "kl_horizon", "target": "kl_target",
    "sync_ref_model": "reference_update", "ref_model_mixup_alpha": "reference_alpha", "ref_model_sync_steps": "reference_every",
}  # fmt: skip


class Spec(NamedTuple):
    """One option as the parser, the YAML reader and the help see it. `label` in messages is its flag or its file:line: key."""

    name: str
    kind: str
    optional: bool
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    shows: str | None = None
    required: bool = False
    positional: bool = False
    reads: str | None = None
    pattern: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """Its name in YAML."""
        return self.name.rstrip("_")

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--loss.NAME" if self.kind == "numbers" else "--" + self.key.replace("_", "-")

    @property
    def bounds(self) -> str:
        """' above 0', ' from 0 to 0.9', or ''."""
        low, high = self.low, self.high
        if low is not None and high is not None and not (self.open_low or self.open_high):
            return f" from {low:g} to {high:g}"
        parts = [f"{'above' if self.open_low else 'at least'} {low:g}"] if low is not None else []
        parts += [f"{'below' if self.open_high else 'at most'} {high:g}"] if high is not None else []
        return f" {' and '.join(parts)}" if parts else ""

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.pattern:
            return self.pattern[1]
        words = ", ".join(self.choices) if self.choices else ""
        if self.kind in ("text", "texts") and words:
            return f"one of {words}"
        number = WORDS[self.kind] + self.bounds.replace(" at least", " of at least", 1)
        return f"{words} or {number}" if words else number


def specs(cls: type[Options]) -> tuple[Spec, ...]:
    """The options of a verb, group by group in the order of GROUPS; those of the verb itself before inherited ones."""
    own, hints, found = set(cls.__annotations__), get_type_hints(cls), []
    for entry in fields(cls):  # type: ignore[arg-type]
        hint = hints[entry.name]
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        found.append(Spec(entry.name, KINDS[parts[0]], NoneType in parts, default, **entry.metadata))
    return tuple(sorted(found, key=lambda spec: (list(GROUPS).index(spec.group), spec.group != "main" and spec.name not in own)))


def check(spec: Spec, value: Any, label: str) -> None:
    """Raises UsageError, which begins with `label`, where a value is of the wrong type, out of bounds or not among the choices."""
    if spec.kind == "numbers" and isinstance(value, dict):
        for name, number in value.items():
            check(loss_argument(str(name)), number, f"{label}.{name}")
    elif spec.kind == "texts" and isinstance(value, list):
        for each in value:
            _check_one(spec, each, label)
        if len({str(each) for each in value}) < len(value):
            raise UsageError(f"{label} names {next(each for each in value if value.count(each) > 1)!r} twice")
    elif spec.kind in ("texts", "numbers"):
        raise UsageError(f"{label} must be a {'list' if spec.kind == 'texts' else 'table of names and numbers'}, not {value!r}")
    elif not (value is None and spec.optional):
        _check_one(spec, value, label)


def _check_one(spec: Spec, value: Any, label: str) -> None:
    wrong = UsageError(f"{label} must be {spec.expected}, not {'null' if value is None else repr(value)}")
    if isinstance(value, str) and spec.kind == "number" and value in (spec.choices or ()):
        return
    if type(value) not in TYPES[spec.kind]:
        raise wrong
    if isinstance(value, str):
        if not value or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"{label} is {'empty' if not value else f'not readable as UTF-8 text: {value!a}'}")
        if spec.choices and value not in spec.choices:
            raise UsageError(f"{wrong}{nearest(value, spec.choices)}")
        if spec.pattern and not re.fullmatch(spec.pattern[0], value, re.ASCII):
            raise wrong
    elif not isinstance(value, bool):
        low, high = spec.low, spec.high
        if not math.isfinite(value):
            raise UsageError(f"{label} must be finite, not {value}")
        if low is not None and (value < low or (spec.open_low and value == low)):
            raise wrong
        if high is not None and (value > high or (spec.open_high and value == high)):
            raise wrong


def convert(spec: Spec, text: str, label: str) -> Any:
    """One value as written, without quotes, in the type that its option asks for. Checked. Raises UsageError."""
    value: Any = text
    if spec.kind == "whole" and re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        value = int(text)
    elif spec.kind == "number" and (NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(text)):
        value = float(text if NUMBER.fullmatch(text) else text.replace(".", ""))  # YAML writes .inf and .nan
    elif spec.kind == "switch" and text in ("true", "false"):
        value = text == "true"
    _check_one(spec, value, label)
    return value


def hint(word: str, cls: type[Options], before: str = "") -> str:
    """' (did you mean ...?)' for an option that this verb does not have; also knows what other programs call ours."""
    names = [spec.key for spec in specs(cls) if spec.kind != "numbers"]
    word = word.replace("-", "_").lower()
    known = ALSO_CALLED.get(word, "")
    said = f" (did you mean '{known}'?)" if known in names else nearest(word, names)
    return said.replace("_", "-").replace("'", f"'{before}", 1) if before else said


# --- losses, read without torch -----------------------------------------------------------------------------------------------

# What a loss's argument may be, by its name; an argument without a line here may be any finite number.
LOSS_BOUNDS: dict[str, dict[str, Any]] = {
    "beta": {"low": 0, "open_low": True}, "tau": {"low": 0, "open_low": True}, "noise": {"low": 0, "high": 0.5, "open_high": True},
    "desirable_weight": {"low": 0}, "undesirable_weight": {"low": 0}, "lam": {"low": 0}, "per_token": {"low": 0}, "tail": {"low": 0, "high": 1},
    "alpha": {"low": 0, "open_low": True}, "cap": {"low": 0, "open_low": True}, "decay": {"low": 0, "high": 1, "open_low": True},
    "epsilon": {"low": 0, "high": 0.5, "open_low": True, "open_high": True},
    "unit": {"low": 0, "open_low": True}, "eta": {"low": 0, "open_low": True},
    "nu": {"low": 0, "open_low": True}, "theta": {"low": 1, "open_low": True}, "scale": {"low": 0}, "momentum": {"low": 0, "high": 1, "open_high": True}, "keep": {"low": 0, "high": 1, "open_low": True},
}  # fmt: skip
LOSS_ALSO_CALLED = {
    "dpo": "sigmoid", "cdpo": "sigmoid' with '--label-smoothing 0.1", "ipo": "ipo-sum' or 'ipo-mean", "sft": "nll", "rpo": "sigmoid+1*nll",
    "rdpo": "r-dpo' (length) or 'robust' (noise", "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco-biased' or 'bco",
    "sigmoid_norm": "sigmoid-norm", "slic": "hinge", "pl": "plackett-luce", "dpo-pl": "plackett-luce", "listmle": "plackett-luce",
    "bt": "bradley-terry", "btl": "bradley-terry", "bce": "binary", "mse": "square", "plackett-luce-efron": "plackett-luce", "davidson-luce": "plackett-luce-davidson", "lipo-lambda": "lipo", "sdpo": "s-dpo",
    "distill": "soft", "distillation": "soft", "d-dpo": "soft-square", "rpo_sq": "soft-square", "rpo_bwd_kl": "soft-kl", "rpo_fwd_kl": "soft-reverse-kl",
    "tdpo": "tdpo2' or 'tdpo1", "e-dpo": "soft-pessimistic", "qrpo": "value-quantile", "a-star-po": "value", "dro": "value-learned", "dro-v": "value-learned", "xpo": "sigmoid+1e-5*optimism",
}  # fmt: skip


class LossFacts(NamedTuple):
    """What the source of a loss says of it. `arguments`: name -> default."""

    arguments: dict[str, float]
    kind: str
    reference: str
    soft: str
    source: str
    formula: str
    scalar: str = "no"


@cache
def loss_facts() -> dict[str, LossFacts]:
    """The table of losses, read from the text of losses/*.py: tells a misspelt name or argument without importing torch."""
    folder = Path(__file__).parent / "losses"
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}
    bodies = {f"{stem}.{node.name}": node for stem, tree in trees.items() for node in tree.body if isinstance(node, ast.FunctionDef)}
    tables = [node.value for node in trees["__init__"].body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LOSSES"]
    table = tables[0]
    assert isinstance(table, ast.Dict), "LOSSES stays a dict display: its text is read here"
    facts = {}
    for key, call in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(call, ast.Call), "LOSSES: string keys, each with Loss(...)"
        given = dict(zip(("function", "kind", "reference", "soft", "source"), call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        body = bodies[ast.unparse(given.pop("function"))]
        defaults = zip(body.args.kwonlyargs, body.args.kw_defaults, strict=True)
        arguments = {argument.arg: ast.literal_eval(default) for argument, default in defaults if default is not None}
        said = {name: ast.literal_eval(given[name]) for name in ("kind", "reference", "soft", "source")}
        said |= {"scalar": ast.literal_eval(given["scalar"])} if "scalar" in given else {}
        facts[str(key.value)] = LossFacts(arguments, **said, formula=(ast.get_docstring(body) or "").splitlines()[0])
    return facts


def loss_argument(name: str) -> Spec:
    """The option that `--loss.NAME` is."""
    return Spec(name, "number", False, None, "argument of the loss", "training", **LOSS_BOUNDS.get(name, {}))


def parse_loss(text: str) -> list[tuple[float, str]]:
    """'sigmoid+0.1*nll' -> [(1.0, 'sigmoid'), (0.1, 'nll')]. Raises UsageError: syntax, an unknown or repeated name, a weight <= 0."""
    terms: list[tuple[float, str]] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(?:([^\s*]+)\s*\*)?\s*([A-Za-z][\w-]*)\s*", part, re.ASCII)
        if not match or not NUMBER.fullmatch(match[1] or "1"):
            raise UsageError(f"{text!r} is not a loss nor a weighted sum of losses such as sigmoid+0.1*nll")
        weight, name = float(match[1] or 1), match[2]
        if name not in loss_facts():
            other = LOSS_ALSO_CALLED.get(name.lower())
            near = f" (did you mean '{other}'?)" if other else nearest(name, loss_facts())
            raise UsageError(f"no loss is called {name!r}{near}; 'preftune dpo --help-losses' lists them")
        if not 0 < weight < math.inf:
            raise UsageError(f"the weight of {name!r} must be above 0 and finite, not {match[1]}")
        if name in [known for _, known in terms]:
            raise UsageError(f"{name!r} stands twice in {text!r}; write one term with the summed weight")
        terms.append((weight, name))
    return terms


def loss_terms(options: Losses | Evaluate, labels: Mapping[str, str] | None = None) -> list[tuple[float, str, dict[str, float]]]:
    """(weight, loss, all its arguments) for each term of --loss. An argument goes to every term that takes it.

    Raises:
        UsageError: unknown loss; an argument that no term takes; label smoothing of a loss that has no soft form.
    """
    said = {"loss": "--loss", "beta": "--beta", "label_smoothing": "--label-smoothing"} | dict(labels or {})
    try:
        terms = parse_loss(options.loss or "sigmoid")
    except UsageError as error:
        raise UsageError(f"{said['loss']}: {error}") from None
    given = dict(options.loss_arguments)
    if options.beta is not None:
        if "beta" in given:
            raise UsageError(f"{said['beta']} and {said.get('loss.beta', '--loss.beta')} are the same option; give one of them")
        given["beta"], said["loss.beta"] = options.beta, said["beta"]
    for _, name in terms:
        if loss_facts()[name].scalar == "only":
            raise UsageError(f"{said['loss']}: the loss {name!r} reads the scores of a reward model: it is for preftune reward")
    if isinstance(options, Losses) and options.reference_update != "none" and {loss_facts()[name].reference for _, name in terms} == {"none"}:
        raise UsageError(f"{said.get('reference_update', '--reference-update')}: the loss {options.loss!r} reads no reference")
    for _, name in terms if isinstance(options, Losses) and options.reference_update != "none" else ():
        if loss_facts()[name].kind in ("values", "draws", "grades"):
            raise UsageError(f"{said.get('reference_update', '--reference-update')}: the loss {name!r} reads what the reference is as it is given, "
                             "so that must stand still")
    return _with_arguments(terms, given, str(options.loss), options.label_smoothing or 0.0, said)


# What a reward model learns from -> the loss by default, and the kinds of losses that read it.
TARGETS = {"preferences": ("bradley-terry", ("pairs", "lists", "orders")), "labels": ("binary", ("verdicts",)), "scores": ("grades", ("grades",)),
           "classes": ("nominal", ("classes",))}  # fmt: skip


def scored_terms(options: Reward, labels: Mapping[str, str] | None = None) -> list[tuple[float, str, dict[str, float]]]:
    """As `loss_terms`, for a reward model: beta is 1 wherever a loss has one, since a score is its own logit. Raises UsageError."""
    said = {"loss": "--loss", "label_smoothing": "--label-smoothing"} | dict(labels or {})
    default, kinds = TARGETS[options.target]
    try:
        terms = parse_loss(options.loss or default)
    except UsageError as error:
        raise UsageError(f"{said['loss']}: {error}") from None
    for _, name in terms:
        if (facts := loss_facts()[name]).scalar == "no":
            raise UsageError(f"{said['loss']}: the loss {name!r} reads log-probs of a policy; a reward model takes "
                             f"{', '.join(n for n, f in loss_facts().items() if f.scalar != 'no' and f.kind in kinds)}")
        if facts.kind not in kinds:
            target = next(t for t, (_, read) in TARGETS.items() if facts.kind in read)
            raise UsageError(f"{said['loss']}: the loss {name!r} learns from {target}: --target {target}")
    return _with_arguments(terms, dict(options.loss_arguments), options.loss or default, options.label_smoothing, said, fixed={"beta": 1.0})


def _with_arguments(terms: list[tuple[float, str]], given: dict[str, float], loss: str, smoothing: float, said: Mapping[str, str],
                    fixed: Mapping[str, float] | None = None) -> list[tuple[float, str, dict[str, float]]]:  # fmt: skip
    """Each term with all its arguments, those of `fixed` not to be chosen. Raises UsageError as `loss_terms`."""
    held = fixed or {}
    taken = [argument for _, name in terms for argument in loss_facts()[name].arguments if argument not in held]
    for name in given:
        if name not in taken:
            known = ", ".join(f"--loss.{argument}" for argument in dict.fromkeys(taken)).replace("_", "-")
            near = nearest(name, taken).replace("'", "'--loss.", 1)
            what = f"takes {known}" if known else "takes no arguments"
            raise UsageError(f"{said.get(f'loss.{name}', f'--loss.{name}')}: the loss {loss!r} takes no {name!r}{near}; it {what}")
    for _, name in terms if smoothing else ():
        if loss_facts()[name].soft == "refuse" or {loss_facts()[each].soft for _, each in terms} == {"ignore"}:
            raise UsageError(f"{said['label_smoothing']}: the loss {name!r} has no soft form, so its labels cannot be smoothed")
        if "noise" in loss_facts()[name].arguments:
            raise UsageError(f"{said['label_smoothing']}: the loss {name!r} corrects for wrong labels itself, by --loss.noise; the two would cancel")
    arguments = [loss_facts()[name].arguments for _, name in terms]
    return [(weight, name, {k: held.get(k, given.get(k, v)) for k, v in known.items()})
            for (weight, name), known in zip(terms, arguments, strict=True)]  # fmt: skip


def reads_draws(options: OnlineDpo) -> bool:
    """Whether a term of the loss reads samples of the reference, so that each prompt gets one."""
    return any(loss_facts()[name].kind == "draws" for _, name in parse_loss(options.loss))


def learns_value(options: Losses | Evaluate) -> bool:
    """Whether a term of the loss reads a value that is learned beside the policy."""
    return "value-learned" in {name for _, name in parse_loss(options.loss or "sigmoid")}


def kl_place(options: Ppo) -> str:
    """Where the KL of ppo stands: 'reward', or the loss that it is, 'k2' or 'k3'. GRPO's own place is k3: over the spread of a group
    whose rewards are equal, a KL in the reward would be all there is."""
    return options.kl or ("k3" if options.advantage == "group" else "reward")


# --- models and files by name --------------------------------------------------------------------------------------------------

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
FILE_ENDING = re.compile(r"\.(safetensors|bin|pt|pth|gguf|json|jsonl|yaml|yml|txt|csv|zip|gz)$", re.IGNORECASE)


def is_path_like(text: str) -> bool:
    """Whether this can only be meant as a path, so that it never reaches the network: `./x`, `a/b/c`, `runs/x`, `x.json`, and
    `a/b` where the folder `a` is here. Anything that the hub would not take as a name is a path."""
    first, _, rest = text.partition("/")
    return not HUB_NAME.fullmatch(text) or bool(FILE_ENDING.search(text)) or (bool(rest) and (first == "runs" or Path(first).is_dir()))


def data_source(text: str) -> tuple[str, float]:
    """('pairs.jsonl', 2.0) of 'pairs.jsonl:2': a file and how often its judgements count. Raises UsageError where two files could be
    meant, or for a weight of 0."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", text, re.ASCII | re.DOTALL)
    if not match:
        return text, 1.0
    if os.path.exists(text):
        if os.path.exists(match[1]):
            raise UsageError(f"{text}: ambiguous: a file of this name is here, and {match[1]} too; rename one of them")
        return text, 1.0
    if not 0 < float(match[2]) < math.inf:
        raise UsageError(f"{text}: a weight must be above 0 and finite")
    return match[1], float(match[2])


class Address(NamedTuple):
    """Where a model answers, and what it is called there. `loopback`: on this machine."""

    url: str
    name: str
    loopback: bool


def address(text: str) -> Address:
    """The address of 'endpoint:http://HOST:PORT/v1#NAME' (or 'judge:...'). Raises UsageError for one that cannot be read, or holds a secret.

    >>> address("endpoint:http://127.0.0.1:8000/v1#tiny")
    Address(url='http://127.0.0.1:8000/v1', name='tiny', loopback=True)
    """
    kind, _, rest = text.partition(":")
    url, _, name = rest.partition("#")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{text}: not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not host or not name or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"{text}: expected {kind}:http://HOST:PORT/v1#NAME, the name as the endpoint calls the model")
    if "@" in parts.netloc or parts.query:
        raise UsageError(f"{kind}: an address must not hold a user, a password or a query; a key goes by --key-variable NAME")
    return Address(url.rstrip("/"), name, host in ("localhost", "::1") or bool(re.fullmatch(r"127\.\d+\.\d+\.\d+", host)))


def _inputs(options: Options, labels: Mapping[str, str]) -> None:
    """Refuse what is not there before anything heavy is imported. DataError, ModelError, or UsageError for --offline."""
    for spec in specs(type(options)):
        value = getattr(options, spec.name) if spec.reads else None
        for text in [value] if isinstance(value, str) else value or []:
            text = data_source(text)[0] if spec.reads == "data" else text
            if spec.reads in ("speaker", "endpoint") and text.startswith(("endpoint:", "judge:")):
                place, label = address(text), labels.get(spec.name, spec.flag)
                if isinstance(options, Online) and options.offline and not place.loopback:
                    raise UsageError(f"{label} {text}: --offline refuses an endpoint that is not on this machine")
                continue
            if spec.reads == "endpoint":
                continue
            if os.path.exists(text):  # unlike Path.exists, also False for a name that is too long
                continue
            hub = spec.reads == "data" and text.startswith("hub:")
            if hub and isinstance(options, Online) and options.offline:
                raise UsageError(f"{labels.get(spec.name, spec.flag)} {text}: --offline refuses the hub")
            if hub:
                continue
            if spec.reads == "data":
                raise DataError(f"no such file{_neighbour(text)}", path=text)
            if is_path_like(text):
                raise ModelError(f"{text}: no such model folder{_neighbour(text)}")
            if isinstance(options, Online) and options.offline:
                label = labels.get(spec.name, spec.flag)
                raise UsageError(f"{label} {text}: is not a folder here, and --offline refuses the hub{_neighbour(text)}")


def _neighbour(text: str) -> str:
    """' (did you mean ...?)' for what lies beside a path that is not there."""
    path = Path(text)
    try:
        return nearest(path.name, sorted(os.listdir(path.parent))[:1000])
    except OSError:
        return ""


# --- contradictions ------------------------------------------------------------------------------------------------------------

Given = dict[str, tuple[Any, str]]  # field name or 'loss.NAME' -> (value, what the user wrote: '--lr' or 'run.yaml:3: lr')
AnyOptions = TypeVar("AnyOptions", bound=Options)

ASKING = ("concurrency", "retries", "timeout", "key_variable", "price_in", "price_out")
PAIRS = ("best-worst", "best-random", "all")


def _asks(model: str | None) -> bool:
    return str(model).startswith("endpoint:")


def _judges(options: Score) -> bool:
    return options.judge is not None or any(spec.startswith("judge:") for spec in options.reward)


# (verbs, option, when it contradicts the rest, why). Looked at only where the option was given; `o` has every value.
CONTRADICTIONS: tuple[tuple[tuple[type[Options], ...], str, Callable[[Any], bool], str], ...] = (
    ((Fitting,), "holdout", lambda o: bool(o.eval_data), "has nothing to do with --eval-data given: that replaces the split"),
    ((Fitting,), "eval_data", lambda o: bool({*o.data} & {*o.eval_data}) and "leak" not in o.allow, "names a file of --data: held-out records must not train"),
    ((Sft,), "from_scores", lambda o: not o.preferred, "has no effect without --preferred: all answers are imitated"),
    *(((Fitting,), name, lambda o: o.holdout == 0 and not o.eval_data, "has nothing to evaluate: --holdout is 0 and there is no --eval-data") for name in ("eval_every", "patience")),
    ((Fitting,), "publish", lambda o: o.publish == "best" and o.holdout == 0 and not o.eval_data, "best has no held-out loss to go by: --holdout is 0 and there is no --eval-data"),
    ((Training,), "stop", lambda o: o.eval_reward is None and not isinstance(o, OnPolicy), "plateau watches the reward of the model's own answers: give --eval-reward RULE (--patience N watches the held-out loss)"),
    ((Training,), "stop", lambda o: o.patience is not None, "plateau and --patience each say when to stop and what to keep: give one of them"),
    ((Training,), "publish", lambda o: o.publish == "reward" and o.eval_reward is None and not isinstance(o, OnPolicy), "reward has no reward to go by: give --eval-reward RULE"),
    *(((Training,), name, lambda o: o.stop is None, "has no effect without --stop plateau") for name in ("plateau_window", "plateau_band")),
    *(((Training,), name, lambda o: o.stop is None and o.publish != "reward", "has no effect without --stop plateau or --publish reward") for name in ("kl_limit", "kl_unit")),
    ((Training,), "kl_unit", lambda o: o.kl_unit == "sequence" and o.kl_limit is None, "sequence needs its own --kl-limit: the default of 0.05 is meant per token, per answer it would allow next to nothing"),
    ((Training,), "eval_truth", lambda o: o.eval_reward is None and not isinstance(o, OnPolicy), "has no proxy to stand beside: give --eval-reward RULE too, or only that"),
    ((Training,), "eval_truth", lambda o: o.eval_truth == o.eval_reward, "is --eval-reward itself"),
    ((Training,), "stop", lambda o: o.holdout == 0 and not o.eval_data, "needs held-out prompts: --holdout is 0 and there is no --eval-data"),
    ((Fitting,), "min_improvement", lambda o: o.patience is None, "has no effect without --patience N"),
    ((Fitting,), "allow_change", lambda o: o.resume is None, "has no effect without --resume RUN"),
    ((Fitting,), "lora_alpha", lambda o: o.lora == 0, "has no effect without --lora RANK"),
    ((Fitting,), "lora_targets", lambda o: o.lora == 0, "has no effect without --lora RANK"),
    ((Training,), "adapter", lambda o: o.adapter == "continue" and o.lora > 0, "continue trains the adapter that --model is, and --lora adds another: give one of them"),
    ((Fitting,), "freeze", lambda o: o.lora > 0 or getattr(o, "adapter", "") == "continue", "has no effect with --lora or --adapter continue, which train nothing of the model itself; --lora-targets says where adapters go"),
    *(((Fitting,), name, lambda o: o.optimiser == "rmsprop", "is AdamW's: --optimiser rmsprop does not take it") for name in ("weight_decay", "adam_beta1", "adam_beta2")),
    ((Fitting,), "schedule", lambda o: o.warmup == 1, "has no effect: --warmup 1 rises to the last step"),
    ((Training,), "eval_reward", lambda o: o.eval_prompts == 0, "has nothing to score: --eval-prompts is 0"),
    ((Training,), "eval_samples", lambda o: o.eval_prompts == 0, "has no effect: --eval-prompts is 0"),
    ((Training,), "sample_tokens", lambda o: o.eval_prompts == 0 and not isinstance(o, OnPolicy), "has no effect: --eval-prompts is 0"),
    ((Fitting,), "output", lambda o: o.output in (o.model, *o.data, *o.eval_data), "is also an input; name a folder that does not exist yet"),
    ((Reward,), "publish", lambda o: o.publish == "reward", "reward goes by samples of a policy, and a reward model draws none: best goes by the held-out loss"),
    ((Reward,), "average", lambda o: o.members == 1, "has no effect without --members N"),
    ((Reward,), "member", lambda o: o.members > 1, "is one member, and --members makes all of them: give one of the two"),
    ((Reward,), "from_scores", lambda o: o.target != "preferences", "has no effect: --target labels and scores read no judgements"),
    ((Reward,), "target", lambda o: o.target == "classes" and len(o.classes) < 2, "classes needs --classes, two or more, the wanted one last"),
    ((Reward,), "classes", lambda o: o.target != "classes", "has no effect without --target classes"),
    ((Reward,), "by", lambda o: o.holdout == 0 and not o.eval_data, "has nothing to evaluate: --holdout is 0 and there is no --eval-data"),
    ((Reward,), "by", lambda o: o.target != "preferences", "is told of pairs: it needs --target preferences"),
    ((Losses,), "reference_alpha", lambda o: o.reference_update != "soft", "has no effect without --reference-update soft"),
    ((Losses,), "reference_every", lambda o: o.reference_update == "none", "has no effect without --reference-update soft or hard"),
    *(((OnPolicy,), name, lambda o: True, "has no effect: of the data only prompts are read") for name in ("from_scores", "finish")),
    ((OnPolicy,), "model", lambda o: _asks(o.model), "is behind an endpoint, whose weights do not follow the policy: give the folder of the weights that are to learn (docs/ppo.md#endpoints)"),
    ((OnPolicy,), "patience", lambda o: True, "has no held-out loss to go by: answers are the policy's own"),
    ((OnPolicy,), "publish", lambda o: o.publish == "best", "best has no held-out loss to go by: answers are the policy's own"),
    ((OnPolicy,), "rollout_prompts", lambda o: o.rollout_prompts < o.batch_size, "must be at least --batch-size, the prompts of one step"),
    ((Ppo,), "k", lambda o: o.advantage != "gae" and o.k == 1, "must be at least 2: --advantage rloo and group compare a prompt's answers"),
    *(((Ppo,), name, lambda o: o.advantage != "gae", "has no effect: there is a value model with --advantage gae only") for name in ("whiten", "discount", "lam", "value", "value_weight", "value_lr", "clip_value")),
    ((Ppo,), "value", lambda o: o.value == "reward" and not str(o.reward).startswith("model:"), "reward begins as a reward model, and --reward is none: give --reward model:FOLDER, or --value head or copy"),
    ((Ppo,), "normalise_rewards", lambda o: o.value == "reward", "changes the unit of rewards, which --value reward begins in: give one of the two"),
    ((Ppo,), "importance_cap", lambda o: 0 < o.importance_cap < 1, "must be 0, which corrects nothing, or at least 1: below it also shrinks what was sampled right"),
    ((Ppo,), "kl_horizon", lambda o: o.kl_target is None, "has no effect without --kl-target"),
    ((Ppo,), "kl_target", lambda o: o.beta == 0, "has nothing to steer: --beta is 0"),
    ((Ppo,), "kl_target", lambda o: kl_place(o) != "reward", "steers the KL in the reward: give --kl reward"),
    ((Ppo,), "kl", lambda o: o.beta == 0, "has no effect: --beta is 0"),
    *(((Dpo,), name, lambda o: not learns_value(o), "has no effect: only --loss value-learned learns a value") for name in ("value", "value_lr")),
    ((OnlineDpo,), "k", lambda o: o.k == 1 and not reads_draws(o), "must be at least 2: pairs are made of a prompt's answers"),
    ((Score, Pair), "output", lambda o: o.output in o.data, "is also an input; name a file that does not exist yet"),
    ((Logprobs, Sample), "output", lambda o: o.output in (o.model, *o.data), "is also an input; name a file that does not exist yet"),
    ((Export,), "output", lambda o: o.output == o.run, "is the run folder itself; name a folder that does not exist yet"),
    ((DataConvert,), "output", lambda o: o.output in o.data, "is also an input; name a file that does not exist yet"),
    ((DataCheck,), "eval_data", lambda o: bool({*o.data} & {*o.eval_data}), "names a file of --data: every prompt would be a leak"),
    *(((DataCheck,), name, lambda o: o.model is None, "has no effect without --model") for name in ("max_length", "finish", "bos", "template", "control_tokens")),
    ((Sample,), "k", lambda o: o.temperature == 0 and o.k > 1, "makes equal samples: --temperature 0 always takes the likeliest token"),
    ((Sample, Chat, Compare), "top_p", lambda o: o.temperature == 0, "has no effect: --temperature 0 always takes the likeliest token"),
    ((Sample,), "reference", lambda o: (o.temperature, o.top_p) != (1, 1), "estimates KL from samples of the model itself: needs --temperature 1 and --top-p 1"),
    *(((Evaluate,), name, lambda o: o.sample_prompts == 0, "has no effect: --sample-prompts is 0") for name in ("k", "sample_tokens")),
    ((Compare,), "model", lambda o: len(o.model) > 2, "takes two models"),
    ((Compare,), "prompts", lambda o: bool(o.answers or o.votes), "has no effect: --answers and --votes bring their own"),
    ((Compare,), "answers", lambda o: len(o.answers) != 2, "takes two files, those of A and of B"),
    ((Compare,), "answers", lambda o: bool(o.model), "stands in the place of two models: give the one or the other"),
    ((Compare,), "votes", lambda o: len(o.model) != 2, "needs the two models' names, as the votes have them"),
    ((Compare,), "votes", lambda o: o.reward is not None, "decides, and so would --reward: give one of them"),
    ((Compare,), "judge", lambda o: o.reward is not None or bool(o.votes), "decides, and so would --reward or --votes: give one of them"),
    ((Compare,), "judge", lambda o: o.output is None, "needs --output FOLDER: verdicts are kept as they come"),
    *(((Compare,), name, lambda o: o.judge is None, "has no effect without --judge") for name in ("question", "judge_tokens", "skip_bad", "concurrency", "retries", "timeout", "key_variable", "price_in", "price_out")),
    ((Compare,), "margin", lambda o: o.reward is None, "has no effect without --reward"),
    ((Compare,), "k", lambda o: o.temperature == 0 and o.k > 1, "makes equal samples: --temperature 0 always takes the likeliest token"),
    *(((Compare,), name, lambda o: bool(o.answers or o.votes), "has no effect: nothing is sampled") for name in ("k", "sample_tokens", "temperature", "dry_run")),
    ((Evaluate,), "tokens", lambda o: not (o.output or o.page), "is written to --output or --page: name one"),
    ((Evaluate,), "output", lambda o: Path(o.output).suffix != ".json", "must end with .json"),
    ((Evaluate,), "page", lambda o: Path(o.page).suffix != ".html", "must end with .html"),
    *(((Sample,), name, lambda o: _asks(o.model), "has no effect on a model behind an endpoint") for name in ("reference", "batch_size", "dtype", "device", "threads", "bos", "template", "control_tokens")),
    *(((Sample,), name, lambda o: not _asks(o.model), "has no effect without --model endpoint:...") for name in ("api", "skip_bad", *ASKING)),
    *(((Score,), name, lambda o: not _judges(o), "has no effect without a judge") for name in ("question", "judge_tokens", *ASKING)),
    ((Score,), "judge", lambda o: bool(o.reward), "compares, --reward scores: one at a time"),
    ((Score,), "combine", lambda o: len(o.reward) < 2, "has no effect on fewer than two rewards"),
    *(((Score,), name, lambda o: not any(spec.startswith(("model:", "implicit:")) for spec in o.reward), "has no effect without a reward model") for name in ("micro_tokens", "dtype", "device")),
    *(((Pair,), name, lambda o: o.ask is not None, "has no effect with --ask, which judges nothing") for name in ("how", "soft", "replace")),
    ((Pair,), "ask_by", lambda o: o.ask is None, "has no effect without --ask N"),
    ((Pair,), "soft", lambda o: o.how not in PAIRS, "is of pairs: --how best-worst, best-random or all"),
    ((Pair,), "margin", lambda o: o.ask is None and o.how not in PAIRS, "is of pairs: --how best-worst, best-random or all"),
    ((Pair,), "limit", lambda o: o.ask is None and o.how not in ("all", "rejection"), "has no effect: only --how all, rejection and --ask have several of a prompt"),
    ((Pair,), "of", lambda o: o.how != "best-of-n", "has no effect without --how best-of-n"),
    *(((Pair,), name, lambda o: o.how != "rejection", "has no effect without --how rejection") for name in ("beta", "r_max", "reference")),
    ((Pair,), "how", lambda o: o.how == "rejection" and o.beta is None, "rejection needs --beta: the KL weight of the policy that is drawn from"),
    ((Rate,), "cluster", lambda o: o.intervals == "fisher", "has no effect on fisher intervals, which take all comparisons as independent: --intervals sandwich"),
    *(((Rate,), name, lambda o: o.intervals != "bootstrap", "has no effect without --intervals bootstrap") for name in ("draws", "seed")),
    ((Rate,), "ties", lambda o: o.method in ("davidson", "rao-kupper"), "has no effect: this --method models ties"),
    ((Rate,), "ties", lambda o: o.ties == "half" and o.method != "bradley-terry", "half is a reading of games of two: it needs --method bradley-terry"),
    ((Rate,), "ties", lambda o: o.ties in ("breslow", "efron") and o.method != "plackett-luce", "breslow and efron need --method plackett-luce"),
    ((Rate,), "pairs", lambda o: o.intervals == "fisher", "makes dependent games of a ranking, which fisher intervals take for independent: --intervals sandwich"),
    ((Rate,), "pairs", lambda o: o.method == "plackett-luce", "has no effect: plackett-luce reads rankings, and games of two alike"),
    ((Rate,), "compare", lambda o: len(o.compare) != 2, "takes two names"),
    ((Rate,), "output", lambda o: Path(o.output).suffix not in ("", ".html", ".svg"), "must end with .html or .svg, or have no ending: a folder"),
    ((Rate,), "json", lambda o: o.json in (*o.data, o.output), "is also an input or the page; name a file that does not exist yet"),
    ((Chat,), "model", lambda o: len(o.model) > 2, "takes one model, or two to compare"),
    ((Chat,), "votes", lambda o: len(o.model) != 2, "needs two models to choose between"),
)  # fmt: skip


def build(cls: type[AnyOptions], given: Given, *, files: bool = True) -> AnyOptions:
    """The options of a verb from what was given. Raises UsageError for missing or contradicting options, before anything is read.

    `files`: whether the inputs must be there already.
    """
    resume = given["resume"][0] if "resume" in given else None
    if resume is not None:
        if given.keys() <= {"resume", "allow_change"}:
            return cls(**_values(given))  # all else is in the run folder
        if "output" in given:
            raise UsageError(f"{given['output'][1]} cannot be given with --resume: the run goes on in its own folder ({resume})")
        given = {**load_config(run_config(resume), cls), **given}
    labels = {name: label for name, (_, label) in given.items()}
    # A value from YAML that says no more than the default counts as not given: the resolved file of a run lists every option.
    defaults = {spec.name: spec.default for spec in specs(cls)}
    said = [name for name, (value, label) in given.items() if label.startswith("--") or value != defaults.get(name)]
    options = cls(**_values(given))
    missing = [spec.flag for spec in specs(cls) if spec.required and getattr(options, spec.name) in (None, [])]
    if missing:
        raise UsageError(f"{', '.join(missing[:-1])}{' and ' * (len(missing) > 1)}{missing[-1]} must be given, for example:\n  {cls.EXAMPLE}")
    for verbs, name, contradicts, why in CONTRADICTIONS:
        if isinstance(options, verbs) and name in said and contradicts(options):
            raise UsageError(f"{labels[name]} {why}")
    if isinstance(options, Losses) or (isinstance(options, Evaluate) and options.loss is not None):  # else the run's, which is not read yet
        loss_terms(options, labels)
    if isinstance(options, Reward):
        scored_terms(options, labels)
    if files:
        _inputs(options, labels)
    return options


def run_config(folder: str) -> str:
    """The configuration of a run folder. Raises UsageError where there is none."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"--resume {folder}: no config.yaml there, so this is not a run folder")
    return str(path)


def going_on(options: AnyOptions) -> tuple[AnyOptions, AnyOptions]:
    """(the options of the run folder `options.resume`, those with which it is to go on).

    The latter are `options` themselves where they are whole, as a command line gives them; else the run's own with every value of
    `options` that is not a default in its place.
    """
    folder, cls = options.resume, type(options)  # type: ignore[attr-defined]
    own = cls(**_values(load_config(run_config(folder), cls)))
    if all(getattr(options, spec.name) for spec in specs(cls) if spec.required and spec.name != "output"):
        return own, options
    changed = {spec.name: value for spec in specs(cls) if (value := getattr(options, spec.name)) != spec.default}
    return own, replace(own, **changed)  # type: ignore[type-var]


def _values(given: Given) -> dict[str, Any]:
    """Given -> keyword arguments: the loss's arguments become one table."""
    values = {name: value for name, (value, _) in given.items() if not name.startswith("loss.")}
    arguments = {name.removeprefix("loss."): value for name, (value, _) in given.items() if name.startswith("loss.")}
    return values | ({"loss_arguments": arguments} if arguments else {})


# --- YAML ----------------------------------------------------------------------------------------------------------------------


class _Writer(yaml.SafeDumper):
    """Text with unprintable characters goes in double quotes: elsewhere PyYAML reads U+0085 and its like back as a space."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Writer.add_representer(str, _Writer.represent_text)


def resolved_yaml(options: Options) -> str:
    """Every option of a verb as YAML that `--config` reads back to equal options. Stable order."""
    table = {}
    for spec in specs(type(options)):
        value = getattr(options, spec.name)
        if spec.kind == "numbers":
            value = {name: float(number) for name, number in value.items()}
        table[spec.key] = float(value) if spec.kind == "number" and isinstance(value, int) else value
    return str(yaml.dump(table, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1000))


def load_yaml(text: str, path: str | Path, cls: type[Options]) -> dict[str, Any]:
    """Keyword arguments for `cls` from YAML. Raises UsageError with file:line for anything that is not an option with its value."""
    return _values(read_yaml(text, path, cls))


def load_config(path: str, cls: type[Options]) -> Given:
    """What `--config FILE` gives. Raises UsageError where there is no such file, or it is no text."""
    if re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE):
        raise UsageError(f"--config {path}: a configuration is a file on this machine, not an address")
    try:
        text = Path(path).read_text(encoding="utf-8")  # a byte-order mark is skipped by YAML itself
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"--config {path}: {(error.strerror or str(error)).lower()}") from None
    return read_yaml(text, path, cls)


def read_yaml(text: str, path: str | Path, cls: type[Options]) -> Given:
    """YAML -> field -> (value, 'file:line: key'). The text is composed, never constructed: no tag makes an object, types come from the options."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {str(error).splitlines()[0] if str(error) else 'nested too deep'}") from None
    if root is None:
        return {}
    known = {spec.key: spec for spec in specs(cls)}
    given: Given = {}
    lines: dict[str, int] = {}
    for place, key, node in _entries(root, path):
        if key not in known and not (key.startswith("loss.") and "loss_arguments" in known):
            raise UsageError(f"{place} unknown key {key!r}{hint(key, cls)}")
        spec = known.get(key) or loss_argument(key.removeprefix("loss."))
        name = spec.name if key in known else key
        if spec.kind == "numbers":
            entries = [(where, f"loss.{argument}", child) for where, argument, child in _entries(node, path)]
        else:
            entries = [(place, name, node)]
        for where, name, child in entries:
            if name in lines:
                raise UsageError(f"{where} {name.rstrip('_')!r} was already given on line {lines[name]}")
            lines[name] = child.start_mark.line + 1
            label = f"{where} {name.rstrip('_')}"
            given[name] = (_typed(loss_argument(name[5:]) if name.startswith("loss.") else spec, child, label), label)
    return given


def _entries(node: Any, path: str | Path) -> Iterator[tuple[str, str, Any]]:
    """('file:line:', key with underscores, value node) of a mapping."""
    if not isinstance(node, yaml.MappingNode) or not node.tag.endswith(":map"):
        raise UsageError(f"{path}:{node.start_mark.line + 1}: expected lines of 'option: value'")
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}:"
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{place} a key must be the name of an option")
        yield place, key.value.replace("-", "_"), value


def _typed(spec: Spec, node: Any, label: str) -> Any:
    """The value of a node in the type that its option asks for; a single text is a list of one."""
    if isinstance(node, yaml.SequenceNode) and spec.kind == "texts" and node.tag.endswith(":seq"):
        value = [_typed(spec._replace(kind="text"), child, label) for child in node.value]
        check(spec, value, label)
        return value
    if not isinstance(node, yaml.ScalarNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a table"
        raise UsageError(f"{label} must be {spec.expected}, not {what}")
    if not re.fullmatch(r"tag:yaml\.org,2002:(str|int|float|bool|null|timestamp|merge|value)", node.tag):
        raise UsageError(f"{label} has the tag {node.tag.replace('tag:yaml.org,2002:', '!!')!r}; only plain values are accepted")
    if node.style is None and node.tag.endswith(":null"):
        check(spec._replace(kind="text") if spec.kind == "texts" else spec, None, label)
        return None
    if node.style is not None and spec.kind not in ("text", "texts") and node.value not in (spec.choices or ()):
        raise UsageError(f"{label} must be {spec.expected}, not the text {node.value!r} (leave out the quotes)")
    value = convert(spec, node.value, label)
    return [value] if spec.kind == "texts" else value
