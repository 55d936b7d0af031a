"""A few hundred inputs of `make fuzz` (tests/fuzz.py), always the same."""

import time

import pytest

pytest.importorskip("resource", reason="memory is limited by POSIX means")
from tests import fuzz


@pytest.mark.parametrize("kind, cases", [("configs", 200), ("checkpoints", 150), ("data", 80)])
def test_a_reader_reads_or_refuses(kind, cases):
    report = fuzz.run(kind, cases, seed=0)
    assert report.failures == {} and report.accepted > cases // 10 and report.refused > cases // 10


@pytest.mark.parametrize("name", fuzz.HOSTILE)
def test_hostile(name):
    report = fuzz.run("hostile", 1, seed=0, first=list(fuzz.HOSTILE).index(name))
    assert report.failures == {}


def test_faults_are_seen(monkeypatch):
    faults = iter([lambda: 1 / 0, lambda: bytes(3 << 30), lambda: time.sleep(9), lambda: None])
    monkeypatch.setitem(fuzz.KINDS, "faulty", lambda draw, folder: next(faults)())
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    report = fuzz.run("faulty", 4, seed=0)
    found = {what.split()[0]: cases[0][0] for what, cases in report.failures.items()}
    assert found == {"ZeroDivisionError": 0, "MemoryError": 1, "TooLong": 2} and report.accepted == 1
