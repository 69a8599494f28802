"""`data check`, `data show`, `data convert`: every finding planted and named, every shown token read off the batch that trains."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make
import pytest

from preftune.batches import make_batch
from preftune.cli import main
from preftune.formats import FORMATS, read
from preftune.records import Judgement, Message, Record, Response
from preftune.stages import data as stage
from preftune.store import build
from preftune.tokens import make_codec

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8")
    return path


def pair(prompt="p", chosen=" yes.", rejected=" no."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


GOOD = [pair(f"p{i}", f" yes{i}.", " no.") for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make.write_model(tmp_path_factory.mktemp("m") / "model", template=make.TEMPLATE)


def checked(capsys, *words) -> tuple[int, dict]:
    code = main(["data", "check", *map(str, words), "--json"])
    facts = json.loads(capsys.readouterr().out)
    return code, facts | {"by": {f["name"]: f for f in facts["findings"]}}


# --- check --------------------------------------------------------------------------------------------------------------------


def test_a_clean_file(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", *GOOD)
    assert main(["data", "check", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "records       6  prompt-chosen-rejected 6" and out[-1] == "clean"
    assert main(["data", "check", str(path), "--strict"]) == 0


PLANTED = [  # row or rows after six good ones, name, level, lines
    ([pair("x", None)], "row: chosen: null", "problem", [7]),
    (['{"prompt": "x", "cho'], "row: not valid JSON", "problem", [7]),
    ([pair("x", " "), pair("y", " ")], "row: chosen: only white space", "problem", [7, 8]),
    ([pair("x", "same  text.", "same text.")], "equal", "problem", [7]),
    ([GOOD[1]], "duplicates", "warning", [7]),
    ([pair("p2", " no.", " yes2.")], "contradicting", "warning", [7]),
    ([pair("p2", " other.", " no.")], "shared_prompts", "note", [7]),
    ([""], "blank_lines", "note", []),
]


@pytest.mark.parametrize(("rows", "name", "level", "where"), PLANTED, ids=[p[1] for p in PLANTED])
def test_every_finding_without_a_model(rows, name, level, where, tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", *GOOD, *rows)
    code, facts = checked(capsys, path)
    found = facts["by"][name]
    assert (found["level"], found["count"], found["where"]) == (level, len(rows), [f"{path}:{n}" for n in where])
    assert code == (3 if level == "problem" else 0) and facts["clean"] == (code == 0)
    main(["data", "check", str(path)])
    count = len(rows)
    last = {"problem": f"{count} problem{'s' * (count > 1)}; exit code 3", "warning": f"no problem, {count} warning", "note": "clean"}
    assert capsys.readouterr().out.splitlines()[-1].startswith(last[level])
    assert checked(capsys, path, "--strict")[0] == (0 if level == "note" else 3)
    main(["data", "check", str(path)])
    shown = capsys.readouterr().out
    assert re.search(rf"^{level} +{len(rows)} .*{f'a.jsonl:{where[0]}' if where else ''}", shown, re.MULTILINE)


def test_circles_leaks_and_judges(tmp_path, capsys):
    ring = lines(tmp_path / "a.jsonl", pair("r", "a.", "b."), pair("r", "b.", "c."), pair("r", "c.", "a."))
    code, facts = checked(capsys, ring, "--eval-data", lines(tmp_path / "b.jsonl", *GOOD, pair("r", "x.", "y.")))
    assert facts["by"]["cycles"]["where"] == [" > ".join(f"{ring}:{n}" for n in (1, 2, 3))] and facts["by"]["cycles"]["level"] == "warning"
    assert facts["by"]["leak"]["where"] == [f"{tmp_path / 'b.jsonl'}:7"] and code == 3
    said = [{"order": [[0], [1]], "by": "ann"}, {"order": [[1], [0]], "by": "bob"}, {"order": [[0], [1]]}]
    judged = {"prompt": "p", "responses": ["a.", "b."], "judgements": said}
    facts = checked(capsys, lines(tmp_path / "c.jsonl", judged))[1]
    assert facts["judges"] == {"ann": 1, "bob": 1, "": 1} and "ann 1, bob 1, not said 1" in facts["measures"]["judged by"]


def test_lengths_are_those_of_a_plain_count(tmp_path, capsys):
    rows = [pair(f"p{i}", "x" * (3 + i % 5) + ".", "y" * (i % 7 + 1) + ".") for i in range(50)]
    audit = checked(capsys, lines(tmp_path / "a.jsonl", *rows))[1]["audit"]
    gap = [len(r["chosen"]) - len(r["rejected"]) for r in rows]
    assert audit["length_gap"] == pytest.approx(sum(gap) / 50) and audit["longer_chosen"] == sum(g > 0 for g in gap) / 50
    assert audit["length_gap_low"] < audit["length_gap"] < audit["length_gap_high"]


def test_scores_alone_cut_answers_and_a_file_without_a_usable_row(tmp_path, capsys):
    code, facts = checked(capsys, lines(tmp_path / "a.jsonl", {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}))
    assert code == 0 and facts["by"]["scored"]["count"] == 1 and "--from-scores" in facts["by"]["scored"]["text"]
    assert "--finish never" in facts["by"]["unfinished"]["text"]
    code, facts = checked(capsys, lines(tmp_path / "b.jsonl", pair("x", None), pair("y", 3)))
    assert code == 3 and facts["counts"]["records"] == 0 and len(facts["by"]) == 2
    assert main(["data", "check", str(lines(tmp_path / "c.jsonl"))]) == 3  # empty: an error in words
    assert "empty: it holds no row" in capsys.readouterr().err


def test_what_only_the_tokens_tell(model, tmp_path, capsys):
    rows = [*GOOD, pair("z" * 200), pair("c", " a" * 100), pair("r", " a", " b" * 100), pair("b", "x" * 150, "y" * 150), pair("s </s>"),
            pair("t", "he.", "o.")]  # fmt: skip
    path = lines(tmp_path / "a.jsonl", *rows)
    code, facts = checked(capsys, path, "--model", model, "--offline")
    found = {name: (f["level"], [int(w.rpartition(":")[2]) for w in f["where"]]) for name, f in facts["by"].items()}
    assert found["prompt too long"] == ("warning", [7]) and found["chosen too long"] == ("warning", [8])
    assert found["rejected too long"] == ("warning", [9]) and found["both responses too long"] == ("warning", [10])
    assert found["control token in the text"] == ("problem", [11]) and found["ids: apart"] == ("note", [12])
    assert code == 3 and "spells the control token '</s>'" in facts["by"]["control token in the text"]["text"]
    assert "the limit is 128" in facts["by"]["prompt too long"]["text"]
    assert checked(capsys, path, "--model", model, "--max-length", "400")[1]["by"].keys() == {"control token in the text", "ids: apart"}


def test_check_needs_neither_torch_nor_a_network(tmp_path):
    path = lines(tmp_path / "a.jsonl", *GOOD)
    program = f"import sys; from preftune.cli import main; print(main(['data', 'check', {str(path)!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def on_a_terminal(*words: str) -> str:
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "preftune", *words], stdout=theirs, env=env)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        out += part
    process.wait(timeout=60)
    os.close(ours)
    return out.decode()


def test_colour_on_a_terminal_and_hostile_text_as_symbols(model, tmp_path):
    path = lines(tmp_path / "a.jsonl", pair("a\u202eb", " <script>x</script>\u200b", " no"))
    shown = on_a_terminal("data", "show", "--model", str(model), "--data", str(path))
    assert "\033[" in shown and "a<U+202E>b" in re.sub(r"\033\[[0-9;]*m", "", shown) and "\u202e" not in shown and "\u200b" not in shown
    assert "\033[1;31mproblem" in on_a_terminal("data", "check", str(lines(tmp_path / "b.jsonl", *GOOD, pair("x", None))))


# --- show ---------------------------------------------------------------------------------------------------------------------


def batch_of(records, template=None):
    codec = make_codec(make.tokenizer(template=template))
    store, intake = build(records, codec, max_length=None)
    assert not intake.refused
    return make_batch(store, range(len(store))), codec


TALK = Record((Message("system", "s"), Message("user", "hi thé 🙂")),
              (Response((Message("assistant", "AAA"), Message("user", "bbb"), Message("assistant", "CCC"))), Response("x", finished=False)),
              (Judgement(((0,), (1,))),))  # fmt: skip


@pytest.mark.parametrize("template", [None, make.TEMPLATE])
@pytest.mark.parametrize("records", [make.records(4, k=3), [TALK]], ids=["k3", "talk"])
def test_what_is_shown_is_the_batch(records, template):
    """Ids, texts and colours against the tensors, read here in another way: along the targets."""
    batch, codec = batch_of(records, template)
    found = stage.parts(batch, codec)
    assert [t.id for part in found for t in part.tokens] == batch.tokens.tolist()
    trained = [t.id for part in found for t in part.tokens if t.kind in ("trained", "end")]
    assert trained == batch.target.tolist()
    prompt: list[int] = []
    for part in found:
        ids = [t.id for t in part.tokens]
        prompt = ids if part.title == "prompt" else prompt
        before = [] if part.title == "prompt" else prompt
        text = codec.backend.decode(before + ids, skip_special_tokens=False)
        assert text.endswith("".join(t.text for t in part.tokens))
        assert part.title != "prompt" or text == "".join(t.text for t in part.tokens)
        allowed = {"prompt", "special"} if part.title == "prompt" else {"trained", "masked", "special", "end"}
        assert {t.kind for t in part.tokens} <= allowed
    if records == [TALK]:
        answer = next(part for part in found if part.title == "response 0: better than 1")
        assert "bbb" in "".join(t.text for t in answer.tokens if t.kind in ("masked", "special"))
        assert answer.tokens[-1].kind == "end" and found[-1].tokens[-1].kind == "trained"


def test_a_changed_tensor_changes_what_is_shown():
    batch, codec = batch_of(make.records(1))
    before = stage.parts(batch, codec)
    tokens = batch.tokens.clone()
    tokens[1] = make.BYTES.index("Z")
    assert stage.parts(replace(batch, tokens=tokens), codec)[0].tokens[1].text == "Z" != before[0].tokens[1].text
    fewer = replace(batch, hidden=batch.hidden[1:], target=batch.target[1:], response=batch.response[1:])
    assert (before[1].tokens[0].kind, stage.parts(fewer, codec)[1].tokens[0].kind) == ("trained", "masked")
    with pytest.raises(AssertionError, match="a target that is not its token"):
        stage.parts(replace(batch, hidden=batch.hidden + 1), codec)


def test_characters_of_several_tokens_and_texts_that_end_inside_one():
    codec = make_codec(make.tokenizer())
    ids = codec.backend.encode("é🙂the").ids
    assert stage.pieces(codec, ids) == ["", "é", "", "", "", "🙂", "the"]
    assert "".join(stage.pieces(codec, ids[:4])) == codec.backend.decode(ids[:4])


def test_show_prints_runs_and_writes_a_page(model, tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", *GOOD, pair("<b>&\u202e", "<img src=x onerror=alert(1)>", " no"))
    words = ["data", "show", "--model", str(model), "--data", str(path)]
    assert main([*words, "--row", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}:2: 15 tokens, 12 trained", "prompt (3)", '  special      1  "<s>"', '  prompt       2  "p1"',
        "response 0: better than 1 (7)", '  trained      6  " yes1."', '  end          1  "</s>"',
        "response 1: worse than 0 (5)", '  trained      4  " no."', '  end          1  "</s>"']  # fmt: skip
    assert main([*words, "--row", "7", "--html", str(tmp_path / "p.html")]) == 0
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "<img" not in text and "&lt;img" in re.sub(r"</span><span[^>]*>", "", text)
    assert "\u202e" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<span") == sum(text.count(f'<span class="{kind}"') for kind in stage.KINDS) > 30


def test_show_says_why_a_record_cannot_be_shown(model, tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", *GOOD, pair("x" * 300), pair("y", " </s>"))
    for row, code, words in ((9, 2, "--row 9: there are 8 records"), (7, 3, "a.jsonl:7: prompt too long: 307 tokens; the limit is 128"),
                             (8, 3, "a.jsonl:8: responses: the text spells the control token '</s>'")):  # fmt: skip
        assert main(["data", "show", "--model", str(model), "--data", str(path), "--row", str(row)]) == code
        assert words in capsys.readouterr().err


# --- convert ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_convert_there_and_back(name, tmp_path):
    path = lines(tmp_path / "a.jsonl", FORMATS[name].example, {**FORMATS[name].example, "id": "x"})
    assert main(["data", "convert", "--data", str(path), "--output", str(tmp_path / "b.jsonl")]) == 0
    one, two = read([path]).records, read([tmp_path / "b.jsonl"]).records
    assert [replace(r, where="") for r in one] == [replace(r, where="") for r in two] and len(one) == 2
    assert main(["data", "convert", "--data", str(tmp_path / "b.jsonl"), "--output", str(tmp_path / "c.jsonl")]) == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_convert_refuses_and_leaves_nothing(tmp_path, capsys):
    path, output = lines(tmp_path / "a.jsonl", *GOOD, pair("x", None)), tmp_path / "b.jsonl"
    words = ["data", "convert", "--data", str(path), "--output", str(output)]
    assert main(words) == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    assert main([*words, "--skip-bad"]) == 0 and len(output.read_text().splitlines()) == 6
    assert "left out 1: chosen: null" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 2 and "exists already" in capsys.readouterr().err


def test_weights_and_scores_are_written(tmp_path):
    one = lines(tmp_path / "a.jsonl", {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]})
    assert main(["data", "convert", "--data", f"{one}:2", "--output", str(tmp_path / "b.jsonl"), "--from-scores", "all"]) == 0
    assert json.loads((tmp_path / "b.jsonl").read_text())["judgements"] == [{"order": [[1], [0]], "weight": 2.0}]
