"""What trains and how: frozen weights, adapters given and made, optimisers, early stop, trackers, memory; each resumes bit for bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_dpo import same_run
from transformers import AutoModelForCausalLM

from preftune import checkpoints, engine, models, pipeline, trackers
from preftune.config import Dpo, Sft
from preftune.errors import CheckpointError, ModelError, UsageError
from preftune.readout import as_reference
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
    return Dpo(model=str(base), data=[str(pairs)], output=str(tmp_path / "run"), lr=2e-3, epochs=1, batch_size=8, sample_tokens=4,
               eval_prompts=2, holdout=0.2, report=False, threads=1)  # fmt: skip


def read(folder: str | Path, name: str) -> dict[str, Any]:
    return json.loads((Path(folder) / name).read_text())


def resumes_bitwise(wanted: Dpo, tmp_path: Path, *stops: int) -> Path:
    """The whole run, and runs killed after these checkpoints and resumed: the same bytes."""
    whole = replace(wanted, output=str(tmp_path / "whole"), save_every=1, keep=99)
    dpo.run(whole)
    for stop in stops:
        cut = tmp_path / f"cut{stop}"
        make.stop_after(dpo.run, replace(whole, output=str(cut)), stop)
        dpo.run(Dpo(resume=str(cut)))
        same_run(tmp_path / "whole", cut)
    return tmp_path / "whole"


# --- frozen weights ------------------------------------------------------------------------------------------------------------

FREEZE = [
    ("embed", {"model.embed_tokens.weight"}, 1),
    ("head", {"lm_head.weight"}, 1),
    ("embed, head,model.norm", {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}, 3),
    ("layers.0", "model.layers.0.", 9),
    ("layers.0-1", "model.layers.", 18),
    ("model.layers.1.mlp", "model.layers.1.mlp.", 3),
    ("*.self_attn.?_proj.weight", "model.layers.", 8),
]


@pytest.mark.parametrize(("names", "expected", "count"), FREEZE, ids=[row[0] for row in FREEZE])
def test_freeze_stops_exactly_what_it_names(names, expected, count):
    model = make.model()
    frozen = models.freeze(model, names)
    assert len(frozen) == count == sum(not p.requires_grad for p in model.parameters())
    assert set(frozen) == expected if isinstance(expected, set) else all(n.startswith(expected) for n in frozen)


def test_freeze_finds_layers_whatever_they_are_called():
    assert all(n.startswith("transformer.h.1.") for n in models.freeze(make.model("gpt2"), "layers.1"))


REFUSED = [
    ("embd", "no weight of this model has such a name (did you mean 'embed'?)"),
    ("model.layers.0.mpl", "(did you mean 'model.layers.0.mlp'?)"),
    ("layers.0-2", "this model has layers 0 to 1"),
    ("layers.1-0", "this model has layers 0 to 1"),
    ("embed,", "--freeze : no weight"),
    ("*", "nothing would train: all 21 weights"),
]


@pytest.mark.parametrize(("names", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_freeze_refuses_what_it_cannot_do(names, words):
    model = make.model()
    with pytest.raises(UsageError) as error:
        models.freeze(model, names)
    assert words in str(error.value) and all(p.requires_grad for p in model.parameters())


def test_tied_ends_freeze_together_or_not_at_all():
    for names in ("embed", "head", "embed,layers.0"):
        with pytest.raises(UsageError, match="one tensor in this model"):
            models.freeze(make.model(tie_word_embeddings=True), names)
    assert models.freeze(make.model(tie_word_embeddings=True), "embed,head") == ["model.embed_tokens.weight"]


def test_a_run_with_frozen_weights(options, base, tmp_path):
    """Frozen weights come out bit for bit as they went in, the others move; no moments are kept for them; it resumes."""
    folder = resumes_bitwise(replace(options, freeze="embed,layers.0"), tmp_path, 2)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {"model.embed_tokens.weight", *(n for n in before if n.startswith("model.layers.0."))}
    trained = read(folder, "manifest.json")["trained"]
    assert set(trained["frozen"]) == still and trained["tensors"] == len(before) - 10
    assert trained["parameters"] == sum(before[n].numel() for n in before if n not in still) < trained["of"]
    found = checkpoints.latest(folder)
    assert {n.split("|")[0] for n in found.tensors("optimizer")} == set(before) - still == set(found.tensors("weights"))


# --- optimisers ----------------------------------------------------------------------------------------------------------------


def test_rmsprop_is_the_papers_update():
    """One step by hand: v = 0.01 g^2, w - lr g / (sqrt(v) + 1e-8) = w - 10 lr sign(g)."""
    model = make.model()
    state = engine.make_state(model, rate=lambda step: 0.01, clip=0.0, optimiser="rmsprop")
    before = {n: w.detach().clone() for n, w in state.weights.items()}
    for w in state.weights.values():
        w.grad = torch.full_like(w, -0.5)
    state.optimizer.step()
    for name, w in state.weights.items():
        assert torch.allclose(w, before[name] + 0.1, atol=1e-6), name


@pytest.mark.parametrize("extra", [{}, {"dtype": "bf16"}], ids=["fp32", "bf16"])
def test_rmsprop_resumes_bitwise(extra, options, tmp_path):
    folder = resumes_bitwise(replace(options, optimiser="rmsprop", lr=3e-4, **extra), tmp_path, 1, 3)
    moments = checkpoints.latest(folder).tensors("optimizer")
    assert {n.split("|")[1] for n in moments} == {"step", "square_avg"}
    results = read(folder, "results.json")
    assert results["after"]["eval/loss"] < results["before"]["eval/loss"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bit_moments_resume_bitwise(tmp_path, options, pairs):
    """Weights of 4,096 numbers or more have moments in 8 bits."""
    model = make.write_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    folder = resumes_bitwise(replace(options, model=str(model), optimiser="adamw-8bit"), tmp_path, 1, 3)
    moments = checkpoints.latest(folder).tensors("optimizer")
    assert {t.dtype for n, t in moments.items() if n.endswith("|state1")} == {torch.uint8, torch.float32}
    results = read(folder, "results.json")
    assert results["after"]["eval/loss"] < results["before"]["eval/loss"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bit_without_its_library_is_refused_first(options):
    with pytest.raises(UsageError, match=r"needs bitsandbytes: pip install 'preftune\[8bit\]'"):
        dpo.run(replace(options, optimiser="adamw-8bit", model="./nowhere", data=["nowhere.jsonl"]))


# --- early stop ----------------------------------------------------------------------------------------------------------------


def watched(losses: list[float], least: float = 0.0) -> list[tuple[bool, float, float]]:
    state = engine.make_state(torch.nn.Linear(1, 1), rate=lambda step: 0.1, clip=0.0)
    out = []
    for state.step, loss in enumerate(losses):
        lowest = engine.watch_held_out(state, loss, least=least)
        out.append((lowest, state.watch["best_step"], state.watch["waited"]))
    return out


def test_patience_counts_evaluations_since_the_last_real_improvement():
    """By hand: (lowest so far, step of the lowest, evaluations waited)."""
    assert watched([1.0, 0.9, 0.9, 0.95, 0.8]) == [(True, 0, 0), (True, 1, 0), (False, 1, 1), (False, 1, 2), (True, 4, 0)]
    # Slow progress is progress in the end: 0.95 and 0.91 are lower, but only 0.89 is 0.1 below the mark of 1.0.
    assert watched([1.0, 0.95, 0.91, 0.89, 0.88], 0.1) == [(True, 0, 0), (True, 1, 1), (True, 2, 2), (True, 3, 0), (True, 4, 1)]


@pytest.fixture
def turning(options, tmp_path) -> Dpo:
    """A quarter of the held-out pairs says the opposite: their loss is lowest at a margin of ln 3 and rises beyond it."""
    rows = [{"prompt": f"q{i}", "chosen": " thanks", "rejected": " no"} for i in range(12)]
    rows[::4] = [{"prompt": r["prompt"], "chosen": " no", "rejected": " thanks"} for r in rows[::4]]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(options, eval_data=[str(held)], holdout=0.1, lr=0.02, eval_every=1, warmup=0)


def test_an_early_stop_publishes_the_best_and_resumes_bitwise(turning, tmp_path):
    wanted = replace(turning, epochs=3, patience=3, keep=1)
    dpo.run(replace(wanted, output=str(tmp_path / "whole"), save_every=1))
    whole = tmp_path / "whole"
    results = read(whole, "results.json")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert best > 0
    assert results["steps"] == best + 3 == max(losses) < 15 and results["best_step"] == best
    assert results["published"] == {"step": best, "why": "best"} and results["after"]["step"] == best
    assert results["stopped_early"]["best_loss"] == losses[best] and results["stopped_early"]["patience"] == 3
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {f"step-{s:06d}" for s in (best, results["steps"])}
    kept, model = checkpoints.at(whole, best).tensors("weights"), load_file(whole / "model" / "model.safetensors")
    assert all(torch.equal(kept[n], model[n]) for n in kept)
    for stop in (best + 1, best + 3):
        cut = tmp_path / f"cut{stop}"
        make.stop_after(dpo.run, replace(wanted, output=str(cut), save_every=1), stop)
        dpo.run(Dpo(resume=str(cut)))
        same_run(whole, cut)
        found = read(cut, "results.json")
        assert found["published"] == results["published"] and found["stopped_early"] == results["stopped_early"]


def test_what_is_published_is_chosen_apart_from_the_stop(turning, tmp_path):
    """--publish best without patience runs to the end; the best is saved even where --save-every passes it by. last with patience."""
    wanted = replace(turning, save_every=100)
    dpo.run(replace(wanted, publish="best"))
    results = read(wanted.output, "results.json")
    assert results["steps"] == 5 > results["published"]["step"] == results["best_step"] and results["stopped_early"] is None
    dpo.run(replace(wanted, patience=1, publish="last", output=wanted.output + "2"))
    results = read(wanted.output + "2", "results.json")
    assert results["published"] == {"step": results["steps"], "why": "last"} and results["stopped_early"]["best_step"] < results["steps"]
    assert results["after"]["step"] == results["steps"]


def test_a_spoilt_best_checkpoint_is_told_and_no_model_is_written(turning):
    wanted = replace(turning, save_every=1, publish="best", keep=1)
    make.stop_after(dpo.run, wanted, 5)
    best = int(checkpoints.latest(Path(wanted.output)).state["needs"][0])
    (Path(wanted.output) / "checkpoints" / f"step-{best:06d}" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"step-{best:06d}: cannot be used: weights.safetensors: 0 bytes"):
        dpo.run(Dpo(resume=wanted.output))
    assert not (Path(wanted.output) / "model").exists()


# --- adapters ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(base, pairs, tmp_path_factory) -> Path:
    """An adapter made by `sft`, large enough to matter."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    sft.run(Sft(model=str(base), data=[str(pairs)], output=str(folder), preferred=True, lora=2, lr=2e-2, epochs=2, batch_size=8,
                eval_prompts=0, report=False, threads=1))  # fmt: skip
    return folder / "adapter"


IDS = torch.randint(0, 262, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def by_plain_peft(folder: Path) -> torch.Tensor:
    """The adapter on the base that it names, by transformers and peft alone."""
    named = read(folder, "adapter_config.json")["base_model_name_or_path"]
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder).eval())


def trained_logits(folder: Path, options: Dpo) -> torch.Tensor:
    """The model of the last checkpoint, put together as training has it."""
    setup = pipeline.prepare(dpo.TASK, options)
    state = engine.make_state(setup.model, rate=lambda step: 0.0, clip=0.0)
    engine.restore_weights(state, checkpoints.latest(folder).tensors("weights"))
    return logits(setup.model)


@pytest.mark.parametrize("extra", [{"lora": 4, "lora_targets": "q_proj,down_proj"}, {"adapter": "continue"}], ids=["stacked", "continued"])
def test_an_adapter_is_stood_upon_or_goes_on(extra, options, given, base, tmp_path):
    """Start = the adapter as given; what is saved, merged or as an adapter on the first base, is what was trained; it resumes."""
    wanted = replace(options, model=str(given), lr=2e-2, **extra)
    folder = resumes_bitwise(wanted, tmp_path, 2)
    manifest, results = read(folder, "manifest.json"), read(folder, "results.json")
    assert manifest["self_check"]["start_loss"] == pytest.approx(0.6931, abs=1e-4) and results["before"]["kl_sequence_rb"] < 1e-6
    assert results["after"]["kl_sequence_rb"] > 0.01 and results["after"]["eval/loss"] < results["before"]["eval/loss"]
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    trained = trained_logits(folder, wanted)
    start = by_plain_peft(given)
    assert (trained - start).abs().max() > 0.05 < (start - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()
    assert torch.allclose(merged, trained, atol=2e-5)
    assert read(folder / "adapter", "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert torch.allclose(by_plain_peft(folder / "adapter"), trained, atol=2e-5)


@pytest.mark.parametrize("extra", [{"lora": 4}, {"adapter": "continue"}], ids=["stacked", "continued"])
def test_the_reference_stays_the_adapter_as_given(extra, options, given):
    """Bit for bit, whatever the trained weights become; and training goes on with the trained ones afterwards."""
    setup = pipeline.prepare(dpo.TASK, replace(options, model=str(given), **extra))
    assert setup.frozen is None
    with as_reference(setup.model, None) as frozen:
        before = logits(frozen)
    with torch.no_grad():
        for p in setup.model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    moved = logits(setup.model)
    with as_reference(setup.model, None) as frozen:
        assert torch.equal(logits(frozen), before)
    assert torch.equal(logits(setup.model), moved) and not torch.equal(moved, before)
    assert torch.allclose(before, by_plain_peft(given), atol=2e-5)
    live = {n for n, p in setup.model.named_parameters() if p.requires_grad}
    assert live and all(".default." in n for n in live) and setup.manifest["trained"]["tensors"] == len(live)


def test_an_adapter_that_does_not_add_up_leaves_only_the_merged_model(options, given, tmp_path):
    """rank_pattern gives modules scales of their own: no adapter/ is written and the manifest says why."""
    odd = tmp_path / "odd"
    shutil.copytree(given, odd)
    spec = read(odd, "adapter_config.json") | {"alpha_pattern": {"q_proj": 7}}
    (odd / "adapter_config.json").write_text(json.dumps(spec))
    dpo.run(replace(options, model=str(odd), lora=2, max_steps=1))
    assert "is not plain LoRA, so only model/" in read(options.output, "manifest.json")["trained"]["adapter"]
    assert (Path(options.output) / "model").is_dir() and not (Path(options.output) / "adapter").exists()


def test_adapter_folders_that_are_refused(options, given, tmp_path):
    with pytest.raises(UsageError, match="--adapter continue: .* is not an adapter folder"):
        dpo.run(replace(options, adapter="continue"))
    for change, words in (({"use_dora": True, "lora_bias": True}, "cannot be loaded as a LoRA adapter|lacks"),
                          ({"base_model_name_or_path": None}, "names no base model")):  # fmt: skip
        bad = tmp_path / next(iter(change))
        shutil.copytree(given, bad)
        (bad / "adapter_config.json").write_text(json.dumps(read(given, "adapter_config.json") | change))
        with pytest.raises(ModelError, match=words):
            dpo.run(replace(options, model=str(bad)))
    pickled = tmp_path / "pickled"
    shutil.copytree(given, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle such as .* is never read"):
        dpo.run(replace(options, model=str(pickled), adapter="continue"))
    assert not Path(options.output).exists()


# --- trackers ------------------------------------------------------------------------------------------------------------------


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every scalar in TensorBoard's files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = [event for path in sorted(folder.iterdir()) for event in EventFileLoader(str(path)).Load()]
    return [(event.step, value.tag, value.tensor.float_val[0]) for event in found for value in event.summary.value]


def test_tensorboard_holds_every_row_once_after_a_resume_too(options, tmp_path):
    pytest.importorskip("tensorboard")
    wanted = replace(options, track=["tensorboard"], eval_every=2, save_every=1)
    make.stop_after(dpo.run, wanted, 2)
    dpo.run(Dpo(resume=wanted.output))
    folder = Path(wanted.output)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], k, v) for r in rows for k, v in r.items() if k != "step" and isinstance(v, (int, float))]
    got = events(folder / "tensorboard")
    assert [e[:2] for e in got] == [e[:2] for e in expected] and len(got) > 50
    assert all(a[2] == pytest.approx(b[2], rel=1e-6, abs=1e-30) for a, b in zip(got, expected, strict=True))
    assert not (folder / "tracking.json").exists()  # for trackers whose store outlives the folder


def test_a_store_that_outlives_the_run_gets_no_row_twice(tmp_path, monkeypatch):
    """A run that sent six rows and resumes after four: rows five and six are computed again and not sent again."""
    got: list[tuple[int, dict[str, float]]] = []

    @contextmanager
    def store(folder: Path, run: str) -> Any:
        yield lambda step, values: got.append((step, values))

    monkeypatch.setitem(trackers.TRACKERS, "wandb", store)
    rows = [{"step": i, "loss": i / 2, "text": "x", "none": None} for i in range(8)]
    with trackers.tracking(["wandb"], tmp_path, []) as track:
        for row in rows[:6]:
            track(row)
    with trackers.tracking(["wandb"], tmp_path, rows[:4]) as track:
        for row in rows[4:]:
            track(row)
    assert got == [(i, {"loss": i / 2}) for i in range(8)]


def test_trackers_are_refused_before_anything_is_read(options, monkeypatch):
    unread = replace(options, model="./nowhere", data=["nowhere.jsonl"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--track trackio: trackio is not installed: pip install 'preftune\[track\]'"):
        dpo.run(replace(unread, track=["trackio"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match="no WANDB_API_KEY in the environment"):
        dpo.run(replace(unread, track=["wandb"]))
    with pytest.raises(UsageError, match="--track wandb: needs the network, which --offline refuses"):
        dpo.run(replace(unread, track=["wandb"], offline=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.require(["wandb", "trackio"], offline=True)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    with pytest.raises(UsageError, match="TRACKIO_SPACE_ID sends it over the network"):
        trackers.require(["trackio"], offline=True)
