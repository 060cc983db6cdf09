"""An exported folder as a stock user sees it: the model and the processor that transformers makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Lfm2VlProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_utils import SizeDict
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorKwargs, Siglip2ImageProcessorPil
from transformers.utils import is_torchvision_available

from infimed.contracts import UserError
from infimed.processing.image import patchify
from infimed.processing.resolution import Resolution

Inputs = Mapping[str, torch.Tensor]


def load_stock(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model. Raises: UserError when a weight is missing, left over or of another shape."""
    model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}:
        raise UserError(f"{type(model).__name__} does not take the exported weights as they are: {wrong}; please report this")
    return model.eval()


def load_processor(folder: Path, resolution: Resolution) -> tuple[ProcessorMixin, str]:
    """Load what turns a conversation into numbers, its pictures resized by Pillow as in evaluation and chat, and say what it is."""
    if resolution.image_size is not None:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        processor.image_processor = SiglipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return processor, f"AutoProcessor ({type(processor).__name__}) with {type(processor.image_processor).__name__}"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = (folder / "chat_template.jinja").read_text()
    name = "Lfm2VlProcessor, the steps of its image processor done by transformers' SigLIP2 processor on Pillow"
    return Lfm2VlProcessor(PillowImages(resolution), tokenizer, chat_template=template), name


def load_auto_processor(folder: Path, resolution: Resolution) -> ProcessorMixin | None:
    """Load the processor as a stock user does; None where it cannot be: lfm2_vl's needs torchvision."""
    if resolution.image_size is None and not is_torchvision_available():
        return None
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def prepare(processor: ProcessorMixin, conversation: Sequence[Mapping[str, object]]) -> Inputs:
    """Run chat template and processor on a conversation, up to where the answer begins."""
    return processor.apply_chat_template(
        list(conversation), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def pixels_of(inputs: Inputs, patch_size: int) -> torch.Tensor:
    """Return a processor's pixels as packed patches, float32[P, patch_size ** 2 * 3]."""
    if "pixel_values" not in inputs:
        return torch.zeros(0, 3 * patch_size**2)
    pixels = inputs["pixel_values"]
    if "pixel_attention_mask" in inputs:
        return pixels[inputs["pixel_attention_mask"].bool()]
    return torch.cat([patchify(image, patch_size) for image in pixels])


class _PillowKwargs(Siglip2ImageProcessorKwargs, total=False):
    return_row_col_info: bool


class PillowImages(Siglip2ImageProcessorPil):
    """What `Lfm2VlImageProcessor` does to a picture that is one tile, from transformers' Pillow functions; itself it needs torchvision.

    Not independent of us in one thing: the size that a picture is resized to is `Resolution.size`.

    Source: transformers `models/lfm2_vl/image_processing_lfm2_vl.py`.
    """

    valid_kwargs = _PillowKwargs
    use_thumbnail = False
    tile_size = 512  # unread: one tile

    def __init__(self, resolution: Resolution) -> None:
        """Take over the numbers of a resolution."""
        super().__init__(patch_size=resolution.patch_size, max_num_patches=resolution.max_visual_tokens * resolution.pool**2)
        self.resolution = resolution
        self.encoder_patch_size, self.downsample_factor = resolution.patch_size, resolution.pool

    def _preprocess(self, images: Sequence[np.ndarray], *, do_resize: bool, resample: object, **options: object) -> dict:
        """Resize each picture to its own size, then rescale, normalise, cut and pad as SigLIP2 does."""
        sizes = [self.resolution.size(image.shape[-1], image.shape[-2]) for image in images]
        images = [self.resize(image, SizeDict(height=h, width=w), resample) for image, (h, w) in zip(images, sizes, strict=True)]
        done = super()._preprocess(images, do_resize=False, resample=resample, **options)
        done.update({"image_rows": [1] * len(sizes), "image_cols": [1] * len(sizes), "image_sizes": [list(size) for size in sizes]})
        return done
