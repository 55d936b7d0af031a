"""The meters against invented counters: a folder like sysfs, a library like NVML."""

import ctypes

import pytest

from run.meter import Meter, Nvml, Rapl, Reading, Unavailable


def zone(folder, name, label, energy_uj, full=999):
    path = folder / f"intel-rapl:{name}"
    path.mkdir(exist_ok=True)
    for file, value in (("name", label), ("energy_uj", energy_uj), ("max_energy_range_uj", full)):
        (path / file).write_text(f"{value}\n")
    return path / "energy_uj"


def test_rapl_sums_packages_and_memory_and_wraps(tmp_path):
    package, memory = zone(tmp_path, "0", "package-0", 900), zone(tmp_path, "0:1", "dram", 10)
    zone(tmp_path, "0:0", "core", 500)
    zone(tmp_path, "1", "psys", 700)
    source = Rapl(tmp_path)
    assert "package-0" in source.name and "dram" in source.name
    for file, value in ((package, 950), (memory, 30), (tmp_path / "intel-rapl:0:0" / "energy_uj", 800)):
        file.write_text(str(value))
    assert source.joules() == pytest.approx(70e-6)
    package.write_text("20")  # 950 .. 999, 0 .. 20: 70 more
    assert source.joules() == pytest.approx(140e-6)
    assert source.joules() == pytest.approx(140e-6)


def test_no_rapl_is_said_with_its_reason(tmp_path):
    with pytest.raises(Unavailable, match="no RAPL counters"):
        Rapl(tmp_path)
    zone(tmp_path, "0", "package-0", 5).unlink()
    with pytest.raises(Unavailable, match="energy_uj cannot be read"):
        Rapl(tmp_path)


class FakeNvml:
    """libnvidia-ml: a counter in millijoules, and a function that fails if asked to."""

    def __init__(self, fails: str = "", code: int = 3):
        self.millijoules, self.fails, self.code, self.index = 1000, fails, code, None

    def _code(self, name: str) -> int:
        return self.code if self.fails == name else 0

    def nvmlInit_v2(self) -> int:
        return self._code("init")

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:
        self.index, handle._obj.value = index.value, 77
        return self._code("handle")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, out) -> int:
        assert handle.value == 77 and isinstance(out._obj, ctypes.c_ulonglong)
        out._obj.value = self.millijoules
        return self._code("energy")


def test_nvml_counts_from_where_it_began():
    library = FakeNvml()
    source = Nvml(1, library, visible="4,6")
    assert library.index == 6
    library.millijoules += 2500
    assert source.joules() == pytest.approx(2.5)
    Nvml(1, library, visible="")
    assert library.index == 1


def test_no_nvml_is_said_with_its_reason():
    with pytest.raises(Unavailable, match="nvmlInit_v2 failed: no driver"):
        Nvml(0, FakeNvml("init", 9))
    with pytest.raises(Unavailable, match="not supported by this GPU"):
        Nvml(0, FakeNvml("energy"))
    with pytest.raises(Unavailable, match="CUDA_VISIBLE_DEVICES"):
        Nvml(0, FakeNvml(), visible="MIG-abc")


def watched(watts_idle: float, watts_busy: float):
    """A meter on a GPU that idles, then works for 10 seconds; and its library."""
    library, now = FakeNvml(), [0.0]

    def pass_time(seconds: float, watts: float) -> None:
        now[0] += seconds
        library.millijoules += int(1000 * seconds * watts)

    meter = Meter(Nvml(0, library, ""), "", 2.0, lambda: now[0], lambda seconds: pass_time(seconds, watts_idle))
    meter.start()
    pass_time(10, watts_busy)
    meter.poll()
    return meter, library


def test_idle_power_is_subtracted():
    reading = watched(50, 80)[0].stop()
    # 80 W for 10 s less 50 W for 10 s.
    assert reading.joules == pytest.approx(300)
    assert reading.seconds == 10 and reading.idle_watts == pytest.approx(50)
    assert "50.0 W" in reading.note
    assert watched(50, 40)[0].stop().joules == 0


def test_polling_after_every_step_reads_the_counter_now_and_then():
    """A counter of 100 J that wraps once a minute at 2 W loses nothing in five minutes, and is not read 300 times."""
    now, reads = [0.0], []

    class Short:
        name = "short"

        def __init__(self):
            self.last, self.total = 0.0, 0.0

        def joules(self):
            reads.append(now[0])
            shown = 2 * now[0] % 100
            self.total += (shown - self.last) % 100
            self.last = shown
            return self.total

    meter = Meter(Short(), "", 0.5, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds))
    meter.start()
    for _ in range(300):
        now[0] += 1
        meter.poll()
    meter.idle_watts = 0.0
    assert meter.stop().joules == pytest.approx(600) and len(reads) < 15


def test_a_meter_that_fails_says_why_and_gives_nothing():
    meter, library = watched(50, 80)
    library.fails, library.code = "energy", 15
    reading = meter.stop()
    assert reading.joules is None and reading.note.startswith("n/a: ") and "the GPU is lost" in reading.note
    nothing = Meter(None, "no counter")
    nothing.start()
    nothing.poll()
    assert nothing.stop() == Reading(None, "n/a: no counter")
    with pytest.raises(ValueError, match="without start"):
        Meter(Nvml(0, FakeNvml(), "")).stop()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_machine_has_an_answer(device):
    meter = Meter.on(device, idle_seconds=0.05)
    meter.start()
    reading = meter.stop()
    assert (reading.joules is None) == reading.note.startswith("n/a: ")
    assert len(reading.note) > 10
