"""The vision tower: SigLIP's own blocks from transformers, stopped at the layer whose features are read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from infimed.contracts import UserError
from infimed.processing.image import normalise


class SiglipTower(nn.Module):
    """Turn square images into patch features.

    Blocks after the one whose output is read, the final norm and the pooling head add nothing to the result and are not built.

    Source: arXiv 2303.15343; transformers `models/siglip/modeling_siglip.py`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        feature_layer: int = -2,
    ) -> None:
        """Build the tower at random init.

        Args:
            num_hidden_layers: blocks of the published tower, 27 in so400m.
            feature_layer: which hidden state is read, counted from the end: -1 the last block's, -2 the one before.
        """
        super().__init__()
        if not -num_hidden_layers <= feature_layer <= -1:
            raise UserError(f"model.vision.feature_layer is {feature_layer}; expected -{num_hidden_layers} to -1")
        stock = SiglipVisionModel(
            SiglipVisionConfig(
                image_size=image_size,
                patch_size=patch_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_hidden_layers=num_hidden_layers + feature_layer + 1,
                num_attention_heads=num_attention_heads,
                vision_use_head=False,
            )
        )
        self.embeddings = stock.embeddings
        self.encoder = stock.encoder
        self.image_size = image_size
        self.grid = image_size // patch_size
        self.hidden_size = hidden_size

    def forward(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        """Encode images; a frozen tower runs without autograd.

        Args:
            pixels_N3HW: uint8[N, 3, H, W] with H = W = image_size.

        Returns:
            float[N, P, D] patch features in row-major order, P = (image_size // patch_size) ** 2, before any norm.
        """
        weight = self.embeddings.patch_embedding.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight.requires_grad):
            patches = self.embeddings(normalise(pixels_N3HW).to(weight.dtype))
            return self.encoder(inputs_embeds=patches).last_hidden_state
