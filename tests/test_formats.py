"""formats: every layout against real files counted apart, every fault with its place, and nothing lost on the way."""

from __future__ import annotations

import gzip
import json
import os
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import formats
from preftune.errors import DataError, UsageError
from preftune.formats import FORMATS, detect, read, to_json
from preftune.records import Judgement, Message, Record, Response, pairs, verdicts

PAIR = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}


def file(folder: Path, *rows, name: str = "a.jsonl") -> Path:
    """Rows (objects, or lines as they are) as a file: an array for .json, else lines."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[" + ",\n".join(lines) + "]\n" if name.endswith(".json") else "".join(f"{line}\n" for line in lines)
    path.write_text(text, "utf-8")
    return path


def one(row, folder: Path, **options) -> Record:
    return read([file(folder, row)], **options).records[0]


def refused(row, folder: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        one(row, folder, **options)
    assert caught.value.line == 1 and str(caught.value).startswith(f"{folder / 'a.jsonl'}:1: ")
    return str(caught.value).removeprefix(f"{folder / 'a.jsonl'}:1: ")


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


# --- the table ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_each_example_is_of_its_layout_and_of_no_other(name, tmp_path):
    example = FORMATS[name].example
    found = [other for other, layout in FORMATS.items() if layout.detects(example)]
    most = max(len(FORMATS[other].required) for other in found)
    assert [other for other in found if len(FORMATS[other].required) == most] == [name]
    assert detect(example) == name
    record = one(example, tmp_path)
    assert record == one(example, tmp_path, format=name) and record.where == f"{tmp_path / 'a.jsonl'}:1"
    judged = bool(list(pairs(record)) or list(verdicts(record)))
    assert judged == (not FORMATS[name].description.startswith("for `sft`"))
    assert len(FORMATS[name].description) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_each_required_column_is_missed_by_name(name, tmp_path):
    for column in FORMATS[name].required:
        row = dict(FORMATS[name].example)
        row[f"{column}x"] = row.pop(column)
        said = refused(row, tmp_path, format=name)
        assert said.startswith(f"{column}: missing (did you mean '{column}x'?): the row has ")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [None, 7, True, {"a": 1}, [1], [], "", " \n\t"])
def test_each_required_column_refuses_what_is_not_its_kind(name, value, tmp_path):
    for column in FORMATS[name].required:
        if (column, value) == ("label", True) and name != "llmbar":
            continue
        said = refused({**FORMATS[name].example, column: value}, tmp_path, format=name)
        assert re.match(rf"{column}(\[0\])?: ", said) and re.search("expected|a message without", said), said


@pytest.mark.parametrize("name", FORMATS)
def test_other_columns_stay_in_meta(name, tmp_path):
    row = {**FORMATS[name].example, "source": "web", "votes": [1, {"a": None}], "zero": 0, "id": 17}
    record = one(row, tmp_path)
    assert {"source": "web", "votes": [1, {"a": None}], "zero": 0}.items() <= record.meta.items()
    assert record.id == "17" and "id" not in record.meta
    assert not set(FORMATS[name].required) & set(record.meta)


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_that_belongs_to_the_prompt_is_read_or_refused(name, tmp_path):
    for column in formats.layouts.PROMPT_COLUMNS:
        row = {**FORMATS[name].example, column: "Be kind."}
        if column in FORMATS[name].optional:
            assert one(row, tmp_path).prompt[0] == Message("system", "Be kind.")
        else:
            assert refused(row, tmp_path).startswith(f"{column}: not read by this layout")
        assert one({**row, column: None}, tmp_path).prompt == one(FORMATS[name].example, tmp_path).prompt


def test_no_known_layout_lists_columns_nearest_and_all(tmp_path):
    said = refused({"promt": "a", "chosen": "b", "rejectd": "c"}, tmp_path)
    first, second, third = said.split("\n")
    assert first == "no known layout: the columns are 'promt', 'chosen', 'rejectd'"
    assert second == ("nearest is prompt-chosen-rejected, which lacks 'prompt' (did you mean 'promt'?), "
                      "'rejected' (did you mean 'rejectd'?)")  # fmt: skip
    assert third.startswith("known: canonical (prompt, responses); prompt-chosen-rejected (prompt, chosen, rejected); ")
    assert "none is near" in refused({"x": 1}, tmp_path) and "columns are none" in refused({}, tmp_path)


def test_a_row_of_two_layouts_is_ambiguous_until_one_is_named(tmp_path):
    row = {**PAIR, "instruction": "Add."}
    assert "ambiguous: prompt-chosen-rejected and instruction-chosen-rejected both fit" in refused(row, tmp_path)
    assert one(row, tmp_path, format="prompt-chosen-rejected").meta == {"instruction": "Add."}


def test_an_unknown_layout_is_a_usage_error_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"unknown layout 'hh-rhlf' \(did you mean 'hh-rlhf'\?\); known are auto, canonical"):
        read([file(tmp_path, PAIR)], format="hh-rhlf")


def test_a_layout_is_added_by_a_function_and_a_line(tmp_path, monkeypatch):
    def two(row):
        return formats.layouts._pair(row, row["q"], row["good"], row["bad"], used=("q", "good", "bad"))

    monkeypatch.setitem(FORMATS, "two", formats.Format(("q", "good", "bad"), two, "for this test", {}))
    record = one({"q": "?", "good": "a", "bad": "b", "n": 1}, tmp_path)
    assert [r.text for r in record.responses] == ["a", "b"] and record.meta == {"n": 1} and list(pairs(record))


# --- canonical ---------------------------------------------------------------------------------------------------------------


def test_canonical_as_the_design_writes_it(tmp_path):
    row = {"prompt": "text", "responses": [{"text": "a", "finished": True, "score": 0.93, "source": {"seed": 1}}, "b", "c", "d"],
           "judgements": [{"order": [[1], [0, 2]], "below": [3], "weight": 2, "by": "a1"}, {"order": [[0], [1]], "prob": 0.83}],
           "labels": [True, False, None, True], "id": "x", "meta": {"k": [1]}}  # fmt: skip
    record = one(row, tmp_path)
    assert record == Record(
        "text", (Response("a", True, 0.93, {"seed": 1}), Response("b"), Response("c"), Response("d")),
        (Judgement(((1,), (0, 2)), (3,), None, 2.0, "a1"), Judgement(((0,), (1,)), prob=0.83)),
        (True, False, None, True), "x", {"k": [1]}, f"{tmp_path / 'a.jsonl'}:1")  # fmt: skip


def test_ranks_and_scores_are_shorthand(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [2, 0, None, 2], "scores": [1, -0.5, None, 3]}
    record = one(row, tmp_path)
    assert record.judgements == (Judgement(((1,), (0, 3))),)
    assert [r.score for r in record.responses] == [1.0, -0.5, None, 3.0] and record.meta == {}
    both = one({**row, "judgements": [{"order": [[0], [1]]}]}, tmp_path)
    assert both.judgements == (Judgement(((0,), (1,))), Judgement(((1,), (0, 3))))


def test_canonical_takes_messages(tmp_path):
    ask = [{"role": "system", "content": ""}, {"role": "user", "content": "2+2?"}]
    more = [{"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    record = one({"prompt": ask, "responses": [{"text": more}, "5", more[:1]]}, tmp_path)
    assert record.prompt == (Message("system", ""), user("2+2?"))
    assert [r.text for r in record.responses] == [(assistant("4"), user("Sure?"), assistant("Yes")), "5", (assistant("4"),)]


@pytest.mark.parametrize(("change", "words"), [
    ({"responses": []}, "responses: empty, expected at least one response"),
    ({"responses": ["a", None]}, "responses[1]: null, expected text or messages"),
    ({"responses": ["a", {"txt": "b"}]}, "responses[1]: no 'text' (did you mean 'txt'?): it has 'txt'"),
    ({"responses": ["a", {"text": "b", "finnished": True}]},
     "responses[1]: unknown key: 'finnished' (did you mean 'finished'?); known are text, finished, score, source"),
    ({"responses": ["a", {"text": "b", "finished": 1}]}, "responses[1].finished: a number, expected true or false"),
    ({"responses": ["a", {"text": "b", "score": True}]}, "responses[1].score: true, expected a number or null"),
    ({"responses": ["a", {"text": "b", "score": 10**400}]}, "responses[1].score: a number too large for a float"),
    ({"responses": ["a", {"text": "b", "source": "web"}]}, "responses[1].source: text, expected an object or null"),
    ({"responses": ["a", {"text": " "}]}, "responses[1].text: only white space, expected text"),
    ({"responses": ["a", [{"role": "assistant", "content": "b"}]]}, "responses[1]: messages, but the prompt is text"),
    ({"judgements": {}}, "judgements: an object, expected a list of judgements"),
    ({"judgements": [{}]}, "judgements[0].order: null, expected a list of tiers"),
    ({"judgements": [{"order": []}]}, "judgements[0].order: empty tier, expected at least one response in each"),
    ({"judgements": [{"order": [[0], []]}]}, "judgements[0].order: empty tier"),
    ({"judgements": [{"order": [0, 1]}]}, "judgements[0].order[0]: a number, expected a list of response numbers"),
    ({"judgements": [{"order": [[0], [2]]}]}, "judgements[0].order[1]: no such response: 2; there are 2, counted from 0"),
    ({"judgements": [{"order": [[0], [-1]]}]}, "judgements[0].order[1]: no such response: -1"),
    ({"judgements": [{"order": [[True], [0]]}]}, "judgements[0].order[0]: true, expected the number of a response"),
    ({"judgements": [{"order": [[0], [1]], "below": [0]}]}, "judgements[0]: a response named twice"),
    ({"judgements": [{"order": [[0]]}]}, "judgements[0]: one response named"),
    ({"judgements": [{"order": [[0]], "below": [1], "prob": 0.5}]}, "judgements[0].prob: P(first tier preferred) is given"),
    ({"judgements": [{"order": [[0, 1]], "prob": 0.5}]}, "judgements[0].prob: P(first tier preferred) is given: it needs"),
    ({"responses": ["a", "b", "c"], "judgements": [{"order": [[0], [1]], "below": [2], "prob": 0.5}]}, "judgements[0].prob: P(first"),
    ({"judgements": [{"order": [[0], [1]], "prob": -0.1}]}, "judgements[0].prob: outside its range: -0.1, expected 0 to 1"),
    ({"judgements": [{"order": [[0], [1]], "prob": 1.5}]}, "judgements[0].prob: outside its range: 1.5, expected 0 to 1"),
    ({"judgements": [{"order": [[0], [1]], "weight": 0}]}, "judgements[0].weight: outside its range: 0.0"),
    ({"judgements": [{"order": [[0], [1]], "weight": None}]}, "judgements[0].weight: outside its range: None"),
    ({"judgements": [{"order": [[0], [1]], "by": 3}]}, "judgements[0].by: a number, expected text"),
    ({"judgements": [{"order": [[0], [1]], "wieght": 2}]}, "judgements[0]: unknown key: 'wieght' (did you mean 'weight'?)"),
    ({"ranks": [0]}, "ranks: length 1, expected one for each of the 2 responses"),
    ({"ranks": [0, "1"]}, "ranks[1]: text, expected a rank (lowest is best) or null"),
    ({"ranks": [0, True]}, "ranks[1]: true, expected a rank"),
    ({"ranks": [0, None]}, "ranks: fewer than two responses ranked"),
    ({"scores": [1, 2, 3]}, "scores: length 3, expected one for each of the 2 responses"),
    ({"scores": [1, "2"]}, "scores[1]: text, expected a number or null"),
    ({"responses": ["a", {"text": "b", "score": 1}], "scores": [1, 2]},
     "scores[1]: given twice: in the list and in the response"),
    ({"labels": [True]}, "labels: length 1, expected one for each of the 2 responses"),
    ({"labels": [True, 0]}, "labels[1]: a number, expected true or false"),
    ({"meta": [1]}, "meta: a list, expected an object"),
    ({"meta": {"k": 1}, "k": 2}, "meta: given twice: 'k' is a column and stands in 'meta'"),
    ({"id": 1.5}, "id: a number, expected text"), ({"id": True}, "id: true, expected text"),
])  # fmt: skip
def test_canonical_refuses(change, words, tmp_path):
    said = refused({"prompt": "p", "responses": ["a", "b"], **change}, tmp_path)
    assert said.startswith(words), said


# text that may stand in a record: anything but surrogates and control characters, and not blank
LETTER = st.characters(exclude_categories=("Cs", "Cc"), include_characters="\t\n\r")
TEXT = st.text(LETTER, min_size=1, max_size=30).filter(str.strip)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
LEAF = st.none() | st.booleans() | st.integers() | NUMBER | TEXT
VALUE = st.recursive(LEAF, lambda some: st.lists(some, max_size=2) | st.dictionaries(TEXT, some, max_size=2), max_leaves=4)
META = st.dictionaries(TEXT.filter(lambda key: key not in formats.CANONICAL), VALUE, max_size=2)
TURN = st.tuples(st.builds(user, TEXT), st.builds(assistant, TEXT))


@st.composite
def canonical_records(draw) -> Record:
    turns = [message for turn in draw(st.lists(TURN, max_size=2)) for message in turn]
    system = draw(st.lists(st.builds(Message, st.just("system"), TEXT | st.just("")), max_size=1))
    prompt = draw(TEXT | st.builds(lambda last: (*system, *turns, user(last)), TEXT))
    later = st.lists(TURN, max_size=1).map(lambda more: [message for turn in more for message in turn])
    dialogues = st.builds(lambda first, more: (assistant(first), *more), TEXT, later)
    answers = st.builds(Response, TEXT if isinstance(prompt, str) else TEXT | dialogues, st.none() | st.booleans(),
                        st.none() | NUMBER, st.none() | META)  # fmt: skip
    responses = draw(st.lists(answers, min_size=1, max_size=4))
    size, judgements = len(responses), []
    for _ in range(draw(st.integers(0, 2)) if size > 1 else 0):
        named = draw(st.permutations(range(size)))[: draw(st.integers(2, size))]
        cut = draw(st.integers(1, len(named)))
        order = tuple((index,) for index in named[:cut]) if draw(st.booleans()) else (tuple(named[:cut]),)
        plain = len(order) == 2 and cut == len(named)
        prob = draw(st.none() | st.floats(0, 1)) if plain else None
        weight, by = draw(st.floats(0.1, 1e6)), draw(st.none() | TEXT)
        judgements.append(Judgement(order, tuple(named[cut:]), prob, weight, by))
    labels = draw(st.none() | st.lists(st.none() | st.booleans(), min_size=size, max_size=size).map(tuple))
    return Record(prompt, tuple(responses), tuple(judgements), labels, draw(st.just("") | TEXT), draw(META))


@settings(max_examples=150, deadline=None)
@given(st.lists(canonical_records(), min_size=1, max_size=3), st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]))
def test_a_record_written_and_read_is_the_same_record(tmp_path_factory, records, name):
    folder = tmp_path_factory.mktemp("round")
    path = file(folder, *(to_json(record) for record in records), name=name.removesuffix(".gz"))
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(path.read_bytes()))
    found = read([folder / name])
    assert found.layout == "canonical"
    assert [formats.replace(record, where="") for record in found.records] == records


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_goes_through_the_canonical_form_unchanged(name, tmp_path):
    record = one({**FORMATS[name].example, "more": {"a": [1]}, "id": "n1"}, tmp_path)
    assert one(to_json(record), tmp_path) == record


# --- pairs -------------------------------------------------------------------------------------------------------------------


def test_pairs_as_text_and_scores(tmp_path):
    record = one({**PAIR, "score_chosen": 1, "score_rejected": None}, tmp_path)
    assert record.prompt == "2+2=" and record.responses == (Response(" 4", score=1.0), Response(" 5")) and record.meta == {}
    assert record.judgements == (Judgement(((0,), (1,))),)
    assert refused({**PAIR, "score_chosen": "1"}, tmp_path) == "score_chosen: text, expected a number or null"


ASK = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
AGAIN = {"role": "user", "content": "again"}


def test_pairs_as_messages(tmp_path):
    wanted = ((Message("system", "s"), user("2+2?")), [(assistant("4"),), (assistant("5"),)])
    for row in ({"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]}, {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
                {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
                {"prompt": "2+2?", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}):  # fmt: skip
        record = one(row, tmp_path)
        assert (record.prompt, [r.text for r in record.responses]) == wanted
    assert [r.text for r in one({"prompt": ASK, "chosen": "4", "rejected": "5"}, tmp_path).responses] == ["4", "5"]


def test_dialogues_part_where_they_differ(tmp_path):
    record = one({"chosen": [*ASK, GOOD, AGAIN, GOOD], "rejected": [*ASK, GOOD, AGAIN, BAD]}, tmp_path)
    assert len(record.prompt) == 4 and record.responses[1].text == (assistant("5"),)
    longer = one({"chosen": [*ASK, GOOD, AGAIN, GOOD], "rejected": [*ASK, BAD]}, tmp_path)
    assert len(longer.prompt) == 2 and len(longer.responses[0].text) == 3
    equal = one({"chosen": [*ASK, GOOD], "rejected": [*ASK, GOOD]}, tmp_path)
    assert equal.prompt[-1] == user("2+2?") and equal.responses[0].text == equal.responses[1].text == (assistant("4"),)


@pytest.mark.parametrize(("row", "words"), [
    ({"chosen": [*ASK, GOOD], "rejected": [*ASK, GOOD, AGAIN, BAD]}, "rejected: ambiguous"),
    ({"chosen": [*ASK, GOOD, AGAIN, GOOD], "rejected": [*ASK, GOOD, ASK[1], GOOD]}, "rejected: ambiguous"),
    ({"chosen": [*ASK, GOOD, GOOD], "rejected": [*ASK, GOOD, BAD]}, "rejected: ambiguous"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "chosen: no shared first message"),
    ({"chosen": [*ASK, GOOD], "rejected": "5"}, "rejected: text, expected a list of messages"),
    ({"chosen": [*ASK], "rejected": [*ASK]}, "rejected: ambiguous"),
    ({"prompt": "other", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}, "prompt: text that no shared user message repeats"),
    ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}, "chosen: no shared first message"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": [BAD]}, "rejected: messages, but the prompt is text"),
    ({"prompt": ASK, "chosen": [*ASK, GOOD], "rejected": [BAD]}, "chosen: not an answer: it runs from system to assistant"),
    ({"prompt": ASK, "chosen": [GOOD, AGAIN], "rejected": [BAD]}, "chosen: not an answer: it runs from assistant to user"),
    ({"prompt": [*ASK, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "prompt: ends with an assistant message"),
    ({"prompt": ASK, "chosen": [{**GOOD, "content": None}], "rejected": [BAD]}, "chosen[0].content: null, expected text"),
    ({"prompt": ASK, "chosen": [{**GOOD, "content": " "}], "rejected": [BAD]}, "chosen[0].content: only white space"),
    ({"prompt": ASK, "chosen": [{**GOOD, "content": [{"type": "text", "text": "4"}]}], "rejected": [BAD]},
     "chosen[0].content: a list, expected text"),
    ({"prompt": ASK, "chosen": [{"role": "asistant", "content": "4"}], "rejected": [BAD]},
     "chosen[0]: unknown role: 'asistant' (did you mean 'assistant'?), expected one of system, user"),
    ({"prompt": ASK, "chosen": [{"role": ["x"], "content": "4"}], "rejected": [BAD]}, "chosen[0]: unknown role: ['x']"),
    ({"prompt": ASK, "chosen": [{"role": "assistant", "contents": "4"}], "rejected": [BAD]},
     "chosen[0]: a message without 'content' (did you mean 'contents'?): it has 'role', 'contents'"),
    ({"prompt": ASK, "chosen": ["4"], "rejected": [BAD]}, "chosen[0]: text, expected a message: {'role': .., 'content': ..}"),
    ({"prompt": ASK, "chosen": [{**GOOD, "tool_calls": [{}]}], "rejected": [BAD]},
     "chosen[0]: a message with 'tool_calls': this is not read"),
])  # fmt: skip
def test_messages_that_are_refused(row, words, tmp_path):
    said = refused(row, tmp_path)
    assert said.startswith(words), said


def test_what_messages_carry_besides_their_text_is_kept(tmp_path):
    named = [{**ASK[0], "name": None}, {**ASK[1], "name": "Ann"}]
    assert one({"prompt": named, "chosen": [GOOD], "rejected": [BAD]}, tmp_path).meta == {"prompt": [{}, {"name": "Ann"}]}


def test_from_value_and_observation(tmp_path):
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"},
                             {"from": "observation", "value": "o"}],
           "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}  # fmt: skip
    record = one(row, tmp_path)
    assert [m.role for m in record.prompt] == ["system", "user", "assistant", "tool"]
    assert one({**row, "system": "S"}, tmp_path).prompt[0] == Message("system", "S")
    assert "unknown role: 'function_call'" in refused({**row, "chosen": {"from": "function_call", "value": "{}"}}, tmp_path)


def test_instruction_and_input(tmp_path):
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "chosen": "4", "rejected": "5"}
    record = one(row, tmp_path)
    assert record.prompt == (user("Add.\n\n2, 2"),) and record.meta == {"output": "4"}
    assert [r.text for r in record.responses] == ["4", "5"]
    for nothing in ("", " ", None):
        assert one({**row, "input": nothing}, tmp_path).prompt == (user("Add."),)
    assert refused({**row, "input": 3}, tmp_path) == "input: a number, expected text"


def test_llmbar(tmp_path):
    row = {"input": "2+2?", "output_1": "5", "output_2": "4", "label": 2}
    record = one(row, tmp_path)
    assert record.prompt == (user("2+2?"),) and [r.text for r in record.responses] == ["5", "4"]
    assert record.judgements == (Judgement(((1,), (0,))),)
    for bad in (0, 3, True, 1.0, "1", None):
        assert refused({**row, "label": bad}, tmp_path) == f"label: unknown label: {bad!r}, expected 1 or 2 (the better output)"


def test_better_response_id(tmp_path):
    row = {"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1, "is_safe": True}
    record = one(row, tmp_path)
    assert record.prompt == "2+2?" and record.judgements == (Judgement(((1,), (0,))),) and record.meta == {"is_safe": True}
    for bad in (2, -1, True, "1", None):
        assert refused({**row, "better_response_id": bad}, tmp_path).startswith("better_response_id: unknown response: ")


def test_steps_are_the_beginnings_of_an_answer(tmp_path):
    row = {"prompt": "2+2=", "completions": ["Two and two", "is four.\n", "Yes."], "labels": [True, None, "vague"], "id": 3}
    record = one(row, tmp_path)
    assert [r.text for r in record.responses] == ["Two and two\n", "Two and two\nis four.\n", "Two and two\nis four.\nYes."]
    assert [r.finished for r in record.responses] == [False, False, None] and record.labels == (True, None, "vague") and record.id == "3"
    assert one(to_json(record), tmp_path) == record
    assert refused({**row, "labels": [True]}, tmp_path) == "labels: length 1, expected one for each of the 3 steps"
    assert refused({**row, "completions": ["a", " ", "b"]}, tmp_path).startswith("completions[1]: only white space")


def test_alpaca_evals_annotations(tmp_path):
    row = {"instruction": "Add.", "input": "2, 2", "output_1": "5", "generator_1": "base", "output_2": "4", "generator_2": "mine",
           "annotator": "x"}  # fmt: skip
    meant = {1: (((0,), (1,)), None), 2.0: (((1,), (0,)), None), 0: (((0, 1),), None), 1.5: (((0, 1),), None),
             1.9: (((1,), (0,)), pytest.approx(0.9)), 1.2: (((0,), (1,)), pytest.approx(0.8))}  # fmt: skip
    for preference, (order, prob) in meant.items():
        record = one({**row, "preference": preference}, tmp_path)
        (judgement,) = record.judgements
        assert (judgement.order, judgement.prob, judgement.by) == (order, prob, "x") and record.prompt[0].content == "Add.\n\n2, 2"
        assert [dict(r.source) for r in record.responses] == [{"model": "base"}, {"model": "mine"}] and not record.meta
    for wrong in (3, -1, 0.5, None):
        assert refused({**row, "preference": wrong}, tmp_path).startswith("preference: ")
    bare = one({key: row[key] for key in ("instruction", "output_1", "output_2")} | {"preference": 1}, tmp_path)
    assert bare.responses[0].source is None and bare.judgements[0].by is None


def test_unpaired_labels(tmp_path):
    record = one({"messages": [*ASK, GOOD, AGAIN, BAD], "label": False}, tmp_path)
    assert len(record.prompt) == 4 and record.responses == (Response((assistant("5"),)),)
    assert record.labels == (False,) and record.judgements == ()
    assert refused({"messages": ASK, "label": True}, tmp_path).startswith("messages: no answer")
    assert refused({"messages": [GOOD], "label": True}, tmp_path).startswith("messages: no answer")
    assert refused({"messages": [*ASK, GOOD, BAD], "label": True}, tmp_path).startswith("messages: ambiguous")
    assert refused({"messages": [*ASK, GOOD], "label": 1}, tmp_path) == "label: a number, expected true or false"
    plain = one({"prompt": "2+2=", "completion": " 4", "label": True}, tmp_path)
    assert (plain.prompt, plain.responses, plain.labels) == ("2+2=", (Response(" 4"),), (True,))
    named = one({"prompt": "2+2=", "completion": " 4", "label": "right"}, tmp_path)
    assert named.labels == ("right",) and list(verdicts(named)) == [] and list(verdicts(plain)) == [(0, True, 1.0)]
    for quoted in ("true", "No", " 1 "):
        assert "expected true or false without quotes" in refused({"prompt": "2+2=", "completion": " 4", "label": quoted}, tmp_path)
    talk = one({"prompt": ASK, "completion": [GOOD], "label": True}, tmp_path)
    assert talk.responses[0].text == (assistant("4"),)


# --- texts that hold both the prompt and the answer ----------------------------------------------------------------------------

H, A = "\n\nHuman: ", "\n\nAssistant:"


def test_hh_keeps_the_leading_space_and_never_cuts_a_word(tmp_path):
    record = one({"chosen": f"{H}Which one?{A} Duckduckgo is it", "rejected": f"{H}Which one?{A} Dogpile is it"}, tmp_path)
    assert record.prompt == f"{H}Which one?{A}"
    assert [r.text for r in record.responses] == [" Duckduckgo is it", " Dogpile is it"]


def test_hh_with_several_turns_parts_at_the_last(tmp_path):
    start = f"Be good.{H}a{A} b{H}c{A}"
    record = one({"chosen": f"{start} d\n\nMore: e", "rejected": f"{start}d"}, tmp_path)
    assert record.prompt == start and [r.text for r in record.responses] == [" d\n\nMore: e", "d"]
    equal = one({"chosen": f"{start} d", "rejected": f"{start} d"}, tmp_path)
    assert equal.prompt == start and equal.responses[0] == equal.responses[1]


@pytest.mark.parametrize(("chosen", "rejected", "words"), [
    (f"{H}a{A} b", f"{H}c{A} b", "rejected: ambiguous"),
    (f"{H}a{A} b", f"{H}a{A} b{H}c{A} d", "rejected: ambiguous"),
    (f"{H}a{A} b{H}c{A} d", f"{H}a{A} x{H}c{A} d", "rejected: ambiguous"),
    (f"{H}a{A} b", f"{H}a{A} x{H}c{A} d", "rejected: ambiguous"),
    (f"{H}a{A} b{H}c{A} d", f"{H}a{A} x", "rejected: ambiguous"),
    (f"{H}a{A} b{H}c", f"{H}a{A} b{H}d", "rejected: ambiguous"),
    (f"{H}a{A} b{H}c", f"{H}a{A} b{H}c", "rejected: ambiguous"),
    (f"{A} b", f"{A} c", "prompt: empty"),
    (f"{H}a{A} ", f"{H}a{A} b", "chosen: only white space, expected text"),
    (f"{H}a{A} b", f"{H}a{A}", "rejected: empty, expected text"),
    ("no turns", "none here",
     "chosen: no '\\n\\nHuman:' or '\\n\\nAssistant:' turn: nothing says where the prompt ends; give a 'prompt'"),
    (f"{H}a{A} b", "none here", "rejected: no '\\n\\nHuman:'"),
])  # fmt: skip
def test_hh_refuses_what_is_ambiguous_or_empty(chosen, rejected, words, tmp_path):
    said = refused({"chosen": chosen, "rejected": rejected}, tmp_path)
    assert said.startswith(words), said


WORDS = st.text("abc \n.:,?", max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=2), WORDS.filter(str.strip), WORDS.filter(str.strip), WORDS.filter(str.strip))
def test_hh_gives_both_texts_back(turns, ask, good, bad):
    start = "".join(f"{H}{a}{A} {b}" for a, b in turns) + f"{H}{ask}{A}"
    record = formats.layouts._hh({"chosen": f"{start} {good}", "rejected": f"{start} {bad}"})
    assert record.prompt == start
    assert [r.text for r in record.responses] == [f" {good}", f" {bad}"]


@pytest.mark.parametrize(("chose", "rejected", "prompt"), [
    ("What is 2+2? It is four", "What is 2+2? It is five", "What is 2+2? It is"),  # 'f' is shared
    ("What is 2+2? Four", "What is 2+2? Five", "What is 2+2?"),
    ("Say hello.\nHello", "Say hello.\nHi", "Say hello.\n"),
    ("one two  three", "one two  four", "one two"),  # the space goes with the answer
    ("Q: a?\nAssistant: ducks fly", "Q: a?\nAssistant: dogs fly", "Q: a?\nAssistant:"),
    ("### Instruction:\nAdd\n\n### Response:\nIt is 4", "### Instruction:\nAdd\n\n### Response:\nIt is 5",
     "### Instruction:\nAdd\n\n### Response:\n"),
    ("### Response:\nSo.\nAnswer: 4", "### Response:\nNo.\nAnswer: 5", "### Response:\n"),  # another marker inside the answers
    ("<|user|>a<|assistant|>\nyes", "<|user|>a<|assistant|>\nyep", "<|user|>a<|assistant|>\n"),
    ("[INST] a [/INST] yes", "[INST] a [/INST] yes and no", "[INST] a [/INST]"),  # one answer is the beginning of the other
    ("介绍一下你自己。我是助手", "介绍一下你自己。我很高兴", "介绍一下你自己。"),
    ("用户：你好\n助手：您好", "用户：你好\n助手：喂", "用户：你好\n助手："),
])  # fmt: skip
def test_chose_is_split_at_a_safe_place(chose, rejected, prompt, tmp_path):
    record = one({"chose": chose, "rejected": rejected}, tmp_path)
    assert record.prompt == prompt
    assert [prompt + r.text for r in record.responses] == [chose, rejected]


@pytest.mark.parametrize(("chose", "rejected", "words"), [
    ("What is it? Yes", "What is it? Yes", "rejected: ambiguous: one text is the beginning of the other"),
    ("What is it? Yes", "What is it? Yes, indeed", "rejected: ambiguous: one text is the beginning of the other"),
    ("Duckduckgo", "Dogpile", "chose: ambiguous: the two texts share no whole word"),
    ("yes sir", "no sir", "chose: ambiguous: the two texts share no whole word"),
    ("介绍一下你自己我是", "介绍一下你自己很高", "chose: ambiguous: the two texts share no whole word"),
    ("Q: a\nAssistant: b", "Q: c\nAssistant: d", "rejected: ambiguous: the texts part before their last turn"),
    ("x\nAssistant: a\nUser: b\nAssistant: c", "x\nAssistant: e\nUser: f\nAssistant: g",
     "rejected: ambiguous: the texts part before"),
    ("Q\nAssistant: ", "Q\nAssistant: b", "chose: only white space"),
])  # fmt: skip
def test_chose_refuses_what_is_ambiguous(chose, rejected, words, tmp_path):
    said = refused({"chose": chose, "rejected": rejected}, tmp_path)
    assert said.startswith(words), said


@settings(max_examples=300, deadline=None)
@given(st.text("ab \n.", max_size=12), st.text("ab \n.", max_size=8), st.text("ab \n.", max_size=8))
def test_chose_never_cuts_a_word_and_loses_nothing(start, good, bad):
    try:
        record = formats.layouts._chose({"chose": start + good, "rejected": start + bad})
    except DataError:
        return
    for text, response in zip((start + good, start + bad), record.responses, strict=True):
        assert record.prompt + response.text == text
        assert not (record.prompt[-1].isalnum() and response.text[0].isalnum())
    assert record.prompt.strip()


# --- real files, counted apart -----------------------------------------------------------------------------------------------

REAL = {  # file: layout, rows, rows that the rules refuse
    "tinystories-sentiment/pairs.jsonl": ("prompt-chosen-rejected", 1487, {}),
    "tinystories-sentiment/kwise4.jsonl": ("canonical", 1500, {}),
    "hh-rlhf/harmless-base-test-first400.jsonl": ("hh-rlhf", 400, {"chosen: only white space": 1}),
    "llamafactory/dpo_en_demo.json": ("conversations-chosen-rejected", 300, {}),
    "llamafactory/dpo_zh_demo.json": ("conversations-chosen-rejected", 300, {}),
    "llamafactory/kto_en_demo.json": ("messages-label", 300, {}),
    "rasbt-preference/instruction-data-with-preference.json": ("instruction-chosen-rejected", 1100, {}),
    "LLMBar/Natural.json": ("llmbar", 100, {}),
}


def raw(path: Path) -> list[dict]:
    """The rows, read without any of our code."""
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_real_files_is_read_or_refused_with_its_reason(shared_data, name):
    layout, size, faults = REAL[name]
    found, rows = read([shared_data / name], skip_bad=True), raw(shared_data / name)
    assert len(rows) == size == found.counts["rows"] == len(found.records) + sum(faults.values())
    assert found.layout == layout
    assert {key.removeprefix("skipped: "): n for key, n in found.counts.items() if key.startswith("skipped: ")} == faults
    escapes = r"(?<!\\)(?:\\\\)*\\u0000"
    dirty = sum(bool(re.search(escapes, json.dumps(row))) for row in rows)
    silent = sum(str(row.get(side, "x")).endswith("\n\nAssistant: ") for row in rows for side in ("chosen", "rejected"))
    assert dirty + silent == len(found.skipped)  # counted without the reader: no other row is refused
    if "control character" in str(faults):
        with pytest.raises(DataError, match="control character"):
            read([shared_data / name])
    else:  # a few empty answers are left out and counted without being asked
        assert read([shared_data / name]).records == found.records
    lines = (shared_data / name).read_text("utf-8").split("\n")
    for record in found.records[:: max(1, size // 20)]:  # the line named is the line of the row
        number = int(record.where.rpartition(":")[2])
        assert lines[number - 1].lstrip(" [").startswith("{")


def test_the_texts_of_the_real_files_are_those_of_the_rows(shared_data):
    def kept(name):
        rows, found = raw(shared_data / name), read([shared_data / name], skip_bad=True)
        lost = {e.line for e in found.skipped}
        lines = (shared_data / name).read_text("utf-8").split("\n")
        starts = [i for i, line in enumerate(lines, 1) if re.fullmatch(r"[ \[]{0,4}\{", line)]  # of rows, not of messages
        rows = [row for row, at in zip(rows, starts or range(1, 10**6), strict=False) if at not in lost]
        assert len(rows) == len(found.records)
        return zip(rows, found.records, strict=True)

    for row, record in kept("tinystories-sentiment/pairs.jsonl"):
        assert [record.prompt, *(r.text for r in record.responses)] == [row["prompt"], row["chosen"], row["rejected"]]
        assert [r.score for r in record.responses] == [row["score_chosen"], row["score_rejected"]]
    for row, record in kept("tinystories-sentiment/kwise4.jsonl"):
        assert [(r.text, r.score) for r in record.responses] == [(r["text"], r["score"]) for r in row["responses"]]
    for name in ("llamafactory/dpo_en_demo.json", "llamafactory/dpo_zh_demo.json"):
        for row, record in kept(name):
            assert [m.content for m in record.prompt] == [m["value"] for m in row["conversations"]]
            assert [r.text[0].content for r in record.responses] == [row["chosen"]["value"], row["rejected"]["value"]]
    for row, record in kept("llamafactory/kto_en_demo.json"):
        assert [m.content for m in (*record.prompt, *record.responses[0].text)] == [m["content"] for m in row["messages"]]
        assert record.labels == (row["label"],)
    for row, record in kept("rasbt-preference/instruction-data-with-preference.json"):
        assert record.prompt[0].content == row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert [r.text for r in record.responses] == [row["chosen"], row["rejected"]] and record.meta == {"output": row["output"]}
    for row, record in kept("LLMBar/Natural.json"):
        better = record.responses[next(iter(pairs(record))).chosen].text
        assert record.prompt[0].content == row["input"] and better == row[f"output_{row['label']}"]


def test_hh_rlhf_reproduces_every_text_and_cuts_no_word(shared_data):
    name = "hh-rlhf/harmless-base-test-first400.jsonl"
    rows, found = raw(shared_data / name), read([shared_data / name], skip_bad=True)
    del rows[86]  # its chosen dialogue ends with 'Assistant: ' and no answer; it is the one that is refused
    assert [(e.line, e.field) for e in found.skipped] == [(87, "chosen")] and len(found.records) == 399
    for row, record in zip(rows, found.records, strict=True):
        for text, response in zip((row["chosen"], row["rejected"]), record.responses, strict=True):
            assert record.prompt + response.text == text
            assert record.prompt.endswith("\n\nAssistant:") and response.text[0] == " "  # no word, then a space
            assert record.prompt == text[: text.rindex("\n\nAssistant:")] + "\n\nAssistant:"


def test_real_files_go_through_the_canonical_form_unchanged(shared_data, tmp_path):
    for name in REAL:
        records = read([shared_data / name], skip_bad=True).records
        again = read([file(tmp_path, *map(to_json, records))]).records
        assert [formats.replace(r, where="") for r in again] == [formats.replace(r, where="") for r in records]


# --- files ---------------------------------------------------------------------------------------------------------------------


def test_kinds_of_files_give_the_same_records(tmp_path):
    rows = [{**PAIR, "chosen": f" {i} ü"} for i in range(5)]
    plain = read([file(tmp_path, *rows)]).records
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    array = file(tmp_path, *rows, name="c.json")
    indented = tmp_path / "d.json"
    indented.write_text(json.dumps(rows, indent=4))
    zipped_array = tmp_path / "e.json.gz"
    zipped_array.write_bytes(gzip.compress(indented.read_bytes()))
    lines_called_json = tmp_path / "f.json"
    lines_called_json.write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    mark = tmp_path / "g.jsonl"
    mark.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    mark_array = tmp_path / "h.json"
    mark_array.write_bytes(b"\xef\xbb\xbf" + array.read_bytes().rstrip())
    unzipped_name = tmp_path / "i.jsonl"
    unzipped_name.write_bytes(packed.read_bytes())
    no_last_end = tmp_path / "j.ndjson"
    no_last_end.write_bytes((tmp_path / "a.jsonl").read_bytes().rstrip())
    for path in (packed, array, indented, zipped_array, lines_called_json, mark, mark_array, unzipped_name, no_last_end):
        found = read([path])
        assert [formats.replace(r, where="") for r in found.records] == [formats.replace(r, where="") for r in plain], path.name
    assert [r.where.rpartition(":")[2] for r in read([indented]).records] == ["2", "7", "12", "17", "22"]


def test_several_files_and_several_layouts(tmp_path):
    one_, two = file(tmp_path, PAIR, PAIR), file(tmp_path, {"prompt": "2+2=", "responses": ["4"]}, PAIR, name="b.jsonl")
    found = read([one_, two], skip_bad=True)
    assert found.layout == "prompt-chosen-rejected, canonical"
    assert [r.where for r in found.records] == [f"{one_}:1", f"{one_}:2", f"{two}:1"]
    assert found.counts == {"rows": 4, "records": 3, "skipped": 1, "blank_lines": 0, "shared_prompts": 2,
                            "skipped: responses: missing": 1}  # fmt: skip


def test_blank_lines_are_skipped_and_counted_and_lines_still_right(tmp_path):
    found = read([file(tmp_path, "", PAIR, "  \t", PAIR, "\r")])
    assert found.counts["blank_lines"] == 3 and [r.where[-2:] for r in found.records] == [":2", ":4"]


def test_max_records_stops_early(tmp_path):
    path = file(tmp_path, PAIR, PAIR, PAIR, "broken")
    for limit in (1, 3):
        found = read([path, tmp_path / "never-opened.jsonl"], max_records=limit)
        assert len(found.records) == limit == found.counts["rows"]


def test_bad_rows_are_listed_and_counted_by_reason(tmp_path):
    rows = [PAIR, {**PAIR, "chosen": None}, {**PAIR, "chosen": None}, {**PAIR, "rejected": ""}, '{"prompt": "a", ',
            {"prompt": "x"}, PAIR, {**PAIR, "new": 1}, "[1]", '{"prompt": "a", "prompt": "b", "chosen": "c"}']  # fmt: skip
    path = file(tmp_path, *rows)
    found = read([path], skip_bad=True)
    assert [r.where for r in found.records] == [f"{path}:1", f"{path}:7"]
    assert [e.line for e in found.skipped] == [2, 3, 4, 5, 6, 8, 9, 10]
    assert {k: v for k, v in found.counts.items() if k.startswith("skipped: ")} == {
        "skipped: chosen: null": 2, "skipped: rejected: empty": 1, "skipped: not valid JSON": 1, "skipped: chosen: missing": 1,
        "skipped: columns differ from the first row's": 1, "skipped: a list": 1,
        "skipped: key twice in one object": 1}  # fmt: skip
    assert found.counts["skipped"] == 8 and found.counts["rows"] == 10
    with pytest.raises(DataError, match=r"a\.jsonl:2: chosen: null, expected text"):
        read([path])


def test_a_few_empty_texts_are_left_out_and_many_are_refused(tmp_path):
    path = file(tmp_path, *[PAIR] * 19, {**PAIR, "chosen": " "})
    found = read([path])
    assert len(found.records) == 19 and found.counts["skipped: chosen: only white space"] == 1
    path = file(tmp_path, *[PAIR] * 18, {**PAIR, "chosen": " "}, PAIR, {**PAIR, "rejected": ""})
    with pytest.raises(DataError, match=r"a\.jsonl:19: chosen: only white space, expected text"):
        read([path])
    assert read([path], skip_bad=True).counts["skipped"] == 2
    with pytest.raises(DataError, match=r":2: chosen: null"):  # an empty text excuses no other fault
        read([file(tmp_path, PAIR, {**PAIR, "chosen": None}, *[PAIR] * 30)])


def test_prompts_to_sample_from(tmp_path):
    rows = file(tmp_path, {"prompt": "a"}, "", {"prompt": ASK, "id": "x"})
    judged = file(tmp_path, PAIR, name="b.json")
    lines = tmp_path / "c.txt"
    lines.write_bytes(b"\xef\xbb\xbfone \r\n\n  two\n")
    wanted = ["a", (Message("system", "s"), user("2+2?")), "2+2=", "one ", "  two"]
    assert formats.read_prompts([rows, judged, lines]) == wanted
    assert formats.read_prompts([rows, judged, lines], max_records=3) == wanted[:3]
    for content, words in ((b"a\n\xe9", ":2: not UTF-8: byte 0xe9 at offset 2"),
                           (b"a\x00", r":1: prompt: control character: \\u0000"), (b"\n", "no prompt in it")):  # fmt: skip
        lines.write_bytes(content)
        with pytest.raises(DataError, match=words):
            formats.read_prompts([lines])
    with pytest.raises(DataError, match=r"d\.jsonl:2: prompt: null, expected text or messages"):
        formats.read_prompts([file(tmp_path, {"prompt": "a"}, {"prompt": None}, name="d.jsonl")])


def test_a_bad_first_row_does_not_decide_for_the_others(tmp_path):
    found = read([file(tmp_path, "{", {"x": 1}, {**PAIR, "odd": 1, "chosen": None}, PAIR, PAIR)], skip_bad=True)
    assert found.counts["records"] == 2 and found.counts["skipped"] == 3


def test_columns_that_differ_from_the_first_row_are_refused(tmp_path):
    path = file(tmp_path, {**PAIR, "source": "a"}, {**PAIR, "sauce": "a"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: columns differ from the first row's: without 'source' and with 'sauce'"):
        read([path])
    some = [PAIR, {**PAIR, "score_chosen": 1, "score_rejected": 0}, {**PAIR, "id": "x"}]  # optional ones may come and go
    assert read([file(tmp_path, *some)]).counts["records"] == 3


@pytest.mark.parametrize(("line", "words"), [
    ('{"prompt": "a", "chosen": "b', "not valid JSON: Unterminated string starting at column 27; the text seems to be cut there"),
    ('{"prompt": "a", "chosen":', "not valid JSON: Expecting value at column 26; the text seems to be cut there"),
    (json.dumps(PAIR) + " x", "not valid JSON: Extra data at column 54"),
    ("{'prompt': 'a'}", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    ('{"prompt": "a\tb"}', "not valid JSON: Invalid control character at column 14"),
    ('{"prompt": "a", "x": NaN}', "not a JSON number: NaN"), ('{"x": -Infinity}', "not a JSON number: -Infinity"),
    ('{"x": 1e400}', "number too large: 1e400"), ('{"x": ' + "1" * 5000 + "}", "not valid JSON: a number too long to read"),
    ('{"x": {"y": 1, "y": 2}}', "key twice in one object: 'y'"),
    ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON: nested too deeply"),
    ('{"x": ' + "[" * 60 + "]" * 60 + "}", "x: nested too deeply: more than 50 levels"),
    ('"text"', "text, expected an object with columns"), ("null", "null, expected an object"),
    ("3", "a number, expected an object"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_lines_that_are_not_rows(line, words, name, tmp_path):
    path = file(tmp_path, PAIR, line, PAIR, name=name)
    with pytest.raises(DataError) as caught:
        read([path])
    said = str(caught.value)
    assert caught.value.line == 2 and said.startswith(f"{path}:2: ")
    if name == "a.jsonl":
        assert said.removeprefix(f"{path}:2: ").startswith(words), said
        assert read([path], skip_bad=True).counts["records"] == 2
    else:
        broken = words.startswith("not valid JSON")
        kind = "not valid JSON: " if broken else words
        assert said.removeprefix(f"{path}:2: ").startswith(kind) and said.endswith(" of the array)"), said
        usable = 2 if not broken or "Extra" in words else 1  # nothing after a broken row can be read
        assert read([path], skip_bad=True).counts["records"] == usable


def test_a_cut_last_line(tmp_path):
    path = file(tmp_path, PAIR, PAIR)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON: .*the text seems to be cut there"):
        read([path])
    assert read([path], skip_bad=True).counts["records"] == 1


@pytest.mark.parametrize("cut", range(2, 200, 13))
def test_a_cut_array_says_that_the_rest_is_lost(tmp_path, cut):
    path = tmp_path / "a.json"
    whole = json.dumps([PAIR] * 4, indent=1).encode()
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=rf"a\.json:{1 + whole[:cut].count(10)}: not valid JSON: .*seems to be cut"):
        read([path])
    if cut > 100:
        found = read([path], skip_bad=True)
        assert found.counts["skipped"] == 1 and found.counts["records"] >= 1


@pytest.mark.parametrize(("text", "words"), [
    ("[%s %s]", "expected ',' or ']'"), ("[%s, %s", "expected ',' or ']'; the text seems to be cut there"),
    ("[%s, %s] x", "text after the closing ']'"), ("[%s, %s,]", "Expecting value"), ("[%s, %s]]", "text after the closing"),
])  # fmt: skip
def test_arrays_that_do_not_close(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text % (json.dumps(PAIR), json.dumps(PAIR)))
    with pytest.raises(DataError) as caught:
        read([path])
    assert words in str(caught.value)


def test_a_row_of_a_one_line_array_is_numbered(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIR, PAIR, {**PAIR, "chosen": None}]))
    with pytest.raises(DataError, match=r"a\.json:1: chosen: null, expected text or messages \(row 3 of the array\)"):
        read([path])


@pytest.mark.parametrize("where", ["chosen", "rejected", "prompt", "extra"])
@pytest.mark.parametrize(("character", "shown"), [
    ("\0", r"control character: \u0000"),
    ("\ud800", r"lone surrogate: \ud800"), ("\udfff", r"lone surrogate: \udfff"),
])  # fmt: skip
def test_characters_that_no_text_may_hold(character, shown, where, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**PAIR, "extra": [{"k": "v"}]}) + "\n")
    value = [{"k": "ab" + character}] if where == "extra" else "ab" + character
    path.write_text(json.dumps({**PAIR, where: value}))
    with pytest.raises(DataError) as caught:
        read([path])
    assert str(caught.value) == f"{path}:1: {where}: {shown} at character 2; remove it"


def test_a_key_that_no_text_may_be_is_shown_escaped(tmp_path):
    assert refused({**PAIR, "a\0[2J": 1}, tmp_path) == r"'a\x00[2J': control character: \u0000 at character 1; remove it"


def test_a_key_inside_a_column_is_looked_at_too(tmp_path):
    assert refused({**PAIR, "extra": {"ab\0": 1}}, tmp_path) == r"extra: control character: \u0000 at character 2; remove it"


def test_characters_that_text_may_hold(tmp_path):
    text = "a\tb\nc\r\n \x80\x94 é 漢字 🙂 \u2028 \ufeff \u200b"
    assert one({**PAIR, "chosen": text}, tmp_path).responses[0].text == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_text_that_is_not_utf8_is_told_with_offset_and_line(name, tmp_path):
    path = file(tmp_path, PAIR, {**PAIR, "chosen": "caf\u00e9"}, PAIR, name=name)
    content = path.read_bytes().replace("\u00e9".encode(), b"\xe9")
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read([path])
    assert str(caught.value).startswith(f"{path}:2: not UTF-8: byte 0xe9 at offset {content.index(0xE9)}; convert the file, for")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    with pytest.raises(DataError, match=f"offset {content.index(0xE9) + 3};"):
        read([path])
    if name == "a.jsonl":
        assert read([path], skip_bad=True).counts["records"] == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_utf16_is_recognised(encoding, name, tmp_path):
    path = file(tmp_path, PAIR, name=name)
    path.write_bytes(path.read_text().encode(encoding))
    with pytest.raises(DataError, match=r":1: not UTF-8: byte 0x\w\w at offset 0 looks like UTF-16; convert"):
        read([path], skip_bad=True)


def test_a_line_of_100_megabytes_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as out:
        out.write(json.dumps(PAIR).encode() + b'\n{"prompt": "')
        out.seek(100 * 2**20)  # a hole: zero bytes that take no room on the disk
        out.write(b'"}\n' + json.dumps(PAIR).encode())
    tracemalloc.start()
    found = read([path], skip_bad=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(found.skipped[0]) == f"{path}:2: line too long: more than 16.0 MiB"
    assert [r.where[-2:] for r in found.records] == [":1", ":3"]
    assert peak < 3 * formats.sources.LINE_LIMIT


def test_a_line_just_within_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.sources, "LINE_LIMIT", 200)
    row = {**PAIR, "chosen": "x"}
    row["chosen"] = "x" * (200 - len(json.dumps(row)))  # with its line end: 200 bytes
    for name in ("a.jsonl", "a.json"):
        assert read([file(tmp_path, row, name=name)]).counts["records"] == 1
        longer = file(tmp_path, row, {**row, "chosen": row["chosen"] + "yy"}, name=name)
        with pytest.raises(DataError, match=r":2: (line|row) too long: more than 200 bytes"):
            read([longer])
        assert read([longer], skip_bad=True).counts["records"] == 1
    monkeypatch.setattr(formats.sources, "ARRAY_LIMIT", 300)
    with pytest.raises(DataError, match="array too long: more than 300 bytes; convert it to JSONL"):
        read([file(tmp_path, PAIR, PAIR, PAIR, PAIR, PAIR, PAIR, PAIR, name="a.json")])


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"[]", b" [ ]\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_an_empty_file_is_said_to_be_empty(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError, match=r"a\.json: empty: it holds no row"):
            read([path], skip_bad=skip)
    with pytest.raises(DataError, match="empty"):  # also beside one that is not
        read([file(tmp_path, PAIR), path])


def test_a_file_without_a_usable_row(tmp_path):
    path = file(tmp_path, {**PAIR, "chosen": None}, {**PAIR, "chosen": 1})
    with pytest.raises(DataError, match=r"a\.jsonl: no usable row among 2; the first is refused so:\n.*a\.jsonl:1: chosen: null"):
        read([path], skip_bad=True)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rows = "".join(json.dumps({**PAIR, "n": os.urandom(30).hex()}) + "\n" for _ in range(200)).encode()
    whole = gzip.compress(rows)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: gzip is damaged or cut: .*; nothing after this line can be read"):
        read([path])
    found = read([path], skip_bad=True)
    assert found.counts["skipped"] == 1 and 10 < found.counts["records"] < 200
    path.write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    with pytest.raises(DataError, match="CRC"):
        read([path])
    path.write_bytes(whole[:500] + b"\xff" * 40 + whole[540:])
    with pytest.raises(DataError, match="gzip is damaged|not UTF-8|not valid JSON"):
        read([path])
    path.write_bytes(rows)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: not gzip, although its name says so"):
        read([path])


def test_paths_that_are_not_data_files(tmp_path):
    file(tmp_path, PAIR, name="pairs.jsonl")
    with pytest.raises(UsageError, match=r"pears\.jsonl: no such file \(did you mean 'pairs\.jsonl'\?\)"):
        read([tmp_path / "pears.jsonl"])
    with pytest.raises(UsageError, match=r"no such file; the folder .*nowhere does not exist either"):
        read([tmp_path / "nowhere" / "a.jsonl"])
    with pytest.raises(UsageError, match=r"a folder, expected a file; it holds pairs\.jsonl"):
        read([tmp_path])
    with pytest.raises(UsageError, match="cannot be read: not a directory"):
        read([tmp_path / "pairs.jsonl" / "b.jsonl"])
    (tmp_path / "pairs.xlsx").write_text("prompt,chosen\n")
    known = r"expected \.jsonl, \.ndjson, \.json, \.csv, \.tsv, plain or \.gz, \.parquet, \.arrow, \.feather"
    with pytest.raises(UsageError, match=rf"xlsx: unknown kind of file '\.xlsx', {known}"):
        read([tmp_path / "pairs.xlsx"])
    with pytest.raises(UsageError, match="--data: no file given"):
        read([])


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"a\.jsonl: not a regular file"):
        read([tmp_path / "a.jsonl"])
    assert time.monotonic() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = file(tmp_path, PAIR)
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read: permission denied"):
        read([path])


def test_shared_prompts_are_counted_not_merged(tmp_path):
    found = read([file(tmp_path, PAIR, {**PAIR, "prompt": "other"}, PAIR, PAIR)])
    assert found.counts["shared_prompts"] == 2 and len(found.records) == 4


def test_long_values_are_shown_short(tmp_path):
    said = refused({"prompt": "p", "chosen": [{"role": "x" * 5000, "content": "a"}], "rejected": "b"}, tmp_path)
    assert len(said) < 300
    assert len(refused({f"column{i}" * 20: 1 for i in range(500)}, tmp_path)) < 2500


BEGUN = st.builds(str.__add__, st.sampled_from(["a", '[{"prompt"', "{}", "[[", '{"a":"\\u00']), st.text(max_size=9))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | BEGUN.map(str.encode))
def test_no_bytes_at_all_make_the_reader_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError):
            read([path], skip_bad=skip)


KEYS = st.sampled_from(["role", "content", "from", "value", "text", "order", "below", "score", "x"])
JSON = st.recursive(LEAF | st.sampled_from(["user", "assistant", "role", "text"]),
                    lambda some: st.lists(some, max_size=3) | st.dictionaries(KEYS, some, max_size=3), max_leaves=8)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMATS)))
def test_no_value_in_any_column_makes_a_layout_crash(tmp_path_factory, data, name):
    """A record or a DataError; and a record survives the canonical form."""
    known = FORMATS[name].required + FORMATS[name].optional
    row = dict(FORMATS[name].example) | data.draw(st.dictionaries(st.sampled_from(known), JSON, min_size=1, max_size=2))
    folder = tmp_path_factory.getbasetemp()
    try:
        record = read([file(folder, row, name="fuzz.jsonl")], format=name).records[0]
    except DataError:
        return
    assert read([file(folder, to_json(record), name="fuzz.jsonl")]).records[0] == record
