"""Several texts as one: what names mean, compressed files, JSON lines, documents, parts, shards, nanoGPT's tokens."""

import bz2
import gzip
import json
import lzma
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import cache, corpus, prepare, text, textfile
from data.cache import cache_root
from data.text import find_text, load_text
from data.textfile import SEPARATOR, separated
from data.tokenizers import END, BpeTokenizer, CharTokenizer
from tests.data.inputs import error_of

PLAY = [f"Speaker {n % 7}: the {n}th line of a play that nobody wrote, été comprised.\n" for n in range(300)]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def put(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACK.get(path.suffix, bytes)(content))
    return path


def whole(name, **settings) -> str:
    return "".join(find_text(name, **settings).chunks("reading"))


# What names mean


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("chunk", [5, 1 << 18])
def test_a_compressed_text_is_the_text(monkeypatch, pack, chunk):
    monkeypatch.setattr(textfile, "CHUNK", chunk)
    put(f"a.txt{pack}", "".join(PLAY))
    found = find_text(f"a.txt{pack}")
    assert "".join(found.chunks("reading")) == "".join(PLAY)
    assert found.sha256() == cache.sha256(Path(f"a.txt{pack}").read_bytes())


@pytest.mark.parametrize("pack", [".xz", ".bz2"])
def test_bytes_behind_a_compressed_text_are_told(pack):
    path = put(f"a.txt{pack}", "".join(PLAY))
    path.write_bytes(path.read_bytes() + b"x" * 20_000)
    assert "has bytes behind the end of its compressed text" in error_of(load_text, str(path), "char", 0)


@pytest.mark.parametrize("pack", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]])
def test_a_damaged_compressed_text_is_named(pack, damage):
    path = put(f"a.txt{pack}", "".join(PLAY))
    path.write_bytes(damage(path.read_bytes()))
    message = error_of(load_text, str(path), "char", 0)
    assert str(path) in message and "Traceback" not in message


@pytest.mark.parametrize("name", ["texts", "texts/*.txt", "texts/a.txt,texts/b.txt", "texts/a.txt, texts/sub/../b.txt"])
def test_folder_glob_and_list(name):
    put("texts/b.txt", "second"), put("texts/a.txt", "first"), Path("texts/sub").mkdir()
    assert whole(name) == f"first{END}second"


def test_a_globs_parts_are_told_by_folders_and_names():
    put("test_1/g/train/a.txt", "t"), put("test_1/g/val/b.txt", "v"), put("test_1/g/c/test.txt", "e")
    for name in ("test_1/g/*/*.txt", "test_1/g/**/*.txt", str(Path("test_1/g/*/*.txt").resolve())):
        found = find_text(name)
        assert [file.split for file in found.files] == ["train", "val", "test"]
        assert found.where == name
    assert whole("test_1/g/val/*.txt") == "v", "what comes before the first sign of a glob tells no part"
    for name in ("test_1/g/train,test_1/g/val", "test_1/g/train/*,test_1/g/val/*.txt"):  # of several it does
        assert [file.split for file in find_text(name).files] == ["train", "val"]


def test_places_a_name_is_looked_for(monkeypatch, tmp_path):
    put("data/set/a.txt", "in data_dir"), put("env/set/a.txt", "in NANOGFT_DATA"), put("shared/set/a.txt", "shared")
    assert whole("set") == "shared"
    monkeypatch.setenv("NANOGFT_DATA", str(tmp_path / "env"))
    assert whole("set") == "in NANOGFT_DATA"
    assert whole("set/*.txt", data_dir="data") == "in data_dir"
    put("env/set/b.txt", ""), put("env/c.txt", "")
    assert find_text("set").where == str(tmp_path / "env/set")
    listed = find_text("set/a.txt, c.txt,set/a.txt")
    assert listed.where == f"{tmp_path / 'env/set/a.txt'}; {tmp_path / 'env/c.txt'}" and len(listed.files) == 2
    assert find_text("c.txt,c.txt").why == "data names this file"
    assert "neither a known data set nor an existing file" in error_of(find_text, "nothing", code=2)
    assert "tinyshakespeare, wikipedia_en" in error_of(find_text, "set/a.txt,nothing", code=2)


def test_a_folders_parts_are_told_by_names_and_other_files_are_left_out(capsys):
    left = ["Source of the Nile.txt", "Test of Time.txt", "Train to Pakistan.txt", "notice me.txt", "trainer.txt"]
    names = "train_00.txt.xz train_01.txt sub/val.txt test.jsonl.gz SOURCE.txt a.csv"
    for name in names.split() + left:
        put(f"set/{name}", json.dumps({"text": name}) if "jsonl" in name else name)
    found = find_text("set")
    assert [(file.split, Path(file.where).name) for file in found.files] == [
        ("train", "train_00.txt.xz"), ("train", "train_01.txt"), ("val", "val.txt"), ("test", "test.jsonl.gz")
    ]  # fmt: skip
    assert whole("set") == f"train_00.txt.xz{END}train_01.txtsub/val.txttest.jsonl.gz"
    said = capsys.readouterr().err
    assert f"5 texts in set are not used, as their names tell no part: {'; '.join(left)}." in said
    assert "1 texts in set are not used, as by their names they are about the others: SOURCE.txt." in said
    put("other/validation/x.txt", "v"), put("other/x.txt", "t"), put("other/README.txt", "about")
    assert [file.split for file in find_text("other").files] == ["train", "val"]


def test_folders_without_a_text_to_train_on():
    put("none/a.csv", "1"), put("only/valid.txt", "v"), put("only/test.txt", "t")
    assert "without texts" in error_of(find_text, "none", code=2)
    for _ in range(2):
        for name in ("only", "only/*.txt"):
            assert "none to train on" in error_of(find_text, name, code=2)
        Path("only/test.txt").unlink(missing_ok=True)
    assert whole("only/valid.txt") == "v", "by itself it is a text as any other"


# Documents


@pytest.mark.parametrize("size", [1, 2, 3, 13, 14, 15, 1000])
def test_separators_between_documents(size):
    content = f"<a<|endoftext|>b\n{SEPARATOR}c<|endo<|endoftext|>\n\n{SEPARATOR}"
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    assert "".join(separated(pieces)) == f"<a{END}b\n{END}c<|endo{END}\n{END}"


def test_json_lines():
    lines = [{"text": "one\ntwo", "id": 1}, {"text": "three \ud83d"}, {"text": ""}]
    put("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert whole("a.jsonl") == f"one\ntwo{END}three \ufffd{END}"
    for content, said in (
        ('{"text": "a"}\n{"txt": "b"}', 'a.jsonl, line 2: it has no "text"'),
        ('{"text": 5}', 'line 1: its "text" is a int'),
        ("plain", "line 1: Expecting value"),
        ("[]", "line 1: list indices"),
        ("[" * 100_000, "line 1: maximum recursion"),
    ):
        put("a.jsonl", content)
        assert said in error_of(whole, "a.jsonl")
    put("A.JSONL.GZ", gzip.compress(b'{"text": "one"}')), put("a.jsonl.txt", "plain")
    assert whole("A.JSONL.GZ") == "one" and whole("a.jsonl.txt") == "plain"


def test_json_lines_of_any_length(monkeypatch):
    """Each chunk is looked at once: a line as long as many chunks takes no time that grows with its square."""
    monkeypatch.setattr(textfile, "CHUNK", 64)
    put("a.jsonl", json.dumps({"text": "x" * 3_200_000}) + '\n{"text": "b"}')
    begun = time.process_time()
    assert whole("a.jsonl") == "x" * 3_200_000 + f"{END}b"
    assert time.process_time() - begun < 5, "0.2 s here"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_documents_end_with_one_token(kind):
    put("set/a.txt", "".join(PLAY[:100])), put("set/b.txt", "".join(PLAY[100:]) + SEPARATOR), put("set/c.txt", "z" * 90)
    loaded = load_text("set", kind, 300)
    end, ids = loaded.tokenizer.end, np.concatenate([loaded.train, loaded.val])
    assert (ids == end).sum() == 2 and ids[-1] != end
    assert loaded.tokenizer.decode(ids) == "".join(PLAY[:100]) + END + "".join(PLAY[100:]) + END + "z" * 90
    assert loaded.tokenizer.byte_lengths()[ids].sum() == len("".join(PLAY).encode()) + 92
    if kind == "bpe":
        assert not any(b"\x03" in token and token != b"\x03" for token in loaded.tokenizer._vocabulary)


def test_an_end_token_is_never_a_part_of_another():
    bpe = BpeTokenizer([bytes([byte]) for byte in range(256)] + [b".\x03"])
    assert bpe.encode_array(f"a.{END}b{END}").tolist() == [97, 46, 3, 98, 3]
    assert CharTokenizer("ab").end is None and CharTokenizer(f"ab{END}").end == 0


# Parts


def split_set():
    train, val, test = "".join(PLAY[:200]), "".join(PLAY[200:260]), "".join(PLAY[260:])
    put("set/train.txt", train), put("set/val.txt.gz", val), put("set/test.txt", test)
    return train, val, test


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_files_for_validation_and_test(kind):
    train, val, test = split_set()
    tenth = int(0.9 * len(train))
    for eval_on, parts in {"val": (train, val), "test": (train, test), "tune": (train[:tenth], train[tenth:])}.items():
        loaded = load_text("set", kind, 300, eval_on=eval_on)
        assert tuple(map(loaded.tokenizer.decode, (loaded.train, loaded.val))) == parts
    assert len(list((cache_root() / "prepared").glob("*.bin"))) == 1
    assert "no files to test with" in error_of(load_text, "set/train.txt", kind, 300, eval_on="test", code=2)


def test_contents_and_parts_make_the_hash():
    split_set()
    first = find_text("set").sha256()
    Path("set").rename("moved")
    assert find_text("moved").sha256() == first
    Path("moved/test.txt").rename("moved/val2.txt")
    assert find_text("moved").sha256() != first
    Path("moved/val2.txt").rename("moved/test.txt")
    put("moved/train.txt", "another")
    assert find_text("moved").sha256() != first


# Shards


@pytest.fixture
def shards(monkeypatch):
    """Ten shards of a text, or so."""
    put("set/a.txt", "".join(PLAY[:150])), put("set/b.txt", "".join(PLAY[150:]))
    for module in (textfile, prepare):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(prepare, "SHARD", 2000)


def encoded(monkeypatch) -> list[str]:
    """A list that takes up what is encoded from now on."""
    pieces, encode = [], BpeTokenizer.encode_array

    def spy(self, piece):
        pieces.append(piece)
        return encode(self, piece)

    monkeypatch.setattr(BpeTokenizer, "encode_array", spy)
    return pieces


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_and_threads_do_not_change_the_tokens(monkeypatch, shards, threads):
    made = load_text("set", "bpe", 300, threads=threads)
    monkeypatch.setenv("NANOGFT_CACHE", "other")
    monkeypatch.setattr(prepare, "SHARD", 1 << 24)
    assert np.array_equal(load_text("set", "bpe", 300).train, made.train)
    (record,) = Path("cache/prepared").glob("*.json")
    listed = cache.read_record(record)["shards"]
    assert len(listed) > 8 and sum(shard["chars"] for shard in listed) == sum(map(len, PLAY)) + 1
    assert sum(sum(shard["tokens"]) for shard in listed) == len(made.train) + len(made.val)


def test_a_killed_preparation_goes_on(monkeypatch, shards, capsys):
    good = load_text("set", "bpe", 300, threads=1)
    train, val = np.array(good.train), np.array(good.val)
    monkeypatch.setenv("NANOGFT_CACHE", "other")
    pieces = encoded(monkeypatch)
    fsync, calls = prepare.os.fsync, []

    def killed(handle):
        calls.append(handle)
        if len(calls) > 7:
            raise KeyboardInterrupt
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            load_text("set", "bpe", 300, threads=1)
    first = len(pieces)
    (part,) = Path("other/prepared").glob("*.part")
    monkeypatch.setattr(prepare, "make_tokenizer", None)  # it is known
    again = load_text("set", "bpe", 300, threads=1)
    assert "shards of it are whole" in capsys.readouterr().err
    assert np.array_equal(again.train, train) and np.array_equal(again.val, val)
    assert 0 < len(pieces) - first < 0.8 * len(set(pieces)), "the first shards are not encoded again"
    assert not part.exists() and not list(Path("other/prepared").glob("*.part.json"))


def test_only_a_damaged_shard_is_made_again(monkeypatch, shards, capsys):
    good = load_text("set", "bpe", 300)
    train = np.array(good.train)
    (path,) = (cache_root() / "prepared").glob("*.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    pieces = encoded(monkeypatch)
    again = load_text("set", "bpe", 300)
    said = capsys.readouterr().err
    assert "(1 of " in said and "preparing again" in said and np.array_equal(again.train, train)
    assert 0 < sum(map(len, pieces)) < 2600, "of 2,000 characters and a piece"
    path.write_bytes(path.read_bytes()[:-2])
    assert np.array_equal(load_text("set", "bpe", 300).val, good.val)


def test_a_second_run_waits_and_uses_what_the_first_made(monkeypatch, shards):
    told, survey = threading.Event(), corpus.Corpus.survey
    surveys: list[corpus.Corpus] = []

    def slow(self):
        surveys.append(self)
        assert told.wait(10)
        return survey(self)

    monkeypatch.setattr(corpus.Corpus, "survey", slow)
    monkeypatch.setattr(prepare, "notice", lambda message: told.set() if "waiting for it" in message else None)
    both = [threading.Thread(target=load_text, args=("set", "bpe", 300)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert told.is_set() and len(surveys) == 1


def test_a_vocabulary_is_learned_from_a_sample_of_a_long_text(monkeypatch, shards, capsys):
    monkeypatch.setattr(prepare, "SAMPLE", 3000)
    seen = []
    make = prepare.make_tokenizer
    monkeypatch.setattr(prepare, "make_tokenizer", lambda kind, size, chars, sample, data_dir: make(
        kind, size, chars, (seen.append(piece) or piece for piece in sample), data_dir))  # fmt: skip
    load_text("set", "bpe", 300)
    assert 2000 < sum(map(len, seen)) < 3500 and "spread over" in capsys.readouterr().err
    places = ["".join(PLAY).find(piece) for piece in seen if END not in piece]
    assert max(places) > 0.7 * sum(map(len, PLAY)), "from all of the training part"


# nanoGPT's tokens


class Bytes(CharTokenizer):
    """In place of GPT-2's: 256 tokens."""

    def __init__(self, data_dir=""):
        super().__init__("".join(map(chr, range(256))))


def test_nanogpts_tokens_are_used_as_they_are(monkeypatch):
    monkeypatch.setattr(text, "Gpt2Tokenizer", Bytes)
    train, val = np.arange(200, dtype="<u2"), np.arange(90, dtype="<u2")
    put("set/train.bin", train.tobytes()), put("set/val.bin", val.tobytes())
    loaded = load_text("set", "gpt2", 0)
    assert isinstance(loaded.train, np.memmap) and np.array_equal(loaded.train, train)
    assert np.array_equal(loaded.val, val) and loaded.train.dtype == np.uint16
    tune = load_text("set", "gpt2", 0, eval_on="tune")
    assert (len(tune.train), tune.val[0]) == (180, 180)
    assert "--tokenizer gpt2" in error_of(load_text, "set", "char", 0, code=2)
    put("set/val.bin", np.full(99, 256, "<u2").tobytes())
    assert "has the token 256" in error_of(load_text, "set", "gpt2", 0)
    put("set/val.bin", b"odd")
    assert "3 bytes" in error_of(load_text, "set", "gpt2", 0)
