"""`export`: the folder loads in plain transformers and says the same; its card is true, complete and tells nothing of the machine."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import make
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preftune import cli, report
from preftune.config import Dpo, Export, Reward, build
from preftune.errors import ModelError, UsageError
from preftune.records import Response
from preftune.report.card import bare, card, literal
from preftune.report.findings import number
from preftune.rewards import scorer
from preftune.stages import dpo, export, reward

IDS = torch.tensor([[256, 40, 50, 60, 70, 81]])
JUDGE = "def judge(prompt, response):\n    return float(response.count('h'))\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A LoRA run on files with an equal pair and a record that is too long; everything lies under a folder that must not be told."""
    private = tmp_path_factory.mktemp("private")
    os.environ["PREFTUNE_CACHE"] = str(private / "cache")
    base, data = make.write_model(private / "base"), make.write_pairs(private / "pairs.jsonl", 40)
    odd = [{"prompt": "same", "chosen": " a", "rejected": " a"}, {"prompt": "long " * 60, "chosen": " a", "rejected": " b"}]
    data.write_text(data.read_text() + "".join(json.dumps(row) + "\n" for row in odd))
    (private / "judge.py").write_text(JUDGE)
    options = Dpo(model=str(base), data=[str(data)], output=str(private / "runs" / "first"), lora=4, lr=1e-2, epochs=3, batch_size=8,
                  loss="sigmoid+0.1*nll", sample_tokens=8, eval_prompts=4, eval_reward=f"python:{private / 'judge.py'}:judge", seed=3,
                  skip_bad=True, threads=1, report=False)  # fmt: skip
    assert dpo.run(options) == 0
    return private / "runs" / "first"


def published(run: Path, folder: Path, **options: object) -> Path:
    assert export.run(Export(run=str(run), output=str(folder), **options)) == 0
    return folder


def logits(folder: Path, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(IDS).logits


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])


def test_the_merged_model_loads_in_plain_transformers_with_equal_logits(run, tmp_path, capsys):
    folder = published(run, tmp_path / "pub" / "model-a")
    assert torch.equal(logits(folder), logits(run / "model"))
    base = logits(run.parents[1] / "base")
    assert (logits(folder) - base).abs().max() > 0.1  # it is the trained one
    assert (
        AutoTokenizer.from_pretrained(folder)("the cat").input_ids
        == AutoTokenizer.from_pretrained(run / "model")("the cat").input_ids
    )
    assert {p.name for p in folder.iterdir()} == {p.name for p in (run / "model").iterdir()} | {"README.md"}
    assert "model-a (model, tokeniser, README.md" in capsys.readouterr().out


def test_the_adapter_on_its_base_is_the_merged_model(run, tmp_path):
    folder = published(run, tmp_path / "adapter", adapter=True)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.parents[1] / "base"), folder).eval()
    with torch.no_grad():
        assert (wrapped(IDS).logits - logits(run / "model")).abs().max() < 1e-4
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", "README.md"} and "model.safetensors" not in names
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    small = published(run, tmp_path / "small", adapter=True, dtype="bf16")
    exact, cast = load_file(folder / "adapter_model.safetensors"), load_file(small / "adapter_model.safetensors")
    assert exact.keys() == cast.keys() and all(torch.equal(exact[k].bfloat16(), cast[k]) for k in exact)


def test_dtype_converts_every_weight(run, tmp_path):
    folder = published(run, tmp_path / "half", dtype="bf16")
    exact, cast = load_file(run / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert exact.keys() == cast.keys() and all(torch.equal(exact[k].bfloat16(), cast[k]) for k in exact)
    assert torch.equal(logits(folder, dtype=torch.bfloat16), logits(run / "model", dtype=torch.bfloat16))
    assert "bfloat16, converted when it was exported" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    same = published(run, tmp_path / "same", dtype="fp32")
    assert torch.equal(logits(same), logits(run / "model"))


def test_the_card_says_what_was_measured(run, tmp_path):
    text = (published(run, tmp_path / "pub") / "README.md").read_text()
    results, manifest = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "manifest"))
    after, paired = results["after"], results["paired_reward"]
    page = rendered(text)

    def row(*cells: str) -> str:
        return "<tr>\n" + "".join(f"<td>{cell}</td>\n" for cell in cells) + "</tr>"

    sha = hashlib.sha256((run.parents[1] / "pairs.jsonl").read_bytes()).hexdigest()
    assert row("<code>pairs.jsonl</code>", "training", "1.0", f"<code>{sha}</code>") in page
    assert f"<code>{manifest['fingerprints']['base']}</code>" in page
    assert row("read", "42") in page and row("left out: two equal sides", "1") in page
    assert row("left out: prompt too long", "1") in page or "too long</td>\n<td>1</td>" in page
    assert (
        row("trained on", str(manifest["records"]["train"])) in page
        and row("held out, judged", str(manifest["records"]["held_out"])) in page
    )
    kl = f"{number(after['kl_sequence_rb'])} ± {number(after['kl_sequence_rb_se'])}"
    assert f"<td>{kl}</td>\n<td>nats an answer" in page
    rate, low, high = (100 * after[f"eval/{name}"] for name in ("rewards/accuracies", "accuracy_low", "accuracy_high"))
    assert f"<td>{rate:.1f}% [{low:.1f}%, {high:.1f}%]</td>" in page and f"share of {after['eval/pairs']} pairs" in page
    assert "displacement of preferred answers" in page and f"{number(abs(paired['high']))}]</td>" in page
    for found in (
        "LoRA of rank 4",
        "sigmoid+0.1*nll",
        "python:judge.py:judge",
        manifest["versions"]["torch"],
        manifest["hardware"]["platform"],
    ):
        assert found in page, found
    assert row("seed", "3") in page and row("steps", str(results["steps"])) in page
    assert "No benchmark, no safety evaluation" in page and "The reward is that of one rule" in page
    assert all(finding.title in page for finding in report.findings(report.read_run(run).metrics, results))
    assert "None is stated here" in page and "<code>LICENSE</code> file" in page


def test_the_head_is_the_hubs_and_invents_nothing(run, tmp_path):
    head = ModelCard.load(published(run, tmp_path / "pub") / "README.md").data.to_dict()
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preftune", "dpo", "preference-tuning"],
    }


def test_nothing_of_the_machine_is_told(run, tmp_path):
    swept = 0
    for i, options in enumerate(({}, {"adapter": True}, {"dtype": "bf16"})):
        for path in published(run, tmp_path / str(i), **options).iterdir():
            content = path.read_bytes().decode("utf-8", "replace")
            assert str(run.parents[1]) not in content and "private" not in content and str(Path.home()) + "/" not in content, path
            assert path.suffix == ".safetensors" or socket.gethostname() not in content
            swept += 1
    assert swept >= 15


def test_the_command_of_the_card_makes_the_run_again(run, tmp_path, monkeypatch):
    text = (published(run, tmp_path / "pub") / "README.md").read_text()
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("preftune dpo ")))
    for name in ("base", "pairs.jsonl", "judge.py"):
        (tmp_path / name).symlink_to(run.parents[1] / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words[1:]) == 0
    once, again = (json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "first"))
    assert once["after"] == again["after"] and once["paired_reward"] == again["paired_reward"]


def test_what_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        published(run, tmp_path / "full")
    with pytest.raises(UsageError, match="no such run folder"):
        published(tmp_path / "absent", tmp_path / "pub")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("results.json"))
    with pytest.raises(ModelError, match="has not written a model yet; resume it with 'preftune dpo --resume"):
        published(unfinished, tmp_path / "pub")
    bare_run = tmp_path / "bare"
    shutil.copytree(run, bare_run, ignore=shutil.ignore_patterns("adapter", "model"))
    with pytest.raises(ModelError, match="has not written a model yet"):
        published(bare_run, tmp_path / "pub")
    shutil.copytree(run / "model", bare_run / "model")
    with pytest.raises(UsageError, match="--adapter: .* was not trained with --lora"):
        published(bare_run, tmp_path / "pub", adapter=True)
    (bare_run / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="no card can be made: manifest.json:1: not valid JSON"):
        published(bare_run, tmp_path / "pub")
    with pytest.raises(UsageError, match="--output is the run folder itself"):
        build(Export, {"run": (str(run), "RUN"), "output": (str(run), "--output")})
    assert not (tmp_path / "pub").exists()


def test_only_what_a_model_needs_goes_out(run, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    (changed / "model" / "notes.pdf").write_text("mine")
    (changed / "model" / "old.bin").write_text("a pickle")
    folder = published(changed, tmp_path / "pub")
    assert not {"notes.pdf", "old.bin"} & {p.name for p in folder.iterdir()}
    assert "not published: notes.pdf, old.bin" in capsys.readouterr().err


HOSTILE = "a|b`<script>alert(1)[y](javascript:x)\u202e\n# head\n```\n**x**.jsonl"


def test_hostile_names_are_words(run):
    told = report.read_run(run)
    manifest = told.manifest | {"files": [{"name": "/srv/me/" + HOSTILE, "sha256": "0", "weight": 1.0, "held_out": False}]}
    options = dict(told.options) | {"data": ["/srv/me/" + HOSTILE], "model": "/srv/me/" + HOSTILE}
    results = dict(told.results) | {"loss": "<img src=x>"}
    text = card(replace(told, manifest=manifest, options=options, results=results), HOSTILE)
    page = rendered(text)
    assert "<script" not in page and "<img" not in page and "<strong>x" not in page and 'href="javascript' not in page
    assert "\u202e" not in text and "/srv" not in text and "<h1>" in page and page.count("<h1>") == 1
    cells = [row.count("<td") for row in page.split("<tbody>")[2].split("</tbody>")[0].split("</tr>")[:-1]]
    assert cells == [4]
    fenced = text.split("The run again")[1]
    assert fenced.count("````") == 2 and "## Licence" in page.replace("<h2>Licence", "## Licence")


def test_a_base_of_the_hub_is_named_and_linked(run):
    told = report.read_run(run)
    files = [{"name": "hub:owner/set@train", "sha256": "0", "weight": 2.0, "held_out": False}]
    manifest = told.manifest | {"base": {"name": "owner/base", "from": "hub"}, "files": files}
    options = dict(told.options) | {"model": "owner/base", "data": ["hub:owner/set@train:2"]}
    text = card(replace(told, manifest=manifest, options=options), "mine", adapter=True)
    head = ModelCard(text).data
    assert (head.base_model, head.base_model_relation, head.datasets) == ("owner/base", "adapter", ["owner/set"])
    assert head.license is None and "(https://huggingface.co/owner/base)" in text and "--model owner/base" in text


def test_what_was_not_measured_is_said(run):
    told = report.read_run(run)
    silent = {"after": {"step": 9}, "before": {"step": 0}, "paired_reward": None}
    manifest = told.manifest | {"records": told.manifest["records"] | {"leaks": 2, "eval_reward": None}}
    text = card(replace(told, results=dict(told.results) | silent, metrics=[], manifest=manifest), "x")
    assert "| nothing | | | |" in text and "Nothing was held out" in text and "Its own answers were not sampled" in text
    assert "2 held-out prompts stand in the training data too" in text and "The reward is" not in text
    unscored = dict(told.results) | {
        "after": {k: v for k, v in told.results["after"].items() if "reward" not in k},
        "paired_reward": None,
    }
    assert "Its own answers were not scored" in card(replace(told, results=unscored), "x")


@pytest.mark.parametrize(
    ("path", "told"),
    [("/srv/me/pairs.jsonl", "pairs.jsonl"), ("runs/sft", "sft"), ("/x/runs/first/model/", "first/model"),
     ("hub:a/b@train", "hub:a/b@train"),
     ("lexicon:/x/words.txt", "lexicon:words.txt"), ("../my data/p.jsonl:2", "p.jsonl:2"), ("auto", "auto"), ("/x/adapter", "x/adapter")],
)  # fmt: skip
def test_bare(path, told):
    assert bare(path) == told


def test_literal_survives_markdown():
    text = "a *b* _c_ `d` [e](f) <g> &amp; #h | $i$ ~j~ \\k !l"
    assert MarkdownIt().renderInline(str(literal(text))) == text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---- reward models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(run) -> Path:
    """A reward model by LoRA on the same files, beside the run."""
    folder = run.parent / "judge"
    options = Reward(model=str(run.parents[1] / "base"), data=[str(run.parents[1] / "pairs.jsonl")], output=str(folder), lora=4, lr=1e-2,
                     epochs=3, batch_size=8, skip_bad=True, threads=1, holdout=0.3)  # fmt: skip
    assert reward.run(options) == 0
    return folder


def score(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return model.eval()(IDS).logits.item()


def test_a_reward_model_is_published_with_its_reading(judge, tmp_path):
    """Plain transformers and peft give the scores of the run's model, preftune those with its shift; the card is about a reward model."""
    folder, small = published(judge, tmp_path / "judge"), published(judge, tmp_path / "half", dtype="bf16")
    own = score(AutoModelForSequenceClassification.from_pretrained(judge / "model"))
    assert score(AutoModelForSequenceClassification.from_pretrained(folder)) == own
    assert score(AutoModelForSequenceClassification.from_pretrained(small).float()) == pytest.approx(own, abs=0.05)
    assert (folder / "reward.json").read_bytes() == (judge / "model" / "reward.json").read_bytes() == (small / "reward.json").read_bytes()
    asked = ["3 the"] * 2, [Response(" thanks"), Response(" no")]
    assert (scorer(f"model:{folder}")(*asked) == scorer(f"model:{judge}")(*asked)).all()
    beside = published(judge, tmp_path / "adapter", adapter=True)
    shutil.copytree(judge.parents[1] / "base", tmp_path / "base")
    told = json.loads((beside / "adapter_config.json").read_text())
    (beside / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(tmp_path / "base")}))
    assert score(AutoPeftModelForSequenceClassification.from_pretrained(beside, num_labels=1)) == pytest.approx(own, abs=1e-4)
    text, head = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data
    assert head.pipeline_tag == "text-classification" and "reward" in head.tags
    for words in ("A reward model:", "AutoModelForSequenceClassification", "The reward model learned the preferences", "`shift`", "a proxy",
                  "accuracy on held-out pairs"):  # fmt: skip
        assert words in rendered(text).replace("<code>", "`").replace("</code>", "`"), words
    assert "sampled" not in text and "AutoModelForCausalLM" not in text and str(judge.parents[1]) not in text
    page = (judge / "report.html").read_text()
    assert "The reward model learned the preferences." in page and "The sampled answers were not scored" not in page


def test_an_ensemble_is_reported_and_its_members_are_published(judge, tmp_path):
    options = Reward(model=str(judge.parents[1] / "base"), data=[str(judge.parents[1] / "pairs.jsonl")], output=str(tmp_path / "several"),
                     members=2, lr=3e-3, epochs=2, batch_size=8, skip_bad=True, threads=1, holdout=0.3, report=False)  # fmt: skip
    reward.run(options)
    with pytest.raises(UsageError, match="an ensemble; export one of its members, such as .*/member-1"):
        published(tmp_path / "several", tmp_path / "no")
    published(tmp_path / "several" / "member-2", tmp_path / "second")
    page = cli.main(["report", str(tmp_path / "several")]) == 0 and (tmp_path / "several" / "report.html").read_text()
    told = json.loads((tmp_path / "several" / "ensemble.json").read_text())["held_out"]
    for words in ("member-1", "member-2", "The members", "held-out accuracy", f"{told['spread']:.3f}", "did not finish"):
        assert (words in page) == (words != "did not finish"), words
    results = json.loads((tmp_path / "several" / "results.json").read_text())
    assert results["after"]["eval/rewards/accuracies"] == told["mean"]["agreement"]
    each = [json.loads((tmp_path / "several" / name / "results.json").read_text()) for name in told if name.startswith("member")]
    assert results["steps"] == sum(one["steps"] for one in each) and len(each) == 2
