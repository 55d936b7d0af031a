"""Tokenizers: what they encode they decode, their JSON, what they refuse; the BPE trainer against a plain one."""

import base64
import json
import time
from collections import Counter

import pytest
import regex
import requests
import tiktoken

from data import cache, tokenizers
from data.bpe import PATTERN, train_bpe
from data.tokenizers import BpeTokenizer, CharTokenizer, Gpt2Tokenizer, tokenizer_from_json
from run.errors import UserError

TEXT = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\n"
    "All:\nSpeak, speak, and we shall hear the farther further father.\n"
    "  12345 aaaa aaaaa été naïve 日本語 🙂\r\n\t!?..."
) * 3
BPE = BpeTokenizer(train_bpe([TEXT], 330))
CHAR = CharTokenizer(TEXT)
BOTH = pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])


def plain_train(text: str, vocab_size: int) -> list[bytes]:
    """Byte-pair encoding with nothing remembered from one join to the next."""
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(PATTERN, text)]
    vocabulary = [bytes([byte]) for byte in range(256)]
    while len(vocabulary) < vocab_size:
        ids = {token: index for index, token in enumerate(vocabulary)}
        counts = Counter((ids[a], ids[b]) for word in words for a, b in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        left, right = vocabulary[left], vocabulary[right]
        vocabulary.append(left + right)
        for word in words:
            position = 0
            while position < len(word) - 1:
                if word[position] == left and word[position + 1] == right:
                    word[position : position + 2] = [left + right]
                position += 1
    return vocabulary


@BOTH
def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_array(TEXT).tolist() == ids
    assert tokenizer.encode("") == [] and tokenizer.encode_array("").tolist() == [] and tokenizer.decode([]) == ""


@BOTH
def test_json_round_trip(tokenizer):
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.to_json() == tokenizer.to_json()


@BOTH
def test_stream_gives_the_same_text_in_whole_characters(tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) + stream.flush() == TEXT
    assert "\ufffd" not in "".join(pieces)


def test_stream_waits_for_the_last_byte_and_flushes_what_is_cut_off():
    stream = BPE.stream()
    smile = list("🙂".encode())  # ids 0 .. 255 are the bytes
    assert [stream.push(token) for token in smile] == ["", "", "", "🙂"]
    assert [stream.push(token) for token in smile[:2]] == ["", ""]
    assert stream.flush() == "\ufffd" == BPE.decode(smile[:2])
    assert BPE.stream().flush() == ""


@BOTH
@pytest.mark.parametrize("offset", [0, 1, 10**6])
def test_id_out_of_range(tokenizer, offset):
    for token in (tokenizer.vocab_size + offset, -1 - offset):
        with pytest.raises(ValueError, match=rf"{token} is outside 0 \.\. {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, token])
        with pytest.raises(ValueError, match=str(token)):
            tokenizer.stream().push(token)


def test_char_ids_are_the_sorted_characters():
    tokenizer = CharTokenizer("hello")
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("ehlo") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "shown", "position"),
    [
        ("Olé", "'é' (U+00E9)", 3),
        ("🙂", "'🙂' (U+1F642)", 1),
        ("l\x00", r"'\x00' (U+0000)", 2),
        ("\udc80", "U+DC80", 1),
    ],
    ids=["accent", "emoji", "control", "surrogate"],
)
def test_char_names_the_unknown_character(text, shown, position):
    with pytest.raises(UserError) as caught:
        CharTokenizer("Ol\n").encode(text)
    message = str(caught.value)
    assert shown in message and f"character {position} of" in message
    assert "3 characters" in message and r"'\nOl'" in message
    message.encode("utf-8")


def test_char_keeps_the_list_of_known_characters_short():
    with pytest.raises(UserError) as caught:
        CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 5000)))).encode("x")
    assert "5000 characters" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [TEXT, "aaaaaaaabaaa aaab " * 5, "ab" * 300, "the then them " * 9 + "a b c", "日本 日本語 本日 " * 4],
    ids=range(5),
)
@pytest.mark.parametrize("vocab_size", [257, 262, 300, 2000])
def test_trainer_equals_the_plain_one(text, vocab_size):
    assert train_bpe([text], vocab_size) == plain_train(text, vocab_size)


def test_tiktoken_repeats_the_joins_of_training():
    words = regex.findall(PATTERN, TEXT)
    assert "".join(words) == TEXT
    vocabulary = BPE._vocabulary
    for word in words:
        tokens = [bytes([byte]) for byte in word.encode()]
        for joined in vocabulary[256:]:
            position = 0
            while position < len(tokens) - 1:
                if tokens[position] + tokens[position + 1] == joined:
                    tokens[position : position + 2] = [joined]
                position += 1
        assert [vocabulary[token] for token in BPE.encode(word)] == tokens


def test_bpe_has_the_size_asked_for_and_shortens_the_text():
    assert BPE.vocab_size == 330
    assert len(BPE.encode(TEXT)) < 0.6 * len(TEXT.encode())


def test_bpe_stops_when_no_pair_occurs_twice():
    assert len(train_bpe(["abcdefgh"], 400)) == 256
    assert len(train_bpe([""], 400)) == 256
    assert train_bpe(["abab"], 400)[256:] == [b"ab"]


@pytest.mark.parametrize("unit", ["a", " ", "1", "-", "\n \t"], ids=repr)
def test_long_runs_stay_fast(unit):
    text = unit * 200_000
    start = time.perf_counter()
    tokenizer = BpeTokenizer(train_bpe([text], 300))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 3


def test_bpe_knows_every_text():
    for text in ("\x00\x7f\x1c\x85", "العربية हिन्दी", "👩‍👩‍👧‍👦", "<|endoftext|>"):
        assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize(
    "stored",
    [
        {},
        [],
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "chars": ""},
        {"kind": "char", "chars": 5},
        {"kind": "bpe", "pattern": PATTERN},
        {"kind": "bpe", "pattern": PATTERN, "ranks": ["!!"]},
        {"kind": "bpe", "pattern": PATTERN, "ranks": BPE.to_json()["ranks"][:255]},
        {"kind": "bpe", "pattern": PATTERN, "ranks": BPE.to_json()["ranks"] + [base64.b64encode(b"a").decode()]},
        {"kind": "bpe", "pattern": "(", "ranks": BPE.to_json()["ranks"]},
    ],
    ids=range(11),
)
def test_damaged_json_is_refused(stored):
    with pytest.raises(UserError, match="stored tokenizer"):
        tokenizer_from_json(stored)


@pytest.fixture
def no_kept_gpt2(monkeypatch, tmp_path):
    """tiktoken as on a machine that has never fetched GPT-2's vocabulary."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)


def test_gpt2_without_a_network_is_a_clear_error(no_kept_gpt2, monkeypatch):
    def unreachable(*args, **kwargs):
        try:
            raise OSError(-2, "Name or service not known")
        except OSError as cause:
            raise requests.exceptions.ConnectionError("Max retries exceeded, and much more") from cause

    monkeypatch.setattr(requests, "get", unreachable)
    for make in (Gpt2Tokenizer, lambda: tokenizer_from_json({"kind": "gpt2"})):
        with pytest.raises(UserError) as caught:
            make()
        assert "(Name or service not known)" in str(caught.value)
        assert "--tokenizer bpe" in str(caught.value) and "Max retries" not in str(caught.value)


def test_gpt2_altered_on_the_way_is_refused(no_kept_gpt2, monkeypatch):
    class Altered:
        content = b"not the vocabulary"

        def raise_for_status(self):
            pass

    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: Altered())
    with pytest.raises(UserError, match="Hash mismatch"):
        Gpt2Tokenizer()


def test_gpt2_does_not_wait_for_ever(no_kept_gpt2, monkeypatch):
    monkeypatch.setattr(tokenizers, "GPT2_SECONDS", 0.2)
    monkeypatch.setattr(tokenizers, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(9))
    start = time.perf_counter()
    with pytest.raises(UserError, match="no answer in 0.2 s"):
        Gpt2Tokenizer()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("setting", ["data_dir", "NANOGFT_DATA", "shared"])
def test_gpt2_is_found_in_a_folder_of_data_sets(no_kept_gpt2, monkeypatch, tmp_path, capsys, setting):
    """Files of GPT-2's form: the 256 bytes and one joined token."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    files = {
        "vocab.bpe": "#version: 0.2\na b\n",
        "encoder.json": json.dumps({letter: rank for rank, letter in enumerate([*letters, "ab", "<|endoftext|>"])}),
    }
    folder = cache.SHARED_DIR if setting == "shared" else tmp_path / "mine"
    (folder / "gpt2_bpe").mkdir(parents=True)
    for name, content in files.items():
        (folder / "gpt2_bpe" / name).write_text(content)
        monkeypatch.setitem(tokenizers.GPT2_SHA256, name, cache.sha256(content.encode()))
    if setting == "NANOGFT_DATA":
        monkeypatch.setenv("NANOGFT_DATA", str(folder))
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    tokenizer = Gpt2Tokenizer(str(folder) if setting == "data_dir" else "")
    assert tokenizer.vocab_size == 258 and tokenizer.end == 257
    assert tokenizer.encode_array(f"abb{tokenizers.END}").tolist() == [256, letters.index("b"), 257]
    assert tokenizer.byte_lengths()[[256, 257]].tolist() == [2, 1]
    (folder / "gpt2_bpe" / "vocab.bpe").write_text("#version: 0.2\na c\n")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: BPE._encoding)
    assert Gpt2Tokenizer(str(folder)).vocab_size == 330 and "it is not GPT-2's" in capsys.readouterr().err


def test_gpt2_is_stored_by_name(no_kept_gpt2, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: BPE._encoding)
    tokenizer = Gpt2Tokenizer()
    assert tokenizer.to_json() == {"kind": "gpt2"}
    again = tokenizer_from_json(tokenizer.to_json())
    assert again.vocab_size == 330 and again.decode(again.encode(TEXT)) == TEXT
