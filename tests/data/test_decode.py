"""One image file as pixels: transparency, orientation, depth and colours, formats, and files that are none."""

import io
import struct
import sys
import tracemalloc
import types
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from data import decode as decoder
from data.decode import BrokenImage, NotAnImage, check, decode, is_blank, read_file

Image.init()
RANDOM = np.random.default_rng(0)
SCENE = Image.fromarray(RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)


def known(*kinds):
    """Those that this Pillow writes; AVIF needs a recent one."""
    return [kind for kind in kinds if kind in Image.SAVE]


def saved(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def ring(colour, hidden, side=28):
    """An opaque square of one grey, whose surroundings are transparent and hide another: RGBA."""
    pixels = np.full((side, side, 4), (hidden,) * 3 + (0,), np.uint8)
    pixels[side // 4 : -side // 4, side // 4 : -side // 4] = (colour,) * 3 + (255,)
    return Image.fromarray(pixels)


def expected_ring(colour, side=28):
    return np.asarray(Image.alpha_composite(Image.new("RGBA", (side, side), "white"), ring(colour, 0, side)))[..., :3]


# Transparency


@pytest.mark.parametrize("kind", known("PNG", "WEBP", "TIFF", "TGA", "AVIF"))
@pytest.mark.parametrize("hidden", [0, 255, 99])
def test_what_transparent_pixels_hide_is_not_seen(kind, hidden):
    settings = {"lossless": True, "exact": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    content = saved(ring(60, hidden), kind, **settings)
    assert np.abs(decode(content, 28, 3).astype(int) - expected_ring(60)).max() <= (4 if kind == "AVIF" else 0)
    small = decode(saved(ring(60, hidden, 112), kind, **settings), 28, 1)  # resized too
    assert np.abs(small.astype(int) - decode(saved(ring(60, 60, 112), kind, **settings), 28, 1)).max() <= 4


def transparent_images():
    """The ring in every way in which Pillow knows transparency, with the ring's grey 60 and 200 hidden."""
    grey = np.asarray(ring(60, 200))[..., 0]
    alpha = np.asarray(ring(60, 200))[..., 3]
    palette = Image.fromarray((grey == 200).astype(np.uint8), "P")
    palette.putpalette([60, 60, 60, 200, 200, 200])
    yield "LA", saved(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG")
    yield "palette, one index", saved(palette, "PNG", transparency=1)
    yield "palette, alpha of each", saved(palette, "PNG", transparency=b"\xff\x00")
    yield "palette, GIF", saved(palette, "GIF", transparency=1)
    yield "grey, one value", saved(Image.fromarray(grey), "PNG", transparency=200)
    yield "colours, one value", saved(Image.fromarray(grey).convert("RGB"), "PNG", transparency=(200, 200, 200))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    yield "16 bits, one value", saved(deep, "PNG", transparency=200 * 257)
    film = ring(60, 0)
    yield "animated GIF", saved(film, "GIF", save_all=True, append_images=[ring(0, 0)], disposal=2)
    yield "animated WebP", saved(film, "WEBP", save_all=True, append_images=[ring(0, 0)], lossless=True)
    yield "animated PNG", saved(film, "PNG", save_all=True, append_images=[ring(0, 0)])


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in transparent_images()])
def test_every_kind_of_transparency_is_composited_on_white(content):
    assert np.array_equal(decode(content, 28, 3), expected_ring(60))
    assert np.array_equal(decode(content, 28, 1), expected_ring(60)[..., :1])


def test_half_transparent_pixels_are_half_white():
    assert decode(saved(Image.new("RGBA", (8, 8), (0, 100, 200, 128)), "PNG"), 8, 3)[0, 0].tolist() == [127, 177, 227]


def test_blank():
    for colour, blank in ((255, True), (254, False)):
        assert is_blank(decode(saved(ring(colour, 0), "PNG"), 28, 3)) == blank


# Depth and colours


def test_sixteen_bits_and_more():
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(decode(saved(Image.fromarray(deep), kind), 8, 1)[..., 0], deep >> 8), kind
    for wide in (deep.astype(np.float32) / 65535, deep.astype(np.int32) * 9, deep.astype(np.int32) - 9):
        with pytest.raises(BrokenImage, match="32-bit numbers"):
            decode(saved(Image.fromarray(wide), "TIFF"), 8, 1)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG"),
                                            ("1", "PNG"), ("P", "GIF"), ("L", "JPEG2000")])  # fmt: skip
def test_every_colour_model_is_seen_in_colour_and_in_grey(mode, kind):
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(SCENE, srgb, lab, outputMode="LAB")
    else:
        image = SCENE.convert(mode)
    content = saved(image, kind)
    like = SCENE.convert("1" if mode == "1" else "L" if mode == "L" else "RGB").convert("RGB")
    expected = np.asarray(decoder.square(like, 16)).astype(int)
    assert np.abs(decode(content, 16, 3) - expected).mean() < 9
    grey = np.asarray(decoder.square(like.convert("L"), 16)).astype(int)
    assert np.abs(decode(content, 16, 1)[..., 0] - grey).mean() < 9


# EXIF


def exif_of(*entries):
    """EXIF with entries (tag, type, count, four bytes)."""
    body = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


TURNED = (0x0112, 3, 1, b"\0\x06\0\0")
ODD = {
    "text for a number": (0x011A, 2, 4, b"72\0\0"),
    "a type there is not": (0x011A, 99, 1, b"1234"),
    "a place outside": (0x9286, 7, 4000, b"\xff\xff\xff\xff"),
    "an endless count": (0x0132, 5, 0xFFFFFFFF, b"\0\0\0\x08"),
    "an EXIF IFD outside": (0x8769, 4, 1, b"\xff\xff\xff\xff"),
    "an EXIF IFD in itself": (0x8769, 4, 1, b"\0\0\0\x08"),
    "a GPS IFD of text": (0x8825, 2, 4, b"abc\0"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_only_the_orientation_is_read(odd, kind):
    turned = Image.fromarray(np.asarray(SCENE)).transpose(Image.Transpose.ROTATE_270)
    entries = sorted([TURNED, ODD[odd]])
    settings = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = saved(SCENE, kind, exif=exif_of(*entries), **settings)
    close = np.abs(decode(content, 16, 3).astype(int) - np.asarray(decoder.square(turned, 16))).mean()
    assert close < 3


@pytest.mark.parametrize("exif", [exif_of((0x0112, 2, 4, b"six\0")), exif_of((0x0112, 3, 1, b"\0\x63\0\0")),
                                  b"Exif\0\0", b"Exif\0\0rubbish",
                                  b"Exif\0\0MM\0*\xff\xff\xff\xff"])  # fmt: skip
def test_an_orientation_that_says_nothing_turns_nothing(exif):
    content = saved(SCENE, "JPEG", exif=exif, quality=95)
    assert np.array_equal(decode(content, 16, 3), decode(saved(SCENE, "JPEG", quality=95), 16, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", known("PNG", "TIFF", "AVIF"))
def test_every_orientation_is_turned_as_pillow_does(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(SCENE, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(decode(content, 16, 3), np.asarray(decoder.square(upright, 16)))


def test_warnings_of_the_decoder_are_not_shown():
    content = saved(SCENE, "JPEG", exif=exif_of(ODD["a place outside"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Image.open(io.BytesIO(content)) as image:
            dict(image.getexif())
        decode(content, 8, 3)


# Formats


@pytest.mark.parametrize("kind", known("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM",
                                       "ICO", "PCX", "SGI", "TGA"))  # fmt: skip
def test_formats_are_known_by_their_content(kind):
    seen = decode(saved(SCENE, kind), 16, 3).astype(int)
    assert np.abs(seen - np.asarray(decoder.square(SCENE, 16))).mean() < 6


def test_a_file_in_no_format_is_told_from_a_broken_one():
    png = saved(SCENE, "PNG")
    for content in (b"", b"text", saved(SCENE, "EPS"), bytes(1000), b"%PDF-1.7 ", b"<svg/>"):
        with pytest.raises(NotAnImage, match="not an image in JPEG, PNG or one of [0-9]+ other"):
            decode(content, 8, 3)
    with pytest.raises(BrokenImage, match="truncated") as caught:
        decode(png[:2000], 8, 3)
    assert not isinstance(caught.value, NotAnImage)
    check(png[:2000])  # its beginning is good


def test_heic_is_read_by_pillow_heif_or_named_with_the_remedy(monkeypatch):
    content = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)
    decoder._formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    with pytest.raises(BrokenImage, match="a HEIC picture, .*: pip install pillow-heif") as caught:
        decode(content, 8, 3)
    assert not isinstance(caught.value, NotAnImage)

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size = "RGB", (8, 8)
            self.tile = [ImageFile._Tile("raw", (0, 0, 8, 8), 0, ("RGB", 0, 1))]

    installed = types.ModuleType("pillow_heif")
    installed.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")
    decoder._formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", installed)
    try:
        assert decode(content + bytes(8 * 8 * 3), 8, 3).shape == (8, 8, 3)
    finally:
        Image.OPEN.pop("HEIF"), Image.ID.remove("HEIF"), decoder._formats.cache_clear()


@pytest.mark.parametrize("error", [TypeError("abs()"), KeyError(3), IndexError(), MemoryError(), AssertionError("x"),
                                   RecursionError("deep"), struct.error("unpack")], ids=repr)  # fmt: skip
def test_any_error_of_a_decoder_is_a_broken_image(error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BrokenImage, match=str(error) or type(error).__name__):
        decode(saved(SCENE, "BMP"), 8, 3)


def png_claiming(width, height):
    header, data = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bombs():
    yield "PNG, 81 M", png_claiming(9000, 9000)
    yield "PNG, 10^9", png_claiming(31623, 31623)
    yield "PNG, 2^60", png_claiming(1 << 30, 1 << 30)
    yield "GIF", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(9) + b";"
    yield "BMP", b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "PPM", b"P6 40000 40000 255 " + bytes(99)
    yield "TGA", struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(99)


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in bombs()])
def test_a_size_in_the_header_takes_no_memory(content):
    for function in (lambda: decode(content, 8, 3), lambda: check(content)):
        tracemalloc.start()
        with pytest.raises(BrokenImage, match="pixels"):
            function()
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "film.mov"
    with open(path, "wb") as file:
        file.truncate(decoder.LARGEST_FILE + 1)
    with pytest.raises(NotAnImage, match="more than 256 MiB"):
        read_file(path)
    monkeypatch.setattr(decoder, "LARGEST_FILE", 99)
    path.write_bytes(bytes(99))
    assert read_file(path) == bytes(99)


# How a picture is cut and resized


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (24, 24)], ids=["wide", "high", "square"])
def test_the_shorter_side_is_resized_and_the_middle_kept(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    width, height = 4 * size[0] // min(size), 4 * size[1] // min(size)
    left, top = (width - 4) // 2, (height - 4) // 2
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 4, top + 4))
    assert np.array_equal(decode(saved(image, "PNG"), 4, 3), np.asarray(expected))


def test_resizing_does_not_alias_and_the_same_size_is_left_alone():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    content = saved(Image.fromarray(stripes), "PNG")
    small = decode(content, 8, 1)
    assert small.shape == (8, 8, 1) and (np.abs(small.astype(int) - 127) < 20).all()  # without antialiasing: 0 or 255
    assert np.array_equal(decode(content, 64, 1)[:, :, 0], stripes)


def test_a_large_photograph_is_decoded_small_and_looks_the_same():
    """JPEG decodes at an eighth; at least four times what is wanted remain, so that Imagenette's are decoded whole."""
    content = saved(SCENE.resize((1800, 1200)), "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(decoder.square(image, 32)).astype(int)
    assert np.abs(decode(content, 32, 3) - whole).max() <= 3
    content = saved(SCENE.resize((240, 160)), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(decode(content, 64, 3), np.asarray(decoder.square(image, 64)))
