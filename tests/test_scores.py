"""Reward models as numbers: the head's read-out against transformers' own forward pass, ensembles against hand work, every kind of spec."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from preftune import models, rewards
from preftune.batches import make_batch
from preftune.errors import DataError, ModelError, NumericsError, UsageError
from preftune.evaluate import response_rows
from preftune.readout import hidden_states, packs, scalars, token_scalars
from preftune.records import Response
from preftune.rewards import Member, Scorer, centre, combine, scorer
from preftune.store import build, from_ids
from preftune.tokens import encode_prompt, end_ids, make_codec

CLASSIFIERS = [kind for kind in make.SIZES if kind != "granite"]


def rows(store) -> list[torch.Tensor]:
    """Prompt and response of every response as one plain row of ids."""
    chains = [store.chain(s) for s in range(len(store.response)) if store.response[s] >= 0]
    return [torch.from_numpy(np.concatenate([store.tokens[store.start[s] : store.start[s + 1]] for s in c]).astype(np.int64))[None]
            for c in chains]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scalars_are_those_of_transformers_on_single_rows(kind):
    """K responses share their prompt; the same numbers come from one row each, here and by the class's own forward pass."""
    store, model = make.store(6, k=3), models.prepare(make.model(kind))
    net = models.with_scalar_head(model, seed=1)
    with torch.no_grad():
        own = torch.stack([net(input_ids=row).logits[0, 0] for row in rows(store)]).double()
        for share in {packs(net), False}:
            net.reads_segments = share
            batch = make_batch(store, range(6), share=share)
            found = scalars(net, hidden_states(net, batch), batch)
            torch.testing.assert_close(found, own, rtol=0, atol=5e-6)
    assert found.dtype == torch.float64 and found.std() > 0.01


def test_a_head_that_transformers_does_not_have_is_refused():
    with pytest.raises(ModelError, match="no scalar head for GraniteForCausalLM"):
        models.with_scalar_head(models.prepare(make.model("granite")), seed=0)


def test_the_last_token_by_position():
    """Responses of one token, that share all but the last, and that end with the id that pads: each is read at its own last token."""
    store = from_ids([(5, 6, 7)], [[(9,), (10,), (9, 257), (9, 257, 257)]])
    net = models.with_scalar_head(models.prepare(make.model(pad_token_id=257)), seed=1)
    assert net.config.pad_token_id is None, "transformers would pass over the end of an answer as padding"
    batch = make_batch(store, [0])
    assert batch.tokens[batch.last].tolist() == [9, 10, 257, 257] and len(set(batch.last.tolist())) == 4
    with torch.no_grad():
        hidden = hidden_states(net, batch)
        found = scalars(net, hidden, batch)
        own = torch.stack([net(input_ids=row).logits[0, 0] for row in rows(store)]).double()
        torch.testing.assert_close(found, own, rtol=0, atol=5e-6)
        before = token_scalars(net, hidden, batch)
        prompt = net(input_ids=torch.tensor([[5, 6, 7]])).logits[0, 0].double()
    assert before.shape == (len(batch.target),) and len(set(found.tolist())) == 4
    first = [batch.response.tolist().index(r) for r in range(4)]
    torch.testing.assert_close(before[first], prompt.expand(4), rtol=0, atol=5e-6)


def test_the_head_begins_as_it_says():
    """N(0, 1/sqrt(d + 1)), a function of the seed; the decoder is the language model's own."""
    model = models.prepare(make.model("llama", hidden_size=512, num_hidden_layers=1))
    one, two, other = (models.with_scalar_head(model, seed=s) for s in (1, 1, [1, 2]))
    weight = one.score.weight
    assert weight.std().item() == pytest.approx(1 / 513**0.5, rel=0.15) and abs(weight.mean().item()) < 0.01
    assert torch.equal(weight, two.score.weight) and not torch.equal(weight, other.score.weight)
    assert one.base_model is model.base_model
    half = models.with_scalar_head(models.prepare(make.model().bfloat16()), seed=0)
    batch = make_batch(make.store(2), [0, 1])
    with torch.no_grad():
        hidden = hidden_states(half, batch)
        exact = hidden[batch.last].double() @ half.score.weight[0].double()
        assert (scalars(half, hidden, batch) - exact).abs().max() < 1e-5, "the map is taken in fp32 where the model is bf16"


# ---- ensembles ---------------------------------------------------------------------------------------------------------------

THREE = np.array([[0, 1, 0.5, 2], [0, 1.2, 0.4, 1], [0, 0.9, 0.6, 3]])


def test_members_combined_by_hand():
    """Columns two to four have population variances 14/900, 6/900, 6/9: 31/30 - 7/900, .5 - 3/900, 2 - 1/3."""
    assert combine(THREE, "mean") == pytest.approx([0, 31 / 30, 0.5, 2])
    assert combine(THREE, "min") == pytest.approx([0, 0.9, 0.4, 1])
    assert combine(THREE, "variance") == pytest.approx([0, 31 / 30 - 7 / 900, 0.5 - 3 / 900, 5 / 3])
    assert combine(THREE, "variance") == pytest.approx([0, 1.02556, 0.49667, 1.66667], abs=5e-6)
    assert combine(THREE, "lower") == pytest.approx([0, 31 / 30 - 14**0.5 / 30, 0.5 - 6**0.5 / 30, 2 - (2 / 3) ** 0.5])


def test_the_shift_trap():
    """Levels (0, 5, -3) change min by (-3, -3, -2.8, -1) where nobody centres, and nothing where somebody does."""
    shifted = THREE + np.array([[0], [5], [-3]])
    assert combine(shifted, "min") - combine(THREE, "min") == pytest.approx([-3, -3, -2.8, -1])
    prompt = np.zeros(4, int)
    for how in rewards.HOWS:
        one, two = combine(centre(THREE, prompt), how), combine(centre(shifted, prompt), how)
        assert one - one[0] == pytest.approx(two - two[0]), how
        assert two - one == pytest.approx(2 / 3), "the mean of the levels, on every response alike"
    assert combine(centre(shifted, prompt), "mean") == pytest.approx(combine(shifted, "mean"))


def stub(table: np.ndarray, *, how: str, level: bool = True) -> Scorer:
    """An ensemble whose members say what stands in the table, by the number that a response is."""

    def member(row: np.ndarray) -> Member:
        rule = rewards.Rule("stub", lambda prompt, text: float(row[int(text)]))
        return Member(rule=rule, level=level)

    return Scorer("stub", "x", tuple(member(row) for row in table), how)


def test_an_ensemble_centres_by_prompt_or_refuses():
    shifted = THREE + np.array([[0], [5], [-3]])
    asked, said = ["p"] * 4, [Response(str(i)) for i in range(4)]
    plain, moved = stub(THREE, how="min"), stub(shifted, how="min", level=False)
    gap = moved(asked, said) - plain(asked, said)
    assert gap == pytest.approx([gap[0]] * 4)
    assert moved.spread(asked, said) == pytest.approx(centre(THREE, np.zeros(4, int)).std(0))
    with pytest.raises(UsageError, match="one response and a member has no mean of reference samples"):
        moved(["p", "q"], said[:2])
    with pytest.raises(UsageError, match="one response"):
        replace(moved, how="mean").spread(["p"], said[:1])
    with pytest.raises(NumericsError, match="stub: a score is not finite"):
        plain._levelled(np.array([[1.0, np.nan]]), np.zeros(2, int), False)
    assert replace(moved, how="mean")(["p"], said[:1]) == pytest.approx([2 / 3])
    assert stub(THREE, how="min")(["p", "q"], said[1:3]) == pytest.approx([0.9, 0.4])
    assert len(plain([], [])) == 0
    with pytest.raises(DataError, match="2 prompts but 1"):
        plain(["a", "b"], said[:1])


# ---- folders -----------------------------------------------------------------------------------------------------------------


def write_reward(folder: Path, seed: int = 0, **facts) -> Path:
    net = models.with_scalar_head(models.prepare(make.model()), seed=seed)
    models.save(net, make.tokenizer(), folder)
    if facts:
        (folder / models.REWARD).write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two reward models, an ensemble of them, a policy and its reference."""
    root = tmp_path_factory.mktemp("models")
    codec = {k: v for k, v in make_codec(make.tokenizer()).describe().items() if k in rewards.CODEC}
    write_reward(root / "plain", 1)
    write_reward(root / "ensemble" / "a", 1, shift=0.25, scale=2.0, codec=codec)
    write_reward(root / "ensemble" / "b", 2, shift=-1.0, scale=1.0, codec=codec)
    (root / "ensemble" / rewards.ENSEMBLE).write_text(json.dumps({"members": ["a", "b"]}))
    make.write_model(root / "policy", seed=3)
    make.write_model(root / "reference", seed=4)
    return root


ASKED = ["0: the cat", "1: a dog", "0: the cat", "0: the cat"]
SAID = [Response(" thanks"), Response(" no", finished=False), Response(" so they walk"), Response(" x")]


def test_a_reward_model_scores_what_plain_transformers_scores(folders):
    """Of one prompt together, in the order asked; shift and scale of reward.json applied; loads in plain transformers."""
    found = scorer(f"model:{folders / 'plain'}", micro_tokens=16)(ASKED, SAID)
    net, tokens = AutoModelForSequenceClassification.from_pretrained(folders / "plain").eval(), make.tokenizer()
    for prompt, response, value in zip(ASKED, SAID, found, strict=True):
        ids = [256, *tokens(prompt + response.text, add_special_tokens=False).input_ids, *([] if response.finished is False else [257])]
        assert net(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(value, abs=1e-5)
    assert scorer(f"model:{folders / 'ensemble' / 'a'}")(ASKED, SAID) == pytest.approx((found - 0.25) / 2, abs=1e-6)


def test_an_ensemble_on_the_disk(folders):
    one, two = (scorer(f"model:{folders / 'ensemble' / name}")(ASKED, SAID) for name in "ab")
    for how in rewards.HOWS:
        both = scorer(f"model:{folders / 'ensemble'}@{how}")
        table = centre(np.stack([one, two]), np.array([0, 1, 0, 0]))
        assert both(ASKED, SAID) == pytest.approx(combine(table, how), abs=1e-6)
        assert both.spread(ASKED, SAID) == pytest.approx(abs(table[0] - table[1]) / 2, abs=1e-6)
    with pytest.raises(UsageError, match="an ensemble; say how its members are one: @mean"):
        scorer(f"model:{folders / 'ensemble'}")
    with pytest.raises(UsageError, match="is one model, not an ensemble"):
        scorer(f"model:{folders / 'plain'}@min")
    with pytest.raises(UsageError, match=r"'mim' is none of .*did you mean 'min'"):
        scorer(f"model:{folders / 'ensemble'}@mim")
    prints = {scorer(f"model:{folders / 'ensemble'}@{how}").fingerprint for how in rewards.HOWS}
    assert len(prints | {scorer(f"model:{folders / 'plain'}").fingerprint}) == 5


def test_rollouts_are_read_as_ids_or_as_texts(folders):
    """The same numbers by ids, without a text ever made, and by texts for a policy of another tokeniser and for a rule."""
    codec = make_codec(make.tokenizer())
    prompts = ["0: the cat", "1: a dog"]
    ids = [encode_prompt(codec, p) for p in prompts]
    answers = [[codec.tokenizer(t, add_special_tokens=False).input_ids for t in row] for row in ([" thanks", " no"], [" so"])]
    answers[0][0].append(end_ids(codec, prompts[0])[0])
    store = from_ids(ids, answers)
    said = [Response(" thanks", True), Response(" no", False), Response(" so", False)]
    score = scorer(f"model:{folders / 'plain'}")
    expected = score(["0: the cat"] * 2 + ["1: a dog"], said)
    assert score.rollouts(store, codec, prompts) == pytest.approx(expected, abs=1e-6)
    apart = from_ids(ids[:1], [[[codec.tokenizer(c, add_special_tokens=False).input_ids[0] for c in "the"]]])
    read, retold = score.rollouts(apart, codec, prompts[:1])[0], score(prompts[:1], [Response("the", False)])[0]
    assert abs(read - retold) > 1e-3, "what was sampled is scored, not what its text would be encoded as"
    other = make_codec(make.tokenizer(), template="plain", bos="never")
    bare = from_ids([p[1:] for p in ids], answers)
    assert score.rollouts(bare, other, prompts) == pytest.approx(expected, abs=1e-6)
    rule = Scorer("words", "x", (Member(rule=rewards.Rule("words", lambda prompt, text: len(text))),))
    assert rule.rollouts(store, codec, prompts).tolist() == [7, 3, 3]


def test_the_implicit_reward_is_beta_times_the_log_ratio(folders, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folders / "policy")
    (run / "config.yaml").write_text("loss: sigmoid\nbeta: 0.3\n")
    found = scorer(f"implicit:{run}@{folders / 'reference'}", micro_tokens=16)(ASKED, SAID)
    codec, sums = make_codec(make.tokenizer()), []
    for name in ("policy", "reference"):
        model, _ = models.load(str(folders / name))
        records = [replace(make.records(1)[0], prompt=p, responses=(r,), judgements=()) for p, r in zip(ASKED, SAID, strict=True)]
        store, _ = build(records, codec, max_length=128)
        sums.append(np.array([row["logp"] for row in response_rows(model, store, micro_tokens=64)]))
    assert found == pytest.approx(0.3 * (sums[0] - sums[1]), abs=1e-5)
    with pytest.raises(DataError, match="too long"):
        scorer(f"implicit:{run}@{folders / 'reference'}")(["p"], [Response(" a" * 200)])
    prints = set()
    for beta, dtype in ((0.3, "fp32"), (0.5, "fp32"), (0.3, "bf16")):
        (run / "config.yaml").write_text(f"loss: sigmoid\nbeta: {beta}\n")
        prints.add(scorer(f"implicit:{run}@{folders / 'reference'}", dtype=dtype).fingerprint)
    assert len(prints) == 3
    with pytest.raises(UsageError, match="not a run folder, so its beta is not known"):
        scorer(f"implicit:{folders / 'policy'}@{folders / 'reference'}")


def test_what_is_no_reward_model(folders, tmp_path):
    with pytest.raises(ModelError, match="no reward model"):
        scorer(f"model:{folders / 'policy'}")
    with pytest.raises(ModelError, match="a reward model, which scores answers and writes none"):
        models.load(str(folders / "plain"))
    with pytest.raises(ModelError, match="no such model folder"):
        scorer("model:./nowhere")
    broken = write_reward(tmp_path / "broken", shift="a lot")
    with pytest.raises(ModelError, match="numbers 'shift' and 'scale'"):
        models.load_reward(str(broken))
    with pytest.raises(UsageError, match="did you mean 'model'"):
        scorer("modell:x")
    with pytest.raises(DataError, match=r"1 prompts with responses that the reward model cannot read.*too long"):
        scorer(f"model:{folders / 'plain'}")(["p"], [Response(" a" * 200)])


def test_what_a_score_stands_on_is_in_its_fingerprint(folders, tmp_path):
    one = write_reward(tmp_path / "one", 1, shift=0.0)
    before = scorer(f"model:{one}").fingerprint
    assert scorer(f"model:{one}", dtype="bf16").fingerprint != before
    (one / models.REWARD).write_text(json.dumps({"shift": 1.0}))
    assert scorer(f"model:{one}").fingerprint != before
    prints = set()
    for body in ("1.0", "2.0"):
        (tmp_path / "rule.py").write_text(f"def f(prompt, response): return {body}\n")
        prints.add(scorer(f"python:{tmp_path / 'rule.py'}:f").fingerprint)
    assert len(prints) == 2


def test_members_without_a_level_are_not_compared_at_one_answer(tmp_path):
    """Their folders say no mean of reference samples."""
    for name, seed in (("a", 1), ("b", 2)):
        write_reward(tmp_path / name, seed)
    (tmp_path / rewards.ENSEMBLE).write_text(json.dumps({"members": ["a", "b"]}))
    with pytest.raises(UsageError, match="one response and a member has no mean of reference samples"):
        scorer(f"model:{tmp_path}@min")(["p"], [Response(" a")])
