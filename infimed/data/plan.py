"""The global plan: which samples make which row of which rank at which micro-step, from metadata alone.

Every process of every rank runs the same plan, so nothing is communicated and nothing but a position and the ids that wait in the buffer
has to be saved. World size enters only when the packs of a step are dealt.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from infimed.contracts import Pack, UserError
from infimed.data.mixture import epoch_rows
from infimed.data.order import permutation
from infimed.data.packing import Packing, chooser, deal

VERSION = 1
OnOverflow = Literal["drop", "error"]


class PlanState(TypedDict):
    """Where a plan stands: plain numbers, the same on every rank, free of world size and workers."""

    version: int
    fingerprint: str
    seed: int
    epoch: int
    position: int  # samples of this epoch that have entered the buffer
    buffer: list[int]  # rows that wait, oldest first
    step: int  # micro-steps given out


@dataclass(frozen=True)
class Step:
    """One global micro-step."""

    number: int
    hands: tuple[tuple[Pack, ...], ...]  # [world_size][packs_per_batch]


class Plan:
    """An iterator over global micro-steps that can be asked where it stands and be put there again."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        sources: Sequence[str],
        weights: np.ndarray | None = None,
        fingerprint: str = "",
        seed: int = 0,
        max_tokens: int,
        packs_per_batch: int = 1,
        world_size: int = 1,
        buffer: int = 128,
        epochs: int | None = None,
        steps: int | None = None,
        packing: Packing = "packed",
        on_overflow: OnOverflow = "drop",
        shuffle: bool = True,
    ) -> None:
        """Plan rows of the given token lengths.

        lengths, sources, weights: one a row; weights from `mixture.row_weights`. epochs, steps: where the plan ends, whichever comes first.
        Raises: UserError when a sample is too long and `on_overflow="error"`, or when none fits.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.fits = self.lengths <= max_tokens
        self.overlong = Counter(source for source, fits in zip(sources, self.fits, strict=True) if not fits)
        _check_overflow(self.lengths, self.overlong, max_tokens=max_tokens, on_overflow=on_overflow)
        self.weights = np.ones(len(self.lengths)) if weights is None else weights
        if not (self.weights * self.fits).any():
            raise UserError(
                f"none of {len(self.lengths)} samples is left to plan: each is too long for max_tokens={max_tokens} or has weight 0"
            )
        self.fingerprint, self.seed, self.shuffle = fingerprint, seed, shuffle
        self.max_tokens, self.packs_per_batch, self.world_size = max_tokens, packs_per_batch, world_size
        self.epochs, self.steps = epochs, steps
        self._choose = chooser(packing)
        # A row needs about capacity / mean samples; with three times as many waiting, one of them nearly always completes it.
        # At most 1024, so that the saved state stays small.
        self._buffer_size = min(1024, max(buffer, int(3 * max_tokens / max(1.0, self.lengths[self.fits].mean()))))
        self._epoch, self._position, self._step = 0, 0, 0
        self._buffer: list[int] = []
        self._rows, self._rows_epoch = np.empty(0, dtype=np.int64), -1
        self._length: int | None = None

    def __iter__(self) -> Iterator[Step]:
        """Return itself."""
        return self

    def __next__(self) -> Step:
        """Take the next micro-step."""
        packs = [] if self._step == self.steps else self._packs()
        if not any(pack.rows for pack in packs):
            raise StopIteration
        # Full rows cost the same in their linear part; what differs is attention, the sum of squared lengths.
        costs = [float((self.lengths[list(pack.rows)] ** 2).sum()) for pack in packs]
        step = Step(self._step, tuple(deal(packs, costs, ranks=self.world_size)))
        self._step += 1
        return step

    def __len__(self) -> int:
        """Return the micro-steps of the whole plan, those already given out included. Raises: TypeError for an endless plan."""
        if self.epochs is None:
            if self.steps is None:
                raise TypeError("a plan with neither epochs nor steps has no length")
            return self.steps
        if self._length is None:
            self._length = self._step + sum(1 for _ in self.copy())
        return self._length

    @property
    def step(self) -> int:
        """Return the micro-steps given out so far."""
        return self._step

    def copy(self) -> Plan:
        """Return a plan at the same place that moves on its own."""
        twin = copy.copy(self)
        twin._buffer = list(self._buffer)
        return twin

    def state_dict(self) -> PlanState:
        """Say where the plan stands."""
        return PlanState(
            version=VERSION,
            fingerprint=self.fingerprint,
            seed=self.seed,
            epoch=self._epoch,
            position=self._position,
            buffer=list(self._buffer),
            step=self._step,
        )

    def load_state_dict(self, state: PlanState) -> None:
        """Continue where `state` was taken; max_tokens, packs_per_batch and world_size may differ. Raises: UserError for other data."""
        for name, mine in (("version", VERSION), ("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state[name] != mine:
                raise UserError(
                    f"data position: its {name} is {state[name]!r}, this run has {mine!r}; resume with the shards, selection, mixture and "
                    "seed of the checkpoint, or start anew from its weights with init_from"
                )
        self._epoch, self._position, self._step = state["epoch"], state["position"], state["step"]
        self._buffer = [row for row in state["buffer"] if self.fits[row]]
        self._length = None

    def _packs(self) -> list[Pack]:
        """Take the packs of one step; at the end of a finite plan the missing ones are empty."""
        packs = []
        for _ in range(self.packs_per_batch * self.world_size):
            self._refill()
            if not self._buffer:
                packs.append(Pack((), 0))
                continue
            waiting = self.lengths[self._buffer].tolist()
            chosen = self._choose(waiting, self.max_tokens)
            packs.append(Pack(tuple(self._buffer[i] for i in chosen), sum(waiting[i] for i in chosen)))
            taken = set(chosen)
            self._buffer = [row for i, row in enumerate(self._buffer) if i not in taken]
        return packs

    def _refill(self) -> None:
        """Fill the buffer from the order; one epoch runs into the next without a flush."""
        while len(self._buffer) < self._buffer_size and (self.epochs is None or self._epoch < self.epochs):
            rows = self._epoch_order()
            taken = rows[self._position : self._position + self._buffer_size - len(self._buffer)]
            self._buffer += taken[self.fits[taken]].tolist()
            self._position += len(taken)
            if self._position >= len(rows):
                self._epoch, self._position = self._epoch + 1, 0

    def _epoch_order(self) -> np.ndarray:
        """Return the rows of this epoch in order, int64[n].

        Those too long for max_tokens included, so that the position keeps its sense when that changes.
        """
        if self._rows_epoch != self._epoch:
            rows = epoch_rows(self.weights, seed=self.seed, epoch=self._epoch)
            if self.shuffle:
                rows = rows[permutation(len(rows), seed=self.seed, epoch=self._epoch)]
            self._rows, self._rows_epoch = rows, self._epoch
        return self._rows


def _check_overflow(lengths: np.ndarray, overlong: Counter[str], *, max_tokens: int, on_overflow: str) -> None:
    """Refuse samples that are too long when the user asked for that."""
    if on_overflow not in ("drop", "error"):
        raise UserError(f"on_overflow={on_overflow!r}: expected drop or error")
    if overlong and on_overflow == "error":
        by_source = ", ".join(f"{source}: {count}" for source, count in sorted(overlong.items()))
        raise UserError(
            f"on_overflow=error: {overlong.total()} samples exceed max_tokens={max_tokens} (longest {lengths.max()}; {by_source}); "
            f"raise max_tokens, lower visual_grid, or leave them out with on_overflow=drop"
        )
