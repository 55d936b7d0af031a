"""Measured energy of a run: the counters of an NVIDIA GPU (NVML) or of the CPU's packages and memory (RAPL).

    meter = Meter.on(device.type)
    meter.start()       measures idle power for `idle_seconds`, then begins
    meter.poll()        after every step: RAPL's counters are short and wrap around, and are read once in POLL_SECONDS
    meter.stop()        a Reading: joules above idle, or None and the reason

What is measured is the whole device, whoever uses it, without the rest of the machine: idle power is subtracted, other
programs' work is not. Where nothing can be read the note begins with "n/a".
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POLL_SECONDS = 30  # the shortest counters, of 65 kJ, wrap around in minutes
RAPL_FOLDER = Path("/sys/class/powercap")
NVML_ERRORS = {1: "not initialised", 2: "invalid argument", 3: "not supported by this GPU", 4: "no permission",
               6: "no such GPU", 9: "no driver", 15: "the GPU is lost", 999: "unknown error"}  # fmt: skip


class Unavailable(Exception):
    """No counter can be read here; the text says why."""


class Source(Protocol):
    """A counter of energy."""

    name: str

    def joules(self) -> float:
        """Energy since the source was made. Raises Unavailable if it cannot be read."""


@dataclass(frozen=True)
class Reading:
    """What a Meter found: joules above idle power over `seconds`, or None; `note` says what was read, or why not."""

    joules: float | None
    note: str
    seconds: float = 0.0
    idle_watts: float | None = None


class Nvml:
    """Total-energy counter of GPU `index` as torch numbers them. Raises Unavailable without driver, GPU or counter.

    `library` is libnvidia-ml, loaded if None. MIG slices have no counter of their own.
    """

    def __init__(self, index: int = 0, library: Any = None, visible: str | None = None):
        if library is None:
            try:
                library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError:
                raise Unavailable("libnvidia-ml.so.1 cannot be loaded: there is no NVIDIA driver here") from None
        self.library, self.handle = library, ctypes.c_void_p()
        physical = _physical_index(index, os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible)
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(physical), ctypes.byref(self.handle))
        self.name = f"NVML, GPU {physical}"
        self.first = self._millijoules()

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            raise Unavailable(f"{function} failed: {NVML_ERRORS.get(code, 'error')} (code {code})")

    def _millijoules(self) -> int:
        energy = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.handle, ctypes.byref(energy))
        return energy.value

    def joules(self) -> float:
        """Energy of the whole GPU board since this was made."""
        return (self._millijoules() - self.first) / 1e3


def _physical_index(index: int, visible: str | None) -> int:
    """NVML's number of torch's GPU `index`, which CUDA_VISIBLE_DEVICES may have renumbered."""
    if not visible:
        return index
    names = [name.strip() for name in visible.split(",")]
    if index >= len(names) or not names[index].isdigit():
        raise Unavailable(f"CUDA_VISIBLE_DEVICES = {visible} does not give GPU {index} by number")
    return int(names[index])


class Rapl:
    """Counters of all CPU packages and their memory below `folder`. Raises Unavailable if none is there or readable.

    Zones inside a package are part of it, but for its memory; "psys" is the whole platform and would count twice.
    """

    def __init__(self, folder: Path = RAPL_FOLDER):
        zones = [p for p in sorted(folder.glob("intel-rapl:*")) if _read(p / "name").startswith(("package", "dram"))]
        if not zones:
            raise Unavailable(f"no RAPL counters in {folder}: a virtual machine, a container, or another kind of CPU")
        self.zones = zones
        self.ranges = [int(_read(zone / "max_energy_range_uj")) for zone in zones]
        self.last = [self._microjoules(zone) for zone in zones]
        self.total = 0
        self.name = f"RAPL, {', '.join(_read(zone / 'name') for zone in zones)}"

    @staticmethod
    def _microjoules(zone: Path) -> int:
        return int(_read(zone / "energy_uj"))

    def joules(self) -> float:
        """Energy since this was made, if no counter wrapped more than once since the last call."""
        now = [self._microjoules(zone) for zone in self.zones]
        # The counter goes from its range back to 0.
        for new, old, full in zip(now, self.last, self.ranges, strict=True):
            self.total += new - old if new >= old else new - old + full + 1
        self.last = now
        return self.total / 1e6


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError:
        raise Unavailable(f"{path} cannot be read: it is for root; chmod it or run as root") from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from None


class Meter:
    """Energy between `start` and `stop`, idle power subtracted. Without a `source` it is None, because of `why`."""

    def __init__(
        self, source: Source | None, why: str = "", idle_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        self.source, self.why, self.idle_seconds, self.clock, self.sleep = source, why, idle_seconds, clock, sleep
        self.idle_watts: float | None = None
        self.polled = 0.0

    @classmethod
    def on(cls, device_type: str, index: int | None = 0, idle_seconds: float = 2.0) -> "Meter":
        """The meter of a torch device: NVML for "cuda", RAPL for "cpu"."""
        try:
            return cls(Nvml(index or 0) if device_type == "cuda" else Rapl(), "", idle_seconds)
        except Unavailable as error:
            return cls(None, str(error))

    def start(self) -> None:
        """Measure idle power, then begin. Call it while the device has nothing to do."""
        try:
            if self.source is None:
                return
            before, begun = self.source.joules(), self.clock()
            self.sleep(self.idle_seconds)
            self.first, self.begun = self.source.joules(), self.clock()
            self.polled = self.begun
            self.idle_watts = (self.first - before) / (self.begun - begun)
        except Unavailable as error:
            self._fail(error)

    def poll(self) -> None:
        """Read the counter if it is time to, so that none wraps around unseen."""
        try:
            if self.source is not None and self.clock() - self.polled >= POLL_SECONDS:
                self.source.joules()
                self.polled = self.clock()
        except Unavailable as error:
            self._fail(error)

    def _fail(self, error: Unavailable) -> None:
        self.source, self.why = None, str(error)

    def stop(self) -> Reading:
        """Joules above idle since `start`, not below 0. Raises ValueError if there was no `start`."""
        try:
            if self.source is None:
                return Reading(None, f"n/a: {self.why}")
            if self.idle_watts is None:
                raise ValueError("Meter: stop without start")
            joules, seconds = self.source.joules() - self.first, self.clock() - self.begun
        except Unavailable as error:
            self._fail(error)
            return Reading(None, f"n/a: {self.why}")
        note = f"{self.source.name}, over {seconds:.0f} s, idle power of {self.idle_watts:.1f} W subtracted"
        return Reading(max(0.0, joules - self.idle_watts * seconds), note, seconds, self.idle_watts)
