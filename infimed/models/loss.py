"""Cross-entropy of a linear head over supervised rows only, in chunks: logits of a whole row of tokens never exist.

Shape letters: B packs, T tokens, D width, V vocabulary, R supervised tokens (and padding), C rows of one chunk.

The head's products run in the dtype of its inputs (autocast's, under autocast), softmax and sums in float32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from infimed.contracts import IGNORE_INDEX, UserError

Kernel = Literal["chunked", "liger", "full"]

SOFTMAX_ROWS = 256
"""Rows of half-precision logits that are widened to float32 at a time."""

WEIGHT_ROWS = 8192
"""Rows of the head whose half-precision gradient exists before it is added to the float32 sum, where no kernel adds it directly."""


class Loss(NamedTuple):
    """What a row of tokens costs, as a sum: who divides, and by what, is the trainer's business."""

    total: torch.Tensor  # float32[], weighted sum over supervised tokens, differentiable
    per_token: torch.Tensor  # float32[R], the unweighted loss token by token, detached; 0 on padding
    targets_at: torch.Tensor  # int64[R], flat position (b * T + t) of each target token; 0, which is never a target, on padding

    def by_source(self, source_ids_BT: torch.Tensor, sources: int) -> torch.Tensor:
        """Sum by source, with no stall on a GPU.

        Args:
            source_ids_BT: int64[B, T] source of each token, below `sources`.
            sources: how many there are.

        Returns:
            float64[2, sources]: unweighted loss sums and numbers of supervised tokens.
        """
        real_R = (self.targets_at > 0).double()
        source_R = source_ids_BT.flatten()[self.targets_at]
        return real_R.new_zeros(2, sources).index_add_(1, source_R, torch.stack([self.per_token.double(), real_R]))


def linear_cross_entropy(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BT: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    weights_BT: torch.Tensor | None = None,
    chunk: int | None = None,
    kernel: Kernel = "chunked",
    compiled: bool = False,
) -> Loss:
    """Sum the next-token cross-entropy over supervised tokens.

    Token t is predicted from the hidden state at t - 1; the first label of every segment is IGNORE_INDEX, so nothing crosses a border.

    Args:
        hidden_BTD: float[B, T, D] last hidden states.
        weight_VD: float[V, D] head weights.
        labels_BT: int64[B, T].
        rows: int64[R] flat positions (b * T + t) of the supervised tokens, padded with 0, whose label is never learned from. None finds
            them here, which stalls a GPU and cannot be done on the meta device.
        weights_BT: float[B, T] constant factor of each token's loss in the total and in the gradients.
        chunk: rows whose logits exist at a time; None takes `default_chunk`. Only for `chunked`, like `compiled`.
        kernel: `chunked` computes gradients in the forward pass, a chunk of rows at a time; `full` holds the logits of all supervised rows,
            the plain way; `liger` is liger-kernel's fused loss (CUDA; it stalls the host once, and computes logits twice).
        compiled: fuse the softmax of a chunk with torch.compile, once a process for every number of rows above one.

    Returns:
        The sum and its parts; with no supervised token a zero that is still part of the graph.

    Raises:
        UserError: an unknown kernel, a chunk below 1, or liger where it cannot run.
    """
    if kernel not in get_args(Kernel):
        raise UserError(f"loss kernel {kernel!r} is unknown; choose one of {', '.join(get_args(Kernel))}")
    if chunk is not None and chunk < 1:
        raise UserError(f"loss chunk {chunk} has no rows; give at least 1, or nothing for {default_chunk(hidden_BTD.device)}")
    if not torch.is_grad_enabled():  # autograd would still report that gradients are needed
        hidden_BTD, weight_VD = hidden_BTD.detach(), weight_VD.detach()
    supervised_BT = labels_BT != IGNORE_INDEX
    supervised_BT[:, 0] = False  # has no predecessor in its row
    if rows is None:
        rows = supervised_BT.flatten().nonzero().squeeze(1)
    real_R = supervised_BT.flatten()[rows]
    targets_at = rows * real_R
    target_R = labels_BT.flatten()[targets_at].clamp(min=0)
    scale_R = real_R.to(_float32_or_wider(hidden_BTD.dtype))
    if weights_BT is not None:
        scale_R = scale_R * weights_BT.detach().flatten()[targets_at].to(scale_R.dtype)
    # index_select, not indexing: its backward adds without sorting. The predecessor of padding is a real state with a factor of 0
    hidden_RD = hidden_BTD.flatten(0, 1).index_select(0, (targets_at - 1).clamp(min=0))
    if kernel == "chunked":
        total, loss_R = _Chunked.apply(hidden_RD, weight_VD, target_R, scale_R, chunk or default_chunk(hidden_RD.device), compiled)
    else:
        # liger cannot take an empty row; nothing is lost without it there
        loss_R = (_liger if kernel == "liger" and len(rows) else _full)(hidden_RD, weight_VD, target_R)
        total = (loss_R * scale_R).sum()
    return Loss(total, loss_R.detach() * real_R, targets_at)


def default_chunk(device: torch.device) -> int:
    """Return how many rows of logits exist at a time.

    A GPU wants large products: 2048 rows of a vocabulary of 151,936 are 0.6 GiB in bf16. On a CPU the time a row is flat from 256 rows up
    (measured at that vocabulary), so there the smaller buffer costs nothing.
    """
    return 2048 if device.type == "cuda" else 512


class _Chunked(torch.autograd.Function):
    """Weighted sum of cross-entropies of `hidden @ weight.T`, with its gradients from the same pass."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, scale_R, chunk, compiled):  # noqa: ANN001, ANN205
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype
        hidden_RD, weight_VD = _autocast(hidden_RD, weight_VD)
        # float32: a bf16 running sum over many chunks would lose small contributions
        wide = _float32_or_wider(weight_VD.dtype)
        grad_hidden_RD = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        gradient = grad_hidden_RD is not None or grad_weight_VD is not None
        softmax_ = _softmax_compiled_ if compiled else _softmax_by_rows_
        loss_R, target_R1, scale_R1 = torch.empty_like(target_R, dtype=wide), target_R.unsqueeze(1), scale_R.unsqueeze(1)
        buffer_CV = hidden_RD.new_empty(min(chunk, len(target_R)), len(weight_VD))  # one for all chunks: on a CPU fresh pages take time
        for start, stop in pairwise(_bounds(len(target_R), chunk)):
            part = slice(start, stop)
            logits_CV = torch.mm(hidden_RD[part], weight_VD.T, out=buffer_CV[: stop - start])
            loss_C1 = softmax_(logits_CV, target_R1[part], scale_R1[part], gradient=gradient)
            loss_R[part] = loss_C1.squeeze(1)
            if gradient:
                # probability - 1 at the target, rounded once: the logits may be bf16
                grad_CV = logits_CV.scatter_(1, target_R1[part], (torch.expm1(-loss_C1) * scale_R1[part]).to(logits_CV.dtype))
            if grad_hidden_RD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_RD[part])
            if grad_weight_VD is not None:
                _add_outer_(grad_weight_VD, grad_CV, hidden_RD[part])
        ctx.save_for_backward(grad_hidden_RD, grad_weight_VD)
        ctx.mark_non_differentiable(loss_R)
        return (loss_R * scale_R).sum(), loss_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):  # noqa: ANN001, ANN205
        # A graph that is not kept frees these tensors right after: scale them where they are, and never ask a GPU whether the factor is 1.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if g is None else (g * grad_total if kept else g.mul_(grad_total)).to(dtype) for g, dtype in grads]
        return *scaled, None, None, None, None


def _softmax_(logits_CV: torch.Tensor, target_C1: torch.Tensor, scale_C1: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Return the cross-entropies float32[C, 1] and leave `scale * softmax` in the logits' memory (scratch without `gradient`).

    Reductions and element-wise steps only, all in place: eager needs no second buffer (logsumexp would take one) and a compiler fuses them.
    """
    z_CV = logits_CV.to(_float32_or_wider(logits_CV.dtype))
    z_CV.sub_(z_CV.amax(1, keepdim=True))
    chosen_C1 = z_CV.gather(1, target_C1)
    norm_C1 = z_CV.exp_().sum(1, keepdim=True)
    if gradient:
        z_CV.mul_(scale_C1 / norm_C1)
        if z_CV is not logits_CV:
            logits_CV.copy_(z_CV)
    return norm_C1.log() - chosen_C1


def _softmax_by_rows_(logits_CV: torch.Tensor, target_C1: torch.Tensor, scale_C1: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Run `_softmax_` over a few rows at a time, so that half-precision logits are never widened all at once."""
    parts = zip(*(t.split(SOFTMAX_ROWS) for t in (logits_CV, target_C1, scale_C1)), strict=True)
    return torch.cat([_softmax_(*part, gradient=gradient) for part in parts])


def _softmax_compiled_(logits_CV: torch.Tensor, target_C1: torch.Tensor, scale_C1: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Run `_softmax_` as one kernel or two; detached, because a compiler would guard on the size of what the slices are slices of."""
    return _compile_softmax()(logits_CV.detach(), target_C1.detach(), scale_C1.detach(), gradient=gradient)


@cache
def _compile_softmax() -> Callable[..., torch.Tensor]:
    return torch.compile(_softmax_, dynamic=True, fullgraph=True)


def _add_outer_(grad_weight_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """Add `grad.T @ hidden` to the float32 sum without a temporary of its size."""
    if grad_weight_VD.dtype == grad_CV.dtype:
        grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
    elif grad_CV.is_cuda:
        torch.addmm(grad_weight_VD, grad_CV.T, hidden_CD, out_dtype=grad_weight_VD.dtype, out=grad_weight_VD)
    else:
        for sums, grad in zip(grad_weight_VD.split(WEIGHT_ROWS), grad_CV.split(WEIGHT_ROWS, dim=1), strict=True):
            sums.add_(grad.T @ hidden_CD)


def _full(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    logits_RV = F.linear(hidden_RD, weight_VD)
    return F.cross_entropy(logits_RV.to(_float32_or_wider(logits_RV.dtype)), target_R, reduction="none")


def _liger(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    """Call liger-kernel 0.8.5 or newer: older ones mistake the factors of single tokens in the backward pass.

    Source: liger_kernel/transformers/fused_linear_cross_entropy.py.
    """
    fix = "take kernel=chunked, or a CUDA device and `pip install 'infimed[gpu]'`"
    if not hidden_RD.is_cuda:
        raise UserError(f"loss kernel liger needs a CUDA device and the tensors are on {hidden_RD.device.type}; {fix}")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise UserError(f"loss kernel liger needs liger-kernel>=0.8.5, which cannot be imported ({error}); {fix}") from error
    return LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)(weight_VD, hidden_RD, target_R)


def _bounds(rows: int, chunk: int) -> list[int]:
    """Cut rows into chunks of almost one size: no small last product, and none of a single row, which torch.compile would specialise on."""
    count = -(-rows // chunk)
    return [rows * i // count for i in range(count + 1)] if count else []


def _float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast as autocast would: it does not reach products that write into given memory."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
