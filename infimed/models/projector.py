"""From patch features to the language model's width: fewer tokens first, more later, the same weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class AveragePoolMLP(nn.Module):
    """Adaptive average pooling of the patch grid, then Linear - GELU - Linear.

    Pooling has no parameters, so a checkpoint trained at one `visual_grid` loads at any other.

    Source: arXiv 2504.00595 (the parent recipe); arXiv 2509.22261 (adaptive average pooling).
    """

    def __init__(self, *, in_features: int, out_features: int, visual_grid: int) -> None:
        """Build the projector; `visual_grid` squared is the number of visual tokens an image."""
        super().__init__()
        self.visual_grid = visual_grid
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, patches_NPD: torch.Tensor) -> torch.Tensor:
        """Pool and project.

        Args:
            patches_NPD: float[N, P, in_features], P a square number, row-major.

        Returns:
            float[N, V, out_features], V = visual_grid ** 2, row-major.
        """
        count, patches, width = patches_NPD.shape
        side = int(patches**0.5)
        if side != self.visual_grid:
            grid = patches_NPD.transpose(1, 2).reshape(count, width, side, side)
            patches_NPD = F.adaptive_avg_pool2d(grid, self.visual_grid).flatten(2).transpose(1, 2)
        return self.linear_2(F.gelu(self.linear_1(patches_NPD)))
