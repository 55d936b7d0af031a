"""A few hundred inputs of `make fuzz` (tests/fuzz.py), always the same."""

import pytest

pytest.importorskip("resource", reason="memory is limited by POSIX means")
from tests import fuzz


@pytest.mark.parametrize("kind, cases", [("configs", 300), ("checkpoints", 200), ("data", 100)])
def test_a_reader_reads_or_refuses(kind, cases):
    report = fuzz.run(kind, cases, seed=0)
    assert report.failures == {} and report.accepted > cases // 10 and report.refused > cases // 10


@pytest.mark.parametrize("name", fuzz.HOSTILE)
def test_hostile(name):
    report = fuzz.run("hostile", 1, seed=0, first=list(fuzz.HOSTILE).index(name))
    assert report.failures == {}
