"""A shuffle without a random generator: who stands where follows from (seed, source, place) alone, so there is no state to save."""

from __future__ import annotations

import numpy as np

from infimed.data.catalogue import Catalogue

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARDS, _ROWS = 1, 2  # streams of `hash64`; the mixer draws from 3


def hash64(index: np.ndarray, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Hash every number of `index`, independently for each (seed, epoch, stream).

    index: int64[N]. Returns: uint64[N].
    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the four numbers.
    """
    value = np.zeros(1, dtype=np.uint64)
    for number in (seed, epoch, stream):
        value = _mix(value ^ np.array([number % 2**64], dtype=np.uint64))
    return _mix(value ^ index.astype(np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def by_hash(hashes: np.ndarray) -> np.ndarray:
    """Return the order of uint64[N] hashes, int64[N]; ties, which are next to impossible, by place.

    The place goes where the lowest bits were: a plain sort, which numpy does much faster than an argsort.
    """
    low = np.uint64((1 << len(hashes).bit_length()) - 1)
    return (np.sort((hashes & ~low) | np.arange(len(hashes), dtype=np.uint64)) & low).astype(np.int64)


class Stream:
    """The samples of one source without end: sample number j stands in pass j // n at place j % n.

    Pass p goes through the shards in an order that is the same for all sources, so that those that share shards are in them at about
    the same time. `open_shards` of them at most make a block; inside it, rows come in any order. Only the present block is held.
    """

    def __init__(self, catalogue: Catalogue, source: int, counts: np.ndarray, *, seed: int, open_shards: int, shuffle: bool) -> None:
        """Stream the source with this number. counts: int64[shards] its rows in each. `shuffle=False`: in the order of the index."""
        self._catalogue, self._source, self._seed, self._shuffle = catalogue, source, seed, shuffle
        self._shards = np.flatnonzero(counts)
        self._counts = counts[self._shards]
        self.size = int(counts.sum())
        # As even as can be: a last block of one lonely shard would shuffle nothing but that.
        blocks = -(-len(self._shards) // open_shards)
        self._borders = np.arange(blocks + 1) * len(self._shards) // max(1, blocks)
        self._pass, self._order, self._ends = -1, self._shards, np.zeros(0, np.int64)
        self._block, self._rows = (-1, -1), self._shards

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the rows of the samples number start ... start + count - 1, int64[count]; `size` must not be 0."""
        parts = [np.zeros(0, np.int64)]
        while count:
            number, place = divmod(start, self.size)
            self._lay_out(number)
            block = int(np.searchsorted(self._ends, place, side="right"))
            first = int(self._ends[block - 1]) if block else 0
            part = self._block_rows(number, block)[place - first : place - first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _lay_out(self, number: int) -> None:
        """Order the shards of a pass."""
        if self._pass == number:
            return
        order = np.arange(len(self._shards))
        if self._shuffle:
            order = by_hash(hash64(self._shards, seed=self._seed, epoch=number, stream=_SHARDS))
        self._pass, self._order = number, self._shards[order]
        self._ends = np.cumsum(np.append(0, self._counts[order]))[self._borders[1:]]

    def _block_rows(self, number: int, block: int) -> np.ndarray:
        """Return the rows of a block in their order."""
        if self._block != (number, block):
            shards = self._order[self._borders[block] : self._borders[block + 1]]
            rows = np.concatenate([self._catalogue.rows(self._source, int(shard)) for shard in shards])
            if self._shuffle:
                rows = rows[by_hash(hash64(rows, seed=self._seed, epoch=number, stream=_ROWS))]
            self._block, self._rows = (number, block), rows
        return self._rows
