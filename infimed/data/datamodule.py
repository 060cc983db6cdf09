"""Shards -> batches, for Lightning. The steps, in order:

`open_shards` (metadata) -> `keep_rows` (this stage's samples) -> `row_weights` (mixture) -> `Plan` (who goes where, when) ->
`ShardSet.read` (bytes) -> `Encoder` (numbers) -> `collate` (one row) -> `Batch`; faults go to the `Quarantine`.

The position lives here, in the main process, and moves only when a batch was consumed: batches that workers prepared ahead do not count.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

from infimed.contracts import Batch, DataFault, Sample, UserError
from infimed.data.encode import Encoder
from infimed.data.mixture import keep_rows, row_weights
from infimed.data.packing import Packing
from infimed.data.plan import OnOverflow, Plan, PlanState
from infimed.data.quarantine import Quarantine
from infimed.data.reader import PlanLoader, Reader
from infimed.data.shards import ShardSet, open_shards
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetFacts:
    """What the training data amounts to under these settings: one epoch, on metadata alone."""

    samples: int  # shown in an epoch
    tokens: int
    visual_tokens: int
    overlong: Mapping[str, int]  # source -> samples left out as longer than max_tokens
    steps_per_epoch: int  # micro-steps of all ranks together
    utilisation: float  # tokens / slots


class ShardDataModule(LightningDataModule):
    """Streams packed batches from shards and knows where it stands. Call `consumed(batch)` after every training step.

    That call must come before the checkpoint callback's turn. Lightning runs callbacks' `on_train_batch_end` before the module's: the
    module's own hook would be a batch late.
    """

    def __init__(
        self,
        *,
        train: Sequence[str | Path],
        val: Sequence[str | Path] = (),
        tokenizer: str | Path,
        resolution: Resolution,
        max_tokens: int,
        packs_per_batch: int = 1,
        select: Mapping[str, Sequence[str]] | None = None,
        mixture: Mapping[str, float] | None = None,
        seed: int = 0,
        epochs: int | None = None,
        max_steps: int | None = None,
        buffer: int = 128,
        num_workers: int = 0,
        prefetch: int = 2,
        packing: Packing = "packed",
        isolate: bool = True,
        on_overflow: OnOverflow = "drop",
        quarantine_path: str | Path | None = None,
        max_fault_rate: float = 0.01,
        min_seen: int = 200,
        max_faults_in_a_row: int = 20,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take settings; nothing is opened before `setup`.

        resolution: what an image becomes; the model's own.
        select: facet of the index -> allowed values. mixture: source -> times an epoch shows its samples, "*" for the others.
        epochs, max_steps (micro-steps): the end of training, whichever comes first; without either the trainer's max_steps counts.
        rank, world_size: used without a trainer.
        """
        super().__init__()
        self.train_paths, self.val_paths, self.tokenizer_path = _listed("train", train), _listed("val", val), tokenizer
        self.resolution = resolution
        self.max_tokens, self.packs_per_batch = max_tokens, packs_per_batch
        self.select, self.mixture, self.seed, self.epochs, self.max_steps = dict(select or {}), dict(mixture or {}), seed, epochs, max_steps
        self.buffer, self.num_workers, self.prefetch, self.packing = buffer, num_workers, prefetch, packing
        self.isolate, self.on_overflow, self.quarantine_path = isolate, on_overflow, quarantine_path
        self.quarantine = Quarantine(quarantine_path, max_rate=max_fault_rate, min_seen=min_seen, max_in_a_row=max_faults_in_a_row)
        self._rank, self._world_size = rank, world_size
        self._encoder: Encoder | None = None
        self._train: ShardSet | None = None
        self._val: ShardSet | None = None
        self._plan: Plan | None = None
        self._handed_out = self._fit_over = False
        self.waited = 0.0  # seconds that training stood still for data, since somebody last set it to 0
        _check_positive(self, "max_tokens", "packs_per_batch", "epochs", "max_steps", "prefetch")

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and lay the plan at its start; a second call changes nothing, unless a fit ended in between."""
        if self._encoder is None:
            self._encoder = Encoder(Tokenizer.load(self.tokenizer_path), self.resolution)
        if self._train is None:
            self._train = self._open(self.train_paths, strict=True)
            self._val = self._open(self.val_paths, strict=False) if self.val_paths else None
        if self._plan is None or (stage == "fit" and self._fit_over):
            self._plan = self._train_plan(self._train, epochs=self.epochs, steps=self._step_limit())
            self._handed_out = self._fit_over = False
            if overlong := self._plan.overlong:
                log.warning("%d samples are longer than max_tokens=%d and left out: %s", overlong.total(), self.max_tokens, dict(overlong))

    def teardown(self, stage: str) -> None:
        """Let the next fit begin anew; the position stays readable until then."""
        self._fit_over = self._fit_over or stage == "fit"

    def train_dataloader(self) -> PlanLoader:
        """Return the rest of the plan. Raises: UserError when it has no end or no step at all, or when Lightning counts epochs too."""
        self.setup()
        plan = self._plan
        ends_itself = self.epochs is not None or self.max_steps is not None
        if self.trainer is not None and ends_itself and self.trainer.max_epochs != 1:
            # More would silently be one, and -1 would never end: the plan is used up after the first.
            raise UserError(f"trainer.max_epochs={self.trainer.max_epochs}: expected 1; the epochs are the data's (epochs={self.epochs})")
        if plan.epochs is None and plan.steps is None:
            raise UserError("data: training has no end; give epochs, or max_steps to the data or the trainer")
        if not len(plan):
            raise UserError(f"data: no sample is shown in {self.epochs} epochs with mixture={self.mixture}; raise the weights")
        return PlanLoader(self, plan, self._reader(self._train), rank=self._place()[0], track=True)

    def val_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """Return the validation samples once, in order, packed as in training."""
        if not self.val_paths:
            return []
        self.setup()
        rank, world_size = self._place()
        plan = self._make_plan(self._val, epochs=1, shuffle=False, world_size=world_size)
        return PlanLoader(self, plan, self._reader(self._val), rank=rank, track=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors (Lightning's own way refuses frozen dataclasses)."""
        return batch.to(device)

    def handing_out(self, batch: Batch) -> None:
        """Note that a batch leaves for training; raise when nobody reports batches as consumed."""
        self._handed_out = True
        if self.trainer is not None and batch.step > self._plan.step + 8:
            raise RuntimeError("consumed(batch) is not called after the training steps, so no checkpoint would know the position")

    def consumed(self, batch: Batch) -> None:
        """Move the position past a batch that was trained on, and count its faults. Raises: UserError when these become too many."""
        step = next(self._plan)
        if step.number != batch.step:
            raise RuntimeError(f"batch of micro-step {batch.step} consumed at position {step.number}: one is missing or came twice")
        self.quarantine.count(batch)

    def state_dict(self) -> PlanState | dict[str, object]:
        """Say where training stands: plain numbers, the same on every rank."""
        return self._plan.state_dict() if self._plan is not None else {}

    def load_state_dict(self, state: PlanState) -> None:
        """Continue from a saved position. Raises: UserError for other data; RuntimeError when batches have been handed out already."""
        if not state:
            return
        self.setup()
        if self._handed_out:
            raise RuntimeError("the data position arrives after the first batch was handed out: those samples would be seen twice")
        self._plan.load_state_dict(state)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the samples are rendered with."""
        self.setup()
        return self._encoder.tokenizer

    @property
    def sources(self) -> tuple[str, ...]:
        """Names behind `Batch.source_ids`, in training and in validation."""
        self.setup()
        return tuple(sorted({*self._train.sources, *(self._val.sources if self._val else ())}))

    def faults(self) -> dict[str, int]:
        """Count what was left out so far, by `source/reason`."""
        overlong = {f"{source}/overlong": n for source, n in self._plan.overlong.items()} if self._plan else {}
        return {**overlong, **self.quarantine.faults}

    def first_batch(self) -> Batch:
        """Read the next batch of training without moving the position: what a row is made of."""
        self.setup()
        reader = replace(self._reader(self._train), quarantine=Quarantine(None))
        return reader(next(self._plan.copy()).hands[self._place()[0]], step=0)

    def panel(self, count: int) -> list[tuple[Sample, tuple[bytes, ...]]]:
        """Return up to `count` validation samples with an image, spread evenly over the set: always the same ones."""
        if not self.val_paths:
            return []
        self.setup()
        seen = [i for i, row in enumerate(self._val.rows) if row.image_sizes]
        cases = []
        for i in range(min(count, len(seen))):
            row = self._val.rows[seen[i * len(seen) // count]]
            try:
                sample, images = self._val.read(seen[i * len(seen) // count])
                self._encoder(sample, images, expected_tokens=row.length(self.resolution))
            except DataFault as fault:
                log.warning("the panel leaves out %s of %s: %s", row.key, row.shard, fault.reason)
            else:
                cases.append((sample, images))
        return cases

    def describe(self) -> str:
        """Say in two lines what training will be fed."""
        facts = self.dataset_facts()
        left_out = f", {sum(facts.overlong.values()):,} too long" if facts.overlong else ""
        return (
            f"data: {facts.samples:,} samples an epoch{left_out}, {facts.tokens:,} tokens ({facts.visual_tokens:,} visual), "
            f"{facts.steps_per_epoch:,} micro-steps, rows {facts.utilisation:.1%} full"
        )

    def dataset_facts(self) -> DatasetFacts:
        """Count the samples, tokens and micro-steps of the first epoch."""
        self.setup()
        plan = self._train_plan(self._train, epochs=1, steps=None)
        hands = [hand for step in plan.copy() for hand in step.hands]
        packs = [pack for hand in hands for pack in hand]
        rows = [row for pack in packs for row in pack.rows]
        tokens = sum(pack.tokens for pack in packs)
        return DatasetFacts(
            samples=len(rows),
            tokens=tokens,
            visual_tokens=sum(self._train.rows[row].visual_tokens(self.resolution) for row in rows),
            overlong=dict(plan.overlong),
            steps_per_epoch=len(hands) // plan.world_size,
            utilisation=tokens / max(1, len(packs) * self.max_tokens),
        )

    def _open(self, paths: Sequence[str], *, strict: bool) -> ShardSet:
        """Open shards, keep the selected rows, and count text with this run's tokenizer."""
        shards = open_shards(paths)
        return shards.subset(keep_rows(shards.rows, self.select, strict=strict)).counted_with(self._encoder.tokenizer)

    def _train_plan(self, shards: ShardSet, *, epochs: int | None, steps: int | None) -> Plan:
        return self._make_plan(shards, epochs=epochs, steps=steps, mixture=self.mixture, world_size=self._place()[1])

    def _make_plan(
        self,
        shards: ShardSet,
        *,
        world_size: int,
        epochs: int | None,
        steps: int | None = None,
        mixture: Mapping[str, float] | None = None,
        shuffle: bool = True,
    ) -> Plan:
        sources = [row.source for row in shards.rows]
        identity = json.dumps([shards.fingerprint, sorted((mixture or {}).items())])
        return Plan(
            [row.length(self.resolution) for row in shards.rows],
            sources=sources,
            weights=row_weights(sources, mixture or {}),
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
            seed=self.seed if shuffle else 0,
            max_tokens=self.max_tokens,
            packs_per_batch=self.packs_per_batch,
            world_size=world_size,
            buffer=self.buffer,
            epochs=epochs,
            steps=steps,
            packing=self.packing,
            on_overflow=self.on_overflow,
            shuffle=shuffle,
        )

    def _reader(self, shards: ShardSet) -> Reader:
        return Reader(shards, self._encoder, self.quarantine, self.sources, self.packs_per_batch * self.max_tokens, self.isolate)

    def _place(self) -> tuple[int, int]:
        """Return (rank, world size) among the processes that see different data."""
        if self.trainer is None:
            return self._rank, self._world_size
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return place["rank"], place["num_replicas"]

    def _step_limit(self) -> int | None:
        """Return the micro-steps after which the plan ends, if anything limits them."""
        if self.max_steps is not None or self.trainer is None or self.trainer.max_steps < 0:
            return self.max_steps
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches


def _listed(option: str, paths: Sequence[str | Path]) -> list[str]:
    """Refuse a bare text where a list of paths is meant."""
    if isinstance(paths, str | Path):
        raise UserError(f"{option}={paths!r}: expected a list of shard files, folders or patterns, such as [{paths}]")
    return [str(path) for path in paths]


def _check_positive(module: ShardDataModule, *names: str) -> None:
    """Refuse settings that must be at least 1."""
    given = {name: getattr(module, name) for name in names}
    if bad := [f"{name}={value}: expected at least 1" for name, value in given.items() if value is not None and value < 1]:
        raise UserError("\n".join(bad))
