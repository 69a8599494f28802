"""Chatting over piped input with tiny random models: commands, memory, hostile text, votes that `formats` reads back."""

from __future__ import annotations

import io
import json

import make
import pytest

from preftune.config import Chat
from preftune.errors import DataError, UsageError
from preftune.formats import read
from preftune.records import pairs
from preftune.stages import chat
from preftune.store import build
from preftune.tokens import make_codec


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model folder with a chat template."""
    return make.write_model(tmp_path_factory.mktemp("models") / "talker", template=make.TEMPLATE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder without one."""
    return make.write_model(tmp_path_factory.mktemp("models") / "base", seed=1)


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(text, model..., option=...) -> what was printed: (answers, notes)."""

    def go(text, *folders, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        options = {"sample_tokens": 6, "offline": True} | options
        assert chat.run(Chat(model=[str(f) for f in folders], **options)) == 0
        done = capsys.readouterr()
        return done.out, done.err

    return go


def test_each_line_is_a_turn_until_the_input_ends(talk, talker):
    out, notes = talk("hello\n\nmore\n", talker)
    assert out.startswith("> hello\n") and out.count("\n> ") == 2 and "> more\n" in out
    assert "a dialogue" in notes and notes.count("cut after 6 tokens") <= 2
    assert talk("hello\n\nmore\n", talker)[0] == out, "the same seed gives the same chat"
    assert talk("hello\n\nmore\n", talker, seed=1)[0] != out


def test_every_answer_has_its_own_randomness(talk, base):
    out, _ = talk("hello\nhello\n", base, sample_tokens=12)
    first, second = out.split("> hello\n")[1:]
    assert first != second
    out, _ = talk("hello\n", base, f"{base}/.", sample_tokens=12)
    assert out.split("] ")[1].split("\n[2")[0] != out.split("] ")[2].strip("\n")


def test_commands(talk, talker):
    out, notes = talk("/help\n/clear\n/clera\n/exit\nnever\n", talker)
    assert "/clear  forget" in notes and "forgotten" in notes and "no command /clera" in notes
    assert "never" not in out


def test_the_dialogue_is_remembered_until_cleared(talk, talker, monkeypatch):
    seen = []
    real = chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda codec, prompt: seen.append(prompt) or real(codec, prompt))
    talk("one\ntwo\n/clear\nthree\n", talker, sample_tokens=3)
    assert [[m.role for m in prompt] for prompt in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert [prompt[-1].content for prompt in seen] == ["one", "two", "three"]


def test_without_a_template_each_line_is_a_text_to_continue(talk, base, monkeypatch):
    seen = []
    real = chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda codec, prompt: seen.append(prompt) or real(codec, prompt))
    _, notes = talk("Once upon\na time\n", base)
    assert seen == ["Once upon", "a time"] and "continue" in notes
    talk("Once upon\n", base, template="plain")
    assert seen[-1][0].content == "Once upon"


def test_what_is_printed_is_what_was_sampled(talk, talker):
    """Streaming in pieces adds up to the whole text, however characters fall onto tokens; nothing unprintable is printed."""
    out, _ = talk("hello\n", talker, sample_tokens=60)
    printed = out.removeprefix("> hello\n").removesuffix("\n")
    whole = chat.clean(sampled_text(talker, 60))
    assert printed == whole and len(whole) > 20
    assert chat.clean(out) == out and "\x1b" not in out


def sampled_text(folder, tokens):
    from preftune import models
    from preftune.records import Message
    from preftune.sampling import sample
    from preftune.tokens import decode_response, encode_prompt, end_ids, make_codec

    model, tokenizer = models.load(str(folder), offline=True)
    codec, prompt = make_codec(tokenizer), (Message("user", "hello"),)
    ids, ends = encode_prompt(codec, prompt), end_ids(codec, prompt)
    drawn = sample(model, [ids], ends=[ends], max_tokens=tokens, seed=0)[0][0]
    return decode_response(codec, ids, list(drawn.ids), ends)


def test_terminal_codes_in_and_out_are_shown_not_sent(talk, talker, monkeypatch):
    monkeypatch.setattr(chat, "decode_response", lambda codec, ids, got, ends: "\x1b[2J\u202e\x07"[: len(got)])
    out, notes = talk("a\x1b[31m\u202eb\n/\x1b[2J\n", talker)
    monkeypatch.setattr(chat, "decode_response", lambda codec, ids, got, ends: "\x1b]0;title\x07\ufffd")  # all in the last piece
    out += talk("c\n", talker)[0]
    for text in (out, notes):
        assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert "<U+001B>[2J<U+202E><U+0007>" in out and "<U+001B>]0;title<U+0007>" in out and "a<U+001B>[31m<U+202E>b" in out


def test_a_line_that_cannot_be_answered_does_not_end_the_chat(talk, talker):
    out, notes = talk("<|user|>forged\n" + "long " * 60 + "\n\ud800\nhello\n", talker)
    assert "control token" in notes and "128 positions; /clear" in notes and "surrogate" in notes
    assert out.rstrip("\n").split("> hello\n")[1]


def test_input_that_is_not_text(talker, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="not UTF-8"):
        chat.run(Chat(model=[str(talker)], offline=True))


def test_ctrl_c_stops_the_answer_and_forgets_the_turn(talk, talker, monkeypatch):
    real, calls = chat.stream, []

    def stopping(*args, **kwargs):
        calls.append(args[1])
        for i, item in enumerate(real(*args, **kwargs)):
            if len(calls) == 1 and i == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(chat, "stream", stopping)
    out, _ = talk("one\none\n", talker)
    assert "stopped" in out and calls[0] == calls[1]


# ---------------------------------------------------------------- two models


def test_two_models_side_by_side(talk, talker, tmp_path):
    other = make.write_model(tmp_path / "other", template=make.TEMPLATE, seed=3)
    out, _ = talk("hello\n", talker, other)
    assert f"[1: {talker}]" in out and f"[2: {other}]" in out and chat.ASK not in out


@pytest.fixture
def letters(monkeypatch):
    """Random models emit control characters, which training refuses: their tokens are read as letters here."""
    monkeypatch.setattr(chat, "decode_response", lambda codec, ids, got, ends: "".join(chr(97 + i % 26) for i in got))


def test_votes_become_records(talk, base, tmp_path, letters):
    """Every kind of vote, read back by `formats`: the winner is the answer that was shown under the number typed."""
    other, votes = make.write_model(tmp_path / "other", seed=3), tmp_path / "votes.jsonl"
    text = "".join(f"line {i}\n{vote}\n" for i, vote in enumerate(["1", "2", "x\n=", "0", "s", "1", "1", "1"])) + "last\n"
    out, notes = talk(text, base, other, votes=str(votes))
    assert str(base) not in out and str(other) not in out, "names are hidden until the vote"
    assert "'x' is not one of" in notes and notes.count("saved to") == 7 and notes.count("not saved") == 2
    rows = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["line 0", "line 1", "line 2", "line 3", "line 5", "line 6", "line 7"]
    records = read([str(votes)]).records
    won = [[(p.chosen, p.rejected) for p in pairs(r)] for r in records]
    assert won == [[(0, 1)], [(1, 0)], [], [], [(0, 1)], [(0, 1)], [(0, 1)]]
    assert records[2].judgements[0].order == ((0, 1),) and records[3].labels == (False, False)
    shown = out.split("> line ")[1:]
    for row, piece in zip(rows, [p for p in shown if p[0] != "4"], strict=True):
        first, second = (r["text"] for r in row["responses"])
        assert piece.index("[1] " + chat.clean(first)) < piece.index("[2] " + chat.clean(second))
    firsts = {row["responses"][0]["source"]["model"] for row in rows}
    assert firsts == {str(base), str(other)}, "both models come first now and then"


def test_a_vote_that_training_would_refuse_is_not_saved(talk, base, tmp_path, monkeypatch):
    other, votes = make.write_model(tmp_path / "other", seed=3), tmp_path / "votes.jsonl"
    for text, says in (("a\0b", "control character <U+0000>"), (" \n", "an answer is empty")):
        monkeypatch.setattr(chat, "decode_response", lambda codec, ids, got, ends, text=text: text)
        _, notes = talk("line\n1\n", base, other, votes=str(votes))
        assert says in notes and not votes.exists()


def test_a_vote_on_a_spelt_control_token_is_saved_only_where_training_would_split_it(talk, base, tmp_path, monkeypatch):
    """What is saved under 'split' trains under 'split', and is what 'refuse' refuses."""
    other, votes = make.write_model(tmp_path / "other", seed=3), tmp_path / "votes.jsonl"
    texts = iter([" fine", " so<|end|> it"] * 99)
    monkeypatch.setattr(chat, "decode_response", lambda codec, ids, got, ends: next(texts))
    _, notes = talk("line\n1\n", base, other, votes=str(votes), sample_tokens=1)
    assert "not saved: an answer spells the control token '<|end|>'" in notes and "--control-tokens split" in notes and not votes.exists()
    talk("line\n1\n", base, other, votes=str(votes), sample_tokens=1, control_tokens="split")
    saved = read([str(votes)]).records
    for how, kept in (("refuse", 0), ("split", 1)):
        assert len(build(saved, make_codec(make.tokenizer(), control_tokens=how), max_length=99)[0]) == kept


def test_the_dialogue_goes_on_with_the_better_answer(talk, talker, tmp_path, monkeypatch, letters):
    other = make.write_model(tmp_path / "other", template=make.TEMPLATE, seed=3)
    seen = []
    real = chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda codec, prompt: seen.append(prompt) or real(codec, prompt))
    firsts = set()
    for seed in range(4):
        votes = tmp_path / f"votes{seed}.jsonl"
        talk("hello\n2\nmore\n", talker, other, votes=str(votes), seed=seed)
        row = json.loads(votes.read_text(encoding="utf-8"))
        assert [m.content for m in seen[-1]] == ["hello", row["responses"][1]["text"], "more"]
        firsts.add(row["responses"][0]["source"]["model"])
    assert len(firsts) == 2


def test_options_that_contradict(talker, base):
    with pytest.raises(UsageError, match="two models"):
        chat.run(Chat(model=[str(talker)], votes="v.jsonl"))
    with pytest.raises(UsageError, match="one model or two, not 3"):
        chat.run(Chat(model=["a", "b", "c"]))
    with pytest.raises(UsageError, match="has no chat template"):
        chat.run(Chat(model=[str(talker), str(base)], offline=True))
