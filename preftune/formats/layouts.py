"""The layouts: a table, and one function row -> Record for each. A row is used as it stands or refused with field, what was found and
what was expected; nothing is mended or cut on the way. Touches `errors` and `records`. A new layout is a function and a line in
`FORMATS`.

    >>> detect({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    'prompt-chosen-rejected'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, EmptyText, nearest
from ..records import NOTHING, Judgement, Message, Record, Response, Text

DEPTH_LIMIT = 50  # objects inside objects
# NUL ends a text in many a program, and lone surrogates no file in UTF-8 can hold. Other control characters do stand in people's
# answers and in models' samples: kept, and shown as symbols wherever they are shown.
FORBIDDEN = re.compile(r"[\x00\ud800-\udfff]")

Row = Mapping[str, Any]


# --- values: each function takes one value, returns it typed, or says what was expected ---------------------------------------


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, str(value).lower()), (str, "text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a value of type {type(value).__name__}")


def _expected(value: Any, what: str, field: str) -> DataError:
    return DataError(f"{_kind(value)}, expected {what}", field=field)


def _show(value: Any) -> str:
    """A value in a message: quoted, escaped, short."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def _names(names: Iterable[str]) -> str:
    shown = [_show(name) for name in names]
    return ", ".join(shown[:12] + ["..."] * (len(shown) > 12)) or "none"


def _shared(one: Sequence[Any], two: Sequence[Any]) -> int:
    """How many items the two have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _string(value: Any, field: str, *, what: str = "text", blank: bool = False) -> str:
    if not isinstance(value, str):
        raise _expected(value, what, field)
    if not blank and not value.strip():
        raise EmptyText("empty, expected text" if not value else "only white space, expected text", field=field)
    return value


def _number(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _expected(value, "a number or null", field)
    try:
        return float(value)
    except OverflowError:
        raise DataError("a number too large for a float", field=field) from None


def _boolean(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise _expected(value, "true or false", field)
    return value


def _label(value: Any, field: str) -> bool | str:
    """A verdict, or the name of a class; a verdict in quotes is neither."""
    if not isinstance(value, str):
        return _boolean(value, field)
    if value.strip().lower() in ("true", "false", "yes", "no", "0", "1"):
        raise DataError(f"{_show(value)} is text: expected true or false without quotes, or the name of a class", field=field)
    return _string(value, field)


def _list(value: Any, field: str, *, of: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise _expected(value, f"a list of {of}", field)
    if length is not None and len(value) != length:
        raise DataError(f"length {len(value)}, expected one for each of the {length} responses", field=field)
    return value


def _only(value: Any, known: Sequence[str], field: str) -> dict[str, Any]:
    """An object without any key but the known ones."""
    if not isinstance(value, dict):
        raise _expected(value, "an object", field)
    for key in value:
        if key not in known:
            raise DataError(f"unknown key: {_show(key)}{nearest(key, known)}; known are {', '.join(known)}", field=field)
    return value


# --- messages -----------------------------------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "observation": "tool"}  # fmt: skip
# Keys of a message that would change what is trained; no layout here reads them.
UNREAD_IN_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train", "images")


def _message(value: Any, field: str) -> Message:
    """{'role', 'content'} or {'from', 'value'}. Further keys go to `_extras`, or are refused where they would change the text."""
    if not isinstance(value, dict):
        raise _expected(value, "a message: {'role': .., 'content': ..} or {'from': .., 'value': ..}", field)
    role_key, text_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for key in (role_key, text_key):
        if key not in value:
            raise DataError(f"a message without {key!r}{nearest(key, value)}: it has {_names(value)}", field=field)
    role = value[role_key]
    if not isinstance(role, str) or role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"unknown role: {_show(role)}{near}, expected one of {', '.join(ROLES)}", field=field)
    for key in UNREAD_IN_MESSAGES:
        if value.get(key):
            raise DataError(f"a message with {key!r}: this is not read, and without it the text would be another", field=field)
    content = _string(value[text_key], f"{field}.{text_key}", blank=ROLES[role] == "system")
    return Message(ROLES[role], content)


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    found = tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(_list(value, field, of="messages")))
    if not found:
        raise DataError("empty, expected messages", field=field)
    return found


def _text(value: Any, field: str) -> Text:
    """Text, or a list of messages, or one message."""
    if isinstance(value, list):
        return _messages(value, field)
    if isinstance(value, dict):
        return (_message(value, field),)
    return _string(value, field, what="text or messages")


def parse_prompt(value: Any, field: str) -> Text:
    """Text, or messages that end before an answer. Raises DataError."""
    text = _text(value, field)
    if not isinstance(text, str) and text[-1].role == "assistant":
        raise DataError("ends with an assistant message, expected the user's turn last", field=field)
    return text


def _inside(one: tuple[Message, ...], two: tuple[Message, ...]) -> tuple[Text, Text, Text]:
    """Split dialogues that share their beginning: (prompt, rest of one, rest of two)."""
    size = _shared(one, two) - (one == two)  # equal dialogues are the audit's business: the answer is the last turn
    rest = (one[size:], two[size:])
    if not size:
        raise DataError("no shared first message: the prompt must stand at the beginning of both", field="chosen")
    if not all(rest) or any(part[0].role != "assistant" for part in rest) or one[size - 1].role == "assistant":
        raise DataError("ambiguous: the dialogues do not part at an assistant turn after the user's", field="rejected")
    return one[:size], *rest


# --- from parts to a record -----------------------------------------------------------------------------------------------------

# Columns that belong to the prompt. A layout that does not read them refuses rows in which they hold something.
PROMPT_COLUMNS = ("system", "history", "tools", "images", "videos", "audios")
SCORES = ("score_chosen", "score_rejected")
ALWAYS_OPTIONAL = ("id", "meta")


def _extras(value: Any) -> list[dict[str, Any]]:
    """What messages carry besides role and text."""
    if isinstance(value, str):
        return []
    items = [item if isinstance(item, dict) else {} for item in (value if isinstance(value, list) else [value])]
    known = ("role", "content", "from", "value")
    extra = [{k: v for k, v in item.items() if k not in known and v is not None} for item in items]
    return extra if any(extra) else []


def _meta(row: Row, used: Sequence[str], spoken: Sequence[str]) -> Row:
    for column in PROMPT_COLUMNS:
        if row.get(column) and column not in used:
            raise DataError("not read by this layout, and without it the prompt would be another: put it into the prompt, "
                            "or remove the column", field=column)  # fmt: skip
    meta = {key: value for key, value in row.items() if key not in used}
    return meta | {key: extra for key in spoken if key in row and (extra := _extras(row[key]))}


def _record(row: Row, prompt: Text, responses: Sequence[Response], *, used: Sequence[str], spoken: Sequence[str] = (),
            fields: Sequence[str] = (), meta: Row = NOTHING, judgements: Sequence[Judgement] = (),
            labels: tuple[bool | str | None, ...] | None = None) -> Record:  # fmt: skip
    """Check what holds in every layout and keep the columns that are not `used`.

    `spoken`: columns that may hold messages; `fields`: what the responses are called in the row; `meta`: the row's own.
    """
    for index, response in enumerate(responses):
        field = fields[index] if fields else f"responses[{index}]"
        if isinstance(response.text, str):
            continue
        if isinstance(prompt, str):
            raise DataError("messages, but the prompt is text: give both as text or both as messages", field=field)
        if response.text[0].role != "assistant" or response.text[-1].role != "assistant":
            roles = f"it runs from {response.text[0].role} to {response.text[-1].role}"
            raise DataError(f"not an answer: {roles}, expected the assistant first and last", field=field)
    name = row.get("id")
    known = isinstance(name, str) or (isinstance(name, int) and not isinstance(name, bool))
    kept = {**meta, **_meta(row, (*used, "id") if known else used, spoken)}
    return Record(prompt, tuple(responses), tuple(judgements), labels, str(name) if known else "", kept or NOTHING)


def _pair(row: Row, prompt: Text, chosen: Text, rejected: Text, *, used: Sequence[str], spoken: Sequence[str] = ()) -> Record:
    scores = [_number(row.get(column), column) for column in SCORES]
    responses = (Response(chosen, score=scores[0]), Response(rejected, score=scores[1]))
    return _record(row, prompt, responses, used=(*used, *SCORES), spoken=spoken, fields=("chosen", "rejected"),
                   judgements=(Judgement(((0,), (1,))),))  # fmt: skip


# --- the layouts ----------------------------------------------------------------------------------------------------------------

RESPONSE_KEYS = ("text", "finished", "score", "source")
JUDGEMENT_KEYS = ("order", "below", "prob", "weight", "by")
CANONICAL = ("prompt", "responses", "ranks", "scores", "judgements", "labels", "id", "meta")


def _response(value: Any, field: str) -> Response:
    if not isinstance(value, dict):
        return Response(_text(value, field))
    if "text" not in value:
        raise DataError(f"no 'text'{nearest('text', value)}: it has {_names(value)}", field=field)
    _only(value, RESPONSE_KEYS, field)
    finished, source = value.get("finished"), value.get("source")
    if source is not None and not isinstance(source, dict):
        raise _expected(source, "an object or null", f"{field}.source")
    return Response(_text(value["text"], f"{field}.text"), None if finished is None else _boolean(finished, f"{field}.finished"),
                    _number(value.get("score"), f"{field}.score"), source)  # fmt: skip


def _tier(value: Any, field: str, size: int) -> tuple[int, ...]:
    for index in _list(value, field, of="response numbers"):
        if isinstance(index, bool) or not isinstance(index, int):
            raise _expected(index, "the number of a response", field)
        if not 0 <= index < size:
            raise DataError(f"no such response: {index}; there are {size}, counted from 0", field=field)
    return tuple(value)


def _judgement(value: Any, field: str, size: int) -> Judgement:
    _only(value, JUDGEMENT_KEYS, field)
    tiers = _list(value.get("order"), f"{field}.order", of="tiers")
    order = tuple(_tier(tier, f"{field}.order[{i}]", size) for i, tier in enumerate(tiers))
    below = _tier([] if value.get("below") is None else value["below"], f"{field}.below", size)
    named = [index for tier in (*order, below) for index in tier]
    if not order or not all(order):
        raise DataError("empty tier, expected at least one response in each", field=f"{field}.order")
    if len(set(named)) < len(named):
        raise DataError("a response named twice", field=field)
    if len(named) < 2:
        raise DataError("one response named: a judgement compares at least two", field=field)
    prob, weight = _number(value.get("prob"), f"{field}.prob"), _number(value.get("weight", 1.0), f"{field}.weight")
    by = value.get("by")
    if prob is not None and (len(order) != 2 or below):
        raise DataError("P(first tier preferred) is given: it needs exactly two tiers and nothing below", field=f"{field}.prob")
    if prob is not None and not 0 <= prob <= 1:
        raise DataError(f"outside its range: {prob}, expected 0 to 1", field=f"{field}.prob")
    if weight is None or weight <= 0:
        raise DataError(f"outside its range: {weight}, expected a number of votes above 0", field=f"{field}.weight")
    return Judgement(order, below, prob, weight, None if by is None else _string(by, f"{field}.by"))


def _ranked(ranks: list[Any]) -> Judgement:
    """Ranks beside responses (lowest is best, equal is a tie, null was not judged) as one judgement."""
    for i, rank in enumerate(ranks):
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
            raise _expected(rank, "a rank (lowest is best) or null", f"ranks[{i}]")
    levels = sorted({rank for rank in ranks if rank is not None})
    if sum(rank is not None for rank in ranks) < 2:
        raise DataError("fewer than two responses ranked: nothing is compared", field="ranks")
    return Judgement(tuple(tuple(i for i, rank in enumerate(ranks) if rank == level) for level in levels))


def _canonical(row: Row) -> Record:
    """Design section 3; `ranks` and `scores` are shorthand lists beside `responses`."""
    given = _list(row["responses"], "responses", of="responses")
    if not given:
        raise DataError("empty, expected at least one response", field="responses")
    responses, size = [_response(value, f"responses[{i}]") for i, value in enumerate(given)], len(given)
    verdicts = _list([] if row.get("judgements") is None else row["judgements"], "judgements", of="judgements")
    judgements = [_judgement(value, f"judgements[{i}]", size) for i, value in enumerate(verdicts)]
    if row.get("ranks") is not None:
        judgements.append(_ranked(_list(row["ranks"], "ranks", of="ranks", length=size)))
    if row.get("scores") is not None:
        for i, value in enumerate(_list(row["scores"], "scores", of="numbers", length=size)):
            if responses[i].score is not None:
                raise DataError("given twice: in the list and in the response", field=f"scores[{i}]")
            responses[i] = replace(responses[i], score=_number(value, f"scores[{i}]"))
    labels = None
    if row.get("labels") is not None:
        given = _list(row["labels"], "labels", of="true, false or null", length=size)
        labels = tuple(None if value is None else _label(value, f"labels[{i}]") for i, value in enumerate(given))
    meta, name = row.get("meta"), row.get("id")
    if meta is not None and not isinstance(meta, dict):
        raise _expected(meta, "an object", "meta")
    if isinstance(name, bool) or not (name is None or isinstance(name, str | int)):
        raise _expected(name, "text", "id")
    if twice := sorted(set(meta or ()) & (set(row) - set(CANONICAL))):
        raise DataError(f"given twice: {_show(twice[0])} is a column and stands in 'meta'", field="meta")
    alone = row["prompt"] == "" and not judgements and labels is None  # a text after nothing, as the layout 'text' gives it
    prompt = "" if alone else parse_prompt(row["prompt"], "prompt")
    return _record(row, prompt, responses, used=CANONICAL, spoken=("prompt",), meta=meta or NOTHING,
                   judgements=judgements, labels=labels)  # fmt: skip


def _prompt_pair(row: Row) -> Record:
    """Prompt and answers apart. Messages that repeat the prompt's text as their first user turn are split there."""
    prompt = parse_prompt(row["prompt"], "prompt")
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    if isinstance(prompt, str) and not isinstance(chosen, str) and not isinstance(rejected, str):
        shared, chosen, rejected = _inside(chosen, rejected)
        if Message("user", prompt) not in shared:
            raise DataError("text that no shared user message repeats; give it as messages", field="prompt")
        prompt = shared
    columns = ("prompt", "chosen", "rejected")
    return _pair(row, prompt, chosen, rejected, used=columns, spoken=columns)


def _dialogue_pair(row: Row) -> Record:
    """Both dialogues as messages, the prompt inside: what they share."""
    columns = ("chosen", "rejected")
    parts = _inside(*(_messages(row[column], column) for column in columns))
    return _pair(row, *parts, used=columns, spoken=columns)


HH_TURN = re.compile(r"\n\n(Human|Assistant):")
ASSISTANT = "\n\nAssistant:"


def _turns(text: str, field: str) -> list[str]:
    """Cut before every turn marker; the pieces joined are the text."""
    starts = [match.start() for match in HH_TURN.finditer(text)]
    if not starts:
        raise DataError(r"no '\n\nHuman:' or '\n\nAssistant:' turn: nothing says where the prompt ends; give a 'prompt' column",
                        field=field)  # fmt: skip
    return [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]


def _hh(row: Row) -> Record:
    r"""hh-rlhf: the prompt runs to the '\n\nAssistant:' of the turn in which the two part; an answer keeps its leading space."""
    chosen, rejected = _string(row["chosen"], "chosen"), _string(row["rejected"], "rejected")
    one, two = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    part = _shared(one, two) - (chosen == rejected)  # equal dialogues are the audit's business: the answer is the last turn
    if part != len(one) - 1 or part != len(two) - 1 or not all(turns[part].startswith(ASSISTANT) for turns in (one, two)):
        raise DataError("ambiguous: the dialogues do not part in the last turn of both, an assistant's", field="rejected")
    if part == 0:
        raise DataError("empty: nothing stands before the answer", field="prompt")
    prompt = "".join(one[:part]) + ASSISTANT
    answers = [_string(text[len(prompt) :], field) for text, field in ((chosen, "chosen"), (rejected, "rejected"))]
    return _pair(row, prompt, *answers, used=("chosen", "rejected"))


# Where an answer begins, in the habits of prompt templates: the text up to the end of the match is prompt.
MARKER = re.compile(r"(?:^|\n)[ \t]*(?:#+[ \t]*)?(?:Assistant|Response|Answer|AI|Bot|GPT|助手|回答|答)[ \t]*[:：]\n?"
                    r"|<\|assistant\|>\n?|<\|im_start\|>assistant\n|<start_of_turn>model\n|\[/INST\]")  # fmt: skip
STOPS = "。！？；：，、…"  # scripts without spaces: after one of these no word goes on


def _boundary(one: str, two: str, size: int) -> int:
    """The last place within the shared `size` characters where a word ends in both texts: before a space, after a line end or a
    full-width stop. 0 where there is none."""
    for at in range(size, 0, -1):
        if one[at - 1] == "\n" or one[at - 1] in STOPS:
            return at
        if not one[at - 1].isspace() and at < min(len(one), len(two)) and one[at].isspace() and two[at].isspace():
            return at
    return 0


def _chose(row: Row) -> Record:
    """Prompt and answer in one text, twice (the key is spelt 'chose'). The prompt is what they share, back to a turn marker or,
    where there is none, to the end of a word."""
    one, two = _string(row["chose"], "chose"), _string(row["rejected"], "rejected")
    size = _shared(one, two)
    shared = list(MARKER.finditer(one, 0, size))
    start = shared[-1].end() if shared else 0
    turns = {match[0].strip() for text in (one, two) for match in MARKER.finditer(text, start)}
    if one == two or (not shared and size == min(len(one), len(two))):
        raise DataError("ambiguous: one text is the beginning of the other", field="rejected")
    if shared[-1][0].strip() in turns if shared else turns:
        raise DataError("ambiguous: the texts part before their last turn", field="rejected")
    at = start or _boundary(one, two, size)
    if not one[:at].strip():
        raise DataError("ambiguous: the two texts share no whole word at their beginning, so there is no prompt", field="chose")
    answers = [_string(text[at:], field) for text, field in ((one, "chose"), (two, "rejected"))]
    return _pair(row, one[:at], *answers, used=("chose", "rejected"))


def _system(row: Row) -> tuple[Message, ...]:
    value = row.get("system")
    return (Message("system", _string(value, "system")),) if value else ()


def _instructed(row: Row) -> tuple[Message, ...]:
    """Instruction and input become one user message, a blank line between them."""
    instruction, extra = _string(row["instruction"], "instruction"), row.get("input")
    extra = _string(extra, "input", blank=True) if extra is not None else ""
    content = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return (*_system(row), Message("user", content))


def _instruction_pair(row: Row) -> Record:
    """A pair under an instruction; `output` goes to meta."""
    chosen, rejected = _string(row["chosen"], "chosen"), _string(row["rejected"], "rejected")
    return _pair(row, _instructed(row), chosen, rejected, used=("instruction", "input", "system", "chosen", "rejected"))


def _instruction_outputs(row: Row) -> Record:
    """Alpaca's ranking rows: `output` lists the answers, best first."""
    given = _list(row["output"], "output", of="texts, best first")
    if len(given) < 2:
        raise DataError(f"length {len(given)}, expected at least two outputs to rank", field="output")
    responses = [Response(_string(text, f"output[{i}]")) for i, text in enumerate(given)]
    return _record(row, _instructed(row), responses, used=("instruction", "input", "system", "output"),
                   judgements=(Judgement(tuple((i,) for i in range(len(given)))),))  # fmt: skip


def _question(row: Row) -> Record:
    """A question with two answers of which `response_j` was preferred."""
    responses = [Response(_string(row[column], column)) for column in ("response_j", "response_k")]
    return _record(row, (Message("user", _string(row["question"], "question")),), responses,
                   used=("question", "response_j", "response_k"), judgements=(Judgement(((0,), (1,))),))  # fmt: skip


def _llmbar(row: Row) -> Record:
    """An instruction with two outputs; the label, 1 or 2, is the better one."""
    label = row["label"]
    if not isinstance(label, int) or isinstance(label, bool) or label not in (1, 2):
        raise DataError(f"unknown label: {_show(label)}, expected 1 or 2 (the better output)", field="label")
    responses = [Response(_string(row[column], column)) for column in ("output_1", "output_2")]
    prompt = (Message("user", _string(row["input"], "input")),)
    return _record(row, prompt, responses, used=("input", "output_1", "output_2", "label"),
                   judgements=(Judgement(((label - 1,), (2 - label,))),))  # fmt: skip


def _annotated(row: Row) -> Record:
    """AlpacaEval's annotations: from 1, `output_1` is better, to 2; 0 and 1.5 are draws. What lies between is a probability."""
    value, sides = _number(row["preference"], "preference"), ("output_1", "output_2")
    if value is None or (value != 0 and not 1 <= value <= 2):
        raise DataError(f"{_show(row['preference'])}, expected 1 (output_1 is better) to 2 (output_2), or 0 (a draw)", field="preference")
    generators, by = (row.get("generator_1"), row.get("generator_2")), row.get("annotator")
    responses = [Response(_string(row[side], side), source={"model": name} if isinstance(name, str) and name else None)
                 for side, name in zip(sides, generators, strict=True)]  # fmt: skip
    order = ((0, 1),) if value in (0, 1.5) else ((0,), (1,)) if value < 1.5 else ((1,), (0,))
    prob = None if value in (0, 1, 1.5, 2) else abs(value - 1.5) + 0.5
    used = ("instruction", "input", "system", *sides, "generator_1", "generator_2", "annotator", "preference")
    return _record(row, _instructed(row), responses, used=used,
                   judgements=(Judgement(order, prob=prob, by=by if isinstance(by, str) and by else None),))  # fmt: skip


def _safe_rlhf(row: Row) -> Record:
    """A prompt with two responses; `better_response_id`, 0 or 1, is the better one."""
    better = row["better_response_id"]
    if not isinstance(better, int) or isinstance(better, bool) or better not in (0, 1):
        raise DataError(f"unknown response: {_show(better)}, expected 0 or 1 (the better response)", field="better_response_id")
    columns = ("response_0", "response_1")
    return _record(row, parse_prompt(row["prompt"], "prompt"), [Response(_string(row[column], column)) for column in columns],
                   used=("prompt", *columns, "better_response_id"), judgements=(Judgement(((better,), (1 - better,))),))  # fmt: skip


def _conversation_pair(row: Row) -> Record:
    """LLaMA-Factory's sharegpt ranking: the prompt in `conversations`, one message each in `chosen` and `rejected`."""
    spoken = ("conversations", "chosen", "rejected")
    prompt = parse_prompt(row["conversations"], "conversations")
    if isinstance(prompt, str):
        raise _expected(prompt, "a list of messages", "conversations")
    return _pair(row, (*_system(row), *prompt), _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected"),
                 used=(*spoken, "system"), spoken=spoken)  # fmt: skip


def _labelled_messages(row: Row) -> Record:
    """A dialogue whose last assistant turn was found good or bad."""
    messages = _messages(row["messages"], "messages")
    if messages[-1].role != "assistant" or len(messages) == 1:
        raise DataError("no answer: expected a prompt and the assistant's message last", field="messages")
    if messages[-2].role == "assistant":
        raise DataError("ambiguous: two assistant messages at the end", field="messages")
    return _record(row, messages[:-1], (Response(messages[-1:]),), used=("messages", "label"), spoken=("messages",),
                   fields=("messages",), labels=(_label(row["label"], "label"),))  # fmt: skip


def _labelled_completion(row: Row) -> Record:
    """A prompt and one completion that was found good or bad."""
    columns = ("prompt", "completion")
    response = Response(_text(row["completion"], "completion"))
    return _record(row, parse_prompt(row["prompt"], "prompt"), (response,), used=(*columns, "label"), spoken=columns,
                   fields=("completion",), labels=(_label(row["label"], "label"),))  # fmt: skip


def _steps(row: Row) -> Record:
    """An answer in steps with a label each: the answer as it stands after a step is a response of its own, cut there but for the last, and
    has that step's label. A step ends with a line break, its own or one that is put there."""
    columns = ("prompt", "completions", "labels")
    given = _list(row["completions"], "completions", of="steps")
    steps = [_string(text, f"completions[{i}]") for i, text in enumerate(given)]
    labels = _list(row["labels"], "labels", of="true or false, one a step")
    if not steps:
        raise DataError("empty, expected steps", field="completions")
    if len(labels) != len(steps):
        raise DataError(f"length {len(labels)}, expected one for each of the {len(steps)} steps", field="labels")
    ended = [text if text.endswith("\n") else f"{text}\n" for text in steps[:-1]]
    responses = [Response("".join(ended[: i + 1]), finished=False) for i in range(len(ended))]
    responses.append(Response("".join([*ended, steps[-1]])))
    return _record(row, parse_prompt(row["prompt"], "prompt"), responses, used=columns, spoken=("prompt",),
                   labels=tuple(None if x is None else _label(x, f"labels[{i}]") for i, x in enumerate(labels)))  # fmt: skip


TREE_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


def _node(value: Any, field: str) -> Message:
    if not isinstance(value, dict):
        raise _expected(value, "a message with 'text', 'role' and 'replies'", field)
    for key in ("text", "role"):
        if key not in value:
            raise DataError(f"a message without {key!r}{nearest(key, value)}: it has {_names(value)}", field=field)
    if not isinstance(value["role"], str) or value["role"] not in TREE_ROLES:
        raise DataError(f"unknown role: {_show(value['role'])}, expected one of {', '.join(TREE_ROLES)}", field=f"{field}.role")
    return Message(TREE_ROLES[value["role"]], _string(value["text"], f"{field}.text"))


def _tree(row: Row) -> tuple[Record, ...]:
    """A message tree: one record for every list of two or more ranked replies (0 is best), the path to it as prompt. Deleted replies
    and what follows them are left out; rankings of users' turns are not preferences between answers."""
    _string(row["message_tree_id"], "message_tree_id")
    found: list[Record] = []

    def walk(node: Any, before: tuple[Message, ...], field: str) -> None:
        path = (*before, _node(node, field))
        replies = _list(node.get("replies") or [], f"{field}.replies", of="messages")
        fields = [f"{field}.replies[{i}]" for i in range(len(replies))]
        alive = [(reply, _node(reply, where), where) for reply, where in zip(replies, fields, strict=True)
                 if not (isinstance(reply, dict) and reply.get("deleted"))]  # fmt: skip
        ranked = [(reply, said) for reply, said, _ in alive if said.role == "assistant" and reply.get("rank") is not None]
        if len(ranked) > 1:
            responses = [Response(said.content, source={"model": reply["model_name"]} if reply.get("model_name") else None)
                         for reply, said in ranked]  # fmt: skip
            order = _ranked([reply["rank"] for reply, _ in ranked])
            record = _record(row, path, responses, used=("message_tree_id", "prompt"), judgements=(order,))
            found.append(record if record.id else replace(record, id=str(node.get("message_id") or "")))
        for reply, _, where in alive:
            walk(reply, path, where)

    walk(row["prompt"], (), "prompt")
    return tuple(found)


def _demonstration(row: Row, prompt: Text, text: Text, *, used: Sequence[str], spoken: Sequence[str] = (), field: str) -> Record:
    """One response that nobody judged: what `sft` trains on."""
    return _record(row, prompt, (Response(text),), used=used, spoken=spoken, fields=(field,))


def _spoken_demonstration(row: Row, column: str) -> Record:
    """A dialogue: the prompt is what stands before the assistant's first turn, the response everything from there on."""
    messages = (*_system(row), *_messages(row[column], column))
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), 0)
    if not first or messages[-1].role != "assistant":
        raise DataError("no answer: expected a prompt, and the assistant's message last", field=column)
    return _demonstration(row, messages[:first], messages[first:], used=(column, "system"), spoken=(column,), field=column)


def _completion(row: Row) -> Record:
    """A prompt and its completion."""
    columns = ("prompt", "completion")
    return _demonstration(row, parse_prompt(row["prompt"], "prompt"), _text(row["completion"], "completion"), used=columns,
                          spoken=columns, field="completion")  # fmt: skip


def _output(row: Row) -> Record:
    """An instruction and its output."""
    return _demonstration(row, _instructed(row), _string(row["output"], "output"), used=("instruction", "input", "system", "output"),
                          field="output")  # fmt: skip


def _running_text(row: Row) -> Record:
    """A text to learn by heart: it stands after an empty prompt."""
    return _demonstration(row, "", _string(row["text"], "text"), used=("text",), field="text")


@dataclass(frozen=True, slots=True)
class Format:
    """One layout.

    Args:
        required: the columns without which a row is not of this layout.
        read: row -> Record, or several where a row is a tree; raises DataError with the field at fault.
        description: one line for the documentation.
        example: a row.
        optional: further columns that it reads, and that may come and go from row to row.
        fits: what the columns' names do not tell: looks at the values of a row that has the required columns.
    """

    required: tuple[str, ...]
    read: Callable[[Row], Record | tuple[Record, ...]]
    description: str
    example: Row
    optional: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True

    def detects(self, row: Row) -> bool:
        """Whether a row could be of this layout; of several the one that requires most columns is meant."""
        return all(column in row for column in self.required) and self.fits(row)


_PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
_ASK, _GOOD, _BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
_TURN = "\n\nHuman: 2+2?\n\nAssistant: "

FORMATS: dict[str, Format] = {
    "canonical": Format(("prompt", "responses"), _canonical, "our own form: responses once, judgements, labels, scores",
                        {"prompt": "2+2=", "responses": ["4", {"text": "5"}], "ranks": [0, 1]}, CANONICAL[2:]),
    "prompt-chosen-rejected": Format(("prompt", "chosen", "rejected"), _prompt_pair, "pairs as text or messages", _PAIR, SCORES),
    "chosen-rejected-messages": Format(
        ("chosen", "rejected"), _dialogue_pair, "pairs of dialogues; the shared messages are the prompt",
        {"chosen": [_ASK, _GOOD], "rejected": [_ASK, _BAD]}, SCORES, lambda row: isinstance(row["chosen"], list)),
    "hh-rlhf": Format(("chosen", "rejected"), _hh, r"pairs of dialogues as text with '\n\nHuman:' and '\n\nAssistant:' turns",
                      {"chosen": _TURN + "4", "rejected": _TURN + "5"}, SCORES, lambda row: not isinstance(row["chosen"], list)),
    "chose-rejected": Format(("chose", "rejected"), _chose, "pairs of prompt+response in one text; the key is spelt 'chose'",
                             {"chose": "2 and 2 is 4", "rejected": "2 and 2 is 5"}, SCORES),
    "instruction-chosen-rejected": Format(
        ("instruction", "chosen", "rejected"), _instruction_pair, "pairs under an instruction and its input",
        {"instruction": "Add.", "input": "2, 2", "output": "4", "chosen": "4", "rejected": "5"},
        ("input", "output", "system", *SCORES)),
    "llmbar": Format(("input", "output_1", "output_2", "label"), _llmbar, "two outputs and which is better",
                     {"input": "2+2?", "output_1": "4", "output_2": "5", "label": 1}),
    "instruction-outputs-preference": Format(
        ("instruction", "output_1", "output_2", "preference"), _annotated,
        "AlpacaEval's annotations: two outputs and a preference from 1 to 2",
        {"instruction": "Add.", "input": "2, 2", "output_1": "5", "generator_1": "base", "output_2": "4", "generator_2": "mine",
         "annotator": "people", "preference": 2}, ("input", "system", "generator_1", "generator_2", "annotator")),
    "better-response-id": Format(("prompt", "response_0", "response_1", "better_response_id"), _safe_rlhf, "PKU-SafeRLHF's rows",
                                 {"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1}),
    "conversations-chosen-rejected": Format(
        ("conversations", "chosen", "rejected"), _conversation_pair, "LLaMA-Factory's sharegpt ranking: from/value messages",
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}}, ("system", *SCORES)),
    "messages-label": Format(("messages", "label"), _labelled_messages, "unpaired: a dialogue and whether its last turn is good",
                             {"messages": [_ASK, _GOOD], "label": True}),
    "prompt-completion-label": Format(
        ("prompt", "completion", "label"), _labelled_completion, "unpaired: a completion and whether it is good",
        {"prompt": "2+2=", "completion": "4", "label": True}),
    "prompt-completions-labels": Format(
        ("prompt", "completions", "labels"), _steps, "an answer in steps with a label each; TRL's stepwise layout",
        {"prompt": "2+2+2=", "completions": ["2+2 is 4.", "4+2 is 7."], "labels": [True, False]}),
    "question-responses": Format(("question", "response_j", "response_k"), _question, "two answers; `response_j` was preferred",
                                 {"question": "2+2?", "response_j": "4", "response_k": "5"}),
    "instruction-outputs": Format(
        ("instruction", "output"), _instruction_outputs, "alpaca's ranking rows: `output` lists the answers, best first",
        {"instruction": "Add.", "input": "2, 2", "output": ["4", "5"]}, ("input", "system"), lambda row: isinstance(row["output"], list)),
    "message-tree": Format(
        ("message_tree_id", "prompt"), _tree, "a tree of messages with ranked replies: one record for every ranked list",
        {"message_tree_id": "t", "prompt": {"message_id": "m", "role": "prompter", "text": "2+2?", "replies": [
            {"role": "assistant", "text": "5", "rank": 1}, {"role": "assistant", "text": "4", "rank": 0}]}}),
    "messages": Format(("messages",), lambda row: _spoken_demonstration(row, "messages"), "for `sft`: a dialogue, all its answers trained",
                       {"messages": [_ASK, _GOOD]}, ("system",)),
    "conversations": Format(
        ("conversations",), lambda row: _spoken_demonstration(row, "conversations"), "for `sft`: a dialogue with from/value messages",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, ("system",)),
    "prompt-completion": Format(("prompt", "completion"), _completion, "for `sft`: a prompt and its completion",
                                {"prompt": "2+2=", "completion": "4"}),
    "instruction-output": Format(
        ("instruction", "output"), _output, "for `sft`: an instruction, its input and the output",
        {"instruction": "Add.", "input": "2, 2", "output": "4"}, ("input", "system"), lambda row: not isinstance(row["output"], list)),
    "text": Format(("text",), _running_text, "for `sft`: running text", {"text": "2 and 2 is 4."}),
}  # fmt: skip


def detect(row: Row) -> str:
    """The layout of a row. Raises DataError that lists the columns seen, the nearest layout and all known ones."""
    found = [name for name, layout in FORMATS.items() if layout.detects(row)]
    most = max((len(FORMATS[name].required) for name in found), default=0)
    found = [name for name in found if len(FORMATS[name].required) == most]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"the layout is ambiguous: {' and '.join(found)} both fit; say which with --format")
    share = {name: sum(c in row or bool(nearest(c, row)) for c in f.required) / len(f.required) for name, f in FORMATS.items()}
    best = max(share, key=lambda name: (share[name], len(FORMATS[name].required)))
    lacks = [f"{column!r}{_near(column, row, FORMATS[best])}" for column in FORMATS[best].required if column not in row]
    hint = f"nearest is {best}, which lacks {', '.join(lacks)}" if share[best] > 0 else "none is near"
    known = "; ".join(f"{name} ({', '.join(layout.required)})" for name, layout in FORMATS.items())
    raise DataError(f"no known layout: the columns are {_names(row)}\n{hint}\nknown: {known}")


def _near(column: str, row: Row, layout: Format) -> str:
    return nearest(column, [name for name in row if name not in layout.required])


def require_text(row: Row) -> None:
    """Refuse what no text may hold, anywhere in the row, showing its escape and where it stands."""
    for column, top in row.items():
        stack: list[tuple[Any, int]] = [(column, 0), (top, 0)]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, str):
                if found := FORBIDDEN.search(value):
                    kind = "lone surrogate" if found[0] >= "\ud800" else "control character"
                    code = f"\\u{ord(found[0]):04x}"
                    field = column if column.isprintable() else ascii(column)
                    raise DataError(f"{kind}: {code} at character {found.start()}; remove it", field=field)
            elif depth >= DEPTH_LIMIT:
                raise DataError(f"nested too deeply: more than {DEPTH_LIMIT} levels", field=column)
            elif isinstance(value, list):
                stack += [(item, depth + 1) for item in value]
            elif isinstance(value, dict):
                stack += [(item, depth + 1) for pair in value.items() for item in pair]


def parse_row(row: Any, name: str, first: frozenset[str]) -> tuple[tuple[Record, ...], str, frozenset[str]]:
    """Read one row with the layout `name` (or 'auto') whose first row had the columns `first` (none yet: empty).

    Returns the records, the layout's name and the columns that the next row must have.
    """
    if not isinstance(row, dict):
        raise DataError(f"{_kind(row)}, expected an object with columns")
    require_text(row)
    name = detect(row) if name == "auto" else name
    layout = FORMATS[name]
    for column in layout.required:
        if column not in row:
            raise DataError(f"missing{_near(column, row, layout)}: the row has {_names(row)}", field=column)
    columns = frozenset(row) - set(layout.optional) - set(ALWAYS_OPTIONAL)
    if first and columns != first:
        lost, new = sorted(first - columns), sorted(columns - first)
        what = [f"{word} {_names(names)}" for word, names in (("without", lost), ("with", new)) if names]
        raise DataError(f"columns differ from the first row's: {' and '.join(what)}")
    found = layout.read(row)
    return found if isinstance(found, tuple) else (found,), name, columns


def _spoken(text: Text) -> Any:
    return text if isinstance(text, str) else [{"role": m.role, "content": m.content} for m in text]


def to_json(record: Record) -> dict[str, Any]:
    """The canonical row: `read` makes the same record of it (`where` apart). Nothing that a record leaves open is written."""
    responses: list[Any] = []
    for r in record.responses:
        more = {"finished": r.finished, "score": r.score, "source": None if r.source is None else dict(r.source)}
        given = {key: value for key, value in more.items() if value is not None}
        responses.append({"text": _spoken(r.text), **given} if given or not isinstance(r.text, str) else r.text)
    row: dict[str, Any] = {"prompt": _spoken(record.prompt), "responses": responses}
    if record.judgements:
        row["judgements"] = [
            {"order": [list(tier) for tier in j.order]} | ({"below": list(j.below)} if j.below else {})
            | ({} if j.prob is None else {"prob": j.prob}) | ({} if j.weight == 1 else {"weight": j.weight})
            | ({} if j.by is None else {"by": j.by}) for j in record.judgements]  # fmt: skip
    if record.labels is not None:
        row["labels"] = list(record.labels)
    return row | ({"id": record.id} if record.id else {}) | ({"meta": dict(record.meta)} if record.meta else {})
