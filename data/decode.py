"""An image file as a square of pixels, the same for training and for predict.py.

A file's content decides what it is, not its name. Of an animation or of several pages the first picture counts.
Transparency is composited on white. Of EXIF only the orientation is read.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Those of Pillow's formats that a decoder in C reads, without another program: EPS would start Ghostscript.
FILE_FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "PSD", "PCX", "SGI", "TGA",
)  # fmt: skip
LARGEST_FILE = 256 << 20  # bytes
LARGEST_PIXELS = 50_000_000  # an image that claims more is called broken, not given the memory
BACKGROUND = "white"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class BrokenImage(Exception):
    """An image file that cannot be decoded; the text is a short reason."""


class NotAnImage(BrokenImage):
    """A file of another kind than those in FILE_FORMATS, or far too large for one."""


def read_file(path: str | os.PathLike) -> bytes:
    """What is in a file that may be an image. Raises OSError, and NotAnImage for one too large."""
    with open(path, "rb") as file:
        small = os.fstat(file.fileno()).st_size <= LARGEST_FILE  # a film is not read; a pipe has size 0
        content = file.read(LARGEST_FILE + 1) if small else b""
    if not small or len(content) > LARGEST_FILE:
        raise NotAnImage(f"more than {LARGEST_FILE >> 20} MiB are more than any image here needs")
    return content


def check(content: bytes) -> None:
    """Raises BrokenImage if the beginning of an image file shows that it is none or cannot be read."""
    with _opened(content):
        pass


def decode(content: bytes, side: int, channels: int) -> np.ndarray:
    """The middle square of an image file as (side, side, channels) uint8, channels 3 (RGB) or 1 (grey); see `square`.

    Raises BrokenImage when it is truncated, too large or no image at all.
    """
    with _opened(content) as image:
        image.draft(None, (4 * side, 4 * side))  # a large JPEG is decoded at a half, a quarter or an eighth
        image.load()
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _from_wide(image)
        # White comes last: the colours below transparent pixels have no part in resizing, which weighs by alpha.
        image = square(image.convert("RGBA" if image.has_transparency_data else "RGB"), side)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(side, side, channels)


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of `image`, resized with antialiasing to side x side."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))


def is_blank(pixels: np.ndarray) -> bool:
    """Whether all pixels (H, W, C) have the same colour."""
    return bool((pixels == pixels[0, 0]).all())


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The image, of which only the header has been read. Whatever goes wrong in the block is a BrokenImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about files that it reads all the same
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                if image.width * image.height > LARGEST_PIXELS:
                    raise BrokenImage(f"{image.width} x {image.height} pixels are more than {LARGEST_PIXELS:,}")
                yield image
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(content) from error
    except Exception as error:  # a damaged file leads Pillow's decoders to any of them, TypeError and KeyError included
        raise BrokenImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


@functools.cache
def _formats() -> list[str]:
    """Those of FILE_FORMATS that are read here: AVIF needs a recent Pillow, HEIF the package pillow-heif."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in FILE_FORMATS if name in Image.OPEN]


def _unidentified(content: bytes) -> BrokenImage:
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and "HEIF" not in _formats():
        return BrokenImage("a HEIC picture, which is read after: pip install pillow-heif")
    if brand in (b"avif", b"avis"):
        return BrokenImage("an AVIF picture that this Pillow does not read; try: pip install --upgrade pillow")
    return NotAnImage(f"not an image in JPEG, PNG or one of {len(_formats()) - 2} other formats")


def _upright(image: Image.Image) -> Image.Image:
    """The image as the camera was held. ImageOps.exif_transpose would write all tags anew and stumble over odd ones."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF that cannot be parsed raises anything; the picture is as good without
        turn = None
    return image if turn is None else image.transpose(turn)


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits; convert() would clip it to white. Raises BrokenImage for 32 bits."""
    values = np.array(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BrokenImage("its pixels are 32-bit numbers, which do not say what is white; save it with 8 or 16 bits")
    values[values == image.info.get("transparency", -1)] = 65535
    return Image.fromarray((values >> 8).astype(np.uint8))
