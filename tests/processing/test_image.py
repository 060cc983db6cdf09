import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from infimed.contracts import DataFault
from infimed.processing.image import decode_image, image_size, normalise, patchify, resize, to_images, unpatchify
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
        assert resized.is_contiguous()
        assert (normalise(resized) - expected).abs().max() <= 2 / 255 + 1e-6  # 1/255 of the range [0, 1] is 2/255 of [-1, 1]; measured 0


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


def test_a_picture_that_is_a_thread_is_refused():
    with pytest.raises(DataFault, match="image_aspect: 20000 x 1 pixels"):
        to_images([torch.zeros(3, 1, 20_000, dtype=torch.uint8)], Resolution(patch_size=14, image_size=384, visual_grid=27))
