"""Greedy answers for many prompts at once: left-padded prefill, then one token a step with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infimed.models.attention import attention
from infimed.models.vlm import InfiMed


@torch.inference_mode()
def generate(
    model: InfiMed,
    prompts: Sequence[Sequence[int]],
    images: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Continue each prompt greedily.

    Args:
        prompts: token ids, image tokens included.
        images: uint8[n, 3, H, W] a prompt, n possibly 0.
        stop_ids: tokens that end an answer (left out of the result).
        pad_id: any vocabulary row; it is masked.

    Returns:
        New token ids a prompt, at most `max_new_tokens` each.
    """
    was_training = model.training
    model.eval()
    device, longest = model.device, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    embeds = model.embed(ids.to(device), torch.cat(list(images)).to(device))
    with attention(model.language, "sdpa"):
        out = model.language.generate(
            inputs_embeds=embeds,
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )
    model.train(was_training)
    return [_until(row, set(stop_ids)) for row in out.tolist()]


def _until(ids: list[int], stops: set[int]) -> list[int]:
    """Cut a continuation before its first stop token."""
    return next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)
