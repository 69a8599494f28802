"""The Python API: the verbs as functions, runs as objects; the same options, the same files, the same errors."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import make
import pytest
from test_dpo import same_run
from test_report import Page
from transformers import AutoModelForCausalLM

import preftune
from preftune import api, cli
from preftune.config import specs
from preftune.errors import CheckpointError, DataError, ModelError, UsageError
from preftune.stages import dpo

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"lr": 1e-2, "epochs": 2, "batch_size": 8, "sample_tokens": 6, "eval_prompts": 3, "threads": 1}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    os.environ["PREFTUNE_CACHE"] = str(folder / "cache")
    make.write_model(folder / "base")
    make.write_pairs(folder / "pairs.jsonl", 30)
    (folder / "judge.py").write_text("def judge(prompt, response):\n    return float(response.count('h'))\n")
    return folder


@pytest.fixture(scope="module")
def run(world) -> api.Run:
    return preftune.dpo(model=world / "base", data=world / "pairs.jsonl", output=world / "run", beta=0.2, loss="simpo",
                        loss_arguments={"gamma": 0.5}, eval_reward=f"python:{world / 'judge.py'}:judge", **SMALL)  # fmt: skip


def test_importing_the_package_costs_nothing():
    heavy = {"torch", "transformers", "numpy", "yaml", "jinja2", "matplotlib"}
    program = (f"import sys, preftune; found = {{*sys.modules}} & {heavy!r}; preftune.dpo; preftune.load_run;"
               f"print(sorted(found), sorted({{*sys.modules}} & {heavy - {'yaml'}!r}))")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[] []", done.stdout + done.stderr
    assert set(preftune.__all__) <= set(dir(preftune)) and all(getattr(preftune, name) for name in preftune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'dppo'"):
        _ = preftune.dppo


def test_a_run_is_the_run_of_the_command_line(world, run, tmp_path):
    words = ["dpo", "--model", world / "base", "--data", world / "pairs.jsonl", "--output", tmp_path / "run", "--beta", 0.2,
             "--loss", "simpo", "--loss.gamma", 0.5, "--eval-reward", f"python:{world / 'judge.py'}:judge"]  # fmt: skip
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert cli.main([str(word) for word in words]) == 0
    same_run(run.folder, tmp_path / "run")
    ours, theirs = ((folder / "config.yaml").read_text() for folder in (run.folder, tmp_path / "run"))
    assert ours.replace(str(run.folder), "OUT") == theirs.replace(str(tmp_path / "run"), "OUT")


def test_the_properties_are_the_files(run):
    assert run.finished and run.results == json.loads((run.folder / "results.json").read_text())
    assert run.metrics == lines(run.folder / "metrics.jsonl") and len(run.metrics) > 5
    assert run.samples == lines(run.folder / "samples.jsonl") and run.manifest["records"]["read"] == 30
    assert run.report.is_file() and AutoModelForCausalLM.from_pretrained(run.model)
    assert preftune.load_run(str(run.folder)) == run == preftune.load_run(run.folder)


def test_a_run_shown_as_text(run):
    text = repr(run)
    rate = 100 * run.results["after"]["eval/rewards/accuracies"]
    assert text.startswith(f"Run({str(run.folder)!r}): dpo\n") and f"held-out accuracy         {rate:.1f}%  95%:" in text
    assert "KL to the reference" in text and "change of sampled reward" in text and "tokens per answer" in text


def test_a_run_shown_in_a_notebook(run):
    html = run._repr_html_()
    page = Page(html)
    rate = 100 * run.results["after"]["eval/rewards/accuracies"]
    assert f"{rate:.1f}%" in html and "KL to the reference" in html and html.count("<svg") == 4
    assert "before" in page.text and "after" in page.text and len(html) < 120_000
    assert not re.search(r"<script|src=|href=\"(?!#)|url\((?!#)|@import|https?://(?!www\.w3\.org)", html)
    names = set(re.findall(r"var\(--([a-z]+)\)", html))
    assert names and all(f"--{name}:" in html for name in names)  # every colour that is used is set in the fragment itself
    assert all(
        rule.strip().startswith(".preftune-run")
        for rule in re.findall(r"^\s*([^\n{}]+)\{", html.split("<style>")[1].split("</style>")[0], re.M)
    )


def test_hostile_text_in_a_notebook(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("model", "checkpoints"))
    bad = "<script>alert(1)</script><img src=x onerror=y>\u202e\x1b[31m"
    rows = [row | {"prompt": bad, "response": bad} for row in run.samples]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace(str(run.folder.parent / "base"), "<b onclick=x>")
    )
    html = preftune.load_run(folder)._repr_html_()
    assert "&lt;script&gt;" in html and not re.search(r"<script|<img|<b onclick|\u202e|\x1b", html)
    assert "U+202E" in html


def test_an_unfinished_run_is_shown(run, tmp_path):
    for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
        (tmp_path / name).write_text((run.folder / name).read_text())
    part = preftune.load_run(tmp_path)
    assert not part.finished and "not finished" in repr(part) and "not finished" in part._repr_html_()
    with pytest.raises(DataError, match="results.json"):
        _ = part.results
    with pytest.raises(UsageError, match="no such run folder"):
        preftune.load_run(tmp_path / "absent")


def test_a_run_stands_for_its_model(world, run, tmp_path):
    rows = preftune.logprobs(model=run, data=[world / "pairs.jsonl"], max_records=3)
    assert len(rows) == 6 and {"record", "response", "tokens", "logp", "mean"} <= rows[0].keys()
    kept = tmp_path / "kept.jsonl"
    assert preftune.logprobs(model=run.model, data=world / "pairs.jsonl", max_records=3, output=kept) == rows == lines(kept)
    base = preftune.logprobs(model=world / "base", data=world / "pairs.jsonl", max_records=3)
    assert [row["logp"] for row in base] != [row["logp"] for row in rows]
    drawn = preftune.sample(model=run, data=world / "pairs.jsonl", max_records=2, k=3, sample_tokens=5, seed=1)
    assert [len(row["responses"]) for row in drawn] == [3, 3]
    with pytest.raises(UsageError, match="they are returned"):
        preftune.logprobs(model=run, data=world / "pairs.jsonl", output="-")


def test_check_convert_and_export(world, run, tmp_path, capsys):
    found = preftune.data_check(data=world / "pairs.jsonl")
    assert found.clean and found.facts["audit"]["pairs"] == 30 and capsys.readouterr().out == ""
    assert cli.main(["data", "check", str(world / "pairs.jsonl")]) == 0
    assert capsys.readouterr().out == repr(found) + "\n"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " b"}\n{"prompt": "a"}\n')
    bad = preftune.data_check(data=[tmp_path / "bad.jsonl"])
    assert not bad.clean and {f["level"] for f in bad.findings} >= {"problem"} and "exit code 3" in repr(bad)
    made = preftune.data_convert(data=world / "pairs.jsonl", output=tmp_path / "canonical.jsonl")
    assert made == tmp_path / "canonical.jsonl" and len(lines(made)) == 30
    folder = preftune.export(run=run, output=tmp_path / "published")
    assert folder == tmp_path / "published" and (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"beta": -1}, "beta must be a number above 0, not -1"), ({"bta": 0.1}, r"dpo\(\) takes no 'bta' \(did you mean 'beta'\?\)"),
     ({"learning_rate": 1}, "did you mean 'lr'"), ({"lr": "high"}, "lr must be auto or a number above 0"),
     ({"loss": "simpoo"}, "did you mean 'simpo'"), ({"model": None}, "--model must be given"),
     ({"loss_arguments": {"gamme": 1}}, r"loss_arguments\['gamme'\]: the loss 'sigmoid' takes no 'gamme'"),
     ({"loss_arguments": 3}, "must be a table"), ({"batch_size": 2.5}, "must be a whole number"),
     ({"lora_alpha": 3.0}, "lora_alpha has no effect without --lora"), ({"data": "absent.jsonl"}, "absent.jsonl: no such file")],
)  # fmt: skip
def test_wrong_options_are_the_errors_of_the_command_line(world, tmp_path, given, message):
    right = {"model": world / "base", "data": world / "pairs.jsonl", "output": tmp_path / "run"}
    with pytest.raises((UsageError, DataError, ModelError), match=message):
        preftune.dpo(**(right | given))
    assert not (tmp_path / "run").exists()


def test_what_only_prints_is_no_option():
    with pytest.raises(UsageError, match="takes no 'json'"):
        preftune.data_check(data="x.jsonl", json=True)


def test_config_files_and_what_overrides_them(world, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {world / 'base'}\ndata: {world / 'pairs.jsonl'}\nbeta: 0.7\nseed: 4\noutput: {tmp_path / 'x'}\n"
    )
    options = api.options_of("dpo", {"config": tmp_path / "run.yaml", "beta": 0.2})
    assert (options.beta, options.seed) == (0.2, 4)


def test_signatures_are_the_options():
    swept, verbs = 0, {"evaluation": "evaluate"}  # preftune.evaluate is a room
    for name, function in api.FUNCTIONS.items():
        listed = inspect.signature(function).parameters
        wanted = {spec.name: spec for spec in specs(cli.VERBS[verbs.get(name, name.replace("_", " "))].options) if spec.name != "json"}
        assert listed.keys() == {*wanted, "config"}
        for key, spec in wanted.items():
            assert listed[key].default == spec.default and f"    {key}: {spec.help}" in function.__doc__
            swept += 1
    assert swept > 100 and inspect.signature(preftune.dpo).parameters["batch_size"].default == 32


def test_a_run_trains_outside_the_main_thread_too(world, tmp_path, run):
    """Signals belong to the main thread; a notebook's or a server's worker trains without them, to the same bits."""
    done: list[api.Run] = []
    thread = threading.Thread(target=lambda: done.append(preftune.dpo(
        model=world / "base", data=world / "pairs.jsonl", output=tmp_path / "run", beta=0.2, loss="simpo", loss_arguments={"gamma": 0.5},
        eval_reward=f"python:{world / 'judge.py'}:judge", report=False, **SMALL)))  # fmt: skip
    thread.start()
    thread.join()
    assert done and done[0].metrics[-1]["eval/loss"] == run.metrics[-1]["eval/loss"]


def test_resume_through_the_api(world, tmp_path, monkeypatch):
    stopped = tmp_path / "run"
    monkeypatch.setattr(dpo.pipeline, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preftune.sft(model=world / "base", data=world / "pairs.jsonl", output=stopped, preferred=True, report=False, **SMALL)
    monkeypatch.undo()
    os.environ["PREFTUNE_CACHE"] = str(world / "cache")
    assert not preftune.load_run(stopped).finished
    again = preftune.sft(resume=stopped)
    assert again == api.Run(stopped) and again.finished
    with pytest.raises(CheckpointError, match=r"--lr 0\.01 -> 0\.5"):
        preftune.sft(resume=stopped, lr=0.5)


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def execute(cells: list[str], name: str) -> dict:
    """Run pieces of code one after another in one namespace, as a notebook's kernel does."""
    space: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"{name}, cell {number}", "exec"), space)  # noqa: S102 (our own documents)
    return space


def test_the_examples_of_the_page(world, run, tmp_path, monkeypatch):
    """docs/api.md from the first line to the last, beside the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(world / "base")
    for name in ("pairs.jsonl", "judge.py"):
        (tmp_path / name).symlink_to(world / name)
    cells = code_blocks(ROOT / "docs" / "api.md")
    assert len(cells) >= 5
    space = execute(cells, "docs/api.md")
    assert space["run"].finished and (tmp_path / "published" / "README.md").is_file()
    text = (ROOT / "docs" / "api.md").read_text()
    assert all(f"`{name}`" in text for name in api.FUNCTIONS)


def test_the_notebook(tmp_path, monkeypatch, capsys):
    """docs/notebook.ipynb from its first cell to its last; its outputs are not committed."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    space = execute(["".join(cell["source"]) for cell in cells], "docs/notebook.ipynb")
    assert space["run"].finished and space["paired"]["difference"] > 0.1  # measured: 0.57 [0.31, 0.82]
    assert "<svg" in space["run"]._repr_html_() and "before\n    About your phone" in capsys.readouterr().out
