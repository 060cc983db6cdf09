"""The plan's rows -> batches, in the main process or in workers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infimed.contracts import Batch, DataFault, Encoded, Pack
from infimed.data.collate import collate
from infimed.data.encode import Encoder
from infimed.data.handover import Buffers, Parcel
from infimed.data.order import hash64
from infimed.data.plan import Plan
from infimed.data.quarantine import Quarantine
from infimed.data.shards import ShardSet
from infimed.processing.resolution import Resolution

if TYPE_CHECKING:
    from infimed.data.datamodule import ShardDataModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """Builds the batch of one rank's packs; the same packs give the same bytes in any process."""

    shards: ShardSet
    encoder: Encoder
    quarantine: Quarantine
    sources: tuple[str, ...]  # names behind `Batch.source_ids`
    row_tokens: int
    isolate: bool
    seed: int = 0

    def __call__(self, hand: Sequence[Pack], *, step: int, position: Mapping[str, object] | None = None) -> Batch:
        """Read, encode and collate; a sample with a fault leaves a hole."""
        encoded, packed, faults, holes = list[Encoded](), list[int](), Counter[str](), list[int]()
        for samples in self._read(hand):
            before = len(encoded)
            for row, span, seed, found in samples:
                try:
                    if isinstance(found, DataFault):
                        raise found
                    sample, images = found
                    length = self.shards.rows[row].length(self.encoder.resolution)
                    encoded.append(self.encoder(sample, images, expected_tokens=length, span=span, seed=seed))
                except DataFault as fault:
                    holes.append(len(encoded) + len(holes))
                    faults[self.quarantine.put(self.shards.rows[row], fault, step=step)] += 1
            packed.append(len(encoded) - before)
        return collate(
            encoded,
            row_tokens=self.row_tokens,
            pad_id=self.encoder.tokenizer.pad_id,
            resolution=self.encoder.resolution,
            sources=self.sources,
            step=step,
            merged=None if self.isolate else packed,
            faults=faults,
            holes=holes,
            position=position,
        )

    def _read(self, hand: Sequence[Pack]) -> Iterator[list[tuple]]:
        """Yield, for each pack, (row, span, seed of the augmentation, what was read) of its samples; all are read at once."""
        found = iter(self.shards.read_many([row for pack in hand for row in pack.rows]))
        for pack in hand:
            seeds = hash64(np.array(pack.rows, dtype=np.int64), seed=self.seed, epoch=pack.number, stream=_AUGMENT).tolist()
            yield list(zip(pack.rows, pack.spans or repeat(None), seeds, found, strict=False))


_AUGMENT = 7  # a stream of `hash64` that nothing else draws from


class Steps(IterableDataset[Batch]):
    """The micro-steps of one rank from where `plan` stands; worker w of W builds every W-th of them."""

    def __init__(self, plan: Plan, reader: Reader, *, rank: int, buffers: Buffers | None = None) -> None:
        """Take the place to start from, which is not moved. buffers: what workers hand batches over in."""
        self.plan, self.reader, self.rank, self.buffers = plan, reader, rank, buffers

    def __iter__(self) -> Iterator[Batch | Parcel]:
        """Yield this worker's share, in order."""
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self.plan.copy()
        for turn, step in enumerate(plan):
            if turn % workers == mine:
                batch = self.reader(step.hands[self.rank], step=step.number, position=plan.state_dict())
                yield self.buffers.pack(batch, worker=mine) if self.buffers else batch


class PlanLoader:
    """A loader that looks at its plan's position at the first `next`, not earlier: Lightning may restore after it asked for an iterator.

    It is sized: from an unsized one Lightning fetches a batch ahead. It is no `DataLoader`, so that nothing re-makes it.
    """

    def __init__(self, module: ShardDataModule, plan: Plan | None, reader: Reader, *, rank: int) -> None:
        """`plan`: what to stream, from where it stands; None: the training stream, whose position `module` keeps."""
        self._module, self._plan, self._reader, self._rank = module, plan, reader, rank

    def __len__(self) -> int:
        """Return the micro-steps from the start of training to its end, as Lightning counts after a resume."""
        return len(self._module.plan if self._plan is None else self._plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the present position on."""
        if self._plan is not None:
            yield from self._batches(self._plan)
            return
        changes, batches = None, iter(())
        while True:
            asked = time.perf_counter()
            if changes != self._module.changes:  # at the start, and when the mixture or the price of a row was changed on the way
                changes, batches = self._module.changes, iter(self._batches(self._module.plan))
            batch = next(batches, None)
            if batch is None:
                return
            self._module.waited += time.perf_counter() - asked
            self._module.handing_out(batch)
            yield batch

    def _batches(self, plan: Plan) -> DataLoader[Batch]:
        workers, prefetch = self._module.num_workers, self._prefetch() if self._module.num_workers else None
        most = largest_batch(self._reader.encoder.resolution, self._reader.row_tokens)
        # One more than waits is in use, and one is being filled.
        buffers = Buffers(workers=workers, each=prefetch + 2, size=most) if workers else None
        return DataLoader(
            Steps(plan.copy(), self._reader, rank=self._rank, buffers=buffers),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: making an iterator must not draw from the global one
        )

    def _prefetch(self) -> int:
        """Return the batches that a worker may prepare ahead: what was asked for, or fewer where they could outgrow the memory allowed."""
        most = largest_batch(self._reader.encoder.resolution, self._reader.row_tokens) * self._module.num_workers
        fitting = max(1, int(self._module.prefetch_mb * 2**20 / most))
        if fitting < self._module.prefetch:
            log.info("prefetch=%d: lowered from %d to stay within prefetch_mb=%d", fitting, self._module.prefetch, self._module.prefetch_mb)
        return min(self._module.prefetch, fitting)

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the position is the data module's. Lightning takes the pair of methods as the sign that resuming works."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Do nothing, see `state_dict`."""


def largest_batch(resolution: Resolution, row_tokens: int) -> int:
    """Bound the bytes of a batch of `row_tokens` tokens: a row of nothing but images."""
    rows, columns = resolution.largest
    patches = row_tokens * max(1.0, rows * columns / resolution.tokens(resolution.largest))
    return int(patches * 3 * resolution.patch_size**2 + row_tokens * 5 * 8)
