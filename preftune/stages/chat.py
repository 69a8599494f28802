"""`preftune chat`: talk to a model in the terminal, or to two side by side and keep your votes as preference records.

Answers are printed as they are sampled, with control characters made visible. A line of input is one turn; piped input works the
same, so that a chat can be scripted: `printf 'Hello\\n' | preftune chat MODEL`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from ..config import Chat
from ..errors import DataError, PreftuneError, UsageError
from ..files import append_jsonl
from ..formats import FORBIDDEN, to_json
from ..records import Judgement, Message, Record, Response, Text
from ..sampling import stream
from ..screen import clean, say
from ..tokens import Codec, decode_response, encode_prompt, end_ids, make_codec

HELP = """/clear  forget the dialogue so far
/help   this
/exit   leave (so does the end of the input, Ctrl-D)
Ctrl-C while an answer is written stops that answer."""
# What a voter types -> the judgement of the two answers as shown, or their labels where neither is preferred.
VOTES: dict[str, Judgement | tuple[bool, ...] | None] = {
    "1": Judgement(((0,), (1,))), "2": Judgement(((1,), (0,))), "=": Judgement(((0, 1),)), "0": (False, False), "s": None,
}  # fmt: skip
ASK = "better? 1, 2, = equal, 0 both bad, s skip: "


@dataclass(frozen=True)
class Speaker:
    """A model that answers, and the rules by which it reads text."""

    name: str
    model: Any
    codec: Codec
    window: int | None


@dataclass(frozen=True)
class Answer:
    """What a speaker said: its text, and whether it ended by itself."""

    text: str
    finished: bool


def run(options: Chat) -> int:
    """Read turns until the input ends. Raises UsageError for options that contradict each other, ModelError."""
    if not 1 <= len(options.model) <= 2:
        raise UsageError(f"chat takes one model or two, not {len(options.model)}")
    if options.votes and len(options.model) != 2:
        raise UsageError("--votes compares two models: name a second one")
    device = models.pick_device(options.device)
    speakers = [_load(name, options, device) for name in options.model]
    dialogue = _is_dialogue(speakers, options.template)
    kind = "a dialogue" if dialogue else "no chat template, so each line is a text to continue"
    say(f"{' and '.join(clean(s.name) for s in speakers)}: {kind}. /help lists the commands")
    history: tuple[Message, ...] = ()
    for number, line in enumerate(_lines("> ")):
        if line.startswith("/"):
            if line.strip() == "/exit":
                break
            history = _command(line, history)
            continue
        if any("\ud800" <= c <= "\udfff" for c in line):
            say("the line holds a character that is no text (a lone surrogate)")
            continue
        prompt: Text = (*history, Message("user", line)) if dialogue else line
        answers = _turn(speakers, prompt, options, number)
        if answers is None:
            continue
        kept: Answer | None = answers[0]
        if len(answers) == 2:
            kept = _vote(speakers, prompt, answers, options, number)
        if dialogue and kept:
            history = (*prompt, Message("assistant", kept.text))  # type: ignore[misc]
    return 0


def _load(name: str, options: Chat, device: str) -> Speaker:
    model, tokenizer = models.load(name, device=device, offline=options.offline)
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, control_tokens=options.control_tokens)
    return Speaker(name, model, codec, models.window_of(model.config))


def _is_dialogue(speakers: Sequence[Speaker], template: str) -> bool:
    """Whether lines are turns of a dialogue: where --template names a template, or the tokeniser brings its own."""
    own = {s.name: template != "auto" or s.codec.template_name != "plain" for s in speakers}
    if len(set(own.values())) == 2:
        lacks = next(name for name, has in own.items() if not has)
        raise UsageError(f"{lacks}: has no chat template, the other model has; name one: --template plain or a Jinja file")
    return all(own.values())


def _lines(question: str) -> Iterator[str]:
    """Lines of input without their ends, empty ones left out, until the input ends."""
    while (line := _ask(question)) is not None:
        if line.strip():
            yield line


def _ask(question: str) -> str | None:
    """One line of input, or None at its end. Piped input is echoed, so that what is printed reads as a dialogue."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  line editing and history

            return input(question)
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not UTF-8: {error.reason} at byte {error.start}") from error
    if not line:
        return None
    print(f"{question}{clean(line.rstrip(chr(10)))}", flush=True)
    return line.rstrip("\r\n")


def _command(line: str, history: tuple[Message, ...]) -> tuple[Message, ...]:
    """Obey a line that begins with '/'; the history that remains."""
    if line.strip() == "/clear":
        say("forgotten")
        return ()
    say(HELP if line.strip() == "/help" else f"no command {clean(line.strip())}; /help lists them")
    return history


def _turn(speakers: Sequence[Speaker], prompt: Text, options: Chat, number: int) -> list[Answer] | None:
    """Every speaker's answer, or None where one cannot answer or was stopped. Voters see the two in an order drawn by lot."""
    answers: dict[int, Answer] = {}
    order = _order(len(speakers), options, number)
    try:
        for place, i in enumerate(order):
            name = "" if options.votes else f": {clean(speakers[i].name)}"  # a voter does not know who speaks
            print(f"[{place + 1}{name}] " if len(speakers) == 2 else "", end="", flush=True)
            answers[i] = _answer(speakers[i], prompt, options, row=2 * number + i)
    except KeyboardInterrupt:
        print(" (stopped; this turn is forgotten)")
        return None
    except PreftuneError as error:
        print()
        say(str(error))
        return None
    return [answers[i] for i in range(len(speakers))]


def _order(count: int, options: Chat, number: int) -> list[int]:
    """Who is shown first. By lot where votes are taken, so that a habit for one side favours neither model."""
    return np.random.default_rng([options.seed, number]).permutation(count).tolist() if options.votes else list(range(count))


def _answer(speaker: Speaker, prompt: Text, options: Chat, *, row: int) -> Answer:
    """Sample one answer and print it piece by piece. Raises DataError for a prompt that the model cannot read or hold."""
    ids, ends = encode_prompt(speaker.codec, prompt), end_ids(speaker.codec, prompt)
    room = options.sample_tokens if speaker.window is None else min(options.sample_tokens, speaker.window - len(ids))
    if room < 1:
        raise DataError(f"{speaker.name}: {len(ids)} tokens so far, the model has {speaker.window} positions; /clear begins anew")
    got: list[int] = []
    text = ""
    for token, _, _ in stream(speaker.model, [ids], ends=[ends], rows=[row], max_tokens=room, temperature=options.temperature,
                              top_p=options.top_p, seed=options.seed):  # fmt: skip
        got.append(int(token[0]))
        whole = decode_response(speaker.codec, ids, got, ends)
        if whole.startswith(text) and not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens
            print(clean(whole[len(text) :]), end="", flush=True)
            text = whole
    whole, finished = decode_response(speaker.codec, ids, got, ends), got[-1] in ends
    print(clean(whole[len(text) :]), flush=True)
    if not finished:
        why = "--sample-tokens" if room == options.sample_tokens else "the model's window"
        say(f"(cut after {room} tokens: {why})")
    return Answer(whole, finished)


def _vote(speakers: Sequence[Speaker], prompt: Text, answers: Sequence[Answer], options: Chat, number: int) -> Answer | None:
    """Ask which answer is better, save the verdict; the answer with which the dialogue goes on (the first named, if none won)."""
    if not options.votes:
        return answers[0]
    order = _order(2, options, number)
    while (typed := _ask(ASK)) is not None and typed.strip() not in VOTES:
        say(f"{clean(typed.strip())!r} is not one of {', '.join(VOTES)}")
    verdict = None if typed is None else VOTES[typed.strip()]
    names = ", ".join(f"{place + 1} = {clean(speakers[i].name)}" for place, i in enumerate(order))
    unfit = next((why for a in answers if (why := _unfit(a.text, speakers, options))), "")
    if verdict is None or unfit:
        say(f"not saved{f': {unfit}' if verdict else ''} ({names})")
        return answers[0]
    how = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed, "max_tokens": options.sample_tokens}
    responses = tuple(Response(answers[i].text, answers[i].finished, source={"model": speakers[i].name} | how) for i in order)
    if isinstance(verdict, Judgement):
        record, better = Record(prompt, responses, (verdict,)), order[verdict.order[0][0]]
    else:
        record, better = Record(prompt, responses, labels=verdict), 0
    append_jsonl(Path(options.votes), to_json(record))
    say(f"saved to {clean(options.votes)} ({names})")
    return answers[better]


def _unfit(text: str, speakers: Sequence[Speaker], options: Chat) -> str:
    """Why `preftune dpo` with the same --control-tokens would refuse a record with this answer, or ''."""
    if found := FORBIDDEN.search(text):
        return f"an answer holds the control character {clean(found[0])}, which training refuses"
    spelt = next((match[0] for s in speakers if (match := s.codec.control.search(text))), "")
    if spelt and options.control_tokens == "refuse":
        return f"an answer spells the control token {clean(spelt)!r}, which training refuses; --control-tokens split saves such votes"
    return "" if text.strip() else "an answer is empty, which training refuses"
