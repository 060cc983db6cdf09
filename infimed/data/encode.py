"""One sample and its encoded images -> numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infimed.contracts import DataFault, Encoded, Sample
from infimed.processing.chat import render
from infimed.processing.dicom import read_image_file
from infimed.processing.image import num_visual_tokens, resize_square
from infimed.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens and pixels for one stage."""

    tokenizer: Tokenizer
    image_size: int  # pixels a side that the tower takes
    visual_grid: int  # visual tokens a side

    @property
    def visual_tokens(self) -> int:
        """Return the tokens of one image."""
        return num_visual_tokens(self.visual_grid)

    def __call__(self, sample: Sample, images: Sequence[bytes], *, expected_tokens: int) -> Encoded:
        """Render the conversation and decode the images.

        Raises: DataFault for an image or a text that cannot be used, and `length_drift` when the length is not the one that was planned.
        """
        rendered = render(sample.messages, self.tokenizer, visual_tokens=[self.visual_tokens] * len(images))
        if len(rendered.input_ids) != expected_tokens:
            raise DataFault("length_drift", f"{sample.key}: {len(rendered.input_ids)} tokens, planned with {expected_tokens}")
        pixels = [resize_square(read_image_file(image), self.image_size) for image in images]
        return Encoded(
            key=sample.key,
            source=sample.source,
            input_ids=torch.tensor(rendered.input_ids, dtype=torch.int64),
            labels=torch.tensor(rendered.labels, dtype=torch.int64),
            pixel_values=torch.stack(pixels) if pixels else no_pixels(self.image_size),
        )


def no_pixels(image_size: int) -> torch.Tensor:
    """Return the images of a text-only row: uint8[0, 3, S, S]."""
    return torch.zeros((0, 3, image_size, image_size), dtype=torch.uint8)
