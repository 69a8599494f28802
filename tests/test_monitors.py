"""The gate and the alarms: estimators against other routes and by simulation; planted and healthy courses; through real runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from scipy import stats
from test_dpo import same_run

from preftune import config, monitors
from preftune.config import Dpo, OnlineDpo, Ppo, Reward, Sft, build
from preftune.errors import UsageError
from preftune.monitors import Gate, alarms, interval, judge, note, per_token, trend
from preftune.report import findings
from preftune.stages import dpo, online, ppo, reward, sft

pytestmark = pytest.mark.usefixtures("private_cache")
GATE = Gate(6, 0.05)


# --- estimators ----------------------------------------------------------------------------------------------------------------


def test_the_trend_is_least_squares_with_clusters_of_prompts():
    """Against regression on stacked rows with the cluster sandwich, written out with matrices; steps not evenly spaced."""
    rng = np.random.default_rng(0)
    steps, n = np.array([10, 20, 30, 45, 50]), 40
    values = rng.normal(size=(1, n)) + rng.normal(size=(5, n)).cumsum(0) + 0.01 * steps[:, None]
    design = np.stack([np.ones(5 * n), np.repeat(steps, n)], axis=1)
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ values.ravel()
    left = values.ravel() - design @ beta
    scores = np.stack([(design * left[:, None])[np.tile(np.arange(n), 5) == i].sum(0) for i in range(n)])
    error = math.sqrt((bread @ (scores.T @ scores) @ bread)[1, 1] * n / (n - 1))
    change, low, high = trend(steps, values)
    assert change == pytest.approx(40 * beta[1], rel=1e-12)
    half = stats.t.ppf(0.975, n - 1) * 40 * error
    assert (low, high) == pytest.approx((change - half, change + half), rel=1e-12)


def test_two_evaluations_are_a_paired_difference():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 30))
    found = stats.ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert trend([0, 7], values)[1:] == pytest.approx((found.low, found.high), rel=1e-12)
    assert trend([1, 2, 9], np.tile(values[0] * 0.1, (3, 1))) == (0.0, 0.0, 0.0)  # exactly: nothing moved
    assert interval(np.array([3.0]))[1:] == (-math.inf, math.inf)


def test_per_token_values_have_the_ratio_s_mean_and_the_delta_method_s_error():
    rng = np.random.default_rng(2)
    length = rng.integers(1, 30, size=(3, 200)).astype(float)
    total = 0.04 * length + rng.normal(size=(3, 200))
    values = per_token(total, length)
    assert values.mean(1) == pytest.approx(total.sum(1) / length.sum(1), rel=1e-12)
    jackknife = [(total[0].sum() - total[0, i]) / (length[0].sum() - length[0, i]) for i in range(200)]
    error = math.sqrt(199 / 200 * ((np.array(jackknife) - np.mean(jackknife)) ** 2).sum())
    assert values[0].std(ddof=1) / math.sqrt(200) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("kind", ["normal", "rare", "skewed"])
def test_the_interval_covers(kind):
    """2,000 courses whose expected change is known, answers of a prompt correlated over evaluations, at the fewest prompts allowed."""
    rng, n, steps = np.random.default_rng(3), monitors.FEWEST_PROMPTS, np.arange(1, 7) * 10
    covered = 0
    for _ in range(2000):
        prompt = rng.normal(size=n)
        noise = 0.7 * rng.normal(size=(6, n)) + 0.7 * rng.normal(size=n)
        mean = prompt + 0.02 * steps[:, None] * (1 + prompt)  # what learning adds differs between prompts; on average 1.0 over the window
        values = mean + {"normal": noise, "rare": (rng.random((6, n)) < 0.2) * 2.0, "skewed": rng.exponential(size=(6, n))}[kind]
        _, low, high = trend(steps, values)
        covered += low <= 1.0 <= high
    assert 0.92 < covered / 2000 < 0.975


# --- the gate ------------------------------------------------------------------------------------------------------------------


Walk = tuple[int, dict[str, Any], dict[str, Any]]


def walk(gate: Gate, reward, kl, *, n: int = 200, count: int = 12, seed: int = 0, noise: float = 0.3) -> Walk:
    """(evaluation at which it stops or -1, last verdict, watch) of a course with mean reward(t) and KL per token kl(t), 10 tokens each."""
    rng = np.random.default_rng(seed)
    prompt, watch, verdict = rng.normal(size=(n, 1)), {}, {}
    for t in range(count + 1):
        values, spent = prompt + reward(t) + noise * rng.normal(size=(n, 2)), 10 * kl(t) * np.exp(0.2 * rng.normal(size=(n, 2)))
        watch = note(watch, gate, step=10 * t, reward=values, kl=spent, length=np.full((n, 2), 10.0))
        verdict = judge(watch, gate)
        if verdict.get("why"):
            return t, verdict, watch
    return -1, verdict, watch


COURSES = {  # name: reward, KL per token, why, the evaluations at which it may stop
    "still": (lambda t: 0.0, lambda t: 0.01, "plateau", range(6, 7)),
    "learns, then flat": (lambda t: min(t, 4), lambda t: 0.01 * min(t, 4), "plateau", range(9, 11)),
    "learns": (lambda t: 0.2 * t, lambda t: 0.003 * t, "", None),
    "falls": (lambda t: -0.2 * t, lambda t: 0.02, "", None),
    "flat above the limit": (lambda t: min(t, 4), lambda t: 0.08 * (t > 0), "limit", range(9, 11)),
    "flat above, coming back": (lambda t: 0.0, lambda t: 0.3 - 0.02 * t, "", None),
    "moves for nothing": (lambda t: 0.0, lambda t: 0.004 * t, "drift", range(6, 8)),
    "flat, KL coming down": (lambda t: 0.0, lambda t: 0.048 - 0.004 * t, "", None),
    "learns far above the limit": (lambda t: 0.2 * t, lambda t: 0.2 + 0.01 * t, "", None),
}


@pytest.mark.parametrize("name", COURSES)
def test_the_gate_stops_what_should_stop_and_nothing_else(name):
    reward, kl, why, when = COURSES[name]
    for seed in range(5):
        at, verdict, watch = walk(GATE, reward, kl, seed=seed)
        assert verdict["why"] == why, (name, at, verdict)
        assert at == -1 if when is None else at in when, (name, at)
        if why == "limit":
            assert watch["best"]["step"] == 0 and watch["best"]["kl"] == 0
        if name == "learns far above the limit":
            assert watch["best"] is None or watch["best"]["kl"] <= 0.05


def test_what_merely_includes_zero_is_not_flat():
    """Sixteen prompts of great noise: the interval holds 0 and is far wider than the band; the gate says how many prompts would do."""
    at, verdict, _ = walk(Gate(6, 0.05, band=0.05), lambda t: 0.0, lambda t: 0.01, n=16, noise=1.0)
    assert at == -1 and verdict["reward"]["low"] < 0 < verdict["reward"]["high"] and verdict["prompts_needed"] > 60
    needed = walk(Gate(6, 0.05, band=0.05), lambda t: 0.0, lambda t: 0.01, n=20 * 16, noise=0.2)
    assert needed[0] > 0


def test_a_reward_that_never_differs_is_no_plateau_and_one_that_is_won_is():
    ones, length = np.ones((20, 1)), np.full((20, 1), 5.0)
    for first, constant in ((ones, True), (0 * ones, False)):
        watch: dict[str, Any] = {}
        for t in range(8):
            watch = note(watch, GATE, step=t, reward=first if t == 0 else ones, kl=0.1 * ones, length=length)
        assert watch["best"]["step"] == (0 if constant else 1), "of equals the first"
        assert judge(watch, GATE)["constant"] is constant and (judge(watch, GATE)["why"] == "") is constant


def test_warm_up_and_windows():
    """Evaluations of the warm-up do not count, the window slides, and what is kept fits into a checkpoint."""
    gate = replace(GATE, after=30)
    at, verdict, watch = walk(gate, lambda t: 0.0, lambda t: 0.01)
    assert at == 9 and (verdict["first"], verdict["last"]) == (40, 90) and len(watch["looks"]) == 6
    assert json.loads(json.dumps(watch)) == watch
    assert verdict["reward"]["band"] == pytest.approx(0.2 * math.sqrt(1.09), rel=0.1)  # prompts vary by 1, answers by 0.3
    assert watch["best"]["kl"] == pytest.approx(0.01, rel=0.05)
    by_answer = replace(GATE, limit=0.2, unit="sequence")
    _, verdict, watch = walk(by_answer, lambda t: 0.0, lambda t: 0.01)
    assert verdict["why"] == "plateau" and watch["best"]["kl"] == pytest.approx(0.1, rel=0.05)
    assert walk(replace(by_answer, limit=0.05), lambda t: 0.0, lambda t: 0.01)[1]["why"] == "limit"


def rows_of(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Lines of samples.jsonl of arrays (evaluations, prompts); what is not given is 10 tokens of 1.5 nats without repeats."""
    shape = next(iter(values.values())).shape
    all_ = {"tokens": np.full(shape, 10), "entropy": np.full(shape, 15.0), "repeated": np.zeros(shape)} | values
    return [{"step": 10 * t, "prompt": str(i), "sample": 0} | {k: float(v[t, i]) for k, v in all_.items()}
            for t in range(shape[0]) for i in range(shape[1])]  # fmt: skip


RNG = np.random.default_rng(5)
NOISE, RISE = RNG.normal(size=(6, 64)), np.linspace(0, 1, 6)[:, None]
PLANTED = {  # alarm -> (a course on which it fires, one on which it does not)
    "over_optimisation": ({"reward": 2 * RISE + NOISE, "truth": -2 * RISE - NOISE},
                          {"reward": -2 * RISE + NOISE, "truth": -2 * RISE - NOISE}),
    "constant": ({"reward": np.ones((6, 64))}, {"reward": np.ones((6, 64)) + (NOISE > 2)}),
    "saturation": ({"reward": 1.0 * (NOISE < 3 * RISE)}, {"reward": 1.0 * (NOISE < RISE)}),
    "length": ({"tokens": 10 + 6 * RISE + NOISE, "reward": 10 + 6 * RISE + NOISE},
               {"tokens": 10 + 6 * RISE + NOISE, "reward": 2 * RISE + NOISE[::-1]}),
    "entropy": ({"entropy": 15 - 14 * RISE + 0.2 * NOISE}, {"entropy": 15 - 5 * RISE + 0.2 * NOISE}),
    "repetition": ({"repeated": 0.5 * RISE + 0.1 * NOISE**2}, {"repeated": 0.1 * RISE + 0.1 * NOISE**2}),
    "reward_fell": ({"reward": np.abs(RISE - 0.5) * -4 + NOISE}, {"reward": 2 * RISE + NOISE}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_alarms_on_planted_courses_and_not_on_healthy_ones(name):
    planted, healthy = (alarms(rows_of(course)) for course in PLANTED[name])
    assert planted[name]["alarm"] is True and healthy[name]["alarm"] is False, (planted[name], healthy[name])
    assert json.loads(json.dumps(planted)) == planted
    told = {f.title for f in findings([], {"steps": 100, "alarms": planted})} - {f.title for f in findings([], {"steps": 100})}
    assert len(told) >= (name != "reward_fell")


def test_what_falls_by_chance_is_seldom_called_a_fall():
    """400 courses of twelve evaluations that go nowhere: at most one in forty is allowed, three times that would be red."""
    rng = np.random.default_rng(6)
    called = sum(monitors.alarms(rows_of({"reward": rng.normal(size=(12, 24))}))["reward_fell"]["alarm"] for _ in range(400))
    assert called <= 30


def answers_of(**values: np.ndarray) -> list[dict[str, Any]]:
    """Lines of samples.jsonl of arrays (evaluations, prompts, answers each)."""
    shape = values["tokens"].shape
    all_ = {"entropy": 1.5 * values["tokens"], "repeated": np.zeros(shape)} | values
    return [{"step": 10 * t, "prompt": str(i), "sample": j} | {k: float(v[t, i, j]) for k, v in all_.items()}
            for t in range(shape[0]) for i in range(shape[1]) for j in range(shape[2])]  # fmt: skip


def test_the_numbers_of_the_alarms_by_other_routes():
    """Two answers each to 40 prompts: paired t of prompts, a jackknife of the ratio of entropies, least squares with clusters."""
    rng, t = np.random.default_rng(7), np.arange(4)[:, None, None]
    tokens = 10 + 2 * t + np.round(2 * rng.random((4, 40, 2)) + 3 * rng.random((40, 1)), 1)
    entropy = tokens * (1.5 - 0.3 * t + 0.1 * rng.normal(size=(4, 40, 2)))
    repeated, reward = 0.1 * t + 0.1 * rng.random((4, 40, 2)), 0.4 * tokens + rng.normal(size=(4, 40, 2)) + rng.normal(size=(40, 1))
    found = alarms(answers_of(tokens=tokens, entropy=entropy, repeated=repeated, reward=reward))
    rise = stats.ttest_rel(repeated[3].mean(1), repeated[0].mean(1)).confidence_interval(0.95)
    wanted = [*rise, repeated[0].mean(), repeated[3].mean()]
    assert [found["repetition"][k] for k in ("low", "high", "start", "end")] == pytest.approx(wanted)
    kept = [np.delete(np.arange(40), i) for i in range(40)]
    ratio = lambda rows: np.log(entropy[3, rows].sum() / tokens[3, rows].sum() * tokens[0, rows].sum() / entropy[0, rows].sum())  # noqa: E731
    each, half = np.array([ratio(rows) for rows in kept]), stats.t.ppf(0.975, 39)
    error = math.sqrt(39 / 40 * ((each - each.mean()) ** 2).sum())
    assert found["entropy"]["ratio"] == pytest.approx(math.exp(ratio(np.arange(40))))
    ends = [math.log(found["entropy"][k]) for k in ("low", "high")]
    assert ends == pytest.approx([ratio(np.arange(40)) - half * error, ratio(np.arange(40)) + half * error], rel=0.02)
    x, y = tokens[0].ravel(), reward[0].ravel()
    slope, level = np.polyfit(x, y, 1)
    score = ((x - x.mean()) * (y - level - slope * x)).reshape(40, 2).sum(1)
    error, (grew, gained) = math.sqrt((score**2).sum()) / ((x - x.mean()) ** 2).sum(), ((v[3] - v[0]).mean() for v in (tokens, reward))
    length = found["length"]
    assert (length["price"], length["share"]) == pytest.approx((slope, slope * grew / gained))
    assert length["share_low"] == pytest.approx((slope - stats.norm.ppf(0.975) * error) * grew / gained)


def spoken(reward, tokens=10.0, n: int = 64, count: int = 4, **more) -> dict[str, dict[str, Any]]:
    """Alarms of courses of (count, n), or (n,) where nothing changes; one answer each."""
    grid = lambda v: np.broadcast_to(v, (count, n))[:, :, None]  # noqa: E731
    return alarms(answers_of(**{"tokens": grid(tokens), "reward": grid(reward)} | {k: grid(v) for k, v in more.items()}))


def test_alarms_ask_for_certainty_and_size():
    """Just over and just under each threshold; what is there from the start is no news; estimates beyond it that are unsure are none."""
    share = lambda part: (np.arange(64) < part * 64).astype(float)  # noqa: E731
    assert not spoken(np.stack([share(p) for p in (0.2, 0.5, 0.7, 0.85)]))["saturation"]["alarm"]
    assert spoken(np.stack([share(p) for p in (0.2, 0.5, 0.7, 0.95)]))["saturation"]["alarm"]
    assert not spoken(np.stack([share(0.95)] * 4))["saturation"]["alarm"], "it was so before"
    rng = np.random.default_rng(8)
    noise = rng.normal(size=64)
    for rise, wide, alarm in ((0.25, 0.01, True), (0.25, 2.0, False), (0.15, 0.01, False)):
        repeated = np.stack([0 * noise] * 3 + [rise + wide * (noise - noise.mean())])
        assert spoken(noise, repeated=repeated)["repetition"]["alarm"] is alarm, (rise, wide)
    for left, wide, alarm in ((0.2, 0.01, True), (0.2, 3.0, False), (0.3, 0.01, False)):
        entropy = np.stack([15 + 0 * noise] * 3 + [15 * left + wide * 3 * (noise - noise.mean())])
        assert spoken(noise, entropy=entropy)["entropy"]["alarm"] is alarm, (left, wide)
    sizes = np.stack([10 + noise] * 3 + [13 + noise])  # a third longer
    bought = {"plain": (sizes, sizes), "a little longer": (np.stack([10 + noise] * 3 + [11.5 + noise]),) * 2,
              "for other reasons": (sizes, 0.2 * sizes + np.array([0, 0, 0, 3.0])[:, None]),
              "a slope by chance": (sizes, sizes + 40 * rng.normal(size=64))}  # fmt: skip
    told = {name: spoken(reward, tokens)["length"] for name, (tokens, reward) in bought.items()}
    assert {name: found["alarm"] for name, found in told.items()} == {"plain": True} | dict.fromkeys([*bought][1:], False)
    assert told["a little longer"]["share"] == pytest.approx(1) and told["for other reasons"]["share"] == pytest.approx(0.6 / 3.6)
    assert told["a slope by chance"]["share"] > 0.5 > 0.25 > told["a slope by chance"]["share_low"]
    unsure = spoken(np.stack([noise] * 3 + [noise + 0.1 + 3 * rng.normal(size=64)]), sizes)["length"]
    assert unsure["reward"]["change"] > 0 > unsure["reward"]["low"] and "share" not in unsure, "no gain beyond doubt"
    falls = spoken(np.array([1.0, 3, 2, 0])[:, None] + 0.01 * noise)["reward_fell"]
    assert falls["alarm"] and falls["since"] == 10 and falls["change"] == pytest.approx(-3)
    spread = (noise - noise.mean()) / noise.std(ddof=1)
    for t, alarm in ((2.6, True), (2.2, False)):  # three earlier evaluations: 2.2 would do for one of them (2.00), not for three (2.46)
        assert spoken(np.stack([0 * noise] * 3 + [spread - t / 8]))["reward_fell"]["alarm"] is alarm, t
    for rise, alarm in ((1.0, True), (0.1, False)):  # the truth falls for sure; the reward rises for sure, or perhaps
        reward = np.stack([noise] * 3 + [noise + rise + rng.normal(size=64)])
        found = spoken(reward, truth=np.stack([0.01 * noise] * 3 + [-1 + 0.02 * noise]))["over_optimisation"]
        assert found["alarm"] is alarm, rise


def test_a_verdict_by_hand():
    """Ten prompts without noise. The band is of the mean variance of all looks and the start; the gain is since the start."""
    flat = [0.0] * 10

    def looks(rewards, kls, variances) -> list[dict[str, Any]]:
        return [{"step": 10 * i, "variance": v, "reward": [r] * 10, "kl": [k] * 10, "length": [1.0] * 10}
                for i, (r, k, v) in enumerate(zip(rewards, kls, variances, strict=True))]  # fmt: skip

    start = {"step": 0, "variance": 4.0, "reward": [-2.0] * 10, "kl": flat, "length": [1.0] * 10}
    found = judge({"start": start, "looks": looks([1, 1, 1.1], [0.01] * 3, [0.0, 1.0, 3.0])}, Gate(3, 0.05))
    assert found["reward"]["band"] == pytest.approx(0.2 * math.sqrt(2)) and found["why"] == "plateau"
    assert found["gained"] == pytest.approx(dict.fromkeys(("change", "low", "high"), 3.1)) and found["prompts_needed"] is None
    falling = judge({"start": start, "looks": looks([1, 1, 1], [0.1001, 0.1, 0.0999], [1.0] * 3)}, Gate(3, 0.05))
    assert falling["why"] == "" and falling["kl"]["high"] < 0 and falling["kl_now"] > 0.05, "above its limit and certainly coming down"
    unsure = looks([1, 1, 1], [0.01] * 3, [1.0] * 3)
    unsure[2]["reward"] = (1 + np.linspace(-1, 1, 10)).tolist()
    found = judge({"start": start, "looks": unsure}, Gate(3, 0.05, band=0.1))
    wide, room = found["reward"]["high"] - found["reward"]["change"], 0.1 - abs(found["reward"]["change"])
    assert found["why"] == "" and found["prompts_needed"] == math.ceil(10 * (wide / room) ** 2) > 100


def test_no_course_no_alarms():
    assert alarms([]) == {} == alarms(rows_of({"reward": np.ones((1, 9))})) == alarms(rows_of({"reward": np.ones((3, 1))}))


# --- through real runs ---------------------------------------------------------------------------------------------------------

RULES = """
def length(prompt, response): return float(len(response))
def proxy(prompt, response): return float(response.count("a"))
def truth(prompt, response): return float(1 - abs(response.count("a") - 1))
def sound(prompt, response): return float(0 < len(response) <= 8 and set(response) <= set("abcd"))
def one(prompt, response): return 1.0
def first(prompt, response): return float(response[:1] == "a")
"""


def letters(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcd"), rng.integers(1, 9)))


def pairs(path: Path, judge, count: int = 240) -> str:
    """Two random words to each prompt, the one with the higher `judge` preferred; for 'near' they differ in their last letter."""
    rng, rows = np.random.default_rng(1), []
    while len(rows) < count:
        one, two = letters(rng), letters(rng)
        if judge == "near":
            two = one[:-1] + rng.choice([c for c in "abcd" if c != one[-1]])
        elif judge(one) <= judge(two):
            continue
        rows.append({"prompt": f"q{len(rows)}:", "chosen": one, "rejected": two})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def speller(tmp_path_factory) -> Path:
    """A tiny model that answers with one to eight letters of abcd, and the rules that score it."""
    folder, rng = tmp_path_factory.mktemp("speller"), np.random.default_rng(0)
    (folder / "words.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}:", "completion": letters(rng)}) + "\n" for i in range(400)))
    (folder / "rules.py").write_text(RULES)
    sft.run(Sft(model=str(make.write_model(folder / "random")), data=[str(folder / "words.jsonl")], output=str(folder / "run"), lr=5e-3,
                epochs=4, batch_size=16, eval_prompts=0, holdout=0, threads=1, report=False, finish="always"))  # fmt: skip
    return folder


def ran(speller: Path, tmp_path: Path, judge, **extra: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """results.json and {about: title of the finding} for alarms of a run on pairs that `judge` made."""
    rule = f"python:{speller / 'rules.py'}:"
    extra = {k: rule + v if k in ("eval_reward", "eval_truth") else v for k, v in extra.items()}
    wanted = Dpo(model=str(speller / "run" / "model"), data=[pairs(tmp_path / "pairs.jsonl", judge)], output=str(tmp_path / "run"),
                 batch_size=8, sample_tokens=12, holdout=0.25, threads=1, finish="always", report=False, schedule="constant",
                 warmup=0)  # fmt: skip
    dpo.run(replace(wanted, **({"eval_every": 6, "lr": 1e-3} | extra)))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return results, {f.about: f.title for f in findings(rows, results) if f.level == "alarm"}


def test_planted_a_reward_that_counts_length_goes_on_and_is_told(speller, tmp_path):
    """The reward rises to the end, so the gate lets it run; the finding says that length bought it."""
    results, told = ran(speller, tmp_path, len, eval_reward="length", lr=5e-4, eval_every=4, stop="plateau", plateau_window=4, kl_limit=9.0)
    assert results["steps"] == 23 and results["gate"]["why"] == "" and results["gate"]["reward"]["low"] > 0
    assert results["paired_reward"]["low"] > 0.5 and told["bought"] == "The reward was earned with longer answers"
    assert results["alarms"]["length"]["share"] == pytest.approx(1, abs=0.1)


def test_planted_a_proxy_with_a_hole(speller, tmp_path):
    """The proxy counts a's; the truth wants one of them."""
    results, told = ran(speller, tmp_path, lambda word: word.count("a"), eval_reward="proxy", eval_truth="truth")
    assert told["over_optimisation"] == "The reward went up while what it stands for went down"
    assert results["alarms"]["over_optimisation"]["reward"]["low"] > 0 > results["alarms"]["over_optimisation"]["high"]


def test_planted_near_equal_pairs(speller, tmp_path):
    results, told = ran(speller, tmp_path, "near", eval_reward="sound", lr=1e-2, beta=0.05, eval_every=23)
    assert results["after"]["eval/displacement"] < -1 and results["alarms"]["reward_fell"]["alarm"]
    assert told["displacement"] == "Preferred answers became less likely, and quality fell too"


STILL = {"lr": 1e-6, "eval_every": 1, "stop": "plateau", "plateau_window": 4, "eval_reward": "length", "eval_prompts": 24}


def test_a_flat_run_stops_and_resumes_bitwise(speller, tmp_path):
    """Nothing moves at this rate: stopped once the window is full; killed before and at the stop, it ends in the same bits."""
    results, _ = ran(speller, tmp_path, len, save_every=1, keep=1, **STILL)
    whole = tmp_path / "run"
    assert results["gate"]["why"] == "plateau" and results["steps"] == 4 and results["stopped_early"] is None
    best = results["published"]["step"]
    assert results["published"]["why"] == "reward" and results["after"]["step"] == best == results["gate"]["best"]["step"]
    assert {int(p.name[5:]) for p in (whole / "checkpoints").iterdir()} == {best, 4}
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert "plateau/reward_low" in rows[-1] and "plateau/reward_low" not in rows[-3]
    wanted = build(Dpo, config.load_config(str(whole / "config.yaml"), Dpo))
    cut = tmp_path / "cut"
    make.stop_after(dpo.run, replace(wanted, output=str(cut)), 2)
    make.stop_after(dpo.run, Dpo(resume=str(cut)), 4)
    dpo.run(Dpo(resume=str(cut)))
    same_run(whole, cut)
    found = json.loads((cut / "results.json").read_text())
    assert found["gate"] == results["gate"] and found["published"] == results["published"]


def test_flat_above_the_limit_keeps_what_was_within_it(speller, tmp_path, capsys):
    results, _ = ran(speller, tmp_path, len, kl_limit=1e-12, kl_unit="sequence", report=True, **STILL)
    assert results["gate"]["why"] == "limit" and results["published"] == {"step": 0, "why": "reward"}
    assert results["after"]["kl_sequence_rb"] == 0
    out = capsys.readouterr().out
    assert "stopped       the reward is flat" in out and "above its limit" in out and "kept is step 0" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Stopped: flat beyond the KL limit" in page and "The reward and its plateau" in page and "KL against its limit" in page


def test_what_could_never_stop_is_refused(speller, tmp_path):
    with pytest.raises(UsageError, match=r"has 3 evaluations after its warm-up \(23 steps, one every 8\) and needs 5 .*--eval-every 5"):
        ran(speller, tmp_path, len, **STILL | {"eval_every": 8})
    with pytest.raises(UsageError, match=r"9 held-out prompts to sample from, 16 are needed"):
        ran(speller, tmp_path, len, **STILL | {"eval_prompts": 9})
    assert not (tmp_path / "run").exists()


def test_planted_a_constant_reward(speller, tmp_path):
    results, told = ran(speller, tmp_path, len, eval_reward="one", max_steps=1, eval_every=1)
    assert told["constant"] == "Every answer got the same reward" and results["alarms"]["constant"]["value"] == 1.0


# --- the gate over the policy's own answers -------------------------------------------------------------------------------------


def rolled(speller: Path, tmp_path: Path, cls: type, **extra: Any) -> dict[str, Any]:
    """results.json of a run of `ppo` or `online` on a hundred prompts, rewarded for answers that begin with a."""
    (tmp_path / "prompts.txt").write_text("".join(f"q{i}:\n" for i in range(96)))
    usual = {"model": str(speller / "run" / "model"), "data": [str(tmp_path / "prompts.txt")], "output": str(tmp_path / "run"), "lr": 3e-3,
             "reward": f"python:{speller / 'rules.py'}:first", "batch_size": 8, "k": 4, "passes": 1, "sample_tokens": 12, "holdout": 0.25,
             "schedule": "constant", "warmup": 0, "stop": "plateau", "plateau_window": 4, "eval_prompts": 24, "eval_samples": 4,
             "kl_limit": 9.0, "kl_unit": "sequence", "threads": 1, "report": False}  # fmt: skip
    {Ppo: ppo, OnlineDpo: online}[cls].run(cls(**usual | extra))
    return json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize("cls", [Ppo, OnlineDpo])
def test_a_flat_run_of_the_policy_s_own_answers_stops(speller, tmp_path, cls):
    """Nothing moves at this rate: stopped once the window is full, in the middle of an epoch."""
    results = rolled(speller, tmp_path, cls, lr=1e-6, eval_every=1)
    assert results["gate"]["why"] == "plateau" and results["steps"] == 4 and results["published"]["why"] == "reward"


def test_ppo_learns_flattens_and_is_stopped(speller, tmp_path):
    """The first letter is soon nearly always a: not stopped on the way up, stopped on the height, with the reward that was gained."""
    results = rolled(speller, tmp_path, Ppo, eval_every=5, epochs=8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [row["reward"] for row in rows if "reward" in row]
    assert results["gate"]["why"] == "plateau" and 20 < results["steps"] < 72, (results["steps"], seen)
    assert seen[0] < 0.5 and seen[-1] > 0.8 and results["gate"]["gained"]["low"] > 0.3, seen
    assert results["paired_reward"]["low"] > 0.3 and results["after"]["kl_sequence_rb"] < 9
    told = [row for row in rows if "plateau/reward_low" in row]
    assert told[0]["plateau/reward_low"] > told[0]["plateau/reward_band"] / 4, "on the way up the window told of a rise"


def test_ppo_that_still_learns_is_not_stopped(speller, tmp_path):
    results = rolled(speller, tmp_path, Ppo, eval_every=3, epochs=2, lr=1e-3)
    assert results["gate"]["why"] == "" and results["steps"] == 18 and results["gate"]["reward"]["low"] > 0


def test_a_reward_model_is_stopped_by_its_held_out_loss(speller, tmp_path):
    """It draws no samples, so the gate is not for it: --stop is unknown, and --patience ends a run that gains nothing."""
    found = [spec.name for spec in config.specs(Reward)]
    assert "stop" not in found and "patience" in found
    wanted = {"model": str(speller / "run" / "model"), "data": [pairs(tmp_path / "pairs.jsonl", len, 80)], "batch_size": 8, "threads": 1,
              "output": str(tmp_path / "run"), "finish": "always", "report": False, "eval_every": 1, "holdout": 0.25}  # fmt: skip
    reward.run(Reward(**wanted, lr=1e-6, epochs=2, patience=2, min_improvement=0.01))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2 and results["stopped_early"]["patience"] == 2 and results["gate"] is None
