"""One sample and its encoded images -> numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infimed.contracts import IGNORE_INDEX, DataFault, Encoded, Images, Sample
from infimed.processing.augment import Augment, stream
from infimed.processing.chat import Rendered, render
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.image import cut, fit, image_size
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens and pixels for one stage."""

    tokenizer: Tokenizer
    resolution: Resolution
    augment: Augment | None = None

    def __call__(
        self, sample: Sample, images: Sequence[bytes], *, expected_tokens: int, span: tuple[int, int] | None = None, seed: int = 0
    ) -> Encoded:
        """Render the conversation and decode the images.

        expected_tokens: length of the whole sample, as planned.
        span: tokens [start, stop) to keep. The first of them is context alone; images outside are not decoded.
        seed: the sample's own, all that augmentation depends on.
        Raises: DataFault for an image or a text that cannot be used, and `length_drift` when the length is not the one that was planned;
        AssertionError for a span that cuts an image or leaves the sample.
        """
        if span is None:
            seen = self._see(images, range(len(images)), seed)
            rendered = self._render(sample, seen.grids, expected_tokens)
        else:
            rendered = self._render(sample, [self._grid(image) for image in images], expected_tokens)
            seen = self._see(images, _inside(span, image_runs(rendered.input_ids, self.tokenizer), expected_tokens), seed)
        start, stop = span or (0, expected_tokens)
        labels = torch.from_numpy(np.array(rendered.labels[start:stop], dtype=np.int64))
        labels[0] = IGNORE_INDEX
        return Encoded(
            key=sample.key,
            source=sample.source,
            input_ids=torch.from_numpy(np.array(rendered.input_ids[start:stop], dtype=np.int64)),
            labels=labels,
            images=seen,
        )

    def _see(self, images: Sequence[bytes], numbers: Iterable[int], seed: int) -> Images:
        """Decode, resize and change the images of these numbers; only one is held in its full size."""
        pictures = []
        for number in numbers:
            picture = fit(read_image_file(images[number]), self.resolution, fast=True)
            pictures.append(self.augment(picture, stream(seed, number)) if self.augment is not None else picture)
        return cut(pictures, self.resolution.patch_size)

    def _render(self, sample: Sample, grids: Iterable[tuple[int, int]], expected_tokens: int) -> Rendered:
        """Render the whole sample. Raises: DataFault."""
        rendered = render(sample.messages, self.tokenizer, visual_tokens=[self.resolution.tokens(grid) for grid in grids])
        if len(rendered.input_ids) != expected_tokens:
            raise DataFault("length_drift", f"{sample.key}: {len(rendered.input_ids)} tokens, planned with {expected_tokens}")
        return rendered

    def _grid(self, image: bytes) -> tuple[int, int]:
        """Return the patches of an encoded image that need not be decoded, DICOM aside. Raises: DataFault."""
        if is_dicom(image):
            height, width = read_image_file(image).shape[1:]
        else:
            width, height = image_size(image)
        self.resolution.refuse(width, height)
        return self.resolution.grid(width, height)


def image_runs(input_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """Find the tokens [start, stop) of each image in a rendered conversation, its start and end tokens included."""
    ids = np.asarray(input_ids)
    starts, ends = (np.flatnonzero(ids == id).tolist() for id in (tokenizer.image_start_id, tokenizer.image_end_id))
    return tuple((start, end + 1) for start, end in zip(starts, ends, strict=True))


def _inside(span: tuple[int, int], runs: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Number the images that a span shows."""
    start, stop = span
    assert 0 <= start < stop <= length, f"span {span} of a sample of {length} tokens"
    for number, (first, end) in enumerate(runs):
        is_cut = first < start < end or first < stop < end
        assert not is_cut, f"span {span} cuts image {number}, which is the tokens from {first} to {end}"
    return [number for number, (first, end) in enumerate(runs) if start <= first and end <= stop]
