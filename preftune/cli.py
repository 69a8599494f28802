"""The command line: the table of verbs, reading words into options, help, and the one place where faults become exit codes.

Imports nothing heavy; a stage is imported only inside its verb. The parser is ours (docs/decisions.md says why): flags come from
the dataclasses of `config`, a scalar option may be given once, a list option takes several words and repeats.

    $ preftune dpo --help
    $ preftune dpo --config run.yaml --loss simpo --loss.gamma 0.5
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .config import (
    GROUPS,
    Chat,
    Compare,
    DataCheck,
    DataConvert,
    DataShow,
    Demo,
    Dpo,
    Env,
    Evaluate,
    Export,
    Frontier,
    Given,
    Logprobs,
    OnlineDpo,
    Options,
    Pair,
    Ppo,
    Rate,
    Report,
    Reward,
    Sample,
    Score,
    Sft,
    Spec,
    build,
    check,
    convert,
    hint,
    load_config,
    loss_argument,
    loss_facts,
    specs,
)
from .errors import PreftuneError, UsageError, nearest
from .screen import clean


class Verb(NamedTuple):
    """One line of the table: options, help, the group it is listed under. `stages.VERB.run(options) -> int | None` does it; of a verb of
    two words `stages.FIRST.SECOND(options)`."""

    options: type[Options]
    help: str
    group: str


VERBS: dict[str, Verb] = {
    "demo": Verb(Demo, "the whole pipeline on a tiny model made here: CPU, offline, minutes", "start"),
    "data check": Verb(DataCheck, "what is wrong with a preference file; needs no model", "start"),
    "data show": Verb(DataShow, "a record as the tokens that train, in colour", "start"),
    "data convert": Verb(DataConvert, "any layout as canonical JSONL", "start"),
    "env": Verb(Env, "versions and hardware, to paste into an issue", "start"),
    "sft": Verb(Sft, "fine-tune a model on answers, or on the preferred ones", "train"),
    "dpo": Verb(Dpo, "tune a model on preferences; the offline family, --loss picks", "train"),
    "online": Verb(OnlineDpo, "tune a model on pairs of its own answers, judged by a reward", "train"),
    "ppo": Verb(Ppo, "tune a model by reinforcement from a reward: PPO, RLOO, GRPO", "train"),
    "reward": Verb(Reward, "train a reward model, or an ensemble: a score for every answer", "train"),
    "sample": Verb(Sample, "responses of a model to prompts", "make data"),
    "score": Verb(Score, "a reward for every response, or a judge's verdicts", "make data"),
    "pair": Verb(Pair, "scores into pairs, rankings, the best of n, rejection sampling", "make data"),
    "logprobs": Verb(Logprobs, "log-probabilities of the responses in a data file", "judge"),
    "evaluate": Verb(Evaluate, "metrics of one model on held-out data, with intervals", "judge"),
    "compare": Verb(Compare, "two models on the same prompts: who wins, how surely, side by side", "judge"),
    "frontier": Verb(Frontier, "methods, KL weights and seeds on one file: reward against KL", "judge"),
    "rate": Verb(Rate, "ratings of many from comparisons: Bradley-Terry and its kin", "judge"),
    "chat": Verb(Chat, "talk to a model, or to two side by side", "use"),
    "report": Verb(Report, "one self-contained HTML page from a run folder", "use"),
    "export": Verb(Export, "a folder to publish: model, tokeniser, a factual model card", "use"),
}



def _takes_losses(verb: Verb) -> bool:
    return any(spec.kind == "numbers" for spec in specs(verb.options))


HELPS = ("-h", "--help", "--help-all", "--help-losses")


# --- words -> options ----------------------------------------------------------------------------------------------------------


def read_words(words: Sequence[str], cls: type[Options]) -> tuple[Given, str | None]:
    """(what was given, the --config file) of the words after the verb. Raises UsageError.

    `--a b` and `--a=b`; a list option takes the words up to the next option and may be repeated; `--x` and `--no-x` for switches.
    """
    flags = {spec.flag: spec for spec in specs(cls) if spec.kind != "numbers"}
    flags["--config"] = Spec("config", "text", True, None, "", "main")
    loss = any(spec.kind == "numbers" for spec in specs(cls))
    place = next((spec for spec in specs(cls) if spec.positional), None)
    given: Given = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, inline = word.partition("=")
        if not word.startswith("--"):
            if place is None or word.startswith("-"):
                raise UsageError(f"{word!r} is not an option{hint(word.lstrip('-–—'), cls, '--')}")
            spec, flag, values = place, place.flag, [word]
        elif loss and flag.startswith("--loss."):
            spec = loss_argument(flag.removeprefix("--loss.").replace("-", "_"))
            spec = spec._replace(name=f"loss.{spec.name}")
            values = _values_of(flag, inline if equals else None, rest, 1)
        else:
            found, negated = _lookup(flag, flags, cls)
            spec, flag = found, found.flag
            many = len(rest) if spec.kind == "texts" else 1
            if spec.kind == "switch":
                if equals:
                    raise UsageError(f"{flag} takes no value; write {flag} or {flag.replace('--', '--no-', 1)}")
                values = ["false" if negated else "true"]
            else:
                values = _values_of(flag, inline if equals else None, rest, many)
        _add(given, spec, flag, values)
    config, _ = given.pop("config", (None, ""))
    return given, config


def _lookup(flag: str, flags: dict[str, Spec], cls: type[Options]) -> tuple[Spec, bool]:
    """The option that a flag names, and whether it is the --no- form of a switch."""
    plain = flag.replace("_", "-")
    positive = plain.replace("--no-", "--", 1)
    if plain in flags:
        return flags[plain], False
    if positive in flags and flags[positive].kind == "switch":
        return flags[positive], True
    raise UsageError(f"unknown option {flag}{hint(flag[2:], cls, '--')}")


def _values_of(flag: str, inline: str | None, rest: list[str], many: int) -> list[str]:
    """Takes the words that belong to an option from `rest`: the one after '=', or up to `many` that do not begin with '--'."""
    if inline is not None:
        return [inline]
    values: list[str] = []
    while rest and len(values) < many and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    if not values:
        raise UsageError(f"{flag} needs a value{f', not the option {rest[0]}' if rest else ''}")
    return values


def _add(given: Given, spec: Spec, flag: str, values: list[str]) -> None:
    if spec.kind == "texts":
        value = [*given.get(spec.name, ([], ""))[0], *(convert(spec, text, flag) for text in values)]
        check(spec, value, flag)
        given[spec.name] = (value, flag)
        return
    if spec.name in given:
        raise UsageError(f"{flag} is given twice")
    given[spec.name] = (convert(spec, values[0], flag), flag)


def parse(words: Sequence[str], cls: type[Options]) -> Options:
    """The options that the words after a verb mean: defaults, then --config, then flags. Raises UsageError and its sisters."""
    given, config = read_words(words, cls)
    return build(cls, {**(load_config(config, cls) if config else {}), **given})


# --- help ----------------------------------------------------------------------------------------------------------------------


def _paint() -> dict[str, str]:
    """Bold and colour, only on a terminal and only where NO_COLOR is not set."""
    on = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    codes = {"bold": "\033[1m", "name": "\033[36m", "dim": "\033[2m", "off": "\033[0m"}
    return codes if on else dict.fromkeys(codes, "")


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))


def _row(name: str, text: str, paint: dict[str, str], column: int = 26) -> list[str]:
    """A name in its column and its text beside it; a long name has its own line."""
    lines = textwrap.wrap(text, _width() - column - 2, break_on_hyphens=False, break_long_words=False) or [""]
    painted = f"  {paint['name']}{name}{paint['off']}"
    head = [] if len(name) < column - 1 else [painted]
    first = f"{painted}{' ' * (column - len(name))}{lines[0]}" if not head else " " * (column + 2) + lines[0]
    return [*head, first, *(" " * (column + 2) + line for line in lines[1:])]


def _usage_of(spec: Spec) -> str:
    """'--beta X', '--[no-]report', '--data FILE ...'."""
    if spec.kind == "switch":
        return spec.flag.replace("--", "--[no-]", 1)
    words = "|".join(spec.choices) if spec.choices else ""
    kinds = {"whole": "N", "number": f"{words}|X" if words else "X", "numbers": "X"}
    value = spec.shows or kinds.get(spec.kind) or words or spec.key.upper()
    return f"{spec.flag} {value}{' ...' if spec.kind == 'texts' else ''}"


def _about(spec: Spec, everything: bool) -> str:
    """The help text with default and, where everything is shown, bounds."""
    notes = [spec.bounds.strip()] if everything and spec.bounds else []
    if spec.default not in (None, [], {}, "") and spec.kind != "switch":
        notes.append(f"default {spec.default:g}" if isinstance(spec.default, float) else f"default {spec.default}")
    elif spec.kind == "switch" and spec.default:
        notes.append("default on")
    return f"{spec.help} ({'; '.join(notes)})" if notes else spec.help


def verb_help(name: str, *, everything: bool = False) -> str:
    """`preftune VERB --help`: the main options and the names of the rest; everything=True: all of them with their bounds."""
    verb, paint = VERBS[name], _paint()
    entries = specs(verb.options)
    place = next((f" {spec.key.upper()}{' ...' if spec.kind == 'texts' else ''}" for spec in entries if spec.positional), "")
    lines = [f"{paint['bold']}preftune {name}{paint['off']}{place}{' [options]' if entries else ''}", ""]
    lines += [*textwrap.wrap((verb.options.__doc__ or "").strip(), _width()), "", f"  {verb.options.EXAMPLE}", ""]
    rest = []
    for group, title in GROUPS.items():
        members = [spec for spec in entries if spec.group == group]
        if members and (everything or group == "main"):
            lines += [f"{paint['bold']}{title}{paint['off']}"]
            lines += [line for spec in members for line in _row(_usage_of(spec), _about(spec, everything), paint)]
            if group == "main":
                lines += _row("--config FILE", "options from a YAML file; flags given beside it win", paint)
            lines += [""]
        elif members:
            rest += _row(title, " ".join(spec.flag for spec in members), {**paint, "name": ""})
    lines += [f"{paint['bold']}more{paint['off']}", *rest, ""] if rest else []
    if entries:
        ends = [f"preftune {name} --help-all shows every option"] if rest else []
        ends += [f"preftune {name} --help-losses every loss"] if _takes_losses(verb) else []
        ends += [] if rest else ["--debug, anywhere: tracebacks"]
        lines += [f"{paint['dim']}{' · '.join(ends)}{paint['off']}"]
    return "\n".join(lines).rstrip()


KINDS = {"pairs": "pairs", "verdicts": "unpaired verdicts", "lists": "rankings", "orders": "rankings", "grades": "scores of single answers",
         "classes": "classes of single answers",
         "scored": "scores", "values": "scores of samples", "draws": "samples of the reference"}  # fmt: skip


def losses_help() -> str:
    """`--help-losses`: every loss with its formula, source, arguments and defaults, read from the text of losses/*.py."""
    paint = _paint()
    lines = [f"{paint['bold']}losses{paint['off']}  one, or a weighted sum: --loss sigmoid+0.1*nll", ""]
    lines += ["a = log pi - log ref of a response, summed; n its tokens; w the chosen, l the rejected one; ls = log sigmoid;"]
    lines += ["r = what a reward model says of a response: there a is r, and beta 1", ""]
    for name, facts in loss_facts().items():
        flags = "  ".join(f"--loss.{argument.replace('_', '-')} {default:g}" for argument, default in facts.arguments.items())
        judged = facts.kind not in ("scored", "values", "draws", "grades", "classes")
        labels = {"swap": "soft labels", "ignore": "", "refuse": "hard labels only" if judged else ""}[facts.soft]
        reader = {"no": "", "too": "reward models too", "only": "reward models only"}[facts.scalar]
        free = facts.reference == "none" and facts.scalar != "only"
        traits = [KINDS[facts.kind], "no reference" if free else "", labels, reader]
        lines += _row(name, facts.formula, paint, 16)
        lines += _row("", f"{', '.join(filter(None, traits))}; {facts.source}", paint, 16)
        lines += [*_row("", flags, paint, 16), ""] if flags else [""]
    return "\n".join([*lines, "--beta X is short for --loss.beta X; the numbers shown are the defaults."])


def main_help() -> str:
    """`preftune --help`: the verbs by group."""
    paint = _paint()
    purpose = "a language model and preferences in, a better model and the evidence that it is better out"
    lines = [f"{paint['bold']}preftune{paint['off']} {__version__}", *textwrap.wrap(purpose, _width()), ""]
    lines += ["  preftune VERB [options]", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += [f"{paint['bold']}{group}{paint['off']}"]
        lines += [line for name, verb in VERBS.items() if verb.group == group for line in _row(name, verb.help, paint, 14)]
    lines += ["", f"{paint['bold']}begin with{paint['off']}"]
    lines += [f"  {Demo.EXAMPLE}", f"  {Dpo.EXAMPLE}", "  preftune VERB --help", ""]
    ends = "--version · --debug, anywhere: tracebacks · exit codes: docs/errors.md"
    return "\n".join([*lines, f"{paint['dim']}{ends}{paint['off']}"])


# --- the door ------------------------------------------------------------------------------------------------------------------


def _complain(verb: str, message: str) -> None:
    """An error in at most three lines on stderr; control characters of foreign text are shown, not obeyed."""
    lines = message.splitlines() or [""]
    if len(lines) > 3:
        lines = [*lines[:2], f"  ... {len(lines) - 2} more lines: run again with --debug"]
    print(clean(f"preftune{' ' * bool(verb)}{verb}: error: " + "\n".join(lines)), file=sys.stderr)


def _our_fault(error: Exception) -> str:
    house = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(house)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    said = (str(error).splitlines() or [""])[0][:300]
    return (f"this is our fault, not yours: {type(error).__name__}: {said}{where}\n"
            "  run it again with --debug for the traceback, and send that with the output of 'preftune env'")  # fmt: skip


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """(verb, the words after it). Raises UsageError for a verb that is not there, with the nearest."""
    two = {name.split()[0] for name in VERBS if " " in name}
    name = " ".join(words[:2]) if words[0] in two and len(words) > 1 and not words[1].startswith("-") else words[0]
    if name not in VERBS:
        seconds = ", ".join(verb for verb in VERBS if verb.startswith(f"{words[0]} "))
        what = f"; there are {seconds}" if seconds else "; 'preftune --help' lists them"
        raise UsageError(f"there is no verb {name!r}{nearest(name, VERBS)}{what}")
    return name, list(words[len(name.split()) :])


def stage(name: str) -> Callable[[Options], int | None]:
    """What does the work of a verb: `stages.VERB.run`, or of a verb of two words `stages.FIRST.SECOND`."""
    from . import stages  # only here: a stage imports torch

    room, _, function = name.partition(" ")
    return getattr(importlib.import_module(f"{stages.__name__}.{room}"), function or "run")


def _dispatch(words: list[str]) -> int:
    """Runs a command line without --debug; help and version go to stdout."""
    if not words or words[0] in ("-h", "--help", "--help-all"):
        print(main_help())
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"preftune {__version__}")
        return 0
    name, rest = split_verb(words)
    wanted = next((word for word in rest if word in HELPS), None)
    if wanted == "--help-losses" and _takes_losses(VERBS[name]):
        print(losses_help())
        return 0
    if wanted and wanted != "--help-losses":
        print(verb_help(name, everything=wanted == "--help-all"))
        return 0
    options = parse(rest, VERBS[name].options)  # before the stage is imported: a misspelt option is told at once
    return stage(name)(options) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """`preftune ARGV`. Returns the exit code: 0, a PreftuneError's own (docs/errors.md), 130 for Ctrl-C, 1 for our faults."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    two = " ".join(words[:2])
    verb = two if two in VERBS else words[0] if words and re.fullmatch(r"[a-z]+", words[0]) else ""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `preftune ... | head` is no fault; what is left must not be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except PreftuneError as error:
        if debug:
            traceback.print_exc()
        _complain(verb, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _complain(verb, "interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 (the last door: whatever is left is ours, and is said to be)
        if debug:
            traceback.print_exc()
        _complain(verb, _our_fault(error))
        return 1
