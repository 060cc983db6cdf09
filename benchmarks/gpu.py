"""Measure training on a GPU against the ways that others train: one call, a time budget, JSON lines, tables last.

    python benchmarks/gpu.py --budget 540 --out gpu.jsonl
        [--only ceilings,attention,loss,train] [--models 1.7b,4b,tiny] [--stages s1,s2,sft,sft729,text]
        [--cases B0,B1,B2,B2gc,B3,B3sac,O1,O2,O3,O4]
        [--accumulate 1] [--tokens 16384] [--precision bf16|mixed|fp32] [--spread 0.4] [--steps 10] [--device cuda|cpu]

Every case is appended to the file as soon as it is measured. What the file already holds with the same settings is not measured again, so a
killed or finished call is continued by the same command. No case begins that is not expected to end within the budget. Exit code 1: a case
failed, or two that compute the same loss disagree.

Cases: B0 transformers' Trainer default, B1 nanoVLM's way, B2 packed transformers (+ liger), B3 torchtitan's recipe; O1 ours in a raw loop,
O2 ours through Lightning, O3 that in fp8, O4 another attention kernel. In a stage the first of ours runs first and again last: the drift.
Random weights, synthetic rows that lie on the device: no loader is timed. `--device cpu --models tiny` runs all that a CPU can, as a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU host may have no installed infimed: a checkout will do

import gpu_cases
import gpu_kernels
import gpu_tables
import torch
import transformers
from gpu_baselines import BASELINES
from gpu_loops import Meter, Skip, release

SECTIONS = ("ceilings", "attention", "loss", "train")
CASES = ("B0", "B1", "B2", "B2gc", "B3", "B3sac", "O1", "O2", "O3", "O4")
TFLOPS = {"B0": 50, "B1": 50, "B2": 150, "B2gc": 120, "B3": 200, "B3sac": 180}
"""A cautious rate a case, ours 250: what the budget is planned with."""

COMPILING = 60
"""Seconds to build a model on a GPU and compile its blocks, likewise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print the tables."""
    begun = time.monotonic() - time.process_time()  # imports count: they have taken about as much
    args = _arguments(argv)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    bench = Bench(args, device, deadline=begun + args.budget)
    left_out = bench.run()
    # other settings and devices may share the file: each has its tables
    lines = [x for x in gpu_tables.read(args.out) if x["settings"] == bench.settings]
    print(gpu_tables.report(lines, bench.header, left_out), flush=True)
    return 1 if any(x["status"] == "failed" for x in lines) or gpu_tables.disagreements(lines) else 0


class Bench:
    """Runs cases within a budget and writes them down."""

    def __init__(self, args: argparse.Namespace, device: torch.device, *, deadline: float) -> None:
        """Get ready."""
        cuda = device.type == "cuda"
        self.args, self.device, self.deadline = args, device, deadline
        self.models = args.models.split(",")
        self.steps_in_all = args.warmup + args.steps + 5  # the last ones count and profile
        name = torch.cuda.get_device_name(device) if cuda else f"CPU, {args.threads} thread(s)"
        self.settings = {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accumulate": args.accumulate,
            "precision": args.precision or ("bf16" if cuda else "fp32"),
            "compiler": args.compiler or ("inductor" if cuda else "eager"),
            "tokens": args.tokens,
            "spread": args.spread,
        }
        self.header = "; ".join(f"{key} {value}" for key, value in self.settings.items())

    def run(self) -> list[str]:
        """Measure case after case; returns the names of those that the budget left out."""
        done = {gpu_tables.key(x) for x in gpu_tables.read(self.args.out) if x["status"] == "measured"}
        left_out = []
        for label, estimate, measure in self._cases():
            line = {**label, "settings": self.settings}
            if gpu_tables.key(line) in done:
                continue
            if time.monotonic() + estimate() >= self.deadline:
                left_out.append(" ".join(map(str, label.values())))
                continue
            line |= self._guarded(measure)
            with self.args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps({k: v for k, v in line.items() if k != "settings"}), flush=True)
        return left_out

    def _guarded(self, measure: Callable[[], dict]) -> dict:
        """Run one case; a crash is written down and costs the other cases nothing."""
        begun = time.monotonic()
        try:
            found = {"status": "measured", **measure()}
        except Skip as reason:
            found = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
        return {**found, "wall_s": round(time.monotonic() - begun, 1)}

    def _cases(self) -> Iterator[tuple[dict, Callable[[], float], Callable[[], dict]]]:
        """Yield every case that is asked for: its label, the seconds that it may take, and what measures it."""
        only = self.args.only.split(",")
        tokens = self.args.tokens if self.device.type == "cuda" else 256
        sizes = {model: gpu_cases.sizes_of(model) for model in self.models}
        micro = {
            "ceilings": lambda: gpu_kernels.ceilings(self.device, sizes, tokens=tokens),
            "attention": lambda: gpu_kernels.attention(self.device, tokens=tokens),
            "loss": lambda: gpu_kernels.losses(self.device, tokens=tokens),
        }
        for section in (s for s in SECTIONS if s in only and s in micro):
            for case, measure in micro[section]().items():
                yield {"section": section, "case": case}, lambda: 5.0 if self.device.type == "cuda" else 0.0, measure
        if "train" in only:
            for model in self.models:
                for stage in self.args.stages.split(","):
                    yield from self._training(model, stage)

    def _training(self, model: str, stage: str) -> Iterator[tuple[dict, Callable[[], float], Callable[[], dict]]]:
        """Yield the cases of a stage, the first of ours before and after the others."""
        asked = self.args.cases.split(",")
        anchor = next((case for case in asked if case.startswith("O")), asked[0])
        others = [case for case in asked if case != anchor]
        world = cache(lambda: self._world(model, stage))
        for number, case in [(1, anchor), *((1, case) for case in others), *([(2, anchor)] if others else [])]:
            label = {"section": "train", "model": model, "stage": stage, "case": case, "round": number}
            yield label, lambda case=case: self._seconds(case, world), lambda case=case: self._train(case, world())

    def _seconds(self, case: str, world: Callable[[], gpu_cases.World]) -> float:
        if self.device.type != "cuda" or time.monotonic() > self.deadline:
            return 0.0
        return COMPILING + self.steps_in_all * world().tflop / TFLOPS.get(case, 250)

    def _world(self, model: str, stage: str) -> gpu_cases.World:
        """Draw the rows of a stage."""
        args, sizes = self.args, gpu_cases.sizes_of(model)
        plan = gpu_cases.TINY[stage] if model == "tiny" else gpu_cases.STAGES[stage].scaled(args.tokens)
        image_token = sizes["language"]["vocab_size"] - 1
        count = self.steps_in_all * args.accumulate  # no row comes twice: a graph made for a new one shows
        rows = gpu_cases.make_rows(plan, sizes=sizes, rows=count, spread=args.spread, image_token=image_token, device=self.device)
        return gpu_cases.World(
            device=self.device,
            sizes=sizes,
            stage=plan,
            trained=gpu_cases.FROZEN_TOWER.get((model, stage), plan.trained),
            rows=rows,
            image_token=image_token,
            **{name: self.settings[name] for name in ("accumulate", "precision", "compiler")},
        )

    def _train(self, case: str, world: gpu_cases.World) -> dict:
        """Measure one training case, in smaller micro-batches where memory asks for them."""
        release(self.device)
        loop = {**BASELINES, **gpu_cases.OURS}[case](world)
        try:
            while True:
                meter = Meter(
                    self.device,
                    warmup=self.args.warmup,
                    steps=self.args.steps,
                    deadline=self.deadline,
                    thorough=case.startswith("O"),
                )
                try:
                    loop.run(meter)
                    return {**meter.result(world), **loop.about}
                except torch.OutOfMemoryError as error:
                    message = str(error)[:200]
                # outside of the handler, whose traceback holds on to the tensors
                if not loop.halve():
                    raise RuntimeError(f"out of memory with {loop.about['micro_batches']} micro-batches: {message}")
                torch.cuda.empty_cache()
        finally:
            loop.close()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds, imports and compilation included")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="JSON lines; continued if it exists")
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--models", default="1.7b,4b")
    parser.add_argument("--stages", default="s1,s2,sft,text")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--accumulate", type=int, default=1, help="rows an optimizer step")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a row; the tiny model's rows stay as they are")
    parser.add_argument("--precision", choices=("bf16", "mixed", "fp32"), help="of our own cases; fp32 is for all cases")
    parser.add_argument("--spread", type=float, default=0.4, help="log-normal sigma of the text lengths; 0: equal documents, no padding")
    parser.add_argument("--compiler", help="backend of torch.compile")
    parser.add_argument("--warmup", type=int, help="optimizer steps before the clock starts; 3, on a CPU 1")
    parser.add_argument("--steps", type=int, help="timed optimizer steps; 10, on a CPU 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.warmup = (3 if cuda else 1) if args.warmup is None else args.warmup
    args.steps = (10 if cuda else 3) if args.steps is None else args.steps
    known = {
        "only": SECTIONS,
        "cases": CASES,
        "models": ("1.7b", "4b", "tiny"),
        "stages": ("s1", "s2", "sft", "sft729", "text"),
    }
    for option, choices in known.items():
        if unknown := [x for x in getattr(args, option).split(",") if x not in choices]:
            parser.error(f"--{option} {','.join(unknown)}: expected some of {','.join(choices)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
