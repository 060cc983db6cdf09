"""Encoded pictures to what the vision tower reads: decode, turn upright, resize, cut into patches, normalise.

Choices, each ours: 16-bit and float grey is stretched from its own darkest to its own brightest value (12-bit X-rays in 16-bit
files would be black otherwise); transparency is laid over white, the page that figures are drawn for; of an animation the first
picture counts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from infimed.contracts import DataFault, Images
from infimed.processing.resolution import Resolution

MAX_PIXELS = 50_000_000
"""Default limit on width x height, looked at before a single pixel is decoded: a 50 kB file can claim gigabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""What Pillow may open. Its other readers stay shut: the one for EPS starts Ghostscript, and data never executes here."""

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

_TORCH_MODES = {BICUBIC: "bicubic", BILINEAR: "bilinear"}
_TORCH_IS_FASTER = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere its kernel is slower, and wrong on thin pictures
_PILLOW_MINDS_HEIGHT = int(PIL.__version__.split(".")[0]) >= 13

_ORIENTATION_TAG = 0x0112
_FLIPPED_AXES = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}  # of H, W; after they change places for 5 to 8


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a picture file, upright by its EXIF orientation.

    Returns: uint8[3, H, W] RGB; a view of interleaved memory.
    Raises: DataFault(undecodable_image, image_too_large).
    """
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise DataFault("image_too_large", f"{image.width} x {image.height} pixels, the limit is {max_pixels:,}")
    try:
        orientation = _orientation(image)
        pixels = _decode_jpeg(data, image)
        if pixels is None:
            pixels = _decode_with_pillow(image)
    except Exception as error:  # Pillow's readers raise errors of a dozen kinds on broken bytes
        raise _undecodable(error) from error
    return _upright(torch.from_numpy(pixels), orientation).permute(2, 0, 1)


def image_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) of the upright picture from the header alone. Raises: DataFault(undecodable_image, image_too_large)."""
    image = _open(data)
    try:
        is_turned = _orientation(image) >= 5
    except Exception as error:  # see decode_image
        raise _undecodable(error) from error
    return (image.height, image.width) if is_turned else (image.width, image.height)


def to_images(pictures: Sequence[torch.Tensor], resolution: Resolution) -> Images:
    """Resize pictures uint8[3, H, W] as stock processors do, and cut them into patches. Raises: DataFault(image_aspect)."""
    return cut([fit(picture, resolution) for picture in pictures], resolution.patch_size)


def fit(picture: torch.Tensor, resolution: Resolution, *, fast: bool = False) -> torch.Tensor:
    """Resize a picture uint8[3, H, W] to the pixels that the tower reads; `fast` as in `resize`. Raises: DataFault(image_aspect)."""
    height, width = picture.shape[1:]
    resolution.refuse(width, height)
    # SigLIP's processor resizes squares with a bicubic; that of `lfm2_vl`, in which any-aspect models are exported, bilinearly
    how = BICUBIC if resolution.image_size is not None else BILINEAR
    return resize(picture, *resolution.size(width, height), how, fast=fast)


def cut(pictures: Sequence[torch.Tensor], patch_size: int) -> Images:
    """Lay the patches of pictures uint8[3, H, W] end to end, see `patchify`."""
    grids = [(picture.shape[1] // patch_size, picture.shape[2] // patch_size) for picture in pictures]
    patches = torch.empty((sum(rows * columns for rows, columns in grids), patch_size**2 * 3), dtype=torch.uint8)
    parts = patches.split([rows * columns for rows, columns in grids])
    for picture, part in zip(pictures, parts, strict=True):  # each pixel is copied once, to where it stays
        blocks = _blocks(picture, patch_size)
        part.view(blocks.shape).copy_(blocks)
    return Images.of(patches, grids)


def resize(image: torch.Tensor, height: int, width: int, how: Image.Resampling = BICUBIC, *, fast: bool = False) -> torch.Tensor:
    """Resize with antialiasing, as transformers' SigLIP processor does on Pillow.

    image: uint8[3, H, W], best as a view of interleaved memory, which is what comes back too.
    fast: for the loader. Where torch is several times faster it does the work, and rounds a few values in a thousand the other way than
        Pillow: by 1/255, of photographs and noise a few in a million by 2/255 (`benchmarks/decode.py --apart`).
    Returns: uint8[3, height, width].
    """
    if image.shape[1:] == (height, width):
        return image
    if fast and _TORCH_IS_FASTER:
        return _resize_with_torch(image, height, width, how)
    return _resize_with_pillow(image, height, width, how)


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut [3, H, W] into patches [rows * columns, patch_size ** 2 * 3], row by row; what is left at the edges falls away.

    Inside a patch the order is (row, column, channel), that of SigLIP2's processor.
    """
    return _blocks(image, patch_size).reshape(-1, patch_size**2 * 3)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Put the patches of one image together again: uint8[3, H, W]."""
    rows, columns = grid
    side = math.isqrt(patches.shape[1] // 3)
    return patches.reshape(rows, columns, side, side, 3).permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 of any shape to float32 in [-1, 1]: SigLIP's mean 0.5 and standard deviation 0.5."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def _blocks(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """View [3, H, W] as [rows, columns, patch_size, patch_size * 3]: a copy only where the memory is not interleaved."""
    rows, columns = (side // patch_size for side in image.shape[1:])
    whole_HWC = image[:, : rows * patch_size, : columns * patch_size].permute(1, 2, 0)
    return whole_HWC.reshape(rows, patch_size, columns, patch_size * 3).transpose(1, 2)


def _resize_with_pillow(image: torch.Tensor, height: int, width: int, how: Image.Resampling) -> torch.Tensor:
    source = image[0] if _is_grey(image) else image.permute(1, 2, 0)  # most of radiology: a third of the work
    resized = np.array(Image.fromarray(source.contiguous().numpy()).resize((width, height), how))
    return torch.from_numpy(np.stack([resized] * 3, axis=-1) if resized.ndim == 2 else resized).permute(2, 0, 1)


def _is_grey(image: torch.Tensor) -> bool:
    few = image[:, :: max(1, image.shape[1] // 8)]  # enough to know most of what is in colour
    return all(torch.equal(part[0], part[1]) and torch.equal(part[0], part[2]) for part in (few, image))


# Both work in two passes and round to 8 bits after each, so that on sharp edges the order of the passes shows: up to 30/255. Torch starts
# along the rows, as Pillow did before 13. Pillow 13 starts down the columns where the height loses more than twice what the width does.
# Within a pass both use the same windows and weights; torch rounds weights to 16 bits, Pillow to 22. Grey needs no path of its own:
# torch computes all channels of a pixel as one word.
# Source: Pillow `src/libImaging/Resample.c` (ImagingResampleInner), torch `aten/src/ATen/native/cpu/UpSampleKernelAVXAntialias.h`.
def _resize_with_torch(image: torch.Tensor, height: int, width: int, how: Image.Resampling) -> torch.Tensor:
    lost_height, lost_width = image.shape[1] - height, image.shape[2] - width
    columns_first = _PILLOW_MINDS_HEIGHT and lost_height > max(0, 2 * lost_width)
    batch_NCHW = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # the batch's stride has to say interleaved too, for the result to be
    for size in ((height, image.shape[2]), (height, width)) if columns_first else ((height, width),):
        batch_NCHW = F.interpolate(batch_NCHW, size, mode=_TORCH_MODES[how], antialias=True)
    return batch_NCHW[0]


def _open(data: bytes) -> Image.Image:
    """Read the header. Raises: DataFault."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataFault("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        detail = f"{len(data)} bytes that begin with {data[:8]!r}, expected one of {', '.join(FORMATS)}"
        raise DataFault("undecodable_image", detail) from error
    except Exception as error:  # see decode_image
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> DataFault:
    return DataFault("undecodable_image", f"{type(error).__name__}: {error}; expected a complete picture file")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 to 8, from what precedes the pixels; 1 for a value outside."""
    if image.format == "TIFF":  # Pillow turns these itself, and says so in their size
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif would decode all pixels in search of a late chunk
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels_HWC: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn and mirror by the EXIF orientation."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(0, 1)
    axes = _FLIPPED_AXES.get(orientation)
    return pixels_HWC.flip(axes) if axes else pixels_HWC


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a grey or RGB JPEG to uint8[H, W, 3] faster than Pillow and bit for bit equal; None leaves it to Pillow."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # it is stricter than Pillow, which then decides whether the file is good enough
        return None


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    """Decode any mode to uint8[H, W, 3]."""
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.stack([_stretch(np.asarray(image))] * 3, axis=-1)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Map [H, W] of any depth linearly to uint8, its minimum to 0 and its maximum to 255; a constant picture is black."""
    if values.dtype == np.uint16:  # a table of the few values there are: three times as fast on a large X-ray
        low, high = int(values.min()), int(values.max())
        return _shades(np.arange(low, high + 1)).take(values - values.min())
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    return _shades(values)


def _shades(values: np.ndarray) -> np.ndarray:
    """Map the range of values to 0 ... 255."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
