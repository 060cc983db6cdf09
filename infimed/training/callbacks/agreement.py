"""Ranks that would drift apart stop, all at once: the plan of each is compared before it can lead to a hang or to doubled samples."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from infimed.contracts import UserError
from infimed.training.run import flat


class Agreement(lightning.Callback):
    """Compare a digest of the data position, and of the settings that it follows from, across ranks.

    Every rank makes the plan for itself, so ranks of one run must have the same shards, options and code. Compared at the start, every
    `every` optimizer steps and before each save: nothing is saved that ranks disagree on.
    """

    def __init__(self, *, every: int = 50) -> None:
        """every: optimizer steps between two comparisons; each waits once for the device."""
        if every < 1:
            raise UserError(f"callbacks.agreement.every={every}: expected at least 1 optimizer step")
        self.every = every

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare where the ranks begin, a restored position included."""
        _compare(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare after every so many optimizer steps."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step % self.every == 0:
            _compare(trainer, pl_module)

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare what is about to be saved; Lightning asks every rank."""
        _compare(trainer, pl_module)


def _compare(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
    """Raise on every rank when the digests differ on any.

    Raises:
        UserError: naming the step, the ranks by their digests, and the options in which they differ from rank 0.
    """
    if trainer.world_size == 1:
        return
    mine = torch.tensor(trainer.datamodule.digest(), dtype=torch.int64, device=trainer.strategy.root_device)
    gathered = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, mine)
    digests = [int(digest) for digest in gathered]
    if len(set(digests)) == 1:
        return
    groups = {digest: [rank for rank, other in enumerate(digests) if other == digest] for digest in dict.fromkeys(digests)}
    found = "; ".join(f"{_spell(ranks)} {digest:016x}" for digest, ranks in groups.items())
    raise UserError(
        f"the ranks disagree about the data at optimizer step {trainer.global_step}: {found}. {_differences(trainer, pl_module)}; "
        "start every rank with the same command, code and shards"
    )


def _differences(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str:
    """Say which options differ from those of rank 0; called on all ranks together, as all of them have seen the digests."""
    mine = {name: str(value) for name, value in flat(pl_module.stored.get("config", {})).items()}
    ranks = [mine] * trainer.world_size
    torch.distributed.all_gather_object(ranks, mine)
    first = ranks[0]
    found = [
        f"{name}: {first.get(name)} on rank 0, {theirs.get(name)} on rank {rank}"
        for rank, theirs in enumerate(ranks)
        for name in sorted(first | theirs)
        if theirs.get(name) != first.get(name)
    ]
    return "Their options differ in " + "; ".join(found[:5]) if found else "Their options are the same, so their shards or code must differ"


def _spell(ranks: list[int]) -> str:
    """Name ranks shortly."""
    if len(ranks) > 8:
        return f"{len(ranks)} ranks (from {ranks[0]} on)"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
