"""The demo's world: customers, agents and a hidden judge, all known exactly.

A seeded grammar writes prompts (opening x item x problem) and, for each prompt, a finite list of replies (filler, sympathy, a right,
wrong or vague fix, rudeness, filler). Since everything that can be said is listed, `parse` is an exact inverse, a reply's true
reward is known, and the best policy of the KL-constrained objective can be summed up instead of estimated (`optimum`).
This room touches the standard library only.

    >>> prompt = prompts("en")[0]
    >>> prompt
    'Customer: Hello. My phone does not start.\\nAgent:'
    >>> features = parse("en", prompt, " About your phone: I am sorry about that. Please charge it.")
    >>> features
    Features(empathy=True, fix='right', rude=False, fillers=0)
    >>> reward(features)
    1.75
    >>> parse("en", prompt, " About your camera: Please charge it.") is None
    True
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from .errors import UsageError, nearest


@dataclass(frozen=True)
class Language:
    """One language's tables. Every reply is filler? sympathy? fix rudeness? filler?, joined by `space`.

    Args:
        prompt: how a customer's words are set, with {opening}, {item}, {problem}.
        before, after: what stands around the customer's words in `prompt`: the chat template is made of them.
        space: between sentences, and before the first sentence of a reply.
        word: a regular expression that cuts any text of this grammar into the tokeniser's words.
        problems: what the customer says -> the fix that helps, with {item}.
        vague: a fix that never helps and never harms.
        sympathy, rudeness, fillers, goodbyes: sentences; each slot may also be empty.
    """

    before: str
    after: str
    said: str
    space: str
    word: str
    openings: tuple[str, ...]
    items: tuple[str, ...]
    problems: Mapping[str, str]
    lead: str
    vague: str
    sympathy: tuple[str, ...]
    rudeness: tuple[str, ...]
    fillers: tuple[str, ...]
    goodbyes: tuple[str, ...]


LANGUAGES: Mapping[str, Language] = {
    "en": Language(
        before="Customer: ",
        after="\nAgent:",
        said="{opening} My {item} {problem}.",
        space=" ",
        word=r" ?[A-Za-z]+|[^A-Za-z]",
        openings=("Hello.", "Good morning.", "Excuse me.", "I need help.", "Hi there.", "Can you help me?"),
        items=("phone", "camera", "laptop", "printer", "speaker", "watch", "tablet", "radio"),
        problems={
            "does not start": "Please charge it.",
            "is very slow": "Please update it.",
            "has frozen": "Please restart it.",
            "arrived broken": "Please return it.",
            "makes a noise": "Please clean it.",
            "is too hot": "Please unplug it.",
        },
        lead="About your {item}:",
        vague="Please check it.",
        sympathy=("I am sorry about that.", "I know how annoying this is."),
        rudeness=("That is your own fault.", "Everybody knows that."),
        fillers=("Let me see.", "Thank you for your question."),
        goodbyes=("Have a nice day.",),
    ),
    "zh": Language(
        before="顾客：",
        after="\n客服：",
        said="{opening}我的{item}{problem}。",
        space="",
        word=r"手机|相机|电脑|打印机|音箱|手表|平板|耳机|关于|您的|充电|更新|重启|退回|清洁|关闭|检查|非常抱歉|理解|心情|自己|知道|感谢|提问|愉快|看看|(?s:.)",
        openings=("你好。", "早上好。", "打扰一下。", "请帮帮我。", "您好。", "我有个问题。"),
        items=("手机", "相机", "电脑", "打印机", "音箱", "手表", "平板", "耳机"),
        problems={
            "开不了机": "请给它充电。",
            "运行很慢": "请更新它。",
            "卡住了": "请重启它。",
            "送到时是坏的": "请退回它。",
            "有杂音": "请清洁它。",
            "很烫": "请关闭它。",
        },
        lead="关于您的{item}：",
        vague="请检查它。",
        sympathy=("非常抱歉。", "我理解您的心情。"),
        rudeness=("这都怪您自己。", "谁都知道这个。"),
        fillers=("让我看看。", "感谢您的提问。"),
        goodbyes=("祝您愉快。",),
    ),
}

# The hidden reward, in Bradley-Terry logits: P(a preferred to b) = sigmoid(reward(a) - reward(b)).
EMPATHY, RUDE, FILLER = 0.75, -1.0, -0.125
FIX: Mapping[str, float] = {"right": 1.0, "vague": 0.0, "wrong": -1.0}
UNPARSABLE = FIX["wrong"] + RUDE + 2 * FILLER  # -2.25: as bad as the worst thing that can be said

# How the agents of the corpus talk: P(slot filled), and P(kind of fix). Half good, half bad: there is something to learn.
TALK: Mapping[str, float] = {"filler": 0.4, "empathy": 0.4, "rude": 0.3, "goodbye": 0.4}
TALK_FIX: Mapping[str, float] = {"right": 0.4, "vague": 0.25, "wrong": 0.35}


@dataclass(frozen=True, slots=True)
class Features:
    """What was said. `fix` is 'right', 'wrong' or 'vague'; `fillers` counts empty sentences (0 to 2)."""

    empathy: bool
    fix: str
    rude: bool
    fillers: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One thing that can be said. `text` starts with the language's space, so that prompt + text is the dialogue."""

    text: str
    features: Features


def table(language: str) -> Language:
    """The tables of a language. Raises UsageError for a name that is not there."""
    if language not in LANGUAGES:
        raise UsageError(f"language {language!r} is not one of {', '.join(LANGUAGES)}{nearest(language, LANGUAGES)}")
    return LANGUAGES[language]


@cache
def _cells(language: str) -> dict[str, tuple[int, int, int]]:
    """Prompt text -> (opening, item, problem)."""
    t = table(language)
    return {
        f"{t.before}{t.said.format(opening=opening, item=item, problem=problem)}{t.after}": (o, i, p)
        for o, opening in enumerate(t.openings)
        for i, item in enumerate(t.items)
        for p, problem in enumerate(t.problems)
    }


def prompts(language: str) -> list[str]:
    """Every prompt: 6 openings x 8 items x 6 problems = 288."""
    return list(_cells(language))


def split(language: str, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts. Held out is one problem of every item, in all openings: those two words never met in training."""
    t = table(language)
    shuffled = list(range(len(t.problems)))
    random.Random(f"split {language} {seed}").shuffle(shuffled)
    away = {item: shuffled[item % len(shuffled)] for item in range(len(t.items))}
    cells = _cells(language).items()
    return [x for x, (_, i, p) in cells if away[i] != p], [x for x, (_, i, p) in cells if away[i] == p]


@cache
def _spoken(language: str, item: int, problem: int) -> dict[str, Features]:
    """Reply text -> features, for one (item, problem); openings do not matter to an agent."""
    t = table(language)
    right = list(t.problems.values())[problem]
    fixes = {fix: "right" if fix == right else "wrong" for fix in t.problems.values()} | {t.vague: "vague"}
    spoken = {}
    for filler, sympathy, fix, rude, goodbye in itertools.product(
        ("", *t.fillers), ("", *t.sympathy), fixes, ("", *t.rudeness), ("", *t.goodbyes)
    ):
        said = [s for s in (t.lead.format(item=t.items[item]), filler, sympathy, fix, rude, goodbye) if s]
        text = "".join(t.space + s for s in said)
        spoken[text] = Features(bool(sympathy), fixes[fix], bool(rude), bool(filler) + bool(goodbye))
    return spoken


def _spoken_to(language: str, prompt: str) -> dict[str, Features]:
    if prompt not in _cells(language):
        raise UsageError(f"{prompt!r} is not a prompt of the demo's {language!r} grammar{nearest(prompt, _cells(language))}")
    return _spoken(language, *_cells(language)[prompt][1:])


def replies(language: str, prompt: str) -> list[Reply]:
    """Everything that can be said to this customer: 3 x 3 x 7 x 3 x 2 = 378 replies. UsageError for a prompt not of this grammar."""
    return [Reply(text, features) for text, features in _spoken_to(language, prompt).items()]


def parse(language: str, prompt: str, text: str) -> Features | None:
    """What was said, or None where `text` is not, to the letter, one of `replies` (another customer's item, a word missing ...)."""
    return _spoken_to(language, prompt).get(text)


def reward(features: Features | None) -> float:
    """The hidden reward, Bradley-Terry logits; None (unparsable) earns UNPARSABLE = -2.25."""
    if features is None:
        return UNPARSABLE
    return EMPATHY * features.empathy + FIX[features.fix] + RUDE * features.rude + FILLER * features.fillers


def scores(asked: Sequence[str], texts: Sequence[str]) -> list[float]:
    """True reward of each text under its prompt, whatever its language: the demo's `--eval-reward`."""
    languages = {prompt: language for language in LANGUAGES for prompt in _cells(language)}
    return [reward(parse(languages.get(x, "en"), x, y)) for x, y in zip(asked, texts, strict=True)]


def spoken(language: str, prompt: str, chance: random.Random) -> str:
    """One reply as the agents of the corpus speak: good and bad habits, drawn independently."""
    t = table(language)
    kind = chance.choices(list(TALK_FIX), list(TALK_FIX.values()))[0]

    def maybe(name: str, sentences: tuple[str, ...]) -> str:
        return chance.choice(sentences) if chance.random() < TALK[name] else ""

    _, item, problem = _cells(language)[prompt]
    fixes = list(t.problems.values())
    right = fixes.pop(problem)
    fix = {"right": right, "vague": t.vague, "wrong": chance.choice(fixes)}[kind]
    said = maybe("filler", t.fillers), maybe("empathy", t.sympathy), fix, maybe("rude", t.rudeness), maybe("goodbye", t.goodbyes)
    slots = (t.lead.format(item=t.items[item]), *said)
    return "".join(t.space + s for s in slots if s)


def corpus(language: str, asked: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` dialogues (prompt, reply) over the prompts `asked`, every prompt equally often, in a seeded order."""
    chance = random.Random(f"corpus {language} {seed}")
    order = [asked[k % len(asked)] for k in range(count)]
    chance.shuffle(order)
    return [(prompt, spoken(language, prompt, chance)) for prompt in order]


def prefers(first: float, second: float, chance: random.Random) -> bool:
    """A noisy judge: True with Bradley-Terry probability sigmoid(first - second)."""
    return chance.random() < 1 / (1 + math.exp(second - first))


def words(language: str) -> list[str]:
    """Every word of the grammar, spaces kept with the word they precede, sorted: the tokeniser's vocabulary."""
    t = table(language)
    one = {text for i in range(len(t.items)) for p in range(len(t.problems)) for text in _spoken(language, i, p)}
    return sorted({word for text in [*one, *_cells(language)] for word in re.findall(t.word, text)})
