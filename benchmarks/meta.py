"""Build, wrap and plan the published models with no weights and no GPU: seconds and peak memory.

    python benchmarks/meta.py [--models infimed_1_7b,infimed_4b,any_1_7b] [--repeats 3] [--json FILE]

Build: the model of conf/model/NAME.yaml on the meta device. Wrap: `compile_blocks` (backend eager, for what costs time on a GPU is the
compiler, not the wrapping) and torch's `fully_shard` over every block and the root, on a group of one process. Plan: operations and memory
of each stage, and the rows of an epoch of 200,000 samples. Every run is a process of its own, whose peak resident set is reported, imports
included. Targets: 20 s and 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TARGET_SECONDS, TARGET_GIB = 20, 4
MODELS = ("infimed_1_7b", "infimed_4b", "any_1_7b")
STAGES = {"pretrain": ("projector",), "sft_stage2": ("projector", "language")}  # what learns
ROOT = Path(__file__).resolve().parents[1]
SAMPLES, MAX_TOKENS = 200_000, 8192


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the wall time of a block, and its CPU time beside it."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[part], seconds[f"{part}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def measure(model: str) -> dict:
    """Do everything once in this process. Imports stand here, so that they are timed too."""
    seconds: dict[str, float] = {}
    with timed(seconds, "import"):
        import torch
        from hydra import compose, initialize_config_dir
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        import infimed.models.vlm  # noqa: F401
    torch.set_num_threads(1)
    with timed(seconds, "build"):
        experiment = "any_sft_stage2" if model.startswith("any_") else "sft_stage2"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [f"experiment={experiment}", f"model={model}"])
        with torch.device("meta"):
            built = instantiate(config.model, image_token_id=151_669)
    parameters = sum(p.numel() for p in built.parameters())
    with timed(seconds, "wrap"):
        wrap(built)
    with timed(seconds, "plan"):
        planned = plan(OmegaConf.to_container(config.model, resolve=True))
    return {"seconds": seconds, "peak_gib": _peak_gib(), "parameters": parameters, **planned}


def wrap(model: object) -> None:
    """Compile and shard the blocks of a meta model."""
    import torch
    from torch.distributed.fsdp import fully_shard

    from infimed.models.compile import compile_blocks

    compile_blocks(model, backend="eager")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in (*model.vision.encoder.layers, *model.language.model.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.distributed.destroy_process_group()
    stray = [name for name, p in model.named_parameters() if not (p.is_meta and isinstance(p, torch.distributed.tensor.DTensor))]
    assert not stray, f"not sharded, or no longer on meta: {stray}"


def plan(model: dict) -> dict:
    """Count the operations and memory of one row a stage, and lay out an epoch of rows."""
    import mixes

    from infimed.data.catalogue import Table
    from infimed.data.plan import Plan
    from infimed.processing.flops import Work, flops, shape_of
    from infimed.processing.memory import MemoryPlan, memory

    shape, lengths = shape_of(model), mixes.caption(SAMPLES).sum(1) + mixes.EXTRA
    work = Work.of(documents=[496] * 16, images=[729] * 16, visual_tokens=144 * 16, supervised=200 * 16)
    stages = {
        stage: {
            "tflop": flops(shape, work, trained=trained).total / 1e12,
            "gib": memory(shape, work, trained=trained, plan=MemoryPlan()).total / 2**30,
        }
        for stage, trained in STAGES.items()
    }
    rows = [pack.tokens for step in Plan(Table(lengths), max_tokens=MAX_TOKENS, epochs=1) for pack in step.hands[0]]
    assert sum(rows) == lengths.sum()
    return {"stages": stages, "rows": len(rows), "fill": sum(rows) / (len(rows) * MAX_TOKENS)}


def _peak_gib() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def table(found: list[dict]) -> str:
    """Draw the medians of every model beside the targets, and the largest peak."""
    parts = ("build", "wrap", "plan")
    lines = ["| model | parameters | build | wrap | plan | all three, s (CPU s) | target s | imports, s (CPU s) | peak GiB | target GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for model in dict.fromkeys(x["model"] for x in found):
        runs = [x for x in found if x["model"] == model]
        each = {key: statistics.median(run["seconds"][key] for run in runs) for key in runs[0]["seconds"]}
        wall, cpu = (statistics.median(sum(run["seconds"][part + end] for part in parts) for run in runs) for end in ("", "_cpu"))
        numbers = " | ".join(f"{each[part]:.1f}" for part in parts)
        peak = max(run["peak_gib"] for run in runs)
        loading = f"{each['import']:.1f} ({each['import_cpu']:.1f})"
        row = f"{numbers} | {wall:.1f} ({cpu:.1f}) | {TARGET_SECONDS} | {loading} | {peak:.2f} | {TARGET_GIB}"
        lines.append(f"| {model} | {runs[0]['parameters']:,} | {row} |")
    return "\n".join(lines)


def main() -> None:
    """Run all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names in conf/model, with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file that the JSON lines are added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    found = []
    for _ in range(arguments.repeats):
        for model in arguments.models.split(","):
            command = [sys.executable, __file__, "--child", model]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            found.append({"model": model, **json.loads(result)})
            print(json.dumps(found[-1]), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    print(f"\nCPU, 1 thread; {SAMPLES:,} samples into rows of {MAX_TOKENS}; {arguments.repeats} runs a model\n\n{table(found)}")


if __name__ == "__main__":
    main()
