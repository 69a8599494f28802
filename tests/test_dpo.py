"""`dpo` end to end on a tiny model: it learns, it writes what it says, it resumes bit for bit, it refuses in words.

A stop is an exception that nothing catches, raised as soon as a checkpoint stands (`make.stop_after`); the kills are real SIGKILLs of
child processes (tests/child.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import child
import make
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune import checkpoints, intake, pipeline
from preftune.config import Dpo
from preftune.errors import DataError, ModelError, NumericsError, PreftuneError, UsageError
from preftune.stages import dpo

TIMES = {"seconds", "tokens_per_second", "rollout/seconds", "rollout/tokens_per_second"}


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return make.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60)


@pytest.fixture
def options(base, pairs, tmp_path) -> Dpo:
    return Dpo(model=str(base), data=[str(pairs)], output=str(tmp_path / "run"), lr=2e-3, epochs=2, batch_size=8, sample_tokens=8,
               eval_prompts=4, holdout=0.2, report=False, threads=1)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(row).items() if k not in TIMES} for row in path.read_text().splitlines()]


def same_run(a: Path, b: Path) -> None:
    """Weights, optimiser and every metric but time are equal, bit for bit."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(a / name) == lines(b / name), name
    one, two = checkpoints.latest(a), checkpoints.latest(b)
    states = [{k: v for k, v in found.state.items() if k not in TIMES} for found in (one, two)]
    assert one.step == two.step and states[0] == states[1]
    for group in ("weights", "optimizer"):
        left, right = one.tensors(group), two.tensors(group)
        assert left.keys() == right.keys() and len(left) > 0
        assert all(torch.equal(left[k], right[k]) for k in left), group
    left, right = load_file(a / "model" / "model.safetensors"), load_file(b / "model" / "model.safetensors")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_it_learns_and_writes_what_it_says(options, capsys):
    assert dpo.run(replace(options, epochs=4, report=True)) == 0
    folder = Path(options.output)
    results, manifest = json.loads((folder / "results.json").read_text()), json.loads((folder / "manifest.json").read_text())
    before, after = results["before"], results["after"]
    assert before["eval/loss"] == pytest.approx(0.6931, abs=1e-4) and before["kl_sequence_rb"] == 0
    assert after["eval/loss"] < before["eval/loss"] / 2 and after["eval/rewards/accuracies"] == 1
    assert after["kl_sequence_rb"] > 0 and after["eval/accuracy_low"] > 0.7
    assert manifest["records"]["read"] == 60 and manifest["records"]["train"] == 48 and manifest["records"]["held_out"] == 12
    assert manifest["self_check"]["packed_error"] < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")  # loads in plain transformers
    assert plain.config.use_cache
    assert (folder / "report.html").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "accuracy" in out and "next" in out and "KL" in out and len(out.splitlines()) <= 6
    train = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 25)) and train[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert train[-1]["num_tokens"] > train[0]["num_tokens"] * 20


def test_reference_column_is_reused_by_another_beta_and_loss(options, capsys):
    dpo.run(replace(options, seed=7, max_steps=1, epochs=1))
    capsys.readouterr()
    dpo.run(replace(options, seed=8, beta=0.5, loss="ipo-sum+0.1*sigmoid", max_steps=1, epochs=1, output=options.output + "2"))
    assert "reference log-probs: reused" in capsys.readouterr().err


RESUMED = {
    "full": {}, "lora": {"lora": 4}, "accumulated": {"micro_tokens": 60}, "lora accumulated": {"lora": 4, "micro_tokens": 60},
    "bf16": {"dtype": "bf16"}, "two passes": {"loss": "kto", "micro_tokens": 100},
}  # fmt: skip


@pytest.mark.parametrize("extra", RESUMED.values(), ids=RESUMED)
def test_fault_25_resume_is_bitwise(extra, options, tmp_path):
    """Stopped after the first step, inside an epoch, at its end, before the last step and at it, all in one run: the same bytes as a
    run that never stopped."""
    wanted = replace(options, output=str(tmp_path / "whole"), eval_every=3, save_every=1, keep=99, **extra)
    dpo.run(wanted)
    whole, cut = Path(wanted.output), tmp_path / "cut"
    assert checkpoints.latest(whole).step == 12
    going = replace(wanted, output=str(cut))
    for stop in (1, 4, 6, 11, 12):
        make.stop_after(dpo.run, going, stop)
        assert not (cut / "results.json").exists() and checkpoints.latest(cut).step == stop
        going = Dpo(resume=str(cut))
    assert dpo.run(going) == 0
    same_run(whole, cut)
    assert dpo.run(going) == 0  # again: nothing to do, nothing changes
    same_run(whole, cut)


def kill_until_done(children: child.Children, options: Dpo, kills: int, seed: int, longest: float) -> int:
    """Start, kill at a random moment, resume, ... until `kills` kills have happened; then let it finish. How many kills."""
    rng, done, folder = random.Random(seed), 0, Path(str(options.output))
    while not (folder / "results.json").is_file():
        begun = (folder / "config.yaml").is_file()
        pid = children.start(dpo.run, Dpo(resume=str(folder)) if begun else options)
        if done < kills:
            time.sleep(rng.uniform(0.0, longest))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = children.wait()
        assert status in (0, -signal.SIGKILL), children.said()
        done += status != 0
    return done


def run_killed(children: child.Children, options: Dpo, tmp_path: Path, kills: int) -> None:
    wanted = replace(options, output=str(tmp_path / "whole"), save_every=1, eval_every=4, epochs=3)
    began = time.monotonic()
    dpo.run(wanted)
    longest, total = 0.8 * (time.monotonic() - began), 0
    for round_ in range(3 * kills):
        killed = tmp_path / f"killed{round_}"
        total += kill_until_done(children, replace(wanted, output=str(killed)), min(4, kills - total), round_, longest)
        same_run(tmp_path / "whole", killed)
        if total >= kills:
            break
    assert total >= kills


def test_fault_22_twenty_kills_lose_nothing(options, tmp_path, children):
    run_killed(children, options, tmp_path, 20)


@pytest.mark.soak
def test_fault_22_two_hundred_kills_lose_nothing(options, tmp_path, children):
    run_killed(children, options, tmp_path / "full", 100)
    run_killed(children, replace(options, lora=4), tmp_path / "lora", 100)


def test_nothing_is_written_where_something_is(options, tmp_path):
    Path(options.output).mkdir()
    (Path(options.output) / "precious").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        dpo.run(options)
    with pytest.raises(UsageError, match="not a run folder"):
        dpo.run(Dpo(resume=str(tmp_path / "nowhere")))


BAD: list[tuple[dict[str, Any], type[PreftuneError], str]] = [
    ({"model": "./nowhere"}, ModelError, "no such model folder"),
    ({"model": "some/hub-name", "offline": True}, UsageError, "--offline"),
    ({"max_length": 500}, UsageError, "128 positions"),
    ({"max_length": 6}, DataError, "the shortest record needs"),
    ({"eval_reward": "lexicon:nowhere.txt"}, PreftuneError, "nowhere.txt"),
    ({"lora": 4, "lora_targets": "q_prj"}, UsageError, "q_proj"),
    ({"device": "cuda:7"}, UsageError, "no CUDA"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[next(iter(b[0])) for b in BAD])
def test_refusals_leave_nothing_behind(change, kind, words, options):
    with pytest.raises(kind, match=words):
        dpo.run(replace(options, **change))
    assert not Path(options.output).exists()


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = [{"prompt": f"p{i}", "chosen": " yes", "rejected": " no"} for i in range(10)]


def test_fault_1_a_cut_line_names_file_and_line(options, tmp_path):
    data = write_rows(tmp_path / "cut.jsonl", [*GOOD, '{"prompt": "x", "cho'])
    with pytest.raises(DataError, match=r"cut.jsonl:11"):
        dpo.run(replace(options, data=[data]))
    dpo.run(replace(options, data=[data], skip_bad=True, max_steps=1))
    manifest = json.loads((Path(options.output) / "manifest.json").read_text())
    assert manifest["records"]["unreadable"] == 1 and manifest["records"]["train"] + manifest["records"]["held_out"] == 10


@pytest.mark.parametrize(("row", "words"), [({"prompt": "x", "chosen": None, "rejected": "n"}, r"f.jsonl:11: chosen"),
                                            ({"prompt": "x", "chosen": 3, "rejected": "n"}, r"f.jsonl:11: chosen"),
                                            ({"prompt": "x", "chosn": "y", "rejected": "n"}, r"f.jsonl:11.*chos"),
                                            ({"prompt": "x", "chosen": " ", "rejected": "n"}, r"f.jsonl:11: chosen")])  # fmt: skip
def test_faults_2_and_4_fields_are_named(row, words, options, tmp_path):
    data = write_rows(tmp_path / "f.jsonl", [*GOOD, row])
    with pytest.raises(DataError, match=words):
        dpo.run(replace(options, data=[data]))
    dpo.run(replace(options, data=[data], skip_bad=True, max_steps=1))


def test_fault_3_equal_pairs(options, tmp_path):
    same = {"prompt": "q", "chosen": "a  b", "rejected": "a b"}
    data = write_rows(tmp_path / "e.jsonl", [*GOOD, same])
    with pytest.raises(DataError, match=r"1 of 11 pairs have two equal sides.*e.jsonl:11"):
        dpo.run(replace(options, data=[data]))
    dpo.run(replace(options, data=[data], skip_bad=True, max_steps=1))
    manifest = json.loads((Path(options.output) / "manifest.json").read_text())
    assert manifest["records"]["equal_left_out"] == 1 and manifest["audit"]["equal"] == 1
    dpo.run(replace(options, data=[data], allow=["equal"], max_steps=1, output=options.output + "2"))


def test_faults_5_and_6_over_long_records_are_left_out_and_counted_by_side(options, tmp_path):
    rows = [*GOOD, {"prompt": "z" * 200, "chosen": " a", "rejected": " b"},
            {"prompt": "c", "chosen": " a" * 100, "rejected": " b"}, {"prompt": "r", "chosen": " a", "rejected": " b" * 100},
            {"prompt": "s", "chosen": "x" * 120 + "1", "rejected": "x" * 120 + "2"},
            {"prompt": "b", "chosen": "x" * 130 + "1", "rejected": "x" * 130 + "2"}]  # fmt: skip
    dpo.run(replace(options, data=[write_rows(tmp_path / "l.jsonl", rows)], max_steps=1))
    manifest = json.loads((Path(options.output) / "manifest.json").read_text())
    assert manifest["records"]["dropped"] == {
        "prompt too long": 1,
        "chosen too long": 1,
        "rejected too long": 1,
        "both responses too long": 1,
    }
    assert len(manifest["records"]["refused"]) == 4 and "l.jsonl:11" in manifest["records"]["refused"][0]


def test_fault_8_encodings(options, tmp_path):
    text = "".join(json.dumps(r) + "\n" for r in GOOD)
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes(b"\xef\xbb\xbf" + text.encode())
    dpo.run(replace(options, data=[str(bom)], max_steps=1))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(text.encode() + '{"prompt": "caf\u00e9", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl:11"):
        dpo.run(replace(options, data=[str(latin)], output=options.output + "2"))


@pytest.mark.parametrize("make_it", ["empty", "folder", "fifo", "one row"])
def test_fault_11_odd_files_end_in_words_and_never_hang(make_it, options, tmp_path):
    path = tmp_path / "odd.jsonl"
    if make_it == "empty":
        path.write_text("")
    elif make_it == "folder":
        path.mkdir()
    elif make_it == "fifo":
        os.mkfifo(path)
    else:
        write_rows(path, GOOD[:1])
        assert dpo.run(replace(options, data=[str(path)], max_steps=1)) == 0  # one row trains; nothing is left to hold out
        return
    with pytest.raises(PreftuneError, match="odd.jsonl"):
        dpo.run(replace(options, data=[str(path)]))


def test_fewer_rows_than_a_batch(options, tmp_path):
    dpo.run(replace(options, data=[write_rows(tmp_path / "few.jsonl", GOOD[:5])], batch_size=64, max_steps=2))
    assert [r["step"] for r in lines(Path(options.output) / "metrics.jsonl") if "loss" in r] == [1, 2]


def test_faults_17_a_loss_that_is_not_finite_leaves_the_last_checkpoint_and_no_model(options, monkeypatch):
    monkeypatch.setattr(pipeline.engine, "schedule", lambda kind, peak, *, steps, warmup: lambda step: 0.0 if step < 3 else 1e30)
    with pytest.raises(NumericsError, match=r"not finite.*pairs.jsonl:\d+"):
        dpo.run(replace(options, save_every=1, eval_every=100, clip=0.0))
    folder = Path(options.output)
    assert not (folder / "model").exists() and not (folder / "results.json").exists()
    kept = checkpoints.latest(folder)
    assert kept.step >= 3 and all(torch.isfinite(t).all() for t in kept.tensors("weights").values())


def test_eval_data_and_leaks(options, pairs, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": f"new{i}", "chosen": " thanks", "rejected": " no"} for i in range(5)])
    dpo.run(replace(options, eval_data=[held], max_steps=1))
    manifest = json.loads((Path(options.output) / "manifest.json").read_text())
    assert manifest["records"]["train"] == 60 and manifest["records"]["held_out"] == 5
    with pytest.raises(DataError, match="60 held-out prompts stand in the training data"):
        dpo.run(replace(options, eval_data=[str(pairs)], output=options.output + "2"))


def test_prompts_never_stand_on_both_sides_of_the_split(options, tmp_path):
    rows = [{"prompt": f"p{i % 7}", "chosen": f" yes{i}", "rejected": f" no{i}"} for i in range(40)]
    taken = intake.read_records(dpo.TASK, replace(options, data=[write_rows(tmp_path / "s.jsonl", rows)]), tmp_path / "work")
    held = intake.split_by_prompt(taken.prompt, 0.3, seed=1)
    inside = {r.prompt for r, h in zip(taken.shelf, held, strict=True) if h}
    assert len(inside) == 2 and not inside & {r.prompt for r, h in zip(taken.shelf, held, strict=True) if not h}


def test_eval_reward_is_paired_over_the_same_prompts(options, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def count(prompt, response):\n    return float(response.count('t'))\n")
    dpo.run(replace(options, eval_reward=f"python:{rule}:count", epochs=4))
    results = json.loads((Path(options.output) / "results.json").read_text())
    drawn = lines(Path(options.output) / "samples.jsonl")
    first = [r for r in drawn if r["step"] == 0]
    last = [r for r in drawn if r["step"] == results["after"]["step"]]
    assert [r["prompt"] for r in first] == [r["prompt"] for r in last] and len(first) == 4
    gap = sum(b["reward"] - a["reward"] for a, b in zip(first, last, strict=True)) / 4
    assert results["paired_reward"]["difference"] == pytest.approx(gap) and all(
        r["response"].count("t") == r["reward"] for r in drawn
    )


def test_rows_that_share_a_prompt_train_as_one_record(options, tmp_path):
    """Same votes, fewer records: five prompts with three rows each; the one that does not fit takes no other with it."""
    rows = [{"prompt": f"p{i}", "chosen": f" yes{j}", "rejected": " no"} for j in range(3) for i in range(5)]
    rows += [{"prompt": "p0", "chosen": " x" * 100, "rejected": " no"}, {"prompt": "p1", "chosen": " no", "rejected": " yes0"}]
    wanted = replace(options, data=[write_rows(tmp_path / "m.jsonl", rows)], holdout=0.0, eval_prompts=0, max_steps=1)
    setup = dpo.pipeline.prepare(dpo.TASK, wanted)
    assert len(setup.store) == 5 and setup.store.where[0].endswith("m.jsonl:1") and len(setup.store.pair) == 16
    assert [int(n) for n in setup.store.pair_start[1:] - setup.store.pair_start[:-1]] == [3, 4, 3, 3, 3]
    records = setup.manifest["records"]
    assert (records["read"], records["merged"], records["kept"], records["dropped"]) == (17, 11, 5, {"chosen too long": 1})
    assert setup.manifest["audit"]["contradicting"] == 1  # and both sides of it stand


def test_merging_keeps_to_its_side_of_the_split(options, tmp_path):
    train = write_rows(tmp_path / "t.jsonl", GOOD * 2)
    held = write_rows(tmp_path / "h.jsonl", [{"prompt": "new", "chosen": " a", "rejected": f" {i}"} for i in range(3)])
    setup = dpo.pipeline.prepare(dpo.TASK, replace(options, data=[train], eval_data=[held], eval_prompts=1))
    assert len(setup.train) == 10 and len(setup.held) == 1 and setup.manifest["records"]["merged"] == 12


def test_weights_of_files_and_scores_reach_the_batch(options, tmp_path):
    pairs = write_rows(tmp_path / "p.jsonl", GOOD)
    scored = write_rows(tmp_path / "s.jsonl", [{"prompt": "s", "responses": [" a", " b", " c"], "scores": [1, 3, 2]}])
    wanted = replace(options, data=[f"{pairs}:3", scored], from_scores="all", holdout=0.0, eval_prompts=0)
    setup = dpo.pipeline.prepare(dpo.TASK, wanted)
    assert setup.store.pair_weight.tolist() == [3.0] * 10 + [1.0] * 3
    other = dpo.pipeline.prepare(dpo.TASK, replace(wanted, data=[f"{pairs}:2", scored]))
    assert other.manifest["fingerprints"]["data"] != setup.manifest["fingerprints"]["data"]
    with pytest.raises(DataError, match="no training record has .*--from-scores best-worst"):
        dpo.run(replace(options, data=[scored]))


def test_prompts_without_room_for_a_sample_are_not_sampled_from(options, tmp_path, capsys):
    """GPT-2 has as many positions as it has: a sample beyond them would crash."""
    model = make.write_model(tmp_path / "gpt2", kind="gpt2")
    rows = [*GOOD, *({"prompt": "long " * 22 + str(i), "chosen": " yes", "rejected": " no"} for i in range(10))]
    dpo.run(replace(options, model=str(model), data=[write_rows(tmp_path / "long.jsonl", rows)], sample_tokens=20, max_steps=1, holdout=0.5,
                    eval_prompts=20))  # fmt: skip
    drawn = lines(Path(options.output) / "samples.jsonl")
    assert drawn and not any("long" in row["prompt"] for row in drawn)
    assert "leave no room for --sample-tokens 20" in capsys.readouterr().err
