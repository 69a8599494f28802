"""Faults that a run must survive or refuse in words, each injected: memory, spikes, changed inputs, damaged checkpoints, a full disk,
signals, two processes. The numbers are those of docs/faults.md; a test's name holds its fault's number.

Signals are sent by the run to itself at a known point; only where a process must end at once is it a child's (tests/child.py).
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import child
import make
import pytest
import torch
from test_dpo import lines, same_run
from test_dpo import write_rows as write

from preftune import checkpoints, engine, files, intake, pipeline, report, runs
from preftune.batches import Order
from preftune.cli import main
from preftune.config import CHANGES, Dpo, Sft
from preftune.errors import CheckpointError, DataError, DiskError, Interrupted, OutOfMemoryError, UsageError
from preftune.stages import dpo, sft

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return make.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)


@pytest.fixture
def options(base, pairs, tmp_path) -> Dpo:
    """Eight steps, an evaluation every second, a checkpoint every step."""
    return Dpo(model=str(base), data=[str(pairs)], output=str(tmp_path / "run"), lr=2e-3, epochs=2, batch_size=8, sample_tokens=4,
               eval_prompts=2, eval_every=2, save_every=1, holdout=0.2, report=False, threads=1)  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, pairs, tmp_path_factory) -> Path:
    """The run of `options`, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    dpo.run(Dpo(model=str(base), data=[str(pairs)], output=str(folder), lr=2e-3, epochs=2, batch_size=8, sample_tokens=4,
                eval_prompts=2, eval_every=2, save_every=1, holdout=0.2, report=False, threads=1))  # fmt: skip
    return folder


# Fault -> the tests that inject it, by file and the beginning of their names.
FAULTS: dict[int, list[str]] = {
    7: ["test_faults.py::test_fault_07", "test_data.py::test_every_finding_without_a_model"],
    12: ["test_faults.py::test_faults_12_and_27"], 19: ["test_faults.py::test_fault_19"], 20: ["test_faults.py::test_fault_20"],
    22: ["test_dpo.py::test_fault_22", "test_checkpoints.py::test_a_kill_at_every_system_step"],
    23: ["test_faults.py::test_fault_23", "test_checkpoints.py::test_a_damaged_newest_is_skipped"],
    24: ["test_faults.py::test_fault_24", "test_checkpoints.py::test_when_none_verifies"],
    25: ["test_dpo.py::test_fault_25", "test_sft.py::test_fault_25"], 26: ["test_faults.py::test_fault_26"],
    27: ["test_faults.py::test_faults_12_and_27", "test_faults.py::test_fault_27"],
    29: ["test_faults.py::test_fault_29", "test_checkpoints.py::test_a_full_disk", "test_files.py::test_an_append_that_does_not_fit"],
    30: ["test_faults.py::test_fault_30"], 31: ["test_faults.py::test_fault_31", "test_files.py::test_a_second_process_is_refused"],
}  # fmt: skip


def test_every_fault_of_the_table_has_its_tests():
    for names in FAULTS.values():
        for file, _, name in (entry.partition("::") for entry in names):
            assert f"\ndef {name}" in (Path(__file__).parent / file).read_text(encoding="utf-8"), name


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != files.LOCK}


def manifest(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "manifest.json").read_text())


# --- data (7, 12) and whatever else changed since (27) -------------------------------------------------------------------------


def test_fault_07_duplicates_and_contradictions_are_counted_and_an_overlap_is_refused(options, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": " yes", "rejected": " no"} for i in range(10)]
    data = write(tmp_path / "d.jsonl", [*rows, rows[3], rows[3], {"prompt": "p5", "chosen": " no", "rejected": " yes"}])
    dpo.run(replace(options, data=[data], max_steps=1))
    audit = manifest(options.output)["audit"]
    assert (audit["duplicates"], audit["contradicting"]) == (2, 1)
    assert "1 records contradict an earlier one: " in (said := capsys.readouterr().err) and "d.jsonl:13" in said
    with pytest.raises(DataError, match=r"10 held-out prompts stand in the training data too \(.*e.jsonl:1"):
        dpo.run(replace(options, data=[data], eval_data=[write(tmp_path / "e.jsonl", rows)], output=options.output + "2"))
    assert not Path(options.output + "2").exists()


@pytest.fixture
def own(options, base, pairs, tmp_path) -> Dpo:
    """A run stopped after step 2, with a model, data and template of its own that can be changed."""
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(pairs, tmp_path / "pairs.jsonl")
    (tmp_path / "rule.py").write_text("def count(prompt, response):\n    return float(len(response))\n")
    wanted = replace(options, model=str(tmp_path / "model"), data=[str(tmp_path / "pairs.jsonl")],
                     eval_reward=f"python:{tmp_path / 'rule.py'}:count", max_steps=4)  # fmt: skip
    make.stop_after(dpo.run, wanted, 2)
    return wanted


def change_data(own: Dpo) -> None:
    path = Path(own.data[0])
    path.write_text(path.read_text().replace(" thanks", " thanky", 1))


def change_model(own: Dpo) -> None:
    make.model(seed=5).save_pretrained(own.model)


def change_tokeniser(own: Dpo) -> None:
    path = Path(own.model) / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["merges"].pop()  # 'the' is two tokens now
    path.write_text(json.dumps(table))


def change_template(own: Dpo) -> None:
    make.tokenizer(template=make.TEMPLATE).save_pretrained(own.model)


def change_rule(own: Dpo) -> None:
    Path(own.eval_reward.split(":")[1]).write_text("def count(prompt, response):\n    return 0.0\n")


def change_manifest(own: Dpo, *keys: str, to: Any) -> None:
    """The run was begun elsewhere."""
    found = manifest(own.output)
    place = found
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    files.write_json(Path(own.output) / "manifest.json", found)


# how -> (options given beside --resume, kinds that must be allowed, words of the list)
SINCE: dict[str, tuple[Callable[[Dpo], None], list[str], set[str], str]] = {
    "data": (change_data, [], {"data", "reference"}, r"data \(.*pairs\.jsonl\) [0-9a-f]{8} -> [0-9a-f]{8}; reference [0-9a-f]{8} ->"),
    "base": (change_model, [], {"base", "reference"}, r"base [0-9a-f]{8} -> "),
    "tokeniser": (change_tokeniser, [], {"tokeniser", "reference"}, r"tokeniser [0-9a-f]{8} -> "),
    "template": (change_template, [], {"template"}, r"template [0-9a-f]{8} -> "),
    "reward": (change_rule, [], {"reward"}, r"reward [0-9a-f]{8} -> "),
    "config": (lambda own: None, ["--lr", "0.01", "--loss.beta", "0.3"], {"config"},
               r"--lr 0\.002 -> 0\.01; --loss-arguments \{\} -> \{'beta': 0\.3\}"),
    "threads": (lambda own: change_manifest(own, "hardware", "threads", to=4), [], {"threads"}, "threads 4 -> 1"),
    "device": (lambda own: change_manifest(own, "hardware", "device", to="cuda"), [], {"device"}, "device cuda -> cpu"),
    "versions": (lambda own: change_manifest(own, "versions", "torch", to="2.0.0"), [], {"versions"}, r"torch 2\.0\.0 -> 2\."),
}  # fmt: skip


def test_every_kind_of_change_is_tried():
    assert set().union(*(kinds for _, _, kinds, _ in SINCE.values())) == set(CHANGES)


@pytest.mark.parametrize("what", SINCE)
def test_faults_12_and_27_what_changed_is_listed_and_refused_unless_allowed(what, own, capsys):
    change, words, kinds, listed = SINCE[what]
    folder = Path(own.output)
    change(own)
    as_it_was = everything(folder)
    command = ["dpo", "--resume", own.output, *words]
    assert main(command) == CheckpointError.exit_code
    said = capsys.readouterr().err
    assert re.search(listed, said), said
    allow = said.rpartition("--allow-change ")[2].split()
    assert set(allow) == kinds and everything(folder) == as_it_was
    for kind in allow if len(allow) > 1 else ():  # one by one: one alone is not enough
        assert main([*command, "--allow-change", kind]) == CheckpointError.exit_code
    assert main([*command, "--allow-change", *allow]) == 0
    said = capsys.readouterr().err
    assert "changed after step 2: " in said and "resumed after step 2" in said
    recorded = manifest(folder)["changes"]
    assert {c["step"] for c in recorded} == {2} and {c["kind"] for c in recorded} - {"no number depends on it"} == kinds
    assert [row["step"] for row in lines(folder / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert main(["dpo", "--resume", own.output]) == 0  # what was allowed is what the run is now
    assert "this run is finished" in capsys.readouterr().err


def test_fault_27_a_changed_option_is_obeyed_and_kept(own, tmp_path):
    make.stop_after(dpo.run, Dpo(resume=own.output, lr=0.01, allow_change=["config"]), 3)
    assert dpo.run(Dpo(resume=own.output)) == 0  # the change stands without being said again
    rates = [row["learning_rate"] for row in lines(Path(own.output) / "metrics.jsonl") if "loss" in row]
    wanted = [engine.schedule("linear", lr, steps=4, warmup=0.1)(i) for i, lr in enumerate((0.002, 0.002, 0.01, 0.01))]
    assert rates == wanted
    assert [c["step"] for c in manifest(own.output)["changes"]] == [2]
    command = json.loads((Path(own.output) / "results.json").read_text())["command"]
    assert "--lr 0.01" in command and "--resume" not in command and "--allow-change" not in command


def test_fault_27_a_change_that_a_lost_checkpoint_undid_happens_where_it_goes_on(own):
    make.stop_after(dpo.run, Dpo(resume=own.output, lr=0.01, allow_change=["config"]), 3)
    for step in (2, 3):  # back to before the change: keep is 2, so make a checkpoint of step 1 of it
        folder = Path(own.output) / "checkpoints" / f"step-{step:06d}"
        (folder / "state.json").write_text("") if step == 3 else None
    dpo.run(Dpo(resume=own.output))
    assert [c["step"] for c in manifest(own.output)["changes"]] == [2]


def test_fault_27_moved_files_and_free_options_are_obeyed_and_written_down(own, tmp_path, capsys):
    """The same bytes elsewhere are no change of the run; nor is what no number depends on. Neither is silent."""
    moved = shutil.move(own.data[0], tmp_path / "moved.jsonl")
    assert main(["dpo", "--resume", own.output, "--data", str(moved), "--keep", "5", "--offline"]) == 0
    said = capsys.readouterr().err
    assert "--data ['" in said and "--keep 2 -> 5" in said
    assert {c["name"]: c["kind"] for c in manifest(own.output)["changes"]} == dict.fromkeys(
        ("--data", "--keep", "--offline"), "no number depends on it"
    )
    assert main(["dpo", "--resume", own.output, "--allow-change", "base"]) == 0


FIXED = {"lora": 4, "seed": 5, "holdout": 0.5, "optimiser": "rmsprop", "freeze": "embed"}


@pytest.mark.parametrize("name", FIXED)
def test_fault_27_what_no_resumed_run_can_change_is_refused_even_if_allowed(name, own):
    before = everything(Path(own.output))
    with pytest.raises(UsageError, match=rf"--{name} .*cannot change it"):
        dpo.run(Dpo(resume=own.output, allow_change=["config"], **{name: FIXED[name]}))
    assert everything(Path(own.output)) == before


SWITCHED = {"reference_update": "soft", "eval_truth": "lexicon:x"}


@pytest.mark.parametrize("name", SWITCHED)
def test_what_a_resumed_run_cannot_switch_on_is_refused_in_words(name, own):
    before = everything(Path(own.output))
    with pytest.raises(UsageError, match=rf"--{name.replace('_', '-')} {SWITCHED[name]}: the run has none and cannot switch it: "):
        dpo.run(Dpo(resume=own.output, allow_change=["config", "reward"], **{name: SWITCHED[name]}))
    with pytest.raises(UsageError, match=r"--stop plateau and --publish reward look at a run from its start"):
        dpo.run(Dpo(resume=own.output, allow_change=["config"], publish="reward"))
    assert everything(Path(own.output)) == before


@pytest.mark.parametrize("what", ["data", "reward", "versions"])
def test_what_is_quick_to_compare_is_refused_before_anything_is_read(what, own, monkeypatch):
    SINCE[what][0](own)
    monkeypatch.setattr(intake, "read_records", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=rf"(?s){'torch' if what == 'versions' else what} .*--allow-change"):
        dpo.run(Dpo(resume=own.output))


def test_a_report_that_cannot_be_drawn_costs_nothing_but_the_report(options, monkeypatch, capsys):
    """Exit 11 with the command that writes it; model, results and the closing lines stand; --resume writes what is missing."""
    wanted = replace(options, max_steps=1, report=True, eval_every=1)
    with monkeypatch.context() as broken:
        broken.setattr(report, "write", lambda folder: 1 / 0)
        code = main(["dpo", *runs.command("dpo", wanted).split()[2:]])
    said, folder = capsys.readouterr(), Path(wanted.output)
    assert code == 11 and "ZeroDivisionError" in said.err and f"preftune report {folder} writes it" in said.err
    assert (folder / "results.json").is_file() and (folder / "model").is_dir() and "next   " in said.out
    assert not (folder / "report.html").exists()
    assert main(["dpo", "--resume", str(folder)]) == 0 and (folder / "report.html").is_file()
    assert "written" in capsys.readouterr().err


def test_fault_27_another_architecture_is_refused_by_the_weights_it_trains(own):
    make.model(intermediate_size=96).save_pretrained(own.model)
    with pytest.raises(CheckpointError, match="the checkpoint holds other weights than this run trains: .*mlp"):
        dpo.run(Dpo(resume=own.output, allow_change=["base", "reference"]))


def test_a_finished_run_goes_on_with_more_epochs_and_refuses_what_leaves_nothing_to_train(options, capsys):
    dpo.run(replace(options, epochs=1))
    with pytest.raises(CheckpointError, match=r"--epochs 1\.0 -> 3"):
        dpo.run(Dpo(resume=options.output, epochs=3))
    with pytest.raises(UsageError, match="4 steps are taken and these options ask for 2: nothing is left to train"):
        dpo.run(Dpo(resume=options.output, max_steps=2, allow_change=["config"]))
    make.stop_after(dpo.run, Dpo(resume=options.output, epochs=3, allow_change=["config"]), 6)
    assert not (Path(options.output) / "results.json").exists()
    assert dpo.run(Dpo(resume=options.output)) == 0
    assert [row["step"] for row in lines(Path(options.output) / "metrics.jsonl") if "loss" in row] == list(range(1, 13))
    assert manifest(options.output)["changes"][0]["step"] == 4


def test_two_runs_on_one_new_output_never_remove_each_other(tmp_path):
    final = tmp_path / "run"
    with pytest.raises(DiskError, match="not empty"), runs.publish_folder(final, owned=False) as staging:
        (staging / "config.yaml").write_text("mine")
        final.mkdir()
        (final / "config.yaml").write_text("theirs")
    assert (final / "config.yaml").read_text() == "theirs" and os.listdir(tmp_path) == ["run"]


# --- spikes (19) ------------------------------------------------------------------------------------------------------------------


def blank() -> engine.State:
    return engine.State(torch.nn.Linear(1, 1), {}, {}, torch.optim.SGD([torch.zeros(1)]), lambda step: 0.0, 0.0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > -30 else -x


# Losses of healthy runs, step by step. A random number generator of Python is the same everywhere.
NOISY: dict[str, Callable[[random.Random, int], float]] = {
    "dpo": lambda r, i: sum(softplus(r.gauss(2 * (1 - math.exp(-i / 200)), 2 * (1 - math.exp(-i / 100)) + 1e-3)) for _ in range(8)) / 8,
    "dpo, learned": lambda r, i: sum(softplus(r.gauss(8 * (1 - math.exp(-i / 200)), 3 * (1 - math.exp(-i / 100)))) for _ in range(32)) / 32,
    "sft": lambda r, i: (2 + 3 * math.exp(-i / 80)) * math.exp(r.gauss(0, 0.15)),
    "ipo": lambda r, i: sum((r.gauss(0.5, 1) - 1) ** 2 for _ in range(8)) / 8,
    "gamma": lambda r, i: r.gammavariate(4, 0.25),
    "constant": lambda r, i: 0.5,
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_fault_19_a_thousand_normal_steps_are_no_spike_and_a_leap_is(kind):
    for seed in range(5):
        state, rng = blank(), random.Random(seed)
        seen = [engine.spike(state, NOISY[kind](rng, i)) for i in range(1000)]
        assert seen == [None] * 1000, (seed, seen)
        assert engine.spike(state, 30.0) is not None
        assert engine.spike(state, NOISY[kind](rng, 1000)) is None  # and the leap itself does not count as normal


def test_fault_19_a_new_level_becomes_normal():
    state, rng = blank(), random.Random(0)
    for _ in range(100):
        engine.spike(state, rng.gauss(1, 0.1))
    seen = [engine.spike(state, rng.gauss(9, 0.1)) is not None for _ in range(60)]
    assert seen == [True] * 8 + [False] * 52


def test_fault_19_a_spike_names_its_records_and_the_run_goes_on_bitwise(options, tmp_path, capsys):
    """One reversed pair of weight 400 among learned ones: its batch leaps."""
    rows = [{"prompt": f"{i} q", "chosen": " thanks", "rejected": " no"} for i in range(48)]
    good = write(tmp_path / "good.jsonl", rows)
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "bad", "chosen": " no no no no", "rejected": " thanks thanks"}])
    seed, step = next((seed, i + 1) for seed in range(99) for i in range(30, 45) if Order(49, 1, 1, seed).records_of(i).tolist() == [48])
    wanted = replace(options, data=[good, f"{bad}:400"], holdout=0.0, eval_every=None, eval_prompts=0, batch_size=1, epochs=1, seed=seed,
                     beta=0.5, lr=1e-3, save_every=None)  # fmt: skip
    dpo.run(wanted)
    found = [row for row in lines(Path(options.output) / "metrics.jsonl") if "spike_records" in row]
    assert found[0]["step"] == step and found[0]["spike_records"] == [f"{bad}:1"]
    assert found[0]["loss"] > found[0]["spike_limit"]
    assert json.loads((Path(options.output) / "results.json").read_text())["spikes"][0]["spike_records"] == [f"{bad}:1"]
    said = capsys.readouterr().err
    assert f"step {step}: the loss leapt to " in said and "bad.jsonl:1" in said
    make.stop_after(dpo.run, replace(wanted, output=options.output + "2", save_every=1), step - 1)  # what it knows is saved too
    dpo.run(Dpo(resume=options.output + "2"))
    assert lines(Path(options.output) / "metrics.jsonl") == lines(Path(options.output + "2") / "metrics.jsonl")


# --- memory (20) ------------------------------------------------------------------------------------------------------------------


def hungry(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`real`, but from its call number `at` on it asks for more than any machine can address."""
    count = 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count >= at:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(*arguments)

    return call


def test_fault_20_out_of_memory_says_what_was_needed_and_what_to_lower(options, monkeypatch):
    """A real refusal by the allocator at step 3; the advice is then followed."""
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError) as caught:
        patch.setattr(engine, "accumulate", hungry(engine.accumulate, 3))
        dpo.run(options)
    said = str(caught.value)
    found = re.fullmatch(r"step 3: (\d+) tokens in one pass did not fit \((.+) more needed, (.+) free\); --micro-tokens (\d+) .*"
                         rf"; what was saved stands: --resume {options.output} .*--allow-change config goes on", said)  # fmt: skip
    assert found and caught.value.exit_code == 5, said
    assert found[2] == files.size_text(1 << 60) and int(found[4]) == int(found[1]) // 2
    assert checkpoints.latest(Path(options.output)).step == 2 and not (Path(options.output) / "model").exists()
    assert main(["dpo", "--resume", options.output, "--micro-tokens", found[4], "--allow-change", "config"]) == 0
    change = manifest(options.output)["changes"][0]
    assert (change["step"], change["kind"], change["name"], change["now"]) == (2, "config", "--micro-tokens", int(found[4]))


def test_fault_20_one_record_is_never_cut(options, monkeypatch):
    monkeypatch.setattr(engine, "accumulate", hungry(engine.accumulate, 1))
    with pytest.raises(OutOfMemoryError, match=r"one record is that long: --gradient-checkpointing, --max-length \d+ or --lora"):
        dpo.run(replace(options, micro_tokens=1))


def test_fault_20_memory_that_runs_out_in_an_evaluation_or_before_training_has_its_exit_code_too(options, monkeypatch):
    monkeypatch.setattr(pipeline, "held_out", lambda *a, **k: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(OutOfMemoryError, match=rf"more needed.*lower --micro-tokens .*--resume {options.output} "):
        dpo.run(options)
    monkeypatch.setattr(pipeline.reference, "fetch", lambda *a, **k: bytearray(1 << 60))
    with pytest.raises(OutOfMemoryError, match="lower --micro-tokens"):
        dpo.run(replace(options, output=options.output + "2"))
    assert not Path(options.output + "2").exists()


def test_fault_20_the_limit_of_the_process_counts_as_what_is_free(children):
    assert children.call(little_memory) == 0, children.said()


def little_memory() -> None:
    before = files.free_memory()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
    assert 0 < files.free_memory() <= 1 << 28 < before
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 29, dtype=torch.uint8)
    assert engine.is_memory(caught.value)
    with pytest.raises(MemoryError):
        bytearray(1 << 29)


# --- checkpoints (23, 24, 26); 22, 25 and 28 have other files --------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights.safetensors": flip, "optimizer.safetensors": cut, "state.json": Path.unlink,
    "manifest.json": lambda path: path.write_bytes(b""),
}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGE)
def test_fault_23_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(file, options, whole, capsys):
    """Each file, each kind of damage; all pairs of the two are in test_checkpoints.py."""
    make.stop_after(dpo.run, options, 7)
    DAMAGE[file](Path(options.output) / "checkpoints" / "step-000007" / file)
    dpo.run(Dpo(resume=options.output))
    said = capsys.readouterr().err
    assert f"checkpoint skipped: step-000007: {file}" in said and "resumed after step 6" in said
    same_run(whole, Path(options.output))


def test_fault_24_where_all_checkpoints_are_bad_nothing_is_overwritten_and_nothing_begins_anew(options, capsys):
    make.stop_after(dpo.run, options, 3)
    folder = Path(options.output)
    for path in (folder / "checkpoints").iterdir():
        flip(path / "optimizer.safetensors")
    before = everything(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step-000003: optimizer.*; step-000002: optimizer"):
        dpo.run(Dpo(resume=options.output))
    assert everything(folder) == before
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="its metrics tell of 3 steps, but no checkpoint is there"):
        dpo.run(Dpo(resume=options.output))
    assert everything(folder) == {k: v for k, v in before.items() if not k.startswith("checkpoints")}


def test_fault_24_a_shortened_log_is_refused(options):
    make.stop_after(dpo.run, options, 3)
    log = Path(options.output) / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: holds 2 lines, the checkpoint was written after 5"):
        dpo.run(Dpo(resume=options.output))


def test_fault_26_resumed_twice_and_after_the_last_step_there_is_no_extra_step_or_line(options, whole):
    make.stop_after(dpo.run, options, 3)
    folder = Path(options.output)
    for _ in range(2):  # twice from the same checkpoint: the lines after it are written anew, not twice
        with pytest.raises(make.Stopped), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "save", stop_instead)
            dpo.run(Dpo(resume=options.output))
        assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [0, 1, 2, 2, 3, 4, 4]
    make.stop_after(dpo.run, Dpo(resume=options.output), 8)
    dpo.run(Dpo(resume=options.output))
    finished = everything(folder)
    dpo.run(Dpo(resume=options.output))
    assert everything(folder) == finished
    steps = [row["step"] for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 9)) and [r["step"] for r in lines(folder / "metrics.jsonl") if "loss" not in r] == [
        0,
        2,
        4,
        6,
        8,
    ]
    same_run(whole, folder)


def stop_instead(*_: Any, **__: Any) -> None:
    raise make.Stopped


# --- the disk (29) ----------------------------------------------------------------------------------------------------------------


def limited(options: Dpo, name: str, spare: int) -> int:
    """A run in whose step 3 no file may grow by more than `spare` bytes beyond the largest that stands."""
    real = getattr(checkpoints if name == "save" else runs, name)

    def limit_first(*arguments: Any, **rest: Any) -> Any:
        if checkpoints.latest(Path(str(options.output))) and checkpoints.latest(Path(str(options.output))).step == 2:
            size = (Path(str(options.output)) / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + spare, size + spare))
        return real(*arguments, **rest)

    setattr(checkpoints if name == "save" else runs, name, limit_first)
    return dpo.run(options)


@pytest.mark.parametrize(("name", "file"), [("save", "step-000003"), ("append_jsonl", "metrics.jsonl")])
def test_fault_29_no_room_while_saving_or_logging_keeps_what_was_there(name, file, options, whole, children):
    status = children.call(limited, options, name, 20)
    assert status == DiskError.exit_code == 6, children.said()
    assert f"{file}: cannot be written" in children.said() and "what was there before is intact" in children.said()
    folder = Path(options.output)
    assert checkpoints.latest(folder).step == 2 and not list(folder.rglob(".tmp*")) and not (folder / "model").exists()
    assert dpo.run(Dpo(resume=options.output)) == 0
    same_run(whole, folder)


def test_fault_29_a_model_that_cannot_be_written_is_a_disk_error_and_leaves_no_half(options, whole, children):
    """safetensors wraps what the system said; the checkpoint is whole, so that the run ends as soon as there is room."""
    status = children.call(limited_at_the_end, options)
    assert status == 6 and "model: cannot be written" in children.said(), children.said()
    folder = Path(options.output)
    assert not (folder / "model").exists() and not list(folder.glob(".*staging")) and checkpoints.latest(folder).step == 8
    assert dpo.run(Dpo(resume=options.output)) == 0
    same_run(whole, folder)


def limited_at_the_end(options: Dpo) -> int:
    real = pipeline.models.save

    def save(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        real(*arguments)

    pipeline.models.save = save
    return dpo.run(options)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "preftune-test", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}; the limit on file sizes above stands for it")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_fault_29_a_full_file_system_is_survived(small_disk, options, whole, monkeypatch):
    """ENOSPC itself, in a step's save; the check of free space before is told that there is plenty."""
    monkeypatch.setattr(runs, "require_space", lambda *_: None)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda _: 1 << 40)
    wanted = replace(options, output=str(small_disk / "run"))
    saved = checkpoints.save

    def fill_then_save(folder, step, *rest, **more):
        if step == 3:
            with open(small_disk / "ballast", "wb", buffering=0) as file:
                while files.free_bytes(small_disk) > 8192:
                    file.write(b"x" * 4096)
        return saved(folder, step, *rest, **more)

    monkeypatch.setattr(checkpoints, "save", fill_then_save)
    with pytest.raises(DiskError, match=r"step-000003: cannot be written: the disk is full \(.* needed, .* free"):
        dpo.run(wanted)
    monkeypatch.setattr(checkpoints, "save", saved)
    assert checkpoints.latest(small_disk / "run").step == 2
    (small_disk / "ballast").unlink()
    dpo.run(Dpo(resume=wanted.output, keep=1))
    assert lines(whole / "metrics.jsonl") == lines(small_disk / "run" / "metrics.jsonl")


# --- signals (30) -----------------------------------------------------------------------------------------------------------------


def signalled(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, at: int, number: int) -> None:
    """The process sends itself a signal inside call number `at` of `place.name`."""
    real, count = getattr(place, name), 0

    def call(*arguments: Any, **rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
        return real(*arguments, **rest)

    monkeypatch.setattr(place, name, call)


# where -> (room, function, its call, the step after which the run has stopped)
MOMENTS = {
    "in a step": (engine, "accumulate", 5, 5), "between a step's gradient and its weights": (engine, "publish", 5, 5),
    "while saving": (checkpoints, "_read_back", 4, 3), "while logging": (runs, "append_jsonl", 9, 3),
    "in an evaluation": (pipeline, "held_out", 3, 4), "while generating": (pipeline, "draw", 3, 4),
    "in the first evaluation": (pipeline, "draw", 1, 0), "at the last step": (engine, "accumulate", 8, 8),
}  # fmt: skip


BOTH = [(moment, signal.SIGTERM) for moment in MOMENTS] + [(moment, signal.SIGINT) for moment in ("in a step", "while generating")]


@pytest.mark.parametrize(("moment", "number"), BOTH, ids=[f"{moment}, {number.name}" for moment, number in BOTH])
def test_fault_30_a_signal_saves_and_the_run_goes_on_bitwise(moment, number, options, whole, monkeypatch, capsys):
    room, name, at, step = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        signalled(patch, room, name, at, number)
        dpo.run(options)
    assert caught.value.exit_code == 128 + number
    assert f"--resume {options.output}" in str(caught.value) and "again: at once" in capsys.readouterr().err
    assert signal.getsignal(number) is not None and checkpoints.latest(Path(options.output)).step == step
    dpo.run(Dpo(resume=options.output))
    same_run(whole, Path(options.output))


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_fault_30_through_the_door_the_exit_code_is_the_signals(verb, options, monkeypatch, capsys):
    shared = {
        f: getattr(options, f) for f in ("model", "data", "output", "lr", "batch_size", "eval_prompts", "report", "threads")
    }
    wanted = Sft(**shared, preferred=True) if verb == "sft" else Dpo(**shared)
    words = runs.command(verb, wanted).split()[1:]
    signalled(monkeypatch, engine, "accumulate", 2, signal.SIGTERM)
    assert main(words) == 143
    assert f"preftune {verb} --resume {options.output}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([verb, "--resume", options.output]) == 0


def evaluate_for_ever(options: Dpo, sign: str) -> int:
    """A run whose first evaluation after step 2 never ends."""
    real = pipeline.draw

    def draw(model: Any, *arguments: Any, **rest: Any) -> Any:
        if (Path(str(options.output)) / "checkpoints" / "step-000001").is_dir():
            Path(sign).touch()
            while True:
                time.sleep(0.01)
        return real(model, *arguments, **rest)

    pipeline.draw = draw
    return dpo.run(options)


def test_fault_30_a_second_signal_ends_the_process_at_once(options, whole, children, tmp_path):
    sign = tmp_path / "sign"
    pid = children.start(evaluate_for_ever, options, sign)
    child.until(sign.exists)
    os.kill(pid, signal.SIGTERM)
    child.until(lambda: "again: at once" in children.said())
    os.kill(pid, signal.SIGINT)
    assert children.wait() == 130
    assert checkpoints.latest(Path(options.output)).step == 1
    dpo.run(Dpo(resume=options.output))
    same_run(whole, Path(options.output))


# --- two processes (31) -----------------------------------------------------------------------------------------------------------


def test_fault_31_a_run_that_another_process_trains_is_refused_and_a_stale_lock_taken_over(options, whole, children, tmp_path):
    sign = tmp_path / "sign"
    pid = children.start(evaluate_for_ever, options, sign)
    child.until(sign.exists)
    before = everything(Path(options.output))
    with pytest.raises(DiskError, match=rf"process {pid} on \S+ works in this run folder"):
        dpo.run(Dpo(resume=options.output))
    with pytest.raises(UsageError, match="not empty"):
        dpo.run(options)
    assert everything(Path(options.output)) == before
    os.kill(pid, signal.SIGKILL)
    assert children.wait() == -signal.SIGKILL
    dpo.run(Dpo(resume=options.output))
    same_run(whole, Path(options.output))


def test_sft_has_the_same_pipeline(options, tmp_path, capsys):
    """The faults above are of `pipeline`, which both verbs run; one of each kind for sft."""
    shared = {
        f: getattr(options, f)
        for f in ("model", "data", "output", "lr", "batch_size", "eval_prompts", "report", "threads", "save_every")
    }
    wanted = Sft(**shared, preferred=True)
    make.stop_after(sft.run, wanted, 3)
    flip(Path(options.output) / "checkpoints" / "step-000003" / "weights.safetensors")
    assert main(["sft", "--resume", options.output, "--warmup", "0.5"]) == 7
    assert "--warmup 0.1 -> 0.5" in capsys.readouterr().err
    assert main(["sft", "--resume", options.output, "--warmup", "0.5", "--allow-change", "config"]) == 0
    assert "checkpoint skipped: step-000003: weights" in capsys.readouterr().err
