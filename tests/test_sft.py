"""`sft`: imitates answers, and with --preferred only the preferred ones; the same run directory and the same exact resume."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import make
import pytest
from test_dpo import lines, same_run

from preftune import checkpoints, pipeline
from preftune.config import Dpo, Sft
from preftune.errors import DataError, UsageError
from preftune.records import Judgement, Record, Response
from preftune.stages import dpo, sft


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    os.environ["PREFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def options(base, tmp_path) -> Sft:
    data = make.write_pairs(tmp_path / "pairs.jsonl", 40)
    return Sft(model=str(base), data=[str(data)], output=str(tmp_path / "run"), preferred=True, lr=1e-2, epochs=12, batch_size=8,
               sample_tokens=8, eval_prompts=4, holdout=0.2, report=False, threads=1)  # fmt: skip


def test_it_imitates_the_preferred_answers(options):
    assert sft.run(replace(options, report=True, epochs=40, eval_every=80)) == 0
    folder = Path(options.output)
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["eval/loss"] < results["before"]["eval/loss"] / 2 and results["stage"] == "sft"
    late = [r["response"] for r in lines(folder / "samples.jsonl") if r["step"] == results["after"]["step"]]
    assert sum("thank" in text for text in late) >= 3 and not any(text.startswith(" no") for text in late)
    assert (folder / "report.html").stat().st_size > 10_000


def test_only_the_best_tier_is_imitated():
    record = Record("p", tuple(Response(t) for t in "abcd"), (Judgement(((2,), (0, 1)), below=(3,)),))
    assert [r.text for r in sft.preferred(record)] == ["c"]
    tied = replace(record, judgements=(Judgement(((0, 1), (2,))), Judgement(((3,), (0,)))))
    assert [r.text for r in sft.preferred(tied)] == ["a", "b", "d"]
    labelled = replace(record, judgements=(), labels=(True, None, False, True))
    assert [r.text for r in sft.preferred(labelled)] == ["a", "d"]


def test_judged_data_without_preferred_is_refused_and_the_reverse(options, tmp_path):
    with pytest.raises(DataError, match=r"40 of 40 records say which answer is better.*pairs.jsonl:1.*--preferred"):
        sft.run(replace(options, preferred=False))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"prompt": f"p{i}", "responses": [" yes"]}) + "\n" for i in range(10)))
    with pytest.raises(DataError, match="no record says which answer is preferred"):
        sft.run(replace(options, data=[str(plain)]))
    assert sft.run(replace(options, data=[str(plain)], preferred=False, max_steps=1)) == 0


RESUMED = {
    "full": {},
    "lora": {"lora": 4},
    "accumulated": {"micro_tokens": 40},
    "lora accumulated": {"lora": 4, "micro_tokens": 40},
}


@pytest.mark.parametrize("extra", RESUMED.values(), ids=RESUMED)
def test_fault_25_resume_is_bitwise(extra, options, tmp_path):
    """Stopped inside an epoch, at its end and at the last step, all in one run."""
    wanted = replace(options, output=str(tmp_path / "whole"), eval_every=3, save_every=1, keep=99, epochs=2, lr=3e-3, **extra)
    sft.run(wanted)
    assert checkpoints.latest(tmp_path / "whole").step == 8
    going = replace(wanted, output=str(tmp_path / "cut"))
    for stop in (1, 4, 8):
        make.stop_after(sft.run, going, stop)
        going = Sft(resume=str(tmp_path / "cut"))
    sft.run(going)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_of_one_verb_is_not_resumed_by_another(options):
    sft.run(replace(options, max_steps=1))
    with pytest.raises(UsageError, match="a run of sft; continue it with preftune sft --resume"):
        pipeline.run(dpo.TASK, Dpo(resume=options.output))


def test_the_model_that_sft_leaves_is_the_reference_of_dpo(options, tmp_path):
    sft.run(replace(options, max_steps=3))
    tuned = Dpo(model=options.output, data=options.data, output=str(tmp_path / "dpo"), max_steps=2, threads=1, eval_prompts=2,
                sample_tokens=4, report=False)  # fmt: skip
    assert dpo.run(tuned) == 0
    found = json.loads((tmp_path / "dpo" / "manifest.json").read_text())["self_check"]
    assert found["start_loss"] == pytest.approx(0.6931, abs=1e-4)
