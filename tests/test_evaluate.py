"""`preftune evaluate`: exact KL values through the real code, numbers that no batch size changes, judges beside each other, a safe page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from test_exact_path import draw_without_cache, t3_store

from preftune import certainty, evaluate, models
from preftune.config import Evaluate, Reward, resolved_yaml
from preftune.errors import DataError, UsageError
from preftune.exact import BOS, LIMIT, T3, TableModel
from preftune.objectives import preference
from preftune.readout import hidden_states, prefix_entropy, response_sums
from preftune.records import Response
from preftune.rewards import scorer
from preftune.stages import evaluate as stage
from preftune.store import from_ids

pytestmark = pytest.mark.usefixtures("private_cache")

# Means and variances of the estimators of KL(pi||ref) on T3: knowledge of enumeration, worked apart from this code.
T3_KL = {"rb": (0.21789061, 0.003786), "k1": (0.2178906, 0.435748), "k3": (0.2178906, 0.074191), "k3_tokens": (0.2178906, 0.007495)}


def free(sequences):
    """T3's sequences without the end that is forced: what is counted as tokens."""
    return [s[:LIMIT] for s in sequences]


@pytest.mark.parametrize("estimator", T3_KL)
def test_estimators_have_the_exact_means_and_variances(estimator):
    found = evaluate.divergences(TableModel.t3_policy(), TableModel.t3_reference(), t3_store(), micro_tokens=10_000)
    weight, (mean, variance) = T3.logps(T3.policy).exp().numpy(), T3_KL[estimator]
    assert (weight * found[estimator]).sum() == pytest.approx(mean, abs=1e-7)
    assert (weight * (found[estimator] - mean) ** 2).sum() == pytest.approx(variance, abs=1e-6)
    names = {"rb": "rao-blackwell", "k3_tokens": "k3 per token"}
    assert found[estimator] == pytest.approx(T3.kl_estimates(T3.policy)[names.get(estimator, estimator)].numpy(), abs=1e-10)


def test_the_other_way_round_and_per_token():
    store = from_ids([[BOS]], [free(T3.sequences)])
    back = evaluate.divergences(TableModel.t3_reference(), TableModel.t3_policy(), store, micro_tokens=10_000)
    weight = T3.logps(T3.reference).exp().numpy()
    for estimator in T3_KL:
        assert (weight * back[estimator]).sum() == pytest.approx(0.21389096, abs=1e-8), estimator
    there = evaluate.divergences(TableModel.t3_policy(), TableModel.t3_reference(), store, micro_tokens=10_000)
    weight, length = T3.logps(T3.policy).exp().numpy(), T3.lengths.numpy()
    assert (weight * there["rb"]).sum() / (weight * length).sum() == pytest.approx(0.09265116, abs=1e-8)
    assert (weight * there["rb"] / length).sum() == pytest.approx(0.10007040, abs=1e-8), "a third number, which is not reported"
    # samples of the reference do not measure KL(pi||ref): k1 of them is -KL(ref||pi)
    assert (T3.logps(T3.reference).exp().numpy() * there["k1"]).sum() == pytest.approx(-0.21389096, abs=1e-8)


def test_entropy_is_the_tables():
    store = t3_store()
    found = evaluate.divergences(TableModel.t3_policy(), TableModel.t3_reference(), store, micro_tokens=10_000)["entropy"]
    log_pi = T3.policy.log_softmax(-1)
    inside = -(log_pi.exp() * log_pi).sum(-1)
    assert found == pytest.approx((T3.visits @ inside).numpy(), abs=1e-12)
    weight = T3.logps(T3.policy).exp()
    assert (weight.numpy() * found).sum() == pytest.approx(-(weight * weight.log()).sum().item(), abs=1e-12), "chain rule"
    assert torch.isfinite(torch.tensor(found)).all()


def test_the_summary_of_drawn_samples_covers_the_truth():
    """2,000 draws of T3 by the sampler's own draw: every estimate within four of the errors it states, and errors as T3 says."""
    drawn = draw_without_cache(TableModel.t3_policy(), 2000)
    store = from_ids([[BOS]], [free(drawn)])
    found = evaluate.divergences(TableModel.t3_policy(), TableModel.t3_reference(), store, micro_tokens=10_000)
    length = np.array([len(s) for s in free(drawn)], float)
    out = evaluate.kl_summary(found, length, np.arange(2000))
    for estimator, (mean, variance) in T3_KL.items():
        assert abs(out[f"kl_sequence_{estimator}"] - mean) < 4 * out[f"kl_sequence_{estimator}_se"]
        assert out[f"kl_sequence_{estimator}_se"] == pytest.approx((variance / 2000) ** 0.5, rel=0.15)
        assert abs(out[f"kl_token_{estimator}"] - 0.09265116) < 4 * out[f"kl_token_{estimator}_se"]
    assert out["kl_sequence_rb_se"] < out["kl_sequence_k3_tokens_se"] < out["kl_sequence_k3_se"] < out["kl_sequence_k1_se"]


def test_the_summary_of_a_run_is_that_of_the_verb():
    """Means and ratios of means with errors over prompts, by the functions that `evaluate` has for them."""
    rng = np.random.default_rng(0)
    length, kl, entropy = rng.integers(1, 9, (30, 3)).astype(float), rng.random((30, 3)), rng.random((30, 3))
    drawn = evaluate.Drawn([], [], length > 2, length, kl, kl, -kl, None, entropy, 0 * kl)
    found, cluster = evaluate.summary(drawn), np.repeat(np.arange(30), 3)
    for name, values in (("kl_sequence_rb", kl), ("kl_sequence_k1", -kl), ("sample_length", length), ("reward", kl)):
        assert (found[name], found[f"{name}_se"]) == pytest.approx(certainty.mean_of(values.ravel(), cluster))
    for name, sums in (("kl_token_rb", kl), ("entropy_token", entropy)):
        assert (found[name], found[f"{name}_se"]) == pytest.approx(certainty.ratio_of(sums.ravel(), length.ravel(), cluster))
    gap = evaluate.paired_difference(kl, kl + 1 + entropy)
    assert gap["difference"] == pytest.approx(1 + entropy.mean()) and gap["low"] > 1.3


def test_one_answer_a_prompt_is_the_unit():
    found = {name: np.array([1.0, 3.0, 2.0, 2.0]) for name in evaluate.KL}
    out = evaluate.kl_summary(found, np.full(4, 2.0), np.array([0, 0, 1, 1]))
    assert out["kl_sequence_rb"] == 2 and out["kl_sequence_rb_se"] == 0 and out["kl_token_k1"] == 1


# ---- a set is one set --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "ld-dpo", "simpo"])
def test_any_cut_gives_the_same_numbers(loss):
    store = make.store(12)
    model = make.model().double()
    columns = {"reference": np.random.default_rng(0).normal(-3, 1, len(store.tokens)).astype(np.float32)}
    objective = preference([(1.0, loss, {})])
    found = [evaluate.held_out(model, objective, store, range(12), columns, micro_tokens=n) for n in (1, 60, 150, 10_000)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9, abs=1e-12)
    assert found[0]["pairs"] == 12


def test_any_cut_gives_the_same_divergences():
    policy, frozen = make.model().double(), make.model(seed=1).double()
    rng = np.random.default_rng(0)
    store = from_ids([[1, 2, 3], [4, 5]], [[rng.integers(5, 200, n).tolist() for n in (3, 7, 1)], [[9, 9], [7] * 12]])
    found = [evaluate.divergences(policy, frozen, store, micro_tokens=n) for n in (1, 10_000)]
    for name in found[0]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-9, abs=1e-12)


def test_entropy_reads_the_models_own_logits():
    model, store = make.model().double(), from_ids([[1, 2, 3]], [[[7, 8, 9]]])
    from preftune.batches import make_batch

    batch = make_batch(store, [0], share=False)
    with torch.no_grad():
        found = response_sums(prefix_entropy(model, hidden_states(model, batch), batch), batch)
        logp = model(input_ids=torch.tensor([[1, 2, 3, 7, 8, 9]])).logits[0, 2:5].log_softmax(-1)
    assert float(found) == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-9)


def test_repetition():
    assert evaluate.repeated([1, 2, 3]) == 0 and evaluate.repeated([7] * 10) == pytest.approx(6 / 7)
    assert evaluate.distinct([[1, 2], [1, 2]], 2) == 0.5 and evaluate.distinct([[1]], 2) == 0


# ---- the verb ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make.write_model(folder / "model")
    make.write_model(folder / "base", seed=1)
    make.write_pairs(folder / "pairs.jsonl", 24)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"subset": "odd" if i % 2 else "<b>even</b>", "id": i}
        if i % 2:  # out of distribution: the other one is better
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text("def thanks(prompt, response):\n    return float('thanks' in response)\n")
    return folder


def options(place, **given):
    words = {"model": str(place / "model"), "reference": str(place / "base"), "data": [str(place / "pairs.jsonl")], "sample_prompts": 0,
             "threads": 1}  # fmt: skip
    return Evaluate(**(words | given))


def test_every_part_is_there_and_is_json(place, tmp_path, capsys):
    out = {"output": str(tmp_path / "o.json"), "page": str(tmp_path / "o.html")}
    data = [str(place / "pairs.jsonl"), str(place / "bench.jsonl")]
    reward = [f"python:{place}/rule.py:thanks"]
    found = options(place, data=data, implicit=True, reward=reward, sample_prompts=5, k=2, sample_tokens=8, **out)
    assert stage.run(found) == 0
    facts = json.loads(Path(out["output"]).read_text())
    first, second = facts["files"]
    assert first["metrics"]["pairs"] == 24 and first["subsets"] == {}
    rule, longer = [row for row in first["judges"] if row["judge"] != "implicit"]
    assert rule["accuracy"] == pytest.approx(1.0, abs=0.05) and longer["judge"] == stage.LONGER
    assert second["judges"][1]["accuracy"] == pytest.approx(0.5, abs=0.1), "half of them are the other way round"
    assert second["subsets"]["odd"]["accuracy"] == pytest.approx(1 - first["metrics"]["rewards/accuracies"], abs=0.35)
    wins = facts["rewardbench"]["extra_results"]
    assert set(wins) == {"odd", "<b>even</b>"} and facts["rewardbench"]["num_prompts"] == 24
    mean = sum(row["strict"] * row["pairs"] for row in second["subsets"].values()) / 24
    assert facts["rewardbench"]["accuracy"] == pytest.approx(mean)
    samples = first["samples"]
    assert samples["sampled_prompts"] == 5 and samples["kl_sequence_rb"] > 0 and samples["kl_from_reference_sequence_rb"] > 0
    assert abs(samples["kl_sequence_rb"] - samples["kl_sequence_k1"]) < 6 * samples["kl_sequence_k1_se"]
    assert 0 < samples["entropy_token"] < 5.6 and samples["sample_length"] <= 8
    page = Path(out["page"]).read_text()
    assert "<b>even</b>" not in page and "&lt;b&gt;even" in page and not re.search(r"<script|https?://", page)
    shown = capsys.readouterr()
    assert "accuracy" in shown.out and "longer answer" in shown.out and "written" in shown.err
    with pytest.raises(UsageError, match="exists already"):
        stage.run(options(place, **out))


def test_a_reward_model_on_rewardbench(place, tmp_path):
    """Per subset with intervals, what its own scores say; the fields of the benchmark; nothing is sampled, nothing read another way."""
    net = models.with_scalar_head(models.prepare(make.model()), seed=1)
    models.save(net, make.tokenizer(), tmp_path / "judge")
    bench, spec = str(place / "bench.jsonl"), f"model:{tmp_path / 'judge'}"
    facts = stage.evaluated(options(place, model=str(tmp_path / "judge"), reference=None, data=[bench], reward=[spec]))
    (file,) = facts["files"]
    rows = [json.loads(line) for line in Path(bench).read_text().splitlines()]
    score = scorer(spec)
    good, bad = (score([r["prompt"] for r in rows], [Response(r[side]) for r in rows]) for side in ("chosen", "rejected"))
    assert file["metrics"]["rewards/margins"] == pytest.approx((good - bad).mean(), abs=1e-5) and "samples" not in file
    assert file["metrics"]["loss"] == pytest.approx(np.log1p(np.exp(bad - good)).mean(), abs=1e-5)
    for name, mine in (("odd", slice(1, None, 2)), ("<b>even</b>", slice(0, None, 2))):
        share = float((good > bad)[mine].mean())
        found = file["subsets"][name]
        assert found["accuracy"] == share == facts["rewardbench"]["extra_results"][name] and found["low"] < share < found["high"]
        assert file["judges"][0]["subsets"][name] == found, "the same model as a reward beside it"
    assert facts["rewardbench"]["accuracy"] == pytest.approx((good > bad).mean()) and facts["rewardbench"]["ref_model"] is None
    for change in ({"reference": str(place / "base")}, {"implicit": True}, {"loss": "simpo"}, {"beta": 0.3}, {"template": "plain"}):
        with pytest.raises(UsageError, match=f"--{next(iter(change))} has no effect: .* is a reward model"):
            stage.evaluated(options(place, **{"model": str(tmp_path / "judge"), "reference": None} | change))


def test_a_reward_model_of_labels_is_evaluated_on_labels(place, tmp_path, capsys):
    """The loss of its run; the share on the right side of 0 and its calibration, clustered by prompt; one of classes says where to look."""
    net = models.with_scalar_head(models.prepare(make.model()), seed=1)
    models.save(net, make.tokenizer(), tmp_path / "run" / "model")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(resolved_yaml(Reward(target="labels")))
    rows = [{"prompt": f"{i} the", "completions": [" so", " thanks", " no"], "labels": [True, i % 2 == 0, None]} for i in range(12)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = options(place, model=str(tmp_path / "run"), reference=None, data=[str(tmp_path / "steps.jsonl")])
    (file,) = stage.evaluated(words)["files"]
    said = scorer(f"model:{tmp_path / 'run'}")([r["prompt"] for r in rows for _ in range(2)],
                                               [Response(t, False) for r in rows for t in (" so\n", " so\n thanks\n")])  # fmt: skip
    good = np.array([label for r in rows for label in r["labels"][:2]])
    assert file["labels"]["labels"] == 24 and file["labels"]["accuracy"] == pytest.approx(((said > 0) == good).mean())
    assert file["metrics"]["loss"] == pytest.approx(np.log1p(np.exp(np.where(good, -said, said))).mean(), abs=1e-5)
    sure = certainty.calibration(said, good.astype(float), np.repeat(np.arange(12), 2))
    assert (file["calibration"]["ece"], file["calibration"]["slope"]) == pytest.approx((sure.ece, sure.slope), abs=1e-4)
    stage.run(words)
    assert "label accuracy" in capsys.readouterr().out
    config.write_text(resolved_yaml(Reward(target="classes", classes=["bad", "good"])))
    with pytest.raises(UsageError, match="a model of classes; how often the likeliest is right stands in its run's results.json"):
        stage.evaluated(words)


def test_the_accuracy_is_that_of_training(place):
    """The same pairs as a run's own evaluation: held_out on the same column."""
    facts = stage.evaluated(options(place, beta=0.3))
    assert facts["beta"] == 0.3 and facts["files"][0]["metrics"]["rewards/margins"] == pytest.approx(
        3 * stage.evaluated(options(place, beta=0.1))["files"][0]["metrics"]["rewards/margins"])  # fmt: skip
    metrics = facts["files"][0]["metrics"]
    assert metrics["rewards/chosen"] - metrics["rewards/rejected"] == pytest.approx(metrics["rewards/margins"])
    assert metrics["accuracy_low"] < metrics["rewards/accuracies"] < metrics["accuracy_high"]
    assert metrics["accuracy_bootstrap_low"] < metrics["rewards/accuracies"] < metrics["accuracy_bootstrap_high"]


def test_a_model_against_itself_has_moved_nowhere(place):
    facts = stage.evaluated(options(place, reference=str(place / "model"), sample_prompts=3, sample_tokens=6))
    file = facts["files"][0]
    assert file["metrics"]["rewards/accuracies"] == 0.5 or abs(file["metrics"]["rewards/margins"]) < 1e-5
    assert abs(file["metrics"]["displacement"]) < 1e-4 and abs(file["samples"]["kl_sequence_rb"]) < 1e-4
    assert file["calibration"]["slope"] is None or abs(file["metrics"]["loss"] - 0.6931) < 1e-3


def test_a_loss_without_a_reference_needs_none_and_one_with_it_says_so(place):
    facts = stage.evaluated(options(place, reference=None, loss="simpo"))
    assert "displacement" not in facts["files"][0]["metrics"] and facts["reference"] is None
    with pytest.raises(UsageError, match="the loss sigmoid needs --reference MODEL"):
        stage.evaluated(options(place, reference=None))
    with pytest.raises(UsageError, match="--implicit needs --reference MODEL"):
        stage.evaluated(options(place, reference=None, loss="simpo", implicit=True))
    with pytest.raises(DataError, match=r"no record that the loss kto can read \(verdicts\)"):
        unjudged = place / "unjudged.jsonl"
        unjudged.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}) + "\n")
        stage.evaluated(options(place, loss="kto", data=[str(unjudged)]))


def test_a_run_folder_says_what_it_was_trained_with(place, tmp_path, capsys):
    from preftune.config import Dpo
    from preftune.stages import dpo

    folder = tmp_path / "run"
    words = {"model": str(place / "base"), "data": [str(place / "pairs.jsonl")], "output": str(folder), "beta": 0.7, "max_steps": 2,
             "eval_prompts": 0, "report": False, "batch_size": 8, "threads": 1, "loss": "sigmoid+0.1*nll"}  # fmt: skip
    assert dpo.run(Dpo(**words)) == 0
    capsys.readouterr()
    facts = stage.evaluated(options(place, model=str(folder), reference=None))
    assert facts["reference"] == str(place / "base") and facts["loss"] == "sigmoid+0.1*nll" and facts["beta"] == 0.7
    assert f"{folder} says: " in capsys.readouterr().err
    assert stage.evaluated(options(place, model=str(folder), reference=None, beta=0.2))["beta"] == 0.2
