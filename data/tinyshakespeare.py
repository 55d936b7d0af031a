"""Tiny Shakespeare: 1,115,394 bytes of plays, 65 different characters, the usual first data set."""

from data.cache import Found, OfficialFile, find_official

FILE = OfficialFile(
    path="tinyshakespeare/input.txt",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def find(data_dir: str = "") -> Found:
    """The text's bytes and where they are. Raises UserError when no place has the file."""
    return find_official("tinyshakespeare", FILE, data_dir)
