"""DICOM files to RGB: modality transform, window, polarity, frames, colour. pydicom is imported on first use, not before.

Choices, each ours: without a window of the caller, the file's own VOI table or first window counts, and without those the stretch
from darkest to brightest; padding pixels are black; overlays and pixel aspect ratio are left out.
"""

from __future__ import annotations

import difflib
import io
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from infimed.contracts import DataFault, UserError
from infimed.processing.image import MAX_PIXELS, decode_image

if TYPE_CHECKING:
    from pydicom import Dataset

# Typical CT windows as (centre, width) in Hounsfield units; the middle where a range is printed. Source: Radiopaedia, "Windowing (CT)".
CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40, 80),
    "subdural": (75, 215),
    "stroke": (40, 40),
    "temporal_bone": (600, 2800),
    "neck": (40, 375),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "soft_tissue": (50, 400),
    "liver": (30, 150),
    "spine": (50, 250),
    "bone": (400, 1800),
}

_DEFLATED_UID = b"1.2.840.10008.1.2.1.99"
_MAX_INFLATED_BYTES = 16 * MAX_PIXELS  # a frame at the limit of RGB, 32 bits a sample, and headers
_DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


def is_dicom(data: bytes) -> bool:
    """Say whether `data` is a DICOM file, by the mark after its preamble."""
    return data[128:132] == b"DICM"


def read_image_file(data: bytes, *, window: str | tuple[float, float] | None = None, frame: int = 0) -> torch.Tensor:
    """Decode a DICOM or any other picture file to uint8[3, H, W]; `window` and `frame` speak of DICOM alone. Raises: as the decoders."""
    return decode_dicom(data, window=window, frame=frame) if is_dicom(data) else decode_image(data)


def decode_dicom(data: bytes, *, window: str | tuple[float, float] | None = None, frame: int = 0) -> torch.Tensor:
    """Decode one frame of a DICOM file as a viewer would show it.

    window: a name of CT_WINDOWS, or (centre, width) in the units after the modality transform (CT: Hounsfield).
    frame: from 0. Returns: uint8[3, H, W] RGB.
    Raises: UserError for a bad `window`; DataFault(undecodable_image, image_too_large, no_pixel_data, no_such_frame,
    missing_decoder, not_hounsfield).
    """
    chosen = _resolve_window(window)
    try:
        dataset = _read(data)
        _check(dataset, frame)
        if isinstance(window, str):
            _check_hounsfield(dataset, frame, window)
        pixels = _render(dataset, chosen, frame)
    except DataFault:
        raise
    except Exception as error:  # pydicom converts header values when they are read: any line may meet a malformed one
        raise _undecodable(error) from error
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _resolve_window(window: str | tuple[float, float] | None) -> tuple[float, float] | None:
    """Look up a named window. Raises: UserError."""
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            near = difflib.get_close_matches(window, CT_WINDOWS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"window={window!r}, expected one of {', '.join(CT_WINDOWS)} or (centre, width){hint}")
        return CT_WINDOWS[window]
    if window is not None and not (len(window) == 2 and all(isinstance(v, int | float) for v in window) and window[1] >= 1):
        raise UserError(f"window={window!r}, expected (centre, width) with a width of at least 1")
    return window


def read_dicom(data: bytes) -> Dataset:
    """Parse the file, a deflated one within a limit. Raises: DataFault(undecodable_image, image_too_large)."""
    try:
        return _read(data)
    except DataFault:
        raise
    except Exception as error:  # see decode_dicom
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> DataFault:
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return DataFault("undecodable_image", f"{detail}; expected a complete DICOM image")


def _read(data: bytes) -> Dataset:
    """Parse the file, a deflated one within a limit."""
    import pydicom

    # The group of the file's own facts is never compressed: tag 0002,0000 at byte 132 gives its length, and the syntax is inside.
    start = 144 + int.from_bytes(data[140:144], "little")
    if _DEFLATED_UID in data[144:start]:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(data[start:], _MAX_INFLATED_BYTES)
        if inflater.unconsumed_tail:
            raise DataFault("image_too_large", f"the deflated file holds more than {_MAX_INFLATED_BYTES:,} bytes")
    return pydicom.dcmread(io.BytesIO(data))


def _check(dataset: Dataset, frame: int) -> None:
    """Raise DataFault where there is nothing to decode, too much, or nothing to decode it with."""
    from pydicom.pixels import get_decoder

    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = dataset.get("Modality", "unknown")
        raise DataFault("no_pixel_data", f"a DICOM object of modality {kind} without an image; leave it out of the set")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise DataFault("image_too_large", f"{dataset.Columns} x {dataset.Rows} pixels, the limit is {MAX_PIXELS:,}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 0 <= frame < frames:
        raise DataFault("no_such_frame", f"frame {frame} of a file with {frames}, numbered from 0")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not get_decoder(syntax).is_available:
        raise DataFault("missing_decoder", f"no decoder is installed for {syntax.name}; {_DECODERS}")


def _check_hounsfield(dataset: Dataset, frame: int, window: str) -> None:
    """Raise DataFault unless values come in Hounsfield units, the only ones that the named windows are meant for."""
    modality = dataset.get("Modality", "unknown")
    if modality != "CT" or "RescaleIntercept" not in _grey_attributes(dataset, frame):
        raise DataFault("not_hounsfield", f"window={window!r} is for rescaled CT, the file's modality is {modality}; give (centre, width)")


def _render(dataset: Dataset, window: tuple[float, float] | None, frame: int) -> np.ndarray:
    """Return uint8[H, W, 3]."""
    from pydicom.pixels import apply_color_lut, pixel_array

    stored = pixel_array(dataset, index=frame)  # YBR comes back as RGB
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        return _to_8_bits(apply_color_lut(stored, dataset)[..., :3], bits=dataset.RedPaletteColorLookupTableDescriptor[2])
    if stored.ndim == 3:
        return _to_8_bits(stored, bits=dataset.BitsStored)
    shades = _grey(stored, _grey_attributes(dataset, frame), window)  # [H, W] in 0 ... 1
    if photometric == "MONOCHROME1":  # its lowest value is white
        shades = 1.0 - shades
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        shades[stored == padding] = 0.0
    return np.repeat(np.rint(shades * 255.0).astype(np.uint8)[..., None], 3, axis=2)


def _to_8_bits(pixels: np.ndarray, *, bits: int) -> np.ndarray:
    """Keep the upper eight of `bits` bits."""
    return (pixels >> max(bits - 8, 0)).astype(np.uint8)


def _grey_attributes(dataset: Dataset, frame: int) -> Dataset:
    """Collect what turns stored values into shades; enhanced multi-frame files keep it in groups, shared or a frame's own."""
    groups = [*dataset.get("SharedFunctionalGroupsSequence", []), *dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]]
    merged = dataset.group_dataset(0x0028)
    for group in groups:  # the frame's own come last and win
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name, []):
                merged.update({element.tag: element for element in item})
    merged.file_meta = dataset.file_meta  # the byte order of tables
    return merged


def _grey(stored: np.ndarray, attributes: Dataset, window: tuple[float, float] | None) -> np.ndarray:
    """Map stored values [H, W] to 0 ... 1: modality transform, then the first there is of `window`, VOI table, file's window, stretch."""
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, attributes).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    if window is not None:
        return _apply_window(values, *window)
    if attributes.get("VOILUTSequence"):
        return _apply_table(values, attributes.VOILUTSequence[0], attributes)
    centre, width = (_first(attributes.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width > 0:
        return _apply_window(values, centre, width, function=attributes.get("VOILUTFunction") or "LINEAR")
    shown = values[stored != attributes.PixelPaddingValue] if "PixelPaddingValue" in attributes else values
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 1.0)
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def _first(value: object) -> float | None:
    """Take the first of a window's alternatives; None for an empty element."""
    from pydicom.multival import MultiValue

    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return None if value in (None, "") else float(str(value))


def _apply_window(values: np.ndarray, centre: float, width: float, *, function: str = "LINEAR") -> np.ndarray:
    """Map values to 0 ... 1 by a window. Source: DICOM PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (LINEAR_EXACT, SIGMOID)."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    if function == "LINEAR" and width > 1:  # the standard forbids less; such files mean LINEAR_EXACT
        centre, width = centre - 0.5, width - 1.0
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ValueError(f"VOI LUT function {function}, expected LINEAR, LINEAR_EXACT or SIGMOID")
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _apply_table(values: np.ndarray, item: Dataset, attributes: Dataset) -> np.ndarray:
    """Map values to 0 ... 1 by a VOI lookup table. Source: DICOM PS3.3 C.11.2.1.1."""
    entries, first, bits = item.LUTDescriptor
    entries = entries or 2**16
    table = item.LUTData
    if isinstance(table, bytes):
        endian = "<" if attributes.file_meta.TransferSyntaxUID.is_little_endian else ">"
        table = np.frombuffer(table, dtype=f"{endian}u2" if len(table) >= 2 * entries else "u1")
    index = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)
    return np.clip(np.asarray(table, dtype=np.float64)[index] / (2**bits - 1), 0.0, 1.0)
