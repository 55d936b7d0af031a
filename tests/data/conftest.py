"""What a test of data finds: places to search that are its own, and a text."""

import pytest

from data import cache
from tests.data.inputs import put


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path):
    """Every place of a search is an empty one of this test, and no proxy is asked."""
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHARED_DIR", tmp_path / "shared")
    for variable in ("NANOGFT_DATA", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def play(tmp_path):
    """A text file's path."""
    return str(put(tmp_path / "play.txt"))
