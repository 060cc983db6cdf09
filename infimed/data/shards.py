"""Shards: a WebDataset tar and, beside it, an index that lets any sample be read by offset.

Layout: `<key>.json` (a Sample minus its key and pixels), then `<key>.0.jpg`, `<key>.1.png`, ... next to each other.
`NAME.index.json` repeats offsets, sizes, CRCs and the metadata that planning needs, so that no pixel is read to make a plan.
A member's name is only ever a key of a dictionary, never a path.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from infimed.contracts import IMAGE_PLACEHOLDER, DataFault, Sample, UserError
from infimed.data.index import (
    Index,
    Member,
    Row,
    describe,
    index_path,
    read_index,
    sample_from_json,
    sample_to_json,
    sha256_of,
    write_index,
)
from infimed.processing.chat import count_tokens
from infimed.processing.dicom import read_image_file
from infimed.processing.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_KEY_MAX = 80  # a plain ustar name holds 100 bytes
_IMAGE_NAME = re.compile(r"[0-9]+\.[A-Za-z0-9]+")
_OPEN_FILES = 64


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[tuple[Sample, Sequence[bytes]]],
    out: Path,
    *,
    prefix: str = "shard",
    max_samples: int = 1000,
    tokenizer: Tokenizer,
) -> list[Path]:
    """Write samples and their encoded images as `out/prefix-000000.tar`, ... with an index each; equal input gives equal bytes.

    Raises: UserError when `out` already holds such shards, or for a key that is bad or comes twice; DataFault for a sample whose
    placeholders and images disagree or whose text cannot be rendered.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if stale := sorted(out.glob(f"{prefix}-*.tar")):
        raise UserError(f"out={out} already holds {len(stale)} {prefix}-*.tar (first: {stale[0].name}); remove them or name another folder")
    paths: list[Path] = []
    keys: set[str] = set()
    chunk: list[tuple[Sample, Sequence[bytes]]] = []
    for sample, images in samples:
        _check_writable(sample, images, keys)
        chunk.append((sample, images))
        if len(chunk) == max_samples:
            paths.append(_write_shard(chunk, out / f"{prefix}-{len(paths):06d}.tar", tokenizer))
            chunk = []
    if chunk:
        paths.append(_write_shard(chunk, out / f"{prefix}-{len(paths):06d}.tar", tokenizer))
    return paths


def _check_writable(sample: Sample, images: Sequence[bytes], keys: set[str]) -> None:
    """Refuse what a reader of the shard could not make sense of."""
    if not _KEY.fullmatch(sample.key) or len(sample.key) > _KEY_MAX:
        raise UserError(
            f"key={sample.key!r}: expected letters, digits, '_', '-' and single '/', at most {_KEY_MAX}; a dot would end the key"
        )
    if sample.key in keys:
        raise UserError(f"key={sample.key!r} comes twice; every sample needs its own key")
    keys.add(sample.key)
    if len(sample.images) != len(images):
        raise UserError(f"{sample.key}: images={sample.images} names {len(sample.images)} members, but {len(images)} images were given")
    for number, name in enumerate(sample.images):
        if not _IMAGE_NAME.fullmatch(name) or name.split(".")[0] != str(number):
            raise UserError(f"{sample.key}: image member {name!r}: expected {number}.EXTENSION, such as {number}.jpg")
    placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in sample.messages)
    if placeholders != len(images):
        raise DataFault("image_mismatch", f"{sample.key}: {placeholders} placeholders, {len(images)} images")
    sample_from_json(sample.key, sample_to_json(sample))


def _write_shard(chunk: Sequence[tuple[Sample, Sequence[bytes]]], path: Path, tokenizer: Tokenizer) -> Path:
    """Write one tar and its index; each appears under its name only when it is complete."""
    rows = []
    part = path.with_suffix(".tar.part")
    try:
        with part.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, images in chunk:
                blobs = (sample_to_json(sample), *images)
                members = tuple(_add(tar, sample.key, name, blob) for name, blob in zip(("json", *sample.images), blobs, strict=True))
                rows.append(describe(path, sample, members, images, tokenizer))
        write_index(path, rows, tar_bytes=part.stat().st_size, sha256=sha256_of(part), tokenizer=tokenizer)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _add(tar: tarfile.TarFile, key: str, name: str, blob: bytes) -> Member:
    """Append one member (time 0, no owner) and say where its bytes went."""
    info = tarfile.TarInfo(f"{key}.{name}")
    info.size = len(blob)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, BytesIO(blob))
    return Member(name, offset, len(blob), zlib.crc32(blob))


# --- reading ---------------------------------------------------------------------------------------------------------


class ShardSet:
    """Open shards: `rows` to plan with, `read` to fetch a sample by offset. Safe to fork and to pickle."""

    def __init__(self, rows: Sequence[Row], indexes: Mapping[str, Index]) -> None:
        """`indexes`: the index of each tar by its path, for its digest and its tokenizer."""
        self.rows = tuple(rows)
        self._indexes = dict(indexes)
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getstate__(self) -> dict[str, object]:
        """Leave the open files behind."""
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def sources(self) -> tuple[str, ...]:
        """Name every source, sorted."""
        return tuple(sorted({row.source for row in self.rows}))

    @property
    def fingerprint(self) -> str:
        """Identify the rows and the bytes behind them, wherever the files lie."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(f"{self._indexes[row.shard].tar_sha256} {row.key}\n".encode())
        return digest.hexdigest()[:16]

    def read(self, index: int) -> tuple[Sample, tuple[bytes, ...]]:
        """Return sample `index` and its encoded images. Raises: DataFault truncated, checksum or schema."""
        row = self.rows[index]
        record, *images = (self._member(row, member) for member in row.members)
        sample = sample_from_json(row.key, record)
        names = tuple(member.name for member in row.members[1:])
        if sample.images and sample.images != names:
            raise DataFault("schema", f"{row.key}: the JSON names {sample.images}, the tar holds {names}")
        if sample.source != row.source:
            raise DataFault("schema", f"{row.key}: source {sample.source!r}, the index says {row.source!r}")
        return replace(sample, images=names), tuple(images)

    def _member(self, row: Row, member: Member) -> bytes:
        if row.shard not in self._files:
            self._files[row.shard] = open(row.shard, "rb")  # noqa: SIM115
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        data = os.pread(self._files[row.shard].fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise DataFault("truncated", f"{row.key}.{member.name}: {len(data)} of {member.size} bytes")
        if zlib.crc32(data) != member.crc32:
            raise DataFault("checksum", f"{row.key}.{member.name}: CRC32 differs from the index")
        return data

    def subset(self, indices: Sequence[int]) -> ShardSet:
        """Return the same shards with only these rows."""
        return ShardSet([self.rows[index] for index in indices], self._indexes)

    def counted_with(self, tokenizer: Tokenizer) -> ShardSet:
        """Return rows whose `text_tokens` hold for this tokenizer; text of shards indexed with another one is counted again in memory."""
        stale = {shard for shard, index in self._indexes.items() if index.tokenizer != tokenizer.fingerprint}
        if not stale:
            return self
        log.info("counting the text of %d shards again: indexed with another tokenizer than %s", len(stale), tokenizer.fingerprint)
        rows = [replace(row, text_tokens=self._recount(i, tokenizer)) if row.shard in stale else row for i, row in enumerate(self.rows)]
        return ShardSet(rows, {shard: replace(index, tokenizer=tokenizer.fingerprint) for shard, index in self._indexes.items()})

    def _recount(self, index: int, tokenizer: Tokenizer) -> int:
        row = self.rows[index]
        try:
            return count_tokens(sample_from_json(row.key, self._member(row, row.members[0])).messages, tokenizer)
        except DataFault:  # counted and quarantined when the sample's turn comes
            return row.text_tokens


def open_shards(paths: Sequence[str | Path]) -> ShardSet:
    """Open shards named by files, folders or globs. Raises: UserError with every problem of every path."""
    problems: list[str] = []
    indexes: dict[str, Index] = {}
    for tar in find_tars(paths, problems):
        try:
            indexes[str(tar)] = read_index(tar)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return ShardSet([row for index in indexes.values() for row in index.rows], indexes)


def find_tars(paths: Sequence[str | Path], problems: list[str]) -> list[Path]:
    """List the tars behind files, folders and globs, each once, in a fixed order; what is missing goes to `problems`."""
    tars: dict[Path, None] = {}
    for path in map(str, paths):
        found = sorted(Path(path).glob("*.tar")) if os.path.isdir(path) else sorted(map(Path, glob.glob(path)))
        if not found and os.path.isfile(path):  # a real name that happens to hold glob characters
            found = [Path(path)]
        if not found:
            problems.append(
                f"shards={path}: no such .tar file, nor a folder or pattern that holds any; write some with tools/make_shards.py"
            )
        tars |= dict.fromkeys(found)
    return list(tars)


# --- indexing and checking -------------------------------------------------------------------------------------------


def reindex(tar: Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """Write the index of any WebDataset tar of this layout; without a tokenizer its text is counted when it is opened.

    Raises: UserError that lists every sample that cannot be indexed, and a tar that ends early.
    """
    problems: list[str] = []
    rows = [row for key, parts in _groups(tar, problems) if (row := _index_sample(tar, key, parts, tokenizer, problems))]
    if problems:
        raise UserError("\n".join(problems))
    write_index(tar, rows, tar_bytes=tar.stat().st_size, sha256=sha256_of(tar), tokenizer=tokenizer)
    return index_path(tar)


def _index_sample(tar: Path, key: str, parts: dict[Member, bytes], tokenizer: Tokenizer | None, problems: list[str]) -> Row | None:
    members = sorted(parts, key=lambda m: (m.name != "json", int(m.name.split(".")[0]) if _IMAGE_NAME.fullmatch(m.name) else -1))
    if not members or members[0].name != "json" or any(not _IMAGE_NAME.fullmatch(m.name) for m in members[1:]):
        problems.append(f"{tar}: {key}: expected one .json and images named .0.jpg, .1.png, ...; found {[m.name for m in members]}")
        return None
    try:
        sample = sample_from_json(key, parts[members[0]])
        return describe(tar, sample, tuple(members), [parts[m] for m in members[1:]], tokenizer)
    except DataFault as fault:
        problems.append(f"{tar}: {fault}")
        return None


def _groups(tar: Path, problems: list[str]) -> Iterator[tuple[str, dict[Member, bytes]]]:
    """Yield each sample's members as they lie in the tar; a key that comes back and a tar that ends early go to `problems`."""
    seen: set[str] = set()
    key, parts = "", dict[Member, bytes]()
    try:
        with tarfile.open(tar, "r:") as archive:
            end = 0
            for info in archive:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if info.isreg() else end
                folder, _, name = info.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not info.isreg() or not dot:
                    continue
                found = f"{folder}/{stem}" if folder else stem
                if found != key:
                    if parts:
                        yield key, parts
                    if found in seen:
                        problems.append(f"{tar}: key {found!r} comes back after other samples; members of a sample must be adjacent")
                    seen.add(found)
                    key, parts = found, {}
                data = archive.extractfile(info).read()
                parts[Member(suffix, info.offset_data, len(data), zlib.crc32(data))] = data
            if parts:
                yield key, parts
        with tar.open("rb") as file:
            if len(os.pread(file.fileno(), tarfile.BLOCKSIZE, end)) < tarfile.BLOCKSIZE:
                problems.append(f"{tar}: ends early: no end mark after byte {end}")
    except (tarfile.TarError, EOFError) as error:
        problems.append(f"{tar}: ends early or is not a tar ({error})")


def verify(path: str | Path) -> list[str]:
    """Return every problem of one shard: index against tar, digest, each sample's checksums, schema and placeholders; none means sound."""
    tar = Path(path)
    try:
        shards = open_shards([tar])
    except UserError as error:
        return str(error).splitlines()
    problems: list[str] = []
    layout = [(key, set(parts)) for key, parts in _groups(tar, problems)]
    if layout != [(row.key, set(row.members)) for row in shards.rows]:
        problems.append(f"{tar}: the index lists other members than the tar holds; run `python tools/check_shards.py --reindex {tar}`")
    if sha256_of(tar) != shards._indexes[str(tar)].tar_sha256:
        problems.append(f"{tar}: sha256 differs from the index")
    for number, row in enumerate(shards.rows):
        try:
            sample, images = shards.read(number)
            for image in images:
                read_image_file(image)
            placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in sample.messages)
            if placeholders != len(images):
                problems.append(f"{tar}: image_mismatch: {row.key}: {placeholders} placeholders, {len(images)} images")
        except DataFault as fault:
            problems.append(f"{tar}: {fault}")
    return problems
