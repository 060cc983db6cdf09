"""Checkpoints that survive a full disk and a kill: written beside, synced, then renamed over the old one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from infimed.contracts import UserError
from infimed.models.weights import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to `NAME.tmp`, sync, rename: at any moment the file under its name is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: object = None) -> None:
        """Save; on a full disk the previous checkpoint stays as it was.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        path = Path(path)
        part = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            part.unlink(missing_ok=True)
            kept = "the previous checkpoint is untouched" if path.exists() else "there is no earlier one"
            cause = str(error).splitlines()[0]
            raise UserError(
                f"could not save {path} ({cause}); {kept}. If the disk is full, free some space or set run_dir to another disk"
            ) from error

    def load_checkpoint(self, path: str | os.PathLike, map_location: object = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values; never runs code from the file, whatever the caller asks."""
        return read_checkpoint(Path(path))
