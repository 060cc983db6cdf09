"""Put questions to a model in this process: the training renderer, the training image path, greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from infimed.contracts import EvalItem, Images
from infimed.models.generate import generate
from infimed.models.vlm import InfiMed
from infimed.processing.chat import render_prompt
from infimed.processing.dicom import read_image_file
from infimed.processing.image import to_images
from infimed.processing.tokenizer import Tokenizer

GREY = 127
"""Pixel value of the picture that a blind model is shown: the middle of the tower's input range."""


class LocalModel:
    """Answer questions with a model held in memory."""

    def __init__(
        self,
        model: InfiMed,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int = 16,
        batch_size: int = 32,
        blind: bool = False,
        generate: Callable[..., list[list[int]]] = generate,
    ) -> None:
        """Keep what is needed to answer.

        Args:
            blind: show a mid-grey picture in place of every image: the no-image baseline, with the same number of tokens.
            generate: what decodes, with the interface of `models.generate.generate`.
        """
        self._model, self._tokenizer, self._generate = model, tokenizer, generate
        self._max_new_tokens, self._batch_size, self._blind = max_new_tokens, batch_size, blind

    def __call__(self, items: Sequence[EvalItem]) -> list[str]:
        """Return the responses in the order of the questions; prompts of like length share a batch, to pad little.

        Raises:
            DataFault: an image cannot be decoded, or a prompt's placeholders and images disagree.
        """
        seen = [self._images(item) for item in items]
        prompts = [self._prompt(item, images) for item, images in zip(items, seen, strict=True)]
        order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
        responses = [""] * len(items)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            answers = self._generate(
                self._model,
                [prompts[i] for i in batch],
                [seen[i] for i in batch],
                max_new_tokens=self._max_new_tokens,
                stop_ids=(self._tokenizer.im_end_id, self._tokenizer.pad_id),
                pad_id=self._tokenizer.pad_id,
            )
            for i, ids in zip(batch, answers, strict=True):
                responses[i] = self._tokenizer.decode(ids).strip()
        return responses

    def _prompt(self, item: EvalItem, images: Images) -> list[int]:
        """Render a question; every image takes the model's number of visual tokens."""
        visual = [self._model.resolution.tokens(grid) for grid in images.grids]
        return render_prompt(item.prompt, self._tokenizer, visual_tokens=visual)

    def _images(self, item: EvalItem) -> Images:
        """Return the images of a question as patches; grey ones of the same sizes for a blind model."""
        images = to_images([read_image_file(data) for data in item.images], self._model.resolution)
        return replace(images, patches=torch.full_like(images.patches, GREY)) if self._blind else images
