"""What a file is that is no UTF-8 text, and how to make one of it: formats by how they begin, encodings by a guess."""

import codecs
import re
import shlex

# A pattern of a file's first bytes, what the file is, and the remedy, with the file's name in place of {}.
FORMATS = (
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it: zstd -dc {} > NEW"),
    (rb"PK\x03\x04.{26,60}?(\[Content_Types\]|_rels/|mimetype|word/|xl/|ppt/)", "an office document or e-book",
     "Save it as plain text, in UTF-8, from the program that opens it"),
    (rb"\xd0\xcf\x11\xe0", "an old office document", "Save it as plain text, in UTF-8, from the program that opens it"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "Unpack it: unzip -p {} > NEW"),
    (rb".{257}ustar", "a tar archive", "Unpack it: tar -xOf {} > NEW"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a", "an archive", "Unpack it first"),
    (rb"%PDF-\d.{1,3}[\r\n]", "a PDF", "Take the text out: pdftotext {} NEW"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftyp", "a picture or a film",
     "A text model needs a text file"),
    (rb'.{4}\0{4}\{"|\x93NUMPY|GGUF[\x01-\x0f]\0|\x80[\x02-\x05]|PAR1[\0-\x1f]|\x89HDF|SQLite format 3\0',
     "a file of numbers or tables", "Give the text that was there before them"),
)  # fmt: skip
# Control characters that texts have none of: tabs, line ends and page breaks are text, and so are a terminal's colours.
CONTROLS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) - set("\t\n\v\f\r\x1b\x85")
CONTROL_BYTES = bytes(ord(char) for char in CONTROLS if char < "\x80")
NO_TEXT = "This looks like no text at all; give a text"
RARE = 0.05  # with fewer bytes that are not ASCII, statistics of an alphabet tell nothing: take Western Europe's


def other_format(head: bytes, where: str) -> str:
    """What the file `where` is and what to do, told by its first bytes; empty if they are of no known format."""
    for pattern, what, remedy in FORMATS:
        if re.match(pattern, head, re.DOTALL):
            return f"{where} is {what}, not a text. {remedy.format(shlex.quote(where))}"
    return ""


def encoding_advice(sample: bytes, at: int, where: str) -> str:
    """Which encoding the file `where` is likely in, how it reads there at byte `at` of `sample`, and how to convert it.

    `sample` begins at a multiple of four bytes. Empty if it looks like UTF-8 or like no text at all.
    """
    encoding = likely_encoding(sample)
    if encoding is None:
        return ""
    drop, name, file = "", codecs.lookup(encoding).name.upper(), shlex.quote(where)
    if name == "UTF-8":
        drop, likely = "-c ", "Most of it is UTF-8: bytes are broken, or parts are in another encoding; -c drops them"
    else:
        name = re.sub("-([LB]E)$", r"\1", name)  # as iconv calls it
        text = sample.decode(encoding, "replace")
        place = len(sample[:at].decode(encoding, "ignore"))
        line = text[max(0, place - 30) : place].rpartition("\n")[2] + text[place : place + 30].partition("\n")[0]
        likely = f"It is likely {name}, in which this place reads {line!r}"
        if not name.startswith("UTF-"):
            likely += " (if that is wrong, try another: iconv -l)"
    return f"{likely}. Convert it: iconv {drop}-f {name} -t UTF-8 {file} > NEW"


def controls_advice(found: set[str], share: float, where: str) -> str:
    """What to do with a file of UTF-8 that has control characters, `found`, a `share` of all its characters."""
    file = shlex.quote(where)
    if share > 0.5:
        return NO_TEXT
    if max(found) >= "\x80":
        return ("They may come of CP1252 that was converted as if it were LATIN1. Mend that: "
                f"iconv -f UTF-8 -t LATIN1 {file} | iconv -f CP1252 -t UTF-8 > NEW")  # fmt: skip
    octal = "".join(f"\\{ord(char):03o}" for char in sorted(found))
    return f"If they stand between words or lines, make line ends of them: tr '{octal}' '\\n' < {file} > NEW"


def likely_encoding(sample: bytes) -> str | None:
    """Python's name of it; "utf-8" for text with a few bytes broken, None for whole UTF-8 and for what is no text."""
    from charset_normalizer import from_bytes  # where it is used: nearly no text needs it

    best = from_bytes(sample).best()
    if best and best.encoding.startswith(("utf_16", "utf_32")):
        return best.encoding
    text = sample.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    if not broken:
        return None
    if sum(char >= "\x80" for char in text) > 2 * broken:
        return "utf-8"
    if sample.translate(None, CONTROL_BYTES) != sample:
        return None
    if sum(byte >= 0x80 for byte in sample) < RARE * len(sample):
        return "cp1252"
    if best and "cp1252" in best.could_be_from_charset:
        return "cp1252"
    return best.encoding if best else None
