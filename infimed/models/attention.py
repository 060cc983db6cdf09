"""Packed attention: many samples in one row, none of which sees another.

Registered under transformers' `AttentionInterface`; the name is unknown to its mask registry on purpose, so that no T x T mask is ever
built and no look at `position_ids` decides anything. The segment borders (`cu_seqlens`) are the only truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

PACKED = "infimed_packed"


def packed_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend causally inside each segment of a packed row; transformers' attention signature.

    Args:
        query_BHTD: float[1, heads, T, D]; keys and values may have fewer heads (grouped-query attention).
        attention_mask: must be None: the segments are the mask.
        cu_seq_lens_q: int32[segments + 1], 0 ... T.
        max_length_q: the longest segment.

    Returns:
        float[1, T, heads, D] and no attention weights.
    """
    if attention_mask is not None or query_BHTD.shape[0] != 1:
        raise ValueError(f"packed attention takes one row and no mask; got {query_BHTD.shape[0]} rows, mask {attention_mask is not None}")
    # Autocast leaves what a norm has touched in float32, here queries and keys, and would send every GPU run down the slow path.
    query_BHTD, key_BHTD = query_BHTD.to(value_BHTD.dtype), key_BHTD.to(value_BHTD.dtype)
    if query_BHTD.is_cuda and query_BHTD.dtype in (torch.bfloat16, torch.float16):
        out_THD = _varlen(query_BHTD[0], key_BHTD[0], value_BHTD[0], cu_seq_lens_q, max_length_q, scaling)
        return out_THD.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True) for q, k, v in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _varlen(
    query_HTD: torch.Tensor, key_HTD: torch.Tensor, value_HTD: torch.Tensor, cu: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:
    """Run torch's variable-length kernel (flash-attention 2 inside torch; CUDA, half precision). Returns [T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.transpose(0, 1) for x in (query_HTD, key_HTD, value_HTD))
    extra = {"scale": scaling}
    if "enable_gqa" in signature(varlen_attn).parameters:
        extra["enable_gqa"] = True
    else:  # torch 2.11 has no flag for it
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(query, key, value, cu, cu, longest, longest, window_size=(-1, 0), **extra)


@contextmanager
def attention(language: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a block with another attention, e.g. transformers' `sdpa` for batched decoding with a key-value cache."""
    before = language.config._attn_implementation
    language.set_attn_implementation(name)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


AttentionInterface.register(PACKED, packed_attention)
