"""Signals: the first asks, the second ends, an ignored one stays ignored."""

import errno
import io
import os
import signal

import pytest

from run.stop import Stop

SIGNALS = [getattr(signal, name) for name in Stop.NAMES if hasattr(signal, name)]
pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_the_first_signal_asks_and_the_second_ends_at_once(number, capsys):
    stop = Stop()
    assert stop.signal == 0
    os.kill(os.getpid(), number)
    assert stop.signal == number and "stopping after this step" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
        signal.getsignal(number)  # Python runs handlers between two operations
    assert ended.value.code == 128 + number


def test_a_hangup_is_heard_where_nothing_can_be_said(monkeypatch):
    """The window is closed: a write fails with EIO."""

    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    stop = Stop()
    monkeypatch.setattr("sys.stderr", Closed())
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_another_signal_is_a_second_one():
    stop = Stop()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGINT)
        signal.getsignal(signal.SIGINT)
    assert ended.value.code == 128 + signal.SIGINT and stop.signal == signal.SIGTERM


@pytest.mark.parametrize("number", [n for n in SIGNALS if n != signal.SIGINT], ids=lambda n: n.name)
def test_an_ignored_signal_stays_ignored(number):
    """As under nohup."""
    signal.signal(number, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), number)
    assert stop.signal == 0 and signal.getsignal(number) == signal.SIG_IGN


def test_an_interrupt_is_heard_even_if_it_was_ignored():
    """A shell ignores it in what it starts in the background, where only a person who means it sends one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT


def test_a_system_without_hangups(monkeypatch):
    """Windows has no SIGHUP."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
