"""`ppo` and `online` end to end: rounds, ratio 1 at the first step of each, resume to the bit, and named ends when it goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from test_dpo import lines, same_run
from transformers import AutoModelForCausalLM

from preftune import checkpoints, engine, grammar, models, pipeline, rollouts, sampling
from preftune.batches import make_batch, make_step
from preftune.config import OnlineDpo, Ppo
from preftune.errors import DataError, NumericsError, UsageError
from preftune.exact import BOS, T3, TableModel
from preftune.readout import hidden_states, scalars, token_scalars
from preftune.stages import demo, online, ppo
from preftune.store import from_ids

pytestmark = pytest.mark.usefixtures("private_cache")

REWARDS = '''
def thanks(prompt, text):
    return text.count("a") - 0.1 * len(text)

def same(prompt, text):
    return 1.5

def nan(prompt, text):
    return float("nan")
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make.write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    words = make.WORDS
    (folder / "prompts.txt").write_text("".join(f"{i} {words[i % 15]} {words[i % 7]}\n" for i in range(25)))
    tuner = models.with_scalar_head(models.prepare(make.model(seed=3)), seed=1)
    models.save(tuner, make.tokenizer(), folder / "tuner")
    (folder / "tuner" / models.REWARD).write_text(json.dumps({"shift": 0.4, "scale": 1.6}))
    return folder


def common(world: Path, output: Path, reward: str = "thanks") -> dict:
    return {"model": str(world / "model"), "data": [str(world / "prompts.txt")], "reward": f"python:{world / 'rewards.py'}:{reward}",
            "output": str(output), "lr": 3e-3, "epochs": 1, "batch_size": 4, "rollout_prompts": 8, "sample_tokens": 8, "eval_prompts": 3,
            "eval_every": 100, "holdout": 0.2, "report": False, "threads": 1, "keep": 99}  # fmt: skip


PPO = {
    "gae": {"k": 2, "kl_target": 1.0, "kl_horizon": 20, "normalise_rewards": True},
    "copy": {"value": "copy", "micro_tokens": 40},
    "reward": {"value": "reward", "reward": "model:TUNER", "importance_cap": 1.0},
    "rloo": {"advantage": "rloo", "k": 2, "passes": 2, "temperature": 0.8},
    "group": {"advantage": "group", "k": 3, "passes": 2, "eos_penalty": 1.0},
    "lora": {"lora": 4, "passes": 2},
}
ONLINE = {
    "dpo": {},
    "moving": {"reference_update": "hard", "reference_every": 2, "k": 3, "pairs": "random", "passes": 2},
    "xpo": {"k": 1, "loss": "ipo-sum+0.01*optimism", "rollout_prompts": 4},
}


def test_rounds_hand_out_every_prompt_once_a_pass():
    rounds = rollouts.Rounds(records=22, size=8, batch_size=3, passes=2, epochs=1.5, seed=3)
    assert rounds.per_epoch == 2 * 3 + 2 * 3 + 2 * 2 and rounds.steps == 24
    seen = [rounds.place(step) for step in range(rounds.per_epoch)]
    assert [number for number, inner in seen if inner == 0] == [0, 1, 2]
    for number, size in ((0, 8), (1, 8), (2, 6)):
        inner = [i for n, i in seen if n == number]
        assert inner == list(range(2 * -(-size // 3)))
        for turn in range(2):
            mine = [rounds.members(number, i) for i in inner[turn * len(inner) // 2 : (turn + 1) * len(inner) // 2]]
            assert sorted(np.concatenate(mine)) == list(range(size)) and max(map(len, mine)) == 3
    orders = [[tuple(np.concatenate([rounds.members(n, 3 * turn + i) for i in range(3)])) for turn in (0, 1)] for n in (0, 1)]
    assert len({order for both in orders for order in both}) == 4, "each pass over each round has an order of its own"
    steps = range(0, rounds.per_epoch)
    first_pass = [rounds.records_of(s) for s in steps if rounds.place(s)[1] < -(-len(rounds.prompts_of(rounds.place(s)[0])) // 3)]
    assert sorted(np.concatenate(first_pass)) == list(range(22)), "an epoch is every prompt once"
    assert rounds.place(rounds.per_epoch) == (3, 0)
    assert not np.array_equal(rounds.prompts_of(3), rounds.prompts_of(0)), "the next epoch has an order of its own"


@pytest.mark.parametrize("name", PPO)
def test_ppo_begins_at_ratio_1_and_resumes_to_the_bit(name, world, tmp_path):
    per_round = 2 * PPO[name].get("passes", 4)
    options = Ppo(**common(world, tmp_path / "whole") | {"save_every": per_round + 1, "max_steps": 2 * per_round} | PPO[name])
    options = replace(options, reward=str(options.reward).replace("TUNER", str(world / "tuner")))
    assert ppo.run(options) == 0
    rows = [row for row in lines(tmp_path / "whole" / "metrics.jsonl") if "loss" in row]
    firsts = [row for row in rows if "objective/scores" in row]
    assert [row["step"] for row in firsts] == [1, 1 + per_round]
    for row in firsts:
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6) and row["policy/approxkl_avg"] < 1e-10
        assert row["sampler/gap_max"] < 1e-5 and row["sampler/weight"] == pytest.approx(1, abs=1e-4)
    assert firsts[0]["objective/kl"] == pytest.approx(0, abs=1e-6) and abs(firsts[1]["objective/kl"]) > 1e-4
    assert any(row["val/ratio"] != 1 for row in rows)
    assert rows[-1]["step"] == len(rows)
    half = replace(options, output=str(tmp_path / "half"))
    make.stop_after(ppo.run, half, per_round + 1)  # inside the second round
    saved = checkpoints.at(tmp_path / "half", per_round + 1)
    assert saved.tensors("rollouts")["ids"].numel()
    assert any("value" in key for key in saved.tensors("weights")) == (PPO[name].get("advantage", "gae") == "gae")
    assert ppo.run(Ppo(resume=str(tmp_path / "half"))) == 0
    same_run(tmp_path / "whole", tmp_path / "half")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")  # without a value model
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in make.model().named_parameters()}


def test_the_value_model_begins_as_the_reward_model(world, tmp_path):
    """At every prefix of the first round what the reward model's own head says there, normalised as its scores are; then it learns."""
    spec = f"model:{world / 'tuner'}"
    options = Ppo(**common(world, tmp_path / "run") | {"reward": spec, "value": "reward", "k": 2})
    setup = pipeline.prepare(ppo.TASK, options)
    learner = setup.learner
    prompts = [setup.store.tokens[setup.store.start[s] : setup.store.start[s + 1]].tolist() for s in setup.store.record_start[:3]]
    store = from_ids(prompts, [[[5, 6, 7, 257], [8, 9]], [[10, 11], [12]], [[13, 14], [15, 16, 257]]])
    batch = make_batch(store, range(3))
    tuner, _, facts = models.load_reward(str(world / "tuner"))
    with torch.no_grad():
        own = token_scalars(tuner, hidden_states(tuner, batch), batch)
        found = rollouts.values_of(learner.value, hidden_states(learner.policy, batch), batch)
        last = scalars(tuner, hidden_states(tuner, batch), batch)
    assert found.numpy() == pytest.approx(((own - facts["shift"]) / facts["scale"]).numpy(), abs=1e-5) and found.std() > 0.1
    whole = setup.reward.rollouts(store, setup.codec, [setup.texts(r) for r in range(3)])
    assert whole == pytest.approx(((last - facts["shift"]) / facts["scale"]).numpy(), abs=1e-5), "in the unit of the reward"
    trained = {name for name, _ in learner.value.named_parameters() if not name.startswith("head")}
    assert trained and all(p.requires_grad for p in learner.parameters())
    assert learner.value.decoder.embed_tokens.weight.data_ptr() != setup.reward.members[0].model.model.embed_tokens.weight.data_ptr()
    assert setup.manifest["memory"]["held"] > 2.5 * 4 * models.parameters_of(setup.model), "policy, reference and value model"


def test_a_reward_that_no_value_model_can_begin_as_is_refused(world, tmp_path):
    options = Ppo(**common(world, tmp_path / "run") | {"value": "reward"})
    tuner, other = world / "tuner", tmp_path / "other"
    shutil.copytree(tuner, other)
    make.tokenizer(bos=False).save_pretrained(other)
    (tmp_path / "several").mkdir()
    for name in ("member-1", "member-2"):
        shutil.copytree(tuner, tmp_path / "several" / name)
    (tmp_path / "several" / "ensemble.json").write_text(json.dumps({"members": ["member-1", "member-2"]}))
    refused = {options.reward: "is no reward model", f"model:{tmp_path / 'several'}@mean": "ensemble of 2, .*name a member",
               f"model:{other}": "does not read the policy's ids"}  # fmt: skip
    for spec, says in refused.items():
        with pytest.raises(UsageError, match=f"--value reward: .*{says}.*--value head or copy"):
            ppo.run(replace(options, reward=spec))
    with pytest.raises(UsageError, match="has an output for each class, and a value is one number"):
        models.save(models.with_scalar_head(models.prepare(make.model()), seed=0, classes=("bad", "good")), make.tokenizer(), other)
        (other / "reward.json").write_text(json.dumps({"classes": ["bad", "good"]}))
        ppo.run(replace(options, reward=f"model:{other}"))
    with pytest.raises(UsageError, match="has 16 positions, and a prompt with its answer may have"):
        (other / "reward.json").unlink()
        narrow = models.with_scalar_head(models.prepare(make.model(max_position_embeddings=16)), seed=0)
        models.save(narrow, make.tokenizer(), other)
        ppo.run(replace(options, reward=f"model:{other}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ONLINE)
def test_online_resumes_to_the_bit(name, world, tmp_path):
    options = OnlineDpo(**common(world, tmp_path / "whole") | {"save_every": 3} | ONLINE[name])
    assert online.run(options) == 0
    rows = [row for row in lines(tmp_path / "whole" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and rows[0]["objective/scores_margin"] > 0
    assert rows[-1]["rewards/margins"] != 0 and ("loss/optimism" in rows[0]) == (name == "xpo")
    evaluations = [row for row in lines(tmp_path / "whole" / "metrics.jsonl") if "kl_sequence_rb" in row]
    assert evaluations[0]["kl_sequence_rb"] == 0 and evaluations[-1]["kl_sequence_rb"] > 0, "to the initial reference"
    half = replace(options, output=str(tmp_path / "half"))
    make.stop_after(online.run, half, 3)
    assert online.run(OnlineDpo(resume=str(tmp_path / "half"))) == 0
    same_run(tmp_path / "whole", tmp_path / "half")


def test_pairs_of_scores():
    scores = np.array([[1.0, 3, 2], [5, 5, 5], [2, 0, 2]])
    pair, margin = rollouts.pairs_of(scores, best_worst=True, seed=[0])
    assert pair.tolist() == [[1, 0], [-1, -1], [0, 1]] and margin.tolist() == [2, 0, 2]
    many = np.tile(scores[:1], (600, 1))
    pair, margin = rollouts.pairs_of(many, best_worst=False, seed=[1])
    found, count = np.unique(pair, axis=0, return_counts=True)
    assert found.tolist() == [[1, 0], [1, 2], [2, 0]] and count.min() > 150, "each two alike often, the better first"
    assert (np.take_along_axis(many, pair, 1) @ [1, -1] == margin).all()


# ---- generation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt2", "bloom"])
def test_samples_do_not_depend_on_what_is_computed_together(kind):
    """One prompt for its k rows, rows that leave, padding: the tokens of a row alone; their log-probs to 1e-4."""
    model = models.prepare(make.model(kind))
    prompts = [list(range(3, 3 + n)) for n in (5, 9, 20, 9)]
    how = {"ends": [tuple(range(0, 250, 9))] * 4, "k": 3, "max_tokens": 12, "seed": 1, "temperature": 0.9}
    alone, together = (sampling.sample(model, prompts, **how, rows_at_once=n) for n in (1, 64))
    lengths = {len(s.ids) for row in alone for s in row}
    assert len(lengths) > 3, "rows ended at different times"
    for row, other in zip(alone, together, strict=True):
        for one, two in zip(row, other, strict=True):
            assert one.ids == two.ids and one.finished == two.finished
            assert one.logps == pytest.approx(two.logps, abs=1e-4)


def test_a_prompt_is_computed_once_and_ended_rows_leave(monkeypatch):
    model = models.prepare(make.model())
    sizes, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **more: sizes.append(tuple(input_ids.shape)) or
                        forward(self, input_ids=input_ids, **more))  # fmt: skip
    found = sampling.sample(model, [[3, 4, 5], [6, 7]], ends=[tuple(range(0, 250, 5))] * 2, k=8, max_tokens=10, seed=0)
    alive = [sum(len(s.ids) > t for row in found for s in row) for t in range(1, 10)]
    assert sizes[0] == (2, 3) and sizes[1][0] <= 16 and all(width == 1 for _, width in sizes[1:])
    assert all(rows <= max(1, alive_before / sampling.SHRINK) for (rows, _), alive_before in zip(sizes[1:], alive, strict=False))


# ---- when it goes wrong ------------------------------------------------------------------------------------------------------


def test_a_constant_reward_is_named_and_harmless(world, tmp_path, capsys):
    for name in ("gae", "group"):
        options = Ppo(**common(world, tmp_path / name, "same") | {"advantage": name, "max_steps": 3, "beta": 0.0, "k": 2})
        assert ppo.run(options) == 0
        found = json.loads((tmp_path / name / "results.json").read_text())["round_alarms"]
        assert found[0]["alarm"].startswith("constant-reward: every answer") and found[0]["step"] == 1
        assert "every answer of the round has the reward 1.5" in capsys.readouterr().err
    assert all(np.isfinite(row["loss"]) for row in lines(tmp_path / "group" / "metrics.jsonl") if "loss" in row)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (world / "model", tmp_path / "group" / "model"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)), "nothing to learn, nothing moved"


def test_a_reward_that_is_no_number_stops_with_its_prompt(world, tmp_path):
    with pytest.raises(NumericsError, match="returned nan at prompt"):
        ppo.run(Ppo(**common(world, tmp_path / "run", "nan") | {"eval_prompts": 0}))
    assert checkpoints.latest(tmp_path / "run").step == 0, "what was saved stands"


def test_an_exploding_ratio_stops_before_the_step():
    policy = TableModel.t3_policy()
    learner, store = rollouts.Learner(policy, None), from_ids([[BOS]], [T3.sequences])
    source = rollouts.Source(policy, None, TableModel.t3_reference(), **dict.fromkeys(("codec", "store", "texts", "scores")), k=1,
                             max_tokens=4, temperature=1.0, eos_penalty=0.0, seed=0, micro_tokens=99, device="cpu")  # fmt: skip
    columns, _ = rollouts.credit(rollouts.Credit("gae"), source, rollouts.Kept(), store, T3.reward.numpy())
    state = engine.make_state(learner, rate=lambda step: 1.0, clip=0.0)
    columns["old"] -= 3.0 * store.trained  # as if the policy had been somewhere else when it sampled
    before = policy.lm_head.weight.detach().clone()
    with pytest.raises(NumericsError, match=r"ratio to the policy that sampled exploded: 20.1 on average.*was not taken.*smaller --lr"):
        list(engine.train(state, [make_step(store, [0], micro_tokens=99, columns=columns)], rollouts.Surrogate("ppo")))
    assert torch.equal(before, policy.lm_head.weight) and state.step == 0 and not state.optimizer.state


def test_a_value_that_is_no_number_is_named(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "values_of", lambda value, hidden, batch: torch.full((len(batch.target),), float("nan")))
    with pytest.raises(NumericsError, match="the value of an answer is nan"):
        ppo.run(Ppo(**common(world, tmp_path / "run")))


def test_prompts_are_read_from_anything_and_refusals_are_told(world, tmp_path):
    pairs = make.write_pairs(tmp_path / "pairs.jsonl", 12)
    options = Ppo(**common(world, tmp_path / "run") | {"data": [str(pairs)], "max_steps": 1})
    assert ppo.run(options) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["records"]["train"] == 10 and manifest["records"]["held_out"] == 2 and manifest["loss"] == "ppo"
    twice = tmp_path / "twice.txt"
    twice.write_text("a\nb\na\n\nc\n")
    assert ppo.run(replace(options, data=[str(twice)], output=str(tmp_path / "merged"), batch_size=2)) == 0
    records = json.loads((tmp_path / "merged" / "manifest.json").read_text())["records"]
    assert (records["read"], records["merged"], records["kept"]) == (4, 1, 3)
    with pytest.raises(UsageError, match="leaves no room for a prompt"):
        ppo.run(replace(options, output=str(tmp_path / "long"), sample_tokens=128))
    with pytest.raises(DataError, match="empty"):
        (tmp_path / "none.txt").write_text("")
        ppo.run(replace(options, output=str(tmp_path / "empty"), data=[str(tmp_path / "none.txt")]))
    with pytest.raises(UsageError, match="online takes losses over pairs"):
        online.run(OnlineDpo(**common(world, tmp_path / "kto") | {"loss": "kto"}))
    with pytest.raises(UsageError, match="needs --temperature 1"):
        online.run(OnlineDpo(**common(world, tmp_path / "kto") | {"loss": "sigmoid+0.1*optimism", "temperature": 0.5}))


# ---- it learns ---------------------------------------------------------------------------------------------------------------


def test_it_learns_the_grammars_true_reward(tmp_path):
    """A short-trained model of the demo's world: the hidden reward of its answers to customers it never met rises, whatever the method."""
    recipe = demo.Recipe(width=32, inner=64, sft_steps=160)
    asked = [p for p in grammar.prompts("en") if "phone" in p and ("frozen" in p or "too hot" in p)]
    train, held = [p for p in asked if "Excuse me" not in p], [p for p in asked if "Excuse me" in p]
    model, codec = demo._base(recipe, "en", train, 0)
    models.save(model, codec.tokenizer, tmp_path / "base")
    (tmp_path / "judge.py").write_text(demo.JUDGE)
    for name, prompts in (("train", train), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    options = {"model": str(tmp_path / "base"), "data": [str(tmp_path / "train.jsonl")], "eval_data": [str(tmp_path / "held.jsonl")],
               "reward": f"python:{tmp_path / 'judge.py'}:judge", "lr": 3e-3, "batch_size": 10, "sample_tokens": 32, "eval_samples": 32,
               "eval_every": 100, "beta": 0.1, "report": False, "threads": 1}  # fmt: skip
    verbs = {"ppo": (ppo, Ppo(**options, output=str(tmp_path / "ppo"), passes=2, epochs=6, k=8)),
             "rloo": (ppo, Ppo(**options, output=str(tmp_path / "rloo"), passes=1, epochs=8, k=8, advantage="rloo")),
             "online": (online, OnlineDpo(**options, output=str(tmp_path / "online"), epochs=8, k=8))}  # fmt: skip
    for name, (verb, chosen) in verbs.items():
        assert verb.run(chosen) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        rewards = [results[when]["reward"] for when in ("before", "after")]
        assert rewards[1] > rewards[0] + 0.15 and 0 < results["after"]["kl_sequence_rb"] < 10, (name, rewards)
