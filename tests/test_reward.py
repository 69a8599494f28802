"""`reward` end to end on tiny models: what it minimises against other formulations, what it leaves behind, ensembles, targets, refusals."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
import torch
from test_dpo import lines, same_run
from test_losses import ONLY, SCALAR
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from preftune import checkpoints, engine, grammar, models, selfcheck
from preftune.batches import make_step
from preftune.config import DataCheck, Reward, scored_terms
from preftune.errors import DataError, ModelError, PreftuneError, SelfCheckError, UsageError
from preftune.formats import read
from preftune.losses import LOSSES, Side, arguments, lists, reward
from preftune.objectives import preference
from preftune.readout import log_odds
from preftune.records import Judgement, Record, Response
from preftune.rewards import scorer
from preftune.stages import data as data_stage
from preftune.stages import demo
from preftune.stages import reward as stage
from preftune.store import build
from preftune.tokens import make_codec

pytestmark = pytest.mark.usefixtures("private_cache")


# ---- what is minimised -------------------------------------------------------------------------------------------------------


def scored(loss: str, store, *, share: bool = True, micro: int = 10_000, **numbers: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step over a whole store through the real path."""
    parts = [(weight, name, {k: 1.0 if k == "beta" else numbers.get(k, v) for k, v in arguments(name).items()})
             for weight, name in ((1.0, loss),)]  # fmt: skip
    net = models.with_scalar_head(models.prepare(make.model()), seed=1, classes=CLASSES if loss == "nominal" else ()).double()
    net.reads_segments = share
    state = engine.make_state(net, rate=lambda step: 0.0, clip=0.0)
    step = make_step(store, range(len(store)), micro_tokens=micro, share=share)
    value, _, _ = engine.accumulate(state, step, preference(parts, read="scalar"))
    return float(value), {name: w.grad.clone() for name, w in state.weights.items() if w.grad is not None}


def test_a_list_of_two_is_bradley_terry_to_the_last_bit():
    """Plackett-Luce and S-DPO over lists of two give Bradley-Terry's value and gradient, through packing, head and step."""
    store = make.store(8, k=2)
    value, gradient = scored("bradley-terry", store)
    for name in ("plackett-luce", "s-dpo"):
        other, theirs = scored(name, store)
        assert other == value and gradient.keys() == theirs.keys()
        assert all(torch.equal(gradient[k], theirs[k]) for k in gradient), name
    assert "score.weight" in gradient and gradient["score.weight"].abs().max() > 1e-3


SCORED = replace(make.records(1)[0], prompt="p", responses=tuple(Response(f" {i} the", score=0.1 * i) for i in range(4)),
                 judgements=(Judgement(((0,), (1, 2)), below=(3,)), Judgement(((3,), (0,)), prob=0.7)), labels=None)  # fmt: skip


@pytest.mark.parametrize("name", SCALAR)
def test_shared_prompts_rows_and_cuts_give_the_same_step(name):
    """K responses on one prompt, a row each, and a micro-batch a record: the same loss and gradient; norms are fp32 inside."""
    records = [replace(SCORED, prompt=f"{i} dog") for i in range(3)]
    store, _ = build(records, make_codec(make.tokenizer()), max_length=128)
    value, gradient = scored(name, store)
    assert math.isfinite(value) and value != 0
    for how in ({"share": False}, {"micro": 1}):
        other, theirs = scored(name, store, **how)
        assert other == pytest.approx(value, rel=1e-9), how
        assert all(torch.allclose(gradient[k], theirs[k], rtol=1e-4, atol=1e-6) for k in gradient), how


def side(*score: float) -> Side:
    row = torch.tensor(score, dtype=torch.float64)
    return Side(row, torch.zeros_like(row), torch.ones_like(row))


def outcome(name: str, scores: tuple[float, ...], tiers: tuple[int, ...], **numbers: float) -> float:
    """The probability that a list loss gives to an outcome."""
    rankings = lists.Rankings(torch.zeros(len(tiers), dtype=torch.long), torch.tensor(tiers))
    return math.exp(-float(LOSSES[name].function(side(*scores), rankings, **numbers)))


def test_models_of_ties():
    """Win, loss and tie sum to one; equals at theta 1.5 and nu .5 win .4 and tie .2; Davidson is Davidson-Luce for two."""
    for name, number in (("rao-kupper", {"theta": 1.5}), ("davidson", {"nu": 0.5}), ("rao-kupper", {"theta": 3}), ("davidson", {"nu": 2})):
        for scores in ((0.3, 0.3), (1.0, -2.0), (-0.4, 3.0)):
            three = [outcome(name, scores, tiers, **number) for tiers in ((0, 1), (1, 0), (0, 0))]
            assert sum(three) == pytest.approx(1, abs=1e-12)
            if scores[0] == scores[1] and next(iter(number.values())) in (1.5, 0.5):
                assert three == pytest.approx([0.4, 0.4, 0.2], abs=1e-12)
            if name == "davidson":
                luce = [outcome("plackett-luce-davidson", scores, tiers, beta=1.0, **number) for tiers in ((0, 1), (1, 0), (0, 0))]
                assert three == pytest.approx(luce, abs=1e-12)
    assert outcome("rao-kupper", (0.5, -0.2), (0, 1), theta=1 + 1e-12) == pytest.approx(1 / (1 + math.exp(-0.7)))
    p, q, theta = math.exp(0.5), math.exp(-0.2), 1.7
    tie = (theta**2 - 1) * p * q / ((p + theta * q) * (q + theta * p))
    assert outcome("rao-kupper", (0.5, -0.2), (0, 0), theta=theta) == pytest.approx(tie)
    assert outcome("davidson", (0.5, -0.2), (0, 1), nu=0.3) == pytest.approx(p / (p + q + 0.3 * math.sqrt(p * q)))


@pytest.mark.parametrize("name", [n for n in SCALAR if LOSSES[n].start])
def test_the_value_of_equal_scores(name):
    """What the self-check demands, at several shapes of items."""
    loss, zero = LOSSES[name], side(0, 0, 0, 0)
    numbers = {k: 1.0 if k == "beta" else v for k, v in arguments(name).items()}
    if loss.kind == "pairs":
        assert loss.function(zero, zero, **numbers).tolist() == pytest.approx([loss.start(numbers)] * 4)
    elif loss.kind in ("lists", "orders"):
        for tiers in ((0, 1, 2, 3), (0, 0, 1, -1), (0, -1, -1, -1), (0, 0, 0, 0)):
            rankings = lists.Rankings(torch.zeros(4, dtype=torch.long), torch.tensor(tiers))
            if name != "s-dpo" or len(set(tiers)) > 1:
                assert loss.function(zero, rankings, **numbers).item() == pytest.approx(loss.start(numbers, *rankings.shapes()[0]))
    elif loss.kind == "verdicts":
        assert loss.function(zero, torch.tensor([True, False] * 2), torch.zeros(()), **numbers).tolist() == pytest.approx([math.log(2)] * 4)
    else:
        graded = replace(zero, score=torch.tensor([0, 0.2, 0.5, 1.0]))
        assert loss.function(graded, **numbers).tolist() == pytest.approx([math.log(2)] * 4)


def test_only_differences_matter_but_to_centring():
    """A number added to both scores of a pair changes no comparison; centring is least where their sum is zero."""
    good, bad = reward.WORKED["pairs"]
    moved = [replace(s, policy=s.policy + 3) for s in (good, bad)]
    for name in ("bradley-terry", "bradley-terry-margin", "hinge", "robust"):
        args = {"beta": 1.0} if "beta" in arguments(name) else {}
        both = [[replace(s, reference=0 * s.policy) for s in pair] for pair in ((good, bad), moved)]
        torch.testing.assert_close(LOSSES[name].function(*both[0], **args), LOSSES[name].function(*both[1], **args))
    assert reward.centre(*moved).tolist() == [36, 49, 25]


# ---- a run -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return make.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)


@pytest.fixture
def options(base, pairs, tmp_path) -> Reward:
    return Reward(model=str(base), data=[str(pairs)], output=str(tmp_path / "run"), lr=3e-3, epochs=3, batch_size=8, holdout=0.3,
                  report=False, threads=1, eval_every=4)  # fmt: skip


def test_it_learns_and_writes_what_it_says(options, capsys):
    assert stage.run(replace(options, report=True, epochs=4)) == 0
    folder = Path(options.output)
    results, manifest = json.loads((folder / "results.json").read_text()), json.loads((folder / "manifest.json").read_text())
    assert results["after"]["eval/rewards/accuracies"] == 1 and results["after"]["eval/loss"] < 0.3
    assert "eval/displacement" not in results["after"] and "kl_sequence_rb" not in results["after"]
    check = manifest["self_check"]
    assert check["score_error"] < 1e-4 and check["start_loss"] == pytest.approx(math.log(2)) == check["start_expected"]
    facts = json.loads((folder / "model" / "reward.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokens, found = make.tokenizer(), scorer(f"model:{folder}")
    asked, said = ["3 the cat"] * 2, [Response(" thanks the cat"), Response(" no the cat")]
    own = [plain(input_ids=torch.tensor([[256, *tokens(p + r.text, add_special_tokens=False).input_ids, 257]])).logits.item()
           for p, r in zip(asked, said, strict=True)]  # fmt: skip
    assert found(asked, said) == pytest.approx([x - facts["shift"] for x in own], abs=1e-4) and own[0] > own[1]
    assert facts["normalised"] == "mean" and facts["shift"] == facts["reference"]["mean"] and facts["reference"]["responses"] == 56
    told = results["reward"]
    assert told["agreement"] == 1 and told["ceiling"] is None and len(told["by_length"]) == 5 and told["calibration"]["ece"] < 0.3
    assert len(lines(folder / "held_out.jsonl")) == 12
    page = (folder / "report.html").read_text()
    assert "What the reward model knows" in page and 'aria-label="Reliability' in page and "not known" in page
    out = capsys.readouterr().out
    assert "accuracy" in out and "calibration   ECE" in out and f"--reward model:{folder}" in out


def test_scores_of_training_answers_have_mean_zero(options):
    for how, mean, std in (("mean", 0, None), ("std", 0, 1), ("none", None, None)):
        stage.run(replace(options, output=options.output + how, normalise=how, max_steps=2, holdout=0, eval_every=None))
        rows = [json.loads(line) for line in Path(options.data[0]).read_text().splitlines()]
        score = scorer(f"model:{options.output}{how}")
        values = score([r["prompt"] for r in rows for _ in range(2)], [Response(r[k]) for r in rows for k in ("chosen", "rejected")])
        facts = json.loads((Path(options.output + how) / "model" / "reward.json").read_text())
        assert ("shift" in facts, "scale" in facts) == (mean is not None, std is not None)
        assert mean is None or values.mean() == pytest.approx(0, abs=1e-4)
        assert std is None or values.std() == pytest.approx(1, abs=1e-4)


RESUMED: dict[str, dict[str, Any]] = {"a member, accumulated": {"micro_tokens": 60, "member": 2}, "lora": {"lora": 4}}


@pytest.mark.parametrize("extra", RESUMED.values(), ids=RESUMED)
def test_fault_25_resume_is_bitwise(extra, options, tmp_path):
    wanted = replace(options, output=str(tmp_path / "whole"), eval_every=3, save_every=1, keep=99, epochs=2, **extra)
    stage.run(wanted)
    last = checkpoints.latest(tmp_path / "whole").step
    going = replace(wanted, output=str(tmp_path / "cut"))
    for stop in (1, last):
        make.stop_after(stage.run, going, stop)
        going = Reward(resume=str(tmp_path / "cut"))
    stage.run(going)
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/model/reward.json").read_bytes() == (tmp_path / "cut/model/reward.json").read_bytes()


def test_lora_trains_and_saves_the_head(options, base):
    """model/ is the sum; adapter/ holds adapter and head, and plain peft puts them on the base again."""
    from peft import AutoPeftModelForSequenceClassification

    stage.run(replace(options, lora=4, lr=1e-2))
    folder = Path(options.output)
    start = models.with_scalar_head(models.load(str(base))[0], seed=[0, 0])
    merged, _, _ = models.load_reward(str(folder))
    assert not torch.equal(start.score.weight, merged.score.weight)
    trained = json.loads((folder / "manifest.json").read_text())["trained"]
    assert trained["parameters"] < trained["of"] / 2
    beside = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=1).eval()
    row = torch.tensor([[256, 10, 11, 12, 257]])
    with torch.no_grad():
        assert beside(input_ids=row).logits.item() == pytest.approx(merged(input_ids=row).logits.item(), abs=1e-4)
        assert abs(start(input_ids=row).logits.item() - merged(input_ids=row).logits.item()) > 1e-3


def test_the_self_check_sees_a_wrong_readout(options, monkeypatch):
    wrong = selfcheck.scalars
    monkeypatch.setattr(selfcheck, "scalars", lambda model, hidden, batch: wrong(model, hidden, replace(batch, last=batch.last - 1)))
    with pytest.raises(SelfCheckError, match="scores and the model's own forward pass differ"):
        stage.run(options)
    assert not Path(options.output).exists()


# ---- ensembles ---------------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_trained_once_and_goes_on(options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "ensemble"
    wanted = replace(options, output=str(folder), members=3, average=True, epochs=2, eval_every=None)
    real, runs = stage.pipeline.run, []

    def counted(task, asked):
        runs.append(asked.member or asked.resume)
        if len(runs) == 2:
            make.stop_after(lambda o: real(task, o), asked, 4)
            raise make.Stopped
        return real(task, asked)

    monkeypatch.setattr(stage.pipeline, "run", counted)
    with pytest.raises(make.Stopped):
        stage.run(wanted)
    first = (folder / "member-1" / "results.json").stat().st_mtime_ns
    assert stage.run(Reward(resume=str(folder))) == 0
    assert runs == [1, 2, str(folder / "member-2"), 3] and (folder / "member-1" / "results.json").stat().st_mtime_ns == first
    said = json.loads((folder / "ensemble.json").read_text())
    assert said["members"] == ["member-1", "member-2", "member-3"]
    assert set(said["held_out"]) == {"mean", "spread", "average", *said["members"]}
    held = [[row["record"] for row in lines(folder / name / "held_out.jsonl")] for name in said["members"]]
    assert held[0] == held[1] == held[2], "all members are judged on the same prompts"
    assert "average" in capsys.readouterr().out
    stage.run(Reward(resume=str(folder)))
    assert len(runs) == 4, "what is finished is not trained again"
    with pytest.raises(UsageError, match="an ensemble goes on as it began"):
        stage.run(replace(wanted, resume=str(folder), lr=1e-3))
    asked, answers = ["1 the"] * 2, [Response(" thanks"), Response(" no")]
    scores = {how: scorer(f"model:{folder}{how}")(asked, answers) for how in ("@mean", "@min", "@lower", "")}
    assert all(score[0] > score[1] for score in scores.values()) and (scores["@min"] <= scores["@mean"]).all()
    mean, _, _ = models.load_reward(str(folder / "model"))
    each = [models.load_reward(str(folder / name))[0].score.weight for name in said["members"]]
    torch.testing.assert_close(mean.score.weight, torch.stack(each).mean(0))


def test_an_average_of_which_nothing_can_be_told(options, tmp_path, capsys):
    """No held-out pair: the members and their average are written all the same."""
    folder = tmp_path / "ensemble"
    more = {"members": 2, "average": True, "holdout": 0.0, "max_steps": 1, "batch_size": 40, "report": True}
    assert stage.run(replace(options, output=str(folder), **more)) == 0
    assert json.loads((folder / "ensemble.json").read_text())["held_out"] == {} and "\naverage " not in capsys.readouterr().out
    assert len(scorer(f"model:{folder}")(["p"], [Response(" a")])) == 1


def test_a_refused_ensemble_leaves_nothing(options, tmp_path):
    with pytest.raises(PreftuneError):
        stage.run(replace(options, model="./nowhere", members=2))
    assert not Path(options.output).exists()


def test_a_member_draws_prompts_with_replacement(options):
    store = make.store(50, k=3)
    prompts, train = np.arange(50, dtype=np.uint64), np.arange(0, 50, 2)
    same, chosen = stage.resample(store, train, prompts[train], options)
    assert same is store and chosen is train
    drawn = [stage.resample(store, train, prompts[train], replace(options, member=i)) for i in (1, 2, 1)]
    assert np.array_equal(drawn[0][1], drawn[2][1]) and not np.array_equal(drawn[0][1], drawn[1][1])
    for changed, kept in drawn:
        assert set(kept) < set(train) and len(set(kept)) == len(kept)
        times = [changed.list_weight[r] / store.list_weight[r] for r in train]
        assert sum(times) == pytest.approx(len(train)) and max(times) >= 2
        assert all((t > 0) == (r in kept) for t, r in zip(times, train, strict=True))
        row = np.repeat(np.arange(50), np.diff(store.pair_start))
        assert changed.pair_weight[row == train[0]] == pytest.approx(times[0] * store.pair_weight[row == train[0]])
        assert np.array_equal(changed.pair_weight[row % 2 == 1], store.pair_weight[row % 2 == 1]), "held-out records stay"


# ---- targets -----------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GRADED = [{"prompt": f"{i} the", "responses": [{"text": " thanks", "score": 4}, {"text": " no", "score": 1}, {"text": " so"}],
           "judgements": [{"order": [[0], [1]]}], "meta": {"from": "a" if i % 3 else "b"}} for i in range(24)]  # fmt: skip
LABELLED = [{"prompt": f"{i} the", "responses": [" thanks", " no"], "labels": [True, False]} for i in range(24)]


def test_labels_one_by_one(options, tmp_path):
    data = [write(tmp_path / "labels.jsonl", LABELLED)]
    stage.run(replace(options, data=data, target="labels"))
    results = json.loads((Path(options.output) / "results.json").read_text())
    assert results["loss"] == "binary" and results["after"]["eval/labels/accuracies"] == 1
    assert results["reward"]["normalised"] == "none" and results["reward"]["calibration"]["ece"] < 0.3
    value = scorer(f"model:{options.output}")(["3 the"] * 2, [Response(" thanks"), Response(" no")])
    assert value[0] > 0 > value[1]
    with pytest.raises(DataError, match="--target labels: no record has labels"):
        stage.run(replace(options, output=options.output + "2", target="labels"))


def test_scores_of_single_answers(options, tmp_path):
    data = [write(tmp_path / "graded.jsonl", GRADED)]
    many = replace(options, data=data, target="scores", epochs=10, lr=1e-2, eval_every=None)
    with pytest.raises(DataError, match=r"graded.jsonl:1.*a score of 4 is not between 0 and 1; say --loss.low"):
        stage.run(many)
    stage.run(replace(many, loss_arguments={"low": 1.0, "high": 5.0}))
    value = scorer(f"model:{options.output}")(["3 the"] * 2, [Response(" thanks"), Response(" no")])
    assert 1 / (1 + np.exp(-value)) == pytest.approx([0.75, 0], abs=0.15)
    assert json.loads((Path(options.output) / "results.json").read_text())["reward"]["correlation"] > 0.9
    stage.run(replace(many, output=options.output + "2", loss="square"))
    assert scorer(f"model:{options.output}2")(["3 the"] * 2, [Response(" thanks"), Response(" no")]) == pytest.approx([4, 1], abs=0.6)


def test_margins_from_scores_and_a_column_of_the_data(options, tmp_path):
    data = [write(tmp_path / "graded.jsonl", GRADED)]
    stage.run(replace(options, data=data, loss="bradley-terry-margin+0.01*centre", by="from", max_steps=2, holdout=0.5))
    told = json.loads((Path(options.output) / "results.json").read_text())["reward"]
    assert {row["group"] for row in told["by_group"]} == {"a", "b"} and sum(row["pairs"] for row in told["by_group"]) == 12
    with pytest.raises(DataError, match="--by fron: no held-out row has this column"):
        stage.run(replace(options, output=options.output + "3", data=data, by="fron", max_steps=1))
    with pytest.raises(DataError, match=r"pairs.jsonl:1.*a judged response has no score"):
        stage.run(replace(options, output=options.output + "2", loss="bradley-terry-margin"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss": "sigmoid"}, "reads log-probs of a policy; a reward model takes robust, hinge"),
    ({"loss": "binary"}, "learns from labels: --target labels"),
    ({"loss": "hinge", "loss_arguments": {"beta": 0.5}}, "takes no 'beta'; it takes no arguments"),
    ({"loss": "bradley-tery"}, "did you mean 'bradley-terry'"),
    ({"loss": "plackett-luce", "label_smoothing": 0.1}, "has no soft form"),
    ({"loss_arguments": {"margins": 1.0}}, "did you mean '--loss.margin'"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_losses_that_are_refused(change, says, options):
    with pytest.raises(UsageError, match=says):
        scored_terms(replace(options, **change))


def test_beta_is_one_wherever_a_loss_has_one():
    for name in SCALAR:
        target = {"verdicts": "labels", "grades": "scores", "classes": "classes"}.get(LOSSES[name].kind, "preferences")
        ((_, _, numbers),) = scored_terms(Reward(loss=name, target=target))
        assert numbers == arguments(name) | ({"beta": 1.0} if "beta" in numbers else {}), name
    assert len(ONLY) >= 8


def test_a_reward_model_is_no_policy(options):
    stage.run(replace(options, max_steps=1))
    with pytest.raises(ModelError, match="a reward model, which scores answers"):
        stage.run(replace(options, model=options.output, output=options.output + "2"))


# ---- an exact world ----------------------------------------------------------------------------------------------------------


def test_it_comes_near_the_exact_ceiling_of_the_grammar(tmp_path):
    """Eight replies to each of 48 customers with one problem; the true reward gives P(preferred) of every pair, and so the ceiling."""
    tokens, chance = demo.make_tokenizer("en"), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)  # fmt: skip
    models.save(models.prepare(LlamaForCausalLM(config)), tokens, tmp_path / "base")
    prompts = [p for p in grammar.prompts("en") if "not start" in p]
    chance.shuffle(prompts)
    rows, best = [], []
    for prompt in prompts:
        replies = chance.sample(grammar.replies("en", prompt), 8)
        worth = [grammar.reward(reply.features) for reply in replies]
        prob = {(i, j): 1 / (1 + math.exp(worth[j] - worth[i])) for i in range(8) for j in range(i + 1, 8)}
        best.append([max(p, 1 - p) for p in prob.values()])
        rows.append({"prompt": prompt, "responses": [{"text": r.text, "finished": True} for r in replies],
                     "judgements": [{"order": [[i], [j]], "prob": p} for (i, j), p in prob.items()]})  # fmt: skip
    data, held = write(tmp_path / "pairs.jsonl", rows[:40]), write(tmp_path / "held.jsonl", rows[40:])
    stage.run(Reward(model=str(tmp_path / "base"), data=[data], eval_data=[held], output=str(tmp_path / "run"), epochs=6, batch_size=8,
                     threads=1, report=False, eval_every=100))  # fmt: skip
    told = json.loads((tmp_path / "run" / "results.json").read_text())["reward"]
    assert told["ceiling"]["low"] == pytest.approx(np.mean(best[40:]), abs=1e-6) and told["ceiling"]["from"] == "probabilities"
    assert told["ceiling"]["low"] - 0.02 < told["agreement"] <= told["ceiling"]["low"] and told["calibration"]["ece"] < 0.05
    score = scorer(f"model:{tmp_path / 'run'}")
    shown = [Response(r["text"], True) for r in rows[40]["responses"]]
    truth = grammar.scores([rows[40]["prompt"]] * 8, [r.text for r in shown])
    assert np.corrcoef(score([rows[40]["prompt"]] * 8, shown), truth)[0, 1] > 0.95


def test_select_keeps_what_the_target_reads():
    record = Record("p", (Response("a", score=0.5), Response("b")), (Judgement(((0,), (1,))),), labels=(True, None))
    assert stage.select(record, Reward()) is record
    assert stage.select(record, Reward(target="labels")).judgements == ()
    assert stage.select(replace(record, labels=None), Reward(target="labels")) is None
    assert stage.select(replace(record, responses=(Response("a"),)), Reward(target="scores")) is None


# ---- steps and classes -------------------------------------------------------------------------------------------------------

STEPS = [{"prompt": f"{i} the", "completions": [" so the", " thanks" if i % 2 else " no", " a dog"], "labels": [True, *[i % 2 == 1] * 2]}
         for i in range(24)]  # fmt: skip


def test_every_step_is_read_at_its_last_token(tmp_path):
    """One tree of segments gives the loss and gradient of a row for each beginning of the answer, and costs the tokens of one answer."""
    path = tmp_path / "steps.jsonl"
    write(path, STEPS[:4])
    records = read([path]).records
    assert [r.text for r in records[0].responses] == [" so the\n", " so the\n no\n", " so the\n no\n a dog"]
    assert [r.finished for r in records[0].responses] == [False, False, None] and records[1].labels == (True, True, True)
    codec = make_codec(make.tokenizer())
    nested, apart = (build(records, codec, max_length=None, nested=how)[0] for how in (True, False))
    assert nested.parent.tolist()[:4] == [-1, 0, 1, 2] and apart.parent.tolist()[:4] == [-1, 0, 0, 0]
    whole = [len(codec.backend.encode(r.prompt + r.responses[-1].text).ids) + 2 for r in records]
    assert len(nested.tokens) == sum(whole) < len(apart.tokens)
    value, gradient = scored("binary", apart, share=False)
    by_hand = [-math.log(1 / (1 + math.exp(-(r if good else -r)))) for r, good in
               zip(stepwise(records, codec), (good for r in records for good in r.labels), strict=True)]  # fmt: skip
    assert value == pytest.approx(np.mean(by_hand), rel=1e-9) and len(by_hand) == 12
    for store, share, micro in ((nested, True, 10_000), (nested, True, 1), (nested, False, 10_000), (apart, True, 10_000)):
        other, theirs = scored("binary", store, share=share, micro=micro)
        assert other == pytest.approx(value, rel=1e-9)
        assert all(torch.allclose(gradient[k], theirs[k], rtol=1e-4, atol=1e-6) for k in gradient)


def stepwise(records: list[Record], codec: Any) -> list[float]:
    """The scores of every beginning by the class's own forward pass, one row each."""
    net = models.with_scalar_head(models.prepare(make.model()), seed=1).double()
    out = []
    for record in records:
        for response in record.responses:
            ids = [256, *codec.backend.encode(record.prompt + response.text).ids] + ([257] if response.finished is None else [])
            out.append(net(input_ids=torch.tensor([ids]), use_cache=False).logits.item())
    return out


def test_a_model_of_steps(options, tmp_path):
    """Through audit, show and training: a step is bad from the first bad one on, and held-out steps are told apart."""
    data = write(tmp_path / "steps.jsonl", STEPS)
    assert data_stage.checked(DataCheck(data=[data]))["measures"]["labels"] == "72"
    stage.run(replace(options, data=[data], target="labels", epochs=16, eval_every=None))
    told = json.loads((Path(options.output) / "results.json").read_text())
    assert told["after"]["eval/labels/accuracies"] > 0.9 and told["reward"]["labels"] == 3 * 7
    manifest = json.loads((Path(options.output) / "manifest.json").read_text())
    assert manifest["records"]["train"] + manifest["records"]["held_out"] == 24 and manifest["self_check"]["score_error"] < 1e-4
    score = scorer(f"model:{options.output}")
    texts = [" so the\n", " so the\n no\n", " so the\n thanks\n", " so the\n no\n a dog"]
    found = score(["9 the"] * 4, [Response(text, False) for text in texts])
    assert found[0] > 0 > found[1] and found[2] > 0 > found[3]


CLASSED = [{"prompt": f"{i} the", "responses": [" thanks", " no", " so", " a"], "labels": ["right", "wrong", "neutral", None]}
           for i in range(20)]  # fmt: skip
CLASSES = ["wrong", "neutral", "right"]


def test_two_classes_are_good_and_bad():
    """With z = (0, r) the loss is `binary` to the last bit, value and gradient; with K it is the same as K - 1 differences of z."""
    r = torch.tensor([1.3, -0.2, 4.0], dtype=torch.float64, requires_grad=True)
    number = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    z = torch.stack([torch.zeros_like(r), r], 1)
    one = reward.nominal(Side(r, None, torch.ones(3), score=number, classes=z))
    two = reward.binary(Side(r, None, torch.ones(3)), number > 0, torch.zeros(()))
    torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), r, retain_graph=True)[0] for x in (one, two)), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(log_odds(z), r)
    many = torch.randn(5, 4, dtype=torch.float64)
    odds = many.softmax(1)[:, -1] / many.softmax(1)[:, :-1].sum(1)
    torch.testing.assert_close(log_odds(many), odds.log())
    torch.testing.assert_close(log_odds(many + 7), log_odds(many))


def test_classes_without_an_order(options, tmp_path):
    """An output for each class, named in config.json; the score is the log-odds of the last; resume, LoRA and ensembles as ever."""
    data = [write(tmp_path / "classes.jsonl", CLASSED)]
    many = replace(options, data=data, target="classes", classes=CLASSES, epochs=8, lr=1e-2, eval_every=None)
    stage.run(replace(many, report=True))
    results = json.loads((Path(options.output) / "results.json").read_text())
    told = results["reward"]
    assert results["loss"] == "nominal" and told["accuracy"] == 1 and told["classed"] == 18 and told["normalised"] == "none"
    assert {row["group"]: row["pairs"] for row in told["by_group"]} == dict.fromkeys(CLASSES, 6)
    assert results["after"]["eval/classes/accuracies"] == 1 and "The likeliest class" in (Path(options.output) / "report.html").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(Path(options.output) / "model").eval()
    assert plain.config.id2label == dict(enumerate(CLASSES))
    row = [256, *make.tokenizer()("3 the so", add_special_tokens=False).input_ids, 257]
    z = plain(input_ids=torch.tensor([row])).logits[0].detach().double()
    score = scorer(f"model:{options.output}")(["3 the"] * 3, [Response(t) for t in (" so", " thanks", " no")])
    assert z.argmax() == 1 and score[0] == pytest.approx(float(z[2] - z[:2].logsumexp(0)), abs=1e-4) and score[1] > 0 > score[0]
    stage.run(replace(many, output=options.output + "2", lora=4, members=2, max_steps=3))
    assert np.isfinite(scorer(f"model:{options.output}2@min")(["3 the"] * 2, [Response(" so"), Response(" no")])).all()
    for change, says in (({"classes": CLASSES[:2]}, "classes.jsonl:1.*the class 'right' is not among --classes wrong, neutral"),
                         ({"data": options.data}, "no record has classes")):  # fmt: skip
        with pytest.raises(DataError, match=says):
            stage.run(replace(many, output=options.output + "3", **change))
    facts = Path(options.output) / "model" / "reward.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"classes": CLASSES[:2]}))
    with pytest.raises(ModelError, match="3 outputs; expected one linear head with one output for each of the 2 classes"):
        models.load_reward(options.output)
