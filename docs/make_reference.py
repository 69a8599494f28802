"""Writes docs/reference.md from the code: verbs and options of config.py, arguments of the losses, exit codes of errors.py.

    $ .venv/bin/python docs/make_reference.py

Imports nothing heavy. `tests/test_docs.py` makes the page again in memory and compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from preftune import errors
from preftune.cli import VERBS
from preftune.config import GROUPS, Options, Spec, loss_facts, specs

HEAD = """# Reference: verbs, options, losses, exit codes

<!-- Made by docs/make_reference.py; do not edit. Run it again after a change of an option. -->

Every option of every verb, as the program itself knows it. `preftune VERB --help` is the short form, `--help-all` the whole.

- `--a b` and `--a=b` mean the same. An option that takes several values (marked `...`) reads up to the next option, and may be repeated;
  every other option is given once. A switch is turned off by its `--no-` form.
- `--config FILE` reads options from a YAML file, under the names in the tables without the dashes (`batch_size: 4` or `batch-size: 4`).
  Flags beside it win. The `config.yaml` of a run is such a file.
- `--debug` shows tracebacks, anywhere. `--version` and `--help` stand alone.
- A value out of bounds, an unknown or repeated option, or two that contradict each other is refused with exit code 2 before any model
  or data is read.
"""


def value(spec: Spec) -> str:
    """What may stand after the flag."""
    words = list(spec.choices or ())
    if spec.kind == "switch":
        return "on or off"
    if spec.pattern:
        return spec.pattern[1]
    if spec.kind in ("text", "texts"):
        kind = spec.shows or ("MODEL" if spec.reads == "model" else "text")
        shown = ", ".join(f"`{word}`" for word in words) if words else kind
    else:
        number = ("whole number" if spec.kind == "whole" else "number") + spec.bounds
        shown = " or ".join([*(f"`{word}`" for word in words), number])
    return shown + (" ..." if spec.kind == "texts" else "")


def default(spec: Spec) -> str:
    """The default in words; empty where the help text says what happens without the option."""
    if spec.required:
        return "must be given"
    if spec.kind == "switch":
        return "on" if spec.default else "off"
    if spec.default in (None, [], {}):
        return ""
    return f"`{spec.default:g}`" if isinstance(spec.default, float) else f"`{spec.default}`"


def cell(text: str) -> str:
    """Text that a table can hold."""
    return text.replace("|", "\\|")


def verb(name: str) -> list[str]:
    """The section of one verb: what it does, an example, its options group by group."""
    options: type[Options] = VERBS[name].options
    entries = specs(options)
    places = "".join(f" {spec.key.upper()}{' ...' if spec.kind == 'texts' else ''}" for spec in entries if spec.positional)
    lines = [f"## preftune {name}", "", (inspect.getdoc(options) or "").strip(), ""]
    lines += [f"`preftune {name}{places}{' [options]' if entries else ''}`, for example `{options.EXAMPLE}`", ""]
    if not entries:
        return [*lines, "No options.", ""]
    lines += ["| option | value | default | |", "|---|---|---|---|"]
    for group, title in GROUPS.items():
        members = [spec for spec in entries if spec.group == group]
        if members and group != "main":
            lines.append(f"| **{title}** | | | |")
        for spec in members:
            stands = "; may stand without its flag" if spec.positional else ""
            lines.append(f"| `{spec.flag}` | {cell(value(spec))} | {default(spec)} | {cell(spec.help)}{stands} |")
    return [*lines, ""]


def losses() -> list[str]:
    """Arguments of every loss, read from the text of losses/*.py."""
    about = "`--loss NAME`, or a weighted sum such as `sigmoid+0.1*nll`; `--loss.ARGUMENT VALUE` sets an argument."
    lines = ["## Losses", "", f"{about} What each is for: [losses](losses/index.md).", ""]
    lines += ["| loss | arguments and defaults | reads | reference | labels | source |", "|---|---|---|---|---|---|"]
    labels = {"swap": "soft or hard", "ignore": "only which side is likelier", "refuse": "hard"}
    for name, facts in loss_facts().items():
        given = ", ".join(f"`--loss.{argument.replace('_', '-')} {number:g}`" for argument, number in facts.arguments.items())
        kind = "rankings" if facts.kind in ("lists", "orders") else facts.kind
        reference = "not needed" if facts.reference == "none" else "needed"
        lines.append(
            f"| [{name}](losses/{name}.md) | {given or 'none'} | {kind} | {reference} | {labels[facts.soft]} | {facts.source} |"
        )
    return [*lines, ""]


def exit_codes() -> list[str]:
    """One line per class of errors.py; what to do about each is in docs/errors.md."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PreftuneError)]
    kinds = [kind for kind in found if kind not in (errors.PreftuneError, errors.Interrupted)]
    lines = ["## Exit codes", "", "What to do about each: [errors](errors.md).", "", "| code | name | means |", "|---|---|---|"]
    lines += ["| 0 | | done |", "| 1 | | a mistake of ours |"]
    for kind in sorted(kinds, key=lambda kind: kind.exit_code):
        lines.append(f"| {kind.exit_code} | `{kind.__name__}` | {cell((inspect.getdoc(kind) or '').splitlines()[0])} |")
    said = (inspect.getdoc(errors.Interrupted) or "").splitlines()[0]
    return [*lines, f"| 128 + signal | `{errors.Interrupted.__name__}` | {cell(said)} |", ""]


def page() -> str:
    """The whole of docs/reference.md."""
    lines = [HEAD]
    for group in dict.fromkeys(each.group for each in VERBS.values()):
        members = [name for name, each in VERBS.items() if each.group == group]
        links = ", ".join(f"[{name}](#preftune-{name.replace(' ', '-')})" for name in members)
        lines.append(f"- **{group}**: {links}")
    lines += ["- [losses](#losses), [exit codes](#exit-codes)", ""]
    for name in VERBS:
        lines += verb(name)
    return "\n".join([*lines, *losses(), *exit_codes()])


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(page(), encoding="utf-8")
