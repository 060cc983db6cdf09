"""What the plan may know of shards at one resolution: read from their indexes a shard at a time, when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from infimed.data.catalogue import Measure
from infimed.data.index import Part
from infimed.data.recent import Recent
from infimed.data.shards import ShardSet
from infimed.processing.resolution import Resolution

_KEPT = 2**22  # numbers that stay in memory: 32 MiB of them
_SIZES = 2**18  # sizes of pictures whose cost is remembered


class ShardCatalogue:
    """A `catalogue.Catalogue` over a set of shards."""

    def __init__(self, shards: ShardSet, resolution: Resolution) -> None:
        """Look at `shards` at a resolution; nothing is read yet."""
        self._shards, self._resolution = shards, resolution
        self._of_shard, self._measures = Recent[dict[int, np.ndarray]](_KEPT), Recent[Measure](_KEPT)
        self._seen: dict[int, tuple[int, int]] = {}  # width << 32 | height -> visual tokens, patches

    @property
    def sources(self) -> tuple[str, ...]:
        """Name the sources; their place here is their number."""
        return self._shards.sources

    @property
    def fingerprint(self) -> str:
        """Identify data and selection."""
        return self._shards.fingerprint

    def counts(self) -> np.ndarray:
        """Return int64[sources, shards]: rows of a source in a shard."""
        return self._shards.counts

    def rows(self, source: int, shard: int) -> np.ndarray:
        """Return int64[n]: the row numbers of a source in a shard, ascending."""
        size = int(self.counts()[:, shard].sum())
        found = self._of_shard.get(shard, lambda: self._by_source(shard), size=size)
        return found.get(source, np.empty(0, dtype=np.int64))

    def measure(self, rows: np.ndarray) -> Measure:
        """Return the sizes of some rows."""
        shards, local = self._shards.located(np.asarray(rows, dtype=np.int64))
        order = np.argsort(shards, kind="stable")
        measures = {field.name: np.empty(len(shards), dtype=np.int64) for field in fields(Measure)}
        for shard, places in _runs(shards, order):
            whole = self._measure_of(shard)
            for name, found in measures.items():
                found[places] = getattr(whole, name)[local[places]]
        return Measure(**measures)

    def cuts(self, row: int) -> tuple[tuple[int, int], ...]:
        """Return the runs of tokens (start, stop), ascending, that must stay whole: each image with its start and end tokens."""
        seen, runs, before = self._shards.rows[row], [], 0
        for at, size in zip(seen.image_at, seen.image_sizes, strict=True):
            visual = self._resolution.tokens_of(*size)
            runs.append((at + before - 1, at + before + visual + 1))
            before += visual
        return tuple(runs)

    def _by_source(self, shard: int) -> dict[int, np.ndarray]:
        """Return the rows of a shard by the number of their source."""
        rows, local = self._shards.rows_of(shard)
        part, numbers = self._shards.part(shard), {name: number for number, name in enumerate(self.sources)}
        codes = part.facets["source"][local]
        return {numbers[part.tables["source"][code]]: np.sort(rows[codes == code]) for code in np.unique(codes).tolist()}

    def _measure_of(self, shard: int) -> Measure:
        """Measure all samples of a shard."""
        size = self._shards.shards[shard].tar.rows * len(fields(Measure))
        return self._measures.get(shard, lambda: self._measure_part(self._shards.part(shard)), size=size)

    def _measure_part(self, part: Part) -> Measure:
        kinds, which = np.unique(part.images["width"].astype(np.int64) << 32 | part.images["height"].astype(np.int64), return_inverse=True)
        costs = np.array([self._cost(kind) for kind in kinds.tolist()], dtype=np.int64).reshape(-1, 2)[which]
        visual, patches, pairs = (_sums(column, part.image_bounds) for column in (costs[:, 0], costs[:, 1], costs[:, 1] ** 2))
        return Measure(part.text_tokens.astype(np.int64) + visual, patches, pairs, visual)

    def _cost(self, kind: int) -> tuple[int, int]:
        """Return the visual tokens and the patches of a picture; none for one that cannot be used."""
        if kind not in self._seen:
            if len(self._seen) == _SIZES:
                self._seen.clear()
            width, height = kind >> 32, kind & 0xFFFFFFFF
            rows, columns = self._resolution.grid(width, height) if self._resolution.fits(width, height) else (0, 0)
            self._seen[kind] = self._resolution.tokens_of(width, height), rows * columns
        return self._seen[kind]


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the sum of each run of `values`, int64[len(bounds) - 1]."""
    ends = np.concatenate([[0], np.cumsum(values)])
    return ends[bounds[1:]] - ends[bounds[:-1]]


def _runs(shards: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard and the places where it stands; `order` sorts `shards`."""
    names, starts = np.unique(shards[order], return_index=True)
    if len(order):  # splitting nothing gives one empty part
        yield from zip(names.tolist(), np.split(order, starts[1:]), strict=True)
