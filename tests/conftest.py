"""Kernels are tested on the GPU if there is one, else in Triton's interpreter,
which must be chosen before they are imported and is watched by tests/addresses.py."""

import os
import signal

import pytest
import torch

if hasattr(signal, "SIGHUP"):  # which a suite started by nohup, and with it every run it starts, would ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kernels import backend

if backend.INTERPRETED:
    from tests import addresses

    addresses.watch()


class FailuresAtOnce:
    """Names a failure, and why, when it happens: a run that is cut off has no list of them at its end."""

    def __init__(self, terminal) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when})")
            self.terminal.write_line("\n".join(report.longreprtext.splitlines()[-20:]))


@pytest.hookimpl(trylast=True)  # once there is a terminal, which processes that are given tests have not
def pytest_configure(config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and config.getoption("numprocesses", None):
        config.pluginmanager.register(FailuresAtOnce(terminal))


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_triton():
    """The Triton backend, for one test."""
    before = backend.chosen()
    backend.use("triton")
    yield
    backend.use(before)


@pytest.fixture
def handlers():
    """Handlers of signals are put back as the test found them."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty gives memory full of the worst values, so that an element a kernel forgot to write is seen."""
    real = torch.empty

    def empty(*shape, **options):
        tensor = real(*shape, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min + 1) if tensor.dtype in INTEGERS else tensor

    monkeypatch.setattr(torch, "empty", empty)


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
