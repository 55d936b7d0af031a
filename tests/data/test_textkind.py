"""Files that are no UTF-8 text: each is recognised and given the remedy that makes a text of it."""

import io
import os
import random
import tarfile
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from data import textfile
from data.text import load_text
from data.textkind import likely_encoding, other_format
from tests.data.inputs import error_of

ENGLISH = "It was a dark night, and the wind cried. He had walked for hours and hoped to find shelter soon.\n" * 40
FRENCH = "Été, où êtes-vous ? L’élève a mangé un gâteau à la crème près de l’hôtel – c’était « délicieux ».\n" * 40
RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах.\n" * 40
CHINESE = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。\n" * 40
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n" * 40


def refusal(tmp_path, content: bytes) -> str:
    """What is said of a file of `content`, which is named FILE in it."""
    path = tmp_path / "a text"
    path.write_bytes(content)
    return error_of(load_text, str(path), "char", 0).replace(f"'{path}'", "FILE").replace(str(path), "FILE")


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, ENGLISH)
    return file.getvalue()


def tarred() -> bytes:
    file, member = io.BytesIO(), tarfile.TarInfo("a.txt")
    member.size = len(ENGLISH)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(member, io.BytesIO(ENGLISH.encode()))
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x28\xb5\x2f\xfd\x04" + bytes(99), "compressed with zstd, not a text. Unpack it: zstd -dc FILE > NEW"),
        (zipped("a.txt"), "a zip archive, not a text. Unpack it: unzip -p FILE > NEW"),
        (zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"), "an office document or e-book"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old office document"),
        (tarred(), "a tar archive, not a text. Unpack it: tar -xOf FILE > NEW"),
        (b"%PDF-1.4\nonly ASCII so far\n" * 99, "a PDF, not a text. Take the text out: pdftotext FILE NEW"),
        *((picture(kind), "a picture or a film") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")),
        (save({"a": torch.zeros(99)}), "a file of numbers or tables"),
    ],
    ids="zstd zip docx doc tar pdf png jpeg gif webp tiff safetensors".split(),
)  # fmt: skip
def test_formats(tmp_path, content, said):
    assert f"FILE is {said}" in refusal(tmp_path, content)


@pytest.mark.parametrize("word", ["GGUF", "PAR1 and PAR2", "Rar!", "%PDF-1.4 is old", "SQLite format 3", "BZh", "PK"])
def test_a_text_may_begin_with_the_name_of_a_format(word):
    assert other_format(f"{word} is what this text is about".encode(), "FILE") == ""


@pytest.mark.parametrize("text", [ENGLISH, FRENCH, RUSSIAN, CHINESE, JAPANESE], ids="en fr ru zh ja".split())
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be", "utf-32"])
def test_utf_16_and_32_with_and_without_a_mark(tmp_path, text, encoding):
    message = refusal(tmp_path, text.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"It is likely {name}, in which this place reads {text[:9]!r}"[:-1] in message
    assert message.endswith(f"Convert it: iconv -f {name} -t UTF-8 FILE > NEW")


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (FRENCH, "cp1252", "CP1252"),
        (ENGLISH + "“a café”" + ENGLISH, "cp1252", "CP1252"),
        (RUSSIAN, "cp1251", "CP1251"),
        (RUSSIAN, "koi8_r", "KOI8-R"),
        (JAPANESE, "shift_jis", "CP932"),
        (CHINESE, "gbk", "GB18030"),
    ],
    ids="french quotes cp1251 koi8 shift_jis gbk".split(),
)
def test_older_encodings(tmp_path, text, encoding, name):
    message = refusal(tmp_path, text.encode(encoding))
    assert f"is likely {name}, in which" in message and f"iconv -f {name} -t UTF-8 FILE > NEW" in message


def test_the_encoding_is_guessed_where_the_fault_is(tmp_path, monkeypatch):
    """Far from the beginning, and behind what a chunk has left over."""
    monkeypatch.setattr(textfile, "CHUNK", 8)
    before = "é" + ENGLISH * 30
    message = refusal(tmp_path, before.encode() + "Zoë’s café\n".encode("cp1252") * 9)
    assert f"byte 0xeb at offset {len(before) + 3:,} (line {40 * 30 + 1:,})" in message
    assert "CP1252, in which this place reads 'Zoë’s café'" in message


def test_a_guess_begins_at_a_whole_character(tmp_path):
    text = ENGLISH * 12 + CHINESE  # the first fault is at an odd offset, too far on for a guess from the beginning
    assert len(ENGLISH * 12) > textfile.AROUND
    assert "is likely UTF-16BE, in which this place reads '人人生" in refusal(tmp_path, text.encode("utf-16-be"))


@pytest.mark.parametrize(
    ("content", "at"),
    [
        (FRENCH[:9].encode() + b"\xe9" + FRENCH.encode(), len(FRENCH[:9].encode())),
        (FRENCH.encode() + "é".encode()[:1], len(FRENCH.encode())),
    ],
    ids=["a byte", "cut off"],
)
@pytest.mark.parametrize("chunk", [4, 1 << 18])
def test_utf_8_with_a_broken_byte_is_not_taken_for_another_encoding(tmp_path, monkeypatch, content, at, chunk):
    monkeypatch.setattr(textfile, "CHUNK", chunk)
    message = refusal(tmp_path, content)
    assert f"at offset {at:,} " in message and "iconv -c -f UTF-8 -t UTF-8 FILE > NEW" in message


@pytest.mark.parametrize(
    "content",
    [random.Random(0).randbytes(30_000), b"BM" + os.urandom(9) + b"\xff\0" * 5000, bytes(9999)],
    ids=["random", "bmp", "zeros"],
)
def test_what_is_no_text_in_any_encoding(tmp_path, content):
    message = refusal(tmp_path, content)
    assert message.endswith("This looks like no text at all; give a text") and "iconv" not in message


@pytest.mark.parametrize(
    ("text", "seen", "remedy"),
    [
        ("Hul\0tuv\n" * 50, "50 of 400 (12.50%), the first U+0000 in line 1", r"tr '\000' '\n' < FILE > NEW"),
        ("\n" + "a\x1fb\x1ec\n" * 50, "100 of 301 (33.22%), the first U+001F in line 2", r"tr '\036\037' '\n' <"),
        (FRENCH.encode("cp1252").decode("latin1"), "160 of", "-f UTF-8 -t LATIN1 FILE | iconv -f CP1252 -t UTF-8 >"),
    ],
    ids=["NUL", "separators", "twice converted"],
)
def test_many_control_characters_are_refused_with_line_and_share(tmp_path, text, seen, remedy):
    message = refusal(tmp_path, text.encode())
    assert f"control characters that no text should have: {seen}" in message and remedy in message


def test_a_few_control_characters_are_told_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(textfile, "CHUNK", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(ENGLISH.encode() + b"one\n\x00 two\x1b[0m\ttabs\f\n")
    text = load_text(str(path), "char", 0)
    assert "\0" in text.tokenizer.decode(text.val)
    assert f"1 of {len(ENGLISH) + 20:,} (0.03%), the first U+0000 in line 42. They are kept." in capsys.readouterr().err


def test_utf_8_is_not_called_anything_else():
    for text in (ENGLISH, FRENCH, RUSSIAN, CHINESE, JAPANESE):
        assert likely_encoding(text.encode()) is None
