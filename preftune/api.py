"""The verbs as functions, for Python and notebooks: options are those of the command line, errors are raised, runs are objects.

    import preftune

    run = preftune.dpo(model="path/to/model", data="pairs.jsonl", output="runs/first", beta=0.1)
    run.results["after"]["eval/rewards/accuracies"]

Nothing is decided here: a call is checked by `config.build` and done by the verb's stage. Importing this loads neither torch nor numpy.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli import VERBS, stage
from .config import Given, Options, build, hint, load_config, specs
from .errors import UsageError
from .files import read_json, read_jsonl

PRINTED = ("json",)  # options that only say how a verb prints


@dataclass(frozen=True)
class Run:
    """A run folder. Wherever a model is asked for, a run can be given: it stands for the model that it trained.

    Every property reads the folder anew, so that a run that goes on is seen going on.
    """

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def finished(self) -> bool:
        """Whether it trained to its end and wrote its results."""
        return (self.folder / "results.json").is_file()

    @property
    def results(self) -> dict[str, Any]:
        """results.json: before, after, paired_reward, steps, seconds, command. Raises DataError for a run that is not finished."""
        return dict(read_json(self.folder / "results.json"))

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json: versions, hardware, seed, fingerprints, counts of records."""
        return dict(read_json(self.folder / "manifest.json"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: a training line has 'loss', an evaluation line has 'eval/loss'."""
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl: step, prompt, response, reward, kl."""
        return read_jsonl(self.folder / "samples.jsonl")

    @property
    def model(self) -> Path:
        """The folder of the trained model; plain transformers loads it."""
        return self.folder / "model"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        from . import report

        found = report.read_run(self.folder)
        what = found.manifest.get("stage", "run")
        lines = [f"Run({str(self.folder)!r}): {what}{'' if self.finished else ', not finished'}"]
        lines += [f"  {tile.name:<26}{tile.value}  {tile.text}" for tile in report.key_numbers(found)]
        return "\n".join(map(report.visible, lines))

    def _repr_html_(self) -> str:
        from . import report

        return report.summary(self.folder)


@dataclass(frozen=True)
class Checked:
    """What `data_check` found. `facts` is what `preftune data check --json` prints."""

    facts: Mapping[str, Any]

    @property
    def clean(self) -> bool:
        """Whether nothing would stop training or be left out of it."""
        return bool(self.facts["clean"])

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Each with name, level, count, text and where (file:line)."""
        return list(self.facts["findings"])

    def __repr__(self) -> str:
        from .stages import data

        return data.plain(self.facts)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """The run of a folder. Raises UsageError for a folder that no run made."""
    from . import report

    report.read_run(Path(folder))
    return Run(Path(folder))


def options_of(verb: str, given: Mapping[str, Any]) -> Options:
    """The options that keyword arguments mean. Raises UsageError and its sisters, as the command line does.

    A path or a run may stand for text, one text for a list; `config` is a YAML file whose options the others override;
    `loss_arguments` holds what the command line calls --loss.NAME.
    """
    cls = VERBS[verb].options
    known = {spec.name: spec for spec in specs(cls) if spec.name not in PRINTED}
    found: Given = {}
    for name, value in given.items():
        if name == "config":
            continue
        if name not in known:
            raise UsageError(f"{verb.replace(' ', '_')}() takes no {name!r}{hint(name, cls)}")
        spec = known[name]
        if spec.kind == "numbers":
            if not isinstance(value, Mapping):
                raise UsageError(f"{name} must be a table of names and numbers, not {value!r}")
            found |= {f"loss.{key}": (number, f"{name}[{key!r}]") for key, number in value.items()}
            continue
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if spec.kind == "texts":
            value = [value] if isinstance(value, str) else list(value)
            value = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
        found[name] = (value, name)
    config = given.get("config")
    return build(cls, {**(load_config(os.fspath(config), cls) if config is not None else {}), **found})


def _train(verb: str, given: Mapping[str, Any]) -> Run:
    options: Any = options_of(verb, given)
    stage(verb)(options)
    return Run(Path(options.resume or options.output))


def _rows(verb: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that the verb writes; kept in a file only where `output` names one."""
    with tempfile.TemporaryDirectory() as folder:
        options: Any = options_of(verb, {"output": str(Path(folder) / "rows.jsonl")} | dict(given))
        if options.output == "-":
            raise UsageError("output: name a file to keep the rows, or leave it out; they are returned")
        stage(verb)(options)
        return read_jsonl(options.output)


def _check(verb: str, given: Mapping[str, Any]) -> Checked:
    from .stages import data

    options: Any = options_of(verb, given)
    return Checked(data.checked(options))


def _write(verb: str, given: Mapping[str, Any]) -> Path:
    options: Any = options_of(verb, given)
    stage(verb)(options)
    return Path(options.output)


def _rate(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from .stages import rate

    options: Any = options_of(verb, given)
    return rate.rated(options)


def _evaluate(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from .stages import evaluate

    options: Any = options_of(verb, given)
    return evaluate.written(options)


def _compare(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from .stages import compare

    options: Any = options_of(verb, given)
    return compare.compared(options)


def _function(verb: str, do: Callable[[str, Mapping[str, Any]], Any], returns: str) -> Callable[..., Any]:
    """The verb as a function of keywords whose signature and text are the options themselves."""
    cls = VERBS[verb].options

    def call(**options: Any) -> Any:
        return do(verb, options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    listed = [spec for spec in specs(cls) if spec.name not in PRINTED]
    asked = [inspect.Parameter(spec.name, keyword, default=spec.default) for spec in listed]
    call.__name__ = call.__qualname__ = verb.replace(" ", "_")
    call.__signature__ = inspect.Signature([*asked, inspect.Parameter("config", keyword, default=None)])  # type: ignore[attr-defined]
    lines = [f"    {spec.name}: {spec.help}{spec.bounds and f' ({spec.bounds.strip()})'}" for spec in listed]
    call.__doc__ = "\n".join([(cls.__doc__ or "").strip(), "", f"Returns {returns}. Raises errors.PreftuneError.", "", "Args:", *lines,
                              "    config: YAML file with options; those given beside it win"])  # fmt: skip
    return call


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sft": _function("sft", _train, "the Run"),
    "dpo": _function("dpo", _train, "the Run"),
    "online": _function("online", _train, "the Run"),
    "ppo": _function("ppo", _train, "the Run"),
    "reward": _function("reward", _train, "the Run; of an ensemble a Run that holds its members"),
    "sample": _function("sample", _rows, "the records as a list of dicts"),
    "score": _function("score", _rows, "the records as a list of dicts"),
    "pair": _function("pair", _rows, "the records as a list of dicts"),
    "logprobs": _function("logprobs", _rows, "a list of dicts: record, response, tokens, logp, mean"),
    "data_check": _function("data check", _check, "what was Checked"),
    "data_convert": _function("data convert", _write, "the Path of the file"),
    "evaluation": _function("evaluate", _evaluate, "everything that --output writes, as a dict"),
    "compare": _function("compare", _compare, "everything that results.json holds: win rate, intervals, tests, the sentence, as a dict"),
    "rate": _function("rate", _rate, "everything that --json writes: ratings, effects, differences, as a dict"),
    "export": _function("export", _write, "the Path of the folder"),
}
