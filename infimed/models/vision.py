"""The vision towers: SigLIP's own blocks from transformers, run over the patches of many images as one packed row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infimed.contracts import Images, UserError
from infimed.models.attention import PACKED
from infimed.processing.image import normalise


class PackedSelfAttention(nn.Module):
    """A tower's self-attention that hands its packing arguments on; transformers' own drops them, and images would see each other."""

    def __init__(self, stock: nn.Module) -> None:
        """Take over the projections of a `SiglipAttention` or `Siglip2Attention`, under their names."""
        super().__init__()
        self.config, self.head_dim, self.scaling, self.is_causal = stock.config, stock.head_dim, stock.scale, False
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.out_proj

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None = None, **segments: torch.Tensor | int
    ) -> tuple[torch.Tensor, None]:
        """Attend inside every segment of a packed row float[1, P, D]."""
        heads = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, _ = attend(self, *heads, attention_mask, scaling=self.scaling, is_causal=False, **segments)
        return self.out_proj(attended.flatten(-2)), None


class PackedTower(nn.Module, ABC):
    """Turn packed patches into features; base of the towers below.

    Blocks after the one whose output is read, and the pooling head, add nothing to the result and are not built. A frozen tower runs
    without autograd and stays in eval mode.
    """

    def __init__(self, stock: PreTrainedModel, *, post_norm: bool) -> None:
        """Take over the parts of a transformers vision model, under their names."""
        super().__init__()
        stock.set_attn_implementation(PACKED)
        for layer in stock.encoder.layers:
            layer.self_attn = PackedSelfAttention(layer.self_attn)
        self.config = stock.config
        self.embeddings = stock.embeddings
        self.encoder = stock.encoder
        self.post_layernorm = stock.post_layernorm if post_norm else None
        self.hidden_size: int = stock.config.hidden_size
        self.patch_size: int = stock.config.patch_size
        # patches a side of the picture that the positions were learned on
        self.table_side = isqrt(len(self.embeddings.position_embedding.weight))

    @property
    def learns(self) -> bool:
        """Whether anything in the tower is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> PackedTower:
        """Change the mode; a frozen tower stays in eval mode."""
        return super().train(mode and self.learns)

    @abstractmethod
    def patch_weight(self) -> torch.Tensor:
        """Return the patch embedding as float[D, patch_size ** 2 * 3] for patches in (row, column, channel) order."""

    def forward(self, images: Images) -> torch.Tensor:
        """Encode images.

        Returns:
            float[P, D] features of the patches of all images.
        """
        weight, bias = self.patch_weight(), self.embeddings.patch_embedding.bias
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):
            hidden = F.linear(normalise(images.patches).to(weight.dtype), weight, bias) + self.positions(images.grids)
            hidden = hidden.unsqueeze(0)
            where = {"cu_seq_lens_q": images.cu_seqlens, "max_length_q": images.max_seqlen}
            for block in self.encoder.layers:
                hidden = block(hidden, None, **where)
            return (hidden if self.post_layernorm is None else self.post_layernorm(hidden)).squeeze(0)

    def positions(self, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the position embeddings of all patches: float[P, D], the learned table resized to each image's grid."""
        parts = [self._resized(grid).repeat(len(list(run)), 1) for grid, run in groupby(grids)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _resized(self, grid: tuple[int, int]) -> torch.Tensor:
        """Resize the table to rows x columns, as transformers' SigLIP2 does: bilinear, antialiased, float32 on a CPU."""
        table, side = self.embeddings.position_embedding.weight, self.table_side
        if grid == (side, side):
            return table
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        square = square.float() if square.device.type == "cpu" else square
        resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False, antialias=True)
        return resized.flatten(2).squeeze(0).T.to(table.dtype)


class SiglipTower(PackedTower):
    """SigLIP: square images, features of the second-to-last block before any norm, as in the parent recipe.

    Source: arXiv 2303.15343, arXiv 2504.00595; transformers `models/siglip/modeling_siglip.py`.
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
        post_norm: bool = False,
    ) -> None:
        """Build the tower at random init.

        Args:
            image_size: pixels a side that the positions were learned on; other sizes resize them.
            num_hidden_layers: blocks of the published tower, 27 in so400m.
            feature_layer: which hidden state is read, counted from the end: -1 the last block's, -2 the one before.
            post_norm: put the tower's final norm after it.
        """
        config = SiglipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=_blocks(num_hidden_layers, feature_layer),
            num_attention_heads=num_attention_heads,
            vision_use_head=False,
        )
        super().__init__(SiglipVisionModel(config), post_norm=post_norm)

    def patch_weight(self) -> torch.Tensor:
        """Read the convolution as a matrix: stride and kernel are one patch."""
        return self.embeddings.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)


class NaflexTower(PackedTower):
    """SigLIP2-NaFlex: images of any aspect and size, features of the last block after the final norm.

    Source: arXiv 2502.14786; transformers `models/siglip2/modeling_siglip2.py`.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        num_patches: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        feature_layer: int = -1,
        post_norm: bool = True,
    ) -> None:
        """Build the tower at random init.

        Args:
            num_patches: rows of the position table, a square number (256 in the published towers); resized to each image's grid.
            num_hidden_layers, feature_layer, post_norm: as in `SiglipTower`.
        """
        if isqrt(num_patches) ** 2 != num_patches:
            raise UserError(f"model.vision.num_patches={num_patches}: expected a square number, the table of positions is a square")
        config = Siglip2VisionConfig(
            patch_size=patch_size,
            num_patches=num_patches,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=_blocks(num_hidden_layers, feature_layer),
            num_attention_heads=num_attention_heads,
            vision_use_head=False,
        )
        super().__init__(Siglip2VisionModel(config), post_norm=post_norm)

    def patch_weight(self) -> torch.Tensor:
        """Return the patch embedding, which is a matrix already."""
        return self.embeddings.patch_embedding.weight


def _blocks(num_hidden_layers: int, feature_layer: int) -> int:
    """Count the blocks that must be run."""
    if not -num_hidden_layers <= feature_layer <= -1:
        raise UserError(f"model.vision.feature_layer is {feature_layer}; expected -{num_hidden_layers} to -1")
    return num_hidden_layers + feature_layer + 1
