"""Which folder a run takes, and that no two runs share one."""

import subprocess
import sys
from pathlib import Path

import pytest

from run import checkpoint
from run.config import Config, load
from run.errors import UserError
from run.folder import choose_folder

ROOT = Path(__file__).resolve().parents[2]


def save(folder: Path) -> None:
    checkpoint.save(folder, "last", {}, {"step": 0})


def test_a_named_folder_is_taken_once(tmp_path):
    cfg = Config(out_dir=str(tmp_path / "o"))
    folder, lock = choose_folder(cfg)
    assert folder == tmp_path / "o"
    with pytest.raises(UserError, match="another run is writing into .*o; wait for it, or choose another --out_dir"):
        choose_folder(cfg)
    lock.release()
    save(folder)
    with pytest.raises(UserError, match="already holds a run; use --resume to continue it"):
        choose_folder(cfg)


def test_unnamed_folders_are_numbered_and_the_newest_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = []
    for expected in ("out/custom", "out/custom-2", "out/custom-3"):
        folder, lock = choose_folder(Config())
        assert folder == Path(expected)
        save(folder)
        held.append(lock)
    with pytest.raises(UserError, match="another run is writing into out/custom-3"):
        choose_folder(Config(resume="last"))
    held[-1].release()
    assert choose_folder(Config(resume="last"))[0] == Path("out/custom-3")


def test_folders_that_are_not_ours_are_not_counted(tmp_path, monkeypatch):
    """A date has a number too large to count up to."""
    monkeypatch.chdir(tmp_path)
    for name in ("custom-20261128", "custom-1764300000", "custom-best-7", "custom-2026-11-28", "custom-007"):
        save(Path("out", name))
    for expected in ("out/custom", "out/custom-2"):
        folder, lock = choose_folder(Config())
        assert folder == Path(expected)
        save(folder)
        lock.release()
    assert choose_folder(Config(resume="last"))[0] == Path("out/custom-2")


def test_a_new_run_comes_after_all_others_of_its_name(tmp_path, monkeypatch):
    """So that --resume, which takes the newest, finds it."""
    monkeypatch.chdir(tmp_path)
    save(Path("out", "custom")), save(Path("out", "custom-4"))
    assert choose_folder(Config())[0] == Path("out/custom-5")


def test_a_run_that_has_saved_nothing_yet_holds_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my[1].toml").touch()  # a name that looks like a pattern
    held = [choose_folder(load(["my[1].toml"])) for _ in range(3)]
    assert [str(folder) for folder, _ in held] == ["out/my[1]", "out/my[1]-2", "out/my[1]-3"]


def test_resuming_without_a_run(tmp_path):
    with pytest.raises(UserError, match="--resume best: .*o contains no run; drop --resume"):
        choose_folder(Config(out_dir=str(tmp_path / "o"), resume="best"))
    assert not (tmp_path / "o").exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written: .*make it a writable folder or choose another --out_dir"):
        choose_folder(Config(out_dir=str(tmp_path / "file" / "o")))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_the_lock_goes_with_its_process(tmp_path):
    program = ("import sys, os; from run.config import Config; from run.folder import choose_folder\n"
               "held = choose_folder(Config(out_dir=sys.argv[1]))\n"
               "print('held', flush=True); sys.stdin.read()")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "o")], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run"):
        choose_folder(Config(out_dir=str(tmp_path / "o")))
    process.kill()
    process.communicate()
    assert choose_folder(Config(out_dir=str(tmp_path / "o")))[0] == tmp_path / "o"
