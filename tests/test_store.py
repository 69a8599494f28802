"""The store: the same arrays in memory and on the disk, the same partners however records come, and no memory per record."""

from __future__ import annotations

import gc
import shutil
import tracemalloc

import make
import numpy as np
import pytest

from preftune.batches import make_batch, split, tokens_of
from preftune.errors import DiskError
from preftune.records import Judgement, Record, Response
from preftune.store import CONTEXT, MISMATCHED, build
from preftune.tokens import encode, make_codec

ARRAYS = [name for name in make.store(1).__dataclass_fields__ if name != "where"]


def some(count, **kwargs):
    labelled = [Record(f"l{i}", (Response(" a"), Response(" b")), labels=(True, None), where=f"l:{i}") for i in range(3)]
    return [*make.records(count, k=3, **kwargs), *labelled]


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_the_disk_holds_what_memory_holds(count, mismatched, tmp_path, monkeypatch):
    """In files without names: nothing is left of them whatever happens, and small columns never get one."""
    codec, records = make_codec(make.tokenizer()), some(count)
    plain, _ = build(records, codec, max_length=60, mismatched=mismatched)
    small, _ = build(iter(records), codec, max_length=60, mismatched=mismatched, folder=tmp_path / "nowhere")
    assert small.identity() == plain.identity() and not (tmp_path / "nowhere").exists()
    monkeypatch.setattr("preftune.store.FLUSH", 3)
    mapped, _ = build(iter(records), codec, max_length=60, mismatched=mismatched, folder=tmp_path)
    for name in ARRAYS:
        one, two = getattr(plain, name), getattr(mapped, name)
        assert one.dtype == two.dtype and one.shape == two.shape and np.array_equal(one, two, equal_nan=one.dtype.kind == "f"), name
        assert not two.flags.writeable or not two.size or two.size < 3, name
    assert not list(tmp_path.iterdir()) and plain.identity() == mapped.identity() and list(plain.where) == list(mapped.where)
    shutil.rmtree(tmp_path)  # mapped arrays outlive their names
    for record in range(len(plain)):
        assert make_batch(plain, [record]).tokens.tolist() == make_batch(mapped, [record]).tokens.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 70])
def test_partners_are_the_next_records_that_fit_in_a_circle(count):
    """Against the rule as it reads, over the whole list at once."""
    codec, records = make_codec(make.tokenizer()), make.records(count)
    records[count // 2] = Record("q", (Response(" x" * 25), Response(" y")), (Judgement(((0,), (1,))),))
    store, intake = build(iter(records), codec, max_length=60, mismatched=True)
    kept = [e for _, e in encode([records[i] for i in intake.kept], codec)]
    assert len(kept) == len(records)
    for r in range(len(store)):
        segments = range(store.record_start[r], store.record_start[r + 1])
        extra = [store.tokens[store.start[s] : store.start[s + 1]].tolist() for s in segments if store.response[s] == MISMATCHED]
        fits = [list(kept[(r + k) % len(kept)].responses[0]) for k in range(1, min(len(kept), 32))
                if len(kept[r].prompt) + len(kept[(r + k) % len(kept)].responses[0]) <= 60]  # fmt: skip
        assert extra == fits[:1] and store.response[segments.start] == CONTEXT


def test_records_cost_no_memory_but_their_place(tmp_path, monkeypatch):
    """Below 30 bytes of Python memory a record, whatever its length, once what nobody holds is collected."""
    def stream(count):
        for i in range(count):
            answers = (Response(f" answer {i} " * 4), Response(" no"))
            yield Record(f"prompt {i} " * 3, answers, (Judgement(((0,), (1,))),), where=f"f.jsonl:{i + 1}")

    monkeypatch.setattr("preftune.store.FLUSH", 1 << 6)
    codec, cost = make_codec(make.tokenizer()), {}
    for count in (500, 2_500):
        folder = tmp_path / str(count)
        folder.mkdir()
        tracemalloc.start()
        store, intake = build(stream(count), codec, max_length=None, folder=folder)
        gc.collect()
        cost[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(store) == len(intake.kept) == count and store.where[count - 1] == f"f.jsonl:{count}"
    each = (cost[2_500] - cost[500]) / 2_000
    assert each < 30, each


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("preftune.store.FLUSH", 1)
    monkeypatch.setattr("preftune.store.TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(DiskError, match="the disk is full"):
        build(make.records(3000), make_codec(make.tokenizer()), max_length=None, folder=tmp_path)


def test_the_cost_of_a_record_does_not_grow_with_the_store():
    store = make.store(9, k=3)
    for share in (True, False):
        for r in range(9):
            assert tokens_of(store, [r], share=share).tolist() == [len(make_batch(store, [r], share=share).tokens)]
    assert [r for group in split(store, range(9), 100) for r in group] == list(range(9))
