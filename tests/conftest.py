"""What several test files share."""

from __future__ import annotations

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
