"""Rewards that need no model: a word list, or a Python function of the user's own.

A rule maps (prompts, texts) to one finite number each. It touches its own file and the standard library, nothing else. Model
rewards and judges have other rooms.

    >>> Rule("words", lambda prompt, response: float(len(response.split())))(["a"], ["two words"])
    [2.0]

    rule("lexicon:vader_lexicon.txt")(["Once upon a time"], [" there was a happy dog."])
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

from preftune.errors import DataError, NumericsError, UsageError, nearest

WORD = re.compile(r"(?:[^\W\d_]|')+")
NEGATIONS = frozenset({"not", "no", "never"})
NEGATION_REACH = 3  # words after a negation whose valence it turns
NEGATION_FACTOR = -0.74
NORMALISER = 15.0  # VADER's alpha: about the largest sum of valences that is usual in a sentence


@dataclass(frozen=True)
class Rule:
    """A reward that is a plain function. `rule(prompts, texts)` -> one float per text, in order; higher is better.

    Args:
        name: as the user wrote it, for reports.
        function: (prompt, response) -> number.
        path: the file it came from, so that a run can fingerprint it.
    """

    name: str
    function: Callable[[str, str], SupportsFloat]
    path: Path | None = None

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Raises DataError where the function fails or returns no number, NumericsError where the number is not finite."""
        if len(prompts) != len(texts):
            raise DataError(f"{len(prompts)} prompts but {len(texts)} responses", path=self.name)
        return [self._one(i, prompt, text) for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]

    def _one(self, index: int, prompt: str, text: str) -> float:
        place = f"at prompt {index} ({_short(prompt)})"
        try:
            value = self.function(prompt, text)
        except Exception as error:
            raise DataError(f"the function raised {type(error).__name__}: {error} {place}", path=self.name) from error
        if not isinstance(value, SupportsFloat):
            raise DataError(f"returned {_short(repr(value))} {place}, expected a number", path=self.name)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(f"returned {type(value).__name__} {place}, expected one number: {error}", path=self.name) from error
        if not math.isfinite(number):
            raise NumericsError(f"{self.name}: returned {number} {place}, expected a finite number")
        return number


def rule(spec: str) -> Rule:
    """The rule that `spec` names: `lexicon:FILE` or `python:FILE.py:FUNCTION`.

    Raises UsageError for a spec that cannot be read or a function that is not in its file, DataError for a file that is missing
    or malformed. A `python:` file is executed: it is the user's own code, named by the user.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in KINDS:
        forms = " or ".join(form for _, form in KINDS.values())
        raise UsageError(f"reward {spec!r}: unknown kind {kind!r}{nearest(kind, KINDS)}; give {forms}")
    maker, form = KINDS[kind]
    if not colon or not rest:
        raise UsageError(f"reward {spec!r}: no file named; give {form}")
    return maker(spec, rest)


def compound(text: str, valences: Mapping[str, float]) -> float:
    """Sentiment in (-1, 1): s / sqrt(s^2 + 15), s the sum of the valences of the lower-cased words of `text`.

    A valence is multiplied by -0.74 where one of the three words before it is a negation (not, no, never, ...n't). The constants
    are those of VADER (Hutto and Gilbert 2014); its rules for capitals, punctuation, boosters and emoticons are left out.
    """
    words = WORD.findall(text.lower().replace("\u2019", "'"))
    negated = [word in NEGATIONS or word.endswith("n't") for word in words]
    total = 0.0
    for i, word in enumerate(words):
        valence = valences.get(word, 0.0)
        total += valence * NEGATION_FACTOR if any(negated[max(0, i - NEGATION_REACH) : i]) else valence
    return total / math.sqrt(total * total + NORMALISER)


def read_lexicon(path: Path) -> dict[str, float]:
    """token -> mean valence from a VADER file: `token TAB mean TAB ...`, further columns ignored, empty lines skipped.

    Of a token that stands twice the last counts, as in VADER, whose own file repeats 14 tokens with different values.
    Raises DataError(path, line) for a line of another form.
    """
    valences: dict[str, float] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        token, tab, rest = line.partition("\t")
        try:
            value = float(rest.split("\t", 1)[0])
        except ValueError:
            value = math.nan
        if not tab or not token.strip() or not math.isfinite(value):
            raise DataError(f"found {_short(repr(line))}, expected: token TAB number", path=path, line=number)
        valences[token] = value
    if not valences:
        raise DataError("no entries; expected lines of: token TAB number", path=path)
    return valences


def _lexicon(spec: str, rest: str) -> Rule:
    path = Path(rest)
    valences = read_lexicon(path)
    return Rule(spec, lambda prompt, response: compound(response, valences), path)


def _python(spec: str, rest: str) -> Rule:
    file, colon, name = rest.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise UsageError(f"reward {spec!r}: give python:FILE.py:FUNCTION, the function taking (prompt, response)")
    path = Path(file)
    _text(path)  # the file's own errors first: missing, a folder, not UTF-8
    module = _load(path)
    found = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("__")}
    if name not in found:
        listed = ", ".join(sorted(key for key in found if not key.startswith("_"))[:8]) or "none"
        raise UsageError(f"reward {spec!r}: {path} has no function {name!r}{nearest(name, found)}; it has: {listed}")
    try:
        inspect.signature(found[name]).bind("prompt", "response")
    except TypeError as error:
        form = f"{name}{inspect.signature(found[name])}"
        raise UsageError(f"reward {spec!r}: {form} cannot be called as {name}(prompt, response): {error}") from error
    return Rule(spec, found[name], path)


KINDS = {"lexicon": (_lexicon, "lexicon:FILE"), "python": (_python, "python:FILE.py:FUNCTION")}


def _load(path: Path):
    """The module at `path`, under a name of its own so that it never hides another module."""
    name = f"preftune_rule_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"reward file {path}: expected a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the user's file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = error.lineno if isinstance(error, SyntaxError) else None
        raise DataError(f"cannot be loaded: {type(error).__name__}: {error}", path=path, line=line) from error
    return module


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file{nearest(path.name, siblings)}", path=path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", path=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None


def _short(text: str, limit: int = 60) -> str:
    flat = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
