"""The global plan: which samples make which row of which rank at which micro-step, from metadata alone.

Every process of every rank runs the same plan, so nothing is communicated and nothing but a few counts and the ids that wait in the
buffer has to be saved. World size enters only when the packs of a step are dealt.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import TypedDict

from infimed.contracts import Pack, UserError
from infimed.data.arrivals import Arrivals, Entry, OnOverflow, joined
from infimed.data.catalogue import Catalogue
from infimed.data.mixture import Mixing, Phase, table, wrong_shares
from infimed.data.packing import PRICE, Packing, Price, chooser, deal, next_fit

VERSION = 2
MOST = 512
"""Entries that wait at most, so that the saved state stays below 10 KB."""


class Total(TypedDict):
    """How many packs a plan has, which takes a simulation to know."""

    packs: int
    of: str  # fingerprint of the settings that it follows from


class PlanState(TypedDict):
    """Where a plan stands: plain numbers, the same on every rank, free of world size and workers."""

    version: int
    fingerprint: str  # of data and selection
    seed: int
    mixing: str  # fingerprint of the settings that the order follows from
    epoch: int
    taken: list[int]  # samples of each source that have left the order
    phase: Phase | None
    buffer: list[int | list[int]]  # what waits, oldest first: row, or [row, start, stop] of pieces
    packs: int  # given out
    overlong: dict[str, int]
    price: list[float]
    total: Total | None


@dataclass(frozen=True)
class Step:
    """One global micro-step."""

    number: int
    hands: tuple[tuple[Pack, ...], ...]  # [world_size][packs_per_batch]


class Plan:
    """An iterator over global micro-steps that can be asked where it stands and be put there again."""

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        seed: int = 0,
        max_tokens: int,
        packs_per_batch: int = 1,
        world_size: int = 1,
        global_batch: int | None = None,
        buffer: int = 192,
        open_shards: int = 16,
        mixing: Mixing | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        packing: Packing = "packed",
        on_overflow: OnOverflow = "drop",
        shuffle: bool = True,
        price: Price = PRICE,
    ) -> None:
        """Plan the rows of a catalogue.

        global_batch: packs an optimizer step, which the curriculum counts. buffer: samples that wait at least, if there are as many.
        open_shards: shards that a source is read from at a time. epochs, steps: where the plan ends, whichever comes first.
        Raises: UserError for a wrong mixture, when a sample is too long and `on_overflow="error"`, or when none fits.
        """
        if not 1 <= buffer <= MOST:
            raise UserError(f"data.buffer={buffer}: expected 1 to {MOST} samples, so that the saved position stays small")
        self._choose = chooser(packing)
        self.catalogue, self.seed, self.epochs, self.steps = catalogue, seed, epochs, steps
        self.max_tokens, self.packs_per_batch, self.world_size = max_tokens, packs_per_batch, world_size
        self._per_step = packs_per_batch * world_size
        self._global_batch = global_batch or self._per_step
        self._mixing, self._packing, self._buffer_size = mixing or Mixing(), packing, buffer
        self._arrivals = Arrivals(
            catalogue,
            mixing=self._mixing,
            seed=seed,
            epochs=epochs,
            open_shards=open_shards,
            shuffle=shuffle,
            max_tokens=max_tokens,
            on_overflow=on_overflow,
            price=price,
        )
        self._order = f"{self._mixing.fingerprint()}-{open_shards}{'' if shuffle else '-in-order'}"
        self._most = None if steps is None else steps * self._per_step
        filling = [max_tokens, packing, on_overflow, self._buffer_size, epochs, self._most]
        filling += [self._global_batch] if self._mixing.curriculum else []
        self._filling = hashlib.sha256(json.dumps(filling).encode()).hexdigest()[:16]
        # What waits, oldest first, as three columns.
        self._entries: list[Entry] = []
        self._lengths: list[int] = []
        self._costs: list[float] = []
        self._packs = self._tokens = 0
        self._total: int | None = None

    def __iter__(self) -> Iterator[Step]:
        """Return itself."""
        return self

    def __next__(self) -> Step:
        """Take the next micro-step."""
        if self._most is not None and self._packs >= self._most:
            raise StopIteration
        packs, costs = zip(*(self._pack(self._packs + place) for place in range(self._per_step)), strict=True)
        if not packs[0].rows:
            raise StopIteration
        step = Step(self.step, tuple(deal(packs, costs, ranks=self.world_size)))
        self._packs += self._per_step
        return step

    def __len__(self) -> int:
        """Return the micro-steps of the whole plan, those already given out included. Raises: TypeError for an endless plan."""
        if self._arrivals.mixer.endless:
            if self.steps is None:
                raise TypeError("a plan with neither epochs nor steps has no length")
            return self.steps
        if self._total is None:
            twin, self._total = self.copy(), self._packs
            while self._total != self._most and twin._pack(self._total)[0].rows:
                self._total += 1
        return -(-self._total // self._per_step)

    @property
    def step(self) -> int:
        """Return the micro-steps given out so far."""
        return self._packs // self._per_step

    @property
    def overlong(self) -> Counter[str]:
        """Count the samples left out as too long so far, by source."""
        return self._arrivals.overlong()

    def asked(self) -> dict[str, float]:
        """Return the shares of the samples asked for now, by source."""
        return self._arrivals.mixer.asked()

    def shown(self) -> dict[str, int]:
        """Return the samples of each source that have entered so far."""
        return self._arrivals.shown()

    def reweigh(self, shares: Mapping[str, float]) -> None:
        """Mix the sources by these shares from the next pack on, until the curriculum says otherwise.

        What waits already is shown first. Raises: UserError for wrong shares.
        """
        if problems := wrong_shares("shares", shares, self.catalogue.sources):
            raise UserError("\n".join(problems))
        self._arrivals.change(table(shares, self.catalogue.sources))
        self._total = None

    def reprice(self, price: Price) -> None:
        """Deal by these prices from the next step on; the packs stay as they are."""
        self._arrivals.reprice(price)
        self._lay(self._entries)

    def copy(self) -> Plan:
        """Return a plan at the same place that moves on its own."""
        twin = copy.copy(self)
        twin._arrivals = self._arrivals.copy()
        twin._entries, twin._lengths, twin._costs = list(self._entries), list(self._lengths), list(self._costs)
        return twin

    def state_dict(self) -> PlanState:
        """Say where the plan stands."""
        return PlanState(
            version=VERSION,
            fingerprint=self.catalogue.fingerprint,
            seed=self.seed,
            mixing=self._order,
            overlong=dict(self.overlong),
            **self._arrivals.mixer.state_dict(),
            buffer=joined(self._entries),
            packs=self._packs,
            price=[float(part) for part in astuple(self._arrivals.price)],
            total=None if self._total is None else Total(packs=self._total, of=self._filling),
        )

    def load_state_dict(self, state: PlanState) -> None:
        """Continue where `state` was taken; max_tokens, packs_per_batch and world_size may differ.

        Raises: UserError for a state of other data, or one that this number of packs a step cannot go on from.
        """
        expected = {"version": VERSION, "fingerprint": self.catalogue.fingerprint, "seed": self.seed, "mixing": self._order}
        for name, mine in expected.items():
            if state.get(name) != mine:
                what = "version of InfiMed" if name == "version" else "shards, selection, mixture, open_shards and seed"
                raise UserError(
                    f"data position: its {name} is {state.get(name)!r}, this run has {mine!r}; resume with the {what} "
                    "of the checkpoint, or start anew from its weights with init_from"
                )
        self._arrivals.restore(state, overlong=Counter(state["overlong"]), price=Price(*state["price"]))
        self._packs, total = state["packs"], state["total"]
        self._total = total["packs"] if total and total["of"] == self._filling else None
        self._lay([entry if isinstance(entry, int) else tuple(entry) for entry in state["buffer"]])
        if self._packs % self._per_step and self.copy()._pack(self._packs)[0].rows:
            raise UserError(
                f"data position: packs_per_batch={self.packs_per_batch} x {self.world_size} ranks does not divide the {self._packs} packs "
                "given out; resume from a checkpoint between two optimizer steps, with the same number of packs an optimizer step"
            )

    def digest(self) -> int:
        """Return 63 bits of the position and of the settings that shape steps, to be compared between ranks."""
        state = {**self.state_dict(), "total": None}
        settings = [self._filling, self.packs_per_batch, self.world_size, self._global_batch]
        return int.from_bytes(hashlib.sha256(json.dumps([state, settings]).encode()).digest()[:8], "big") >> 1

    def _pack(self, number: int) -> tuple[Pack, float]:
        """Take the pack of this number and its cost; it is empty at the end of a finite plan."""
        if self._mixing.curriculum:
            self._follow_curriculum(number)
        self._refill()
        entries, lengths, cost = list[Entry](), list[int](), 0.0
        while self._entries:
            room = self.max_tokens - sum(lengths)
            # Samples so short that all that may wait would not fill the row: let the oldest in ahead and look at more of them.
            scant = self._packing != "padded" and len(self._entries) >= MOST and self._tokens < 3 * room
            ahead = next_fit(self._lengths, room // 2) if scant else []
            chosen = ahead or sorted(self._choose(self._lengths, room))
            entries += [self._entries[place] for place in chosen]
            lengths += [self._lengths[place] for place in chosen]
            cost += sum([self._costs[place] for place in chosen])
            self._remove(chosen)
            if not ahead:
                break
            self._refill()
        tokens = sum(lengths)
        if tuple not in map(type, entries):
            return Pack(tuple(entries), tokens, number=number if entries else 0), cost
        spans = tuple((0, length) if isinstance(entry, int) else entry[1:] for entry, length in zip(entries, lengths, strict=True))
        return Pack(tuple(entry if isinstance(entry, int) else entry[0] for entry in entries), tokens, spans, number), cost

    def _refill(self) -> None:
        """Let samples in; one epoch runs into the next without a flush."""
        # A row needs about max_tokens / mean samples; with three times as many waiting, some of them nearly always complete it.
        while (waiting := len(self._entries)) < MOST and (waiting < self._buffer_size or self._tokens < 3 * self.max_tokens):
            # Sixteen at least, although fewer might do: a call costs as much as they do.
            entries, lengths, costs = self._arrivals.take(max(self._buffer_size - waiting, min(16, MOST - waiting)))
            if not entries:
                return
            self._entries += entries
            self._lengths += lengths
            self._costs += costs
            self._tokens += sum(lengths)

    def _remove(self, places: list[int]) -> None:
        """Take out what is at these places, ascending."""
        self._tokens -= sum([self._lengths[place] for place in places])
        ahead = len(places)
        while ahead and places[ahead - 1] >= ahead:  # not the rest: those are the oldest, all in a row
            ahead -= 1
            place = places[ahead]
            del self._entries[place], self._lengths[place], self._costs[place]
        del self._entries[:ahead], self._lengths[:ahead], self._costs[:ahead]

    def _lay(self, waiting: list[Entry]) -> None:
        """Wait with these entries, as far as they fit these rows."""
        self._entries, self._lengths, self._costs, origins = self._arrivals.admit(waiting)
        self._tokens = sum(self._lengths)
        left_out = [waiting[place] for place in sorted(set(range(len(waiting))) - set(origins))]
        self._arrivals.leave_out([entry if isinstance(entry, int) else entry[0] for entry in left_out])

    def _follow_curriculum(self, number: int) -> None:
        """Go on to the shares that hold at the optimizer step of this pack."""
        mixer, changes = self._arrivals.mixer, self._mixing.curriculum
        while mixer.entry < len(changes) and number >= changes[mixer.entry][0] * self._global_batch:
            mixer.entry += 1
            self._arrivals.change(self._mixing.rates(mixer.entry, mixer.sources, mixer.rows))
