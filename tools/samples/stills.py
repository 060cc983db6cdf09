"""Single files: DICOM test files, fundus, histology and fluorescence pictures, cut into crops of one file each."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

from tools.samples.packages import PACKAGES, member
from tools.samples.picture import SIDE, Picture, encode, seeded, vary

_WINDOWS = ((40, 400), (40, 400), (300, 1500), (-500, 1500))  # Hounsfield centre and width: soft tissue twice, bone, lung

MODALITY = {  # sample field -> how questions call it
    "MR": "MR",
    "CT": "CT",
    "US": "ultrasound",
    "XR": "X-ray",
    "NM": "nuclear medicine",
    "fundus": "fundus photography",
    "histology": "histology",
    "fluorescence": "fluorescence microscopy",
}


@dataclass(frozen=True)
class Still:
    """One file, a row of `stills.tsv`. Body part and modality are those of its header or documentation, never our reading of the picture.

    box: left, top, right, bottom as fractions of the picture; leaves out burned-in text.
    crop: the least share of the box's shorter side that a crop takes.
    organ_known: the header or documentation names the organ in a word that questions use.
    """

    package: str
    path: str
    source: str
    patient: str
    modality: str
    organ: str
    organ_known: bool
    split: str
    domain: str
    count: int
    box: tuple[float, float, float, float]
    crop: float
    licence: str


def read_table(path: Path) -> tuple[Still, ...]:
    """Read the table of files; `-` stands for the licence of the package."""
    stills = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            row["box"] = tuple(float(edge) for edge in row["box"].split(","))
            row |= {"count": int(row["count"]), "crop": float(row["crop"]), "organ_known": row["organ_known"] == "yes"}
            stills.append(Still(**(row | {"licence": PACKAGES[row["package"]].licence if row["licence"] == "-" else row["licence"]})))
    return tuple(stills)


STILLS = read_table(Path(__file__).with_name("stills.tsv"))


def crops(still: Still) -> Iterator[Picture]:
    """Cut `still.count` crops out of one file; training files are also varied in their grey values."""
    frames = _frames(member(still.package, still.path), still.path)
    for number in range(still.count):
        rng = seeded("still", still.patient, number)
        yield _crop(still, rng.choice(frames), rng, number)


def _crop(still: Still, frame: np.ndarray, rng: random.Random, number: int) -> Picture:
    """Cut one crop of a frame (float[H, W] or float[H, W, 3]; CT in Hounsfield units)."""
    augment = still.split == "train"
    if still.modality == "CT":
        centre, width = rng.choice(_WINDOWS)
        frame = np.clip((frame - centre) / width + 0.5, 0, 1)
    height, width = frame.shape[:2]
    left, top, right, bottom = (round(edge * size) for edge, size in zip(still.box, (width, height, width, height), strict=True))
    side = round(min(right - left, bottom - top) * rng.uniform(still.crop, 1.0))
    x, y = rng.randint(left, right - side), rng.randint(top, bottom - side)
    values = frame[y : y + side, x : x + side]
    flip = rng.random() < 0.5 and still.modality != "XR"
    values = values[:, ::-1] if flip else values
    image = Image.fromarray(np.uint8(255 * values)).resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if augment:
        image = Image.fromarray(np.uint8(255 * vary(np.asarray(image) / 255, rng)))
    facts = {"modality": still.modality} | ({"organ": still.organ} if still.organ_known else {})
    spec = PACKAGES[still.package]
    provenance = f"{spec.spec}:{still.path}#crop={number};x={x};y={y};side={side};mirrored={int(flip)};varied={int(augment)}"
    return Picture(
        *(encode(image), "jpg", still.source, still.patient, still.licence, provenance),
        *(still.modality, still.organ, still.domain, facts),
    )


def _frames(data: bytes, path: str) -> list[np.ndarray]:
    """Decode a file to float frames in 0..1 (CT: Hounsfield units); at most twelve, evenly spaced."""
    if not path.endswith(".dcm"):
        with Image.open(BytesIO(data)) as image:
            values = np.asarray(image if image.mode in ("L", "RGB", "I;16") else image.convert("RGB")).astype(np.float32)
        return [values / max(float(np.percentile(values, 99.8)), 1.0) if values.ndim == 2 else values / 255]
    dataset = pydicom.dcmread(BytesIO(data))
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
    if dataset.Modality == "CT":
        return [pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))]
    frames = list(pixels) if int(dataset.get("NumberOfFrames", 1) or 1) > 1 else [pixels]
    return [_stretch(frame.astype(np.float32), dataset) for frame in frames[:: max(1, len(frames) // 12)]]


def _stretch(frame: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Bring a frame to 0..1 between its 0.5th and 99.7th percentile; MONOCHROME1 is turned so that dense is bright."""
    low, high = np.percentile(frame, (0.5, 99.7))
    values = np.clip((frame - low) / max(high - low, 1e-6), 0, 1)
    return 1 - values if dataset.PhotometricInterpretation == "MONOCHROME1" else values
