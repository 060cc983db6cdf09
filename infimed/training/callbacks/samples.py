"""A fixed panel of validation images with question, reference and answer: the same cases at every look."""

from __future__ import annotations

import textwrap

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from infimed.contracts import Images
from infimed.models.generate import generate
from infimed.processing.chat import render_prompt
from infimed.processing.dicom import read_image_file
from infimed.processing.image import to_images, unpatchify

WIDTH = 280  # pixels of one card


class Panel(lightning.Callback):
    """Answer a few validation questions at every validation and draw them as cards in TensorBoard."""

    def __init__(self, *, count: int = 8, max_new_tokens: int = 24) -> None:
        """Show `count` cases, spread evenly over the validation set."""
        self.count = count
        self.max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Generate, draw, write: rank 0 only, the other ranks hold no part of a replicated model back."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not trainer.is_global_zero or not writers:
            return
        model, tokenizer = pl_module.model, trainer.datamodule.tokenizer
        cases = [case for case in trainer.datamodule.panel(self.count) if case[0].messages[-1].role == "assistant"]
        if not cases:
            return
        seen = [to_images([read_image_file(data) for data in images], model.resolution) for _, images in cases]
        prompts = [
            render_prompt(sample.messages[:-1], tokenizer, visual_tokens=[model.resolution.tokens(grid) for grid in images.grids])
            for (sample, _), images in zip(cases, seen, strict=True)
        ]
        answers = generate(
            model,
            prompts,
            seen,
            max_new_tokens=self.max_new_tokens,
            stop_ids=(tokenizer.im_end_id, tokenizer.pad_id),
            pad_id=tokenizer.pad_id,
        )
        cards = [
            card(_first(images), sample.messages[-2].text, sample.messages[-1].text, tokenizer.decode(answer))
            for (sample, _), images, answer in zip(cases, seen, answers, strict=True)
        ]
        for writer in writers:
            for number, drawn in enumerate(cards):
                writer.add_image(f"panel/{number}", drawn, trainer.global_step, dataformats="HWC")


def _first(images: Images) -> torch.Tensor:
    """Return the first of several images as uint8[3, H, W]."""
    rows, columns = images.grids[0]
    return unpatchify(images.patches[: rows * columns], images.grids[0])


def card(picture_3HW: torch.Tensor, question: str, reference: str, answer: str, *, height: int = 430) -> np.ndarray:
    """Draw a picture with question, reference and answer below it: uint8[height, WIDTH, 3]; a right answer is green."""
    canvas = Image.new("RGB", (WIDTH, height), "white")
    picture = Image.fromarray(picture_3HW.permute(1, 2, 0).numpy())
    scale = (WIDTH - 20) / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    canvas.paste(picture, (10, 10))
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(13), WIDTH - 2
    colour = "#1a7f37" if answer.strip() == reference.strip() else "#b42318"
    for text, fill in (
        (question.replace("<image>", "").strip(), "#333333"),
        (f"reference: {reference}", "#0b4f9e"),
        (f"answer: {answer}", colour),
    ):
        for line in textwrap.wrap(" ".join(text.split()), 40)[:4]:
            draw.text((10, y), line, fill=fill, font=font)
            y += 16
        y += 4
    return np.asarray(canvas)
