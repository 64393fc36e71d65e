"""ADM's centre crop, against a second writing of it and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pathline import InputError
from pathline.data.crop import CROP, centre_crop


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on top, so that another filter or another place shows."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 190, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    noise = generator.integers(0, 25, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def steps(image: Image.Image, size: int) -> np.ndarray:
    """The same by arrays and a loop over the sides, rounding by numpy's rule of halves to even."""
    sides = np.array(image.size)
    while sides.min() // 2 >= size:
        sides = sides // 2
        image = image.resize(tuple(int(side) for side in sides), Image.BOX)
    sides = np.rint(sides * (size / sides.min())).astype(int)
    pixels = np.asarray(image.resize(tuple(int(side) for side in sides), Image.BICUBIC))
    first = (np.array(pixels.shape[:2]) - size) // 2
    return pixels[first[0] : first[0] + size, first[1] : first[1] + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (131, 97, 23),  # odd sides, halved twice
        (97, 131, 23),
        (300, 41, 20),  # a banner
        (41, 300, 20),
        (13, 9, 31),  # smaller than the square
        (64, 64, 16),  # halved to the square itself
        (62, 95, 16),  # one pixel short of being halved once more
        (63, 127, 32),  # short of 2·S by one
        (20, 21, 10),  # halved to 10 x 10, the odd row averaged in
        (4, 6, 3),  # 4.5 rounds to 4
        (16, 24, 3),  # the cut leaves an odd rest
        (7, 5, 1),
    ],
)
def test_it_is_the_published_procedure(width, height, size):
    image = picture(width, height)
    found = centre_crop(image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert np.array_equal(found, steps(image, size))


@pytest.mark.parametrize(("height", "scaled"), [(6, 4), (10, 8), (14, 10)])
def test_halves_round_to_even(height, scaled):
    """4 columns to 3 scale by 3/4: 6, 10 and 14 rows become 4.5, 7.5 and 10.5."""
    image = picture(4, height)
    expected = np.asarray(image.resize((3, scaled), Image.BICUBIC))
    first = (scaled - 3) // 2
    assert np.array_equal(centre_crop(image, 3), expected[first : first + 3])


@pytest.mark.parametrize("size", [5, 16, 37])
def test_a_square_of_that_size_is_left_as_it_is(size):
    image = picture(size, size)
    assert np.array_equal(centre_crop(image, size), np.asarray(image))


def test_powers_are_averages_of_boxes():
    """4·S to S are two halvings: means of pairs of columns, then of rows, each rounded up at one half."""
    values = np.random.default_rng(1).integers(0, 256, (12, 12, 3))
    expected = values
    for _ in range(2):
        columns = (expected[:, 0::2] + expected[:, 1::2] + 1) // 2
        expected = (columns[0::2] + columns[1::2] + 1) // 2
    assert np.array_equal(centre_crop(Image.fromarray(values.astype(np.uint8)), 3), expected)


def test_the_middle_is_kept():
    """An image of S rows is cut alone: columns (W - S) // 2 on."""
    image = picture(18, 11)
    assert np.array_equal(centre_crop(image, 11), np.asarray(image)[:, 3:14])
    assert np.array_equal(
        centre_crop(image.transpose(Image.Transpose.TRANSPOSE), 11), np.asarray(image).swapaxes(0, 1)[3:14]
    )


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = picture(19, 13).convert(mode)
    assert np.array_equal(centre_crop(image, 5), steps(image.convert("RGB"), 5))


def test_what_is_refused(monkeypatch):
    with pytest.raises(InputError, match="got a size of 0 pixels"):
        centre_crop(picture(3, 2), 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(InputError, match="got an image of 70 x 1 pixels, which scales to 4900 x 70"):
        centre_crop(picture(70, 1), 70)
    assert centre_crop(picture(70, 1), 8).shape == (8, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert centre_crop(picture(70, 1), 70).shape == (70, 70, 3)


def test_its_name():
    assert CROP == "adm-centre-crop"
