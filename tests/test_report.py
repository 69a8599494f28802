"""The report: what it says of planted cases, that nothing hostile gets through, that any run folder gives a page."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from preftune.config import Report
from preftune.errors import UsageError
from preftune.report import findings, marked, verdict, visible, write
from preftune.report.charts import CHARTS, Line, points
from preftune.report.findings import number
from preftune.stages.report import run as report_stage

STEPS, EVERY, PROMPTS = 300, 30, 64


def evaluation(step: int) -> dict:
    """A plausible evaluation line of a run that goes well."""
    t = 1 - math.exp(-step / 90)
    rate = 0.5 + 0.24 * t
    return {
        "step": step,
        "epoch": step / 150,
        "eval/loss": 0.6931 - 0.13 * t,
        "eval/rewards/accuracies": rate,
        "eval/accuracy_low": rate - 0.07,
        "eval/accuracy_high": rate + 0.065,
        "eval/rewards/margins": 0.9 * t,
        "eval/rewards/chosen": 0.22 * t,
        "eval/rewards/rejected": -0.68 * t,
        "eval/logps/chosen": -61 + 2.2 * t,
        "eval/logps/rejected": -66 - 6.8 * t,
        "eval/displacement": 2.2 * t,
        "eval/pairs": 149,
        "kl_sequence_rb": 2.4 * t,
        "kl_sequence_rb_se": 0.11 * t,
        "kl_sequence_k1": 2.4 * t + 0.1 * math.sin(step),
        "kl_sequence_k1_se": 0.4 * t,
        "kl_token_rb": 0.037 * t,
        "kl_token_rb_se": 0.002 * t,
        "reward": 0.28 + 0.36 * t,
        "reward_se": 0.035,
        "sample_length": 60 + 3 * t,
        "sample_length_se": 1.2,
        "sample_finished": 0.62,
    }


def training(step: int) -> dict:
    noise = math.sin(12.9898 * step) * 0.06
    return {
        "step": step,
        "epoch": step / 150,
        "loss": 0.6931 - 0.16 * (1 - math.exp(-step / 90)) + noise,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.2,
        "rewards/margins": 0.3,
        "rewards/accuracies": 0.6 + noise,
        "logps/chosen": -60,
        "logps/rejected": -66,
        "grad_norm": 1.4 + 5 * noise,
        "learning_rate": 5e-5 * min(step / 30, (STEPS - step) / 270),
        "num_tokens": 4000 * step,
        "tokens_per_second": 5200.0,
        "seconds": 0.8 * step,
    }


def samples() -> list[dict]:
    out = []
    for step in (0, STEPS):
        for i in range(PROMPTS):
            before, gain = math.sin(i) * 0.5 + 0.2, 0.36 + 0.4 * math.cos(3 * i + 2)
            text = (
                " He was sad and the dog ran away from the big box."
                if step == 0
                else " She smiled and they played happily\nin the sun."
            )
            out.append(
                {
                    "step": step,
                    "prompt": f"Once upon a time there was a kid named Tom, number {i}.",
                    "sample": 0,
                    "response": text,
                    "finished": i % 3 > 0,
                    "tokens": 20 + i % 7,
                    "reward": before + (gain if step else 0),
                    "kl": 2.4 * (step > 0),
                }
            )
    return out


RESULTS = {
    "stage": "dpo",
    "loss": "sigmoid",
    "steps": STEPS,
    "seconds": 251.3,
    "before": evaluation(0),
    "after": evaluation(STEPS),
    "paired_reward": {"difference": 0.352, "low": 0.274, "high": 0.43},
    "best_step": STEPS,
    "model": "model",
    "command": "preftune dpo --model stories --data pairs.jsonl --output runs/first --eval-reward 'lexicon:words.txt'",
    "next": "preftune chat runs/first",
}
MANIFEST = {
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "hardware": {"cores": 2, "device": "cpu"},
    "seed": 0,
    "fingerprints": {name: name[0] * 64 for name in ("data", "tokeniser", "template", "base", "reference")},
    "records": {
        "read": 1487,
        "kept": 1484,
        "train": 1335,
        "held_out": 149,
        "shown": [],
        "refused": ["pairs.jsonl:7: chosen: empty"],
        "dropped": {"too long": 2, "equal answers": 1},
    },
    "audit": {"equal": 1, "contradicting": 0, "length": {"chosen": 61.2, "rejected": 60.9}},
}
OPTIONS = {
    "model": "stories",
    "data": ["pairs.jsonl"],
    "loss": "sigmoid",
    "beta": 0.1,
    "lr": 5e-5,
    "epochs": 2.0,
    "batch_size": 32,
    "clip": 1.0,
}


def metrics() -> list[dict]:
    rows = [evaluation(0)]
    for step in range(1, STEPS + 1):
        rows += [training(step)] + ([evaluation(step)] if step % EVERY == 0 else [])
    return rows


@pytest.fixture
def run(tmp_path):
    """A run folder that looks like those of `preftune dpo`, with few curves."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    few = ("step", "epoch", "eval/loss", "eval/rewards/accuracies", "eval/accuracy_low", "eval/accuracy_high")
    lines(folder / "metrics.jsonl", [{key: evaluation(step)[key] for key in few} for step in (0, STEPS)])
    lines(folder / "samples.jsonl", samples())
    return folder


@pytest.fixture
def whole(run):
    """A run folder with every curve; ten figures take half a second."""
    lines(run / "metrics.jsonl", metrics())
    return run


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page, as a browser would read them."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.pieces = [], set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.pieces += [data] if not self.open or self.open[-1] != "style" else []

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))


def page_of(folder) -> Page:
    page = Page(write(folder).read_text(encoding="utf-8"))
    assert page.open == []
    return page


# ---------------------------------------------------------------- the page


def test_a_whole_run(whole):
    path = write(whole)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == whole / "report.html" and page.open == []
    assert "The model got better." in page.text
    for said in (
        "73.1%",
        "66.1% to 79.6%",
        "+0.352",
        "+0.274 to +0.430",
        "2.31 ± 0.106 nats per answer",
        "Rao-Blackwell",
        "one standard error",
        "rose by 2.12 nats",
        "Refused records: the first 1",
        "pairs.jsonl:7: chosen: empty",
        "1,335",
        "too long",
        "2.13.0",
        "d" * 64,
        "--eval-reward 'lexicon:words.txt'",
        "preftune chat runs/first",
        "8 of 64 sampled answers",
        "the largest gain, +0.760",
        "the largest loss, −0.0396",
        "4 min 11 s",
    ):
        assert said in page.text, said
    assert text.count("<svg ") == 10
    assert len(text.encode()) < 400_000


def test_the_page_is_alone(whole):
    """No script, no request: nothing but the style sheet and the drawings of the file itself."""
    page = page_of(whole)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form", "input", "foreignobject"}
    csp = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert csp.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
        if not name.startswith("xmlns"):
            assert "http:" not in (value or "") and "https:" not in (value or "")
    assert not re.search(r"url\((?!#)|@import", (whole / "report.html").read_text())


def test_the_same_files_give_the_same_bytes(whole, tmp_path):
    first = write(whole).read_bytes()
    other = write(whole, tmp_path / "again.html")
    assert other == tmp_path / "again.html" and other.read_bytes() == first


def test_figures_follow_the_colours_of_the_page(whole):
    drawn = "".join(re.findall(r"<svg .*?</svg>", write(whole).read_text(), re.DOTALL))
    assert "var(--axis)" in drawn and "var(--blue)" in drawn
    assert not re.search(r"#(?!m|p|c)[0-9a-f]{6}\b", drawn), "a colour of matplotlib's own"
    assert "font-family" not in drawn


def test_long_curves_are_averaged_in_groups():
    rows = [{"step": i, "loss": float(i % 2), "loss_se": 1.0} for i in range(1200)]
    drawn = points(rows, "step", Line("", "loss", "blue"))
    assert drawn[0] == (4.5, 0.5, 0.5, 0.5) and len(drawn) == 120 and drawn[-1][0] == 1194.5
    banded = points(rows[:1], "step", Line("", "loss", "blue", ("loss_se",)))
    assert banded == [pytest.approx((0.0, 0.0, -1.96, 1.96), abs=1e-3)]


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7*7 }}\x1b[31mred\x07"
HOSTILE += "\u202eevil\u200b\u2066\ufeff\x00\ud800\u2028\u3164\U000e0041"


def test_hostile_text_everywhere_is_shown_as_text(run):
    """Every text of every file is hostile at once; the page has no element or attribute more, and nothing is hidden."""
    (run / "extra.json").write_text(json.dumps({"title": "", "tables": [{"caption": "c", "columns": ["a"], "rows": [["b"]]}]}))
    sound = page_of(run)

    def poison(thing):
        if isinstance(thing, dict):
            return {key if key in KNOWN else key + HOSTILE: poison(inner) for key, inner in thing.items()}
        if isinstance(thing, list):
            return [poison(inner) for inner in thing]
        return HOSTILE if isinstance(thing, str) else thing

    for name in ("manifest.json", "results.json"):
        (run / name).write_text(json.dumps(poison(json.loads((run / name).read_text()))))
    lines(run / "samples.jsonl", [row | {"prompt": f"{row['prompt']}{HOSTILE}", "response": HOSTILE} for row in samples()])
    (run / "config.yaml").write_text(json.dumps(poison(OPTIONS)))
    extra = {
        "title": HOSTILE,
        "paragraphs": [HOSTILE],
        "tables": [{"caption": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]]}],
    }
    (run / "extra.json").write_text(json.dumps(extra))
    page = page_of(run)
    assert page.tags - sound.tags == set()
    assert {name for name, _ in page.attributes} - {name for name, _ in sound.attributes} == set()
    assert page.text.count("<script>alert(1)</script>") > 40
    whole = (run / "report.html").read_text(encoding="utf-8")
    assert whole == visible(whole), "an invisible character"
    assert "U+001B" in page.text and "U+202E" in page.text and "U+D800" in page.text and "{{ 7*7 }}" in page.text
    for name, value in page.attributes:
        assert "alert" not in (value or ""), name


KNOWN = {*MANIFEST, *RESULTS, *OPTIONS, *evaluation(0), *MANIFEST["records"], "difference", "low", "high"}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1bb", "a<b>U+001B</b>b"),
        ("\x07\x7f", "<b>U+0007</b><b>U+007F</b>"),
        ("a\u202e\u200bb", "a<b>U+202E</b><b>U+200B</b>b"),
        ("<U+202E>", "&lt;U+202E&gt;"),
        ("\u2028\u3164\u034f\ufe0e", "<b>U+2028</b><b>U+3164</b><b>U+034F</b><b>U+FE0E</b>"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("a\rb", "a<b>U+000D</b>b"),
        ("你好 é עברית 👍", "你好 é עברית 👍"),
        ("", ""),
        ("\ud800", "<b>U+D800</b>"),
    ],
)
def test_marked(text, shown):
    assert str(marked(text)) == shown


def test_marked_counts_what_it_cuts():
    assert str(marked("x" * 3000, 10)) == "xxxxxxxxxx<i> … 2,990 more characters</i>"


def test_a_page_stays_small(run):
    """Long runs, many and long samples: the page is bounded."""
    rows = [evaluation(0)] + [training(step) for step in range(1, 20001)] + [evaluation(s) for s in range(1000, 20001, 1000)]
    lines(run / "metrics.jsonl", rows)
    lines(
        run / "samples.jsonl", [row | {"response": "\u202e " * 50000, "prompt": row["prompt"] + "<" * 9000} for row in samples()]
    )
    (run / "manifest.json").write_text(json.dumps(MANIFEST | {"audit": {str(i): "x" * 9999 for i in range(3000)}}))
    assert write(run).stat().st_size < 2_000_000


# ---------------------------------------------------------------- any run folder


@pytest.mark.parametrize("missing", ["config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "results.json"])
def test_without_one_file(run, missing):
    (run / missing).unlink()
    page = page_of(run)
    assert ("The run did not finish" in page.text) == (missing == "results.json")


def test_an_interrupted_run(run):
    """Stopped at step 100: the evaluations so far and the samples so far, and how to go on."""
    (run / "results.json").unlink()
    lines(run / "metrics.jsonl", [row for row in metrics() if row["step"] <= 100])
    lines(run / "samples.jsonl", [row | {"step": 90 if row["step"] else 0} for row in samples()][:100])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "loss": 0.')
    page = page_of(run)
    assert "the last training step on record is 100" in page.text
    assert f"preftune dpo --resume {run}" in page.text
    assert " of 36 sampled answers" in page.text and "after step 90" in page.text
    assert "on the same prompts" in page.text


def test_only_the_start_was_evaluated(run):
    (run / "results.json").unlink()
    lines(run / "metrics.jsonl", [evaluation(0)])
    lines(run / "samples.jsonl", [row for row in samples() if row["step"] == 0])
    page = page_of(run)
    assert "This run was not evaluated after its start." in page.text
    assert "6 of 64 sampled answers to held-out prompts, before training" in page.text


def test_no_reward_no_samples_no_evaluation(run):
    keep = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    lines(run / "metrics.jsonl", [{key: row[key] for key in keep} for row in metrics() if "loss" in row])
    (run / "samples.jsonl").unlink()
    (run / "results.json").write_text(
        json.dumps(RESULTS | {"before": None, "after": None, "paired_reward": None, "best_step": None})
    )
    page = page_of(run)
    assert "was not evaluated after its start" in page.text and "<svg" in (run / "report.html").read_text()
    lines(run / "samples.jsonl", [row | {"reward": None} for row in samples()])
    assert "6 of 64 sampled answers" in page_of(run).text


def test_numbers_that_are_not_there(run):
    """null where a standard error could not be computed, and odd types, are holes, not crashes."""
    rows = [
        row | {key: None for key in row if key.endswith("_se")} | {"reward": "high", "eval/accuracy_low": None}
        for row in metrics()
    ]
    lines(run / "metrics.jsonl", rows)
    (run / "results.json").write_text(
        json.dumps(RESULTS | {"after": rows[-1], "before": rows[0], "seconds": None, "paired_reward": None})
    )
    lines(run / "samples.jsonl", [row | {"reward": "high", "kl": None, "tokens": "many"} for row in samples()])
    page_of(run)


def test_messages_as_prompts(run):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    lines(run / "samples.jsonl", [row | {"prompt": turns} for row in samples()])
    page = page_of(run)
    assert "system: Be kind. user: Hello?" in page.text and "8 of 64" in page.text


@pytest.mark.parametrize(
    "name, content",
    [
        ("results.json", '{"steps": 3'),
        ("manifest.json", "[1]"),
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("metrics.jsonl", "{}}\n{}\n"),
        ("extra.json", '{"tables": [{"rows": 3}]}'),
    ],
)
def test_a_broken_file_is_named(run, name, content):
    (run / name).write_text(content)
    assert f"Not read: {name}" in page_of(run).text


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(UsageError, match="not a run folder"):
        write(tmp_path / "first")
    with pytest.raises(UsageError, match="did you mean 'first'"):
        write(tmp_path / "frist")


def test_the_verb(run, tmp_path, capsys):
    assert report_stage(Report(run=str(run), output=str(tmp_path / "page.html"))) == 0
    assert (tmp_path / "page.html").read_bytes() == write(run).read_bytes()
    assert capsys.readouterr().out == f"written       {tmp_path / 'page.html'}\n"


def test_extra_tables_stand_near_the_top(run):
    extra = {
        "title": "How near to the optimum",
        "paragraphs": ["It is known here."],
        "tables": [
            {"caption": "Reward", "columns": ["", "before", "after", "optimum"], "rows": [["reward", 0.28, "0.64 ± 0.03", 0.7]]}
        ],
    }
    (run / "extra.json").write_text(json.dumps(extra))
    page = page_of(run)
    for said in ("How near to the optimum", "It is known here.", "0.64 ± 0.03", "0.28", "optimum"):
        assert said in page.text
    assert page.text.index("How near to the optimum") < page.text.index("Curves Dots")


# ---------------------------------------------------------------- the sentences


def after(**changes) -> dict:
    return evaluation(STEPS) | {key.replace("__", "/"): value for key, value in changes.items()}


def said(last: dict, *, earlier: list[dict] | None = None, paired: dict | None = None, before: dict | None = None):
    """{about: Finding} of a finished run with these evaluations."""
    rows = [before or evaluation(0), *(earlier or []), last]
    found = findings(rows, {"steps": STEPS, "before": rows[0], "after": last, "paired_reward": paired})
    return {f.about: f for f in reversed(found)}, verdict(found)


GAIN = RESULTS["paired_reward"]


@pytest.mark.parametrize(
    "rate, low, high, level", [(0.7, 0.6, 0.8, "good"), (0.55, 0.45, 0.65, "warn"), (0.3, 0.2, 0.4, "alarm")]
)
def test_accuracy(rate, low, high, level):
    found, _ = said(after(eval__rewards__accuracies=rate, eval__accuracy_low=low, eval__accuracy_high=high))
    assert found["accuracy"].level == level
    assert ("not enough data to tell" in found["accuracy"].title) == (level == "warn")


@pytest.mark.parametrize(
    "paired, level",
    [
        (GAIN, "good"),
        ({"difference": 0.1, "low": -0.1, "high": 0.3}, "warn"),
        ({"difference": -0.2, "low": -0.3, "high": -0.1}, "alarm"),
    ],
)
def test_paired_reward(paired, level):
    found, (overall, _) = said(after(), paired=paired)
    assert found["reward"].level == level and overall == level
    assert ("not enough data to tell" in found["reward"].title) == (level == "warn")


def test_unpaired_reward_when_nothing_better_is_there():
    found, _ = said(after(reward=0.6, reward_se=0.03))
    assert found["reward"].level == "good" and "from the two means" in found["reward"].text
    found, _ = said(after(reward=0.3, reward_se=0.03))
    assert found["reward"].level == "warn"
    found, _ = said(after(reward=None))
    assert "--eval-reward" in found["unscored"].text and "reward" not in found


def test_displacement_alone_is_a_quantity():
    found, (level, _) = said(after(eval__displacement=-3.2), earlier=[evaluation(150)], paired=GAIN)
    assert found["displacement"].level == "note" and level == "good"
    assert "fell by 3.20 nats" in found["displacement"].text and "24.5 times less likely" in found["displacement"].text


def test_displacement_with_falling_accuracy_is_an_alarm():
    last = after(eval__displacement=-3.2, eval__rewards__accuracies=0.55, eval__accuracy_low=0.51, eval__accuracy_high=0.6)
    found, (level, headline) = said(last, earlier=[evaluation(240)], paired=GAIN)
    assert found["displacement"].level == "alarm" and level == "alarm" and "less likely" in headline
    for remedy in ("held-out accuracy fell with it", "sigmoid+0.1*nll", "DPO-Positive", "larger beta"):
        assert remedy in found["displacement"].text
    rises, _ = said(last | {"eval/displacement": 1.0}, earlier=[evaluation(240)], paired=GAIN)
    assert rises["displacement"].level == "note"


def test_displacement_with_falling_reward_is_an_alarm():
    found, _ = said(after(eval__displacement=-3.2), paired={"difference": -0.2, "low": -0.3, "high": -0.1})
    assert found["displacement"].level == "alarm" and "the sampled reward fell with it" in found["displacement"].text
    found, _ = said(after(eval__displacement=-3.2, reward=0.4), earlier=[evaluation(240)], paired=GAIN)
    assert found["displacement"].level == "alarm", "fell from its best"


@pytest.mark.parametrize(
    "length, se, level, word",
    [
        (90, 2, "warn", "much longer"),
        (30, 2, "warn", "much shorter"),
        (66, 1, "note", "a little longer"),
        (61, 2, "note", "not change"),
        (90, 40, "note", "not change"),
    ],
)
def test_length_drift(length, se, level, word):
    found, _ = said(after(sample_length=length, sample_length_se=se))
    assert found["length"].level == level and word in found["length"].title


def test_cut_samples():
    found = findings([evaluation(0), after(sample_finished=0.1)], None)
    assert any("10.0% ended by themselves" in f.text for f in found)
    assert not any("did not change" in f.title for f in found), "cut answers have the length of the limit"
    assert any("much longer" in f.title for f in findings([evaluation(0), after(sample_finished=0.1, sample_length=90)], None))


@pytest.mark.parametrize("token, level", [(0.02, "note"), (0.2, "warn")])
def test_kl(token, level):
    found, _ = said(after(kl_token_rb=token))
    assert found["kl"].level == level and "nats per token" in found["kl"].text


def test_estimators_that_disagree():
    found, _ = said(after(kl_sequence_k1=9.0))
    assert found["kl"].title == "Two estimates of the KL disagree"
    start = findings([evaluation(0) | {"kl_sequence_k1": 0.0}, after(kl_sequence_k1=2.4)], None)
    assert not any("disagree" in f.title for f in start)


def test_overfitting():
    found, _ = said(after(eval__loss=0.71), earlier=[evaluation(150)])
    assert found["fit"].level == "warn"
    found, _ = said(after(eval__loss=0.64), earlier=[evaluation(150)])
    assert found["fit"].level == "note" and "step 150" in found["fit"].text
    assert "fit" not in said(after(), earlier=[evaluation(150)])[0]


def test_what_is_said_of_a_reward_model():
    """Agreement beside what is possible, never its answers, of which it has none; a slope whose interval holds 1 is no news; torn files."""
    told = {"agreement": 0.66, "low": 0.61, "high": 0.7, "ceiling": {"high": 0.72},
            "calibration": {"slope": 0.5, "slope_low": 0.4, "slope_high": 0.7}}  # fmt: skip
    rows = {"stage": "reward", "steps": 99, "after": {"step": 99}}
    good, note = [f for f in findings([], rows | {"reward": told}) if f.about == "reward_model"]
    assert good.level == "good" and "66.0% of held-out pairs (95% interval 61.0% to 70.0%). With such labels 72.0% is" in good.text
    assert note.title == "The reward model is too sure of itself" and "0.500 (95% interval 0.400 to 0.700)" in note.text
    assert verdict(findings([], rows | {"reward": told})) == ("good", "The reward model learned the preferences.")
    doubt = told | {"low": 0.49, "calibration": {"slope": 1.1, "slope_low": 0.8, "slope_high": 1.4}}
    assert verdict(findings([], rows | {"reward": doubt})) == ("warn", "The reward model: not enough data to tell.")
    (classed,) = [f for f in findings([], rows | {"reward": {"classed": 30, "accuracy": 0.9, "low": None, "high": None}}) if f.about]
    assert "90.0% of 30 answers" in classed.text
    for torn in (None, {}, "x", {"agreement": "x", "calibration": 3, "ceiling": []}):
        assert not [f for f in findings([], rows | {"reward": torn}) if f.about in ("reward_model", "unscored")]


def test_the_bias_of_values_that_were_read_off_samples():
    """Told in units of the reward beside its spread; a warning from a tenth of it on."""
    for bias, level in ((-0.3, "warn"), (-0.05, "note")):
        rows = findings([after()], {"steps": 99, "partition": {"samples": 4.0, "effective": 1.9, "beta": 1.0, "bias": bias, "spread": 1.0}})
        (found,) = [f for f in rows if f.about == "partition"]
        assert found.level == level and "4.00 samples a prompt, of which 1.90 count" in found.text
        assert ("value-learned" in found.text) == (level == "warn") and number(abs(bias)) in found.title
    assert not [f for f in findings([after()], {"steps": 99, "partition": {}}) if f.about == "partition"]


def test_course():
    assert [f.title for f in findings([training(1)], {"steps": 1})] == ["A short run: 1 step"]
    assert "A short run: 1 step" not in [f.title for f in findings([training(1), after()], {"steps": 1})], "something was learned"
    assert any(f.level == "alarm" for f in findings([training(99) | {"loss": None}], {"steps": 99}))
    assert any(f.level == "alarm" for f in findings([training(99) | {"loss": math.nan}], {"steps": 99}))
    assert findings([], {"steps": 0}) == []
    assert findings([], None)[0].title == "The run did not finish"


def test_headlines():
    unsure = {"eval__rewards__accuracies": 0.5, "eval__accuracy_low": 0.4, "eval__accuracy_high": 0.6}
    weak = {"difference": 0.1, "low": -0.1, "high": 0.3}
    assert said(after(), paired=GAIN)[1] == ("good", "The model got better.")
    assert said(after(**unsure), paired=GAIN)[1] == ("good", "Its answers earn more reward than before.")
    for key, bad, price in (
        ("kl_token_rb", 0.3, "moved far"),
        ("sample_length", 90, "much longer"),
        ("eval/loss", 0.8, "above its start"),
    ):
        level, headline = said(after() | {key: bad}, paired=GAIN)[1]
        assert level == "warn" and "at a price" in headline and price in headline
    assert "no certain gain yet" in said(after(), paired=weak)[1][1]
    assert "Not enough data" in said(after(**unsure), paired=weak)[1][1]
    assert "was not measured" in said(after(reward=None))[1][1]
    assert said({"step": STEPS, "eval/loss": 0.6})[1] == ("note", "Whether the model got better was not measured.")
    assert findings([evaluation(0), training(99)], {"steps": 99}) == []
    assert verdict([]) == ("note", "This run was not evaluated after its start.")


def test_every_metric_has_its_line_in_the_documents():
    """Names as code in docs/metrics.md; `eval/logps/...` and `(_se)` stand for several."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [*evaluation(0), *training(1), *samples()[0], *(line.key for chart in CHARTS for line in chart.lines)]
    for name in {*names} - {"displacement/rejected"}:  # made by the report from logps/rejected
        stem = re.sub("^eval/(rewards|logps)/", r"\1/", name).removesuffix("_se")
        assert f"`{stem}`" in page, name
        if stem + "_se" == name:
            assert f"`{stem}` (`_se`)" in page, name


@pytest.mark.parametrize(
    "x, text",
    [
        (0.0, "0.00"),
        (1234.5, "1,234"),
        (-2.0, "−2.00"),
        (0.04567, "0.0457"),
        (12.345, "12.3"),
        (0.9999, "1.000"),
        (3e-7, "3.00e−07"),
        (1e9, "1,000,000,000"),
    ],
)
def test_number(x, text):
    assert number(x) == text
