"""What a row costs on this machine, measured, so that ranks share rows by time and not by counted operations."""

from __future__ import annotations

import logging
import time

import lightning
import numpy as np
import torch

from infimed.contracts import Batch
from infimed.data.packing import Price

log = logging.getLogger(__name__)

_WARM_UP = 3  # micro-steps that compile and allocate
_EXPLAINED = 0.5  # share of the variance that the fit must explain; below, the counted operations are the better guess


class Calibrate(lightning.Callback):
    """Time the first micro-steps, fit the price of a token, a token pair, a patch and a patch pair, and deal rows by it from then on.

    Which samples make an optimizer step does not change, only which rank gets which row. The fitted price is part of the saved position, so
    that a resumed run goes on with it. Two runs measure two prices: leave this out where runs must agree bit for bit on several ranks.
    """

    def __init__(self, *, steps: int = 50) -> None:
        """Measure `steps` micro-steps of every rank."""
        self.steps = steps
        self.done = False
        self._rows: list[list[float]] = []
        self._seen = 0
        self._began = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave a single rank alone: it gets every row whatever rows cost."""
        self.done = self.done or trainer.world_size == 1

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        if not self.done:
            self._began = _now(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note one micro-step; after the last one fit, and tell the plan."""
        if self.done:
            return
        self._seen += 1
        if self._seen > _WARM_UP:
            stepped = not trainer.fit_loop._should_accumulate()
            self._rows.append([*features(batch), float(stepped), _now(trainer) - self._began])
        # between optimizer steps alone: a saved position never lies elsewhere
        if len(self._rows) >= self.steps and not trainer.fit_loop._should_accumulate():
            self.done = True
            self._apply(trainer)

    def state_dict(self) -> dict[str, bool]:
        """Remember that the price stands."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Measure no second time."""
        self.done = state["done"]

    def _apply(self, trainer: lightning.Trainer) -> None:
        """Fit on rank 0, over the rows of all ranks, and give every rank the same price."""
        ranks: list[list[list[float]]] = [self._rows] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, self._rows)
        price = [fit([row for rows in ranks for row in rows]) if trainer.is_global_zero else None]
        if trainer.world_size > 1:
            torch.distributed.broadcast_object_list(price)
        if price[0] is None:
            log.warning("calibration: the measured times do not follow the rows' contents; rows stay dealt by counted operations")
        else:
            trainer.datamodule.reprice(price[0])
            log.info("calibration: rows are dealt by %s from here on", price[0])


def features(batch: Batch) -> list[float]:
    """Count what a price is made of: tokens, length ** 2, patches, patches ** 2 of an image."""
    images = [rows * columns for rows, columns in batch.images.grids]
    return [float(batch.tokens), float(sum(n * n for n in batch.lengths)), float(sum(images)), float(sum(n * n for n in images))]


def fit(rows: list[list[float]]) -> Price | None:
    """Fit non-negative prices, in seconds, by least squares beside a constant and an optimizer step; None where they explain too little.

    rows: (tokens, length ** 2, patches, patches ** 2, optimizer stepped, seconds) of each micro-step.
    """
    table = np.array(rows, dtype=np.float64)
    seconds, columns = table[:, -1], np.concatenate([table[:, :-1], np.ones((len(table), 1))], axis=1)
    scale = np.maximum(columns.max(0), 1e-12)
    kept, found = list(range(columns.shape[1])), np.zeros(columns.shape[1])
    while kept:
        solution = np.linalg.lstsq(columns[:, kept] / scale[kept], seconds, rcond=None)[0]
        if solution.min() >= 0:
            found[kept] = solution / scale[kept]
            break
        kept.pop(int(solution.argmin()))  # time is never given back: what comes out below zero was noise
    unexplained = ((seconds - columns @ found) ** 2).sum()
    price = Price(*(float(value) for value in found[:4]))
    worthwhile = unexplained <= (1 - _EXPLAINED) * ((seconds - seconds.mean()) ** 2).sum() and any(found[:4])
    return price if worthwhile else None


def _now(trainer: lightning.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
