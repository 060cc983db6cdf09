"""Put visual features where the placeholders stand; loud when the two disagree."""

from __future__ import annotations

import torch


def fuse(text_BTD: torch.Tensor, visual_NVD: torch.Tensor, placeholder_BT: torch.Tensor) -> torch.Tensor:
    """Replace the embeddings of placeholder tokens by visual features, in order.

    Args:
        text_BTD: float[B, T, D] token embeddings.
        visual_NVD: float[N, V, D] projected features of N images.
        placeholder_BT: bool[B, T], true on image tokens.

    Returns:
        float[B, T, D].

    Raises:
        ValueError: the number of placeholder tokens is not N * V. On a GPU the check would stall the stream; the collator
            has made it there, sample by sample.
    """
    features = visual_NVD.flatten(0, 1)
    if text_BTD.device.type == "cpu" and (tokens := int(placeholder_BT.sum())) != len(features):
        count, each = visual_NVD.shape[:2]
        raise ValueError(
            f"{tokens} image tokens in the text, but {len(features)} visual features ({count} images of {each} tokens): "
            "render the text with the same visual_grid as the model's (processing/chat.py), and never cut a rendered sample"
        )
    return text_BTD.masked_scatter(placeholder_BT.unsqueeze(-1), features.to(text_BTD.dtype))
