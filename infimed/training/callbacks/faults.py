"""Samples that were left out, by source and reason: in TensorBoard while it runs, in one line at the end."""

from __future__ import annotations

import lightning

from infimed.contracts import Batch


class Faults(lightning.Callback):
    """Report over-long and quarantined samples; nothing vanishes silently."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write what is known before the first step: samples that are too long."""
        _write(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Write the counters when they have moved."""
        if batch.faults:
            _write(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print what was left out, once."""
        faults = trainer.datamodule.faults()
        if faults and trainer.is_global_zero:
            print("left out: " + ", ".join(f"{name} {count:,}" for name, count in sorted(faults.items())))


def _write(trainer: lightning.Trainer) -> None:
    counted = {f"data/dropped_{name}": float(count) for name, count in trainer.datamodule.faults().items()}
    for logger in trainer.loggers if counted else ():
        logger.log_metrics(counted, step=trainer.global_step)
