import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from infimed.contracts import DataFault
from infimed.processing.image import (
    BICUBIC,
    BILINEAR,
    cut,
    decode_image,
    fit,
    image_size,
    normalise,
    patchify,
    resize,
    to_images,
    unpatchify,
)
from infimed.processing.resolution import Resolution


def _noise(height: int, width: int, *, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _hwc(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def _claimed_png(width: int, height: int) -> bytes:
    """Write a PNG header that claims any size, with hardly a pixel behind it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_lossless_formats_decode_exactly(format):
    pixels = _noise(20, 31)
    data = _file(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(_hwc(decode_image(data)), pixels)
    assert image_size(data) == (31, 20)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (101, 64)])
def test_jpeg_is_bit_identical_to_pillow(mode, subsampling, size):
    for progressive in (False, True):
        data = _file(Image.fromarray(_noise(*size)).convert(mode), "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
        assert np.array_equal(_hwc(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_takes_the_fast_path(monkeypatch):
    monkeypatch.setattr("infimed.processing.image._decode_with_pillow", lambda _: pytest.fail("slow path"))
    decode_image(_file(Image.fromarray(_noise(16, 16)), "JPEG"))


def test_a_jpeg_that_only_the_fast_decoder_refuses_still_decodes(monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("extraneous bytes")

    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    data = _file(Image.fromarray(_noise(16, 24)), "JPEG")
    assert np.array_equal(_hwc(decode_image(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_turns_as_pillow_does(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(Image.fromarray(_noise(20, 31)), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(_hwc(decode_image(data)), upright)
    assert image_size(data) == (upright.shape[1], upright.shape[0])
    if format != "TIFF":  # Pillow turns those on its own, and only to the eight known ways
        assert upright.shape[:2] == ((31, 20) if 5 <= orientation <= 8 else (20, 31))


def test_orientation_6_moves_the_top_left_to_the_top_right():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _hwc(decode_image(_file(Image.fromarray(pixels), "PNG", exif=exif)))
    assert turned.shape == (3, 2, 3)
    assert turned[..., 0].tolist() == [[0, 255], [0, 0], [0, 0]]


def test_grey_and_bilevel_become_three_equal_channels():
    grey = _noise(8, 9, channels=1)[..., 0]
    for image, expected in ((Image.fromarray(grey), grey), (Image.fromarray(grey > 127), (grey > 127) * 255)):
        decoded = decode_image(_file(image, "PNG"))
        assert all(np.array_equal(channel.numpy(), expected) for channel in decoded)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_stretched_from_its_darkest_to_its_brightest(format):
    values = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    decoded = decode_image(_file(Image.fromarray(values), format))
    assert all(channel.tolist() == [[0, 64], [128, 255]] for channel in decoded)


@pytest.mark.parametrize(("low", "high"), [(0, 2**16), (900, 5000), (65_000, 2**16)])
def test_the_table_for_16_bits_gives_what_the_formula_gives(low, high):
    values = np.random.default_rng(low).integers(low, high, (50, 60), dtype=np.uint16)
    expected = np.rint((values.astype(float) - values.min()) * (255 / (float(values.max()) - values.min())))
    assert all(np.array_equal(channel.numpy(), expected) for channel in decode_image(_file(Image.fromarray(values), "PNG")))


def test_a_constant_16_bit_picture_is_black():
    assert not decode_image(_file(Image.fromarray(np.full((4, 4), 4000, np.uint16)), "PNG")).any()


def test_float_tiff_is_stretched_and_refused_when_not_finite():
    values = np.array([[-1.0, 0.0, 1.0]], np.float32)
    assert decode_image(_file(Image.fromarray(values), "TIFF"))[0].tolist() == [[0, 128, 255]]
    values[0, 1] = np.nan
    with pytest.raises(DataFault, match=r"undecodable_image.*not finite"):
        decode_image(_file(Image.fromarray(values), "TIFF"))


def test_a_palette_gives_its_colours_and_its_transparent_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert _hwc(decode_image(_file(image, "PNG"))).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert _hwc(decode_image(_file(image, "PNG", transparency=0))).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize(("mode", "pixel"), [("RGBA", (0, 0, 0, 127)), ("LA", (0, 127))])
def test_alpha_is_laid_over_white(mode, pixel):
    assert _hwc(decode_image(_file(Image.new(mode, (1, 1), pixel), "PNG"))).tolist() == [[[128, 128, 128]]]


def test_the_first_picture_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    data = _file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _hwc(decode_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(8000, 7000), (60_000, 60_000)])
def test_an_oversized_picture_is_refused_before_its_pixels_are_read(width, height):
    with pytest.raises(DataFault, match="image_too_large"):  # reading the pixels would say undecodable_image
        decode_image(_claimed_png(width, height))


def test_the_pixel_limit_is_exact():
    data = _file(Image.fromarray(_noise(10, 10)), "PNG")
    decode_image(data, max_pixels=100)
    with pytest.raises(DataFault, match="image_too_large: 10 x 10 pixels, the limit is 99"):
        decode_image(data, max_pixels=99)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_a_truncated_file_is_undecodable(format):
    data = _file(Image.fromarray(_noise(64, 64)), format)
    with pytest.raises(DataFault) as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.reason == "undecodable_image"


@pytest.mark.parametrize("data", [b"", b"not an image", _claimed_png(4, 4)])
def test_bytes_that_hold_no_picture_are_undecodable(data):
    with pytest.raises(DataFault) as caught:
        decode_image(data)
    assert caught.value.reason == "undecodable_image"


def test_formats_that_run_programs_stay_shut():
    with pytest.raises(DataFault, match="begin with b'%!PS"):
        decode_image(_file(Image.fromarray(_noise(4, 4)), "EPS"))


def test_image_size_reads_the_header_alone():
    data = _file(Image.fromarray(_noise(300, 200)), "PNG")
    assert image_size(data[:100]) == (200, 300)
    with pytest.raises(DataFault, match="undecodable_image"):
        image_size(b"no header")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(500, 400), (37, 900), (900, 37), (20, 30), (1, 50), (384, 384), (700, 384)])
def test_resize_and_normalise_equal_the_siglip_processor(shape, channels):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = np.repeat(_noise(*shape, channels=channels), 3 // channels, axis=2)  # noise is the worst case: edges everywhere
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for size in (384, 168):
        processor = SiglipImageProcessorPil(size={"height": size, "width": size})
        expected = torch.from_numpy(processor(Image.fromarray(pixels))["pixel_values"][0])
        resized = resize(image, size, size)
        assert resized.shape == (3, size, size)
        assert resized.dtype == torch.uint8
        assert resized.permute(1, 2, 0).is_contiguous()
        assert (normalise(resized) - expected).abs().max() < 1e-6


def _patterns(height: int, width: int) -> dict[str, np.ndarray]:
    """Draw what resizing finds hard: uint8[height, width, 3] with edges everywhere, at random or in step, and what it usually meets."""
    y, x = np.mgrid[:height, :width]
    draw = np.random.default_rng(height * 10_000 + width)
    slopes = np.stack([128 + 60 * np.sin(x / (37 + 9 * i)) + 50 * np.cos(y / (29 + 5 * i)) for i in range(3)], axis=-1)
    return {
        "noise": draw.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "black and white noise": (draw.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8),
        "checkerboard": np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2),
        "oblong checks": np.repeat(((x // 3 + y // 2) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2),
        "stripes": np.broadcast_to(draw.integers(0, 256, (1, width, 3), dtype=np.uint8), (height, width, 3)).copy(),
        "photo": np.clip(slopes + draw.normal(0, 8, slopes.shape), 0, 255).astype(np.uint8),
    }


# Whole and odd ratios, pictures of one line, one pass alone, rows first, columns first: the last two are on either side of Pillow's rule.
_SHRINKING = [
    *[((448, 448), (378, 378)), ((520, 600), (384, 384)), ((901, 90), (84, 84)), ((700, 400), (378, 378)), ((400, 700), (378, 378))],
    *[((900, 384), (384, 384)), ((384, 900), (384, 384)), ((333, 1), (20, 1)), ((1, 333), (1, 20)), ((1013, 417), (462, 196))],
    *[((700, 539), (378, 378)), ((701, 539), (378, 378))],
]


_GROWING = [((224, 224), (378, 378)), ((100, 300), (378, 378)), ((300, 100), (196, 462)), ((28, 28), (384, 384)), ((300, 20), (301, 420))]


@pytest.mark.parametrize(
    ("how", "shapes", "some", "twice"),
    [  # measured: 0.021 and 5.1e-6, 0.0019 and 0, 0.0052 and 2.5e-5, 0.0080 and 2.6e-7
        (BICUBIC, _SHRINKING, 0.03, 1e-5),
        (BILINEAR, _SHRINKING, 0.003, 0.0),
        (BICUBIC, _GROWING, 0.008, 5e-5),
        (BILINEAR, _GROWING, 0.012, 1e-6),
    ],
)
def test_the_fast_resize_is_pillows_but_for_few_values_and_those_by_little(how, shapes, some, twice):
    off, values = np.zeros(256, np.int64), 0
    for shape, (height, width) in shapes:
        for name, pixels in _patterns(*shape).items():
            fast = _hwc(resize(torch.from_numpy(pixels).permute(2, 0, 1), height, width, how, fast=True)).astype(int)
            apart = np.abs(fast - np.asarray(Image.fromarray(pixels).resize((width, height), how)))
            assert apart.max() <= 2, (name, shape)  # rows always first: 30
            off += np.bincount(apart.ravel(), minlength=256)
            values += apart.size
    assert off[1:].sum() / values <= some
    assert off[2] / values <= twice


def test_the_fast_resize_leaves_machines_without_avx_to_pillow(monkeypatch):
    image = torch.from_numpy(_noise(40, 60)).permute(2, 0, 1)
    monkeypatch.setattr("infimed.processing.image._resize_with_torch", lambda *_: pytest.fail("torch"))
    monkeypatch.setattr("infimed.processing.image._TORCH_IS_FASTER", False)
    assert torch.equal(resize(image, 20, 30, fast=True), resize(image, 20, 30))


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="Pillow is as fast on this machine")
def test_only_the_fast_resize_leaves_pillow(monkeypatch):
    image = torch.from_numpy(_noise(40, 60)).permute(2, 0, 1)
    exact = resize(image, 20, 30)
    monkeypatch.setattr("infimed.processing.image._resize_with_torch", lambda *_: pytest.fail("torch"))
    assert torch.equal(resize(image, 20, 30), exact)
    monkeypatch.undo()
    monkeypatch.setattr("infimed.processing.image._resize_with_pillow", lambda *_: pytest.fail("Pillow"))
    grey = image[:1].expand(3, -1, -1)
    for picture in (image, image.contiguous(), image.transpose(1, 2), grey):  # any memory layout
        resized = resize(picture, 20, 30, fast=True)
        assert torch.equal(resized, resize(picture.permute(1, 2, 0).contiguous().permute(2, 0, 1), 20, 30, fast=True))
    assert torch.equal(resize(grey, 20, 30, fast=True)[:1].expand(3, -1, -1), resize(grey, 20, 30, fast=True))
    assert resize(image, 20, 30, fast=True).permute(1, 2, 0).is_contiguous()  # cutting it is one copy then
    assert resize(image, 40, 60, fast=True) is image


@pytest.mark.parametrize("place", [(0, 0), (33, 7), (99, 59)])
def test_one_pixel_in_colour_makes_a_picture_one_in_colour(place):
    pixels = np.repeat(_noise(100, 60, channels=1), 3, axis=2)
    pixels[place] = (200, 30, 30)
    resized = resize(torch.from_numpy(pixels).permute(2, 0, 1), 50, 40)
    assert np.array_equal(_hwc(resized), np.asarray(Image.fromarray(pixels).resize((40, 50), BICUBIC)))


def test_normalise_maps_every_byte_as_the_siglip_processor_does():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    expected = SiglipImageProcessorPil(do_resize=False)(Image.fromarray(_hwc(pixels)))["pixel_values"][0]
    normalised = normalise(pixels)
    assert normalised.dtype == torch.float32
    assert (normalised.min(), normalised.max()) == (-1.0, 1.0)
    assert torch.allclose(normalised, torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_normalise_takes_any_leading_shape():
    assert normalise(torch.zeros(2, 5, 3, 4, 4, dtype=torch.uint8)).shape == (2, 5, 3, 4, 4)


def test_patches_are_cut_row_by_row_and_put_together_again():
    image = torch.from_numpy(_noise(13, 22)).permute(2, 0, 1)  # 3 x 5 patches of 4, an edge left over
    patches = patchify(image, 4)
    assert patches.shape == (15, 48)
    assert torch.equal(patches[7].reshape(4, 4, 3), image[:, 4:8, 8:12].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (3, 5)), image[:, :12, :20])


@pytest.mark.parametrize("shape", [(37, 90), (256, 256), (300, 1100), (20, 30)])
def test_patches_of_any_aspect_equal_those_of_the_siglip2_processor(shape):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    pixels = _noise(*shape)
    resolution = Resolution(patch_size=16, pool=2, min_visual_tokens=4, max_visual_tokens=64)
    images = to_images([torch.from_numpy(pixels).permute(2, 0, 1)], resolution)
    height, width = resolution.size(shape[1], shape[0])
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)  # its own choice of size is another one
    processor = Siglip2ImageProcessorPil(do_resize=False, max_num_patches=256)
    expected = processor(resized, max_num_patches=images.patches.shape[0])
    assert images.grids == (tuple(map(int, expected["spatial_shapes"][0])),)
    assert (normalise(images.patches) - torch.as_tensor(expected["pixel_values"][0])).abs().max() < 1e-6


@pytest.mark.parametrize("layout", ["interleaved", "planar", "turned"])
def test_cut_lays_the_patches_of_all_pictures_end_to_end(layout):
    first, second = (torch.from_numpy(_noise(height, width)).permute(2, 0, 1) for height, width in ((13, 22), (8, 9)))
    if layout == "planar":
        first, second = first.contiguous(), second.contiguous()
    if layout == "turned":
        first, second = first.transpose(1, 2).flip(1), second.transpose(1, 2).flip(1)
    images = cut([first, second], 4)
    assert images.grids == (((3, 5), (2, 2)) if layout != "turned" else ((5, 3), (2, 2)))
    assert torch.equal(images.patches, torch.cat([patchify(first, 4), patchify(second, 4)]))
    rows, columns = images.grids[0]
    assert torch.equal(unpatchify(images.patches[:15], images.grids[0]), first[:, : rows * 4, : columns * 4])
    assert cut([], 4).patches.shape == (0, 48)


@pytest.mark.parametrize(("width", "height"), [(90, 37), (500, 1), (640, 480), (20, 30)])
@pytest.mark.parametrize("square", [True, False])
def test_fit_makes_the_pixels_and_patches_that_were_planned(width, height, square):
    kind = {"image_size": 56, "visual_grid": 2} if square else {"pool": 2, "min_visual_tokens": 4, "max_visual_tokens": 64}
    resolution = Resolution(patch_size=14, **kind)
    picture = torch.from_numpy(_noise(height, width)).permute(2, 0, 1)
    if not resolution.fits(width, height):
        pytest.skip("refused, see below")
    size, how = resolution.size(width, height), BICUBIC if square else BILINEAR
    for fast in (False, True):
        fitted = fit(picture, resolution, fast=fast)
        assert torch.equal(fitted, resize(picture, *size, how, fast=fast))
        assert fitted.shape == (3, *size)
        assert cut([fitted], 14).grids == (resolution.grid(width, height),)
    assert torch.equal(cut([fit(picture, resolution)], 14).patches, to_images([picture], resolution).patches)


def test_a_picture_that_is_a_thread_is_refused():
    with pytest.raises(DataFault, match="image_aspect: 20000 x 1 pixels"):
        to_images([torch.zeros(3, 1, 20_000, dtype=torch.uint8)], Resolution(patch_size=14, image_size=384, visual_grid=27))
