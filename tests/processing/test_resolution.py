"""Pixels, patches and tokens of an image: one formula."""

from __future__ import annotations

import pytest

from infimed.contracts import DataFault, UserError
from infimed.processing.resolution import Resolution

PAPER = {"patch_size": 14, "image_size": 384}
ANY = {"patch_size": 16, "pool": 2, "min_visual_tokens": 64, "max_visual_tokens": 256}


@pytest.mark.parametrize(("grid", "tokens"), [(1, 1), (12, 144), (27, 729)])
def test_the_papers_square_is_27_patches_a_side_averaged_to_a_grid_of_tokens(grid, tokens):
    resolution = Resolution(**PAPER, visual_grid=grid)
    assert resolution.grid(640, 480) == resolution.largest == (27, 27)
    assert resolution.tokens_of(640, 480) == tokens


def test_blocks_that_divide_the_square_are_counted():
    assert Resolution(**PAPER, pool=9).tokens_of(5, 5) == 9
    assert Resolution(patch_size=16, image_size=384, pool=2).tokens_of(5, 5) == 144


@pytest.mark.parametrize(
    "size", [(224, 224), (640, 480), (481, 641), (1955, 1841), (30, 20), (4000, 300), (300, 2900), (512, 512), (511, 513), (33, 33)]
)
def test_any_aspect_is_the_arithmetic_of_transformers_lfm2_vl(size):
    lfm2 = pytest.importorskip("transformers.models.lfm2_vl.image_processing_lfm2_vl")
    width, height = size
    expected = lfm2.Lfm2VlImageProcessor.smart_resize(None, height, width, 2, 64, 256, 16)
    assert Resolution(**ANY).size(width, height) == expected[::-1]


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (1955, 1841), (30, 20), (4000, 300), (90, 2900)])
def test_tokens_of_any_aspect_stay_within_the_limits_and_keep_the_shape(size):
    width, height = size
    resolution = Resolution(**ANY)
    rows, columns = resolution.grid(width, height)
    assert rows % 2 == columns % 2 == 0
    assert 64 <= resolution.tokens((rows, columns)) <= 256
    assert columns / rows == pytest.approx(width / height, rel=0.35)


def test_a_picture_whose_size_could_not_be_read_takes_no_tokens():
    assert Resolution(**PAPER, visual_grid=27).tokens_of(0, 0) == 0


@pytest.mark.parametrize("resolution", [Resolution(**PAPER, visual_grid=27), Resolution(**ANY)])
def test_a_thread_of_pixels_is_refused_and_a_long_strip_is_not(resolution):
    with pytest.raises(DataFault, match="image_aspect: 1 x 20000 pixels: expected sides within 100:1"):
        resolution.refuse(1, 20_000)
    resolution.refuse(2000, 100)
    assert resolution.tokens_of(1, 20_000) == 0  # a hole is planned with no more than its text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**PAPER, "visual_grid": 28}, r"resolution.visual_grid=28: expected 1 to 27; the tower's own grid is 27 x 27 \(384 px"),
        ({**PAPER, "visual_grid": 0}, "resolution.visual_grid=0: expected a positive whole number"),
        ({**PAPER, "pool": 2}, "resolution.pool=2 does not divide: .* expected one of 1, 3, 9, 27, or a visual_grid"),
        ({"patch_size": 14, "image_size": 7}, "less than a patch of 14"),
        ({"patch_size": 16}, "max_visual_tokens is not set"),
        ({**ANY, "visual_grid": 12}, "visual_grid=12 with images of any aspect: expected null"),
        ({**ANY, "max_visual_tokens": 100}, "max_visual_tokens=100 with min_visual_tokens=64: expected at least twice as many"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, message):
    with pytest.raises(UserError, match=message):
        Resolution(**options)


def test_a_stage_says_what_an_image_becomes():
    assert Resolution(**PAPER, visual_grid=12).describe() == (
        "image: square 378 x 378 px, 27 x 27 patches, averaged to 12 x 12 = 144 visual tokens"
    )
    assert "any aspect, at least 64 tokens, at most 512 x 512 px, 32 x 32 patches, blocks of 2 x 2 = 256" in Resolution(**ANY).describe()


def test_between_the_closest_limits_every_ordinary_shape_has_a_grid():
    resolution = Resolution(patch_size=16, pool=2, min_visual_tokens=64, max_visual_tokens=128)
    sizes = [(width, height) for width in range(30, 1200, 37) for height in range(30, 1200, 41)]
    assert all(resolution.fits(*size) for size in sizes if max(size) < 8 * min(size))
