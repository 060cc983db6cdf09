"""The samples in the order of the plan, with their lengths and costs; those too long for a row are dropped or split on the way."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from infimed.contracts import UserError
from infimed.data.catalogue import Catalogue, Measure, Run
from infimed.data.mixture import InOrder, Mixer, MixerState, Mixing
from infimed.data.order import Stream
from infimed.data.packing import Price

OnOverflow = Literal["drop", "error", "split"]
Piece = tuple[int, int, int]
Entry = int | Piece
"""What waits for a row: a whole sample by its row number, or (row number, start, stop)."""

_CHUNK = 4096  # samples drawn at a time; nothing depends on it but speed


class Arrivals:
    """An endless or finite queue of entries that fit a row, with a position."""

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        mixing: Mixing,
        seed: int,
        epochs: int | None,
        open_shards: int,
        shuffle: bool,
        max_tokens: int,
        on_overflow: OnOverflow,
        price: Price,
    ) -> None:
        """Stand before the first sample. Raises: UserError for a wrong mixture, samples too long to be accepted, or none that fits."""
        if on_overflow not in get_args(OnOverflow):
            raise UserError(f"on_overflow={on_overflow!r}: expected one of {', '.join(get_args(OnOverflow))}")
        counts = catalogue.counts()
        self.catalogue, self.price = catalogue, price
        self._max_tokens, self._split = max_tokens, on_overflow == "split"
        if shuffle:
            self.mixer = Mixer(catalogue, counts, mixing=mixing, seed=seed, epochs=epochs)
        else:
            assert mixing == Mixing(), "rows in the order of the index are not mixed"
            self.mixer = InOrder(catalogue, counts, epochs=epochs)
        self._streams = [
            Stream(catalogue, source, each, seed=seed, open_shards=open_shards, shuffle=shuffle) for source, each in enumerate(counts)
        ]
        self._overlong = np.zeros(len(counts), np.int64)
        self._forget()
        _check_lengths(catalogue, counts, self.mixer, max_tokens=max_tokens, on_overflow=on_overflow)

    def take(self, count: int) -> tuple[list[Entry], list[int], list[float]]:
        """Take the next entries: what they are, their lengths and their costs. Fewer than `count` only at the end.

        The pieces of a sample come together, so that a position never lies inside one: then it is a few more.
        """
        entries, lengths, costs = list[Entry](), list[int](), list[float]()
        while len(entries) < count and (self._next < len(self._entries) or self._draw()):
            stop = min(len(self._entries), self._next + count - len(entries))
            while self._split and stop < len(self._entries) and self._ends[stop] == self._ends[stop - 1]:
                stop += 1
            part = slice(self._next, stop)
            entries += self._entries[part]
            lengths += self._lengths[part]
            costs += self._costs[part]
            self._next, self._met = stop, self._ends[stop - 1]
        return entries, lengths, costs

    def settle(self) -> None:
        """Bring the mixer's count up to what was taken."""
        met = self._sources[self._settled : self._met]
        self.mixer.take(met)
        dropped = met[self._dropped[self._settled : self._met]]
        self._overlong = self._overlong + np.bincount(dropped, minlength=len(self._overlong))
        self._settled = self._met

    def change(self, rates: np.ndarray) -> None:
        """Mix by other shares from here on."""
        self.settle()
        self._forget()
        self.mixer.change(rates)

    def reprice(self, price: Price) -> None:
        """Cost by other prices from here on."""
        self.settle()
        self._forget()
        self.price = price

    def restore(self, state: MixerState, *, overlong: Counter[str], price: Price) -> None:
        """Go on from a saved position."""
        self._forget()
        self.mixer.load_state_dict(state)
        self._overlong = np.array([overlong[source] for source in self.mixer.sources], np.int64)
        self.price = price

    def overlong(self) -> Counter[str]:
        """Count the samples left out as too long so far, by source."""
        self.settle()
        return Counter({source: count for source, count in zip(self.mixer.sources, self._overlong.tolist(), strict=True) if count})

    def shown(self) -> dict[str, int]:
        """Count the samples let in so far, by source."""
        self.settle()
        return dict(zip(self.mixer.sources, (self.mixer.taken - self._overlong).tolist(), strict=True))

    def copy(self) -> Arrivals:
        """Return a queue at the same place that moves on its own."""
        twin = copy.copy(self)
        twin.mixer, twin._streams = copy.copy(self.mixer), [copy.copy(stream) for stream in self._streams]
        return twin

    def admit(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[int], list[float], list[int]]:
        """Look entries up: those too long are split or left out. Returns, beside the three of `take`, which of `entries` each is from."""
        rows = np.array([entry if isinstance(entry, int) else entry[0] for entry in entries], np.int64)
        sizes = self.catalogue.measure(rows)
        found, lengths, costs, origins = list[Entry](), list[int](), list[float](), list[int]()
        for place, entry in enumerate(entries):
            row, whole = int(rows[place]), (0, int(sizes.tokens[place]))
            start, stop = whole if isinstance(entry, int) else entry[1:]
            for run in [(start, stop)] if stop - start <= self._max_tokens else self._runs(row, start, stop):
                found.append(row if run == whole else (row, *run))
                lengths.append(run[1] - run[0])
                costs.append(self._cost(row, run, sizes, place))
                origins.append(place)
        return found, lengths, costs, origins

    def leave_out(self, rows: Sequence[int]) -> None:
        """Count samples as too long that had been let in."""
        counts = self.catalogue.counts()
        self._overlong = self._overlong.copy()
        for source, shard in np.argwhere(counts).tolist() if rows else ():
            self._overlong[source] += np.isin(rows, self.catalogue.rows(source, shard)).sum()

    def _draw(self) -> bool:
        """Lay in the next samples; say whether there are any that fit. Raises: UserError when a long search finds none."""
        fruitless = 0
        while True:
            self.settle()
            sources = self.mixer.draw(_CHUNK)
            self._forget()
            if not len(sources):
                return False
            rows = np.empty(len(sources), np.int64)
            for source in np.unique(sources).tolist():
                mine = np.flatnonzero(sources == source)
                rows[mine] = self._streams[source].take(int(self.mixer.taken[source]), len(mine))
            self._lay_in(sources, rows)
            if self._entries:
                return True
            self._met = len(sources)
            fruitless += len(sources)
            if fruitless > 2 * int(self.mixer.rows.sum()):
                raise UserError(f"none of the samples shown now fits max_tokens={self._max_tokens}; raise it, or show other sources")

    def _lay_in(self, sources: np.ndarray, rows: np.ndarray) -> None:
        """Keep what fits of the samples just drawn."""
        sizes = self.catalogue.measure(rows)
        fits = sizes.tokens <= self._max_tokens
        kept = np.flatnonzero(fits)
        self._sources, self._dropped = sources, ~fits
        self._entries, self._lengths = rows[kept].tolist(), sizes.tokens[kept].tolist()
        self._costs, self._ends = self.price.of(sizes)[kept].tolist(), (kept + 1).tolist()
        if self._split and not fits.all():
            long = np.flatnonzero(~fits)
            *pieces, origins = self.admit(rows[long].tolist())
            ends = self._ends + (long[origins] + 1).tolist()
            self._dropped[long[origins]] = False
            order = np.argsort(ends, kind="stable").tolist()
            columns = [(*old, *new) for old, new in zip((self._entries, self._lengths, self._costs), pieces, strict=True)]
            self._entries, self._lengths, self._costs, self._ends = ([column[n] for n in order] for column in (*columns, ends))

    def _forget(self) -> None:
        """Have nothing laid in."""
        self._sources, self._dropped = np.zeros(0, np.int64), np.zeros(0, bool)
        self._entries: list[Entry] = []
        self._lengths: list[int] = []
        self._costs: list[float] = []
        self._ends: list[int] = []  # of each entry: samples of the chunk that are met once it is taken
        self._next = self._met = self._settled = 0

    def _runs(self, row: int, start: int, stop: int) -> list[Run]:
        """Split tokens start ... stop - 1 of a row if that is wanted; none where an image is longer than a row."""
        return pieces_of(start, stop, self._max_tokens, self.catalogue.cuts(row)) if self._split else []

    def _cost(self, row: int, run: Run, sizes: Measure, place: int) -> float:
        """Cost a run of tokens of a row: its images go by their share of the row's image tokens."""
        length, share = run[1] - run[0], 1.0
        if length < sizes.tokens[place]:
            images = self.catalogue.cuts(row)
            inside = sum(b - a for a, b in images if run[0] <= a and b <= run[1])
            share = inside / max(1, sum(b - a for a, b in images))
        patches, pairs = (np.array([column[place] * share]) for column in (sizes.patches, sizes.patch_pairs))
        return float(self.price.of(Measure(np.array([length]), patches, pairs, visual=np.zeros(1, np.int64)))[0])


def pieces_of(start: int, stop: int, most: int, images: Sequence[Run]) -> list[Run]:
    """Cut tokens start ... stop - 1 into runs of at most `most` tokens, never inside an image; none when an image is longer than that.

    A piece begins with the last token of the one before, so that the next token is still learned from; what follows or begins an
    image is not learned anyway. A piece of one token would teach nothing and is not made.
    """
    if any(b - a > most for a, b in images if start <= a and b <= stop) or most < 2:
        return []
    pieces = []
    while stop - start >= 2:
        end = min(start + most, stop)
        end = next((a for a, b in images if start < a < end < b), end)
        if end - start >= 2:
            pieces.append((start, end))
        if end == stop:
            break
        bound = any(a <= end - 1 < b or a == end for a, b in images)
        start = end if bound or end - start < 2 else end - 1
    return pieces


def joined(entries: Sequence[Entry]) -> list[int | list[int]]:
    """Write pieces of a sample that follow one another as one run, which `pieces_of` cuts in the same places again."""
    found = list[int | list[int]]()
    for entry in entries:
        before = found[-1] if found else None
        if isinstance(entry, int):
            found.append(entry)
        elif isinstance(before, list) and before[0] == entry[0] and before[2] - 1 <= entry[1] <= before[2]:
            before[2] = entry[2]
        else:
            found.append(list(entry))
    return found


def _check_lengths(catalogue: Catalogue, counts: np.ndarray, mixer: Mixer, *, max_tokens: int, on_overflow: str) -> None:
    """Refuse samples that are too long where the user asked for that, and data of which nothing fits."""
    overlong, longest, fitting = Counter[str](), 0, on_overflow == "split" and counts.any()
    for source, shard in zip(*map(iter, np.nonzero(counts)), strict=True):  # as they are asked for: mostly the first says it all
        if fitting and on_overflow != "error":
            return
        if not mixer.ever(int(source)):
            continue
        tokens = catalogue.measure(catalogue.rows(int(source), int(shard))).tokens
        long = int((tokens > max_tokens).sum())
        fitting |= long < len(tokens)
        if long:
            overlong[catalogue.sources[source]] += long
            longest = max(longest, int(tokens.max()))
    if overlong and on_overflow == "error":
        by_source = ", ".join(f"{source}: {count}" for source, count in sorted(overlong.items()))
        raise UserError(
            f"on_overflow=error: {overlong.total()} samples exceed max_tokens={max_tokens} (longest {longest}; {by_source}); "
            "raise max_tokens, lower visual_grid, or leave them out with on_overflow=drop or cut their text with on_overflow=split"
        )
    if not fitting:
        raise UserError(
            f"none of {int(counts.sum())} samples is left to plan: each is too long for max_tokens={max_tokens} or has weight 0"
        )
