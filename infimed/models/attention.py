"""Packed attention: many samples in one row, none of which sees another. One interface, several kernels.

Registered under transformers' `AttentionInterface`; the names are unknown to its mask registry on purpose, so that no T x T mask is ever
built and no look at `position_ids` decides anything. The segment borders (`cu_seqlens`) are the only truth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import groupby, pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface, PreTrainedModel

from infimed.contracts import UserError
from infimed.models import kernels
from infimed.models.kernels import Segments

PACKED = "infimed_packed"
"""transformers' name of packed attention with the kernel chosen by device and dtype (`auto`)."""

log = logging.getLogger(__name__)


def packed_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    is_causal: bool | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    kernel: str = "auto",
    **features: object,
) -> tuple[torch.Tensor, None]:
    """Attend inside each segment of a packed row; transformers' attention signature.

    Args:
        query_BHTD: float[1, H, T, D]; keys and values may have fewer heads.
        attention_mask: must be None: the segments are the mask.
        cu_seq_lens_q: int32[S + 1], 0 ... T; may end in repeated T (empty segments).
        max_length_q: at least the longest segment. On a GPU neither is checked: that would wait for the device.
        is_causal: None asks `module.is_causal`, so that one function serves a decoder and a vision tower.
        sliding_window: refused where it could matter, as is every feature that not all kernels share.

    Returns:
        float[1, T, H, D] and no attention weights.

    Raises:
        UserError: a mask, several rows, a key-value cache, an unsupported feature, or a kernel that cannot run here.
    """
    if attention_mask is not None or query_BHTD.shape[0] != 1:
        raise UserError(f"packed attention takes one row and no mask; got {query_BHTD.shape[0]} rows, mask {attention_mask is not None}")
    if key_BHTD.shape[2] != query_BHTD.shape[2]:
        raise UserError(
            f"packed attention has no key-value cache ({key_BHTD.shape[2]} keys, {query_BHTD.shape[2]} queries); use_cache=False"
        )
    asked = [name for name in ("softcap", "s_aux", "position_bias") if features.get(name) is not None]
    if dropout or asked or (sliding_window is not None and sliding_window < max_length_q):
        raise UserError(f"packed attention has no {dropout=}, {sliding_window=} or {asked}; switch it off in the model's config")
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise UserError(f"{type(module).__name__} does not say whether it is causal; pass is_causal=True or is_causal=False")
    # Autocast leaves what a norm has touched in float32, here queries and keys, and would send every GPU run down the slow path.
    device, dtype = value_BHTD.device, value_BHTD.dtype
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    query_THD, key_THD, value_THD = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query_BHTD, key_BHTD, value_BHTD))
    run = KERNELS[resolve(kernel, device=device, dtype=dtype)].run
    return run(query_THD, key_THD, value_THD, Segments(cu_seq_lens_q, max_length_q, bool(causal), scaling)).unsqueeze(0), None


def _sdpa(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Run torch's SDPA a segment, or a run of equally long segments, at a time. Waits for the device: not for a GPU's hot path."""
    known = type(segments.cu) is torch.Tensor and not segments.cu.is_meta and not torch.compiler.is_compiling()
    return (_segment_loop if known else _packed_sdpa)(query_THD, key_THD, value_THD, *segments)


def _segment_loop(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    borders, tokens = cu.tolist(), query_THD.shape[0]
    lengths = [end - start for start, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != tokens or min(lengths) < 0 or max(lengths) > longest:
        raise UserError(f"cu_seq_lens_q must rise from 0 to {tokens} in steps of at most max_length_q = {longest}; got {borders}")
    rows = [x.transpose(0, 1).unsqueeze(0) for x in (query_THD, key_THD, value_THD)]  # [1, heads, T, D]
    batches = [(length, len(list(run))) for length, run in groupby(n for n in lengths if n)]
    sizes = [length * count for length, count in batches]
    out = []
    for (length, count), part in zip(batches, zip(*(x.split(sizes, dim=2) for x in rows), strict=True), strict=True):
        if count > 1:
            part = [x.unflatten(2, (count, length)).transpose(0, 2).squeeze(2) for x in part]  # [count, heads, length, D]
        attended = F.scaled_dot_product_attention(*part, is_causal=causal, scale=scale, enable_gqa=True)
        out.append(attended.unsqueeze(2).transpose(0, 2).flatten(2, 3) if count > 1 else attended)
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


@torch.library.custom_op("infimed::packed_sdpa", mutates_args=())
def _packed_sdpa(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Hide the loop, whose shapes depend on data, from whoever traces: torch.compile, the meta device, fake tensors."""
    return _segment_loop(query_THD, key_THD, value_THD, cu, longest, causal, scale).contiguous()


@torch.library.custom_op("infimed::packed_sdpa_backward", mutates_args=())
def _packed_sdpa_backward(
    grad_THD: torch.Tensor,
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Runs the forward again. `vjp` because an op's body runs below autograd, where `requires_grad` records nothing.
    _, vjp = torch.func.vjp(lambda *qkv: _segment_loop(*qkv, cu, longest, causal, scale), query_THD, key_THD, value_THD)
    dq, dk, dv = (grad.contiguous() for grad in vjp(grad_THD))
    return dq, dk, dv


@_packed_sdpa.register_fake
def _(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, *_: object) -> torch.Tensor:
    return query_THD.new_empty(*query_THD.shape[:2], value_THD.shape[2])


@_packed_sdpa_backward.register_fake
def _(grad_THD: torch.Tensor, *inputs: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_packed_sdpa_backward(grad_THD, *ctx.saved_tensors, *ctx.options), None, None, None, None


_packed_sdpa.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.infimed.packed_sdpa, get_raw=True)
def _forward_flops(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, cu: torch.Tensor, *_: object, **__: object
) -> int:
    # As torch counts attention: two products, nothing saved by causality. Borders without values (meta) count as one segment.
    pairs = query_THD.shape[0] ** 2 if cu.is_meta else int(cu.diff().long().square().sum())
    return 2 * query_THD.shape[1] * pairs * (query_THD.shape[2] + value_THD.shape[2])


@register_flop_formula(torch.ops.infimed.packed_sdpa_backward, get_raw=True)
def _backward_flops(grad_THD: torch.Tensor, *inputs: torch.Tensor, **__: object) -> int:
    return 2 * _forward_flops(*inputs)  # the forward run again is not counted: it is no work of the model


@dataclass(frozen=True)
class Kernel:
    """One way to compute packed attention, and what it needs."""

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]  # q, k, v [T, heads, D] -> [T, heads, D]
    devices: tuple[str, ...] = ("cuda",)
    half_only: bool = True
    capability: int = 0  # least major compute capability of the GPU
    module: str = ""  # the package that has it ...
    install: str = ""  # ... and how to get that


FLASH = "github.com/Dao-AILab/flash-attention"
KERNELS = {
    "sdpa": Kernel(_sdpa, devices=("cpu", "cuda", "mps", "xpu", "meta"), half_only=False),
    "varlen": Kernel(kernels.varlen, capability=8),
    "flash2": Kernel(kernels.flash2, capability=8, module="flash_attn", install="pip install flash-attn --no-build-isolation"),
    "flash3": Kernel(kernels.flash3, capability=9, module="flash_attn_interface", install=f"build `hopper/` of {FLASH}"),
    "flash4": Kernel(kernels.flash4, capability=9, module="flash_attn.cute", install="pip install --pre flash-attn-4"),
    "flex": Kernel(kernels.flex, devices=("cpu", "cuda"), half_only=False, capability=7),
}
"""The kernels by the names that a config uses."""


def implementation(kernel: str) -> str:
    """Give transformers' name of `auto` or of a kernel, for `set_attn_implementation`."""
    if kernel != "auto" and kernel not in KERNELS:
        raise UserError(f"attention={kernel!r}: unknown; choose auto, {', '.join(KERNELS)}")
    # A name that holds "flash" sends transformers looking for a package of its own.
    return PACKED if kernel == "auto" else f"infimed_{kernel.replace('flash', 'fa')}"


# Traced code takes the answer as a constant: what is installed does not change, device and dtype are guarded anyway.
@torch.compiler.assume_constant_result
def resolve(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernel that runs and log it once: `auto` is `varlen` where that can run, else `sdpa`; on the meta device all are `sdpa`.

    Raises:
        UserError: a kernel was asked for by name and cannot run here: why, and what to do.
    """
    return _resolve(kernel, device, dtype)


@cache
def _resolve(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    implementation(kernel)  # refuses an unknown name
    reason = _obstacle("varlen" if kernel == "auto" else kernel, device, dtype)
    if device.type == "meta":  # shapes alone, and these are the same for every kernel
        chosen = "sdpa"
    elif kernel == "auto":
        chosen = "sdpa" if reason else "varlen"
    elif reason:
        raise UserError(f"attention={kernel} cannot run on {device} with {dtype}: {reason}. attention=auto takes the best that can")
    else:
        chosen = kernel
    log.info("packed attention: %s on %s, %s%s", chosen, device, dtype, f" (not varlen: {reason})" if kernel == "auto" and reason else "")
    return chosen


def _obstacle(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a kernel cannot run, if so."""
    need = KERNELS[kernel]
    if device.type not in need.devices:
        return f"it runs on {' and '.join(need.devices)}"
    if need.half_only and dtype not in (torch.bfloat16, torch.float16):
        return "it takes bfloat16 and float16 alone; set trainer.precision=bf16-mixed or bf16-true"
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (need.capability, 0):
        return f"it needs compute capability {need.capability}.0, this GPU has {'.'.join(map(str, found))}"
    try:
        if need.module:
            _ = import_module(need.module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        return f"{error}; {need.install}"
    return None


@contextmanager
def attention(language: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a block with another attention, e.g. transformers' `sdpa` for batched decoding with a key-value cache."""
    before = language.config._attn_implementation
    language.set_attn_implementation(name)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


for _kernel in ("auto", *KERNELS):
    AttentionInterface.register(implementation(_kernel), partial(packed_attention, kernel=_kernel))
