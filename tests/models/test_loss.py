from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from infimed.models.loss import linear_cross_entropy


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (2, 33))
    labels[torch.rand(2, 33) < 0.6] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_full_loss_and_its_gradients(problem, chunk):
    hidden, weight, labels = problem
    expected = torch.autograd.grad(3 * plain(hidden, weight, labels), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    found = torch.autograd.grad(3 * loss.total, (hidden, weight))
    assert torch.allclose(loss.total, plain(hidden, weight, labels), rtol=1e-12)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() < 1e-12


def test_the_parts_say_which_token_cost_what(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight, labels, chunk=5)
    assert torch.allclose(loss.per_token.sum(), loss.total)
    targets = labels.flatten()[loss.targets_at]
    assert (targets != -100).all()
    row = int(loss.targets_at[0])
    expected = F.cross_entropy((hidden.flatten(0, 1)[row - 1] @ weight.T).unsqueeze(0), targets[:1])
    assert torch.allclose(loss.per_token[0], expected)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do(problem):
    hidden, weight, labels = problem
    linear_cross_entropy(hidden, weight.detach(), labels).total.backward()
    assert hidden.grad.abs().sum() > 0


def test_no_supervised_token_costs_nothing_and_is_no_nan(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.total.backward()
    assert loss.total == 0
    assert len(loss.per_token) == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_the_first_token_of_a_row_is_never_predicted_from_another_row(problem):
    hidden, weight, labels = problem
    labels[:, 0] = 3
    assert not {0, 33} & set(linear_cross_entropy(hidden, weight, labels).targets_at.tolist())
