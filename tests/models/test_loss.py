from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infimed.contracts import UserError
from infimed.models import loss as loss_module
from infimed.models.loss import Loss, linear_cross_entropy


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    logits = hidden @ weight.T
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(torch.float64), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return (each if weights is None else each * weights[:, 1:].flatten()).sum()


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """Do what the collator does: flat positions, padded with 0 to a multiple of 16."""
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    return F.pad(rows, (0, -len(rows) % 16))


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (2, 33))
    labels[torch.rand(2, 33) < 0.6] = -100
    labels[:, 0] = -100
    return hidden, weight, labels


class Memory(TorchDispatchMode):
    """Watch what operations return: the largest tensor, and how many new storages of at least `watched` elements live at once."""

    def __init__(self, watched: int) -> None:
        super().__init__()
        self.watched, self.largest, self.at_once, self.ops = watched, 0, 0, []
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ops.append(func)
        taken = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.watched * tensor.element_size() and storage._cdata not in taken:
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        self.storages = {key: s for key, s in self.storages.items() if not s.expired()}
        self.at_once = max(self.at_once, len(self.storages))
        return out


@pytest.mark.parametrize("given", [False, True], ids=["found", "given and padded"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_full_loss_and_its_gradients(problem, chunk, weighted, given):
    hidden, weight, labels = problem
    weights = torch.rand(2, 33, dtype=torch.float64) if weighted else None
    expected = torch.autograd.grad(3 * plain(*problem, weights), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, weights_BT=weights, rows=supervised(labels) if given else None)
    found = torch.autograd.grad(3 * loss.total, (hidden, weight))
    assert torch.allclose(loss.total, plain(*problem, weights), rtol=1e-14, atol=0)  # worst seen 1.2e-16
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() < 1e-13  # worst seen 9.8e-15


def test_the_full_kernel_is_the_plain_loss_too(problem):
    hidden, weight, labels = problem
    weights = torch.rand(2, 33, dtype=torch.float64)
    expected = torch.autograd.grad(plain(*problem, weights), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, weights_BT=weights, rows=supervised(labels), kernel="full")
    assert torch.allclose(loss.total, plain(*problem, weights), rtol=1e-14, atol=0)
    for f, e in zip(torch.autograd.grad(loss.total, (hidden, weight)), expected, strict=True):
        assert (f - e).abs().max() < 1e-13
    assert torch.allclose(loss.per_token, linear_cross_entropy(*problem, rows=supervised(labels)).per_token)
    assert not loss.per_token.requires_grad


def test_the_parts_say_which_token_cost_what(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight, labels, chunk=5, weights_BT=torch.full((2, 33), 2.0))
    assert torch.allclose(2 * loss.per_token.sum(), loss.total)  # the parts are not weighted
    targets = labels.flatten()[loss.targets_at]
    assert (targets != -100).all()
    row = int(loss.targets_at[0])
    expected = F.cross_entropy((hidden.flatten(0, 1)[row - 1] @ weight.T).unsqueeze(0), targets[:1])
    assert torch.allclose(loss.per_token[0], expected)


def test_padded_rows_cost_nothing_wherever_they_stand(problem):
    hidden, weight, labels = problem
    rows = supervised(labels)[: int((labels != -100).sum())]
    padded = torch.cat([torch.zeros(9, dtype=torch.int64), rows, torch.zeros(40, dtype=torch.int64)])
    loss = linear_cross_entropy(hidden, weight, labels, rows=padded, chunk=8)
    exact = linear_cross_entropy(hidden, weight, labels, rows=rows)
    assert torch.allclose(loss.total, exact.total, rtol=1e-14)
    assert (loss.per_token[:9] == 0).all() and (loss.per_token[9:-40] > 0).all() and (loss.per_token[-40:] == 0).all()
    assert torch.equal(loss.targets_at, padded)


def test_sums_by_source_equal_a_loop_and_padding_counts_nowhere(problem):
    hidden, weight, labels = problem
    sources = torch.randint(0, 3, (2, 33))
    loss = linear_cross_entropy(hidden, weight, labels, rows=supervised(labels))
    assert (loss.targets_at == 0).any()
    expected = torch.zeros(2, 4, dtype=torch.float64)  # the last source has no token here
    for at, cost in zip(loss.targets_at.tolist(), loss.per_token.tolist(), strict=True):
        if labels.flatten()[at] != -100:
            expected[0, sources.flatten()[at]] += cost
            expected[1, sources.flatten()[at]] += 1
    found = loss.by_source(sources, 4)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-14)
    assert found[1].sum() == (labels != -100).sum()


def test_no_buffer_is_larger_than_one_chunk_of_logits_and_only_one_lives_at_a_time():
    tokens, vocab, width, chunk = 257, 1000, 8, 32
    hidden, weight = torch.randn(1, tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))

    def watch(run: Callable[[], Loss]) -> Memory:
        with Memory(watched=chunk * vocab // 2) as memory:
            run().total.backward()
        return memory

    ours = watch(lambda: linear_cross_entropy(hidden, weight, labels, chunk=chunk))
    assert ours.largest <= chunk * vocab
    assert ours.at_once == 1
    full = watch(lambda: linear_cross_entropy(hidden, weight, labels, kernel="full"))
    assert full.largest > 7 * chunk * vocab
    assert full.at_once > 1


def test_the_gradient_of_the_head_is_held_once():
    hidden, weight = torch.randn(1, 65, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(0, 1000, (1, 65))
    with Memory(watched=weight.numel()) as memory:
        (linear_cross_entropy(hidden, weight, labels, chunk=4).total / 2).backward()
    assert memory.at_once == 1  # nor is it copied to be scaled, nor into .grad


def test_a_graph_that_is_kept_gives_the_same_gradients_again(problem):
    hidden, weight, labels = problem
    total = 2 * linear_cross_entropy(hidden, weight, labels).total
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    before = [g.clone() for g in first]
    for again in (torch.autograd.grad(total, (hidden, weight), retain_graph=True), torch.autograd.grad(total, (hidden, weight))):
        assert all(torch.equal(a, f) for a, f in zip(again, before, strict=True))
    assert all(torch.equal(f, b) for f, b in zip(first, before, strict=True))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do(problem):
    hidden, weight, labels = problem
    with Memory(watched=1) as memory:
        linear_cross_entropy(hidden, weight.detach(), labels).total.backward()
    assert hidden.grad.abs().sum() > 0
    assert not any("addmm" in str(op) for op in memory.ops)
    with Memory(watched=1) as memory:
        linear_cross_entropy(hidden, weight, labels).total.backward()
    assert any("addmm" in str(op) for op in memory.ops)


def test_without_autograd_no_gradient_is_computed(problem):
    hidden, weight, labels = problem
    with torch.no_grad(), Memory(watched=1) as memory:
        loss = linear_cross_entropy(hidden, weight, labels, chunk=1000)
    assert torch.allclose(loss.total, plain(*problem), rtol=1e-14)
    products = [str(op) for op in memory.ops if "mm" in str(op)]
    assert len(products) == 1, products


@pytest.mark.parametrize("kernel", ["chunked", "full", "liger"])
@pytest.mark.parametrize(
    "rows", [None, torch.zeros(0, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)], ids=["found", "none", "padding"]
)
def test_no_supervised_token_costs_nothing_and_is_no_nan(problem, rows, kernel):
    hidden, weight, labels = problem
    if kernel == "liger" and rows is not None and len(rows):
        pytest.skip("padding goes to liger, which needs a GPU")
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), rows=rows, kernel=kernel)
    loss.total.backward()
    assert loss.total == 0
    assert len(loss.per_token) == (0 if rows is None else len(rows))
    assert (loss.by_source(torch.zeros_like(labels), 2) == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 33, 5])], ids=["found", "given"])
def test_the_first_token_of_a_row_is_never_predicted_from_another_row(problem, rows):
    hidden, weight, labels = problem
    labels[:, 0] = labels[0, 5] = 3
    loss = linear_cross_entropy(hidden, weight, labels, rows=rows)
    assert not {0, 33} & set(loss.targets_at[loss.per_token > 0].tolist())
    assert loss.by_source(torch.zeros_like(labels), 1)[1] == (int((labels[:, 1:] != -100).sum()) if rows is None else 1)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 tensors", "autocast"])
def test_bf16_stays_close_to_float32_and_sums_the_head_in_float32(autocast, monkeypatch):
    monkeypatch.setattr(loss_module, "WEIGHT_ROWS", 300)  # several pieces, the last one short
    monkeypatch.setattr(loss_module, "SOFTMAX_ROWS", 48)
    hidden, weight = torch.randn(1, 513, 64), torch.randn(1000, 64) / 4
    labels = torch.randint(0, 1000, (1, 513))
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = plain(*exact, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=64)
    assert torch.equal(loss.total, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, chunk=64).total)
    assert loss.total.dtype == loss.per_token.dtype == torch.float32
    assert abs(loss.total / expected - 1) < 3e-4  # worst seen 2.7e-5
    for found, reference in zip(torch.autograd.grad(loss.total, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True):
        assert found.dtype == (torch.float32 if autocast else torch.bfloat16)
        error = ((found.double() - reference).norm() / reference.norm()).item()
        assert error < 1e-2  # worst seen 3.0e-3


def test_many_small_contributions_to_a_bf16_head_are_not_lost():
    hidden, weight = torch.ones(1, 1025, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(1, 1025).long(), chunk=1)
    loss.total.backward()
    assert weight.grad.flatten().tolist() == [-512, 512]  # a bf16 sum of halves stops at 128


def test_logits_of_any_size_stay_finite(problem):
    hidden, weight, labels = problem
    hidden = (1e3 * hidden).detach().requires_grad_()  # exp overflows at 709
    loss = linear_cross_entropy(hidden, weight, labels)
    expected = plain(hidden, weight, labels)
    assert torch.allclose(loss.total, expected, rtol=1e-14)
    for f, e in zip(torch.autograd.grad(loss.total, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert torch.allclose(f, e, rtol=1e-12, atol=1e-12)


def test_half_precision_logits_are_never_widened_all_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "SOFTMAX_ROWS", 8)
    hidden, weight = torch.randn(1, 65, 8).bfloat16().requires_grad_(), torch.randn(1000, 8).bfloat16().requires_grad_()
    with Memory(watched=64 * 1000 // 2) as memory:
        linear_cross_entropy(hidden, weight, torch.randint(0, 1000, (1, 65)), chunk=64).total.backward()
    assert memory.at_once == 1


def test_the_softmax_compiles_without_a_break_and_once_for_every_number_of_rows(problem, monkeypatch):
    hidden, weight, labels = problem
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    loss_module._compile_softmax.cache_clear()
    rows = supervised(labels)
    for count in (16, 9, 2, 17, len(rows)):  # two chunks and one; the last has padding
        expected = linear_cross_entropy(hidden, weight, labels, rows=rows[:count], chunk=8)
        found = linear_cross_entropy(hidden, weight, labels, rows=rows[:count], chunk=8, compiled=True)
        for f, e in zip(
            torch.autograd.grad(found.total, (hidden, weight)), torch.autograd.grad(expected.total, (hidden, weight)), strict=True
        ):
            assert torch.allclose(f, e, rtol=1e-12, atol=1e-14)
        assert torch.equal(found.per_token, expected.per_token)
        assert counter.frame_count == 1, count
    loss_module._compile_softmax.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["chunked", "full"])
def test_given_rows_need_no_values_so_that_the_meta_device_runs_it(kernel, dtype):
    hidden = torch.empty(1, 4096, 64, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(151_936, 64, device="meta", dtype=dtype, requires_grad=True)
    labels, rows = torch.empty(1, 4096, device="meta", dtype=torch.int64), torch.empty(1024, device="meta", dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels, rows=rows, kernel=kernel)
    loss.total.backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.dtype == dtype
    assert loss.by_source(labels, 3).shape == (2, 3)


def test_mistakes_are_named_with_their_fix(problem, monkeypatch):
    with pytest.raises(UserError, match=r"'fused' is unknown; choose one of chunked, liger, full"):
        linear_cross_entropy(*problem, kernel="fused")
    with pytest.raises(UserError, match="loss chunk 0 has no rows; give at least 1"):
        linear_cross_entropy(*problem, chunk=0)
    with pytest.raises(UserError, match=r"needs a CUDA device and the tensors are on cpu; take kernel=chunked"):
        linear_cross_entropy(*problem, kernel="liger")


def test_liger_is_called_with_the_head_first_and_its_absence_is_named(monkeypatch):
    on_gpu = type("OnGpu", (), {"is_cuda": True})()
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match=r"needs liger-kernel>=0.8.5.*pip install 'infimed\[gpu\]'"):
        loss_module._liger(on_gpu, None, None)
    liger = ModuleType("liger_kernel.transformers")
    liger.LigerFusedLinearCrossEntropyLoss = lambda **options: lambda weight, hidden, target: (options, weight, hidden, target)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    options = {"reduction": "none", "accum_dtype": torch.float32}
    assert loss_module._liger(on_gpu, "weight", "target") == (options, "weight", on_gpu, "target")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"kernel": "liger"}], ids=["eager", "compiled", "liger"])
def test_a_gpu_gives_the_loss_of_the_full_kernel_and_never_stalls(options):
    hidden = torch.randn(1, 1025, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(5000, 128, device="cuda") / 12).bfloat16().requires_grad_()
    labels, weights = torch.randint(0, 5000, (1, 1025), device="cuda"), torch.rand(1, 1025, device="cuda")
    labels[:, 0] = -100
    rows = F.pad(torch.arange(1, 1025, device="cuda"), (0, 32))

    def run(**kernel) -> list[torch.Tensor]:
        loss = linear_cross_entropy(hidden, weight, labels, rows=rows, weights_BT=weights, **kernel)
        sums = loss.by_source(torch.zeros_like(labels), 1)
        return [loss.total.detach(), sums, *torch.autograd.grad(loss.total, (hidden, weight))]

    expected, found = run(kernel="full"), run(**options, **({} if "kernel" in options else {"chunk": 256}))
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-2 * e.norm()
    if "kernel" not in options:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(**options, chunk=256)
        finally:
            torch.cuda.set_sync_debug_mode("default")
