"""What every verb that trains on files does: files in, a run directory with a model and its evidence out.

read -> audit -> ids -> split by prompt -> reference column -> self-check -> sample -> train -> sample -> model, results, report.
A verb says what it minimises and which records it reads (`Task`); all else is the same. `--resume` finds all it needs in the run
directory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import (
    adapters,
    checkpoints,
    engine,
    estimate,
    intake,
    models,
    monitors,
    reference,
    report,
    rollouts,
    runs,
    selfcheck,
    trackers,
)
from .batches import Order, Step
from .config import Fitting, OnPolicy, Training, going_on, resolved_yaml, run_config, specs
from .errors import CheckpointError, DataError, NumericsError, ReportError, UsageError
from .evaluate import Drawn, draw, held_out, judged, paired_difference, summary
from .files import atomic_write, fingerprint, read_json, require_new, run_lock, size_text, write_json
from .formats import identity
from .objectives import Objective, partition, readable
from .readout import packs, scores
from .records import Record, Text
from .rewards import KINDS, scorer
from .sampling import sample
from .screen import bar, clean, say, with_error, with_interval
from .store import Store, from_ids
from .tokens import Codec, encode_prompt, end_ids, make_codec


@dataclass(frozen=True)
class Rolls:
    """What sets a verb whose answers are the policy's own apart from one that reads them.

    Args:
        k: options -> answers per prompt. kept: options -> what rounds carry. make: options -> how a round is made.
    """

    k: Callable[[Any], int]
    kept: Callable[[Any], rollouts.Kept]
    make: Callable[[Any], rollouts.Make]


@dataclass(frozen=True)
class Task:
    """What sets one training verb apart from another.

    Args:
        verb: its name. options: its options class. objective: options -> what to minimise.
        select: (record, options) -> the record as it is trained on, or None where there is nothing to learn from it.
        then: run folder -> the command that a person would want next.
        moving: options -> (alpha, every) of a reference that follows the policy, or None.
        refuse: (what was seen of a set of files, options): raises DataError where they are not what this verb reads.
        wrap: (the language model as loaded, options) -> what trains in its place.
        resample: (store, training records, hashes of their prompts, options) -> (store, training records) to train on.
        publish: (setup, options, run folder, folder of the model that was written) -> what results.json says beyond the rest.
        rolls: how answers are sampled, or None where they are read.
        learner: (setup, options) -> what trains: the policy, alone or beside a value model. factor: (weight, options) -> its share
            of the learning rate.
    """

    verb: str
    options: type[Fitting]
    objective: Callable[[Any], Any]
    select: Callable[[Record, Any], Record | None]
    then: Callable[[Path], str]
    moving: Callable[[Any], tuple[float, int] | None] = lambda options: None
    refuse: Callable[[intake.Seen, Any], None] = lambda seen, options: None
    wrap: Callable[[Any, Any], Any] = lambda model, options: model
    resample: Callable[[Store, np.ndarray, np.ndarray, Any], tuple[Store, np.ndarray]] = lambda store, train, prompts, options: (
        store, train)  # fmt: skip
    publish: Callable[[Setup, Any, Path, Path], dict[str, Any]] = lambda setup, options, folder, model: {}
    rolls: Rolls | None = None
    learner: Callable[[Setup, Any], Any] = lambda setup, options: setup.model
    factor: Callable[[str, Any], float] = lambda name, options: 1.0

    @property
    def prompts(self) -> bool:
        """Whether only the prompts of the data are read."""
        return self.rolls is not None


@dataclass(frozen=True)
class Setup:
    """Everything that a run stands on, checked.

    Args:
        model: the policy. frozen: the reference model, or None where it is the policy with its adapter off.
        train, held: store records. prompts: held-out prompts to sample from. manifest: what will be written of all this.
        texts: store record -> its prompt. reward: of the answers that train, or None. learner: what trains: the model, or it and more.
    """

    model: Any
    frozen: Any | None
    tokenizer: Any
    codec: Codec
    store: Store
    train: np.ndarray
    held: np.ndarray
    prompts: list[Text]
    columns: Mapping[str, np.ndarray]
    objective: Objective
    rule: Any | None
    truth: Any | None
    order: Order | rollouts.Rounds
    lr: float
    device: str
    manifest: dict[str, Any]
    meter: estimate.Meter
    texts: Callable[[int], Text]
    reward: Any | None
    learner: Any = None


def prompt_alone(record: Record, options: OnPolicy) -> Record:
    """What a verb reads whose answers are the policy's own."""
    return Record(record.prompt, (), where=record.where)


def sampled(options: Fitting) -> Training:
    """The same options with those about samples; a verb that draws none has them at their defaults, and no prompts."""
    if isinstance(options, Training):
        return options
    return Training(**{spec.name: getattr(options, spec.name) for spec in specs(Fitting)}, eval_prompts=0)


def run(task: Task, options: Fitting) -> int:
    """Train. Raises PreftuneError with the exit code of what went wrong; nothing half-written is left behind."""
    if options.resume is not None:
        folder = Path(options.resume)
        run_config(options.resume)
        with run_lock(folder), engine.fits(options.resume):
            return _resume(task, folder, options)
    folder = Path(str(options.output))
    require_new(folder)
    with engine.fits():
        setup = prepare(task, options)
    require_new(folder)
    with runs.publish_folder(folder, owned=False) as staging:  # a folder with a configuration is always a whole run folder
        atomic_write(staging / "config.yaml", resolved_yaml(options))
        write_json(staging / "manifest.json", setup.manifest)
    with run_lock(folder), engine.fits(str(folder)):
        return _train(task, options, folder, setup, None)


def _resume(task: Task, folder: Path, options: Fitting) -> int:
    before = read_json(folder / "manifest.json")
    if before["stage"] != task.verb:
        raise UsageError(
            f"--resume {folder}: this is a run of {before['stage']}; continue it with preftune {before['stage']} --resume {folder}"
        )
    own, options = going_on(options)
    changes = runs.changed_options(own, options)
    found = checkpoints.latest(folder)
    finished = (folder / "results.json").is_file()
    if finished and not changes:
        say(f"{folder}: this run is finished")
        if options.report and not (folder / "report.html").is_file():
            say(f"written {_report(folder)}")
        return 0
    for reason in found.skipped if found else ():
        say(f"checkpoint skipped: {reason}")
    taken = max((row["step"] for row in runs.Log(folder / "metrics.jsonl").rows() if "loss" in row), default=0)
    if taken and not found:
        raise CheckpointError(f"{folder}: its metrics tell of {taken} steps, but no checkpoint is there; start a new run")
    if found and gate_of(sampled(options), 1) and "gate" not in found.state["watch"]:
        raise UsageError(f"--resume {folder}: --stop plateau and --publish reward look at a run from its start; start a new run")
    # What is quick to compare is compared first: a forbidden change is told before minutes of preparation.
    seen = before | at_a_glance(before, sampled(options))
    runs.refuse_changes(folder, [*changes, *runs.changed_content(before, seen)], options.allow_change)
    setup = prepare(task, options, fresh=False)
    changes += runs.changed_content(before, setup.manifest)
    runs.refuse_changes(folder, changes, options.allow_change)
    step, total = found.step if found else 0, min(options.max_steps or setup.order.steps, setup.order.steps)
    if changes and (total < step or (finished and total == step)):
        raise UsageError(f"--resume {folder}: {step} steps are taken and these options ask for {total}: nothing is left to train")
    for change in changes:
        say(f"changed after step {step}: {change}")
    for kind in set(options.allow_change) - {c.kind for c in changes}:
        say(f"--allow-change {kind}: nothing of it changed")
    options = replace(options, resume=None, allow_change=[])
    manifest = runs.with_changes(setup.manifest if changes else before, before, changes, step)
    if manifest != {"changes": []} | before:
        (folder / "results.json").unlink(missing_ok=True)
        write_json(folder / "manifest.json", manifest)
        atomic_write(folder / "config.yaml", resolved_yaml(options))
    return _train(task, options, folder, setup, found)


def at_a_glance(before: Mapping[str, Any], options: Training) -> dict[str, Any]:
    """Of a manifest what needs neither model nor tokens: versions, the data files, rewards that are a file of their own."""
    files, data = data_files(options)
    prints = before["fingerprints"] | {"data": data}
    if data != before["fingerprints"]["data"]:
        prints["reference"] = "unknown"  # it stands on the tokens of these files
    if all(spec is None or spec.partition(":")[0] in KINDS for spec in reward_specs(options)):
        prints |= {"reward": reward_print(*scorers(options, "cpu"))}
    return {"versions": runs.versions(), "files": files, "fingerprints": prints}


# ---------------------------------------------------------------- preparing


def prepare(task: Task, own: Fitting, *, fresh: bool = True) -> Setup:
    """Read, audit, encode, split, load, build the reference column and check everything; writes nothing but the column's cache."""
    options = sampled(own)
    torch.manual_seed(options.seed)
    objective = task.objective(own)
    engine.optimiser_named(options.optimiser)
    trackers.require(options.track, offline=options.offline)
    device = models.pick_device(options.device, flex=options.attention == "flex")
    scoring, truth, training_reward = scorers(options, device)
    work = reference.cache_folder().with_name("work")
    taken = intake.read_records(task, own, work)
    facts = taken.facts
    say(f"read {facts['read']} records ({facts['layout']})")
    meter = estimate.meter(device)
    model, tokenizer = models.load(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
    size = models.parameters_of(model)
    if options.adapter == "continue":
        model = adapters.go_on(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
    model = models.use_flex(model) if options.attention == "flex" else model
    models.use_threads(model, options.threads)
    if refusal := models.packing_refusal(model.config):
        say(f"one row per response: {refusal}")
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, finish=options.finish,
                       control_tokens=options.control_tokens)  # fmt: skip
    window = models.window_of(model.config)
    base = models.weights_fingerprint(str(options.model), offline=options.offline)
    plan = intake.merge_prompts(taken, codec, intake.longest(options, window, prompts=task.prompts))
    store, found_in = intake.encode_records(taken, plan, codec, options, window=window, mismatched=objective.mismatched, folder=work,
                                            members="member" in objective.needs, weights=base, prompts=task.prompts,
                                            nested=objective.reads in ("verdicts", "grades") and objective.read == "scalar")  # fmt: skip
    chosen = np.array(found_in.kept)
    kept = plan.stands[chosen]  # the shelf's record of each of the store's
    held = intake.split_by_prompt(taken.prompt[kept], options.holdout, options.seed) if plan.first < 0 else chosen >= plan.first
    usable = np.full(len(store), True) if task.prompts else judged(store, objective)
    train = np.flatnonzero(~held) if task.prompts else readable(store, objective, np.flatnonzero(~held))
    counted = {} if task.prompts else _partition(store, train, objective)
    key = _identity(store, base, options, device)
    columns = {} if task.prompts else _columns(model, store, key, objective, options, device)
    held_index = np.flatnonzero(held & usable & (not task.prompts))
    if not len(held_index) and (options.patience or options.publish == "best"):
        raise DataError(f"--{'patience' if options.patience else 'publish best'}: no held-out record has {objective.reads}")

    def texts(record: int) -> Text:
        return taken.shelf[int(kept[record])].prompt

    looked_at, some = _probe(model, store, train, codec, texts) if task.prompts else (store, train)
    itself = _beside(objective, None if options.adapter == "continue" else model)  # the policy as it stands is the reference
    found = selfcheck.check(model, looked_at, some, itself, columns, codec, dtype=options.dtype, device=device, fresh=not task.prompts)
    say(f"self-check: packed log-probs equal the model's own to {found['packed_error']:.1e}"
        + (f"; start loss {found['start_loss']:.4f}" if "start_loss" in found else ""))  # fmt: skip
    model, frozen, trained = what_trains(task.wrap(model, own), options, device,
                                         frozen_too=task.prompts or objective.reference == "distribution")  # fmt: skip
    objective = _beside(objective, frozen)
    found |= selfcheck.check_scores(model, store, train, objective, dtype=options.dtype, device=device) if scores(model) else {}
    lr, reason = learning_rate(options, objective, size, reward=scores(model))
    store, train = task.resample(store, train, taken.prompt[kept][train], own)
    order = _order(task, own, len(train), fresh=fresh)
    facts |= {"merged": len(taken.shelf) - len(plan.stands), "kept": len(store), "train": len(train), "dropped": dict(found_in.dropped),
              "held_out": int((held & usable).sum()), "encoding": dict(found_in.cases), "refused": [str(e) for e in found_in.refused[:100]]}
    files, data = data_files(options)
    intake.unchanged(taken, (*options.data, *options.eval_data))
    for name, by in (("eval_reward", scoring), ("eval_truth", truth)):
        facts |= {name: {"rule": by.name, "sha256": by.fingerprint}} if by else {}
    manifest = {
        "stage": task.verb, "versions": runs.versions(), "hardware": runs.hardware(device, torch.get_num_threads()), "seed": options.seed,
        "fingerprints": {"data": data, "tokeniser": fingerprint(codec.backend.to_str()),
                         "template": fingerprint(codec.describe()), "base": base, "reference": key,
                         "reward": reward_print(scoring, truth, training_reward)},
        "base": {"name": options.model, "from": "folder" if os.path.isdir(str(options.model)) else "hub"},
        "files": files,
        "codec": codec.describe() | {"template": codec.template_name}, "records": {k: v for k, v in facts.items() if k != "audit"},
        "audit": facts["audit"], "self_check": found, "parameters": size, "trained": trained, "learning_rate": lr,
        "learning_rate_reason": reason, "packed": packs(model), "loss": objective.name, "partition": counted,
    }  # fmt: skip
    prompts = intake.prompts_to_sample(taken, kept, store, held, options, window)
    require_window(options, min(options.max_steps or order.steps, order.steps), len(prompts))
    setup = Setup(model, frozen, tokenizer, codec, store, train, held_index, prompts, columns, objective, scoring, truth, order, lr,
                  device, manifest, meter, texts, training_reward)  # fmt: skip
    return _ready(task, setup, own)


def _ready(task: Task, setup: Setup, options: Fitting) -> Setup:
    """The setup with what trains, once memory holds it."""
    setup = replace(setup, learner=task.learner(setup, options))
    setup.manifest["memory"] = memory(setup, sampled(options), task.rolls.k(options) if task.rolls else 0)
    return setup


def learning_rate(options: Training, objective: Objective, size: int, *, reward: bool) -> tuple[float, str]:
    """The peak rate and, where --lr auto chose it, why; told."""
    lr, reason = engine.auto_rate(size, lora=bool(options.lora) or options.adapter == "continue", supervised=objective.reads == "responses",
                                  reward=reward)  # fmt: skip
    lr, reason = (options.lr, "") if isinstance(options.lr, float) else (lr, reason)
    say(f"learning rate {lr:g}{f' ({reason})' if reason else ''}")
    return lr, reason


def data_files(options: Training) -> tuple[list[dict[str, Any]], str]:
    """The data files as the manifest lists them, and the fingerprint of all."""
    found = [(p, *identity(p)) for p in (*options.data, *options.eval_data)]
    listed = [{"name": p, "sha256": sha, "weight": weight, "held_out": i >= len(options.data)} for i, (p, sha, weight) in enumerate(found)]
    return listed, fingerprint([rest for _, *rest in found], options.from_scores)


def reward_specs(options: Training) -> tuple[str | None, str | None, str | None]:
    """--eval-reward, --eval-truth, --reward."""
    return options.eval_reward, options.eval_truth, options.reward if isinstance(options, OnPolicy) else None


def scorers(options: Training, device: str) -> tuple[Any | None, Any | None, Any | None]:
    """The rewards of --eval-reward, --eval-truth and --reward, None where not asked for; without the first the last stands for it."""
    found = [scorer(spec, device=device, dtype=options.dtype, offline=options.offline, micro_tokens=options.micro_tokens) if spec else None
             for spec in reward_specs(options)]  # fmt: skip
    return found[0] or found[2], found[1], found[2]


def reward_print(*rewards: Any | None) -> str:
    """What of the rewards a resumed run compares with its beginning: of one its own fingerprint, of several all in one."""
    found = list(dict.fromkeys(by.fingerprint for by in rewards if by))
    return fingerprint(found) if len(found) > 1 else found[0] if found else "none"


def evaluation_every(options: Training, total: int) -> int:
    """Steps between evaluations."""
    return options.eval_every or max(1, math.ceil(total / (20 if options.stop else 10)))


def gate_of(options: Training, total: int) -> monitors.Gate | None:
    """What --stop plateau and --publish reward go by. Evaluations count once the learning rate has risen."""
    if options.stop is None and publishes(options) != "reward":
        return None
    return monitors.Gate(options.plateau_window, options.kl_limit or monitors.KL_LIMIT, options.kl_unit, options.plateau_band,
                         engine.warm_steps(options.warmup, total))  # fmt: skip


def require_window(options: Training, total: int, prompts: int) -> None:
    """Raises UsageError where --stop plateau could never stop the run before its end, or too few prompts are there to tell."""
    if options.stop is None:
        return
    every, fewest, warm = evaluation_every(options, total), options.plateau_window + 1, engine.warm_steps(options.warmup, total)
    if (has := math.ceil(total / every) - warm // every) < fewest:
        most = next((n for n in range(every, 0, -1) if math.ceil(total / n) - warm // n >= fewest), 0)
        hint = f"--eval-every {most}" if most else "more --epochs or a smaller --batch-size"
        raise UsageError(f"--stop plateau: the run has {has} evaluations after its warm-up ({total} steps, one every {every}) and needs "
                         f"{fewest} to be stopped before its end: {hint}")  # fmt: skip
    if prompts < monitors.FEWEST_PROMPTS:
        raise UsageError(f"--stop plateau: {prompts} held-out prompts to sample from, {monitors.FEWEST_PROMPTS} are needed to tell flat "
                         "from not: --eval-prompts, --holdout or --eval-data")  # fmt: skip


def _order(task: Task, options: Fitting, records: int, *, fresh: bool) -> Order | rollouts.Rounds:
    """Which records make which step. Raises DataError for none, UsageError for a reference that would never move."""
    if not records:
        raise DataError("no training prompt can be used")
    order: Order | rollouts.Rounds = Order(records, options.batch_size, options.epochs, options.seed)
    if isinstance(options, OnPolicy):
        size = options.rollout_prompts or options.batch_size
        order = rollouts.Rounds(records, size, options.batch_size, options.passes, options.epochs, options.seed)
    total = min(options.max_steps or order.steps, order.steps)
    if (follows := task.moving(options)) and follows[1] > total:
        raise UsageError(f"--reference-every {follows[1]}: the run has {total} steps, so its reference would never move")
    if total < 50 and fresh:
        say(f"only {total} steps: more epochs or a smaller --batch-size would train further")
    return order


def _probe(model: Any, store: Store, train: np.ndarray, codec: Codec, texts: Callable[[int], Text]) -> tuple[Store, np.ndarray]:
    """Short samples after a few training prompts, to check on: prompts alone have no log-probs."""
    chosen = selfcheck.probe(store, train)
    prompts = [encode_prompt(codec, texts(r)) for r in chosen]
    samples = sample(model, prompts, ends=[end_ids(codec, texts(r)) for r in chosen], max_tokens=8, seed=0)
    # A policy may say BOS; whether it stands once is asked of the prompt.
    said = [[tuple(i for i in s.ids if i not in (codec.bos, codec.eos)) or prompt[-1:] for s in row]
            for prompt, row in zip(prompts, samples, strict=True)]  # fmt: skip
    return from_ids(prompts, said), np.arange(len(chosen))


def _as_rolled(setup: Setup, k: int, max_tokens: int) -> tuple[Store, np.ndarray, Order]:
    """The longest prompts with answers of full length: what the largest step will hold."""
    size = np.sort(np.diff(setup.store.start)[setup.store.record_start[setup.train]])[::-1][: setup.order.batch_size]
    store = from_ids([(0,) * int(n) for n in size], [[(0,) * max_tokens] * k for _ in size])
    return store, np.arange(len(size)), Order(len(size), len(size), 1, 0)


def memory(setup: Setup, options: Training, answers: int = 0) -> dict[str, int] | None:
    """What the run will need, told; None for an architecture whose passes hang on more than shapes. Raises OutOfMemoryError."""
    total = min(options.max_steps or setup.order.steps, setup.order.steps)
    prompts = [len(encode_prompt(setup.codec, prompt)) for prompt in setup.prompts]
    store, train, order = setup.store, setup.train, setup.order
    if not isinstance(order, Order):
        store, train, order = _as_rolled(setup, answers, options.sample_tokens)
    try:
        needs = estimate.foresee(setup.model, setup.frozen, store, train, setup.held, order, total=total,
                                 micro_tokens=options.micro_tokens, optimiser=options.optimiser, prompts=prompts,
                                 sample_tokens=options.sample_tokens, samples=options.eval_samples, device=setup.device,
                                 value=getattr(setup.learner, "value", None))  # fmt: skip
    except (RuntimeError, ValueError, TypeError) as error:  # the meta device has no values to branch on
        say(f"memory: not estimated for {type(setup.model).__name__}: {clean(str(error).splitlines()[0])[:120]}")
        return None
    say(estimate.describe(needs))
    estimate.require(needs, setup.device, checkpointing=options.gradient_checkpointing)
    return needs.numbers()


def _beside(objective: Any, frozen: Any | None) -> Any:
    """The objective with the reference that it runs beside the policy, where it does."""
    return replace(objective, frozen=frozen) if objective.reference == "distribution" else objective


def what_trains(model: Any, options: Training, device: str, *, frozen_too: bool) -> tuple[Any, Any | None, dict[str, Any]]:
    """The policy, the frozen reference model where it is another one, and what of the policy trains, for the manifest."""
    kept: list[str] = []
    frozen = None
    if options.lora:
        model = models.add_lora(
            model, rank=options.lora, alpha=options.lora_alpha, targets=options.lora_targets, seed=options.seed
        )
    elif (options.eval_prompts or frozen_too) and options.adapter == "merge":
        frozen, _ = models.load(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
        frozen = models.use_flex(frozen) if options.attention == "flex" else frozen
    if options.freeze:
        kept = models.freeze(model, options.freeze)
    if options.gradient_checkpointing:
        models.checkpoint_layers(model)
    live = [p for p in model.parameters() if p.requires_grad]
    count = {"parameters": sum(p.numel() for p in live), "tensors": len(live), "of": models.parameters_of(model), "frozen": kept}
    if count["parameters"] < count["of"]:
        say(f"training {count['parameters']:,} of {count['of']:,} weights")
    if (given := _given(options)) and options.lora:
        why = _apart(model, given)
        count["adapter"] = f"none: {why}, so only model/ holds the sum" if why else "joined with the given one: stands on that one's base"
    return model, frozen, count


def _apart(model: Any, given: Path) -> str | None:
    """Why the run's adapter and the given one are not one adapter, or None."""
    return "a reward model's head does not go into an adapter of two" if scores(model) else adapters.stack_refusal(given)


def _given(options: Training) -> Path | None:
    """The adapter folder that --model is, if it is one."""
    where = Path(models.resolve(str(options.model), offline=options.offline))
    return where if models.is_adapter(where) else None


def _partition(store: Store, records: np.ndarray, objective: Objective) -> dict[str, float]:
    """What Z is known from, told."""
    found = partition(store, records, objective)
    if found:
        say(f"Z from {found['samples']:.3g} samples a prompt, of which {found['effective']:.3g} count: known bias of its values "
            f"{found['bias']:+.2g} (the rewards of a prompt's samples spread by {found['spread']:.2g})")  # fmt: skip
    return found


def _identity(store: Store, base: str, options: Training, device: str) -> str:
    """Of the reference column. Merged weights are rounded, those of an adapter beside its base are not: two references."""
    return reference.identity(store, base + " apart" * (options.adapter == "continue"),
                              dtype=options.dtype + " flex" * (options.attention == "flex"), device=device)  # fmt: skip


def _columns(model: Any, store: Store, key: str, objective: Objective, options: Training, device: str) -> dict[str, np.ndarray]:
    if objective.reference == "none":
        return {}
    with bar("reference", len(store)) as advance:
        column, reused = reference.fetch(model, store, key, micro_tokens=options.micro_tokens, device=device, progress=advance)
    say(f"reference log-probs: {'reused' if reused else 'computed'} ({store.trained.sum():,} tokens)")
    return {"reference": column}


# ---------------------------------------------------------------- training


def _evaluate(options: Training, setup: Setup, state: engine.State) -> tuple[dict[str, Any], Drawn | None]:
    """One evaluation line and the samples behind it. The sampling seed never changes: before and after are paired."""
    line: dict[str, Any] = {"step": state.step, "epoch": state.step / setup.order.per_epoch}
    if len(setup.held):
        found = held_out(state.model, setup.objective, setup.store, setup.held, setup.columns, micro_tokens=options.micro_tokens,
                         device=setup.device)  # fmt: skip
        line |= {f"eval/{name}": value for name, value in found.items()}
        if not math.isfinite(line["eval/loss"]):
            raise NumericsError(f"step {state.step}: the held-out loss is {line['eval/loss']:g}; the last checkpoint is from before")
    if not setup.prompts:
        return line, None
    drawn = draw(setup.model, setup.frozen, setup.codec, setup.prompts, rule=setup.rule, max_tokens=options.sample_tokens,
                 k=options.eval_samples, seed=options.seed, micro_tokens=options.micro_tokens, device=setup.device,
                 truth=setup.truth)  # fmt: skip
    return line | summary(drawn), drawn


def _sample_rows(setup: Setup, drawn: Drawn, step: int) -> list[dict[str, Any]]:
    out = []
    for i, prompt in enumerate(setup.prompts):
        shown = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
        for j, text in enumerate(drawn.texts[i]):
            out.append({"step": step, "prompt": shown, "sample": j, "response": text, "finished": bool(drawn.finished[i, j]),
                        "tokens": int(drawn.length[i, j]), "reward": None if drawn.reward is None else float(drawn.reward[i, j]),
                        **({} if drawn.truth is None else {"truth": float(drawn.truth[i, j])}),
                        "kl": float(drawn.kl_rb[i, j]), "entropy": float(drawn.entropy[i, j]),
                        "repeated": float(drawn.repeated[i, j])})  # fmt: skip
    return out


def _checkpoint_bytes(state: engine.State) -> int:
    """Weights and two moments of each, and the weights of a reference that moves, in fp32."""
    anchor = state.moving.masters if state.moving else {}
    return 12 * sum(m.numel() for m in state.masters.values()) + 4 * sum(m.numel() for m in anchor.values())


def _train(task: Task, own: Fitting, folder: Path, setup: Setup, found: checkpoints.Checkpoint | None) -> int:
    options = sampled(own)
    total = min(options.max_steps or setup.order.steps, setup.order.steps)
    rate = engine.schedule(options.schedule, setup.lr, steps=total, warmup=options.warmup)
    state = engine.make_state(setup.learner, rate=rate, clip=options.clip, weight_decay=options.weight_decay,
                              betas=(options.adam_beta1, options.adam_beta2), optimiser=options.optimiser,
                              factor=lambda name: task.factor(name, own))  # fmt: skip
    kept = task.rolls.kept(options) if task.rolls else None
    if follows := task.moving(own):
        state.moving = reference.moving(setup.model, state.masters, alpha=follows[0], every=follows[1])
        say(f"the reference moves every {follows[1]} steps: a second forward pass a step, {size_text(state.moving.nbytes)} more memory")
    metrics, samples = runs.Log(folder / "metrics.jsonl"), runs.Log(folder / "samples.jsonl")
    runs.require_space(
        folder, (options.keep + 2) * _checkpoint_bytes(state), "a run with its checkpoints"
    )
    if found:
        engine.restore(state, found.tensors("weights"), found.tensors("optimizer"), found.state,
                       found.tensors("reference") if state.moving else None)  # fmt: skip
        say(f"resumed after step {state.step}")
    metrics.cut(found.state["metrics_lines"] if found else 0)
    samples.cut(found.state["samples_lines"] if found else 0)
    every = evaluation_every(options, total)
    save_every = options.save_every or every
    gate = gate_of(options, total)

    def over() -> bool:
        return stopped(options, state.watch) is not None

    def save() -> None:
        numbers = engine.state_numbers(state) | {"metrics_lines": metrics.lines, "samples_lines": samples.lines}
        numbers["needs"] = [step for step in (kept_step(options, state.watch),) if step is not None]
        tensors = engine.state_tensors(state)
        if kept is not None:
            numbers, tensors = numbers | {"rollouts": rollouts.numbers(kept)}, tensors | {"rollouts": rollouts.tensors(kept)}
        checkpoints.save(folder, state.step, tensors, numbers, keep=options.keep)

    def evaluate() -> bool:
        line, drawn = _evaluate(options, setup, state)
        newest = watch(options, state, gate, line, drawn)
        for row in _sample_rows(setup, drawn, state.step) if drawn else ():
            samples.add(row)
        metrics.add(line)
        track(line)
        say(f"step {state.step}/{total}  {describe(line)}")
        return newest

    sending = trackers.tracking(options.track, folder, metrics.rows())
    with runs.stop_on_signals() as stop, bar("training", total) as advance, sending as track:
        if not found:
            evaluate()
            save()
        stop.check(save, task.verb, folder)
        steps = _steps(task, options, setup, state, kept, found, state.step if over() else total)
        objective = _beside(setup.objective, state.moving.model) if state.moving else setup.objective
        for line in engine.train(state, steps, objective, where=setup.store.where, auto_micro=options.auto_micro, ahead=not task.prompts):
            line = {"step": line["step"], "epoch": state.step / setup.order.per_epoch} | line
            metrics.add(line)
            track(line)
            announce(line)
            advance(state.step, total, f"loss {line['loss']:.4f}")
            newest = (state.step % every == 0 or state.step == total) and evaluate()
            if state.step % save_every == 0 or state.step == total or newest or over():
                save()
            if why := stopped(options, state.watch):
                say(f"stopped early: {why}")
                break
            stop.check(save, task.verb, folder)
    return _finish(task, own, folder, setup, state, metrics, samples)


def _steps(task: Task, options: Training, setup: Setup, state: engine.State, kept: rollouts.Kept | None,
           found: checkpoints.Checkpoint | None, total: int) -> Iterator[Step]:  # fmt: skip
    """The steps from here to `total`: of records, or of answers as they are sampled."""
    if task.rolls is None or kept is None or setup.reward is None or not isinstance(setup.order, rollouts.Rounds):
        assert isinstance(setup.order, Order)
        return engine.steps(setup.store, setup.train, setup.order, start=state.step, total=total, micro_tokens=options.micro_tokens,
                            columns=setup.columns, share=packs(setup.model), device=setup.device)  # fmt: skip
    assert isinstance(options, OnPolicy)
    source = rollouts.Source(
        setup.model, getattr(state.model, "value", None), setup.frozen, setup.codec, setup.store, setup.texts, setup.reward.rollouts,
        k=task.rolls.k(options), max_tokens=options.sample_tokens, temperature=options.temperature, eos_penalty=options.eos_penalty,
        seed=options.seed, micro_tokens=options.micro_tokens, device=setup.device)  # fmt: skip
    if found:
        rollouts.restore(kept, source, found.state["rollouts"], found.tensors("rollouts"))
    return rollouts.steps(source, setup.order, kept, task.rolls.make(options), setup.train, start=state.step, total=total)


def announce(line: Mapping[str, Any]) -> None:
    """Say what was out of the ordinary in a step."""
    for alarm in line.get("alarms", ()):
        say(f"step {line['step']}: {alarm}")
    if "did_not_fit" in line:
        sizes = ", then ".join(map(str, line["did_not_fit"]))
        say(f"step {line['step']}: {sizes} tokens in one pass did not fit: taken in passes of {line['micro_tokens']}, as will be all "
            "later steps")  # fmt: skip
    if "spike_records" in line:
        say(f"step {line['step']}: the loss leapt to {line['loss']:.4g} (above {line['spike_limit']:.4g} is no noise); its records: "
            f"{engine.some(line['spike_records'])}")  # fmt: skip


def publishes(options: Training) -> str:
    """Which weights model/ gets: 'best' (lowest held-out loss), 'reward' (highest sampled reward within the KL limit) or 'last'."""
    return options.publish or ("reward" if options.stop else "best" if options.patience else "last")


def kept_step(options: Training, watch: Mapping[str, Any]) -> int | None:
    """The step whose weights would be published if the run ended now; None for its last."""
    found = {"best": watch.get("best_step"), "reward": (watch.get("gate", {}).get("best") or {}).get("step"), "last": None}
    return found[publishes(options)]


def stopped(options: Training, watch: Mapping[str, Any]) -> str | None:
    """Why the run is over before its last step, in words; None where it goes on."""
    if options.patience is not None and watch.get("waited", 0) >= options.patience:
        return f"{options.patience} evaluations without a lower held-out loss than {watch['mark']:.4f}"
    verdict = watch.get("gate", {}).get("verdict", {})
    return report.gate_sentence(verdict) if verdict.get("why") else None


def watch(options: Training, state: engine.State, gate: monitors.Gate | None, line: dict[str, Any], drawn: Drawn | None) -> bool:
    """Note an evaluation; its line gets the gate's numbers. Returns whether its weights are now those to publish.

    The gate looks at the truth where it is known, else at the reward.
    """
    before = kept_step(options, state.watch)
    if "eval/loss" in line:
        engine.watch_held_out(state, line["eval/loss"], least=options.min_improvement)
    if gate and drawn:
        reward = drawn.reward if drawn.truth is None else drawn.truth
        assert reward is not None
        seen = {k: v for k, v in state.watch.get("gate", {}).items() if k != "verdict"}
        seen = monitors.note(seen, gate, step=state.step, reward=reward, kl=drawn.kl_rb, length=drawn.length)
        verdict = monitors.judge(seen, gate) if options.stop else {}
        line |= monitors.line(verdict)
        state.watch = state.watch | {"gate": seen | {"verdict": verdict}}
    return kept_step(options, state.watch) != before


def accuracy(line: Mapping[str, Any]) -> str:
    """That of an evaluation, with its interval."""
    return with_interval(line["eval/rewards/accuracies"], line["eval/accuracy_low"], line["eval/accuracy_high"])


def describe(line: Mapping[str, Any]) -> str:
    """An evaluation in one line, with the intervals that there are."""
    words = []
    if "eval/loss" in line:
        words.append(f"loss {line['eval/loss']:.4f}")
    if "eval/rewards/accuracies" in line:
        words.append(f"accuracy {accuracy(line)}")
    if "kl_sequence_rb" in line:
        words.append(f"KL {with_error(line['kl_sequence_rb'], line['kl_sequence_rb_se'], '.2f')} nats")
    if "reward" in line:
        words.append(f"reward {with_error(line['reward'], line['reward_se'], '.3f')}")
    return "  ".join(words)


def _finish(task: Task, own: Fitting, folder: Path, setup: Setup, state: engine.State, metrics: runs.Log,
            samples: runs.Log) -> int:  # fmt: skip
    """Model, results and report; then the lines that a person reads."""
    options = sampled(own)
    steps, published = state.step, state.step
    if (kept := kept_step(options, state.watch)) is not None and kept != state.step:
        published = int(kept)
        engine.restore_weights(state, checkpoints.at(folder, published).tensors("weights"))
        say(f"the model is that of step {published}, whose {KEPT[publishes(options)]}")
    with runs.publish_folder(folder / "model") as staging:
        models.save(setup.model, setup.tokenizer, staging)
        more = task.publish(setup, own, folder, staging)
    given = _given(options)
    if options.adapter == "continue" or (options.lora and not (given and _apart(setup.model, given))):
        with runs.publish_folder(folder / "adapter") as staging:
            adapters.save(setup.model, staging, given=given)
    evaluations = [row for row in metrics.rows() if "loss" not in row]
    drawn = samples.rows()
    after = next(row for row in reversed(evaluations) if row["step"] == published)
    rewards = {s: np.array([r["reward"] for r in drawn if r["step"] == s]) for s in (0, published)}
    paired = None
    if setup.rule and len(rewards[0]):
        shape = (len(setup.prompts), options.eval_samples)
        paired = paired_difference(rewards[0].reshape(shape), rewards[published].reshape(shape))
    scored = [e for e in evaluations if "eval/loss" in e]
    waited = {name: found for name, found in state.watch.items() if name != "gate"}
    waited |= {"patience": options.patience, "min_improvement": options.min_improvement}
    results = {
        "stage": task.verb, "loss": setup.objective.name, "steps": steps, "seconds": state.seconds, "tokens": state.tokens,
        "partition": setup.manifest["partition"],
        "before": evaluations[0], "after": after, "paired_reward": paired,
        "spikes": [{k: row[k] for k in ("step", "loss", "spike_limit", "spike_records")} for row in metrics.rows()
                   if "spike_records" in row],
        "round_alarms": [{"step": row["step"], "alarm": text} for row in metrics.rows() for text in row.get("alarms", ())],
        "best_step": min(scored, key=lambda e: e["eval/loss"])["step"] if scored else None,
        "published": {"step": published, "why": publishes(options)},
        "stopped_early": waited if options.patience and state.watch["waited"] >= options.patience else None,
        "gate": gate_results(options, state.watch), "alarms": monitors.alarms([row for row in drawn if row["step"] <= published]),
        "memory": (setup.manifest["memory"] or {}) | {"peak": setup.meter.peak()},
        "model": "model", "command": runs.command(task.verb, own), "next": task.then(folder),
    } | more  # fmt: skip
    write_json(folder / "results.json", results)
    page, fault = None, None
    try:
        page = _report(folder) if options.report else None
    except ReportError as error:
        fault = error
    for text in summary_lines(folder, results, page):
        print(clean(text))
    if fault:
        raise fault
    return 0


def _report(folder: Path) -> Path:
    """Write the report of a finished run. Raises ReportError, whatever went wrong: nothing of the run hangs on its page."""
    try:
        return report.write(folder)
    except Exception as error:
        what = clean(f"{type(error).__name__}: {error}".splitlines()[0])
        raise ReportError(f"{folder}: the run is finished and its model and results stand, but the report could not be drawn ({what})\n"
                          f"  preftune report {folder} writes it") from error  # fmt: skip


KEPT = {"best": "held-out loss is the lowest", "reward": "sampled reward is the highest within the KL limit"}


def gate_results(options: Training, watch: Mapping[str, Any]) -> dict[str, Any] | None:
    """What --stop plateau saw last, and the best evaluation within the limit."""
    if (found := watch.get("gate")) is None or options.stop is None:
        return None
    return {"why": "", **found["verdict"], "best": found["best"], "of": "truth" if options.eval_truth else "reward"}


def span(low: float, high: float) -> str:
    """'0.712', or '0.712 to 0.754'."""
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def summary_lines(folder: Path, results: Mapping[str, Any], page: Path | None) -> list[str]:
    """The five lines that end a run."""
    after, lines = results["after"], []
    if "eval/rewards/accuracies" in after:
        lines.append(f"accuracy      {accuracy(after)} on {after['eval/pairs']} held-out pairs")
    elif "classed" in (told := results.get("reward", {})):
        lines.append(f"accuracy      {with_interval(told['accuracy'], told['low'], told['high'])} of {told['classed']} held-out classes")
    elif "eval/loss" in after:
        lines.append(f"loss          {results['before']['eval/loss']:.4f} -> {after['eval/loss']:.4f}, held out")
    if most := results.get("reward", {}).get("ceiling"):
        lines.append(f"ceiling       {span(most['low'], most['high'])}: the most that agreement with these labels can be "
                     f"({most['from']} of {most['pairs']} pairs)")  # fmt: skip
    if "calibration" in results.get("reward", {}):
        sure = results["reward"]["calibration"]
        lines.append(f"calibration   ECE {sure['ece']:.3f}, {sure['chance']:.3f} by chance")
    if "kl_sequence_rb" in after:
        lines.append(f"KL            {with_error(after['kl_sequence_rb'], after['kl_sequence_rb_se'], '.2f')} nats a response "
                     f"({after['kl_token_rb']:.3f} a token), on fresh samples")  # fmt: skip
    if results["paired_reward"]:
        paired = results["paired_reward"]
        lines.append(f"reward        {results['before']['reward']:.3f} -> {after['reward']:.3f}, difference {paired['difference']:+.3f} "
                     f"[{paired['low']:+.3f}, {paired['high']:+.3f}]")  # fmt: skip
    if (gate := results["gate"]) and gate["why"]:
        lines.append(f"stopped       {report.gate_sentence(gate)}; kept is step {results['published']['step']}")
    if "eval/displacement" in after:
        lines.append(
            f"displacement  {after['eval/displacement']:+.2f} nats (log-prob of held-out chosen responses against the reference)"
        )
    lines.append(f"written       {folder}/model{f', {page}' if page else ''}")
    lines.append(f"next          {results['next']}")
    return lines
