"""Two passes in bounded memory against everything at once in memory: the same counts, splits, order and arrays."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from test_defects import DEFECTS, row

from preftune import audit, intake, reference
from preftune.config import Dpo, Sft
from preftune.errors import DataError, DiskError
from preftune.formats import read
from preftune.records import Judgement, Message, Record, Response, merge, pairs, prompt_key
from preftune.stages import dpo, sft
from preftune.store import build, unfit
from preftune.tokens import make_codec

ARRAYS = [name for name in make.store(1).__dataclass_fields__ if name != "where"]
LENGTH = 60


# ---- the oracle: lists of records, and what is done with them one thing after the other ------------------------------------


def all_at_once(task: Any, options: Any, codec: Any, mismatched: bool) -> dict[str, Any]:
    """What a run stands on, from records held in memory."""

    def chosen(words: list[str], most: int | None) -> tuple[list[Record], Any]:
        found = read(words, format=options.format, skip_bad=options.skip_bad, max_records=most, from_scores=options.from_scores)
        return [r for r in (task.select(record, options) for record in found.records) if r is not None], found

    def equal(record: Record) -> bool:
        said = [[audit.plain(record.responses[i].text) for i in (p.chosen, p.rejected)] for p in pairs(record)]
        return any(one == other for one, other in said)

    records, reading = chosen(options.data, options.max_records)
    facts: dict[str, Any] = {"read": len(reading.records), "layout": reading.layout, "unreadable": len(reading.skipped),
                             "nothing_to_learn": len(reading.records) - len(records),
                             "unreadable_by_reason": {k[9:]: n for k, n in reading.counts.items() if k.startswith("skipped: ")},
                             "shown": [str(e) for e in reading.skipped[:100]]}  # fmt: skip
    first = -1
    if options.eval_data:
        held, _ = chosen(options.eval_data, None)
        known = {prompt_key(r) for r in records}
        first, facts["leaks"] = len(records), sum(prompt_key(r) in known for r in held)
        records = records + held
    facts["audit"] = audit.inspect(records).numbers()
    if any(map(equal, records)) and "equal" not in options.allow:
        first = first if first < 0 else first - sum(map(equal, records[:first]))
        facts["equal_left_out"] = sum(map(equal, records))
        records = [r for r in records if not equal(r)]

    count = Counter(prompt_key(r) for r in records if r.judgements or r.labels is not None)
    shared = [i for i, r in enumerate(records) if count[prompt_key(r)] > 1]
    alone = {i for i in shared if not (records[i].judgements or records[i].labels is not None)}
    alone |= {i for i, out in enumerate(unfit(records, codec, max_length=LENGTH)) if out}
    size = len(records) if first < 0 else first
    train, tail = merge(records[:size], apart=alone), merge(records[size:], apart={i - size for i in alone})
    facts["merged"] = len(records) - len(train) - len(tail)
    store, found = build(train + tail, codec, max_length=LENGTH, mismatched=mismatched)
    kept = [(train + tail)[i] for i in found.kept]
    if first < 0:
        keys = list(dict.fromkeys(prompt_key(r) for r in kept))
        many = min(len(keys) - 1, max(1, round(options.holdout * len(keys)))) if options.holdout else 0
        out = {keys[i] for i in np.random.default_rng(options.seed).permutation(len(keys))[:many]}
        held_out = np.array([prompt_key(r) in out for r in kept], bool)
    else:
        held_out = np.array([i >= len(train) for i in found.kept])
    places = np.diff(store.start)[store.record_start[:-1]]
    fits = held_out & (places + options.sample_tokens <= 128)
    prompts = list({prompt_key(kept[i]): kept[i].prompt for i in np.flatnonzero(fits)}.values())[: options.eval_prompts]
    return {"facts": facts, "store": store, "held": held_out, "prompts": prompts, "dropped": dict(found.dropped),
            "cases": dict(found.cases), "refused": [str(e) for e in found.refused], "kept": list(found.kept),
            "lengths": list(found.lengths)}  # fmt: skip


def in_two_passes(task: Any, options: Any, codec: Any, mismatched: bool, folder: Path) -> dict[str, Any]:
    """The same by `intake`, as `pipeline.prepare` does it."""
    taken = intake.read_records(task, options, folder)
    plan = intake.merge_prompts(taken, codec, LENGTH)
    store, found = intake.encode_records(taken, plan, codec, options, window=LENGTH, mismatched=mismatched, folder=folder)
    chosen = np.array(found.kept)
    kept = plan.stands[chosen]
    held = intake.split_by_prompt(taken.prompt[kept], options.holdout, options.seed) if plan.first < 0 else chosen >= plan.first
    return {"facts": taken.facts | {"merged": len(taken.shelf) - len(plan.stands)}, "store": store, "held": held,
            "prompts": intake.prompts_to_sample(taken, kept, store, held, options, 128), "dropped": dict(found.dropped),
            "cases": dict(found.cases), "refused": [str(e) for e in found.refused], "kept": list(found.kept),
            "lengths": list(found.lengths)}  # fmt: skip


def write(path: Path, lines: list[Any]) -> str:
    text = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    path.write_bytes(b"\n".join(text) + b"\n")
    return str(path)


def pair(prompt: Any, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


MIXED = [
    *(pair(f"p{i % 5}", f" yes {i}", " no") for i in range(12)),
    pair("p1", " no", " yes 1"),  # contradicts
    pair("p2", " same", "  same "),  # equal
    pair("p3", " x" * 80, " short"),  # too long: stays alone, so that p3's other votes live
    pair("q" * 80, " a", " b"),
    pair("p0", " yes 0", " no"),  # twice
    *(pair(f"alone {i}", " good", " bad") for i in range(9)),
    pair("p4", " </s> spelled", " no"),  # a control token: cannot be encoded
]
RANKED = [{"prompt": f"k{i % 4}", "responses": [" a", f" b{i}", " c"], "judgements": [{"order": [[1], [0, 2]], "weight": 2.0}]}
          for i in range(9)]  # fmt: skip
SCORED = [{"prompt": f"s{i % 3}", "responses": [" a", f" b{i}", " c"], "scores": [1, 3, 2]} for i in range(6)]
LABELLED = [{"prompt": f"u{i % 3}", "completion": f" c{i % 2}", "label": i % 3 == 0} for i in range(9)]
TURNS = [{"prompt": [{"role": "user", "content": f"t{i % 3}"}], "chosen": [{"role": "assistant", "content": f"good {i}"}],
          "rejected": [{"role": "assistant", "content": "bad"}]} for i in range(7)]  # fmt: skip
HELD = [pair("new 1", " a", " b"), pair("p0", " leaked", " b"), pair("new 1", " c", " b"), pair("new 2", " same", "same"),
        pair("new 3", " a", " b")]  # fmt: skip
GOOD = [row(prompt=f"ok {i % 9}", chosen=f" y{i % 4}") for i in range(30)]


def case(tmp_path: Path, name: str) -> tuple[Any, Any, bool]:
    """(task, options, mismatched) of a case."""
    wanted: dict[str, tuple[list[list[Any]], dict[str, Any]]] = {
        "mixed": ([MIXED], {}), "merged": ([[pair("one", f" y{i}", " n") for i in range(20)], RANKED], {}), "turns": ([TURNS], {}),
        "held out apart": ([MIXED], {"eval": HELD, "allow": ["leak"]}), "equal allowed": ([MIXED], {"allow": ["equal"]}),
        "scores, some unjudged": ([MIXED, SCORED], {"from_scores": "all"}), "unjudged": ([MIXED, SCORED], {"max_records": 26}),
        "labels": ([LABELLED], {}), "mismatched": ([MIXED, RANKED], {"mismatched": True}),
        "planted defects": ([[*GOOD, *(line for line, _, _ in DEFECTS), *GOOD[:5]]], {}),
        "weights": ([MIXED, RANKED], {"weight": ":3"}), "preferred": ([MIXED, RANKED], {"verb": "sft"}),
    }  # fmt: skip
    files, more = wanted[name]
    paths = [write(tmp_path / f"f{i}.jsonl", lines) + more.get("weight", "") for i, lines in enumerate(files)]
    held = [write(tmp_path / "held.jsonl", more["eval"])] if "eval" in more else []
    given = {k: v for k, v in more.items() if k in ("allow", "from_scores", "max_records")}
    cls, task = (Sft, sft.TASK) if more.get("verb") == "sft" else (Dpo, dpo.TASK)
    extra = {"preferred": True} if cls is Sft else {}
    options = cls(model="m", data=paths, output="o", eval_data=held, skip_bad=True, holdout=0.3, seed=3, sample_tokens=20, eval_prompts=3,
                  **given, **extra)  # fmt: skip
    return task, options, more.get("mismatched", False)


CASES = ["mixed", "merged", "turns", "held out apart", "equal allowed", "scores, some unjudged", "unjudged", "labels", "mismatched",
         "planted defects", "weights", "preferred"]  # fmt: skip


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_two_passes_give_what_memory_gives(name, spilled, tmp_path, monkeypatch):
    task, options, mismatched = case(tmp_path, name)
    codec, work = make_codec(make.tokenizer(template=make.TEMPLATE)), tmp_path / "cache" / "work"
    want = all_at_once(task, options, codec, mismatched)
    if spilled:
        monkeypatch.setattr("preftune.intake.SPOOL", 100)
        monkeypatch.setattr("preftune.store.FLUSH", 7)
    got = in_two_passes(task, options, codec, mismatched, work)
    assert work.is_dir() == spilled and not (spilled and list(work.iterdir())), "what is on the disk has no name"
    for array in ARRAYS:
        one, two = getattr(want["store"], array), getattr(got["store"], array)
        assert one.dtype == two.dtype and np.array_equal(one, two, equal_nan=one.dtype.kind == "f"), array
    assert list(want["store"].where) == list(got["store"].where) and np.array_equal(want["held"], got["held"])
    for key in want.keys() - {"store", "held"}:
        assert want[key] == got[key], key
    assert json.dumps(want["facts"], sort_keys=True) == json.dumps(got["facts"], sort_keys=True)
    assert list(want["facts"]["unreadable_by_reason"]) == list(got["facts"]["unreadable_by_reason"])
    assert len(want["store"]) >= 2 and got["held"].any() and not got["held"].all()
    if name in ("mixed", "merged", "held out apart", "mismatched", "weights", "turns", "labels", "planted defects"):
        assert want["facts"]["merged"] >= 3


def test_a_shelf_gives_back_what_was_put_there(tmp_path, monkeypatch):
    monkeypatch.setattr("preftune.intake.SPOOL", 300)
    turns = (Message("system", "be\n\x1fbrief"), Message("user", "日本 \U0001f600 \x85"))
    records = [
        Record("plain", (Response(" a", True), Response("", False), Response(" c")),
               (Judgement(((0, 2), (1,)), (), 0.1 + 0.2, 1 / 3),), where="f:1"),
        Record(turns, (Response((Message("assistant", "x"), Message("user", "y"), Message("assistant", "z"))),),
               labels=(None,), where="f:2"),
        Record("p", (Response("a"), Response("b"), Response("c")),
               (Judgement(((2,),), below=(0, 1)), Judgement(((0,), (1,)))), where="a:b:3"),
        *make.records(30, k=3),
    ]  # fmt: skip
    shelf = intake.Shelf(tmp_path / "deep" / "er")
    for i, record in enumerate(records):
        shelf.append(record)
        assert shelf[i // 2] == records[i // 2], "reading between writings changes nothing"
    assert list(shelf) == records and shelf[1:3] == records[1:3] and len(shelf) == 33
    assert (tmp_path / "deep" / "er").is_dir() and not list((tmp_path / "deep" / "er").iterdir())
    with pytest.raises(IndexError):
        shelf[33]


def test_a_full_disk_is_told_by_the_shelf(tmp_path, monkeypatch):
    monkeypatch.setattr("preftune.intake.SPOOL", 0)
    shelf = intake.Shelf(tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        shelf.file.close()
        shelf.file, shelf.spooled = full, False
        with pytest.raises(DiskError, match="the disk is full"):
            shelf.append(make.records(1)[0])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = make.write_pairs(tmp_path / "pairs.jsonl", 20)
    options = Dpo(model="m", data=[f"{path}:2"], output="o")
    taken = intake.read_records(dpo.TASK, options, tmp_path / "work")
    intake.unchanged(taken, options.data)
    before = os.stat(path)
    path.write_text(path.read_text().replace("thanks", "thanky", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(DataError, match="changed while it was read"):
        intake.unchanged(taken, options.data)


def test_the_memory_of_a_record_does_not_grow_with_its_text(tmp_path, monkeypatch):
    """Records held in memory would cost more than a kilobyte each; at this size half of what is seen are buffers (bench/million.py)."""
    monkeypatch.setattr("preftune.store.FLUSH", 1 << 6)
    monkeypatch.setattr("preftune.intake.SPOOL", 1 << 12)
    codec, cost = make_codec(make.tokenizer()), {}
    for count in (300, 1_200):
        rows = [pair(f"prompt {i - i % 3 // 2} " * 4, f" answer {i}." * 4, " no.") for i in range(count)]
        path = write(tmp_path / f"{count}.jsonl", rows)
        options = Dpo(model="m", data=[path], output="o", skip_bad=True)
        del rows
        tracemalloc.start()
        taken = intake.read_records(dpo.TASK, options, tmp_path / "work")
        plan = intake.merge_prompts(taken, codec, None)
        store, found = intake.encode_records(taken, plan, codec, options, window=None, mismatched=False, folder=tmp_path / "work")
        cost[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(store) == len(found.kept) == count * 2 // 3 and len(taken.shelf) == count
    assert (cost[1_200] - cost[300]) / 900 < 300, cost


def test_the_reference_column_is_mapped_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(reference, "CHUNK", 3)
    monkeypatch.setattr(reference, "FINITE", 50)
    from preftune import models

    model, store, seen = models.prepare(make.model()), make.store(11, k=3), []
    column, reused = reference.fetch(model, store, "key", micro_tokens=100, progress=lambda done, total: seen.append((done, total)))
    assert not reused and not column.flags.writeable and column.dtype == np.float32 and seen[-1] == (11, 11)
    assert np.abs(column - reference.compute(model, store, micro_tokens=10**6)).max() < 1e-5
    assert ((column != 0) <= store.trained).all() and column.shape == store.tokens.shape
    again, reused = reference.fetch(model, store, "key", micro_tokens=100)
    assert reused and np.array_equal(column, again)
    path = reference.cache_folder() / "key.npy"
    whole, again = path.read_bytes(), again.copy()
    del column  # nothing of ours cuts a file that is mapped: columns are replaced, never written over
    for damaged in (b"", whole[:60], whole[:-5], whole[:-4] + b"\0\0\x80\x7f"):
        path.write_bytes(damaged)
        once_more, reused = reference.fetch(model, store, "key", micro_tokens=100)
        assert not reused and np.array_equal(once_more, again)
        del once_more


def test_options_are_not_changed_by_reading(tmp_path):
    task, options, _ = case(tmp_path, "mixed")
    before = replace(options)
    intake.read_records(task, options, tmp_path / "work")
    assert options == before
