"""Parts of a step alone: what the device can do at best, attention kernels, the loss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from gpu_loops import GIB, Skip
from torch.nn import functional as F
from torch.nn.attention import varlen

from infimed.contracts import IGNORE_INDEX, borders, bucket
from infimed.models.attention import KERNELS, resolve
from infimed.models.kernels import Segments
from infimed.models.loss import linear_cross_entropy

Sizes = Mapping[str, Mapping[str, int]]


def clock(run: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Return the median seconds of a call; on a GPU by events, after three warm-ups."""
    if device.type != "cuda":
        run()
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def ceilings(device: torch.device, models: Mapping[str, Sizes], *, tokens: int) -> dict[str, Callable[[], dict]]:
    """List what bounds everything: a large product, a copy, fp8, and each model's own products (random data: zeros run faster)."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 256
    dtype = torch.bfloat16 if gpu else torch.float32
    cases = {
        f"product {side}^3 {_name(dtype)}": lambda: _product(side, side, side, dtype, device),
        "product fp8": lambda: _fp8(side, device),
        "copy": lambda: _copy(2**32 if gpu else 2**24, device),
    }
    for model, sizes in models.items():
        cases[f"products of {model}"] = lambda sizes=sizes: _shapes(_decoder_shapes(sizes, tokens), dtype, device)
        cases[f"products of the tower, {model}"] = lambda sizes=sizes: _shapes(_tower_shapes(sizes, tokens), dtype, device)
    return cases


def _product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> dict:
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    return {"tflops": 2 * m * k * n / clock(lambda: F.linear(a, b), device) / 1e12}


def _fp8(side: int, device: torch.device) -> dict:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise Skip("fp8 needs a CUDA device of compute capability 8.9")
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    seconds = clock(lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device)
    return {"tflops": 2 * side**3 / seconds / 1e12}


def _copy(size: int, device: torch.device) -> dict:
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gb_s": 2 * size / clock(lambda: target.copy_(source), device) / 1e9}  # read and written


def _shapes(shapes: Sequence[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> dict:
    """Time products (rows, inputs, outputs, how often) and weigh them by their share of the work."""
    rates = [_product(m, k, n, dtype, device)["tflops"] for m, k, n, _ in shapes]
    work = [m * k * n * count for m, k, n, count in shapes]
    each = {f"{m}x{k}x{n}": rate for (m, k, n, _), rate in zip(shapes, rates, strict=True)}
    return {"tflops": sum(work) / sum(w / r for w, r in zip(work, rates, strict=True)), "each": each}


def _decoder_shapes(sizes: Sizes, tokens: int) -> list[tuple[int, int, int, int]]:
    s = sizes["language"]
    width, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    query, key = (s[name] * s["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    per_layer = [(width, query, 1), (width, key, 2), (query, width, 1), (width, inner, 2), (inner, width, 1)]
    head_rows = min(2048, tokens)
    return [(tokens, k, n, count * layers) for k, n, count in per_layer] + [(head_rows, width, s["vocab_size"], tokens // head_rows)]


def _tower_shapes(sizes: Sizes, tokens: int) -> list[tuple[int, int, int, int]]:
    s, rows = sizes["vision"], 33 * 729 * tokens // 16_384
    return [(rows, s["hidden_size"], s["hidden_size"], 4), (rows, s["hidden_size"], s["intermediate_size"], 2)]


def attention(device: torch.device, *, tokens: int) -> dict[str, Callable[[], dict]]:
    """List kernels over packs: grouped-query heads of 128 as in the decoder, heads of 72 as in the tower; forward, backward, error."""
    scale = tokens / 16_384
    packs = {  # documents, length, query heads, key heads, width of a head, causal
        "8x2048": (8, 2048, 16, 8, 128, True),
        "33x496": (33, 496, 16, 8, 128, True),
        "1x16384": (1, 16_384, 16, 8, 128, True),
        "tower 33x729": (33, 729, 16, 16, 72, False),
    }
    cases = {}
    for pack, (documents, length, heads, keys, width, causal) in packs.items():
        lengths = [max(16, round(length * scale))] if documents == 1 else [length] * max(1, round(documents * scale))
        lengths = lengths if device.type == "cuda" else [64] * min(4, documents)
        for kernel in (*KERNELS, "varlen_cudnn", "dense"):
            shape = {"lengths": lengths, "heads": heads, "keys": keys, "width": width, "causal": causal}
            cases[f"{pack} {kernel}"] = lambda kernel=kernel, shape=shape: _attend(kernel, device=device, **shape)
    return cases


def _attend(kernel: str, *, lengths: list[int], heads: int, keys: int, width: int, causal: bool, device: torch.device) -> dict:
    """Time one kernel; its error is the distance to float32 over the length of the float32 result."""
    gpu = device.type == "cuda"
    dtype, tokens = torch.bfloat16 if gpu else torch.float32, sum(lengths)
    if kernel == "flex" and not gpu:
        raise Skip("flex has no backward on a CPU")
    torch.manual_seed(0)
    query, key, value = (torch.randn(tokens, h, width, device=device, dtype=dtype, requires_grad=True) for h in (heads, keys, keys))
    grad = torch.randn_like(query)
    segments = Segments(borders(lengths).to(device), bucket(max(lengths)), causal, None)
    with _kernel(kernel, device, dtype) as run:
        out = run(query, key, value, segments)
        grads = torch.autograd.grad(out, (query, key, value), grad)
        forward = clock(lambda: run(query, key, value, segments), device)
        both = clock(lambda: torch.autograd.grad(run(query, key, value, segments), (query, key, value), grad), device)
    # on a GPU float64 has no kernel that does without the T x T scores
    exact = torch.float32 if gpu else torch.float64
    wide = [x.detach().to(exact).requires_grad_() for x in (query, key, value)]
    reference = _ungrouped(KERNELS["sdpa"].run, *wide, segments)
    expected = (reference, *torch.autograd.grad(reference, wide, grad.to(exact)))
    errors = [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in zip((out, *grads), expected, strict=True)]
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    work = 4 * heads * width * pairs / 1e12
    figures = {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * (both - forward), "error": max(errors)}
    return {**figures, "forward_tflops": work / forward, "backward_tflops": 2 * work / max(both - forward, 1e-9)}


@contextmanager
def _kernel(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[..., torch.Tensor]]:
    """Give a kernel by name. Raises: Skip where it cannot run."""
    if name == "dense":
        yield partial(_ungrouped, _dense)  # as transformers does under a mask
    elif name == "varlen_cudnn":
        if device.type != "cuda" or not hasattr(varlen, "_should_use_cudnn"):
            raise Skip("torch's varlen has no cuDNN path here")
        gate, varlen._should_use_cudnn = varlen._should_use_cudnn, lambda device_index: True
        try:
            yield partial(_ungrouped, _varlen)
        finally:
            varlen._should_use_cudnn = gate
    else:
        try:
            resolve(name, device=device, dtype=dtype)
        except ValueError as error:
            raise Skip(str(error)) from error
        yield KERNELS[name].run


def _dense(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attend over the whole row under a T x T mask, as packing without a kernel for it does."""
    where = torch.arange(len(query_THD), device=query_THD.device)
    number = torch.searchsorted(segments.cu, where, right=True)
    mask = number[:, None] == number
    mask = mask & (where[:, None] >= where) if segments.causal else mask
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)


def _varlen(query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments) -> torch.Tensor:
    cu, longest, causal, _ = segments
    return varlen.varlen_attn(query_THD, key_THD, value_THD, cu, cu, longest, longest, window_size=(-1, 0) if causal else (-1, -1))


def _ungrouped(
    run: Callable[..., torch.Tensor], query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Run a kernel with as many key heads as query heads, for those that take no others or would do so slowly."""
    key_THD, value_THD = (x.repeat_interleave(query_THD.shape[1] // x.shape[1], dim=1) for x in (key_THD, value_THD))
    return run(query_THD, key_THD, value_THD, segments)


def losses(device: torch.device, *, tokens: int) -> dict[str, Callable[[], dict]]:
    """List ways to the loss, forward and backward, at the width and vocabulary of the 1.7B model."""
    width, vocab = (2048, 151_936) if device.type == "cuda" else (64, 4096)
    ways = {
        "transformers": _stock_loss,
        "full": lambda *x: linear_cross_entropy(*x[:3], rows=x[3], kernel="full").total,
        **{f"chunked {c}": lambda *x, c=c: linear_cross_entropy(*x[:3], rows=x[3], chunk=c).total for c in (2048, 4096)},
        **{f"compiled {c}": lambda *x, c=c: linear_cross_entropy(*x[:3], rows=x[3], chunk=c, compiled=True).total for c in (2048, 4096)},
        "liger": lambda *x: linear_cross_entropy(*x[:3], rows=x[3], kernel="liger").total,
    }
    return {
        f"{share:.0%} {name}": lambda run=run, share=share, name=name: _loss(name, run, tokens, width, vocab, share, device)
        for share in (1.0, 0.4)
        for name, run in ways.items()
    }


def _stock_loss(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden_BTD, weight_VD), labels_BT, len(weight_VD), num_items_in_batch=hidden_BTD.new_ones(()))


def _loss(name: str, run: Callable, tokens: int, width: int, vocab: int, share: float, device: torch.device) -> dict:
    if device.type != "cuda" and name.startswith(("compiled", "liger")):
        raise Skip(f"{name} is for CUDA")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_BTD = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight_VD = (torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5).requires_grad_()
    labels_BT = torch.randint(vocab, (1, tokens), device=device)
    labels_BT[:, : max(1, tokens - round(share * tokens))] = IGNORE_INDEX
    rows = (labels_BT.flatten() != IGNORE_INDEX).nonzero().squeeze(1)

    def step() -> tuple[torch.Tensor, ...]:
        total = run(hidden_BTD, weight_VD, labels_BT, rows)
        return total.detach(), *torch.autograd.grad(total, (hidden_BTD, weight_VD))

    value = float(step()[0]) / len(rows)
    peak = {}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = {"peak_gib": (torch.cuda.max_memory_allocated() - before) / GIB}
    return {"ms": 1e3 * clock(step, device, repeats=8), **peak, "loss": value}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
