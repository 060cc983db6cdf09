"""Encoded samples -> the one row of tensors that a micro-step consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch

from infimed.contracts import IGNORE_INDEX, Batch, Encoded
from infimed.data.encode import no_pixels


def collate(
    encoded: Sequence[Encoded],
    *,
    row_tokens: int,
    pad_id: int,
    image_size: int,
    visual_tokens: int,
    sources: Sequence[str],
    step: int,
    isolate: bool = True,
    faults: Mapping[str, int] | None = None,
) -> Batch:
    """Lay samples end to end and pad the row to `row_tokens` (T) with one last segment, so that shapes never change.

    visual_tokens: tokens an image. isolate: positions restart and every sample is a segment; otherwise the parent's way, where all samples
    are one segment with positions running on and attention crosses from one to the next.
    """
    lengths = [len(sample.input_ids) for sample in encoded]
    used, numbers = sum(lengths), {source: number for number, source in enumerate(sources)}
    assert used <= row_tokens, f"{used} tokens planned into a row of {row_tokens}"
    assert all(sample.labels[0] == IGNORE_INDEX for sample in encoded), "a first label that is learned from would cross a segment border"
    segments = (lengths if isolate else [used]) + [row_tokens - used]
    segments = [length for length in segments if length]
    source_ids = [torch.full((len(sample.input_ids),), numbers[sample.source]) for sample in encoded]
    labels = _row([sample.labels for sample in encoded], row_tokens, IGNORE_INDEX)
    pixels = [sample.pixel_values for sample in encoded if len(sample.pixel_values)]
    images = torch.cat(pixels) if pixels else no_pixels(image_size)
    return Batch(
        input_ids=_row([sample.input_ids for sample in encoded], row_tokens, pad_id),
        labels=labels,
        position_ids=_row([torch.arange(length) for length in segments], row_tokens, 0),
        cu_seqlens=torch.tensor([0, *segments]).cumsum(0).to(torch.int32),
        max_seqlen=max(segments),
        pixel_values=images,
        source_ids=_row(source_ids, row_tokens, 0),
        sources=tuple(sources),
        keys=tuple(sample.key for sample in encoded),
        step=step,
        tokens=used,
        visual_tokens=visual_tokens * len(images),
        supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        faults=dict(faults or {}),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on a device."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def _row(parts: Sequence[torch.Tensor], length: int, fill: int) -> torch.Tensor:
    """Join int64 parts and pad them: int64[1, length]."""
    row = torch.full((1, length), fill, dtype=torch.int64)
    if parts:
        joined = torch.cat(list(parts))
        row[0, : len(joined)] = joined
    return row
