"""Texts: the search order, damaged copies and downloads, text files, and each error's message."""

import dataclasses
import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import data
from data import cache, corpus, download, mnist, textfile, tinyshakespeare
from data.cache import NotFound, OfficialFile, cache_root
from data.text import find_text
from data.text_task import check_length
from run.config import Config
from tests.data.inputs import CONTENT, all_files, error_of, load, put

ROOT = Path(__file__).resolve().parents[2]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A web server on this machine that gives `body`, announcing `announced` bytes, and counts the requests.

    `cut_off` is set when the other side stops listening before the end.
    """

    def __init__(self):
        self.body, self.announced, self.pause, self.requests = CONTENT, len(CONTENT), 0.0, 0
        self.cut_off = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(server.announced))
                self.end_headers()
                if server.pause:
                    time.sleep(server.pause)
                try:
                    self.wfile.write(server.body)
                except OSError:
                    server.cut_off.set()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/input.txt"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server():
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture(autouse=True)
def dead_address(monkeypatch):
    """The official file is CONTENT, at an address where nobody answers."""
    use_address(monkeypatch, "http://127.0.0.1:9/input.txt")


def use_address(monkeypatch, url):
    official = OfficialFile("tinyshakespeare/input.txt", url, len(CONTENT), SHA256)
    monkeypatch.setattr(tinyshakespeare, "FILE", official)


# The search order


@pytest.mark.parametrize("inside", ["tinyshakespeare/input.txt", "input.txt"])
@pytest.mark.parametrize("setting", ["data_dir", "NANOGFT_DATA"])
def test_folder_given_comes_first_and_is_taken_as_it_is(tmp_path, monkeypatch, setting, inside):
    put(cache_root() / "tinyshakespeare/input.txt")
    put(cache.SHARED_DIR / "tinyshakespeare/input.txt")
    mine = put(tmp_path / "mine" / inside, b"my own text, not the official one\n" * 20)
    if setting == "NANOGFT_DATA":
        monkeypatch.setenv("NANOGFT_DATA", str(tmp_path / "mine"))
        text = load()
    else:
        monkeypatch.setenv("NANOGFT_DATA", str(tmp_path / "elsewhere"))
        text = load(data_dir=str(tmp_path / "mine"))
    assert text.source.startswith(f"{mine}, because {setting} ") and "not the official file" in text.source
    assert text.sha256 == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert text.tokenizer.decode(text.train).startswith("my own text")


def test_official_file_in_the_folder_given_is_not_called_another(tmp_path):
    put(tmp_path / "mine/input.txt")
    assert "not the official" not in load(data_dir=str(tmp_path / "mine")).source


def test_cache_then_shared_then_address(monkeypatch, server):
    use_address(monkeypatch, server.url)
    cached = put(cache_root() / "tinyshakespeare/input.txt")
    shared = put(cache.SHARED_DIR / "tinyshakespeare/input.txt")
    assert load().source.startswith(f"{cached}, because")
    cached.unlink()
    assert load().source.startswith(f"{shared}, because")
    assert server.requests == 0
    shared.unlink()
    assert server.url in load().source
    assert server.requests == 1 and cached.read_bytes() == CONTENT
    assert load().source.startswith(f"{cached}, because")
    assert server.requests == 1


def test_shared_folder_is_the_one_beside_the_checkout():
    command = "from data.cache import SHARED_DIR; print(SHARED_DIR)"
    seen = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == str(ROOT.parent / "shared" / "data")


def test_data_dir_without_the_file_is_an_error(tmp_path):
    put(cache_root() / "tinyshakespeare/input.txt")
    (tmp_path / "mine").mkdir()
    message = error_of(load, data_dir=str(tmp_path / "mine"), code=2)
    assert str(tmp_path / "mine/tinyshakespeare/input.txt") in message
    assert str(tmp_path / "mine/input.txt") in message


def test_environment_folder_without_the_file_is_told_and_passed_over(tmp_path, monkeypatch, capsys):
    put(cache_root() / "tinyshakespeare/input.txt")
    monkeypatch.setenv("NANOGFT_DATA", str(tmp_path / "mine"))
    assert "earlier run" in load().source
    assert f"NANOGFT_DATA = {tmp_path / 'mine'} does not hold tinyshakespeare" in capsys.readouterr().err


def test_cache_root(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("NANOGFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg/nanogft"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_root() == tmp_path / "home/.cache/nanogft"


# Damage


@pytest.mark.parametrize(
    ("content", "word"), [(CONTENT[:-100], "truncated"), (b"X" + CONTENT[1:], "altered"), (b"", "truncated")]
)
def test_damaged_copy_is_named_and_passed_over(capsys, content, word):
    cached = put(cache_root() / "tinyshakespeare/input.txt", content)
    shared = put(cache.SHARED_DIR / "tinyshakespeare/input.txt")
    text = load()
    assert text.source.startswith(str(shared)) and text.sha256 == SHA256
    said = capsys.readouterr().err
    for part in (str(cached), word, f"{len(content):,} bytes", hashlib.sha256(content).hexdigest(), SHA256):
        assert part in said


@pytest.mark.parametrize("announced", ["honest", "full"])
def test_truncated_download_is_named_and_not_used(monkeypatch, server, announced):
    use_address(monkeypatch, server.url)
    server.body = CONTENT[:5000]
    server.announced = len(server.body) if announced == "honest" else len(CONTENT)
    message = error_of(load)
    assert server.url in message
    assert "truncated: 5,000 bytes" in message or "IncompleteRead" in message
    assert all_files(cache_root()) == []


def test_download_stops_one_byte_past_the_official_size(monkeypatch, server):
    use_address(monkeypatch, server.url)
    server.body = CONTENT * 1000  # more than the buffers in between can swallow
    server.announced = len(server.body)
    assert f"altered: {len(CONTENT) + 1:,} bytes" in error_of(load)
    assert server.cut_off.wait(10)


def test_a_server_that_stops_sending_is_given_up(monkeypatch, server):
    use_address(monkeypatch, server.url)
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.2)
    server.pause = 5.0  # after its headers
    start = time.perf_counter()
    assert "timed out" in error_of(load)
    assert time.perf_counter() - start < 4


def slow_names(*args, **kwargs):
    time.sleep(3)
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("where", ["address", "name"])
def test_no_answer_is_told_soon(monkeypatch, capsys, where):
    """Of a server that is silent, and of a name that is being looked up, which no socket's time limit ends."""
    for module in (cache, download):
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_address(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt")
        if where == "name":
            monkeypatch.setattr(socket, "getaddrinfo", slow_names)
        start = time.perf_counter()
        assert "not downloaded (no answer in 0.3 s)" in error_of(load)
        assert time.perf_counter() - start < 2
    assert "an answer is waited for 0.3 s" in capsys.readouterr().err


def test_slow_download_is_given_up(monkeypatch, server):
    use_address(monkeypatch, server.url)
    monkeypatch.setattr(download, "TOTAL_SECONDS", -1)
    assert "too slow" in error_of(load)


def test_damaged_cache_is_mended_by_the_download(monkeypatch, server):
    use_address(monkeypatch, server.url)
    cached = put(cache_root() / "tinyshakespeare/input.txt", CONTENT[:7])
    assert load().sha256 == SHA256
    assert cached.read_bytes() == CONTENT


def test_found_nowhere_lists_every_place_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_DATA", str(tmp_path / "mine"))
    shared = put(cache.SHARED_DIR / "tinyshakespeare/input.txt", b"short")
    message = error_of(load)
    for part in (
        f"{tmp_path / 'mine/tinyshakespeare/input.txt'}: No such file",
        f"{tmp_path / 'mine/input.txt'}: No such file",
        f"{cache_root() / 'tinyshakespeare/input.txt'}: No such file",
        f"{shared}: truncated: 5 bytes",
        "http://127.0.0.1:9/input.txt: not downloaded (Connection refused)",
        "--data FILE",
        "--data stdlib",
    ):
        assert part in message


def test_download_that_cannot_be_kept_is_still_used(tmp_path, monkeypatch, server, capsys):
    use_address(monkeypatch, server.url)
    monkeypatch.setenv("NANOGFT_CACHE", str(put(tmp_path / "a_file", b"")))
    assert load().sha256 == SHA256
    assert "cannot be kept" in capsys.readouterr().err


# A fresh machine


def test_pythons_own_text_takes_the_place_of_one_found_nowhere(tmp_path):
    cfg = Config(context=16, tokenizer="char")
    task = data.load(cfg)
    assert task.name == task.cfg.data == "stdlib" and task.cfg == Config(context=16, data="stdlib")
    assert task.sha256 == find_text("stdlib").sha256()
    first, *inside, last = task.notice.splitlines()
    assert first == last == f"+{'-' * 78}+"
    assert all(line.startswith("| ") for line in inside)
    assert all(len(line) == 80 and line.endswith(" |") for line in inside if len(max(line.split(), key=len)) < 76)
    told = " ".join(line.strip("| ") for line in inside)
    for part in (
        "tinyshakespeare was not found",
        'data = "stdlib"',
        f"{cache_root() / 'tinyshakespeare/input.txt'}: No such file",
        f"{cache.SHARED_DIR / 'tinyshakespeare/input.txt'}: No such file",
        "http://127.0.0.1:9/input.txt: not downloaded (Connection refused)",
        f"get http://127.0.0.1:9/input.txt ({len(CONTENT):,} bytes)",
        "--data_dir FOLDER",
    ):
        assert part in told, part


def test_a_text_that_is_there_needs_no_other():
    put(cache_root() / "tinyshakespeare/input.txt")
    for named in (False, True):
        task = data.load(Config(), named)
        assert task.name == task.cfg.data == "tinyshakespeare" and task.notice == ""


@pytest.mark.parametrize(("settings", "named"), [({}, True), ({"data": "mnist"}, False)], ids=["named", "images"])
def test_no_other_data_is_used_where_these_were_asked_for(settings, named, monkeypatch):
    dead = {
        split: tuple(dataclasses.replace(file, url="http://127.0.0.1:9/x") for file in files)
        for split, files in mnist.FILES.items()
    }
    monkeypatch.setattr(mnist, "FILES", dead)
    with pytest.raises(NotFound):
        data.load(Config(**settings), named)


def test_a_folder_given_without_the_text_stays_an_error(tmp_path):
    assert "does not hold tinyshakespeare" in error_of(data.load, Config(data_dir=str(tmp_path)), code=2)


def test_a_text_needs_only_what_it_uses(play):
    """Pillow, matplotlib, tiktoken and regex take longer to import than a text of characters to load."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data
from run.config import Config
data.load(Config(data={play!r}, context=16))
print(sorted({{"PIL", "matplotlib", "tiktoken", "regex", "requests", "data.images"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("n_train", "n_val", "parts"),
    [
        (66, 66, []),
        (1000, 65, ["context = 64: the evaluation part of tinyshakespeare has 65 tokens", "--context 63"]),
        (65, 65, ["the training part", "the evaluation part"]),
        (0, 1, ["the training part", "the evaluation part"]),
    ],
)
def test_a_text_shorter_than_a_window_is_refused(n_train, n_val, parts):
    cfg = Config(context=64)
    if not parts:
        check_length(cfg, n_train, n_val)
        return
    message = error_of(check_length, cfg, n_train, n_val, code=2)
    assert all(part in message for part in parts)


# Text files and stdlib


def test_file_keeps_line_ends_and_drops_every_byte_order_mark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(textfile, "CHUNK", 4)  # marks lie across the edges of chunks
    text = load(str(put(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n" * 9)))
    assert text.tokenizer.decode(np.concatenate([text.train, text.val])) == "one\r\ntwo\rthree\n" * 9
    assert "a.txt has carriage returns" in capsys.readouterr().err
    assert text.sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()


def test_relative_file_is_found_here_and_in_data_dir(tmp_path, monkeypatch):
    put(tmp_path / "here/a.txt", b"here " * 20)
    put(tmp_path / "there/b.txt", b"there " * 20)
    monkeypatch.chdir(tmp_path / "here")
    assert load("a.txt").source.startswith("a.txt, because")
    assert load("b.txt", data_dir=str(tmp_path / "there")).source.startswith(str(tmp_path / "there/b.txt"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"abc\nde\xe9f" + b"abc" * 99, ["0xe9", "offset 6", "line 2", "iconv -f CP1252"]),
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf" * 2, ["is empty"]),
        (b" \r\n\t\xef\xbb\xbf" * 9, ["nothing but white space (36 characters)"]),
        (b"abc", ["too short", "2 tokens to train on and 1 to evaluate on"]),
        (b"a", ["too short"]),
    ],
    ids=["latin1", "empty", "only marks", "white space", "three characters", "one character"],
)
def test_unusable_file_is_named(tmp_path, content, parts):
    path = put(tmp_path / "bad.txt", content)
    message = error_of(load, str(path))
    for part in [str(path), *parts]:
        assert part in message


def test_missing_names_point_to_the_closest(tmp_path, play, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Did you mean tinyshakespeare?" in error_of(load, "tiny_shakespear", code=2)
    assert f"Did you mean {play}?" in error_of(load, str(tmp_path / "pley.txt"), code=2)
    assert "Did you mean play.txt?" in error_of(load, "play.text", code=2)
    message = error_of(load, "nothing_like_it/at_all", code=2)
    assert "Did you mean" not in message and "stdlib, tinyshakespeare" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_pipe_and_device_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", os.devnull):
        assert "is a pipe or a device" in error_of(load, str(name), code=2)


def test_a_file_that_cannot_be_opened_is_named(play, monkeypatch):
    def locked(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(corpus, "open", locked, raising=False)
    assert error_of(load, play) == f"{play} cannot be read: Permission denied."


@pytest.mark.parametrize("bad", ["a\0b", "x" * 5000], ids=["null", "long"])
def test_impossible_file_names_are_user_errors(bad):
    error_of(load, bad)


def test_stdlib_needs_nothing_and_is_always_the_same():
    first, second = find_text("stdlib"), find_text("stdlib")
    assert first.sha256() == second.sha256()
    text = load("stdlib", eval_on="tune")
    assert "pydoc_data.topics of Python" in text.source
    assert text.tokenizer.decode(text.train).startswith(next(first.chunks("reading"))[:100_000])


def test_official_constants_match_the_file_beside_the_checkout(monkeypatch):
    """Without that folder the constants can only be compared with themselves: their form is checked."""
    monkeypatch.undo()
    file = tinyshakespeare.FILE
    assert len(file.sha256) == 64 and file.url.startswith("https://") and file.size == 1_115_394
    path = cache.SHARED_DIR / file.path
    if path.exists():
        assert file.fault(path.read_bytes()) == ""
