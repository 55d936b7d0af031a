"""What the tests of data share: a text, small images, the files of a folder, and an error's message."""

import numpy as np
import pytest

from data.images import ImageData
from data.text import load_text
from run.errors import UserError

LINES = [f"Speaker {n % 7}:\nThe {n}th line of a play that nobody wrote, été comprised.\n\n" for n in range(400)]
CONTENT = "".join(LINES).encode("utf-8")
CLASSES = tuple("abc")


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def load(name="tinyshakespeare", tokenizer="char", vocab_size=300, **settings):
    """A text, of characters unless told otherwise."""
    return load_text(name, tokenizer, vocab_size, **settings)


def images(n: int, side: int = 16, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright third: above, in the middle or below, which is the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    pixels = random.integers(0, 100, (n, side, side, channels))
    for image, label in zip(pixels, labels, strict=True):
        image[label * side // 3 : (label + 1) * side // 3] += 120
    return pixels.astype(np.uint8), labels.astype(np.int64)


def image_data(n: int = 60, side: int = 16, channels: int = 3) -> ImageData:
    mean, std = (0.3,) * channels, (0.3,) * channels
    training, held_out = images(n, side, channels), images(30, side, channels, 1)
    return ImageData("made", *training, *held_out, CLASSES, mean, std, {}, "0", "here")


def error_of(call, *args, code=1, **settings):
    """What the error says in which a call must end, with `code` as the exit status."""
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    assert caught.value.code == code
    return str(caught.value)


def all_files(folder):
    """But for locks, which are empty and stay."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)
