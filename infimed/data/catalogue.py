"""What the plan may know of the data: which rows a source has in which shard, and what each row costs. No pixel, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Run = tuple[int, int]


@dataclass(frozen=True)
class Measure:
    """Sizes of some rows, in the order asked for."""

    tokens: np.ndarray  # int64[n] length of the rendered sample
    patches: np.ndarray  # int64[n] patches that the vision tower reads
    patch_pairs: np.ndarray  # int64[n] sum over images of patches ** 2
    visual: np.ndarray  # int64[n] visual tokens among `tokens`


class Catalogue(Protocol):
    """The metadata behind a plan. Row numbers are those of `Pack.rows`; all calls are cheap and may be lazy."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Name the sources; their place here is their number."""

    @property
    def fingerprint(self) -> str:
        """Identify data and selection."""

    def counts(self) -> np.ndarray:
        """Return int64[sources, shards]: rows of a source in a shard."""

    def rows(self, source: int, shard: int) -> np.ndarray:
        """Return int64[n]: the row numbers of a source in a shard, ascending."""

    def measure(self, rows: np.ndarray) -> Measure:
        """Return the sizes of some rows."""

    def cuts(self, row: int) -> tuple[Run, ...]:
        """Return the runs of tokens (start, stop), ascending, that must stay whole: each image with its start and end tokens."""


class Table:
    """A catalogue in memory, for tests and benchmarks."""

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        sources: Sequence[str] | None = None,
        shards: Sequence[int] | None = None,
        patches: Sequence[int] | np.ndarray | None = None,
        patch_pairs: Sequence[int] | np.ndarray | None = None,
        visual: Sequence[int] | np.ndarray | None = None,
        cuts: Mapping[int, Sequence[Run]] | None = None,
        fingerprint: str = "",
    ) -> None:
        """Take one number a row; what is left out is 0, the source `unknown`, the shard 0. `cuts`: by row."""
        lengths = np.asarray(tokens, dtype=np.int64)
        count = len(lengths)
        fields = [np.zeros(count, np.int64) if given is None else np.asarray(given, np.int64) for given in (patches, patch_pairs, visual)]
        self._measure = Measure(lengths, *fields)
        names, codes = np.unique(["unknown"] * count if sources is None else list(sources), return_inverse=True)
        places = np.zeros(count, np.int64) if shards is None else np.asarray(shards, np.int64)
        assert all(len(column) == count for column in (*fields, codes, places))
        self.sources = tuple(str(name) for name in names)
        self.fingerprint = fingerprint
        self._cuts = {row: tuple((start, stop) for start, stop in runs) for row, runs in (cuts or {}).items()}
        self._shape = (len(names), int(places.max(initial=-1)) + 1)
        cells = codes * self._shape[1] + places
        self._order = np.argsort(cells, kind="stable")
        self._ends = np.cumsum(np.bincount(cells, minlength=self._shape[0] * self._shape[1]))

    def counts(self) -> np.ndarray:
        """Return int64[sources, shards]."""
        return np.diff(self._ends, prepend=0).reshape(self._shape)

    def rows(self, source: int, shard: int) -> np.ndarray:
        """Return int64[n], ascending."""
        cell = source * self._shape[1] + shard
        return self._order[self._ends[cell - 1] if cell else 0 : self._ends[cell]]

    def measure(self, rows: np.ndarray) -> Measure:
        """Return the sizes of some rows."""
        whole = self._measure
        return Measure(whole.tokens[rows], whole.patches[rows], whole.patch_pairs[rows], whole.visual[rows])

    def cuts(self, row: int) -> tuple[Run, ...]:
        """Return the runs given for a row."""
        return self._cuts.get(row, ())
