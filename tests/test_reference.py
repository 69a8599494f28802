"""The reference column: stopped and resumed it is the same to the bit, and nothing is computed twice."""

from __future__ import annotations

import make
import numpy as np
import pytest

from preftune import models, reference
from preftune.batches import split


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    return tmp_path / "reference"


class Stopped(Exception):
    pass


def test_a_stopped_pass_goes_on_where_it_was(cache):
    model, store = models.prepare(make.model()), make.store(12)
    whole = reference.compute(model, store, micro_tokens=100)
    groups = len(split(store, range(12), 100))
    assert groups > 4 and np.isfinite(whole).all() and (whole[store.trained] < 0).all() and (whole[~store.trained] == 0).all()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    decoder = model.get_decoder()
    handle = decoder.register_forward_hook(lambda *_: calls.append(1))

    def stop(done: int, total: int) -> None:
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        reference.fetch(model, store, "k", micro_tokens=100, progress=stop)
    assert [p.name for p in cache.iterdir()] == ["k-100.part"] and len(calls) == 3
    column, reused = reference.fetch(model, store, "k", micro_tokens=100)
    assert not reused and len(calls) == groups, "three groups were done, the others once"
    assert np.array_equal(column, whole)
    assert [p.name for p in cache.iterdir()] == ["k.npy"]
    again, reused = reference.fetch(model, store, "k", micro_tokens=100)
    assert reused and np.array_equal(again, whole) and len(calls) == groups
    handle.remove()


def test_a_part_of_another_size_or_a_damaged_column_is_made_again(cache):
    model, store = models.prepare(make.model()), make.store(4)
    cache.mkdir()
    (cache / "k-100.part").write_bytes(b"\0" * 12)
    (cache / "k.npy").write_bytes(b"")
    column, reused = reference.fetch(model, store, "k", micro_tokens=100)
    assert not reused and np.array_equal(column, reference.compute(model, store, micro_tokens=100))


def test_two_at_once_do_not_share_a_part(cache):
    model, store = models.prepare(make.model()), make.store(4)
    cache.mkdir()
    with reference._unfinished(cache / "k-100.part", len(store.tokens)) as first:
        assert first is not None and np.isnan(first).all()
        column, _ = reference.fetch(model, store, "k", micro_tokens=100)
        assert np.isnan(first).all(), "the other's file is left alone"
    assert np.array_equal(column, reference.compute(model, store, micro_tokens=100))
