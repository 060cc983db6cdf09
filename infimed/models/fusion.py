"""Put visual features where the placeholders stand; loud when the two disagree."""

from __future__ import annotations

import torch


def fuse(text_BTD: torch.Tensor, visual_VD: torch.Tensor, placeholder_BT: torch.Tensor, *, images: int) -> torch.Tensor:
    """Replace the embeddings of placeholder tokens by visual features, in order.

    Args:
        text_BTD: float[B, T, D] token embeddings.
        visual_VD: float[V, D] projected features of all images, in order.
        placeholder_BT: bool[B, T], true on image tokens.
        images: how many there are, for the error.

    Returns:
        float[B, T, D].

    Raises:
        ValueError: the number of placeholder tokens is not V. On a GPU the check would stall the stream; there the
            two agree because both follow from `Resolution`.
    """
    if text_BTD.device.type == "cpu" and (tokens := int(placeholder_BT.sum())) != len(visual_VD):
        raise ValueError(
            f"{tokens} image tokens in the text, but {len(visual_VD)} visual features ({images} images): "
            "render the text with the model's own resolution (processing/chat.py), and never cut a rendered sample"
        )
    # not masked_scatter: its backward pass waits for the device to count the mask
    at_T = (placeholder_BT.flatten().cumsum(0) - 1).clamp(min=0)
    spread_BTD = visual_VD.to(text_BTD.dtype).index_select(0, at_T).view_as(text_BTD)
    return torch.where(placeholder_BT.unsqueeze(-1), spread_BTD, text_BTD)
