"""Shards -> batches, for Lightning. The steps, in order:

`open_shards` (metadata) -> `select`, `only` (this stage's samples) -> `ShardCatalogue` (what the plan may know of them) -> `Plan` (who goes
where, when) -> `ShardSet.read_many` (bytes) -> `Encoder` (numbers) -> `collate` (one row) -> `Batch`; faults go to the `Quarantine`.

The position lives here, in the main process, and moves only when a batch was consumed: batches that workers prepared ahead do not count.
Every batch carries the position behind it, so the main process plans nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule

from infimed.contracts import Batch, DataFault, Sample, UserError
from infimed.data.encode import Encoder
from infimed.data.facts import DatasetFacts, count_facts, read_overlong, write_overlong
from infimed.data.mixture import Mixing
from infimed.data.packing import Packing, Price
from infimed.data.plan import OnOverflow, Plan, PlanState
from infimed.data.quarantine import Quarantine
from infimed.data.reader import PlanLoader, Reader
from infimed.data.shard_catalogue import ShardCatalogue
from infimed.data.shards import ShardSet, open_shards
from infimed.data.store import Store
from infimed.processing.augment import Augment
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

log = logging.getLogger(__name__)


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
        only: Sequence[str | Path] | None = None,
        mixture: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
        temperature: float | None = None,
        max_passes: float | Mapping[str, float] | None = None,
        curriculum: Sequence[Mapping[str, object]] | None = None,
        seed: int = 0,
        epochs: int | None = None,
        max_steps: int | None = None,
        buffer: int = 192,
        open_shards: int = 16,
        packing: Packing = "packed",
        on_overflow: OnOverflow = "drop",
        augment: Augment | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        prefetch_mb: int = 1024,
        read_threads: int = 4,
        access: Literal["ranges", "shards"] = "ranges",
        cache: str | Path | None = None,
        cache_gb: float = 64.0,
        quarantine_path: str | Path | None = None,
        max_fault_rate: float = 0.01,
        min_seen: int = 200,
        max_faults_in_a_row: int = 20,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take settings; nothing is opened before `setup`.

        resolution: what an image becomes; the model's own.
        select: facet of the index -> allowed values. only: lists (`overlong.jsonl`) of the samples that earlier stages had to leave out.
        mixture: source -> times an epoch shows its samples, "*" for the others. Or, instead: shares (of the samples, by source) or
        temperature (shares proportional to rows ** (1 / T)), with max_passes over a source and a curriculum of {step, shares}.
        epochs, max_steps (micro-steps): the end of training, whichever comes first; without either the trainer's max_steps counts.
        buffer: samples that wait for a row; open_shards: of a source, that its samples are drawn from at a time.
        prefetch: batches that a worker prepares ahead, as far as all of them fit into prefetch_mb.
        access, cache, cache_gb: of shards in a remote store, see `data.store.Store`.
        rank, world_size: used without a trainer.
        """
        super().__init__()
        self.train_paths, self.val_paths, self.tokenizer_path = _listed("train", train), _listed("val", val), tokenizer
        self.resolution = resolution
        self.max_tokens, self.packs_per_batch = max_tokens, packs_per_batch
        facets = dict(select or {})
        self.select = {name: [given] if isinstance(given, str) else _listed(f"select.{name}", given) for name, given in facets.items()}
        self.only, self.seed, self.epochs, self.max_steps = _listed("only", only or ()), seed, epochs, max_steps
        self.mixing = Mixing(
            epochs_of=dict(mixture or {}),
            shares=dict(shares) if shares is not None else None,
            temperature=temperature,
            max_passes=max_passes,
            curriculum=_curriculum(curriculum or ()),
        )
        self.buffer, self.open_shards, self.packing, self.on_overflow, self.augment = buffer, open_shards, packing, on_overflow, augment
        self.num_workers, self.prefetch, self.prefetch_mb = num_workers, prefetch, prefetch_mb
        self.store = Store(threads=read_threads, access=access, cache=cache, cache_bytes=int(cache_gb * 2**30))
        self.quarantine = Quarantine(quarantine_path, max_rate=max_fault_rate, min_seen=min_seen, max_in_a_row=max_faults_in_a_row)
        self._rank, self._world_size = rank, world_size
        self._encoder: Encoder | None = None
        self._train: ShardSet | None = None
        self._val: ShardSet | None = None
        self._plan: Plan | None = None
        self._position: PlanState | None = None  # of the last batch consumed; the plan object is moved there when it is asked for
        self._step = 0  # micro-step that is consumed next
        self._handed_out = self._is_out = self._fit_over = False  # any batch so far; one that is not consumed yet
        self.changes = 0  # times that the plan was changed while it ran, see `reweigh`
        self.waited = 0.0  # seconds that training stood still for data, since somebody last set it to 0
        _check_positive(self, "max_tokens", "packs_per_batch", "epochs", "max_steps", "buffer", "open_shards", "prefetch", "prefetch_mb")
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers}: expected 0 (the main process reads) or more")
        if augment is not None and not callable(augment):
            raise UserError(f"data.augment={augment}: expected {{_target_: infimed.processing.augment.Jitter, ...}}")

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and lay the plan at its start; a second call changes nothing, unless a fit ended in between."""
        if self._encoder is None:
            self._encoder = Encoder(Tokenizer.load(self.tokenizer_path), self.resolution, augment=self.augment)
        if self._train is None:
            self._train = self._open(self.train_paths, strict=True)
            self._val = self._open(self.val_paths, strict=False) if self.val_paths else None
        if self._plan is None or (stage == "fit" and self._fit_over):
            self._plan = self._train_plan(epochs=self.epochs, steps=self._step_limit())
            self._position, self._step = None, self._plan.step
            self._handed_out = self._is_out = self._fit_over = False

    def teardown(self, stage: str) -> None:
        """Let the next fit begin anew; the position stays readable until then."""
        self._fit_over = self._fit_over or stage == "fit"

    def train_dataloader(self) -> PlanLoader:
        """Return the rest of the plan. Raises: UserError when it has no end or no step at all, or when Lightning counts epochs too."""
        self.setup()
        ends_itself = self.epochs is not None or self.max_steps is not None
        if self.trainer is not None and ends_itself and self.trainer.max_epochs != 1:
            # More would silently be one, and -1 would never end: the plan is used up after the first.
            raise UserError(f"trainer.max_epochs={self.trainer.max_epochs}: expected 1; the epochs are the data's (epochs={self.epochs})")
        if self._plan.epochs is None and self._plan.steps is None:
            raise UserError("data: training has no end; give epochs, or max_steps to the data or the trainer")
        if not len(self._plan):
            raise UserError(f"data: no sample is shown in {self.epochs} epochs with {self.mixing}; raise the weights")
        return PlanLoader(self, None, self._reader(self._train), rank=self._place()[0])

    def val_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """Return the validation samples once, in order, packed as in training and never augmented."""
        if not self.val_paths:
            return []
        self.setup()
        rank, world_size = self._place()
        plan = self._make_plan(self._val, epochs=1, shuffle=False, world_size=world_size)
        for _ in (whole := plan.copy()):
            pass
        if left_out := ", ".join(f"{source} {count}" for source, count in sorted(whole.overlong.items())):
            log.warning("validation leaves out samples that are longer than max_tokens=%d: %s", self.max_tokens, left_out)
        reader = self._reader(self._val)
        return PlanLoader(self, plan, replace(reader, encoder=replace(reader.encoder, augment=None)), rank=rank)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors (Lightning's own way refuses frozen dataclasses)."""
        return batch.to(device)

    def handing_out(self, batch: Batch) -> None:
        """Note that a batch leaves for training; raise when nobody reports batches as consumed."""
        self._handed_out = self._is_out = True
        if self.trainer is not None and batch.step > self._step + 8:
            raise RuntimeError("consumed(batch) is not called after the training steps, so no checkpoint would know the position")

    def consumed(self, batch: Batch) -> None:
        """Move the position past a batch that was trained on, and count its faults. Raises: UserError when these become too many."""
        if batch.step != self._step:
            raise RuntimeError(f"batch of micro-step {batch.step} consumed at position {self._step}: one is missing or came twice")
        self._position, self._step, self._is_out = batch.position, batch.step + 1, False
        self.quarantine.count(batch)

    @property
    def plan(self) -> Plan:
        """The plan of training, at the position."""
        self.setup()
        if self._position is not None:
            self._plan.load_state_dict(self._position)
            self._position = None
        return self._plan

    def state_dict(self) -> PlanState | dict[str, object]:
        """Say where training stands: plain numbers, the same on every rank."""
        return self._position or (self._plan.state_dict() if self._plan is not None else {})

    def load_state_dict(self, state: PlanState) -> None:
        """Continue from a saved position. Raises: UserError for other data; RuntimeError when batches have been handed out already."""
        if not state:
            return
        self.setup()
        if self._handed_out:
            raise RuntimeError("the data position arrives after the first batch was handed out: those samples would be seen twice")
        self._plan.load_state_dict(state)
        self._position, self._step = None, self._plan.step

    def digest(self) -> int:
        """Return 63 bits of everything that ranks must agree on: position, order, lengths and settings of the plan."""
        return self.plan.digest()

    def reweigh(self, shares: Mapping[str, float]) -> None:
        """Mix the sources by other shares from the next micro-step on; every rank must ask for the same at the same step.

        Batches that were prepared ahead are made again. The change is part of the saved position.
        Raises: UserError for a source that there is not, or when only the data's epochs end training: its length would change.
        """
        if self.epochs is not None:
            raise UserError("shares can change on the way only where max_steps ends training; set data.epochs=null and max_steps")
        self._between_batches().reweigh(shares)
        self.changes += 1

    def reprice(self, price: Price) -> None:
        """Deal rows to ranks by another cost from the next micro-step on; every rank must ask for the same at the same step."""
        self._between_batches().reprice(price)
        self.changes += 1

    def _between_batches(self) -> Plan:
        """Return the plan to change: the position behind a batch that is out already would undo the change unseen."""
        if self._is_out:
            raise RuntimeError("a batch is out that is not consumed yet; change the plan after the training step, as in on_train_batch_end")
        return self.plan

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the samples are rendered with."""
        self.setup()
        return self._encoder.tokenizer

    @property
    def shards(self) -> ShardSet:
        """The samples of training."""
        self.setup()
        return self._train

    @property
    def sources(self) -> tuple[str, ...]:
        """Names behind `Batch.source_ids`, in training and in validation."""
        self.setup()
        return tuple(sorted({*self._train.sources, *(self._val.sources if self._val else ())}))

    def overlong(self) -> dict[str, int]:
        """Count the samples that were too long for a row so far, by `source/overlong`; the same on every rank."""
        return {f"{source}/overlong": count for source, count in self.state_dict().get("overlong", {}).items()}

    def write_overlong(self, path: str | Path) -> int:
        """List the samples that no row has room for, one JSON line each, for a longer stage's `only`; returns how many there are."""
        self.setup()
        split = self.on_overflow == "split"
        return write_overlong(self._train, self.resolution, max_tokens=self.max_tokens, path=Path(path), split=split)

    def first_batch(self, *, step: int = 0) -> Batch:
        """Read the batch of training at micro-step `step`, counted from the begin, without moving the position: what a row is made of."""
        self.setup()
        reader = replace(self._reader(self._train), quarantine=Quarantine(None))
        ahead = next(islice(self._train_plan(epochs=self.epochs, steps=self._step_limit()), step, None), None)
        if ahead is None:
            raise UserError(f"step={step}: the plan ends before; expected 0 to {len(self.plan) - 1}")
        return reader(ahead.hands[self._place()[0]], step=ahead.number)

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
        """Say in a line what training will be fed."""
        return self.dataset_facts().describe()

    def dataset_facts(self) -> DatasetFacts:
        """Count the samples, tokens and micro-steps of the first epoch, or of the beginning of a long one."""
        self.setup()
        return count_facts(self._train_plan(epochs=1, steps=None))

    def _open(self, paths: Sequence[str], *, strict: bool) -> ShardSet:
        """Open shards, keep the selected rows, and count text with this run's tokenizer."""
        shards = open_shards(paths, store=self.store).select(self.select, strict=strict)
        if self.only and strict:
            shards = shards.only(read_overlong(self.only))
        return shards.counted_with(self._encoder.tokenizer)

    def _train_plan(self, *, epochs: int | None, steps: int | None) -> Plan:
        return self._make_plan(self._train, epochs=epochs, steps=steps, mixing=self.mixing, world_size=self._place()[1])

    def _make_plan(
        self,
        shards: ShardSet,
        *,
        world_size: int,
        epochs: int | None,
        steps: int | None = None,
        mixing: Mixing | None = None,
        shuffle: bool = True,
    ) -> Plan:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return Plan(
            ShardCatalogue(shards, self.resolution),
            mixing=mixing or Mixing(),
            seed=self.seed if shuffle else 0,
            max_tokens=self.max_tokens,
            packs_per_batch=self.packs_per_batch,
            world_size=world_size,
            global_batch=self.packs_per_batch * world_size * accumulate,
            buffer=self.buffer,
            open_shards=self.open_shards,
            epochs=epochs,
            steps=steps,
            packing=self.packing,
            on_overflow=self.on_overflow,
            shuffle=shuffle,
        )

    def _reader(self, shards: ShardSet) -> Reader:
        return Reader(
            shards=shards,
            encoder=self._encoder,
            quarantine=self.quarantine,
            sources=self.sources,
            row_tokens=self.packs_per_batch * self.max_tokens,
            isolate=self.packing != "unisolated",
            seed=self.seed,
        )

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


def _listed(option: str, given: Sequence[str | Path]) -> list[str]:
    """Refuse a bare value where a list is meant."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"data.{option}={given}: expected a list, such as [{given}]")
    return [str(each) for each in given]


def _curriculum(changes: Sequence[Mapping[str, object]]) -> tuple[tuple[int, Mapping[str, float]], ...]:
    """Read a list of {step, shares}."""
    for change in changes:
        is_one = isinstance(change, Mapping) and set(change) == {"step", "shares"}
        if not is_one or not isinstance(change["step"], int) or not isinstance(change["shares"], Mapping):
            raise UserError(f"data.curriculum: {change}: expected {{step: optimizer step, shares: {{source: share}}}}")
    return tuple((change["step"], dict(change["shares"])) for change in changes)


def _check_positive(module: ShardDataModule, *names: str) -> None:
    """Refuse settings that must be at least 1."""
    given = {name: getattr(module, name) for name in names}
    if bad := [f"{name}={value}: expected at least 1" for name, value in given.items() if value is not None and value < 1]:
        raise UserError("\n".join(bad))
