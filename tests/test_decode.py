"""Decoding: every mode has one meaning in 8-bit RGB, and what is damaged is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pathline import DataError
from pathline.data.decode import EXTENSIONS, decode, is_image, rgb, rules


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes, **options) -> np.ndarray:
    image = decode(content, "x", **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(content: bytes) -> str:
    with pytest.raises(DataError) as error:
        decode(content, "bad/x.png of a.zip")
    assert str(error.value).startswith("got bad/x.png of a.zip")
    return str(error.value)


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape)


COLOURS = noise(5, 7, 3).astype(np.uint8)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_colours_come_back(kind, options):
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOURS), kind, **options)), COLOURS)


def test_grey_and_one_bit_are_repeated():
    grey = COLOURS[..., 0]
    assert np.array_equal(pixels(encoded(Image.fromarray(grey))), np.stack([grey] * 3, 2))
    bits = grey > 127
    assert np.array_equal(pixels(encoded(Image.fromarray(bits))), np.stack([bits * 255] * 3, 2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_all_256_levels(kind):
    """round(65535·u) -> round(255·u); Pillow's own conversion would leave 17 levels of a ramp, most of them 255."""
    ramp = np.arange(0, 65536, 13).astype(np.uint16).reshape(-1, 2)
    found = pixels(encoded(Image.fromarray(ramp), kind))
    assert np.array_equal(found[..., 0], np.rint(ramp / 65535 * 255))
    assert len(np.unique(found)) == 256 and (found == found[..., :1]).all()


def test_big_endian_sixteen_bits():
    ramp = noise(5, 7, high=65536).astype(np.uint16)
    image = Image.frombytes("I;16B", (7, 5), ramp.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(rgb(image, "x"))[..., 1], np.rint(ramp / 257))


def test_a_transparent_level_of_sixteen_bits_is_white():
    levels = np.array([[0, 300], [300, 65535], [40000, 1]], np.uint16)
    content = encoded(Image.fromarray(levels))
    cut = content.index(b"IDAT") - 4
    chunk = b"tRNS" + (300).to_bytes(2, "big")
    content = content[:cut] + (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[cut:]
    assert pixels(content)[..., 2].tolist() == [[0, 255], [255, 255], [156, 0]]


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_colours_lie_over_white(mode):
    alpha = np.array([0, 1, 64, 127, 200, 254, 255], np.uint8)[None].repeat(5, 0)
    base = COLOURS if mode == "RGBA" else COLOURS[..., :1]
    found = pixels(encoded(Image.fromarray(np.concatenate([base, alpha[..., None]], 2), mode)))
    assert np.abs(found - over_white(base.astype(float), alpha)).max() <= 1
    assert (found[:, 0] == 255).all(), "transparent: white, whatever the colour below"
    assert (found[:, -1] == base[:, -1]).all(), "opaque: the colour itself"


def test_palettes_and_their_transparency():
    indices = np.array([[0, 1, 2], [2, 0, 1]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([255, 0, 0, 0, 200, 0, 3, 5, 250])
    colours = np.array([[255, 0, 0], [0, 200, 0], [3, 5, 250]])
    assert np.array_equal(pixels(encoded(image)), colours[indices])
    colours[1] = 255
    for kind in ("PNG", "GIF"):
        assert np.array_equal(pixels(encoded(image, kind, transparency=1)), colours[indices])


def test_one_transparent_colour_of_rgb():
    image = Image.fromarray(np.array([[[9, 8, 7], [9, 8, 6]]], np.uint8))
    assert pixels(encoded(image, transparency=(9, 8, 7))).tolist() == [[[255, 255, 255], [9, 8, 6]]]


def png_of_bits(bits: int, kind: int, row: bytes, width: int, clear: bytes | None = None) -> bytes:
    """One row of grey (kind 0), colour (2) or grey with alpha (4) of so many bits, and its transparent level."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)),
        *([] if clear is None else [(b"tRNS", clear)]),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    whole = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


@pytest.mark.parametrize(
    ("bits", "row", "clear", "expected"),
    [
        (1, [0b01011000], 0, [255, 255, 255, 255, 255]),
        (1, [0b01011000], 1, [0, 255, 0, 255, 255]),
        (2, [0b00011011, 0b01000000], 1, [0, 255, 170, 255, 255]),
        (2, [0b00011011, 0b01000000], 0, [255, 85, 170, 255, 85]),
        (4, [0x1F, 0x60, 0x10], 6, [17, 255, 255, 0, 17]),
        (8, [1, 6, 85, 0, 6], 6, [1, 255, 85, 0, 255]),
    ],
)
def test_a_transparent_level_of_few_bits_is_white(bits, row, clear, expected):
    """It is told as it is stored, and grey is scaled to 255 when it is decoded."""
    assert pixels(png_of_bits(bits, 0, bytes(row), 5, struct.pack(">H", clear)))[0, :, 0].tolist() == expected


def test_a_transparent_colour_of_sixteen_bits_is_white():
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1334, 0x5678, 0x9ABC)
    found = pixels(png_of_bits(16, 2, row, 2, struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    assert found.tolist() == [[[255, 255, 255], [0x13, 0x56, 0x9A]]]


def test_sixteen_bits_with_an_alpha_channel_keep_the_high_byte():
    """As ``rules`` says."""
    content = png_of_bits(16, 4, struct.pack(">4H", 0x12FF, 0xFFFF, 0x80FF, 0xFFFF), 2)
    assert pixels(content)[0, :, 0].tolist() == [0x12, 0x80]
    assert rules(exif=False)["16 bits"].endswith("grey with an alpha channel: the high byte")


def test_cmyk_has_three_channels():
    """Ink on white paper: (255 - c)(255 - k)/255 and so on; JPEG keeps a flat colour to a few levels."""
    ink = np.array([40, 90, 200, 25])
    flat = np.broadcast_to(ink.astype(np.uint8), (16, 24, 4))
    found = pixels(encoded(Image.fromarray(np.ascontiguousarray(flat), "CMYK"), "JPEG", quality=100))
    assert found.shape == (16, 24, 3)
    assert np.abs(found - (255 - ink[:3]) * (255 - ink[3]) / 255).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (7, 5), colour) for colour in ((250, 10, 5), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (found == [250, 10, 5]).all()


def test_of_several_pictures_in_one_jpeg_the_first():
    """Cameras keep a preview or a second eye's picture behind it."""
    first, second = Image.new("RGB", (16, 8), (200, 20, 20)), Image.new("RGB", (8, 16))
    found = pixels(encoded(first, "MPO", save_all=True, append_images=[second]))
    assert found.shape == (8, 16, 3) and np.abs(found - [200, 20, 20]).max() <= 2


def test_exif_is_applied_where_it_is_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90° clockwise
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    assert np.array_equal(pixels(content), COLOURS)
    assert np.array_equal(pixels(content, exif=True), np.rot90(COLOURS, -1))
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOURS)), exif=True), COLOURS)
    assert rules(exif=True) != rules(exif=False)


def test_jpeg_is_decoded_in_full():
    """No coarser decoding for the sake of speed: the sides are those of the file."""
    assert decode(encoded(Image.new("RGB", (640, 417)), "JPEG"), "x").size == (640, 417)


# --- which files are images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "n01/x.JPEG", "a.b/c.d.Webp", "x.tif", "é/ü.jpg"])
def test_names_of_images(name):
    assert is_image(name)


@pytest.mark.parametrize(
    "name", ["x.pdf", "x.npy", "x", "png", "dataset.json", ".x.png", ".git/x.png", "a/.b/x.png", "__MACOSX/a/x.png", ""]
)
def test_names_of_others(name):
    assert not is_image(name)


def test_extensions_that_no_one_means_are_not_among_them():
    assert not EXTENSIONS & {".pdf", ".eps", ".ps", ".psd", ".mpg", ".h5", ".fits", ".ico"}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.98, 0.6, 0.02, 0])
def test_truncated(kind, share):
    image = Image.fromarray(noise(37, 53, 3).astype(np.uint8))
    content = encoded(image, kind)
    refusal(content[: int(len(content) * share)])


@pytest.mark.parametrize("content", [b"", b"not an image", b"%PDF-1.4\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(5000)])
def test_no_image(content):
    assert f"of {len(content)} bytes, which is no image of the kinds BMP, GIF" in refusal(content)


def test_a_kind_that_pillow_could_read_is_not_tried():
    image = Image.new("RGB", (8, 8))
    for kind in ("PDF", "EPS", "ICO", "TGA", "PCX"):
        assert "which is no image" in refusal(encoded(image, kind))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("F", (3, 2)), "mode F"),
        (Image.new("I", (3, 2)), "(32,) bits a pixel"),
        (Image.new("LAB", (3, 2)), "mode LAB"),
    ],
)
def test_pixels_without_a_meaning_in_eight_bits(image, said):
    assert said in refusal(encoded(image, "TIFF"))


@pytest.mark.parametrize(("tag", "value", "said"), [(262, 0, "photometric kind 0"), (258, 12, "(12,) bits a pixel")])
def test_grey_tiff_of_other_laws(tag, value, said):
    """White as the lowest level, and 12 bits: Pillow hands both on as if they were 16 bits of the usual law."""
    content = bytearray(encoded(Image.fromarray(noise(4, 6, high=4096).astype(np.uint16)), "TIFF"))
    entry = content.index(struct.pack("<HHI", tag, 3, 1))
    content[entry + 8 : entry + 10] = struct.pack("<H", value)
    assert said in refusal(bytes(content))


def png_header(width: int, height: int) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9500, 60000])
def test_a_bomb_is_refused_by_its_header(side):
    """Above Pillow's limit, of which it only warns up to twice that."""
    refusal(png_header(side, side))


def test_the_limit_is_pillows(monkeypatch):
    content = encoded(Image.new("RGB", (7, 5)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with pytest.warns(Image.DecompressionBombWarning):
        assert "of 7 x 5 pixels, expected 34 or fewer" in refusal(content)
    for limit in (35, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode(content, "x").size == (7, 5)
