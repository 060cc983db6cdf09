"""The training loops of the GPU benchmark, ours and Lightning's, and the meter that times their optimizer steps."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from infimed.contracts import Batch
from infimed.models.vlm import InfiMed

if TYPE_CHECKING:
    from gpu_cases import Row, World

GIB = 2**30
KERNEL_GROUPS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_"),
    "optimizer": ("multi_tensor", "adam"),
}
"""What a CUDA kernel is for, by a part of its name; the first match wins."""


class Skip(Exception):
    """A case that cannot run here, and why."""


class Meter:
    """Times optimizer steps: warm-up, then the clock; on a GPU afterwards steps that count what waits for the device, and a profile.

    Steps are marked by events and not waited for, save that the host stays at most two steps ahead.
    """

    def __init__(self, device: torch.device, *, warmup: int, steps: int, deadline: float, thorough: bool) -> None:
        """Get ready; `deadline` ends the timed part early (not below three steps), `thorough` asks for the counts."""
        self.cuda = device.type == "cuda"
        self.warmup, self.steps, self.deadline = warmup, steps, deadline
        self.counted, self.profiled = (3, 2) if thorough and self.cuda else (0, 0)
        self.done = 0
        self.marks: list[float | torch.cuda.Event] = []
        self.found: dict[str, object] = {}
        self.first_loss: torch.Tensor | float | None = None
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def after_step(self) -> bool:
        """Take note of a finished optimizer step; return whether that was the last."""
        self.done += 1
        if self.done < self.warmup:
            return False
        timed = self.done - self.warmup
        if timed == 0:
            self._graphs = _graphs()
        if timed <= self.steps:
            self._mark()
            late = timed >= 3 and time.monotonic() > self.deadline
            if timed < self.steps and not late:
                return False
            self.steps = timed
            self._end_of_timing()
        return self._count(timed - self.steps)

    def _mark(self) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()
        if len(self.marks) > 2:
            self.marks[-3].synchronize()

    def _end_of_timing(self) -> None:
        self.found["recompiles"] = _graphs() - self._graphs
        if not self.cuda:
            self.found["step_ms"] = [1e3 * (b - a) for a, b in pairwise(self.marks)]
            return
        torch.cuda.synchronize()
        self.found["step_ms"] = [a.elapsed_time(b) for a, b in pairwise(self.marks)]
        self.found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        self.found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        self.found["clocks"] = _clocks()

    def _count(self, extra: int) -> bool:
        """Run the steps after the clock: `counted` that warn of every wait, `profiled` under the profiler."""
        if extra == 0 and self.counted:
            self._warnings = warnings.catch_warnings(record=True)
            self._caught = self._warnings.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif extra == self.counted and self.counted:
            torch.cuda.set_sync_debug_mode("default")
            self._warnings.__exit__(None, None, None)
            waits = [w for w in self._caught if "called a synchronizing" in str(w.message)]
            self.found["syncs"] = len(waits) / self.counted
            self.found["sync_sites"] = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})[:8]
            self._profile = torch.profiler.profile()
            self._profile.start()
        if extra < self.counted + self.profiled:
            return False
        if self.profiled:
            torch.cuda.synchronize()
            self._profile.stop()
            self.found |= read_profile(self._profile.key_averages(), steps=self.profiled)
        return True

    def result(self, world: World) -> dict[str, object]:
        """Put the figures together."""
        times = self.found.pop("step_ms")
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        rows = [row for step in range(self.warmup, self.warmup + self.steps) for row in world.rows_of(step)]
        second = 1e3 / middle / self.steps
        kernels = self.found.get("kernel_ms")
        return {
            "steps": self.steps,
            "step_ms": middle,
            "iqr_ms": high - low,
            "tokens_s": sum(row.batch.tokens for row in rows) * second,
            "supervised_s": sum(row.batch.supervised_tokens for row in rows) * second,
            "images_s": sum(len(row.batch.images) for row in rows) * second,
            "tflop": world.tflop,
            "tflops": world.tflop * 1e3 / middle,
            **({"gpu_busy": sum(kernels.values()) / middle} if kernels else {}),
            **self.found,
            "loss": float(self.first_loss),
        }


def read_profile(averages: Sequence[object], *, steps: int) -> dict[str, object]:
    """Count launches and sort the GPU's time by what it is for, a step."""
    split = dict.fromkeys([*KERNEL_GROUPS, "other"], 0.0)
    for event in averages:
        # annotations span kernels on the same device and would count them twice
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            group = next((g for g, parts in KERNEL_GROUPS.items() if any(p in event.key.lower() for p in parts)), "other")
            split[group] += event.self_device_time_total / 1e3 / steps
    launches = sum(event.count for event in averages if "LaunchKernel" in event.key)
    waits = sum(event.count for event in averages if event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    return {"launches": launches / steps, "profiler_waits": waits / steps, "kernel_ms": split}


def _graphs() -> int:
    """Count the graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _clocks() -> str:
    """Read clocks and power; never set them."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"not read: {type(error).__name__}"


class RawLoop:
    """A training loop without a framework: rows in, one optimizer step out. A case is its model, its parts of a row and its loss."""

    def __init__(
        self,
        world: World,
        model: nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        parts: Callable[[Row, int], list[dict]],
        autocast: bool = False,
        item: bool = False,
        splittable: bool = False,
        about: Mapping[str, object] | None = None,
        close: Callable[[], object] = lambda: None,
    ) -> None:
        """Lay the parts ready.

        Args:
            loss: summed loss of one part.
            parts: what `loss` takes, as one or more micro-batches of a row, and `slots`, the tokens with padding; takes a row and the
                number of micro-batches.
            item: ask for the loss at every step, as many loops do.
            splittable: whether more micro-batches are a way out of too little memory.
            about: what to write beside the figures.
            close: undoes what building the case changed outside of it.
        """
        self.world, self.model, self.loss, self.optimizer = world, model, loss, optimizer
        self.parts, self.item, self.about, self.close = parts, item, dict(about or {}), close
        self.dtype = torch.bfloat16 if autocast else None
        self.most = max(len(row.lengths) for row in world.rows) if splittable else 1
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self._split(1)

    def _split(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.prepared = {id(row): self.parts(row, micro_batches) for row in self.world.rows}
        slots = sum(part.pop("slots") for parts in self.prepared.values() for part in parts)
        self.about |= {"pad": 1 - sum(row.batch.tokens for row in self.world.rows) / slots, "micro_batches": micro_batches}

    def halve(self) -> bool:
        """Try smaller micro-batches after running out of memory; False: there are none."""
        if self.micro_batches >= self.most:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        self._split(min(2 * self.micro_batches, self.most))
        return True

    def run(self, meter: Meter) -> None:
        """Train until the meter has enough."""
        while True:
            rows = self.world.rows_of(meter.done)
            supervised, losses = sum(row.batch.supervised_tokens for row in rows), []
            for part in (part for row in rows for part in self.prepared[id(row)]):
                with self._precision():
                    loss = self.loss(**part) / supervised
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total = torch.stack(losses).sum()
            if self.item:
                total.item()
            if meter.first_loss is None:
                meter.first_loss = total
            if meter.after_step():
                return

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, dtype=self.dtype) if self.dtype else nullcontext()


class LightningLoop:
    """O2: the same model through `TrainModule` and Lightning's Trainer, fed by the same rows."""

    def __init__(self, world: World, model: InfiMed, *, about: Mapping[str, object]) -> None:
        """Wrap the model. Raises: Skip where Lightning is not installed."""
        try:
            import lightning
        except ImportError as error:
            raise Skip(f"lightning is not installed ({error})") from error
        self.lightning, self.world, self.model = lightning, world, model
        slots = sum(row.batch.input_ids.numel() for row in world.rows)
        self.about = {**about, "pad": 1 - sum(row.batch.tokens for row in world.rows) / slots, "micro_batches": 1}

    def close(self) -> None:
        """Nothing outside was changed."""

    def halve(self) -> bool:
        """There are no smaller micro-batches than a row."""
        return False

    def run(self, meter: Meter) -> None:
        """Train until the meter has enough."""
        from infimed.training.module import TrainModule

        system = TrainModule(
            self.model, total_steps=10_000, trainable=self.world.trained, lr=1e-5, log_every=10_000, sources=("synthetic",)
        )
        lightning, world = self.lightning, self.world

        class Endless:
            def __iter__(self) -> Iterator[Batch]:
                return (row.batch for step in count() for row in world.rows_of(step))

        class Stream(lightning.LightningDataModule):
            def train_dataloader(self) -> Endless:
                return Endless()

            def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
                return batch.to(device)

            def consumed(self, batch: Batch) -> None:
                """TrainModule reports every row here."""

        class Clock(lightning.Callback):
            def on_train_batch_end(self, trainer: object, module: object, outputs: object, batch: Batch, batch_idx: int) -> None:
                if (batch_idx + 1) % world.accumulate:
                    return
                if meter.first_loss is None:
                    meter.first_loss = system.last_loss
                trainer.should_stop = trainer.should_stop or meter.after_step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                accelerator="gpu" if world.device.type == "cuda" else "cpu",
                devices=1,
                # bf16 weights are bf16 already; Lightning's bf16-true would cast RoPE's frequencies too
                precision="bf16-mixed" if world.precision == "mixed" else "32-true",
                max_epochs=1,
                accumulate_grad_batches=world.accumulate,
                gradient_clip_val=1.0,
                callbacks=[Clock()],
                **dict.fromkeys(
                    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
                ),
            )
            trainer.fit(system, datamodule=Stream())


def release(device: torch.device) -> None:
    """Give back what the last case held: memory, compiled code, the process group, the watch for waits."""
    gc.collect()
    torch._dynamo.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
