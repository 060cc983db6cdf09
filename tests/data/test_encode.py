"""A sample as numbers: whole, in pieces, and changed at random."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from infimed.contracts import IGNORE_INDEX, DataFault, Encoded, Message, Sample
from infimed.data.encode import Encoder, image_runs
from infimed.processing.augment import Jitter
from infimed.processing.chat import render
from infimed.processing.image import cut, decode_image, fit, to_images
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = "which plane is shown in the picture axial coronal user assistant system"
TOKENIZER = Tokenizer(train_tokenizer([WORDS] * 3, vocab_size=340), fingerprint="")
SQUARE = Resolution(patch_size=4, image_size=16, visual_grid=3)
ANY = Resolution(patch_size=4, pool=2, min_visual_tokens=4, max_visual_tokens=16)
JITTER = Jitter(brightness=0.3, contrast=0.3, shift=0.2)


def _file(number: int, *, width: int = 40, height: int = 30, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


IMAGES = (_file(0), _file(1, width=30, height=50), _file(2, format="JPEG"))
SAMPLE = Sample(
    key="two turns",
    messages=(
        Message("user", "<image>which plane is shown in <image>"),
        Message("assistant", "axial axial axial axial axial axial"),
        Message("user", "coronal coronal coronal<image>in the picture"),
        Message("assistant", "coronal plane"),
    ),
    source="drawn",
)


def _length(resolution: Resolution = SQUARE, sample: Sample = SAMPLE) -> int:
    grids = to_images([decode_image(image) for image in IMAGES], resolution).grids
    return len(render(sample.messages, TOKENIZER, visual_tokens=[resolution.tokens(grid) for grid in grids]).input_ids)


def _encode(encoder: Encoder | None = None, *, images: tuple[bytes, ...] = IMAGES, **options: object) -> Encoded:
    encoder = encoder or Encoder(TOKENIZER, SQUARE)
    return encoder(SAMPLE, images, **{"expected_tokens": _length(encoder.resolution), **options})


def _spans(runs: tuple[tuple[int, int], ...], length: int, most: int) -> list[tuple[int, int]]:
    """Cut a sample from the left into pieces of at most `most` tokens outside images, each with a token of the last as context."""
    spans, start = [], 0
    while start < length:
        stop = min(start + most, length)
        stop = next((first for first, end in runs if first < stop < end), stop)
        spans.append((start, stop))
        if stop == length:
            return spans
        start = stop if any(end == stop for _, end in runs) else stop - 1
    raise AssertionError


def test_a_sample_is_what_the_renderer_and_the_loaders_resize_make_of_it():
    for resolution in (SQUARE, ANY):
        seen = cut([fit(decode_image(image), resolution, fast=True) for image in IMAGES], 4)
        rendered = render(SAMPLE.messages, TOKENIZER, visual_tokens=[resolution.tokens(grid) for grid in seen.grids])
        encoded = _encode(Encoder(TOKENIZER, resolution))
        assert (encoded.input_ids.tolist(), encoded.labels.tolist()) == (rendered.input_ids, rendered.labels)
        assert encoded.input_ids.dtype == encoded.labels.dtype == torch.int64
        assert (encoded.key, encoded.source, encoded.images.grids) == ("two turns", "drawn", seen.grids)
        assert torch.equal(encoded.images.patches, seen.patches)


def test_another_length_than_planned_is_a_length_drift_of_the_whole_sample():
    for span in (None, (0, 5)):
        with pytest.raises(DataFault, match=rf"length_drift: two turns: {_length()} tokens, planned with 41"):
            _encode(expected_tokens=41, span=span)


@pytest.mark.parametrize("resolution", [SQUARE, ANY])
def test_runs_are_the_images_with_their_start_and_end_tokens(resolution):
    encoded = _encode(Encoder(TOKENIZER, resolution))
    runs = image_runs(encoded.input_ids.tolist(), TOKENIZER)
    assert [end - first - 2 for first, end in runs] == [resolution.tokens(grid) for grid in encoded.images.grids]
    inside = {position for first, end in runs for position in range(first + 1, end - 1)}
    assert inside == set((encoded.input_ids == TOKENIZER.image_id).nonzero().flatten().tolist())
    for first, end in runs:
        assert (encoded.input_ids[first], encoded.input_ids[end - 1]) == (TOKENIZER.image_start_id, TOKENIZER.image_end_id)
    assert image_runs([5, 6], TOKENIZER) == ()


@pytest.mark.parametrize("most", [20, 24, 33, 1000])
@pytest.mark.parametrize("resolution", [SQUARE, ANY])
def test_the_pieces_of_a_sample_are_the_sample(resolution, most):
    encoder = Encoder(TOKENIZER, resolution, augment=JITTER)
    whole = _encode(encoder, seed=3)
    length = len(whole.input_ids)
    spans = _spans(image_runs(whole.input_ids, TOKENIZER), length, most)
    pieces = [_encode(encoder, seed=3, span=span) for span in spans]
    for (start, stop), piece in zip(spans, pieces, strict=True):
        assert torch.equal(piece.input_ids, whole.input_ids[start:stop])
        assert piece.labels[0] == IGNORE_INDEX
        assert torch.equal(piece.labels[1:], whole.labels[start + 1 : stop])
        assert int((piece.input_ids == TOKENIZER.image_id).sum()) == sum(resolution.tokens(grid) for grid in piece.images.grids)
        assert (piece.key, piece.source) == ("two turns", "drawn")
    assert torch.equal(torch.cat([piece.images.patches for piece in pieces]), whole.images.patches)  # each image once, changed alike
    learned = sum(int((piece.labels != IGNORE_INDEX).sum()) for piece in pieces)
    assert learned == int((whole.labels != IGNORE_INDEX).sum())  # and so is each token that is learned from
    assert len(spans) == 1 or any(start < last for (_, last), (start, _) in pairwise(spans))


def test_images_outside_a_span_are_not_decoded():
    (_, first_end), (_, second_end), (third, third_end) = image_runs(_encode().input_ids, TOKENIZER)
    cut_off = tuple(data[: len(data) // 2] for data in IMAGES)  # the header says their size, the pixels are gone
    kept = _encode(images=(*IMAGES[:2], cut_off[2]), span=(0, second_end + 4))
    assert torch.equal(kept.images.patches, _encode().images.patches[:32])
    assert len(_encode(images=cut_off, span=(second_end, third)).images) == 0
    assert torch.equal(_encode(images=(*cut_off[:2], IMAGES[2]), span=(third, third_end)).images.patches, _encode().images.patches[32:])
    for images, span in ((cut_off, (0, first_end)), (cut_off, None)):
        with pytest.raises(DataFault, match="undecodable_image"):
            _encode(images=images, span=span)
    with pytest.raises(DataFault, match="undecodable_image"):  # without its header nobody knows what the rest looks like
        _encode(images=(*IMAGES[:2], b"gone"), span=(0, second_end))


def test_a_dicom_outside_a_span_is_measured_all_the_same():
    dataset, file = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False)), io.BytesIO()
    dataset.Rows, dataset.PixelData = 64, dataset.PixelData[: 64 * 128 * 2]  # wide: its sides are not to be confused
    dataset.save_as(file)
    images, sizes = (*IMAGES[:2], file.getvalue()), [(40, 30), (30, 50), (128, 64)]
    length = len(render(SAMPLE.messages, TOKENIZER, visual_tokens=[ANY.tokens_of(*size) for size in sizes]).input_ids)
    whole = _encode(Encoder(TOKENIZER, ANY), images=images, expected_tokens=length)
    assert whole.images.grids[2] == ANY.grid(128, 64) != ANY.grid(64, 128)
    span = (0, image_runs(whole.input_ids.tolist(), TOKENIZER)[1][1])
    assert len(_encode(Encoder(TOKENIZER, ANY), images=images, expected_tokens=length, span=span).images) == 2


def test_a_picture_that_fits_no_grid_is_refused_in_a_span_too():
    for span in (None, (0, 4)):
        with pytest.raises(DataFault, match="image_aspect"):
            _encode(images=(*IMAGES[:2], _file(3, width=500, height=2)), span=span)


def test_a_span_never_cuts_an_image():
    length = _length()
    for number, (first, end) in enumerate(image_runs(_encode().input_ids, TOKENIZER)):
        for inside in range(first + 1, end):
            for span in ((0, inside), (inside, length)):
                with pytest.raises(AssertionError, match=f"cuts image {number}"):
                    _encode(span=span)
        _encode(span=(0, end))
        _encode(span=(first, length))
    for span in ((0, length + 1), (5, 5), (-1, 4)):
        with pytest.raises(AssertionError, match="of a sample of"):
            _encode(span=span)


def test_chance_comes_from_the_samples_seed_and_the_images_number_alone():
    encoder, plain = Encoder(TOKENIZER, SQUARE, augment=JITTER), _encode()
    same = (IMAGES[0],) * 3
    first = {seed: _encode(encoder, images=same, seed=seed) for seed in (5, 2**64 - 1)}
    for seed, encoded in reversed(first.items()):
        assert torch.equal(_encode(encoder, images=same, seed=seed).images.patches, encoded.images.patches)
        assert (encoded.images.grids, encoded.input_ids.tolist()) == (plain.images.grids, plain.input_ids.tolist())  # lengths never drift
    seen = {patches.numpy().tobytes() for encoded in first.values() for patches in encoded.images.patches.split(16)}
    assert len(seen) == 6  # two samples of three images: the same picture, six times another one
    assert torch.equal(_encode(replace(encoder, augment=None), seed=5).images.patches, plain.images.patches)


def test_another_process_makes_the_same_bytes():
    """What a loader's worker computes, whichever it is."""
    program = "from tests.data.test_encode import checksum; print(checksum())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    assert said.strip() == str(checksum())


def checksum() -> list[int]:
    encoder = Encoder(TOKENIZER, SQUARE, augment=JITTER)
    return [int(_encode(encoder, seed=seed).images.patches.to(torch.int64).sum()) for seed in range(5)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat():
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    encoder = Encoder(TOKENIZER, SQUARE, augment=JITTER)
    sample = replace(SAMPLE, messages=(Message("user", "<image>which plane"), Message("assistant", "axial")))
    length = len(render(sample.messages, TOKENIZER, visual_tokens=[9]).input_ids)
    before = 0.0
    for number in range(2500):
        if number == 500:
            before = resident()
        encoder(sample, IMAGES[:1], expected_tokens=length, seed=number)
    assert resident() - before < 2  # MiB; measured: 0, also after 20,000; two held tensors of 4 kB a sample would be 8
