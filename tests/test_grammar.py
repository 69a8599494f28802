"""The demo's world: everything that can be said is listed, parsed exactly, and worth what the tables say."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import grammar
from preftune.errors import UsageError

LANGUAGES = list(grammar.LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_reply_parses_to_itself_and_texts_are_distinct(language):
    asked = grammar.prompts(language)
    assert len(asked) == len(set(asked)) == 288
    for prompt in asked[::7]:
        replies = grammar.replies(language, prompt)
        assert len(replies) == len({r.text for r in replies}) == 378
        assert all(grammar.parse(language, prompt, r.text) == r.features for r in replies)


@pytest.mark.parametrize("language", LANGUAGES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_near_misses_do_not_parse(language, data):
    prompt = data.draw(st.sampled_from(grammar.prompts(language)))
    replies = {r.text for r in grammar.replies(language, prompt)}
    text = data.draw(st.sampled_from(sorted(replies)))
    at = data.draw(st.integers(0, len(text) - 1))
    for near in (text[:at] + text[at + 1 :], text[:at] + "x" + text[at:], text + " ", text[:at]):
        assert (grammar.parse(language, prompt, near) is None) == (near not in replies)


@pytest.mark.parametrize("language", LANGUAGES)
def test_another_customers_item_is_unparsable(language):
    one, other = grammar.prompts(language)[0], grammar.prompts(language)[7]
    assert all(grammar.parse(language, other, r.text) is None for r in grammar.replies(language, one))


def test_the_reward_is_the_table():
    assert grammar.reward(grammar.Features(True, "right", False, 0)) == grammar.EMPATHY + grammar.FIX["right"]
    assert grammar.reward(grammar.Features(False, "wrong", True, 2)) == grammar.FIX["wrong"] + grammar.RUDE + 2 * grammar.FILLER
    worst = min(grammar.reward(r.features) for r in grammar.replies("en", grammar.prompts("en")[0]))
    assert grammar.reward(None) == grammar.UNPARSABLE <= 0 and worst < 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_split_shares_no_prompt_and_is_seeded(language):
    train, held = grammar.split(language, 0)
    assert len(train) + len(held) == 288 and not set(train) & set(held) and len(held) == 48
    assert grammar.split(language, 0) == (train, held) != grammar.split(language, 1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_corpus_is_parsable_and_follows_its_habits(language):
    train, _ = grammar.split(language, 0)
    said = grammar.corpus(language, train, 6000, 0)
    assert said == grammar.corpus(language, train, 6000, 0)
    found = [grammar.parse(language, prompt, reply) for prompt, reply in said]
    assert None not in found
    share = Counter(f.fix for f in found)
    assert abs(share["right"] / 6000 - grammar.TALK_FIX["right"]) < 0.03
    assert abs(sum(f.rude for f in found) / 6000 - grammar.TALK["rude"]) < 0.03


def test_the_judge_is_bradley_terry():
    chance = random.Random(0)
    share = sum(grammar.prefers(1.0, 0.0, chance) for _ in range(20_000)) / 20_000
    assert abs(share - 0.7311) < 0.012


def test_unknown_languages_and_prompts_are_refused():
    with pytest.raises(UsageError, match="en, zh"):
        grammar.prompts("fr")
    with pytest.raises(UsageError, match="not a prompt"):
        grammar.replies("en", "Customer: Hello.")
    assert grammar.scores([grammar.prompts("zh")[0]], ["?"]) == [grammar.UNPARSABLE]
