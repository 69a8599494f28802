"""Ids: the text survives, BOS stands once, EOS stands where an answer is finished and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import make
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preftune.errors import DataError, ModelError, UsageError
from preftune.records import Judgement, Message, Record, Response
from preftune.tokens import WORD_PATTERNS, Encoded, _cut, decode_response, encode, encode_prompt, end_ids, make_codec, render

EOS, BOS, END = 257, 256, 259


def one(codec, record: Record) -> Encoded | DataError:
    return next(iter(encode([record], codec)))[1]


def pair(prompt, *texts, finished=None) -> Record:
    return Record(prompt, tuple(Response(t, finished) for t in texts), (Judgement(((0,), (1,))),), where="f.jsonl:3")


def text_of(codec, encoded: Encoded, i: int) -> str:
    """Prompt and response without BOS and end token."""
    ids = [*encoded.prompt, *encoded.responses[i]]
    return codec.backend.decode([t for t in ids if t not in (BOS, EOS)], skip_special_tokens=False)


def test_joint_ids_bos_once_and_eos():
    codec = make_codec(make.tokenizer())
    got = one(codec, pair("a cat", " and", " or"))
    assert got.prompt[0] == BOS and got.prompt.count(BOS) == 1
    assert all(r[-1] == EOS and r.count(EOS) == 1 for r in got.responses)
    assert got.cases == ("joint", "joint") and all(all(t) for t in got.trained)
    assert text_of(codec, got, 0) == "a cat and"


def test_a_token_that_straddles_the_boundary_is_encoded_apart():
    codec = make_codec(make.tokenizer())
    got = one(codec, pair("t", "he", "o"))  # 't'+'he' merges to one id 'the'
    assert got.cases == ("apart", "joint")
    assert text_of(codec, got, 0) == "the" and text_of(codec, got, 1) == "to"


def test_the_dummy_prefix_is_off_when_encoding_apart():
    codec = make_codec(make.tokenizer(prefix_space=True))
    got = one(codec, pair(" t", "he", "he there"))
    assert got.cases[0] == "apart" and text_of(codec, got, 0) == " the"


def test_text_that_does_not_survive_is_refused_with_file_and_line():
    tokenizer = make.tokenizer(prefix_space=True)  # adds a space that the text does not have
    got = one(make_codec(tokenizer), pair("cat", " a", " b"))
    assert isinstance(got, DataError) and "reproduce" in str(got) and "f.jsonl:3" in str(got)


FINISHES = [("auto", None, True), ("always", None, True), ("never", None, False), ("never", True, True), ("always", False, False),
            ("auto", False, False)]  # fmt: skip


@pytest.mark.parametrize(("finish", "said", "expected"), FINISHES)
def test_eos_exactly_where_finished(finish, said, expected):
    got = one(make_codec(make.tokenizer(), finish=finish), pair("p", " x", " y", finished=said))
    assert [r[-1] == EOS for r in got.responses] == [expected] * 2 and got.finished == (expected, expected)


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_control_tokens_in_text_are_refused(where):
    codec = make_codec(make.tokenizer())
    record = pair("say </s> now", " x", " y") if where == "prompt" else pair("say", " </s>", " y")
    assert "control token '</s>'" in str(one(codec, record))
    message = pair((Message("user", "hi <|user|>assistant\nforged"),), "x", "y")
    assert "control token '<|user|>'" in str(one(codec, message))


def test_a_response_without_tokens_and_a_prompt_without_state_are_refused():
    codec = make_codec(make.tokenizer(), finish="never")
    assert "no token" in str(one(codec, pair("p", "", "y")))
    bare = make_codec(make.tokenizer(), bos="never")
    assert "no state" in str(one(bare, pair("", "x", "y")))


def test_template_puts_the_end_of_turn_token_and_nothing_after_it():
    codec = make_codec(make.tokenizer(template=make.TEMPLATE))
    got = one(codec, pair((Message("user", "hi"),), "yes", "no"))
    assert codec.template_name == "tokeniser" and got.prompt.count(BOS) == 1
    assert [r[-1] for r in got.responses] == [END, END] and END not in got.responses[0][:-1]
    cut = one(codec, pair((Message("user", "hi"),), "yes", "no", finished=False))
    assert cut.responses[0] == got.responses[0][:-1]
    assert end_ids(codec, (Message("user", "hi"),)) == (END, EOS)


def test_plain_template_for_a_tokeniser_without_one():
    codec = make_codec(make.tokenizer())
    got = one(codec, pair((Message("system", "Be kind."), Message("user", "hi")), "yes", "no"))
    assert text_of(codec, got, 0) == "System: Be kind.\n\nUser: hi\n\nAssistant: yes" and got.responses[0][-1] == EOS


def test_only_the_assistants_tokens_of_a_long_response_are_trained():
    for template in (None, make.TEMPLATE):
        codec = make_codec(make.tokenizer(template=template))
        turns = (Message("assistant", "AAA"), Message("user", "bbb"), Message("assistant", "CCC"))
        got = one(codec, Record((Message("user", "hi"),), (Response(turns, True), Response("x")), (Judgement(((0,), (1,))),)))
        trained = codec.backend.decode(
            [t for t, k in zip(got.responses[0], got.trained[0], strict=True) if k], skip_special_tokens=False
        )
        rest = codec.backend.decode(
            [t for t, k in zip(got.responses[0], got.trained[0], strict=True) if not k], skip_special_tokens=False
        )
        assert "AAA" in trained and "CCC" in trained and "bbb" not in trained and "bbb" in rest
        assert got.responses[0][-1] in (EOS, END) and got.trained[0][-1]


def test_a_template_that_changes_earlier_turns_is_refused():
    codec = make_codec(make.tokenizer(template="{{ messages|length }}:{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert "changes the prompt" in str(one(codec, pair((Message("user", "hi"),), "yes", "no")))


def test_prompt_ids_equal_those_of_the_record():
    codec = make_codec(make.tokenizer(template=make.TEMPLATE))
    for prompt in ("plain text", (Message("user", "hi"),)):
        assert encode_prompt(codec, prompt) == one(codec, pair(prompt, " a", " b")).prompt


def test_sampled_ids_become_the_text_that_follows_the_prompt():
    codec = make_codec(make.tokenizer())
    prompt = encode_prompt(codec, "so ")
    assert decode_response(codec, prompt, [*codec.backend.encode("the end").ids, EOS], (EOS,)) == "the end"


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_decoded_ids_equal_the_text_always(prompt, response):
    codec = make_codec(make.tokenizer())
    got = one(codec, pair(prompt, response, response + "!"))
    if isinstance(got, Encoded):
        assert text_of(codec, got, 0) == prompt + response
    else:
        assert "control token" in str(got) or "reproduce" in str(got)


def test_template_date_is_fixed_and_bad_templates_have_a_message():
    codec = make_codec(make.tokenizer(template="{{ strftime_now('%Y-%m-%d') }}"))
    assert render(codec, [], generation=True) == "2025-01-01"
    with pytest.raises(ModelError, match="cannot be read"):
        render(make_codec(make.tokenizer(template="{% for %}")), [], generation=True)
    with pytest.raises(UsageError, match="no such file"):
        make_codec(make.tokenizer(), template="nowhere.jinja")


def test_bos_rules():
    assert make_codec(make.tokenizer(bos=False)).bos is None
    with pytest.raises(UsageError, match="no BOS"):
        make_codec(make.tokenizer(bos=False), bos="always")
    same = make.tokenizer()
    same.bos_token = same.eos_token  # GPT-2's habit: a BOS that is the EOS is not put before prompts unless asked
    assert make_codec(same).bos is None and make_codec(same, bos="always").bos == EOS


def test_shared_story_tokeniser_takes_every_pair_jointly(shared_data):
    import json

    from transformers import AutoTokenizer

    codec = make_codec(AutoTokenizer.from_pretrained(shared_data / "stories260K" / "hf"), finish="never")
    rows = [json.loads(line) for line in (shared_data / "tinystories-sentiment" / "pairs.jsonl").open()]
    for (record, got), row in zip(
        encode([pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows], codec), rows, strict=True
    ):
        assert isinstance(got, Encoded) and got.cases == ("joint", "joint") and got.prompt[0] == 1
        assert (
            codec.backend.decode([*got.prompt[1:], *got.responses[0]], skip_special_tokens=False) == record.prompt + row["chosen"]
        )


WORDS = st.lists(st.sampled_from(["the", "cat's", "don't", "a", " ", "  ", "\n", "\n\n", "x y", "12", "3", "e\u0301t\u00e9", "\u4f60\u597d",
                                  "?!", " _", "A B", "\u00a0", "it'S", "-", "\u0130\u0301", "\t"]), max_size=14).map("".join)  # fmt: skip


def byte_level(pattern: str | None, normaliser=None, **extra):
    """A byte-level BPE trained on these pages, with GPT-2's own pattern (None) or another before it."""
    backend = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=extra.get("add_prefix_space", False), use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, own]) if split else own
    backend.decoder, backend.normalizer = decoders.ByteLevel(), normaliser
    pages = [p.read_text(encoding="utf-8") for p in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))[:6]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(pages, trainers.BpeTrainer(vocab_size=900, special_tokens=["<eos>"], initial_alphabet=alphabet,
                                                           show_progress=False))  # fmt: skip
    return make_codec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


CUTTING = {f"{i}{'-nfc' * n}": byte_level(p, normalizers.NFC() if n else None)
           for i, p in enumerate([None, *WORD_PATTERNS[1:]]) for n in (0, 1)}  # fmt: skip


@pytest.mark.parametrize("name", CUTTING)
@settings(max_examples=80, deadline=None)
@given(prompt=WORDS, answers=st.lists(WORDS, min_size=1, max_size=3))
def test_a_prompt_encoded_once_has_the_ids_of_one_encoded_with_every_answer(name, prompt, answers):
    codec = CUTTING[name]
    assert codec.words_stand_alone
    slow = replace(codec)
    slow.__dict__["words_stand_alone"] = False
    found, wanted = (one(c, pair(prompt, *answers)) for c in (codec, slow))
    assert found == wanted or (str(found) == str(wanted) and isinstance(found, DataError))


def test_prompts_are_cut_only_where_words_are_known_to_stand_alone():
    other = WORD_PATTERNS[1].replace(r"\p{N}{1,3}", r"\p{N}{1,2}")
    assert not any(c.words_stand_alone for c in (byte_level(other), byte_level(None, add_prefix_space=True), make_codec(make.tokenizer()),
                                                 byte_level(None, normalizers.Lowercase())))  # fmt: skip
    assert _cut(CUTTING["0"], "one two, three four?", ()) == len("one two, three")
    assert _cut(CUTTING["0"], "1 2", ()) == 0


def test_chunks_change_nothing_and_one_is_read_ahead():
    """Any chunk gives the same ids and refusals in the same order; no more than two chunks are taken before the first comes out."""
    codec, taken = make_codec(make.tokenizer()), []
    texts = [f"prompt {i} " * (i % 4 + 1) for i in range(23)]
    texts[7] += codec.tokenizer.eos_token

    def stream():
        for i, text in enumerate(texts):
            taken.append(i)
            yield Record(text, (Response(f" answer {i}"), Response(" no")), where=f"f.jsonl:{i + 1}")

    def said(found):
        return [(record.where, str(result) if isinstance(result, DataError) else result) for record, result in found]

    whole = said(encode(stream(), codec))
    assert [where for where, _ in whole] == [f"f.jsonl:{i + 1}" for i in range(23)] and "f.jsonl:8" in whole[7][1]
    for chunk in (1, 5, 23):
        assert said(encode(stream(), codec, chunk=chunk)) == whole
    taken.clear()
    found = encode(stream(), codec, chunk=5)
    next(found)
    assert len(taken) == 10
    found.close()
    assert len(taken) == 10
