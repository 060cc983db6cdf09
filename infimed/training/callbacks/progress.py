"""The progress bar: loss, tokens a second, utilisation; tqdm adds rate and ETA."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar

from infimed.training.callbacks.faults import Faults
from infimed.training.callbacks.throughput import Throughput


class Progress(TQDMProgressBar):
    """Show plain numbers; reading the loss waits for the device, once in `refresh_rate` micro-batches."""

    def __init__(self, *, refresh_rate: int = 10) -> None:
        """Redraw every `refresh_rate` micro-batches."""
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, str]:
        """Return what stands behind the bar."""
        speed = next((c.latest for c in trainer.callbacks if isinstance(c, Throughput)), {})
        shown = {"loss": f"{pl_module.last_loss:.3f}"}
        if speed:
            shown["tok/s"] = f"{speed['perf/tokens_per_s']:,.0f}"
            shown["fill"] = f"{speed['train/pack_utilisation']:.1%}"
            shown["wait"] = f"{speed['perf/data_wait']:.0%}"
        dropped = sum(sum(c.latest.values()) for c in trainer.callbacks if isinstance(c, Faults))
        return shown | ({"dropped": str(dropped)} if dropped else {})
