"""The parts of `loader.py` that are about length: going on at sample 10,000,000, and memory over 100,000 samples."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import loader_cases
import torch

from infimed.contracts import Batch
from infimed.data.index import index_path

SIZES = {
    "full": {
        "tars": {"shards": 8, "rows": 1000, "side": 448},
        "resume": {"shards": 10_000, "rows": 1200, "position": 10_000_000},
        "memory": {"samples": 100_000},
    },
    "quick": {
        "tars": {"shards": 2, "rows": 40, "side": 64},
        "resume": {"shards": 20, "rows": 40, "position": 600},
        "memory": {"samples": 400},
    },
}

LOOKS = 64  # at the memory, at each end


# --- resume ----------------------------------------------------------------------------------------------------------


def make_resume(folder: Path, *, shards: int, rows: int, position: int) -> None:
    """Write one tar, link it under many names, copy its index for each, and write down a position."""
    if not (folder / "tars").exists():
        (first,) = loader_cases.make(folder / "tars", shards=1, rows=rows, side=448)
        index = index_path(first).read_bytes()
        for number in range(1, shards):
            tar = first.with_name(f"shard-{number:06d}.tar")  # as long a name as the first: it fits in its place in the header
            tar.hardlink_to(first)
            index_path(tar).write_bytes(index.replace(first.name.encode(), tar.name.encode()))
    data = loader_cases.module(folder / "tars", epochs=2, workers=0)
    data.setup()
    next(data.plan)
    state = data.plan.state_dict()
    state["taken"] = [position]
    state["total"] = {"packs": 2 * shards * rows // 9, "of": data.plan._filling}  # known after the first start; nothing is measured by it
    (folder / "position.json").write_text(json.dumps(state))


def run_resume(folder: Path) -> dict:
    """Open the shards, go to the position, read the first batch."""
    imported = time.perf_counter()
    torch.set_num_threads(1)
    cpu = time.process_time()
    data = loader_cases.module(folder / "tars", epochs=2, workers=0)
    data.setup()
    opened = time.perf_counter()
    data.load_state_dict(json.loads((folder / "position.json").read_text()))
    batch = next(iter(data.train_dataloader()))
    ready = time.perf_counter()
    assert isinstance(batch, Batch)
    assert len(batch.keys) > 0
    assert not batch.faults
    return {
        "samples": len(data._train),
        "shards": len(data._train.shards),
        "imports_s": imported - _started(),
        "open_s": opened - imported,
        "batch_s": ready - opened,
        "cpu_s": time.process_time() - cpu,
        "mib": _resident(os.getpid()),
    }


def draw_resume(runs: Sequence[dict]) -> str:
    """Draw the medians."""
    middle = {name: statistics.median(run[name] for run in runs) for name in ("imports_s", "open_s", "batch_s", "cpu_s", "mib")}
    return "\n".join(
        [
            "| samples | shards | open, s | position and first batch, s | both (CPU) | imports, s | resident MiB |",
            "|---|---|---|---|---|---|---|",
            f"| {runs[0]['samples']:,} | {runs[0]['shards']:,} | {middle['open_s']:.2f} | {middle['batch_s']:.2f} "
            f"| {middle['open_s'] + middle['batch_s']:.2f} ({middle['cpu_s']:.2f}) | {middle['imports_s']:.1f} | {middle['mib']:.0f} |",
        ]
    )


def _started() -> float:
    """Return when this process began, on the clock of `time.perf_counter`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.perf_counter() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


# --- memory ----------------------------------------------------------------------------------------------------------


def make_memory(folder: Path, *, samples: int) -> None:
    """Write small pictures, a tenth of what is read, and how much that is."""
    if not folder.exists():
        loader_cases.make(folder / "tars", shards=4, rows=samples // 40, side=64)
        (folder / "samples.json").write_text(json.dumps(samples))


def run_memory(folder: Path) -> dict:
    """Look at the resident memory of this process and its workers after a tenth of the samples and after all, in mid stream."""
    torch.set_num_threads(1)
    samples, seen = json.loads((folder / "samples.json").read_text()), 0
    data = loader_cases.module(folder / "tars", epochs=20)  # twice as many: the workers are still at it
    looks: dict[str, list[float]] = {"first": [], "last": []}
    for batch in data.train_dataloader():
        data.consumed(batch)
        seen += len(batch.keys)
        look = "first" if 0.1 <= seen / samples < 0.3 else "last" if seen >= samples else None
        if look and len(looks[look]) < LOOKS:
            looks[look].append(sum(_resident(process) for process in (os.getpid(), *_children())))
        if looks["last"] and (len(looks["last"]) == LOOKS or seen > 1.2 * samples):
            break
    return {"samples": samples, "mib_first": statistics.median(looks["first"]), "mib_last": statistics.median(looks["last"])}


def draw_memory(runs: Sequence[dict]) -> str:
    """Draw the one run."""
    (run,) = runs
    return "\n".join(
        [
            "| samples | MiB after a tenth | MiB at the end | growth |",
            "|---|---|---|---|",
            f"| {run['samples']:,} | {run['mib_first']:,.0f} | {run['mib_last']:,.0f} | {run['mib_last'] / run['mib_first'] - 1:+.1%} |",
        ]
    )


def _children() -> list[int]:
    return [int(process) for process in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _resident(process: int) -> float:
    """Read the memory of a process in MiB; what it shares with others counts in parts, so that a sum over processes is what is there."""
    line = next(line for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024
