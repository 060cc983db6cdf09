"""The life of a run on disk, and the few numbers that depend on the machine."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.plugins import HalfPrecision

from infimed.contracts import Batch, UserError
from infimed.models.adapters import is_adapter
from infimed.models.checkpoints import read_checkpoint
from infimed.processing.flops import Work, describe, flops, shape_of
from infimed.training.checkpoint import POSITION
from infimed.training.module import TrainModule

log = logging.getLogger(__name__)

DONE = "done.json"
FREE = frozenset(
    {
        "system.log_every",
        *(f"data.{name}" for name in ("train", "val", "tokenizer", "quarantine_path", "packs_per_batch")),
        *(f"data.{name}" for name in ("num_workers", "prefetch", "prefetch_mb", "read_threads", "cache", "cache_gb", "access")),
        *(f"data.{name}" for name in ("max_fault_rate", "min_seen", "max_faults_in_a_row")),
    }
)
"""Options that may differ from one start of a run to the next."""


def seed_everything(seed: int) -> None:
    """Fix what random init draws from; the data has no generator state (data/order.py)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def precision(asked: str, accelerator: str) -> str:
    """Resolve `auto`: bf16 where the device computes in it, else float32.

    Raises:
        UserError: half precision that needs its losses scaled, or an unknown name.
    """
    known = ("auto", "bf16-mixed", "bf16-true", "32-true")
    if str(asked) not in known:
        raise UserError(f"trainer.precision={asked}: expected {', '.join(known)}")
    if asked != "auto":
        return asked
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


class HalfWeights(HalfPrecision):
    """Weights, gradients and moments in bf16, as `bf16-true`, but for what must not be: rotary frequencies, and the batch as it is.

    Lightning's own rounds buffers too, which bends the positions of long rows, and cannot handle a frozen dataclass.
    """

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Round the parameters."""
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._desired_input_dtype)
        return module

    def convert_input(self, data: Batch) -> Batch:
        """Leave the batch alone: ids and bytes."""
        return data


def accumulation(*, global_batch: int, packs_per_batch: int, world_size: int) -> int:
    """Return the micro-batches an optimizer step.

    Raises:
        UserError: the global batch cannot be cut evenly.
    """
    micro = packs_per_batch * world_size
    if global_batch % micro:
        near = max(micro, round(global_batch / micro) * micro)
        raise UserError(
            f"global_batch={global_batch} rows cannot be shared evenly by {world_size} ranks of data.packs_per_batch={packs_per_batch}; "
            f"expected a multiple of {micro}, e.g. global_batch={near}"
        )
    return global_batch // micro


def resume_point(stage: Mapping, *, world_size: int) -> str | None:
    """Return the checkpoint that an earlier run left in the stage's folder, if any.

    Ranks and rows a rank may have changed: the global batch decides which samples an optimizer step sees.

    Args:
        stage: the stage's configuration.

    Raises:
        UserError: it was trained otherwise: naming every option that differs.
    """
    path = Path(stage["folder"]) / "last.ckpt"
    if not path.is_file():
        return None
    stored = read_checkpoint(path, mmap=True)["infimed"]
    before, now = _decisive(stored["config"]), _decisive(stage)
    if different := [
        f"{key}: {before.get(key)} then, {now.get(key)} now" for key in sorted(before | now) if before.get(key) != now.get(key)
    ]:
        raise UserError(
            f"{path} was trained with other options, so it cannot go on as if nothing had happened:\n  "
            + "\n  ".join(different)
            + "\nuse the same ones, or another run_dir (with init_from to start from these weights)"
        )
    if stored["world_size"] != world_size:
        log.warning(
            "%s: %d ranks then, %d now; optimizer steps see the same samples as ever, their losses differ by rounding alone",
            path,
            stored["world_size"],
            world_size,
        )
    return str(path)


def data_position(path: str) -> dict[str, object]:
    """Return where the data stood: it knows the length of the plan, which would have to be simulated before Lightning restores it."""
    return read_checkpoint(Path(path), mmap=True).get(POSITION, {})


def _decisive(stage: Mapping) -> dict[str, object]:
    """Flatten the options that decide what is computed; how data are fetched and dealt, logging and places are free to change.

    Other shards in the places are found out by the data position's fingerprint.
    """
    picked = {name: stage[name] for name in ("seed", "max_steps", "global_batch", "model", "adapters", "data", "system")}
    return {key: value for key, value in flat(picked).items() if key not in FREE}


def flat(node: Mapping, at: str = "") -> dict[str, object]:
    """Flatten nested options to dotted keys."""
    found: dict[str, object] = {}
    for key, value in node.items():
        name = f"{at}.{key}".lstrip(".")
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def finished(folder: str | Path) -> dict[str, float | None] | None:
    """Return the result of a stage that ran to its end, if it did."""
    path = Path(folder) / DONE
    return json.loads(path.read_text()) if path.is_file() else None


def mark_finished(folder: str | Path, trainer: lightning.Trainer, system: TrainModule) -> dict[str, float | None]:
    """Save the last checkpoint, then the marker that lets a restarted chain skip this stage; returns what the marker holds."""
    trainer.save_checkpoint(Path(folder) / "last.ckpt")
    val = trainer.callback_metrics.get("val/loss")
    result = {"steps": trainer.global_step, "train_loss": system.last_loss, "val_loss": None if val is None else float(val)}
    if trainer.is_global_zero:
        part = Path(folder) / (DONE + ".tmp")
        part.write_text(json.dumps(result) + "\n")
        os.replace(part, Path(folder) / DONE)
    return result


def is_first_rank() -> bool:
    """Say whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def link_latest(folder: Path, stage_folder: str) -> None:
    """Point `latest.ckpt` beside a run's folder at its newest checkpoint, so that no date has to be typed.

    A link to the folder itself would make TensorBoard show every run twice.
    """
    if is_first_rank():
        target = Path(stage_folder).resolve() / "last.ckpt"
        link(folder.resolve().parent / "latest.ckpt", os.path.relpath(target, folder.resolve().parent))


def link(path: Path, target: str) -> None:
    """Point a symbolic link at its neighbour, replacing an older link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.symlink_to(target)
    os.replace(part, path)


def cost(system: TrainModule, model: Mapping, row: Batch, *, batches: int) -> str:
    """Lay out what a row and the stage cost, and let the module know its shapes, by which throughput counts FLOPs.

    Args:
        model: the section of the configuration; the decoder's sizes are read off what was built.
        batches: rows like this one in the stage, over all ranks.
    """
    if any(is_adapter(name) for name, _ in system.named_parameters()):
        return "cost: not counted, for a model with adapters"
    try:
        system.shape = shape_of({**model, "language": system.model.language.config.to_dict()})
    except UserError as error:
        return f"cost: not counted ({error})"
    work = Work.of_batch(row)
    total = batches * flops(system.shape, work, trained=system.trainable).total
    table = describe("cost of the first row", system.shape, work, trained=system.trainable)
    return f"{table}\n  {batches:,} such rows: {total / 1e15:,.3g} PFLOP this stage"
