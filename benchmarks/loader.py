"""Compare reading and decoding with plain webdataset and other loaders, side by side in one run; resume and memory of our loader.

    python benchmarks/loader.py [--peers FOLDER] [--repeats 3] [--parts read,workers,decode,resume,memory] [--quick]

8 tars of 1000 JPEGs, 448 x 448 pixels, about 56 KB each, in the page cache. Parts:

read     in this process, nothing decoded. Ours in random order; it checks each member's CRC, the others check nothing.
workers  two workers, nothing decoded, batches of 32. Ours hands over one uint8 tensor a batch and the sizes of its members, as our
         loader hands over everything; the others hand over lists of bytes.
decode   two workers, decoded and resized to 378 x 378. Plain: webdataset, Pillow, lists of arrays. Ours is the loader of training
         itself, which also plans, packs, renders and tokenises.
resume   a new process goes on at sample 10,000,000 of 10,000 shards with 1,200 samples each (links to one tar, an index each): seconds from
         nothing to the first batch, imports beside it. The position is written down, not trained up to.
memory   resident memory of the loader with its two workers, after 10,000 and after 100,000 samples of 64 x 64 pixels.

Every case is a process of its own, in the order A B, B A, ...; samples and bytes must agree. CPU time is that of the process and of its
workers, from their start to their end, and the least of the runs counts: other programs lengthen it too. Wall time is the median.
`--peers`: a folder in which litdata, mosaicml-streaming or megatron-energon are installed, see `loader_peers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import loader_cases
import loader_long
import loader_peers
import torch

GROUPS = {"read": loader_cases.READING, "workers": loader_cases.IN_WORKERS, "decode": loader_cases.DECODED}
PLAIN = {"read": "webdataset", "workers": "webdataset", "decode": "webdataset + Pillow, lists of arrays"}


def measure(part: str, case: str, folder: Path) -> dict:
    """Run one case once over all samples in this process."""
    torch.set_num_threads(1)
    run = GROUPS[part][case]
    if part == "read":
        next(iter(run(folder)))  # loads what is loaded late
    wall, used, samples, size = time.perf_counter(), loader_peers.cpu(), 0, 0
    for some, more in run(folder):
        samples, size = samples + some, size + more
    return {"samples": samples, "bytes": size, "wall_s": time.perf_counter() - wall, "cpu_s": loader_peers.cpu() - used}


def child(label: dict, arguments: Sequence[str], *, script: str = __file__, path: Path | None = None) -> dict:
    """Measure in a fresh process and print its JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        found = {**label, "skipped": (result.stderr.splitlines() or ["?"])[-1]} if path else None
        assert found, result.stderr  # a peer may fail; ours may not
    else:
        found = {**label, **json.loads(result.stdout.splitlines()[-1])}
    print(json.dumps(found), flush=True)
    return found


def compare(part: str, folder: Path, *, repeats: int, peers: Path | None) -> list[dict]:
    """Measure all cases of a part in turns."""
    jobs = [({"part": part, "case": case}, ["--child", part, "--case", case, "--folder", str(folder)], {}) for case in GROUPS[part]]
    if part != "decode":
        workers = str(loader_cases.WORKERS if part == "workers" else 0)
        for peer in loader_peers.MODULES if peers else ():
            arguments = [peer, str(folder), str(folder.parent / peer), workers]
            jobs.append(({"part": part, "case": peer}, arguments, {"script": loader_peers.__file__, "path": peers}))
    found = [
        child(label, arguments, **where)
        for repeat in range(repeats)
        for label, arguments, where in (jobs if repeat % 2 == 0 else reversed(jobs))
    ]
    agree([one for one in found if "skipped" not in one])
    return found


def agree(found: Sequence[dict]) -> None:
    """Refuse to compare cases that did not see the same. Raises: AssertionError."""
    seen = {one["case"]: (one["samples"], one["bytes"]) for one in found}
    assert len(set(seen.values())) == 1, f"(samples, bytes) differ: {seen}"


def table(part: str, found: Sequence[dict]) -> str:
    """Draw the least CPU time and the median rate of every case, and their ratios to the plain way."""
    lines = ["| case | CPU us a sample | x plain | samples/s | x plain |", "|---|---|---|---|---|"]
    figures = {}
    for case in dict.fromkeys(one["case"] for one in found):
        runs = [one for one in found if one["case"] == case and "skipped" not in one]
        if runs:
            figures[case] = (
                min(1e6 * run["cpu_s"] / run["samples"] for run in runs),
                statistics.median(run["samples"] / run["wall_s"] for run in runs),
            )
    base_cpu, base_rate = figures[PLAIN[part]]
    for case in dict.fromkeys(one["case"] for one in found):
        if case not in figures:
            reason = next(one["skipped"] for one in found if one["case"] == case)
            lines.append(f"| {case} | not run: {reason} | | | |")
            continue
        cpu, rate = figures[case]
        lines.append(f"| {case} | {cpu:,.0f} | {base_cpu / cpu:.2f} | {rate:,.0f} | {rate / base_rate:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="read,workers,decode,resume,memory")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sets, to see that everything runs")
    parser.add_argument("--folder", type=Path, help="where the sets are made and kept; a temporary one otherwise")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child in GROUPS:
        print(json.dumps(measure(arguments.child, arguments.case, arguments.folder)))
    elif arguments.child:
        print(json.dumps(getattr(loader_long, arguments.child)(arguments.folder)))
    elif arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        report(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(arguments, Path(folder))


def report(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the sets, measure, print the tables."""
    sizes, texts = loader_long.SIZES["quick" if arguments.quick else "full"], []
    for part in arguments.parts.split(","):
        if part in GROUPS:
            tars = folder / "tars"
            if not tars.exists():
                loader_cases.make(tars, **sizes["tars"])
            for tar in tars.iterdir():
                tar.read_bytes()  # into the page cache
            texts.append(f"{part}\n\n" + table(part, compare(part, tars, repeats=arguments.repeats, peers=arguments.peers)))
        else:
            getattr(loader_long, f"make_{part}")(folder / part, **sizes[part])
            command = ["--child", f"run_{part}", "--folder", str(folder / part)]
            runs = [child({"part": part}, command) for _ in range(arguments.repeats if part == "resume" else 1)]
            texts.append(f"{part}\n\n" + getattr(loader_long, f"draw_{part}")(runs))
    print(f"\nCPU; GPU not measured; torch {torch.__version__}; {arguments.repeats} runs a case\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
