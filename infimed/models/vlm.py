"""The whole model in one screen: embed -> see -> project -> fuse -> read."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from infimed.contracts import Images, UserError
from infimed.models.attention import implementation
from infimed.models.fusion import fuse
from infimed.models.loss import Kernel, Loss, linear_cross_entropy
from infimed.models.projector import Projector
from infimed.models.vision import PackedTower
from infimed.processing.resolution import Resolution


class InfiMed(nn.Module):
    """Vision tower -> projector -> decoder; in the papers SigLIP -> average pool + MLP -> Qwen3.

    The parts are named `vision`, `projector` and `language`, here and everywhere.
    """

    def __init__(
        self,
        *,
        resolution: Resolution,
        vision: PackedTower,
        projector: Projector,
        language: PreTrainedModel,
        image_token_id: int,
        attention: str = "auto",
        loss: Kernel = "chunked",
    ) -> None:
        """Join the three parts.

        Args:
            resolution: how many pixels and tokens an image becomes.
            image_token_id: the vocabulary row that stands for one visual token; a spare row, so that nothing is resized.
            attention: kernel of packed attention, in tower and decoder; auto: the best that the device has.
            loss: kernel of the cross-entropy.
        """
        super().__init__()
        width, rows = language.config.hidden_size, language.config.vocab_size
        problems = []
        if (projector.in_features, projector.out_features) != (vision.hidden_size, width):
            problems.append(
                f"projector maps {projector.in_features} -> {projector.out_features}; "
                f"the tower gives {vision.hidden_size} and the language model takes {width}"
            )
        if resolution.patch_size != vision.patch_size:
            problems.append(f"resolution.patch_size={resolution.patch_size}, the tower's patches have {vision.patch_size} pixels a side")
        oblong = (resolution.pool, 2 * resolution.pool) if resolution.image_size is None else resolution.largest
        for grid in dict.fromkeys((resolution.largest, resolution.smallest, oblong)):
            if (given := projector.tokens(grid)) != (expected := resolution.tokens(grid)):
                made = f"of {grid[0]} x {grid[1]} patches the projector makes {given} tokens, resolution counts {expected}"
                problems.append(f"{made}: give both one visual_grid or pool")
        if loss not in get_args(Kernel):
            problems.append(f"model.loss={loss}: expected {', '.join(get_args(Kernel))}")
        if not 0 <= image_token_id < rows:
            problems.append(f"image_token_id {image_token_id} is outside the {rows} vocabulary rows: tokenizer and model disagree")
        if problems:
            raise UserError("; ".join(problems))
        self.resolution = resolution
        self.vision = vision
        self.projector = projector
        self.language = language
        self.image_token_id = image_token_id
        self.loss = loss
        self.compiled = self.compile_loss = False  # see compile.py
        for part in (vision, language):
            part.config._attn_implementation = implementation(attention)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language.device

    def see(self, images: Images) -> torch.Tensor:
        """Turn images into visual tokens, float[V, D], those of all images end to end."""
        return self.projector(self.vision(images), images.grids)

    def embed(self, input_ids_BT: torch.Tensor, images: Images) -> torch.Tensor:
        """Embed a row of tokens with its images in place: float[B, T, D]."""
        text_BTD = self.language.get_input_embeddings()(input_ids_BT)
        if not len(images):
            return text_BTD + 0.0 * self._unseen(text_BTD)
        return fuse(text_BTD, self.see(images), input_ids_BT == self.image_token_id, images=len(images))

    def hidden(
        self, input_ids_BT: torch.Tensor, images: Images, *, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """Read a packed row: float[1, T, D] last hidden states."""
        return self.language.model(
            inputs_embeds=self.embed(input_ids_BT, images),
            position_ids=position_ids,
            use_cache=False,  # a cache would make transformers forget the segments
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
        ).last_hidden_state

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        images: Images,
        *,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        rows: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> Loss:
        """Sum the next-token loss of one packed row; the fields of `contracts.Batch`.

        Args:
            rows: where the supervised tokens are; None: looked for here, at the price of waiting for the device.
            weights: float[1, T], what a token's loss counts in the total; None: 1.
        """
        hidden_BTD = self.hidden(input_ids, images, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        head = self.language.get_output_embeddings().weight
        return linear_cross_entropy(hidden_BTD, head, labels, rows=rows, weights_BT=weights, kernel=self.loss, compiled=self.compile_loss)

    def _unseen(self, like: torch.Tensor) -> torch.Tensor:
        """Keep vision and projector in the graph of a row without images: every rank must reduce the same gradients.

        The smallest image that pooling takes does it, a patch or a block of them. Compiled blocks get a whole one: they have seen its like.
        """
        if not (self.training and any(p.requires_grad for p in (*self.vision.parameters(), *self.projector.parameters()))):
            return like.new_zeros(())
        grid = self.resolution.largest if self.compiled else self.resolution.smallest
        blank = Images.of(torch.zeros(grid[0] * grid[1], 3 * self.resolution.patch_size**2, dtype=torch.uint8), [grid]).to(like.device)
        return self.see(blank).sum().to(like.dtype)
