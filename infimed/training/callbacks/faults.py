"""Samples that were left out, by source and reason: in TensorBoard while it runs, in one line and a list at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import torch

from infimed.contracts import Batch


class Faults(lightning.Callback):
    """Report over-long and quarantined samples of all ranks; nothing vanishes silently, nor at a resume."""

    def __init__(self, *, folder: str | None = None) -> None:
        """folder: where `overlong.jsonl` is written when training ends, for a longer stage; None: nowhere."""
        self.folder = folder
        self.latest: dict[str, int] = {}  # what the progress bar shows

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write what is known before the first step."""
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Add up over ranks and write, every `log_every` optimizer steps."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step % pl_module.log_every == 0:
            self._write(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print what was left out, once, and list what a longer row would hold."""
        faults = self._write(trainer)
        if not faults or not trainer.is_global_zero:
            return
        print("left out: " + ", ".join(f"{name} {count:,}" for name, count in sorted(faults.items())))
        if self.folder is not None and any(name.endswith("/overlong") for name in faults):
            path = Path(self.folder) / "overlong.jsonl"
            count = trainer.datamodule.write_overlong(path)
            print(f"  {count:,} samples are longer than a row: data.only=[{path}] takes them up in a longer stage")

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the counters of all ranks; Lightning asks every rank."""
        seen, faults = _over_ranks(trainer)
        checkpoint["quarantine"] = {"seen": seen, "faults": dict(faults)}

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        if stored := checkpoint.get("quarantine"):
            trainer.datamodule.quarantine.resume(seen=stored["seen"], faults=stored["faults"])

    def _write(self, trainer: lightning.Trainer) -> dict[str, int]:
        _, quarantined = _over_ranks(trainer)
        self.latest = {**trainer.datamodule.overlong(), **quarantined}
        counted = {f"data/dropped_{name}": float(count) for name, count in self.latest.items()}
        for logger in trainer.loggers if counted else ():
            logger.log_metrics(counted, step=trainer.global_step)
        return self.latest


def _over_ranks(trainer: lightning.Trainer) -> tuple[int, Counter[str]]:
    """Add up what the ranks have seen and quarantined since the run began, earlier runs of it included."""
    quarantine = trainer.datamodule.quarantine
    mine = (quarantine.seen, quarantine.faults)
    ranks: list[tuple[int, Counter[str]]] = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, mine)
    seen, faults = quarantine.earlier_seen, quarantine.earlier.copy()
    for one_seen, one in ranks:
        seen, faults = seen + one_seen, faults + one
    return seen, faults
