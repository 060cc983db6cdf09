"""Compare time and peak memory of the chunked loss with the plain transformers way, forward and backward.

    python benchmarks/loss.py [--tokens 8192] [--vocab 151936] [--width 256] [--supervised 1.0,0.4] [--threads 1] [--repeats 3]

Every run is a process of its own, in the order A B, B A, A B, ...: JSON lines as they finish, the table (medians) last. On a CPU, memory is
the peak of the resident set above its size just before, and CPU time stands beside wall time, which other programs lengthen. The plain way
holds three float32[tokens, vocab] arrays: 14 GiB at the sizes above.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from infimed.contracts import IGNORE_INDEX
from infimed.models.loss import linear_cross_entropy

MIB = 2**20


def plain(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum the loss as transformers' models do: logits of every row, widened to float32."""
    targets_BT = F.pad(labels_BT, (0, 1), value=IGNORE_INDEX)[:, 1:]
    return F.cross_entropy(F.linear(hidden_BTD, weight_VD).float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


def transformers(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Call the loss of transformers itself."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden_BTD, weight_VD), labels_BT, len(weight_VD), num_items_in_batch=torch.ones(()))


def ours(**options: object) -> Callable[..., torch.Tensor]:
    """Call our loss with the supervised rows given, as the collator gives them."""

    def run(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        rows = (labels_BT.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        return linear_cross_entropy(hidden_BTD, weight_VD, labels_BT, rows=rows, **options).total

    return run


CASES = {
    "plain": plain,
    "transformers": transformers,
    "full": ours(kernel="full"),
    "chunked": ours(),
    "compiled": ours(compiled=True),
    "liger": ours(kernel="liger"),
}


def problem(*, tokens: int, vocab: int, width: int, supervised: float, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw hidden states, head and labels: float32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    hidden_BTD = torch.randn(1, tokens, width, **options).requires_grad_()
    weight_VD = (torch.randn(vocab, width, **options) * width**-0.5).requires_grad_()
    labels_BT = torch.randint(vocab, (1, tokens), device=device)
    labels_BT[:, : tokens - round(supervised * tokens)] = IGNORE_INDEX
    labels_BT[:, 0] = IGNORE_INDEX
    return hidden_BTD, weight_VD, labels_BT


def measure(case: str, *, tokens: int, vocab: int, width: int, supervised: float, threads: int) -> dict:
    """Run one case once (on a GPU: five times, after two) in this process; norms say whether the cases computed the same."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_BTD, weight_VD, labels_BT = problem(tokens=tokens, vocab=vocab, width=width, supervised=supervised, device=device)

    def step(rows: int) -> tuple[torch.Tensor, ...]:
        total = CASES[case](hidden_BTD[:, -rows:], weight_VD, labels_BT[:, -rows:])
        return total.detach(), *torch.autograd.grad(total, (hidden_BTD, weight_VD))

    found, values = (_on_gpu if device == "cuda" else _on_cpu)(step, tokens)
    norms = {f"{name}_norm": float(v.float().norm()) for name, v in zip(("loss", "grad_hidden", "grad_weight"), values, strict=True)}
    return {**found, **norms}


def _on_cpu(step: Callable[[int], tuple[torch.Tensor, ...]], tokens: int) -> tuple[dict, tuple[torch.Tensor, ...]]:
    step(8)  # loads libraries; small, so that no memory is there already
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    wall, cpu = time.perf_counter(), time.process_time()
    values = step(tokens)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "peak_mib": _resident("VmHWM") - before}, values


def _on_gpu(step: Callable[[int], tuple[torch.Tensor, ...]], tokens: int) -> tuple[dict, tuple[torch.Tensor, ...]]:
    step(tokens)
    step(tokens)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(4):
        step(tokens)
    values = step(tokens)
    stop.record()
    torch.cuda.synchronize()
    return {"wall_ms": start.elapsed_time(stop) / 5, "peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB}, values


def _resident(field: str) -> float:
    """Read the resident set size of this process, in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def _fits(case: str, arguments: argparse.Namespace) -> bool:
    """Say whether the three arrays of the plain way fit with a fifth to spare; a GPU says so itself."""
    if case not in ("plain", "transformers", "full") or torch.cuda.is_available():
        return True
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024 > 1.2 * 3 * 4 * arguments.tokens * arguments.vocab


def _child(case: str, supervised: float, arguments: argparse.Namespace) -> dict | None:
    """Measure in a fresh process and print its JSON line."""
    label = {"case": case, "supervised": supervised, "tokens": arguments.tokens, "vocab": arguments.vocab, "width": arguments.width}
    if not _fits(case, arguments):
        print(json.dumps({**label, "skipped": "not enough free memory"}), flush=True)
        return None
    settings = {**label, "threads": arguments.threads}
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    found = {**label, **json.loads(result)}
    print(json.dumps(found), flush=True)
    return found


def check_agreement(found: list[dict]) -> None:
    """Refuse to compare the times of cases that computed different things.

    Raises:
        AssertionError: a loss or a gradient's norm differs by more than 2 % (bf16 rounds by 0.4 %).
    """
    for one in found:
        first = next(x for x in found if x["supervised"] == one["supervised"])
        for name in ("loss_norm", "grad_hidden_norm", "grad_weight_norm"):
            assert abs(one[name] - first[name]) <= 0.02 * first[name], (
                f"{name} of {one['case']}: {one[name]}; of {first['case']}: {first[name]}"
            )


def table(found: list[dict], *, logits_mib: float) -> str:
    """Draw medians of every case, and their ratios to the first one with the same share of supervised tokens."""
    lines = [
        "| supervised | case | wall ms | CPU ms | wall / plain | CPU / plain | peak MiB | peak / plain | peak / float32 logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("wall_ms", "cpu_ms", "peak_mib")
    medians = {}
    for supervised, case in dict.fromkeys((x["supervised"], x["case"]) for x in found):
        runs = [x for x in found if (x["supervised"], x["case"]) == (supervised, case)]
        medians[supervised, case] = [statistics.median(x[c] for x in runs) if c in runs[0] else None for c in columns]
    for (supervised, case), values in medians.items():
        base = medians.get((supervised, "plain"), [None] * 3)
        ratios = [f"{v / b:.3f}" if v and b else "not measured" for v, b in zip(values, base, strict=True)]
        wall, cpu, peak = (f"{v:,.0f}" if v is not None else "not measured" for v in values)
        share = f"{values[2] / logits_mib:.3f}"
        lines.append(f"| {supervised:.0%} | {case} | {wall} | {cpu} | {ratios[0]} | {ratios[1]} | {peak} | {ratios[2]} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256, help="small, so that the head's gradient does not drown the logits")
    parser.add_argument("--supervised", default="1.0,0.4", help="shares of the tokens, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    cuda = ",compiled,liger" if torch.cuda.is_available() else ""
    parser.add_argument("--cases", default=f"plain,chunked{cuda}", help=f"some of {','.join(CASES)}, with commas")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    cases = arguments.cases.split(",")
    found = []
    for supervised in map(float, arguments.supervised.split(",")):
        for repeat in range(arguments.repeats):
            found += [_child(case, supervised, arguments) for case in (cases if repeat % 2 == 0 else reversed(cases))]
    found = [x for x in found if x]
    check_agreement(found)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {arguments.threads} thread(s); GPU not measured"
    logits_mib = 4 * arguments.tokens * arguments.vocab / MIB
    sizes = f"T={arguments.tokens}, V={arguments.vocab}, D={arguments.width}, {arguments.repeats} runs a case"
    print(f"\n{device}; torch {torch.__version__}; {sizes}; float32 logits {logits_mib:,.0f} MiB\n\n{table(found, logits_mib=logits_mib)}")


if __name__ == "__main__":
    main()
