"""Rewards by rule: the lexicon reproduces the shared scores, a user's function is called as said, faults name their place."""

from __future__ import annotations

import json
import math

import pytest

from preftune.errors import DataError, NumericsError, UsageError
from preftune.rewards import compound, read_lexicon, rule


def test_lexicon_reproduces_every_score_of_the_shared_pairs(shared_data):
    """2,974 responses scored elsewhere, written with six decimals."""
    score = rule(f"lexicon:{shared_data / 'vader' / 'vader_lexicon.txt'}")
    with open(shared_data / "tinystories-sentiment" / "pairs.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    expected = [row[f"score_{side}"] for row in rows for side in ("chosen", "rejected")]
    ours = score([""] * len(texts), texts)
    assert len(ours) > 2900
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("text, total", [
    ("good", 2.0), ("Good GOOD", 4.0), ("not good", -1.48), ("not a very good", -1.48), ("not one two three good", 2.0),
    ("isn't good", -1.48), ("isn\u2019t good", -1.48), ("good, not", 2.0), ("goods", 0.0), ("good-bad", 1.0), ("", 0.0),
    ("äußerst schön", 3.0),
])
def test_compound_by_hand(text, total):
    valences = {"good": 2.0, "bad": -1.0, "schön": 3.0}
    assert compound(text, valences) == pytest.approx(total / math.sqrt(total * total + 15), abs=1e-12)


def test_lexicon_is_blind_to_the_prompt(tmp_path):
    (tmp_path / "words.txt").write_text("good\t2.0\t0.5\t[2, 2]\n\nbad\t-1\n")
    score = rule(f"lexicon:{tmp_path / 'words.txt'}")
    assert score(["bad", "good"], ["good", "good"]) == [pytest.approx(2 / math.sqrt(19))] * 2
    assert score.path == tmp_path / "words.txt"


@pytest.mark.parametrize("content, line, says", [
    ("good\t2\nbad -1\n", 2, "token TAB number"), ("good\tfine\n", 1, "token TAB number"), ("good\tnan\n", 1, "token TAB number"),
    ("\t2\n", 1, "token TAB number"),
])
def test_malformed_lexicon_names_file_and_line(tmp_path, content, line, says):
    path = tmp_path / "words.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_lexicon(path)
    assert (caught.value.path, caught.value.line) == (path, line)
    assert f"{path}:{line}:" in str(caught.value)


def test_of_a_repeated_token_the_last_counts(tmp_path):
    (tmp_path / "words.txt").write_text("ok\t1.6\nfine\t0.8\nok\t1.2\n")
    assert read_lexicon(tmp_path / "words.txt") == {"ok": 1.2, "fine": 0.8}


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "words.txt").write_text("good\t2\n")
    with pytest.raises(DataError, match="did you mean 'words.txt'"):
        rule(f"lexicon:{tmp_path / 'word.txt'}")
    (tmp_path / "latin.txt").write_bytes("schön\t2\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        rule(f"lexicon:{tmp_path / 'latin.txt'}")
    with pytest.raises(DataError, match="cannot be read"):
        rule(f"lexicon:{tmp_path}")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no entries"):
        rule(f"lexicon:{tmp_path / 'empty.txt'}")


@pytest.mark.parametrize("spec, says", [
    ("lexcon:x", "did you mean 'lexicon'"), ("lexicon", "no file named"), ("lexicon:", "no file named"),
    ("python:x.py", "FUNCTION"), ("python:x.py:not a name", "FUNCTION"),
    ("https://example.org/reward", "unknown kind"), ("", "unknown kind"),
])
def test_a_spec_that_is_none(spec, says):
    with pytest.raises(UsageError, match=says) as caught:
        rule(spec)
    assert str(caught.value).count("\n") <= 2


USER = '''
from dataclasses import dataclass

@dataclass
class Weights:
    length: float = 0.5

def score(prompt: str, response: str) -> float:
    return Weights().length * len(response) - len(prompt)

def right(prompt, response): return response == "4"
def half(prompt, response): return float("nan") if response == "x" else 1
def words(prompt, response): return "3"
def nothing(prompt, response): pass
def fails(prompt, response): return 1 / len(response)
def one(response): return 1.0
'''


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(USER)
    return path


def test_python_function(user):
    score = rule(f"python:{user}:score")
    assert score(["ab", ""], ["abcd", "ab"]) == [0.0, 1.0]
    assert score.name == f"python:{user}:score"
    assert rule(f"python:{user}:right")(["2+2="] * 2, ["4", "5"]) == [1.0, 0.0]


@pytest.mark.parametrize("function, error, says", [
    ("half", NumericsError, "nan at prompt 1"), ("words", DataError, "returned '3' at prompt 0"),
    ("nothing", DataError, "returned None at prompt 0"), ("fails", DataError, "ZeroDivisionError.* at prompt 2"),
])
def test_what_a_python_function_may_not_return(user, function, error, says):
    with pytest.raises(error, match=says):
        rule(f"python:{user}:{function}")(["p", "q", "r"], ["a", "x", ""])


def test_python_function_that_is_not_there(user):
    with pytest.raises(UsageError, match="did you mean 'score'"):
        rule(f"python:{user}:scores")
    with pytest.raises(UsageError, match=r"one\(response\) cannot be called as one\(prompt, response\)"):
        rule(f"python:{user}:one")
    (user.parent / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(DataError, match="broken.py:2: cannot be loaded: SyntaxError"):
        rule(f"python:{user.parent / 'broken.py'}:f")


def test_unequal_lengths_are_refused(user):
    with pytest.raises(DataError, match="2 prompts but 1 responses"):
        rule(f"python:{user}:score")(["a", "b"], ["c"])
