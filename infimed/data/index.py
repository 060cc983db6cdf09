"""The index of shards: where each sample's bytes lie and the metadata that planning needs, as columns that are mapped, not read.

A safetensors file of unsigned numbers: `NAME.index.safetensors` beside `NAME.tar`, or `index.safetensors` that describes all tars of its
folder at once. Texts are one column of bytes and one of `n + 1` bounds; facets are codes into tables of texts; members (the record first,
then the images) and images run over all samples. The header repeats what opening needs, so that no column is touched before it is used.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from infimed.contracts import UserError
from infimed.data.remote import parted
from infimed.processing.resolution import Resolution

FORMAT = 2
MERGED = "index.safetensors"
FACETS = ("source", "task", "answer_type", "modality", "organ", "patient", "domain")
"""The Sample fields that the index repeats and that rows can be selected by."""

TABLES = (*FACETS[1:], "name")  # the sources' names are in the header
MEMBER_COLUMNS, IMAGE_COLUMNS = ("offset", "size", "crc32", "name"), ("width", "height", "image_at")
_DTYPES = {"U8": np.dtype("<u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
_HEADER_MAX = 2**26  # bytes; ten thousand tars take 2 MB
_TOKENS_MAX = 2**32  # of a text; sums over all rows stay within 64 bits
_SMALL = 2**20  # bytes, some 15,000 samples: such an index is read: a mapping holds a file handle


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one member lie in its tar."""

    name: str  # what follows the key: "json", "0.jpg", ...
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as the plan sees it: metadata only."""

    shard: str  # path of the tar
    key: str
    members: tuple[Member, ...]  # the record first, then the images in order
    text_tokens: int  # length with no visual token at all
    image_sizes: tuple[tuple[int, int], ...]  # (width, height); (0, 0) where the header could not be read
    image_at: tuple[int, ...]  # for each image the text tokens before its run, the image start token included
    source: str
    task: str
    answer_type: str
    modality: str
    organ: str
    patient: str
    domain: str

    def length(self, resolution: Resolution) -> int:
        """Return the tokens of the sample at a resolution."""
        return self.text_tokens + self.visual_tokens(resolution)

    def visual_tokens(self, resolution: Resolution) -> int:
        """Return the tokens of its images at a resolution."""
        return sum(resolution.tokens_of(width, height) for width, height in self.image_sizes)


@dataclass(frozen=True, slots=True)
class Tar:
    """What an index says of a tar as a whole."""

    name: str  # its file name; the folder is that of the index
    rows: int
    bytes: int
    sha256: str
    layout: Mapping[str, str] | None  # None: our records; else what records made elsewhere do not say, see `records.Layout`


@dataclass(frozen=True, slots=True)
class Header:
    """What opening an index reads."""

    path: str  # of a local file
    where: str  # what to call it in messages: the same, or the address that it was fetched from
    mark: int  # CRC of its bytes, to notice that the file was written again
    tokenizer: str  # fingerprint of the tokenizer that counted the text; empty when it was not counted
    sources: tuple[str, ...]
    tars: tuple[Tar, ...]
    counts: tuple[tuple[int, ...], ...]  # [tars][sources] rows


class Texts(Sequence[str]):
    """A column of texts, decoded when asked for."""

    def __init__(self, blob: np.ndarray, bounds: np.ndarray) -> None:
        """Take the bytes uint8[...] and the bounds [n + 1] of the texts in them. Raises: ValueError."""
        bounds = bounds.astype(np.int64)
        is_sound = bounds[0] == 0 and bounds[-1] == len(blob) and bool((np.diff(bounds) >= 0).all())
        _require(is_sound, "texts whose bounds are out of order")
        self._blob, self._bounds = memoryview(blob), memoryview(bounds)

    def __len__(self) -> int:
        """Count the texts."""
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> str:
        """Decode one; bytes that are no UTF-8 are spelled out."""
        return str(self._blob[self._bounds[number] : self._bounds[number + 1]], "utf-8", "backslashreplace")

    def encoded(self) -> tuple[bytes, np.ndarray]:
        """Return the bytes of all texts, and int64[n], the length of each."""
        return bytes(self._blob), np.diff(self._bounds)


@dataclass(frozen=True)
class Part:
    """The samples of one tar: n rows, m members, m - n images."""

    keys: Sequence[str]
    bounds: np.ndarray  # int64[n + 1], 0 ... m: where the members of a sample begin
    text_tokens: np.ndarray  # [n]
    facets: Mapping[str, np.ndarray]  # [n] codes each
    members: Mapping[str, np.ndarray]  # [m]: offset, size, crc32, name (a code)
    images: Mapping[str, np.ndarray]  # [m - n]: width, height, image_at
    tables: Mapping[str, Sequence[str]] = field(repr=False)  # texts behind the codes

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.bounds) - 1

    @property
    def image_bounds(self) -> np.ndarray:
        """Return int64[n + 1], 0 ... m - n: where the images of a sample begin."""
        return self.bounds - np.arange(len(self.bounds))

    @cached_property
    def _quick(self) -> dict[str, memoryview]:
        """Columns that give plain numbers, in a third of the time of numpy's scalars."""
        columns = {"bounds": self.bounds, "text_tokens": self.text_tokens, **self.facets, **self.members, **self.images}
        return {name: memoryview(column) for name, column in columns.items()}

    def member_names(self, row: int) -> tuple[str, ...]:
        """Return what follows the key in each member's name."""
        start, stop = self._quick["bounds"][row], self._quick["bounds"][row + 1]
        return tuple([self.tables["name"][code] for code in self._quick["name"][start:stop]])

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """Return (offset, size, CRC32) of each member."""
        start, stop = self._quick["bounds"][row], self._quick["bounds"][row + 1]
        return list(zip(*(self._quick[name][start:stop] for name in ("offset", "size", "crc32")), strict=True))

    def facet(self, name: str, row: int) -> str:
        """Return one facet of a sample."""
        return self.tables[name][self._quick[name][row]]

    def row(self, row: int, shard: str) -> Row:
        """Return a sample's metadata; `shard`: the path of the tar."""
        quick, (start, stop) = self._quick, self._quick["bounds"][row : row + 2]
        first, last = start - row, stop - row - 1
        return Row(
            shard,
            self.keys[row],
            tuple(map(Member, self.member_names(row), *(quick[name][start:stop] for name in ("offset", "size", "crc32")))),
            quick["text_tokens"][row],
            tuple(zip(quick["width"][first:last], quick["height"][first:last], strict=True)),
            tuple(quick["image_at"][first:last]),
            *[self.facet(name, row) for name in FACETS],
        )


class Columns:
    """An index file, mapped, or read where it is small."""

    def __init__(self, header: Header, *, mapped: bool = True) -> None:
        """Open the file, or read all of it. Raises: UserError when it is no index, or another one than `header` was read from."""
        self.header = header
        self._first = [0, *accumulate(tar.rows for tar in header.tars)]
        with _refusing(header.where, header.tars), open(header.path, "rb") as file:
            mapped = mapped and os.fstat(file.fileno()).st_size > _SMALL
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
            text = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
            _require(zlib.crc32(text) == header.mark, "it was written again after it was opened")
            start = 8 + len(text)
            data = np.frombuffer(whole, dtype=np.uint8)[start:]
            self._columns = {name: _column(spec, data, start) for name, spec in json.loads(text).items() if name != "__metadata__"}
            self._check_lengths()
            self._tables = {name: Texts(self._columns[f"{name}_table"], self._columns[f"{name}_table_bounds"]) for name in TABLES}
        self._tables["source"] = header.sources

    def _check_lengths(self) -> None:
        rows, members = self._first[-1], len(self._columns["offset"])
        expected = dict.fromkeys(("text_tokens", *FACETS), rows) | dict.fromkeys(("key_bounds", "member_bounds"), rows + 1)
        expected |= dict.fromkeys(MEMBER_COLUMNS, members) | dict.fromkeys(IMAGE_COLUMNS, members - rows)
        for name, length in expected.items():
            _require(len(self._columns[name]) == length, f"{len(self._columns[name])} values of {name}, expected {length}")

    def part(self, number: int) -> Part:
        """Return the samples of one tar. Raises: UserError when what the index says of them cannot be."""
        tar = self.header.tars[number]
        with _refusing(self.header.where, [tar]):
            part = self._part(self._first[number], self._first[number + 1])
            for name, codes in (*part.facets.items(), ("name", part.members["name"])):
                _require(not len(codes) or int(codes.max()) < len(self._tables[name]), f"codes of {name} outside their table")
            _require(int(part.text_tokens.max(initial=0)) < _TOKENS_MAX, "a text of more tokens than can be")
            offset, size = part.members["offset"], part.members["size"]
            _require(not len(size) or int(size.max()) <= tar.bytes, "a member lies outside the tar")
            _require(bool((offset <= tar.bytes - size.astype(np.int64)).all()), "a member lies outside the tar")
            counts = np.bincount(part.facets["source"].astype(np.int64), minlength=len(self.header.sources))
            _require(counts.tolist() == list(self.header.counts[number]), "other counts of sources than its rows")
        return part

    def _part(self, first: int, last: int) -> Part:
        """Cut rows [first, last) out of the columns."""
        columns = self._columns
        bounds = columns["member_bounds"][first : last + 1].astype(np.int64)
        start, stop = int(bounds[0]), int(bounds[-1])
        is_sound = first <= start and stop <= len(columns["offset"]) and stop - last <= len(columns["width"])
        _require(is_sound and bool((np.diff(bounds) > 0).all()), "members out of order")
        keys = columns["key_bounds"][first : last + 1].astype(np.int64)
        return Part(
            Texts(columns["key"][int(keys[0]) : int(keys[-1])], keys - keys[0]),
            bounds - start,
            columns["text_tokens"][first:last],
            {name: columns[name][first:last] for name in FACETS},
            {name: columns[name][start:stop] for name in MEMBER_COLUMNS},
            {name: columns[name][start - first : stop - last] for name in IMAGE_COLUMNS},
            self._tables,
        )


def index_path(tar: Path) -> Path:
    """Return where the index of a shard lies: `NAME.tar` -> `NAME.index.safetensors`."""
    return Path(index_of(str(tar)))


def index_of(tar: str) -> str:
    """Return the path or address of a shard's index; the query of an address goes with it."""
    folder, name, query = parted(tar)
    return f"{folder}{name.removesuffix('.tar')}.index.safetensors{query}"


def fix_of(path: str, tar: str) -> str:
    """Say how the index at `path` that describes `tar`, among others, is written again."""
    folder = os.path.dirname(path)
    if os.path.basename(path) == MERGED:
        return f"run `python tools/merge_shards.py --index-only {folder or '.'}`"
    return f"run `python tools/check_shards.py --reindex {os.path.join(folder, tar)}`"


def read_header(path: str, tar: str, *, where: str = "") -> Header:
    """Read what opening needs. Raises: FileNotFoundError, UserError.

    tar: the file name of a tar that it is wanted for. where: the address that the file was fetched from, if it was.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        text, size = os.read(handle, 2**13), os.fstat(handle).st_size
        length = int.from_bytes(text[:8], "little")
        text = text[8 : 8 + length] if 8 + length <= len(text) else os.pread(handle, min(length, size, _HEADER_MAX), 8)
    finally:
        os.close(handle)
    with _refusing(where or path, [tar]):
        _require(length == len(text) <= _HEADER_MAX, f"a header of {length} bytes in a file of {size}")
        fields = json.loads(json.loads(text)["__metadata__"]["infimed_index"])
        _require(fields["format"] == FORMAT, f"format {fields['format']!r}, expected {FORMAT}")
        layouts = [_layout(layout) for layout in fields["layouts"]]
        tars = tuple(
            Tar(_text(name), _count(rows), _count(size), _text(digest), layouts[number])
            for name, rows, size, digest, number, _ in fields["tars"]
        )
        counts = tuple(tuple(map(_count, entry[-1])) for entry in fields["tars"])
        sources = tuple(map(_text, fields["sources"]))
        _require(all(len(c) == len(sources) and sum(c) == t.rows for c, t in zip(counts, tars, strict=True)), "counts that are no sum")
        return Header(path, where or path, zlib.crc32(text), _text(fields["tokenizer"]), sources, tars, counts)


# --- checks of what an index claims: the file may come from anywhere ---------------------------------------------------


@contextmanager
def _refusing(path: str, tars: Sequence[Tar | str]) -> Iterator[None]:
    """Turn whatever a malformed index leads to into one error that names the fix."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, OSError) as error:
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        tar = next((tar if isinstance(tar, str) else tar.name for tar in tars), "")
        raise UserError(f"{path}: cannot be read as an index ({what}); {fix_of(path, tar)}") from None


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _count(value: object) -> int:
    _require(type(value) is int and 0 <= value < 2**63, f"{value!r} where a count is expected")
    return value


def _text(value: object) -> str:
    _require(type(value) is str, f"{value!r} where a text is expected")
    return value


def _layout(value: object) -> Mapping[str, str] | None:
    return None if value is None else {_text(name): _text(text) for name, text in value.items()}


def _column(spec: Mapping[str, object], data: np.ndarray, start: int) -> np.ndarray:
    """Look at one column of the mapped `data`, which begins at byte `start` of the file."""
    dtype, (length,), (first, last) = _DTYPES[spec["dtype"]], map(_count, spec["shape"]), map(_count, spec["data_offsets"])
    _require(first <= last <= len(data) and last - first == length * dtype.itemsize, "a column outside the file")
    _require((start + first) % dtype.itemsize == 0, "a column that is not aligned")
    return data[first:last].view(dtype)
