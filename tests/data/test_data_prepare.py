"""Prepared texts: made once, also by two processes at once; damage, a cache that cannot be written, the split."""

import errno
import io
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import regex
from tiktoken_ext.openai_public import r50k_pat_str

from data import notice, prepare, textfile
from data.bpe import PATTERN, train_bpe
from data.cache import cache_root, sha256, write_atomic
from data.notice import with_bar
from data.prepare import parts_of
from data.tokenizers import CharTokenizer
from run.errors import UserError
from tests.data.inputs import CONTENT, all_files, load, put

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_prepared_once_and_memory_mapped(play, monkeypatch, tokenizer):
    first = load(play, tokenizer)
    monkeypatch.setattr("data.text.prepare", None)
    second = load(play, tokenizer)
    for text in (first, second):
        assert isinstance(text.train, np.memmap) and text.train.dtype == np.uint16 and text.train.ndim == 1
        assert not text.train.flags.writeable
    assert np.array_equal(first.train, second.train) and np.array_equal(first.val, second.val)
    assert first.tokenizer.to_json() == second.tokenizer.to_json()


def test_each_text_tokenizer_and_size_is_prepared_apart(play, tmp_path):
    load(play), load(play, vocab_size=999), load(play, "bpe", 300), load(play, "bpe", 310)
    load(str(put(tmp_path / "other.txt", CONTENT + b"!")))
    assert len(all_files(cache_root() / "prepared")) == 2 * 4


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _append(path):
    path.write_bytes(path.read_bytes() + b"x")


def _append_token(path):
    path.write_bytes(path.read_bytes() + b"xx")


def _nest(path):
    path.write_bytes(b"[" * 100_000)


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("ending", ["bin", "json"])
@pytest.mark.parametrize("damage", [_truncate, _alter, _append, _append_token, _empty, _nest])
def test_damaged_preparation_is_told_and_made_again(play, capsys, ending, damage):
    before = load(play, "bpe")
    train = np.array(before.train)
    (path,) = (cache_root() / "prepared").glob(f"*.{ending}")
    good = path.read_bytes()
    damage(path)
    after = load(play, "bpe")
    said = capsys.readouterr().err
    assert str(path.with_suffix("")) in said and "preparing again" in said and path.name in said
    assert np.array_equal(after.train, train) and path.read_bytes() == good
    load(play, "bpe")
    assert "preparing again" not in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["bin", "json"])
def test_half_a_preparation_is_completed(play, ending):
    load(play)
    (path,) = (cache_root() / "prepared").glob(f"*.{ending}")
    good = path.read_bytes()
    path.unlink()
    load(play)
    assert path.read_bytes() == good


def test_two_processes_preparing_at_once(play, tmp_path):
    """Both start on a signal, and each goes through eight preparations of the same names."""
    command = """if True:
        import os, pathlib, sys, time
        from data.text import load_text
        from data.cache import sha256
        play, folder, me = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
        (folder / me).touch()
        while not (folder / "go").exists():
            time.sleep(0.001)
        for size in range(300, 308):
            text = load_text(play, "bpe", size)
            print(size, text.sha256, sha256(text.train.tobytes()), sha256(text.val.tobytes()))
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, play, str(tmp_path), me],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me in ("a", "b")
    ]
    while not all((tmp_path / me).exists() or process.poll() is not None for me, process in zip("ab", processes)):
        time.sleep(0.001)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not any("preparing again" in said or "stays in memory" in said for _, said in outputs)
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0].splitlines()) == 8
    files = all_files(cache_root() / "prepared")
    assert len(files) == 16 and not [name for name in files if name.endswith(".tmp")]
    digests = []
    for size in range(300, 308):
        text = load(play, "bpe", size)
        digests.append(f"{size} {text.sha256} {sha256(text.train.tobytes())} {sha256(text.val.tobytes())}")
    assert digests == outputs[0][0].splitlines()


@pytest.mark.parametrize("trouble", ["unwritable", "full"])
def test_cache_that_cannot_be_written_costs_only_a_notice(play, tmp_path, monkeypatch, capsys, trouble):
    good = load(play, "bpe")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if trouble == "full":
        monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "full"))
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setenv("NANOGFT_CACHE", str(put(tmp_path / "a_file", b"")))
    text = load(play, "bpe")
    said = capsys.readouterr().err
    assert "stays in memory" in said
    assert os.strerror(errno.ENOSPC if trouble == "full" else errno.ENOTDIR) in said
    assert np.array_equal(text.train, good.train) and not text.train.flags.writeable
    if trouble == "full":
        assert all_files(tmp_path / "full") == []


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = put(tmp_path / "folder/file", b"old")

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert all_files(tmp_path / "folder") == ["file"] and path.read_bytes() == b"old"


def test_leftover_of_a_killed_preparation_is_deleted_and_a_live_one_is_not(play):
    load(play)
    (path,) = (cache_root() / "prepared").glob("*.bin")
    path.unlink()
    dead, live = (put(path.with_name(f".{path.name}.1-{name}.tmp"), b"half") for name in ("dead", "live"))
    os.utime(dead, (0, 0))
    load(play)
    assert path.exists() and live.exists() and not dead.exists()


def test_two_writes_of_one_file_at_once(tmp_path, monkeypatch):
    """The second one starts and ends while the first is being written."""
    path, sync = tmp_path / "folder/file", os.fsync

    def second_write(handle):
        monkeypatch.setattr(os, "fsync", sync)
        write_atomic(path, b"second")
        assert path.read_bytes() == b"second"

    monkeypatch.setattr(os, "fsync", second_write)
    write_atomic(path, b"first")
    assert path.read_bytes() == b"first" and all_files(tmp_path / "folder") == ["file"]


def test_large_vocabulary_takes_four_bytes(tmp_path):
    many = "".join(chr(point) for point in range(0x10000, 0x10000 + 65_540))
    text = load(str(put(tmp_path / "many.txt", (many * 2).encode("utf-8"))))
    assert text.train.dtype == np.uint32 and text.tokenizer.vocab_size == 65_540
    assert text.tokenizer.decode(text.val) == (many * 2)[int(0.9 * 131_080) :]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_parts_are_the_same_stretches_of_text_for_every_tokenizer(play, tokenizer):
    content = CONTENT.decode("utf-8")
    n81, n90 = int(0.81 * len(content)), int(0.9 * len(content))
    val, tune = load(play, tokenizer), load(play, tokenizer, eval_on="tune")
    decode = val.tokenizer.decode
    assert decode(val.train) == content[:n90] and decode(val.val) == content[n90:]
    assert decode(tune.train) == content[:n81] and decode(tune.val) == content[n81:n90]


def test_char_split_is_at_whole_numbers_of_tokens(play):
    text = load(play)
    count = len(CONTENT.decode("utf-8"))
    assert (len(text.train), len(text.val)) == (int(0.9 * count), count - int(0.9 * count))


def test_bpe_never_learns_from_evaluated_text(tmp_path):
    head = "the cat sat on the mat. " * 81
    first = load(str(put(tmp_path / "a.txt", (head + "qzqzqzqz" * 57).encode())), "bpe", 400)
    second = load(str(put(tmp_path / "b.txt", (head + "wkwkwkwk" * 57).encode())), "bpe", 400)
    assert first.tokenizer.to_json() == second.tokenizer.to_json()


def test_bpe_of_a_short_text_says_that_it_is_smaller(tmp_path, capsys):
    path = str(put(tmp_path / "a.txt", b"the cat sat on the mat. " * 20))
    for _ in range(2):
        text = load(path, "bpe", 5000)
        assert f"has {text.tokenizer.vocab_size} tokens, not vocab_size = 5,000" in capsys.readouterr().err


# Chunks


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (textfile, prepare):
        monkeypatch.setattr(module, "CHUNK", 32)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_text_in_chunks_has_the_tokens_of_the_whole(play, small_chunks, tokenizer):
    content = CONTENT.decode("utf-8")
    text, n81, n90 = load(play, tokenizer), int(0.81 * len(content)), int(0.9 * len(content))
    if tokenizer == "bpe":
        assert text.tokenizer._vocabulary == train_bpe([content[:n81]], 300)
    parts = [text.tokenizer.encode(part) for part in (content[:n81], content[n81:n90], content[n90:])]
    assert text.train.tolist() == parts[0] + parts[1] and text.val.tolist() == parts[2]


@pytest.mark.parametrize("pattern", [PATTERN, r50k_pat_str], ids=["bpe", "gpt2"])
def test_cuts_between_chunks_are_where_words_end(small_chunks, pattern):
    draw = random.Random(0)
    signs = ["a", "bc", "é", "1", "23", "!", "'s", " ", "  ", "\n", "\r\n", "\t ", "\xa0", "\u3000", "日本"]
    for _ in range(300):
        text = "".join(draw.choices(signs, k=150))
        ends = sorted(draw.choices(range(len(text)), k=2)) + [len(text)]
        pieces = list(parts_of((text[at : at + 40] for at in range(0, len(text), 40)), ends))
        assert len(pieces) > 4
        for part, (start, end) in enumerate(zip([0, *ends], ends)):
            inside = [piece for number, piece in pieces if number == part]
            assert "".join(inside) == text[start:end]
            words = [word for piece in inside for word in regex.findall(pattern, piece)]
            assert words == regex.findall(pattern, text[start:end])


def test_a_word_longer_than_a_chunk_is_cut(small_chunks):
    pieces = list(parts_of(["x" * 32] * 9, (200, 250, 288)))
    assert [len(piece) for _, piece in pieces] == [32] * 6 + [8, 50, 38]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_preparing_takes_memory_for_a_few_chunks(tmp_path, tokenizer):
    path = str(put(tmp_path / "long.txt", CONTENT * (2_000_000 // len(CONTENT))))
    tracemalloc.start()
    try:
        load(path, tokenizer, threads=1)
        assert tracemalloc.get_traced_memory()[1] < 10e6  # the whole text at once took 38e6
    finally:
        tracemalloc.stop()


def no_addresses(*args, **kwargs):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize("where", ["encoding", "mapping", "mapping again"])
def test_too_little_memory_is_put_down_to_the_text(play, monkeypatch, where):
    if where == "mapping again":
        load(play)
    if where == "encoding":
        monkeypatch.setattr(CharTokenizer, "encode_array", lambda *_: np.empty(1 << 50))
    else:
        monkeypatch.setattr(np, "memmap", no_addresses)
    with pytest.raises(UserError, match="out of memory while preparing the text") as caught:
        load(play)
    assert play in str(caught.value) and "batch_size" not in str(caught.value)


@pytest.mark.parametrize("change", [_truncate, _alter, _empty, lambda path: put(path, CONTENT + b"more " * 200_000)])
def test_a_text_that_changes_while_it_is_read(play, monkeypatch, change):
    make = prepare.make_tokenizer

    def change_and_make(*args, **kwargs):
        change(Path(play))
        return make(*args, **kwargs)

    monkeypatch.setattr(prepare, "make_tokenizer", change_and_make)
    with pytest.raises(UserError, match="has changed while it was read"):
        load(play)
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_where_it_takes_long(monkeypatch, terminal):
    said = io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", said)
    assert list(with_bar([b"ab", b"cd"], 4, "encoding a.txt")) == [b"ab", b"cd"] and said.getvalue() == ""
    for name in ("PATIENCE", "REDRAW", "QUIET"):
        monkeypatch.setattr(notice, name, 0.0)
    list(with_bar([b"a", b"bcd"], 4, "encoding a.txt"))
    first, second = said.getvalue().split("data: ")[1:]
    assert first.startswith("encoding a.txt [#####               ]  25%, 0 s left")
    assert second.startswith("encoding a.txt [####################] 100%")
    assert said.getvalue().endswith("\r\x1b[K" if terminal else "left\n")
