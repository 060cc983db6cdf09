"""Compare packed attention, kernel by kernel, with one dense block-diagonal mask and with padding: forward and backward.

    python benchmarks/attention.py [--packs 33x496,8x2048,caption] [--heads 2] [--kv-heads 1] [--head-dim 64] [--repeats 5] [--json FILE]

A pack is DOCUMENTSxLENGTH, or `caption`: documents of the caption mix in a row of 8192. The dense mask covers the row, as transformers
builds it for packed positions; padding means batches of 8 documents with the mask that transformers builds. Outputs and gradients must
agree before a time is believed. Repeats go A B C, C B A, ...; the table (medians) comes last. CPU: float32, one thread unless told
otherwise, and only the kernel `sdpa`, which runs a segment at a time. CUDA: bf16, every kernel that is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import mixes
import torch
from torch.nn import functional as F

from infimed.contracts import UserError, borders, bucket
from infimed.models.attention import KERNELS, resolve
from infimed.models.kernels import Segments

BATCH = 8  # documents of a padded batch
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v [T, H, D] -> [T, H, D]


def documents(pack: str) -> list[int]:
    """Read a pack's lengths."""
    if pack != "caption":
        count, length = map(int, pack.split("x"))
        return [length] * count
    lengths = (mixes.caption(64).sum(1) + mixes.EXTRA).tolist()
    fitting = [n for n, end in zip(lengths, accumulate(lengths), strict=True) if end <= 8192]
    return [*fitting, 8192 - sum(fitting)]  # the last one cut, so that the row is full


def packed(kernel: str, lengths: Sequence[int], device: torch.device) -> Run:
    """Run one of our kernels."""
    segments = Segments(borders(lengths).to(device), bucket(max(lengths)), True, None)
    return lambda q, k, v: KERNELS[kernel].run(q, k, v, segments)


def dense(lengths: Sequence[int], device: torch.device) -> Run:
    """Run SDPA over the whole row with a T x T mask, made beforehand: one serves all layers."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask_TT = (document[:, None] == document[None, :]).tril_()

    def run(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor) -> torch.Tensor:
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_THD, v_THD))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask_TT, enable_gqa=True).squeeze(0).transpose(0, 1)

    return run


def padded(lengths: Sequence[int], device: torch.device) -> Run:
    """Run SDPA over padded batches; their laying out is left out of nothing: it is part of the batch in real life, and cheap."""
    groups, start = [], 0
    for i in range(0, len(lengths), BATCH):
        group = list(lengths[i : i + BATCH])
        longest = torch.arange(max(group), device=device)
        real_BL = longest < torch.tensor(group, device=device)[:, None]
        mask_B1LL = (real_BL[:, None, :] & (longest[:, None] >= longest)).unsqueeze(1)
        groups.append((start, start + sum(group), group, real_BL, mask_B1LL))
        start += sum(group)

    def run(*qkv_THD: torch.Tensor) -> torch.Tensor:
        out = []
        for begin, end, group, real_BL, mask in groups:
            parts = (torch.nn.utils.rnn.pad_sequence(x[begin:end].split(group), batch_first=True).transpose(1, 2) for x in qkv_THD)
            attended = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
            out.append(attended.transpose(1, 2)[real_BL])
        return torch.cat(out)

    return run


def cases(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """List what can run here."""
    found = {"dense mask": dense(lengths, device), "padded": padded(lengths, device)}
    for kernel in KERNELS:
        try:
            resolve(kernel, device, dtype)
        except UserError as reason:
            print(json.dumps({"case": kernel, "skipped": str(reason)}), flush=True)
            continue
        if not (kernel == "flex" and device.type == "cpu"):  # which has no backward there
            found[f"packed: {kernel}"] = packed(kernel, lengths, device)
    return found


def once(run: Run, qkv: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """Run forward and backward; seconds of wall, and of the CPU where that is what works."""
    cuda = grad.is_cuda
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    out = run(*qkv)
    found = (out.detach(), *torch.autograd.grad(out, qkv, grad))
    if cuda:
        torch.cuda.synchronize()
    return {"wall_ms": 1e3 * (time.perf_counter() - wall), "cpu_ms": 1e3 * (time.process_time() - cpu)}, found


def check(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, case: str) -> None:
    """Refuse to time what computes something else. Raises: AssertionError."""
    tolerance = 3e-2 if expected[0].dtype == torch.bfloat16 else 1e-4  # of the largest value; seen in float32: 3e-6
    for one, other in zip(found, expected, strict=True):
        worst = float((one - other).abs().max() / other.abs().max())
        assert worst < tolerance, f"{case} differs from the dense mask by {worst:.1e} of the largest value"


def measure(pack: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Time every case of one pack and print its JSON line."""
    torch.manual_seed(0)
    lengths = documents(pack)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    qkv = tuple(torch.randn(sum(lengths), n, arguments.head_dim, device=device, dtype=dtype, requires_grad=True) for n in heads)
    grad = torch.randn_like(qkv[0]).detach()
    runs = cases(lengths, device, dtype)
    expected: tuple[torch.Tensor, ...] = ()
    for case, run in runs.items():  # also the warm-up
        found = once(run, qkv, grad)[1]
        check(found, expected or found, case=case)
        expected = expected or found
    times: dict[str, list[dict]] = {case: [] for case in runs}
    for repeat in range(arguments.repeats):
        for case in runs if repeat % 2 == 0 else reversed(runs):
            times[case].append(once(runs[case], qkv, grad)[0])
    slots = sum(len(lengths[i : i + BATCH]) * max(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH))
    label = {"pack": pack, "tokens": sum(lengths), "documents": len(lengths), "real_of_padded": sum(lengths) / slots}
    lines = []
    for case, runs_ in times.items():
        lines.append({**label, "case": case} | {key: statistics.median(x[key] for x in runs_) for key in ("wall_ms", "cpu_ms")})
        print(json.dumps(lines[-1]), flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def table(found: Sequence[dict], *, clock: str) -> str:
    """Draw how many times faster each case is than the dense mask and than padding, by the clock that counts here."""
    lines = ["| pack | documents | case | x dense mask | x padded | ms (CPU) | ms (wall) |", "|---|---|---|---|---|---|---|"]
    for one in found:
        base = {other["case"]: other[clock] for other in found if other["pack"] == one["pack"]}
        ratios = " | ".join(f"{base[name] / one[clock]:.2f}" for name in ("dense mask", "padded"))
        times = f"{one['cpu_ms']:,.0f} | {one['wall_ms']:,.0f}"
        lines.append(
            f"| {one['pack']} ({one['real_of_padded']:.0%} real if padded) | {one['documents']} | {one['case']} | {ratios} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all packs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", default="33x496,8x2048,caption", help="with commas")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file that the JSON lines are added to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    found = [line for pack in arguments.packs.split(",") for line in measure(pack, arguments, device, dtype)]
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} thread(s); GPU not measured"
    heads = f"{arguments.heads}/{arguments.kv_heads} heads x {arguments.head_dim}, {dtype}, {arguments.repeats} runs a case"
    print(f"\n{where}; torch {torch.__version__}; {heads}\n\n{table(found, clock='wall_ms' if on_gpu else 'cpu_ms')}")


if __name__ == "__main__":
    main()
