"""metrics.jsonl, the progress line and the curve."""

import errno
import io
import json
import os

import pytest

from run import progress
from run.curve import draw, read_metrics
from run.errors import UserError
from run.progress import Metrics, Progress, cut


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def record(step: int, seconds: float, **more) -> dict:
    return {"step": step, "loss": 2.0, "flips": 0.25, "seconds": seconds} | more


def test_speed_is_that_of_training_alone(clock, capsys):
    """Evaluations, samples and the compilation before the first record do not count."""
    shown = Progress(steps=100, step=0, per_step=640, unit="tokens")
    assert shown.step_seconds is None
    for step, seconds in ((10, 31.0), (20, 32.0), (30, 33.0), (40, 34.5)):
        clock.now += 60
        shown.show(record(step, seconds))
    assert shown.step_seconds == pytest.approx(0.1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step  40/100  loss 2.000  flips 0.250  6,400 tokens/s  6:00 left"


def test_a_resumed_run_counts_from_where_it_began(clock, capsys):
    shown = Progress(steps=100, step=50, per_step=10, unit="images", seconds=70.0)
    clock.now = 20.0
    shown.show(record(60, 72.0, val_loss=1.5, accuracy=0.875, flips=1.0))
    assert shown.step_seconds == pytest.approx(0.2)
    assert capsys.readouterr().out == "step  60/100  loss 2.000  val 1.500  right 87.5%  50 images/s  1:20 left\n"
    clock.now = 40.0
    shown.show(record(70, 74.0))
    assert "val 1.500  right 87.5%  flips" in capsys.readouterr().out


def test_bits_per_byte_are_told_where_tokens_are_not_bytes(clock, capsys):
    shown = Progress(steps=100, step=0, per_step=10, unit="tokens")
    shown.show(record(10, 1.0, val_loss=2.0, bits_per_byte=2.8854))
    assert "bits/byte" not in capsys.readouterr().out
    shown.show(record(20, 2.0, val_loss=2.0, bits_per_byte=0.75))
    assert "val 2.000  0.750 bits/byte  flips" in capsys.readouterr().out


def test_lines_without_a_terminal_are_few(clock, capsys):
    shown = Progress(steps=100, step=0, per_step=1, unit="tokens")
    for step in range(1, 41):
        clock.now += 1.0
        shown.show(record(step, step * 0.5))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["15/100", "30/100"]


def test_the_line_fits_the_terminal(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = Progress(steps=1_000_000, step=0, per_step=3072, unit="tokens")
    shown.terminal = True
    for step, more in ((10, {}), (20, {"val_loss": 2.5})):
        clock.now += 1.0
        shown.show(record(step, step * 0.1, **more))
    shown.line("warning: ...")
    _, first, second, warning = capsys.readouterr().out.split("\r\x1b[K")
    assert [len(first), len(second)] == [59, 60]  # one column less, as a full row would wrap; the second ends its row
    assert second.endswith("\n") and "\n" not in first and warning == "warning: ...\n"


def test_the_monitor_is_told_at_evaluations(clock, capsys):
    shown = Progress(steps=10, step=0, per_step=1, unit="tokens")
    monitor = {"at_limit": 0.1, "zeros": 0.2, "undone": 0.3, "saturation": 0.004, "dead_rows": 0.05}
    clock.now = 1.0
    shown.show(record(4, 1.0, monitor=monitor))
    assert "dead rows" not in capsys.readouterr().out
    clock.now = 2.0
    shown.show(record(5, 2.0, val_loss=2.0))
    assert "weights at the limit 10.0%, at zero 20.0%; moves undone 30%" in capsys.readouterr().out
    shown.text("two\nlines")
    assert capsys.readouterr().out == "    | two\n    | lines\n"


@pytest.mark.parametrize("text, columns, expected", [
    ("abc", 3, "abc"), ("abcd", 3, "abc"), ("abc", 0, ""), ("", 5, ""),
    ("日本語", 5, "日本"), ("日本語", 6, "日本語"), ("e\u0301e\u0301", 1, "e\u0301"),
])  # fmt: skip
def test_cut_counts_columns(text, columns, expected):
    assert cut(text, columns) == expected


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in (10, 20, 30):
        metrics.write(record(step, 1.0))
    metrics.file.close()
    Metrics(path, 20).write(record(25, 1.0))
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 25]
    Metrics(path, 0)
    assert read_metrics(path) == []


@pytest.mark.parametrize("damage", ["null\n", '{"loss": 1}\n', "\ufffd\n", '{"step": 3', '{"step": null}\n',
                                    '{"step": "3"}\n', '{"step": 3, "loss": []}\n',
                                    '{"step": 3, "flips": 1' + 400 * "0" + "}\n",
                                    '{"step": 1' + 5000 * "0" + "}\n", '{"step": ' + 10**5 * "["],
                         ids=lambda damage: damage[:20].strip())  # fmt: skip
def test_what_follows_a_damaged_line_is_left_out(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(record(1, 1.0)) + "\n"
    path.write_text(good + damage + good, encoding="utf-8")
    assert [r["step"] for r in read_metrics(path)] == [1]


def test_metrics_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: .*choose another --out_dir"):
        Metrics(tmp_path / "file" / "metrics.jsonl", 0)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "file", io.StringIO())
    monkeypatch.setattr(metrics.file, "flush", full)
    with pytest.raises(UserError, match="No space left on device; checkpoints saved before are intact"):
        metrics.write({"step": 1})


@pytest.mark.parametrize("records", [
    [], [record(1, 1.0)], [record(1, 1.0, flips=1.0)],
    [record(10, 1.0), record(20, 2.0, val_loss=2.5), record(30, 3.0, val_loss=2.25)],
], ids=["none", "one", "baseline", "evaluated"])  # fmt: skip
def test_the_curve_is_drawn(tmp_path, records):
    path, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    for _ in range(2):  # and drawn anew
        draw(path, png, "a run")
        assert png.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_curve_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OSError) as caught:
        draw(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    assert caught.value.filename == str(tmp_path / "loss.png")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}
