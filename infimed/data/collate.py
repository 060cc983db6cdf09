"""Encoded samples -> the one row of tensors that a micro-step consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch.nn import functional as F

from infimed.contracts import IGNORE_INDEX, ROWS, Batch, Encoded, Images, borders, bucket
from infimed.processing.resolution import Resolution


def collate(
    encoded: Sequence[Encoded],
    *,
    row_tokens: int,
    pad_id: int,
    resolution: Resolution,
    sources: Sequence[str],
    step: int,
    merged: Sequence[int] | None = None,
    faults: Mapping[str, int] | None = None,
    holes: Sequence[int] = (),
    position: Mapping[str, object] | None = None,
) -> Batch:
    """Lay samples end to end and pad the row to `row_tokens` (T) with one last segment, so that shapes never change.

    merged: how many samples each pack holds, for the parent's way, where a pack is one segment: positions run on and attention
    crosses from one sample to the next. None: positions restart and every sample is a segment.
    """
    lengths = [len(sample.input_ids) for sample in encoded]
    used, numbers = sum(lengths), {source: number for number, source in enumerate(sources)}
    assert used <= row_tokens, f"{used} tokens planned into a row of {row_tokens}"
    assert all(sample.labels[0] == IGNORE_INDEX for sample in encoded), "a first label that is learned from would cross a segment border"
    source_tokens = [0] * len(sources)
    for sample, length in zip(encoded, lengths, strict=True):
        source_tokens[numbers[sample.source]] += length
    if merged is not None:
        left = iter(lengths)
        lengths = [total for count in merged if (total := sum(islice(left, count)))]
    segments = [length for length in (*lengths, row_tokens - used) if length]
    source_ids = [torch.full((len(sample.input_ids),), numbers[sample.source]) for sample in encoded]
    labels = _row([sample.labels for sample in encoded], row_tokens, IGNORE_INDEX)
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    images = Images.join((sample.images for sample in encoded), patch_dim=3 * resolution.patch_size**2)
    return Batch(
        input_ids=_row([sample.input_ids for sample in encoded], row_tokens, pad_id),
        labels=labels,
        position_ids=_row([torch.arange(length) for length in segments], row_tokens, 0),
        rows=F.pad(rows, (0, -len(rows) % ROWS)),
        cu_seqlens=borders(segments),
        max_seqlen=min(bucket(max(segments)), row_tokens),
        images=images,
        source_ids=_row(source_ids, row_tokens, 0),
        sources=tuple(sources),
        keys=tuple(sample.key for sample in encoded),
        lengths=tuple(lengths),
        step=step,
        tokens=used,
        visual_tokens=sum(resolution.tokens(grid) for grid in images.grids),
        supervised_tokens=len(rows),
        source_tokens=tuple(source_tokens),
        faults=dict(faults or {}),
        holes=tuple(holes),
        position=position,
    )


def _row(parts: Sequence[torch.Tensor], length: int, fill: int) -> torch.Tensor:
    """Join int64 parts and pad them: int64[1, length]."""
    row = torch.full((1, length), fill, dtype=torch.int64)
    if parts:
        joined = torch.cat(list(parts))
        row[0, : len(joined)] = joined
    return row
