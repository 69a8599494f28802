"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import child
import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference data, which lies beside the checkout on some machines and is never part of it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside this checkout")
    return folder


@pytest.fixture(scope="session")
def children(tmp_path_factory) -> Iterator[child.Children]:
    """Processes that may be killed: tests/child.py says how."""
    with child.server(tmp_path_factory.mktemp("children")) as found:
        yield found


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory):
    """Reference columns of one test file: shared by its tests, not with the user's own."""
    before = os.environ.get("PREFTUNE_CACHE")
    os.environ["PREFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PREFTUNE_CACHE") if before is None else os.environ.update(PREFTUNE_CACHE=before)
