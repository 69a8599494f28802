"""Rewards of any kind, all asked in one way: a word list, a Python function of the user's own, reward models, ensembles of them, and
the implicit reward of a policy.

A rule maps (prompts, texts) to one finite number each; a `Scorer` maps (prompts, responses) to numbers, through a packed pass where
it is a model. Touches models and their readout; a rule touches its own file and the standard library, nothing else.

    >>> Rule("words", lambda prompt, response: float(len(response.split())))(["a"], ["two words"])
    [2.0]

    scorer("lexicon:vader_lexicon.txt")(["Once upon a time"], [Response(" there was a happy dog.")])
    scorer("model:runs/reward")(prompts, responses)
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch

from . import models
from .batches import make_batch, split
from .config import Dpo, load_yaml, loss_terms
from .errors import DataError, NumericsError, UsageError, nearest
from .files import fingerprint, read_json, sha256_file
from .readout import head_outputs, hidden_states, log_odds, packs, response_sums, token_logps
from .records import Record, Response, Text, as_text
from .store import Store, build
from .tokens import Codec, decode_response, end_ids, make_codec

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


# ---------------------------------------------------------------- any reward as one kind of thing

# How members of an ensemble become one number; variance is the population's.  arXiv:2310.02743 (worst case, uncertainty-weighted).
HOWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda table: table.mean(0),
    "min": lambda table: table.min(0),
    "lower": lambda table: table.mean(0) - table.std(0),
    "variance": lambda table: table.mean(0) - 0.5 * table.var(0),
}


def combine(table: np.ndarray, how: str) -> np.ndarray:
    """Scores of M members, (M, n), as one score each, (n,): 'mean', 'min', 'lower' (mean less one standard deviation) or 'variance'
    (mean less half the variance). Deviations are those of the members at hand: divided by M, not M - 1.

    >>> members = np.array([[0, 1, 0.5, 2], [0, 1.2, 0.4, 1], [0, 0.9, 0.6, 3]])
    >>> combine(members, "variance").round(5), combine(members, "min")
    (array([0.     , 1.02556, 0.49667, 1.66667]), array([0. , 0.9, 0.4, 1. ]))
    """
    return HOWS[how](table)


def centre(table: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Members' scores, (M, n), with one level for all members at each prompt, (n,) of numbers: a member's own level means nothing.

    A reward is known up to f(x), and each member has its own f. What a member gives the responses of a prompt on average is moved to
    what all members give them on average; a prompt with a single response stays as it is.

    >>> centre(np.array([[0.0, 2, 9], [5, 9, 9]]), np.array([0, 0, 1]))
    array([[3., 5., 9.],
           [2., 6., 9.]])
    """
    count = np.bincount(prompt)
    level = np.stack([np.bincount(prompt, row) for row in table]) / count
    moved = np.where(count > 1, level.mean(0) - level, 0.0)
    return table + moved[:, prompt]


@dataclass(frozen=True)
class Member:
    """One reward model, or one rule.

    Args:
        read: a store of responses -> the reward of each, (R,), in order. codec: how texts become its ids. window: its positions, or None.
        rule: in the place of these three, a function of texts. level: whether its level is set on reference samples.
        model: the reward model itself, where it is one: a reward is (its scalar - shift) / scale.
    """

    read: Callable[[Store], np.ndarray] | None = None
    codec: Codec | None = None
    window: int | None = None
    rule: Rule | None = None
    level: bool = True
    model: Any | None = None
    shift: float = 0.0
    scale: float = 1.0

    def score(self, prompts: Sequence[Text], responses: Sequence[Response]) -> np.ndarray:
        """(n,) float64. Raises DataError for a response that cannot be scored: none is left out."""
        if self.rule is not None:
            return np.array(self.rule([as_text(p) for p in prompts], [as_text(r.text) for r in responses]), dtype=np.float64)
        assert self.read is not None and self.codec is not None
        groups: dict[Text, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(i)
        records = [Record(p, tuple(responses[i] for i in mine), where=f"response {mine[0]}") for p, mine in groups.items()]
        store, intake = build(records, self.codec, max_length=self.window)
        if intake.refused:
            raise DataError(f"{len(intake.refused)} prompts with responses that the reward model cannot read; first: {intake.refused[0]}")
        out = np.empty(len(responses))
        out[[i for mine in groups.values() for i in mine]] = self.read(store)
        return out


@dataclass(frozen=True)
class Scorer:
    """A reward of any kind: `scorer(prompts, responses) -> (n,)` float64, higher is better.

    Args:
        name: as the user wrote it. fingerprint: of all that its numbers depend on. members: one, or those of an ensemble. how: one of HOWS.
    """

    name: str
    fingerprint: str
    members: tuple[Member, ...]
    how: str = "mean"

    def __call__(self, prompts: Sequence[Text], responses: Sequence[Response]) -> np.ndarray:
        """The reward of each response under its prompt, (n,). Raises DataError where one cannot be scored, UsageError as `table` does."""
        return combine(self.table(prompts, responses), self.how)

    def spread(self, prompts: Sequence[Text], responses: Sequence[Response]) -> np.ndarray:
        """How far the members disagree on each response, (n,): the population standard deviation of their centred scores; 0 for one."""
        return self.table(prompts, responses, strict=True).std(0)

    def table(self, prompts: Sequence[Text], responses: Sequence[Response], *, strict: bool = False) -> np.ndarray:
        """What each member says, centred by prompt, (M, n); `combine` and `.std(0)` make scores and spread of it.

        Raises UsageError where members are compared (by `how`, or strict=True) at a prompt with one response, and some member has no level.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts but {len(responses)} responses", path=self.name)
        if not prompts:
            return np.zeros((len(self.members), 0))
        return self._levelled(np.stack([m.score(prompts, responses) for m in self.members]), _numbers(prompts), strict)

    def rollouts(self, store: Store, codec: Codec, prompts: Sequence[Text]) -> np.ndarray:
        """The reward of every response of a store of rollouts, (R,), in order.

        Ids are read as they are where the policy's `codec` has this scorer's tokeniser; else their texts are.

        Args:
            prompts: per record of the store, what `codec` encoded.
        """
        shared = all(m.codec is not None and same_ids(m.codec, codec) for m in self.members)
        record = np.repeat(np.arange(len(store)), np.diff(store.record_start))[store.response >= 0]
        if shared and len(record):
            table = np.stack([m.read(store) for m in self.members if m.read])
            return combine(self._levelled(table, record, False), self.how)
        texts = []
        for segment, r in zip(np.flatnonzero(store.response >= 0), record, strict=True):
            before, own = (store.tokens[store.start[s] : store.start[s + 1]].tolist() for s in (store.parent[segment], segment))
            ends = end_ids(codec, prompts[r])
            texts.append(Response(decode_response(codec, tuple(before), own, ends), own[-1] in ends))
        return self([prompts[r] for r in record], texts)

    def _levelled(self, table: np.ndarray, prompt: np.ndarray, strict: bool) -> np.ndarray:
        if not np.isfinite(table).all():
            raise NumericsError(f"{self.name}: a score is not finite")
        if len(table) == 1:
            return table
        if (strict or self.how != "mean") and (np.bincount(prompt) == 1).any() and not all(m.level for m in self.members):
            raise UsageError(f"{self.name}: a prompt has one response and a member has no mean of reference samples: its level means "
                             "nothing beside the others'. Give several responses a prompt, or use @mean")  # fmt: skip
        return centre(table, prompt)


def _numbers(prompts: Sequence[Text]) -> np.ndarray:
    """Equal prompts as equal numbers from 0 on."""
    known: dict[Text, int] = {}
    return np.array([known.setdefault(p, len(known)) for p in prompts])


def same_ids(ours: Codec, theirs: Codec) -> bool:
    """Whether the same ids mean the same text, set the same way."""
    one, two = ({k: v for k, v in c.describe().items() if k not in ("finish", "control_tokens")} for c in (ours, theirs))
    return one == two and ours.backend.to_str() == theirs.backend.to_str()


def scorer(spec: str, *, device: str = "cpu", dtype: str = "fp32", offline: bool = False, micro_tokens: int = 8192) -> Scorer:
    """The reward that `spec` names.

    `lexicon:FILE`, `python:FILE.py:FUNCTION`; `model:FOLDER`, a reward model or the run that made it; `model:FOLDER@mean` (or min, lower,
    variance), an ensemble; `implicit:POLICY@REFERENCE`, beta times the log-ratio, beta being that of POLICY's run.

    Raises UsageError for a spec that cannot be read, DataError and ModelError for what it names.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in SPECS or not colon or not rest:
        forms = " or ".join(SPECS.values())
        raise UsageError(f"reward {spec!r}: {f'unknown kind {kind!r}{nearest(kind, SPECS)}' if kind not in SPECS else 'nothing named'}; "
                         f"give {forms}")  # fmt: skip
    if kind in KINDS:
        found = rule(spec)
        return Scorer(spec, sha256_file(found.path) if found.path else fingerprint(spec), (Member(rule=found),))
    loading = {"device": device, "dtype": dtype, "offline": offline}
    if kind == "implicit":
        return _implicit(spec, rest, loading, micro_tokens)
    folder, at, how = rest.rpartition("@")
    if not at:
        folder, how = rest, ""
    elif how not in HOWS:
        if not os.path.exists(rest):
            raise UsageError(f"reward {spec!r}: {how!r} is none of {', '.join(HOWS)}{nearest(how, HOWS)}")
        folder, how = rest, ""
    places = _members(spec, folder, how)
    members = tuple(_reward_model(place, loading, micro_tokens) for place in places)
    seen = [models.weights_fingerprint(place, offline=offline) for place in places]
    return Scorer(spec, fingerprint("reward-1", seen, how, dtype), members, how or "mean")


SPECS = {"lexicon": "lexicon:FILE", "python": "python:FILE.py:FUNCTION", "model": "model:FOLDER[@mean|min|lower|variance]",
         "implicit": "implicit:POLICY@REFERENCE"}  # fmt: skip
ENSEMBLE = "ensemble.json"  # in the folder of an ensemble: {"members": [folder, ...]}


def _members(spec: str, folder: str, how: str) -> list[str]:
    """The folders of the members that a spec means. Raises UsageError."""
    listed = Path(folder) / ENSEMBLE
    if not listed.is_file():
        if how:
            raise UsageError(f"reward {spec!r}: {folder} is one model, not an ensemble (no {ENSEMBLE}); leave @{how} out")
        return [folder]
    if not how:
        if (Path(folder) / "model").is_dir():  # the average of the members' weights
            return [folder]
        raise UsageError(f"reward {spec!r}: an ensemble; say how its members are one: {', '.join(f'@{h}' for h in HOWS)}")
    names = read_json(listed).get("members")
    if not isinstance(names, list) or not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise DataError("expected {\"members\": [folder, ...]}, folders beside it", path=listed)
    return [str(Path(folder) / name) for name in names]


def _reward_model(place: str, loading: dict[str, Any], micro_tokens: int) -> Member:
    model, tokenizer, facts = models.load_reward(place, **loading)
    shift, scale = facts.get("shift", 0.0), facts.get("scale", 1.0)
    codec = reward_codec(tokenizer, facts, place)

    def read(store: Store) -> np.ndarray:
        return (scores_of(model, store, micro_tokens=micro_tokens, device=loading["device"]) - shift) / scale

    return Member(read, codec, models.window_of(model.config), level="shift" in facts, model=model, shift=shift, scale=scale)


CODEC = ("template", "template_name", "bos", "eos", "finish", "control_tokens")


def reward_codec(tokenizer: Any, facts: Mapping[str, Any], place: str) -> Codec:
    """How a reward model's texts become ids: as its reward.json says, else as its tokeniser does. Raises DataError."""
    own = facts.get("codec")
    try:
        return Codec(tokenizer, **{k: own[k] for k in CODEC}) if own else make_codec(tokenizer)
    except (KeyError, TypeError):
        raise DataError(f"'codec' lacks one of {', '.join(CODEC)}", path=f"{place}: {models.REWARD}") from None


def scores_of(model: Any, store: Store, *, micro_tokens: int, device: str,
              records: Sequence[int] | np.ndarray | None = None, outputs: bool = False) -> np.ndarray:  # fmt: skip
    """What a reward model says of every response of a store, or of these records of it, in order: (R,) float64, not normalised.

    Args:
        outputs: what its head says instead of the one number that is made of it, (R, C).
    """
    share, parts = packs(model), []
    with torch.inference_mode():
        for group in split(store, range(len(store)) if records is None else records, micro_tokens, share=share):
            batch = make_batch(store, group, share=share).to(device)
            said = head_outputs(model, hidden_states(model, batch)[batch.last])
            parts.append((said if outputs else log_odds(said)).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def _implicit(spec: str, rest: str, loading: dict[str, Any], micro_tokens: int) -> Scorer:
    """beta (log pi - log ref), summed over a response's tokens.  Eq. 5 of arXiv:2305.18290 without its f(x)."""
    policy, at, reference = rest.rpartition("@")
    if not at or not policy or not reference:
        raise UsageError(f"reward {spec!r}: give {SPECS['implicit']}")
    beta = _beta(spec, policy)
    (ours, tokenizer), (theirs, other) = (models.load(name, **loading) for name in (policy, reference))
    codec = make_codec(tokenizer)
    if not same_ids(codec, make_codec(other)):
        raise UsageError(f"reward {spec!r}: the two models have different tokenisers or templates, so their log-probs are of different ids")
    share = packs(ours) and packs(theirs)

    def read(store: Store) -> np.ndarray:
        out = [np.zeros(0)]
        with torch.inference_mode():
            for group in split(store, range(len(store)), micro_tokens, share=share):
                batch = make_batch(store, group, share=share).to(loading["device"])
                one, two = (response_sums(token_logps(m, hidden_states(m, batch), batch), batch) for m in (ours, theirs))
                out.append(beta * (one - two).cpu().numpy())
        return np.concatenate(out)

    seen = [models.weights_fingerprint(name, offline=loading["offline"]) for name in (policy, reference)]
    windows = [w for w in (models.window_of(m.config) for m in (ours, theirs)) if w]
    member = Member(read, codec, min(windows) if windows else None, level=False)
    return Scorer(spec, fingerprint("implicit-1", seen, beta, loading["dtype"]), (member,))


def _beta(spec: str, policy: str) -> float:
    """beta of the run that trained the policy. Raises UsageError where no run says."""
    path = Path(policy) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"reward {spec!r}: {policy} is not a run folder, so its beta is not known; give the run that trained it")
    terms = loss_terms(Dpo(**load_yaml(path.read_text(encoding="utf-8"), path, Dpo)))
    return terms[0][2].get("beta", 1.0)
