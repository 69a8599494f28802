"""Kinds of files besides JSON, several files with weights, and the layouts that are no pairs: each counted apart."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather, ipc

from preftune.config import Dpo, build, data_source
from preftune.errors import DataError, UsageError
from preftune.formats import Tally, read, stream, to_json
from preftune.formats.sources import identity
from preftune.records import Judgement, Message, Response, pairs

PAIRS = [{"prompt": f'q{i}, "so"\n?', "chosen": f" yes ü {i}", "rejected": " no", "score_chosen": 0.5, "source": "web"} for i in range(600)]
ASK, GOOD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def plain(records):
    return [replace(record, where="") for record in records]


def write_csv(path: Path, rows, separator=",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def kinds(tmp_path) -> dict[str, Path]:
    table = pa.Table.from_pylist(PAIRS)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    feather.write_feather(table, tmp_path / "a.feather")
    for name, new in (("file.arrow", ipc.new_file), ("stream.arrow", ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as out:
            out.write_table(table, max_chunksize=64)
    write_csv(tmp_path / "a.csv", PAIRS)
    write_csv(tmp_path / "a.tsv", PAIRS, "\t")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    return {path.name: path for path in tmp_path.iterdir()}


def test_every_kind_of_file_gives_the_same_records(kinds, tmp_path_factory):
    wanted = plain(read([lines(tmp_path_factory.mktemp("j") / "a.jsonl", *PAIRS)]).records)
    assert len(kinds) == 8
    for name, path in kinds.items():
        found = read([path])
        assert plain(found.records) == wanted, name
        text = "csv" in name or "tsv" in name
        # a row of CSV is two lines here: its prompt holds a line end
        assert [r.where for r in found.records[:3]] == [f"{path}:{n}" for n in ((2, 4, 6) if text else (1, 2, 3))], name


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read([path])
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(("text", "words"), [
    ("prompt,chosen,rejected\na,b\n", ":2: 2 cells, but the header names 3"),
    ("prompt,chosen,rejected\na,b,c\n\na,b,c,d\n", ":4: 4 cells, but the header names 3"),
    ("prompt,chosen,rejected\na,\"b\"x,c\n", ":2: not valid CSV: ',' expected after '\"'"),
    ("prompt,chosen,rejected\na,b,\"c\n", ":2: not valid CSV: unexpected end of data"),
    ("prompt,chosen,rejected\n\"a\nb\",c,d\ne,,g\n", ":4: chosen: empty, expected text"),
    ("prompt,prompt,rejected\na,b,c\n", ":1: a header with a name twice"),
    ("prompt,,rejected\na,b,c\n", ":1: a header with an empty name"),
    ("prompt;chosen;rejected\na;b;c\n", ":2: no known layout: the columns are 'prompt;chosen;rejected'"),
    ("prompt,chosen,rejected\na,b\x00,c\n", r":2: chosen: control character: \u0000"),
    ("prompt,chosen,rejected,score_chosen\na,b,c,high\n", ":2: score_chosen: not valid JSON: Expecting value at column 1"),
    ("prompt,chosen,rejected,score_chosen\na,b,c,NaN\n", ":2: score_chosen: not a JSON number: NaN"),
    ("prompt,completion,label\na,b,maybe\n", ":2: label: not valid JSON: Expecting value at column 1"),
    ("prompt,completion,label\na,b,1\n", ":2: label: a number, expected true or false"),
    ("prompt,chosen,rejected\n", ": empty: it holds no row"), ('"prompt" x,chosen\n', ":1: not valid CSV: ',' expected after"),
])  # fmt: skip
def test_faults_in_csv_are_named(text, words, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert refused(path).startswith(words), refused(path)


def test_one_bad_row_of_csv_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\na,caf\xe9,c\na,b\na,b,c\n")
    found = read([path], skip_bad=True)
    assert [r.where for r in found.records] == [f"{path}:2", f"{path}:5"] and [e.line for e in found.skipped] == [3, 4]
    assert "byte 0xe9 at offset 34" in str(found.skipped[0])


def test_cells_that_are_json_and_cells_that_are_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion,label,votes\n7,true,True,3\n"[1]","{}",false,\n')
    records = read([path]).records
    assert [(r.prompt, r.responses[0].text, r.labels, dict(r.meta)) for r in records] == [
        ("7", "true", (True,), {"votes": "3"}), ("[1]", "{}", (False,), {"votes": ""})]  # fmt: skip
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""2+2?""}, {""role"": ""assistant"", ""content"": ""4""}]"\n')
    assert read([path]).records[0].responses[0].text == (Message("assistant", "4"),)


def test_values_of_tables_that_json_has_not(tmp_path):
    path = tmp_path / "a.parquet"
    base = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pq.write_table(pa.Table.from_pylist([base | {"when": datetime.datetime(2025, 1, 2, 3), "price": decimal.Decimal("1.50")}]), path)
    assert read([path]).records[0].meta == {"when": "2025-01-02 03:00:00", "price": "1.50"}
    for value, words in ((b"x", ":2: more: a value of type bytes"), (float("nan"), ":2: more: not a JSON number: nan")):
        pq.write_table(pa.Table.from_pylist([base | {"more": None}, base | {"more": value}]), path)
        assert refused(path).startswith(words)
    pq.write_table(pa.Table.from_pylist([base, base | {"chosen": None}]), path)
    assert refused(path) == ":2: chosen: null, expected text or messages"
    pq.write_table(pa.table([pa.array(["p"]), pa.array(["a"]), pa.array(["b"])], names=["prompt", "chosen", "chosen"]), path)
    assert refused(path) == ": a column name twice"


def test_canonical_rows_and_messages_survive_a_table_whose_absent_keys_are_null(tmp_path):
    rows = [{"prompt": "p", "responses": [{"text": "a", "score": 1.0}, {"text": "b", "finished": True}], "ranks": [0, 1]},
            {"prompt": "q", "responses": [{"text": "a"}, {"text": "b"}], "judgements": [{"order": [[1], [0]], "weight": 2.0}],
             "id": "x"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"ranks": None, "judgements": None, "id": None} | row for row in rows]), tmp_path / "a.parquet")
    assert plain(read([tmp_path / "a.parquet"]).records) == plain(read([lines(tmp_path / "a.jsonl", *rows)]).records)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
@pytest.mark.parametrize("content", [b"", b"PAR1 not really PAR1", b'{"prompt": "a"}'])
def test_what_is_no_table_is_said_to_be_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(": not ")


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_a_damaged_table_ends_in_words(name, kinds):
    whole = kinds[name].read_bytes()
    for cut in (len(whole) // 3, len(whole) - 9):
        kinds[name].write_bytes(whole[:cut])
        assert "although its name says so, or damaged" in refused(kinds[name])


# --- layouts that are no pairs ------------------------------------------------------------------------------------------------


def test_question_with_two_answers(tmp_path):
    record = read([lines(tmp_path / "a.jsonl", {"question": "2+2?", "response_j": "4", "response_k": "5", "qid": 7})]).records[0]
    assert record.prompt == (Message("user", "2+2?"),) and record.judgements == (Judgement(((0,), (1,))),) and record.meta == {"qid": 7}
    assert [r.text for r in record.responses] == ["4", "5"]


def test_alpaca_ranking_rows(tmp_path):
    record = read([lines(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "", "output": ["4", "5", "6"]})]).records[0]
    assert record.judgements == (Judgement(((0,), (1,), (2,))),) and len(list(pairs(record))) == 3
    for output, words in ((["4"], ":1: output: length 1, expected at least two outputs to rank"),
                          (["4", 5], ":1: output[1]: a number, expected text")):  # fmt: skip
        assert refused(lines(tmp_path / "a.jsonl", {"instruction": "Add.", "output": output})) == words


@pytest.mark.parametrize(("row", "prompt", "response"), [
    ({"messages": [ASK, GOOD]}, (Message("user", "2+2?"),), (Message("assistant", "4"),)),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "s"},
     (Message("system", "s"), Message("user", "2+2?")), (Message("assistant", "4"),)),
    ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
    ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (Message("user", "Add.\n\n2, 2"),), "4"),
    ({"text": "2 and 2 is 4."}, "", "2 and 2 is 4."),
])  # fmt: skip
def test_demonstrations_are_one_response_and_no_judgement(row, prompt, response, tmp_path):
    record = read([lines(tmp_path / "a.jsonl", row)]).records[0]
    assert (record.prompt, record.responses, record.judgements, record.labels) == (prompt, (Response(response),), (), None)
    assert read([lines(tmp_path / "b.jsonl", to_json(record))]).records[0] == replace(record, where=f"{tmp_path / 'b.jsonl'}:1")


def test_all_answers_of_a_dialogue_are_trained(tmp_path):
    more = [ASK, GOOD, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    record = read([lines(tmp_path / "a.jsonl", {"messages": more})]).records[0]
    assert len(record.prompt) == 1 and [m.role for m in record.responses[0].text] == ["assistant", "user", "assistant"]
    for bad in ([ASK], [GOOD], more[:3]):
        assert refused(lines(tmp_path / "a.jsonl", {"messages": bad})).startswith(":1: messages: no answer")


def test_message_trees(shared_data):
    """212 lists of 2 to 9 ranked replies, counted by a walk of its own."""
    path = shared_data / "oasst" / "en_100_tree.jsonl"
    wanted, judged = [], 0
    for number, line in enumerate(path.open(), 1):
        def walk(node, before, number=number):
            nonlocal judged
            here = [*before, node["text"]]
            ranked = sorted((r for r in node["replies"] if r.get("rank") is not None), key=lambda r: r["rank"])
            if len(ranked) > 1:
                wanted.append((number, here, [r["text"] for r in ranked]))
                judged += len(ranked) * (len(ranked) - 1) // 2
            for reply in node["replies"]:
                walk(reply, here)
        walk(json.loads(line)["prompt"], [])
    found = read([path])
    assert found.layout == "message-tree" and found.counts["rows"] == 100 and found.counts["records"] == len(wanted) == 212
    best_first = [[r.responses[i].text for tier in r.judgements[0].order for i in tier] for r in found.records]
    at = [int(r.where.rpartition(":")[2]) for r in found.records]
    got = [(line, [m.content for m in r.prompt], best) for line, r, best in zip(at, found.records, best_first, strict=True)]
    assert got == wanted and sum(len(list(pairs(r))) for r in found.records) == judged
    assert [m.role for m in max((r.prompt for r in found.records), key=len)][:3] == ["user", "assistant", "user"]


def test_trees_that_nobody_ranked_are_counted_and_faults_are_located(tmp_path):
    tree = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": [
        {"role": "assistant", "text": "a", "rank": 0}, {"role": "assistant", "text": "b", "rank": 1, "deleted": True},
        {"role": "assistant", "text": "c", "rank": None}]}}  # fmt: skip
    path = lines(tmp_path / "a.jsonl", tree)
    assert refused(path).endswith("no usable row among 1")
    good = json.loads(json.dumps(tree).replace('"rank": null', '"rank": 1'))
    found = read([lines(path, tree, good)])
    assert found.counts["rows_without_records"] == 1 and [r.text for r in found.records[0].responses] == ["a", "c"]
    bad = json.loads(json.dumps(good).replace('"text": "c"', '"txt": "c"'))
    assert refused(lines(path, bad)).startswith(":1: prompt.replies[2]: a message without 'text' (did you mean 'txt'?): it has 'role'")
    odd = json.loads(json.dumps(good).replace('"rank": 1}]', '"rank": "1"}]'))
    assert refused(lines(path, odd)) == ":1: ranks[1]: text, expected a rank (lowest is best) or null"


# --- weights and scores -------------------------------------------------------------------------------------------------------


def test_a_weight_multiplies_the_judgements_of_its_file(tmp_path):
    one = lines(tmp_path / "a.jsonl", PAIRS[0])
    two = lines(tmp_path / "b.jsonl", {"prompt": "p", "responses": ["a", "b"], "judgements": [{"order": [[0], [1]], "weight": 3}]})
    weights = [[j.weight for r in read([f"{one}{w}", two]).records for j in r.judgements] for w in ("", ":2", ":.5", ":1")]
    assert weights == [[1, 3], [2, 3], [0.5, 3], [1, 3]]
    assert identity(f"{one}:2")[0] == identity(str(one))[0] and identity(f"{one}:2") != identity(str(one))


def test_weights_that_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIRS[0])
    with pytest.raises(UsageError, match="a weight must be above 0"):
        data_source(f"{path}:0")
    with pytest.raises(UsageError, match=r"twice; give it once, with the summed weight"):
        read([path, f"{path}:2"])
    labelled = lines(tmp_path / "l.jsonl", {"prompt": "p", "completion": "c", "label": True})
    with pytest.raises(UsageError, match=r"l\.jsonl:1 holds labels"):
        read([f"{labelled}:2"])
    lines(tmp_path / "a.jsonl:2", PAIRS[0])
    with pytest.raises(UsageError, match="ambiguous: a file of this name is here"):
        data_source(f"{path}:2")
    path.unlink()
    assert data_source(f"{path}:2") == (f"{path}:2", 1.0) and data_source("C:/x.jsonl") == ("C:/x.jsonl", 1.0)


def test_a_weighted_file_is_looked_for_before_anything_heavy_is_imported(tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    given = {"model": (str(model), "--model"), "output": (str(tmp_path / "o"), "--output")}
    path = lines(tmp_path / "a.jsonl", PAIRS[0])
    assert build(Dpo, given | {"data": ([f"{path}:2"], "--data")}).data == [f"{path}:2"]
    with pytest.raises(DataError, match=r"b\.jsonl: no such file"):
        build(Dpo, given | {"data": ([f"{tmp_path / 'b.jsonl'}:2"], "--data")})


def test_scores_become_judgements_when_asked(tmp_path):
    rows = [{"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3, None, 1]},
            {"prompt": "t", "responses": ["a", "b"], "scores": [2, 2]},
            {"prompt": "j", "responses": ["a", "b"], "scores": [2, 1], "ranks": [1, 0]}]  # fmt: skip
    path = lines(tmp_path / "a.jsonl", *rows)
    assert [r.judgements for r in read([path]).records] == [(), (), (Judgement(((1,), (0,))),)]
    assert [r.judgements for r in read([path], from_scores="best-worst").records] == [
        (Judgement(((1,), (0,))),), (), (Judgement(((1,), (0,))),)]  # fmt: skip
    assert read([f"{path}:2"], from_scores="all").records[0].judgements == (Judgement(((1,), (0, 3)), weight=2.0),)


def test_best_against_worst_gives_the_pairs_that_were_made_so(shared_data):
    made = [json.loads(line) for line in (shared_data / "tinystories-sentiment" / "pairs.jsonl").open()]
    records = read([shared_data / "tinystories-sentiment" / "kwise4.jsonl"], from_scores="best-worst").records
    gaps = [max(scores) - min(scores) for r in records for scores in [[a.score for a in r.responses]]]
    found = [r for r, gap in zip(records, gaps, strict=True) if gap > 0.1]  # the file's makers left closer ones out
    assert all(r.judgements for r in records) and len(found) == len(made) == 1487
    for record, row in zip(found, made, strict=True):
        pair = next(iter(pairs(record)))
        assert record.prompt == row["prompt"]
        assert [record.responses[i].score for i in (pair.chosen, pair.rejected)] == [row["score_chosen"], row["score_rejected"]]


# --- streams and the hub ------------------------------------------------------------------------------------------------------


def test_a_stream_holds_one_record_at_a_time(tmp_path):
    tally = Tally()
    records = stream([lines(tmp_path / "a.jsonl", *PAIRS)], tally)
    next(records)
    assert tally.counts["rows"] == 1 and tally.layouts == {"prompt-chosen-rejected": 1}
    assert sum(1 for _ in records) == 599 and tally.counts["records"] == 600


def test_the_hub_is_asked_only_by_its_name_and_never_offline(tmp_path, monkeypatch):
    given = {"model": (str(tmp_path), "--model"), "output": (str(tmp_path / "o"), "--output"), "data": (["hub:a/b"], "--data")}
    assert build(Dpo, given).data == ["hub:a/b"]
    with pytest.raises(UsageError, match=r"--data hub:a/b: --offline refuses the hub"):
        build(Dpo, given | {"offline": (True, "--offline")})
    with pytest.raises(DataError, match="no such file"):
        build(Dpo, given | {"data": (["a/b"], "--data")})
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(UsageError, match="needs the package 'datasets'"):
        read(["hub:a/b"])


def test_what_the_hub_does_not_give_is_told(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub:preftune/nowhere: cannot be had from the hub"):
        read(["hub:preftune/nowhere"])
