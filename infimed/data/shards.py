"""Shards: WebDataset tars and, beside them, an index that lets any sample be read by offset.

Layout: `<key>.json` (a Sample minus its key and pixels), then `<key>.0.jpg`, `<key>.1.png`, ... next to each other; tars made elsewhere
are read too once they are indexed. The index repeats offsets, sizes, CRCs and the metadata that planning needs, so that no pixel is read
to make a plan. A member's name is only ever a key of a dictionary, never a path.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from infimed.contracts import DataFault, Sample
from infimed.data.index import Columns, Part, Row, index_path
from infimed.data.recent import Recent
from infimed.data.records import read_member
from infimed.data.shard_check import reindex, verify
from infimed.data.shard_open import Shard, find_tars, open_all
from infimed.data.shard_select import matching, named
from infimed.data.shard_writer import write_shards
from infimed.data.store import Request, Store
from infimed.processing.chat import measure_text
from infimed.processing.tokenizer import Tokenizer

__all__ = ["ShardSet", "find_tars", "index_path", "open_shards", "reindex", "verify", "write_shards"]

log = logging.getLogger(__name__)

_SLACK = 4096  # bytes a member may lie apart from the next and still be read with it: header, padding, a long name
_PARTS, _FILES = 512, 64  # parts of indexes, and index files, that stay mapped
_AT_ONCE = 256  # records that are read together to be counted


def open_shards(paths: Sequence[str | Path], *, store: Store | None = None) -> ShardSet:
    """Open shards named by files, folders or patterns. Raises: UserError with every problem of every path."""
    store = store or Store()
    return ShardSet(open_all(paths, store), store)


class Rows(Sequence[Row]):
    """The rows of a set, each made when it is asked for."""

    def __init__(self, shards: ShardSet) -> None:
        """Look into a set."""
        self._shards = shards

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._shards)

    def __getitem__(self, index: int) -> Row:
        """Make a row."""
        shard, local = self._shards.place(index)
        return self._shards.part(shard).row(local, self._shards.shards[shard].path)


class ShardSet:
    """Open shards: `rows` to plan with, `read` to fetch a sample by offset. Safe to fork and to pickle."""

    def __init__(
        self,
        shards: Sequence[Shard],
        store: Store,
        *,
        chosen: np.ndarray | None = None,
        counted: Mapping[int, Mapping[str, np.ndarray]] | None = None,
        tokenizer: str = "",
    ) -> None:
        """Take opened shards; `open_shards` is the usual way in.

        chosen: int64[n] rows of all that belong to the set; None for all. counted: by shard, `text_tokens` and `image_at` in the place
        of those of an index that was counted with another tokenizer than `tokenizer`.
        """
        self.shards, self._store, self._counted, self._tokenizer = tuple(shards), store, dict(counted or {}), tokenizer
        self._starts = [0, *accumulate(shard.tar.rows for shard in shards)]
        self._chosen = chosen
        self._parts, self._files = Recent[Part](_PARTS), Recent[Columns](_FILES)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._starts[-1] if self._chosen is None else len(self._chosen)

    @property
    def rows(self) -> Rows:
        """Return the metadata of each sample."""
        return Rows(self)

    @property
    def sources(self) -> tuple[str, ...]:
        """Name every source, sorted."""
        return self._census[0]

    @property
    def counts(self) -> np.ndarray:
        """Count the samples by source and shard, int64[sources, shards]."""
        return self._census[1]

    @cached_property
    def fingerprint(self) -> str:
        """Identify the samples and the bytes behind them, wherever the files lie."""
        digest = hashlib.sha256()
        for tar in (shard.tar for shard in self.shards):
            layout = "" if tar.layout is None else repr(sorted(tar.layout.items()))
            digest.update(f"{tar.sha256} {tar.rows} {layout}\n".encode())
        if self._chosen is not None:
            digest.update(self._chosen.tobytes())
        return digest.hexdigest()[:16]

    # --- looking at rows ---------------------------------------------------------------------------------------------

    def place(self, row: int) -> tuple[int, int]:
        """Return the shard of a row and its place there. Raises: IndexError."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = row % len(self) if self._chosen is None else int(self._chosen[row])
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def located(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards and the places there of many rows, int64[n] each."""
        found = rows if self._chosen is None else self._chosen[rows]
        shards = np.searchsorted(self._starts, found, side="right") - 1
        return shards, found - np.asarray(self._starts)[shards]

    def rows_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the set's rows that lie in a shard and their places in it, int64[n] each, by place."""
        start, stop = self._starts[shard], self._starts[shard + 1]
        if self._chosen is None:
            return np.arange(start, stop), np.arange(stop - start)
        order, found = self._by_place
        first, last = np.searchsorted(found, [start, stop])
        return order[first:last], found[first:last] - start

    def part(self, shard: int) -> Part:
        """Return the columns of one shard, all of its samples. Raises: UserError for an index that is damaged."""
        return self._parts.get(shard, lambda: self._map(shard))

    def _map(self, shard: int) -> Part:
        opened = self.shards[shard]
        part = self._files.get(opened.header.path, lambda: Columns(opened.header)).part(opened.slot)
        if (counted := self._counted.get(shard)) is None:
            return part
        return replace(part, text_tokens=counted["text_tokens"], images={**part.images, "image_at": counted["image_at"]})

    @cached_property
    def _by_place(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self._chosen, kind="stable")
        return order, self._chosen[order]

    @cached_property
    def _census(self) -> tuple[tuple[str, ...], np.ndarray]:
        names = sorted({name for shard in self.shards for name in shard.header.sources})
        number = {name: place for place, name in enumerate(names)}
        counts = np.zeros((len(names), len(self.shards)), dtype=np.int64)
        for place, shard in enumerate(self.shards):
            sources = [number[name] for name in shard.header.sources]
            if self._chosen is None:
                counts[sources, place] = shard.header.counts[shard.slot]
            elif len(local := self.rows_of(place)[1]):
                counts[sources, place] = np.bincount(self.part(place).facets["source"][local], minlength=len(sources))
        shown = counts.any(axis=1)
        return tuple(name for name, is_there in zip(names, shown.tolist(), strict=True) if is_there), counts[shown]

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, index: int) -> tuple[Sample, tuple[bytes, ...]]:
        """Return sample `index` and its encoded images. Raises: DataFault truncated, checksum, schema or unreadable."""
        (found,) = self.read_many([index])
        if isinstance(found, DataFault):
            raise found
        return found

    def read_many(self, indices: Sequence[int]) -> list[tuple[Sample, tuple[bytes, ...]] | DataFault]:
        """Return samples and their encoded images, or what is wrong with them, in the order asked for; all are read together."""
        places = [self.place(index) for index in indices]
        return [self._sample(shard, local, found) for (shard, local), found in zip(places, self._checked(places), strict=True)]

    def read_raw(self, indices: Sequence[int]) -> list[list[bytes] | DataFault]:
        """Return the bytes of the members, the record first, of some samples, or what is wrong with them."""
        return self._checked([self.place(index) for index in indices])

    def _checked(self, places: Sequence[tuple[int, int]], *, last: int | None = None) -> list[list[bytes] | DataFault]:
        """Read members up to `last` of each sample: in one piece where they are neighbours, as nearly always."""
        requests, cuts = list[Request](), []
        for shard, local in places:
            spans, path = self.part(shard).spans(local)[:last], self.shards[shard].path
            start, stop = min([offset for offset, _, _ in spans]), max([offset + size for offset, size, _ in spans])
            if stop - start <= sum([size + _SLACK for _, size, _ in spans]):
                cuts.append([(len(requests), offset - start, size, crc) for offset, size, crc in spans])
                requests.append(Request(path, start, stop - start))
            else:
                cuts.append([(len(requests) + number, 0, size, crc) for number, (_, size, crc) in enumerate(spans)])
                requests += [Request(path, offset, size) for offset, size, _ in spans]
        read, found = self._store.read(requests), list[list[bytes] | DataFault]()
        for (shard, local), cut in zip(places, cuts, strict=True):
            pieces = list[bytes]()
            for number, at, size, crc in cut:
                data = read[number]
                piece = data if isinstance(data, DataFault) else data[at : at + size]
                if fault := _fault(piece, size=size, crc=crc):
                    name = f"{self.part(shard).keys[local]}.{self.part(shard).member_names(local)[len(pieces)]}"
                    found.append(DataFault(fault.reason, f"{name}: {fault.detail}"))
                    break
                pieces.append(piece)
            else:
                found.append(pieces)
        return found

    def _sample(self, shard: int, local: int, found: list[bytes] | DataFault) -> tuple[Sample, tuple[bytes, ...]] | DataFault:
        """Build the sample of its members, or say what is wrong with it."""
        if isinstance(found, DataFault):
            return found
        part = self.part(shard)
        key, names = part.keys[local], part.member_names(local)
        try:
            sample = read_member(key, names[0], found[0], images=names[1:], layout=self.shards[shard].tar.layout)
            if sample.source != (source := part.facet("source", local)):
                raise DataFault("schema", f"{key}: source {sample.source!r}, the index says {source!r}")
        except DataFault as fault:
            return fault
        return sample, tuple(found[1:])

    # --- other sets of the same shards -------------------------------------------------------------------------------

    def subset(self, indices: Sequence[int] | np.ndarray) -> ShardSet:
        """Return the same shards with only these rows, in this order."""
        rows = np.asarray(indices, dtype=np.int64)
        rows = np.arange(len(self))[rows] if self._chosen is None else self._chosen[rows]
        return ShardSet(self.shards, self._store, chosen=rows, counted=self._counted, tokenizer=self._tokenizer)

    def select(self, wanted: Mapping[str, Sequence[str]], *, strict: bool = True) -> ShardSet:
        """Keep the rows whose facets all have an allowed value, such as {"task": ["plane", "level"]}.

        Raises: UserError for an unknown facet, for nothing selected and, when strict, for a value that no row has.
        """
        if not wanted:
            return self
        rows = matching(self, wanted, strict=strict)
        return self if len(rows) == len(self) else self.subset(rows)

    def only(self, keys: Collection[tuple[str, str]]) -> ShardSet:
        """Keep the samples named by (tar file, key); of the file the name counts, not the folder. Raises: UserError for none there."""
        return self.subset(named(self, keys))

    def counted_with(self, tokenizer: Tokenizer) -> ShardSet:
        """Return rows whose lengths hold for this tokenizer; text of shards indexed with another one is counted again in memory."""
        stale = [number for number, shard in enumerate(self.shards) if shard.header.tokenizer != tokenizer.fingerprint]
        if self._tokenizer == tokenizer.fingerprint or (not stale and not self._counted):
            return self
        if stale:
            log.info("counting the text of %d shards again: indexed with another tokenizer than %s", len(stale), tokenizer.fingerprint)
        counted = {number: self._recount(number, tokenizer) for number in stale}
        return ShardSet(self.shards, self._store, chosen=self._chosen, counted=counted, tokenizer=tokenizer.fingerprint)

    def _recount(self, shard: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """Count the text of a shard's rows that are in the set."""
        part, layout = self.part(shard), self.shards[shard].tar.layout
        tokens, image_at, images = (np.array(a, dtype=np.int64) for a in (part.text_tokens, part.images["image_at"], part.image_bounds))
        places = np.unique(self.rows_of(shard)[1]).tolist()
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            for local, found in zip(some, self._checked([(shard, local) for local in some], last=1), strict=True):
                names = part.member_names(local)
                try:
                    if isinstance(found, DataFault):
                        raise found
                    record = read_member(part.keys[local], names[0], found[0], images=names[1:], layout=layout)
                    text = measure_text(record.messages, tokenizer)
                except DataFault:  # counted and quarantined when the sample's turn comes
                    continue
                tokens[local] = text.tokens
                if len(text.image_at) == len(names) - 1:
                    image_at[images[local] : images[local + 1]] = text.image_at
        return {"text_tokens": tokens, "image_at": image_at}


def _fault(data: bytes | DataFault, *, size: int, crc: int) -> DataFault | None:
    """Say what is wrong with bytes that are not those of the index."""
    if isinstance(data, DataFault):
        return data
    if len(data) != size:
        return DataFault("truncated", f"{len(data)} of {size} bytes")
    return None if zlib.crc32(data) == crc else DataFault("checksum", "CRC32 differs from the index")
