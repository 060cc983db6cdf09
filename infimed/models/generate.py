"""Greedy answers for many prompts at once: left-padded prefill, then one token a step with a key-value cache.

The loop is ours: transformers' `generate` takes stop tokens, lengths and penalties from a `generation_config.json` that travels with
published weights, and answers would change with the folder that they were loaded from. Greedy only: an evaluation must repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from infimed.contracts import Images, UserError
from infimed.models.attention import attention
from infimed.models.vlm import InfiMed

OnToken = Callable[[int, int], None]
"""Takes the number of a prompt and the next token of its answer."""


@torch.inference_mode()
def generate(
    model: InfiMed,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Images],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt greedily.

    The answers are those of the prompts one by one, up to ties: padding changes the order of sums, hence logits in their last digits.
    An exception of `on_token`, and Ctrl-C, end the call and leave the model as it was.

    Args:
        prompts: token ids, image tokens included.
        images: those of each prompt, possibly none.
        stop_ids: tokens that end an answer (left out of the result).
        pad_id: any vocabulary row; it is masked.
        stop_sequences: runs of tokens that end an answer (left out of the result). The same text may be tokenised in other ways.
        on_token: called with every token of the result as soon as it is known to be part of it.

    Returns:
        New token ids a prompt, at most `max_new_tokens` each.

    Raises:
        UserError: a prompt that is empty or, with its answer, longer than the model reads; fewer than one new token.
        ValueError: image tokens and images of a prompt disagree.
    """
    _check(model, prompts, images, max_new_tokens=max_new_tokens)
    if not prompts:
        return []
    stops = sorted(([*stop] for stop in (*((stop,) for stop in stop_ids), *stop_sequences) if stop), key=len, reverse=True)
    answers = [_Answer(row, stops, on_token) for row in range(len(prompts))]
    with _evaluating(model):
        ids, mask = _left_padded(prompts, pad_id)
        seen = Images.join(images, patch_dim=3 * model.resolution.patch_size**2)
        embeds_BTD = model.embed(ids.to(model.device), seen.to(model.device))
        # Blocks compiled for training stay out of it: a cache that grows would compile them anew at every step.
        with attention(model.language, "sdpa"), torch.compiler.set_stance("force_eager"):
            _decode(model.language, embeds_BTD, mask.to(model.device), answers, steps=max_new_tokens)
    return [answer.ids for answer in answers]


def _decode(language: PreTrainedModel, embeds_BTD: torch.Tensor, mask_BT: torch.Tensor, answers: list[_Answer], *, steps: int) -> None:
    """Fill the answers; a row leaves the batch when its answer ends."""
    cache = DynamicCache(config=language.config)
    embed, head = language.get_input_embeddings(), language.get_output_embeddings()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for _ in range(steps):
        hidden_BTD = language.model(
            inputs_embeds=embeds_BTD, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True
        ).last_hidden_state
        tokens_B = head(hidden_BTD[:, -1]).argmax(1)  # the last position alone: [B, T, V] would be gigabytes
        going = [row for row, (answer, token) in enumerate(zip(answers, tokens_B.tolist(), strict=True)) if answer.take(token)]
        if len(going) < len(answers):
            kept = torch.tensor(going, device=mask_BT.device, dtype=torch.long)
            tokens_B, mask_BT, positions_BT = tokens_B[kept], mask_BT[kept], positions_BT[kept]
            cache.batch_select_indices(kept)
            answers = [answers[row] for row in going]
        if not answers:
            return
        embeds_BTD = embed(tokens_B).unsqueeze(1)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1
    for answer in answers:
        answer.finish()


class _Answer:
    """The tokens of one answer, handed on as soon as no stop can take them back."""

    def __init__(self, row: int, stops: Sequence[list[int]], on_token: OnToken | None) -> None:
        self.ids: list[int] = []
        self._row, self._stops, self._on_token = row, stops, on_token  # longest stop first
        self._told = 0

    def take(self, token: int) -> bool:
        """Add a token; false when it completes a stop, which is then cut off."""
        self.ids.append(token)
        for stop in self._stops:
            if self.ids[-len(stop) :] == stop:
                del self.ids[-len(stop) :]
                self.finish()
                return False
        self._tell(len(self.ids) - max((_overlap(self.ids, stop) for stop in self._stops), default=0))
        return True

    def finish(self) -> None:
        """Hand on what was held back as the beginning of a stop that did not come."""
        self._tell(len(self.ids))

    def _tell(self, upto: int) -> None:
        if self._on_token is not None:
            for token in self.ids[self._told : upto]:
                self._on_token(self._row, token)
            self._told = upto


def _overlap(ids: list[int], stop: list[int]) -> int:
    """Count the tokens at the end of `ids` that begin `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if ids[-n:] == stop[:n]), 0)


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Align prompts at their ends: int64[B, T] ids and int64[B, T] mask, 1 on tokens."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and afterwards back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: InfiMed, prompts: Sequence[Sequence[int]], images: Sequence[Images], *, max_new_tokens: int) -> None:
    """Raise before any work is done."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected a whole number, at least 1")
    limit = getattr(model.language.config, "max_position_embeddings", None)
    for number, (prompt, seen) in enumerate(zip(prompts, images, strict=True)):
        if not prompt:
            raise UserError(f"prompt {number} is empty: there is nothing to continue")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {number} has {len(prompt):,} tokens, with max_new_tokens={max_new_tokens} it makes more than the {limit:,} "
                "that the model reads; shorten the conversation, show fewer images, or lower max_new_tokens"
            )
        tokens, expected = list(prompt).count(model.image_token_id), sum(model.resolution.tokens(grid) for grid in seen.grids)
        if tokens != expected:  # over the whole batch they might agree, and images would answer for each other
            raise ValueError(
                f"prompt {number} holds {tokens} image tokens, but its {len(seen)} images make {expected}: "
                "render it with the model's own resolution (processing/chat.py)"
            )
