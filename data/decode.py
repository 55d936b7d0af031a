"""An image file as a square of pixels."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FILE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)
LARGEST_PIXELS = 50_000_000  # an image that claims more is called broken, not given the memory


class BrokenImage(Exception):
    """An image file that cannot be decoded; the text is a short reason."""


def decode(content: bytes, side: int, channels: int) -> np.ndarray:
    """The image file `content` as (side, side, channels) uint8, channels 3 (RGB) or 1 (grey); see `to_square`.

    Raises BrokenImage when it is truncated, too large or no image at all.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FILE_FORMATS) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise BrokenImage(f"{image.width} x {image.height} pixels are more than {LARGEST_PIXELS:,}")
            image = ImageOps.exif_transpose(image)  # upright, as a camera was held
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                image = image.point(lambda value: value / 256)
            return to_square(image.convert("RGB" if channels == 3 else "L"), side)
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image in " + ", ".join(FILE_FORMATS)) from error
    except DECODER_ERRORS as error:
        raise BrokenImage(str(error) or type(error).__name__) from error


def to_square(image: Image.Image, side: int) -> np.ndarray:
    """The middle square of `image`, resized with antialiasing: (side, side, channels) uint8."""
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    if (width, height) != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return np.asarray(image).reshape(side, side, -1)
