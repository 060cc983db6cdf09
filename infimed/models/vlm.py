"""The whole model in one screen: embed -> see -> project -> fuse -> read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from infimed.contracts import UserError
from infimed.models.fusion import fuse
from infimed.models.loss import Loss, linear_cross_entropy
from infimed.models.projector import AveragePoolMLP
from infimed.models.vision import SiglipTower


class InfiMed(nn.Module):
    """SigLIP tower -> average pool + MLP -> Qwen3 decoder.

    The parts are named `vision`, `projector` and `language`, here and everywhere.
    """

    def __init__(self, *, vision: SiglipTower, projector: AveragePoolMLP, language: PreTrainedModel, image_token_id: int) -> None:
        """Join the three parts.

        Args:
            image_token_id: the vocabulary row that stands for one visual token; a spare row, so that nothing is resized.
        """
        super().__init__()
        width, rows = language.config.hidden_size, language.config.vocab_size
        if projector.linear_1.in_features != vision.hidden_size or projector.linear_2.out_features != width:
            raise UserError(
                f"projector maps {projector.linear_1.in_features} -> {projector.linear_2.out_features}; "
                f"the tower gives {vision.hidden_size} and the language model takes {width}"
            )
        if not 0 <= image_token_id < rows:
            raise UserError(f"image_token_id {image_token_id} is outside the {rows} vocabulary rows: tokenizer and model disagree")
        self.vision = vision
        self.projector = projector
        self.language = language
        self.image_token_id = image_token_id

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower takes, in pixels."""
        return self.vision.image_size

    @property
    def visual_grid(self) -> int:
        """Side of the grid of visual tokens an image becomes."""
        return self.projector.visual_grid

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language.device

    def see(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        """Turn images uint8[N, 3, H, W] into visual tokens float[N, V, D]."""
        return self.projector(self.vision(pixels_N3HW))

    def embed(self, input_ids_BT: torch.Tensor, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        """Embed a row of tokens with its images in place: float[B, T, D]."""
        text_BTD = self.language.get_input_embeddings()(input_ids_BT)
        if len(pixels_N3HW) == 0:
            return text_BTD + 0.0 * self._unseen(text_BTD)
        return fuse(text_BTD, self.see(pixels_N3HW), input_ids_BT == self.image_token_id)

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        pixels_N3HW: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """Read a packed row: float[1, T, D] last hidden states."""
        return self.language.model(
            inputs_embeds=self.embed(input_ids_BT, pixels_N3HW),
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
        pixel_values: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> Loss:
        """Sum the next-token loss of one packed row; the fields of `contracts.Batch`."""
        hidden_BTD = self.hidden(input_ids, pixel_values, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return linear_cross_entropy(hidden_BTD, self.language.get_output_embeddings().weight, labels)

    def _unseen(self, like: torch.Tensor) -> torch.Tensor:
        """Keep vision and projector in the graph of a row without images: every rank must reduce the same gradients."""
        if not (self.training and any(p.requires_grad for p in (*self.vision.parameters(), *self.projector.parameters()))):
            return like.new_zeros(())
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=like.device)
        return self.see(blank).sum().to(like.dtype)
