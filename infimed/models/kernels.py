"""The packed-attention kernels of an accelerator: torch's varlen, flash-attention 2, 3 and 4, flex attention.

Each takes queries [T, H, D], keys and values with as many or fewer heads (grouped-query attention) and the segments, returns [T, H, D],
and never waits for the device. `attention.py` chooses among them and holds the one for any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from infimed.contracts import UserError

VARLEN_TAKES_GQA = "enable_gqa" in signature(varlen_attn).parameters  # not in torch 2.11
BLOCK = 128  # tokens a side of flex attention's tiles


class Segments(NamedTuple):
    """Where the segments of a row lie and how each attends to itself."""

    cu: torch.Tensor  # int32[S + 1]: 0 ... T, never falling; a repeated value is an empty segment
    longest: int  # at least the longest segment, so that it may be rounded up to one of a few values
    causal: bool
    scale: float | None  # None: 1 / sqrt(D)


def varlen(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run torch's variable-length kernel (flash-attention 2 inside torch)."""
    cu, longest, causal, scale = segments
    options = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if VARLEN_TAKES_GQA:
        options["enable_gqa"] = True
    else:
        key_THD, value_THD = (x.repeat_interleave(query_THD.shape[1] // x.shape[1], dim=1) for x in (key_THD, value_THD))
    return varlen_attn(query_THD, key_THD, value_THD, cu, cu, longest, longest, **options)


def flash2(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run flash-attention 2. Source: github.com/Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py`."""
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, query_THD, key_THD, value_THD, segments)


def flash3(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run flash-attention 3. Source: github.com/Dao-AILab/flash-attention, `hopper/flash_attn_interface.py`."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, query_THD, key_THD, value_THD, segments)


def flash4(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run flash-attention 4. Source: github.com/Dao-AILab/flash-attention, `flash_attn/cute/interface.py`."""
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, query_THD, key_THD, value_THD, segments)


def _flash(
    run: Callable[..., torch.Tensor | tuple], query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    cu, longest, causal, scale = segments
    borders = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out = run(query_THD, key_THD, value_THD, **borders, softmax_scale=scale, causal=causal)
    return out[0] if isinstance(out, tuple) else out  # version 4 and early builds of 3 add the log-sum-exp


def flex(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run torch's flex attention, compiled on a GPU; on the CPU it has a forward only."""
    if query_THD.device.type == "cpu" and torch.is_grad_enabled() and query_THD.requires_grad:
        raise UserError("attention=flex has no backward pass on a CPU: take attention=auto")
    mask = _cached_block_mask(segments.cu, query_THD.shape[0], segments.causal)
    run = _fused_flex() if query_THD.is_cuda and not torch.compiler.is_compiling() else flex_attention
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query_THD, key_THD, value_THD))
    return run(query, key, value, block_mask=mask, scale=segments.scale, enable_gqa=True).squeeze(0).transpose(0, 1)


@cache
def _fused_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)  # uncompiled it would hold the T x T scores


_last: tuple[tuple, BlockMask] | None = None


def _cached_block_mask(cu: torch.Tensor, tokens: int, causal: bool) -> BlockMask:
    """Build the mask of a row once for all layers. Compiled code builds it in its own graph, a few small operations."""
    global _last
    if torch.compiler.is_compiling() or cu.is_inference():  # the latter's changes are not counted
        return block_mask(cu, tokens, causal=causal)
    # The tensor itself is kept, so that its identity cannot pass to another one; its version tells when it was written to.
    key = (cu._version, tokens, causal)
    if _last is None or _last[0] is not cu or _last[1] != key:
        _last = (cu, key, block_mask(cu, tokens, causal=causal))
    return _last[2]


def block_mask(cu: torch.Tensor, tokens: int, *, causal: bool) -> BlockMask:
    """Say which 128 x 128 tiles hold a pair of tokens that may attend, from the borders alone: no T x T tensor on the way."""
    tiles = (tokens + BLOCK - 1) // BLOCK
    position = torch.arange(tiles * BLOCK, device=cu.device, dtype=cu.dtype)
    segment = torch.searchsorted(cu, position, right=True)  # what lies past the row has a number of its own

    def allowed(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = segment[query] == segment[key]
        return same & (query >= key) if causal else same

    first, last = segment[::BLOCK], segment[BLOCK - 1 :: BLOCK]
    some = (first[:, None] <= last) & (first <= last[:, None])  # numbers rise along the row: intervals that overlap share a segment
    every = (first[:, None] == last) & (first == last[:, None])
    if causal:
        tile = torch.arange(tiles, device=cu.device)
        some, every = some & (tile[:, None] >= tile), every & (tile[:, None] > tile)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(tokens, tokens)
    )


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn bool[rows, columns] into flex attention's count and list of columns a row."""
    count = tiles.sum(-1, dtype=torch.int32)
    columns = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], columns[None, None]
