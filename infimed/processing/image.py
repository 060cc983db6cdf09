"""Encoded pictures to what the vision tower reads: decode, turn upright, resize to its square, normalise.

Choices, each ours: 16-bit and float grey is stretched from its own darkest to its own brightest value (12-bit X-rays in 16-bit
files would be black otherwise); transparency is laid over white, the page that figures are drawn for; of an animation the first
picture counts.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from infimed.contracts import DataFault

MAX_PIXELS = 50_000_000
"""Default limit on width x height, looked at before a single pixel is decoded: a 50 kB file can claim gigabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""What Pillow may open. Its other readers stay shut: the one for EPS starts Ghostscript, and data never executes here."""

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


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize to the tower's square with an antialiased bicubic, aspect ratio given up (the paper's plain mode).

    image: uint8[3, H, W]. Returns: uint8[3, size, size], equal to transformers' SigLIP processor on Pillow.
    """
    # Not torch's own antialiased resize, though it is five times faster: both work in two passes with a clamp between, and Pillow 13
    # takes the vertical one first where it is cheaper. On tall pictures with sharp edges the two are up to 22/255 apart.
    if image.shape[1:] == (size, size):
        return image.contiguous()
    is_grey = torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])  # most of radiology: a third of the work
    source = image[0] if is_grey else image.permute(1, 2, 0)
    resized = Image.fromarray(source.contiguous().numpy()).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized))
    return pixels.expand(3, size, size).contiguous() if is_grey else pixels.permute(2, 0, 1).contiguous()


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8[..., 3, H, W] to float32 in [-1, 1]: SigLIP's mean 0.5 and standard deviation 0.5."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def num_visual_tokens(visual_grid: int) -> int:
    """Count the tokens that one image takes among the text: the projector pools its patches to visual_grid x visual_grid."""
    return visual_grid**2


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
        return np.repeat(_stretch(np.asarray(image))[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Map [H, W] of any depth linearly to uint8, its minimum to 0 and its maximum to 255; a constant picture is black."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
