"""What this run was: its configuration as text, its hyper-parameters with the final metric, every step's loss and samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import lightning
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from infimed.contracts import Batch
from infimed.training.run import flat


class Record(lightning.Callback):
    """Write `steps.jsonl` (step, loss, digest of the sample keys) and, to TensorBoard, the configuration and the final metric.

    Two runs that agree in this file saw the same samples and took the same steps: it is what a resumed run is compared by.
    """

    def __init__(self, *, folder: str) -> None:
        """Write into `folder`."""
        self.path = Path(folder) / "steps.jsonl"
        self._keys: list[str] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the resolved configuration as a text panel."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", _code(yaml.safe_dump(pl_module.stored["config"], sort_keys=False)), 0)
                logger.experiment.add_text("parameters", _code(pl_module.describe()), 0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget lines of steps that a resumed run is about to take again."""
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() and trainer.global_step else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
        self.path.write_text("".join(kept))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Append a line an optimizer step."""
        self._keys += batch.keys
        if trainer.fit_loop._should_accumulate() or not trainer.is_global_zero:
            return
        digest = hashlib.blake2b("\n".join(self._keys).encode(), digest_size=8).hexdigest()
        line = {"step": trainer.global_step, "loss": pl_module.last_loss, "samples": len(self._keys), "keys": digest}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._keys = []

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the hyper-parameters once, with the final validation loss, so that TensorBoard's table is not empty."""
        final = trainer.callback_metrics.get("val/loss")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                metrics = {"final/val_loss": float(final)} if final is not None else {"final/train_loss": pl_module.last_loss}
                logger.log_hyperparams(_plain(pl_module.stored["config"]), metrics, step=trainer.global_step)


def _code(text: str) -> str:
    """Indent as a Markdown code block."""
    return "\n".join("    " + line for line in text.splitlines())


def _plain(config: Mapping) -> dict[str, float | int | str | bool]:
    """Flatten to dotted keys with plain values, as TensorBoard's table of runs wants them."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat(config).items()}
