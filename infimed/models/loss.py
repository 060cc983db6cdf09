"""Cross-entropy of a linear head, in chunks of supervised rows: logits of the whole row never exist."""

from __future__ import annotations

from typing import NamedTuple

import torch

from infimed.contracts import IGNORE_INDEX


class Loss(NamedTuple):
    """What a row of tokens costs, as a sum: who divides, and by what, is the trainer's business."""

    total: torch.Tensor  # float32[], sum over supervised tokens, differentiable
    per_token: torch.Tensor  # float32[R], the same loss token by token, detached
    targets_at: torch.Tensor  # int64[R], flat position (b * T + t) of each target token


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`; gradients are computed chunk by chunk during the forward pass."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, chunk):  # noqa: ANN001, ANN205
        grad_hidden = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        # float32: a bf16 running sum over many chunks would lose small contributions
        grad_weight = (
            torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32)) if ctx.needs_input_grad[1] else None
        )
        losses = []
        for start in range(0, len(targets_R), chunk):
            rows = slice(start, start + chunk)
            hidden, target = hidden_RD[rows], targets_R[rows].unsqueeze(1)
            logits = (hidden @ weight_VD.T).to(torch.promote_types(hidden.dtype, torch.float32))
            log_z = logits.logsumexp(1, keepdim=True)
            losses.append((log_z - logits.gather(1, target)).squeeze(1))
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_z).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight_VD
            if grad_weight is not None:
                grad_weight += grad.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight_VD.dtype
        per_token = torch.cat(losses)
        ctx.mark_non_differentiable(per_token)
        return per_token.sum(), per_token

    @staticmethod
    def backward(ctx, grad_total, _):  # noqa: ANN001, ANN205
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.dtype),
            None,
            None,
        )


def linear_cross_entropy(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, *, chunk: int = 2048) -> Loss:
    """Sum the next-token cross-entropy over supervised tokens.

    Token t is predicted from the hidden state at t - 1; the first label of every segment is IGNORE_INDEX, so nothing crosses a border.

    Args:
        hidden_BTD: float[B, T, D] last hidden states.
        weight_VD: float[V, D] head weights.
        labels_BT: int64[B, T].
        chunk: rows whose logits exist at a time.

    Returns:
        The sum and its parts; with no supervised token a zero that is still part of the graph.
    """
    targets = labels_BT.clone()
    targets[:, 0] = IGNORE_INDEX
    targets_at = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    hidden_RD = hidden_BTD.flatten(0, 1)[targets_at - 1]
    if len(targets_at) == 0:
        return Loss(hidden_RD.float().sum() + 0.0 * weight_VD[0, 0].float(), hidden_RD.new_zeros(0).float(), targets_at)
    total, per_token = _LinearCrossEntropy.apply(hidden_RD, weight_VD, targets.flatten()[targets_at], chunk)
    return Loss(total, per_token, targets_at)
