"""The LightningModule: wires model, loss and optimizer together and logs; the maths is in `models/`, the data in `data/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning
import torch

from infimed.contracts import COMPONENTS, Batch, UserError
from infimed.models.loss import Loss
from infimed.models.vlm import InfiMed
from infimed.processing.flops import ModelShape
from infimed.training.checkpoint import POSITION, in_mid_step, recount
from infimed.training.freezing import set_trainable
from infimed.training.optim import adamw, describe, parameter_groups


@dataclass
class Tally:
    """Running sums of one optimizer step on one rank; summed over ranks, then divided once."""

    sums: torch.Tensor  # float64[2, 1 + sources]: loss and supervised tokens, in all (column 0) and by source
    silent: int = 0  # micro-batches of this rank without a supervised token: they cost nothing, teach nothing and are counted

    @classmethod
    def empty(cls, sources: Sequence[str]) -> Tally:
        """Start at zero."""
        return cls(torch.zeros(2, 1 + len(sources), dtype=torch.float64))

    def add(self, loss: Loss, batch: Batch) -> None:
        """Take in one micro-batch, where it is: nothing waits for the device."""
        by_source = loss.by_source(batch.source_ids, self.sums.shape[1] - 1)
        self.sums = self.sums.to(by_source.device) + torch.cat([by_source.sum(1, keepdim=True), by_source], dim=1)
        self.silent += not batch.supervised_tokens


def means(sums: torch.Tensor, sources: Sequence[str], *, prefix: str) -> dict[str, float]:
    """Divide a tally's sums: the mean loss a token, in all and by source."""
    loss, tokens = sums.tolist()
    found = {f"{prefix}/loss_{name}": loss[i] / tokens[i] for i, name in enumerate(sources, 1) if tokens[i]}
    return {f"{prefix}/loss": loss[0] / max(tokens[0], 1.0), **found}


class TrainModule(lightning.LightningModule):
    """Train InfiMed by the mean loss a supervised token, exact over micro-batches, accumulation and ranks.

    `training_step` returns a *sum*. Lightning divides it by the accumulation, DDP averages over ranks; before the optimizer steps, one hook
    multiplies both back and divides by the global number of supervised tokens.
    """

    def __init__(
        self,
        model: InfiMed,
        *,
        total_steps: int,
        trainable: Sequence[str],
        lr: float,
        component_lr: Mapping[str, float] | None = None,
        weight_decay: float = 0.1,
        betas: Sequence[float] = (0.9, 0.95),
        warmup: float = 0.03,
        log_every: int = 10,
        sources: Sequence[str] = (),
    ) -> None:
        """Freeze and group the parameters.

        Args:
            total_steps: optimizer steps of the stage.
            warmup: share of them with a rising learning rate.
            sources: names behind `Batch.source_ids`, for the losses by source.
        """
        super().__init__()
        self.model = model
        set_trainable(model, trainable)
        self.trainable = tuple(trainable)
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps)
        self.betas = (betas[0], betas[1])
        self.log_every = log_every
        self.sources = tuple(sources)
        self.stored: dict = {}  # configuration and tokenizer fingerprint, kept in every checkpoint
        self.groups = parameter_groups(model, lr=lr, component_lr=component_lr or {}, weight_decay=weight_decay)
        self.tally = Tally.empty(self.sources)
        self.val_tally = Tally.empty(self.sources)
        self.shape: ModelShape | None = None  # what throughput counts FLOPs by; None: nobody knows
        self.silent = 0  # micro-batches so far without a supervised token, on this rank
        self.position: Mapping[str, object] = {}  # of the data, where the optimizer step under way began
        self.step_sums = torch.full((2, 1), float("nan"), dtype=torch.float64)  # of the latest optimizer step, over all ranks

    def describe(self) -> str:
        """Draw the table of components, trainable and frozen."""
        return describe(self.model, self.groups)

    def configure_optimizers(self) -> dict:
        """Return AdamW and its schedule, stepped once an optimizer step."""
        optimizer, schedule = adamw(self.groups, betas=self.betas, total=self.total_steps, warmup=self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the summed loss of one micro-batch."""
        loss = self._loss(batch)
        self.tally.add(loss, batch)
        # here and not in on_train_batch_end: a checkpoint callback would save before that hook of ours runs
        self.trainer.datamodule.consumed(batch)
        return loss.total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into gradients of the mean over all supervised tokens of this optimizer step."""
        sums = self.step_sums = self._reduce(self.tally.sums)
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size / sums[1, 0].clamp(min=1.0)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, share.float())  # a tensor where the gradients are: nothing waits for the device
        self.silent += self.tally.silent
        self.tally = Tally(torch.zeros_like(self.tally.sums))
        if self.trainer.global_step % self.log_every == 0 or self.trainer.global_step + 1 == self.total_steps:
            counts = {"train/supervised_tokens": float(sums[1, 0]), "train/silent_rows": self.silent}
            self._log({**means(sums, self.sources, prefix="train"), **counts, **self._optimizer_metrics(optimizer)})

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm ourselves: Lightning refuses to for a fused optimizer under bf16-mixed, though there is nothing to unscale.

        Raises:
            UserError: another algorithm.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: expected norm, which gradients are clipped by")
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)

    @property
    def last_loss(self) -> float:
        """The mean loss a token of the latest optimizer step, over all ranks; asking waits for the device."""
        return means(self.step_sums, (), prefix="train")["train/loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss of one validation row."""
        self.val_tally.add(self._loss(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean validation loss a token, over all ranks."""
        metrics = means(self._reduce(self.val_tally.sums), self.sources, prefix="val")
        self.val_tally = Tally.empty(self.sources)
        self.log("val/loss", metrics["val/loss"], logger=False)  # for checkpoints and sweeps
        self._log(metrics)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember where the data stands when an optimizer step begins."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.position = self.trainer.datamodule.state_dict()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Put what the run was beside the weights.

        Between two optimizer steps the data position goes back to the last one: gradients are not saved, so the micro-batches that made
        them have to come again. Lightning itself saves there, in the first micro-batch after a resume.
        """
        checkpoint["infimed"] = {**self.stored, "world_size": self.trainer.world_size, "last_loss": self.last_loss}
        if in_mid_step(self.trainer):
            checkpoint[POSITION] = self.position

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Remember the loss of the step that was saved, in case none is left to take, and count micro-batches as this run cuts them."""
        self.step_sums = torch.tensor([[checkpoint["infimed"]["last_loss"]], [1.0]], dtype=torch.float64)
        recount(checkpoint, accumulation=self.trainer.accumulate_grad_batches)

    def _loss(self, batch: Batch) -> Loss:
        return self.model(
            batch.input_ids,
            batch.labels,
            batch.images,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            rows=batch.rows,
        )

    def _reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, on the device that the ranks talk through."""
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum") if self.trainer.world_size > 1 else sums

    def _optimizer_metrics(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Learning rates and gradient norms (before clipping) by component."""
        metrics = {}
        for name in COMPONENTS:
            groups = [g for g in optimizer.param_groups if g["component"] == name]
            gradients = [p.grad for g in groups for p in g["params"] if p.grad is not None]
            if gradients:
                metrics[f"optim/lr_{name}"] = groups[0]["lr"]
                metrics[f"optim/grad_norm_{name}"] = float(torch.nn.utils.get_total_norm(gradients))
        return metrics

    def _log(self, metrics: Mapping[str, float]) -> None:
        """Write scalars at the current optimizer step, on rank 0 only."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self.trainer.global_step)
