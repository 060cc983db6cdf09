"""One sample and its encoded images -> numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infimed.contracts import DataFault, Encoded, Sample
from infimed.processing.chat import render
from infimed.processing.dicom import read_image_file
from infimed.processing.image import to_images
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens and pixels for one stage."""

    tokenizer: Tokenizer
    resolution: Resolution

    def __call__(self, sample: Sample, images: Sequence[bytes], *, expected_tokens: int) -> Encoded:
        """Render the conversation and decode the images.

        Raises: DataFault for an image or a text that cannot be used, and `length_drift` when the length is not the one that was planned.
        """
        seen = to_images([read_image_file(image) for image in images], self.resolution)
        rendered = render(sample.messages, self.tokenizer, visual_tokens=[self.resolution.tokens(grid) for grid in seen.grids])
        if len(rendered.input_ids) != expected_tokens:
            raise DataFault("length_drift", f"{sample.key}: {len(rendered.input_ids)} tokens, planned with {expected_tokens}")
        return Encoded(
            key=sample.key,
            source=sample.source,
            input_ids=torch.tensor(rendered.input_ids, dtype=torch.int64),
            labels=torch.tensor(rendered.labels, dtype=torch.int64),
            images=seen,
        )
