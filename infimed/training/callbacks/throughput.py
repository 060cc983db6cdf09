"""How fast, how full, and how long the model waited for data."""

from __future__ import annotations

import time
from dataclasses import dataclass

import lightning
import torch

from infimed.contracts import Batch
from infimed.processing.flops import Work, flops, mfu, peak_tflops


@dataclass
class _Window:
    """Sums since the last log line, of this rank."""

    began: float
    tokens: int = 0
    visual_tokens: int = 0
    slots: int = 0
    operations: int = 0


class Throughput(lightning.Callback):
    """Log tokens a second (this rank's times the number of ranks), FLOPs, pack utilisation and the share of wall time spent on data."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.latest: dict[str, float] = {}
        self._window = _Window(time.perf_counter())

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock when the first batch is asked for."""
        self._window = _Window(time.perf_counter())
        trainer.datamodule.waited = 0.0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave validation out of the training figures."""
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Add up; log once every `log_every` optimizer steps."""
        window = self._window
        window.tokens += batch.tokens
        window.visual_tokens += batch.visual_tokens
        window.slots += batch.input_ids.numel()
        if pl_module.shape is not None:
            window.operations += flops(pl_module.shape, Work.of_batch(batch), trained=pl_module.trainable).total
        if trainer.fit_loop._should_accumulate() or trainer.global_step % pl_module.log_every:
            return
        if trainer.strategy.root_device.type == "cuda":  # launches are asynchronous: without this the first window looks too fast
            torch.cuda.synchronize()
        seconds = max(time.perf_counter() - window.began, 1e-9)
        self.latest = {
            "perf/tokens_per_s": window.tokens * trainer.world_size / seconds,
            "perf/visual_tokens_per_s": window.visual_tokens * trainer.world_size / seconds,
            "perf/data_wait": trainer.datamodule.waited / seconds,
            "train/pack_utilisation": window.tokens / window.slots,
        }
        if window.operations:
            # of one device; what is padding or computed twice counts nothing
            self.latest["perf/tflops"] = window.operations / seconds / 1e12
            if peak := self._peak(trainer.strategy.root_device):
                self.latest["perf/mfu"] = mfu(window.operations, seconds=seconds, peak_tflops=peak)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)
        self.on_train_start(trainer, pl_module)

    @staticmethod
    def _peak(device: torch.device) -> float | None:
        """Look up the dense bf16 peak of a device in TFLOP/s; none for a CPU or an unknown one."""
        return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
