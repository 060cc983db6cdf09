"""The plan's rows -> batches, in the main process or in workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infimed.contracts import Batch, DataFault, Pack
from infimed.data.collate import collate
from infimed.data.encode import Encoder
from infimed.data.plan import Plan
from infimed.data.quarantine import Quarantine
from infimed.data.shards import ShardSet

if TYPE_CHECKING:
    from infimed.data.datamodule import ShardDataModule


@dataclass(frozen=True)
class Reader:
    """Builds the batch of one rank's packs; the same packs give the same bytes in any process."""

    shards: ShardSet
    encoder: Encoder
    quarantine: Quarantine
    sources: tuple[str, ...]  # names behind `Batch.source_ids`
    row_tokens: int
    isolate: bool

    def __call__(self, hand: Sequence[Pack], *, step: int) -> Batch:
        """Read, encode and collate; a sample with a fault leaves a hole."""
        encoded, faults = [], Counter[str]()
        for number in (row for pack in hand for row in pack.rows):
            row = self.shards.rows[number]
            try:
                sample, images = self.shards.read(number)
                encoded.append(self.encoder(sample, images, expected_tokens=row.length(self.encoder.resolution)))
            except DataFault as fault:
                faults[self.quarantine.put(row, fault, step=step)] += 1
        return collate(
            encoded,
            row_tokens=self.row_tokens,
            pad_id=self.encoder.tokenizer.pad_id,
            resolution=self.encoder.resolution,
            sources=self.sources,
            step=step,
            isolate=self.isolate,
            faults=faults,
        )


class Steps(IterableDataset[Batch]):
    """The micro-steps of one rank from where `plan` stands; worker w of W builds every W-th of them."""

    def __init__(self, plan: Plan, reader: Reader, *, rank: int) -> None:
        """Take the place to start from, which is not moved."""
        self.plan, self.reader, self.rank = plan, reader, rank

    def __iter__(self) -> Iterator[Batch]:
        """Yield this worker's share, in order."""
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for turn, step in enumerate(self.plan.copy()):
            if turn % workers == mine:
                yield self.reader(step.hands[self.rank], step=step.number)


class PlanLoader:
    """A loader that looks at its plan's position at the first `next`, not earlier: Lightning may restore after it asked for an iterator.

    It is sized: from an unsized one Lightning fetches a batch ahead. It is no `DataLoader`, so that nothing re-makes it.
    """

    def __init__(self, module: ShardDataModule, plan: Plan, reader: Reader, *, rank: int, track: bool) -> None:
        """`track`: this is the training stream, whose position `module` keeps."""
        self._module, self._plan, self._reader, self._rank, self._track = module, plan, reader, rank, track

    def __len__(self) -> int:
        """Return the micro-steps from the start of training to its end, as Lightning counts after a resume."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the present position on."""
        workers = self._module.num_workers
        steps = DataLoader(
            Steps(self._plan.copy(), self._reader, rank=self._rank),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._module.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: making an iterator must not draw from the global one
        )
        iterator = iter(steps)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            if self._track:
                self._module.waited += time.perf_counter() - asked
                self._module.handing_out(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the position is the data module's. Lightning takes the pair of methods as the sign that resuming works."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Do nothing, see `state_dict`."""
