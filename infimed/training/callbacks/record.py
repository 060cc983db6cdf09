"""What this run was: its configuration as text, its hyper-parameters with the final metric, every step's loss and samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from infimed.contracts import Batch
from infimed.training.run import flat


class Record(lightning.Callback):
    """Write `steps.jsonl` (step, loss, digest of the sample keys) and, to TensorBoard, the configuration and the final metric.

    Two runs that agree in this file saw the same samples and took the same steps: it is what a resumed run is compared by. The digest is of
    the set of keys that all ranks saw in an optimizer step, whatever their order: another number of ranks writes the same line.
    """

    def __init__(self, *, folder: str, keys: bool = False) -> None:
        """Write into `folder`; with `keys` also `keys.jsonl`, the samples themselves: step, keys of each rank in their order."""
        self.steps = Path(folder) / "steps.jsonl"
        self.names = Path(folder) / "keys.jsonl" if keys else None
        self._keys: list[str] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the resolved configuration as a text panel."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", _code(yaml.safe_dump(pl_module.stored["config"], sort_keys=False)), 0)
                logger.experiment.add_text("parameters", _code(pl_module.describe()), 0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget lines of steps that a resumed run is about to take again."""
        self._keys = []
        if trainer.is_global_zero:
            for path in (self.steps, self.names):
                if path is not None:
                    _cut(path, after=trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Append a line an optimizer step."""
        self._keys += batch.keys
        if trainer.fit_loop._should_accumulate():
            return
        mine, self._keys = self._keys, []
        samples, digest = _over_ranks(trainer, mine)
        lines = {self.steps: {"step": trainer.global_step, "loss": pl_module.last_loss, "samples": samples, "keys": digest}}
        if self.names is not None:
            lines[self.names] = {"step": trainer.global_step, "keys": _of_each_rank(trainer, mine)}
        if trainer.is_global_zero:
            for path, line in lines.items():
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the hyper-parameters once, with the final validation loss, so that TensorBoard's table is not empty."""
        final = trainer.callback_metrics.get("val/loss")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                metrics = {"final/val_loss": float(final)} if final is not None else {"final/train_loss": pl_module.last_loss}
                logger.log_hyperparams(_plain(pl_module.stored["config"]), metrics, step=trainer.global_step)


def _cut(path: Path, *, after: int) -> None:
    """Keep the whole lines of the steps up to `after`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() and after else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after))


def _over_ranks(trainer: lightning.Trainer, keys: Sequence[str]) -> tuple[int, str]:
    """Count the keys of all ranks and digest them: the sum of their hashes, which has no order and misses no key that came twice."""
    hashes = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys]
    # in halves, so that no sum leaves int64
    sums = torch.tensor([len(hashes), sum(h >> 32 for h in hashes), sum(h & 0xFFFFFFFF for h in hashes)], dtype=torch.int64)
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
    count, high, low = sums.tolist()
    return count, f"{((high << 32) + low) % 2**64:016x}"


def _of_each_rank(trainer: lightning.Trainer, keys: list[str]) -> list[list[str]]:
    """Gather the keys of every rank."""
    ranks = [keys] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, keys)
    return ranks


def _code(text: str) -> str:
    """Indent as a Markdown code block."""
    return "\n".join("    " + line for line in text.splitlines())


def _plain(config: Mapping) -> dict[str, float | int | str | bool]:
    """Flatten to dotted keys with plain values, as TensorBoard's table of runs wants them."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat(config).items()}
