"""Checkpoints that survive a full disk, a kill and another number of ranks: whole on the disk, and always at an optimizer step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from infimed.contracts import UserError
from infimed.models.weights import read_checkpoint

POSITION = "ShardDataModule"  # where Lightning keeps the data module's state in a checkpoint: the name of its class


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to `NAME.tmp`, sync, rename: at any moment the file under its name is whole.

    The data position is written beside it for the reader, `last.data.json` for `last.ckpt`. Nothing reads that file back, so a kill between
    the two files does no harm.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: object = None) -> None:
        """Save; on a full disk the previous checkpoint stays as it was.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda file: torch.save(checkpoint, file))
            if position := checkpoint.get(POSITION):
                text = json.dumps({"step": checkpoint.get("global_step"), **position}, indent=1) + "\n"
                replace_file(path.with_suffix(".data.json"), lambda file: file.write(text.encode()))
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            kept = "the previous checkpoint is untouched" if path.exists() else "there is no earlier one"
            cause = str(error).splitlines()[0]
            raise UserError(
                f"could not save {path} ({cause}); {kept}. If the disk is full, free some space or set run_dir to another disk"
            ) from error

    def load_checkpoint(self, path: str | os.PathLike, map_location: object = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values; never runs code from the file, whatever the caller asks."""
        return read_checkpoint(Path(path))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write` writes in the place of a file, in one instant; when it fails nothing has changed."""
    part = path.with_name(path.name + ".tmp")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def in_mid_step(trainer: lightning.Trainer) -> bool:
    """Say whether gradients of micro-batches wait for the optimizer, also while a validation comes between them."""
    return trainer.fit_loop._should_accumulate()


def recount(checkpoint: dict[str, Any], *, accumulation: int) -> None:
    """Rewrite Lightning's batch counters, in place, as if the checkpoint had been saved by a run of `accumulation` micro-batches a step.

    Lightning counts micro-batches, of which another number of ranks takes another number; optimizer steps are what both runs share.
    A checkpoint from between two steps holds weights and data position of the last one (`TrainModule.on_save_checkpoint`); now its counters
    say so too. Nothing changes when the cut is the same.
    """
    steps = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):  # the same: to Lightning all of training is one epoch
        open_batches = counts["ready"] - counts["completed"]  # 1 when a callback saved it from on_train_batch_end, which completes later
        counts["ready"] = counts["started"] = counts["processed"] = steps * accumulation
        counts["completed"] = steps * accumulation - open_batches
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - open_batches
