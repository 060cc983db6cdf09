"""Looking at tars from the outside: index any WebDataset, and check a shard against its index."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from infimed.contracts import IMAGE_PLACEHOLDER, DataFault, Sample, UserError
from infimed.data.index import FACETS, MERGED, Columns, Member, Row, fix_of, index_path
from infimed.data.index_writer import write_index
from infimed.data.records import (
    IMAGE_EXTENSIONS,
    Layout,
    check_deidentified,
    check_licence,
    ignored,
    is_convertible,
    parse_json,
    read_member,
    sample_from_json,
)
from infimed.data.shard_open import Shard, open_all, read_own_header
from infimed.data.shard_writer import IMAGE_NAME, describe, size_of
from infimed.data.store import Store
from infimed.processing.dicom import read_image_file
from infimed.processing.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"([0-9]{1,9})\.")

Parts = dict[Member, bytes]


def reindex(tar: Path, *, tokenizer: Tokenizer | None = None, defaults: Layout | None = None) -> Path:
    """Write the index of any WebDataset tar; without a tokenizer its text is counted when it is opened.

    A tar whose first sample is in our own layout is read strictly, unless there are defaults. Of others a sample needs a `.json` with a
    conversation, or a `.txt` caption; images may have any name, and what is neither is left out.
    defaults: what records of others do not say, see `records.Layout`.
    Raises: UserError that lists every sample that cannot be indexed, and a tar that ends early.
    """
    problems, rows, layout, unread = list[str](), list[Row](), defaults, Counter[str]()
    for number, (key, parts) in enumerate(walk(tar, problems)):
        if number == 0 and layout is None and not _is_ours(key, parts):
            layout = {}
        try:
            members = _choose(key, parts, layout)
            sample = _read(key, members, parts, layout)
            if layout is not None:
                check_licence(sample)
                _check_foreign(sample, [parts[member] for member in members[1:]])
                unread.update(ignored(parse_json(key, parts[members[0]])) if members[0].name.lower() == "json" else ())
            rows.append(describe(sample, members, [parts[member] for member in members[1:]], tokenizer))
        except DataFault as fault:
            problems.append(f"{tar}: {fault}")
    if problems:
        raise UserError("\n".join(problems))
    if unread:
        log.warning("%s: fields that were not read: %s", tar, ", ".join(f"{name} ({count})" for name, count in unread.most_common()))
    fingerprint = tokenizer.fingerprint if tokenizer else ""
    write_index(tar, rows, sha256=sha256_of(tar), size=tar.stat().st_size, tokenizer=fingerprint, layout=layout)
    return index_path(tar)


def verify(path: str | Path) -> list[str]:
    """Return every problem of one shard: index against tar, digest, each sample's checksums, schema and pictures; none means sound."""
    tar = Path(path)
    try:
        (shard,) = open_all([tar], Store())
        part = Columns(shard.header).part(shard.slot)
        rows = [part.row(number, str(tar)) for number in range(len(part))]
        problems = _other_index(tar, shard, rows)
    except UserError as error:
        return str(error).splitlines()
    complete = len(problems)
    keys, by_key = [], {row.key: row for row in rows}
    for key, parts in walk(tar, problems):
        keys.append(key)
        if key in by_key:
            problems += [f"{tar}: {problem}" for problem in _sample_problems(by_key[key], parts, shard.tar.layout)]
    if len(problems) == complete and keys != [row.key for row in rows]:
        fix = fix_of(str(index_path(tar)), tar.name)
        problems.append(f"{tar}: the index lists other samples than the tar holds; {fix}")
    if sha256_of(tar) != shard.tar.sha256:
        problems.append(f"{tar}: sha256 differs from the index")
    return problems


def walk(tar: Path, problems: list[str]) -> Iterator[tuple[str, Parts]]:
    """Yield each sample's members as they lie in the tar; a key that comes back and a tar that ends early go to `problems`.

    Names are cut at the first dot after the last slash, as the webdataset library does; what has no such dot, or a name that begins with
    it, belongs to no sample.
    """
    seen: set[str] = set()
    key, parts, noted = "", Parts(), 0
    for found, member, data in _members(tar, problems):
        if found != key:
            if parts:
                yield key, parts
            if found in seen:
                problems.append(f"{tar}: key {found!r} comes back after other samples; members of a sample must be adjacent")
            seen.add(found)
            key, parts = found, Parts()
        if any(member.name == other.name for other in parts):
            problems.append(f"{tar}: {found}.{member.name} comes twice")
        parts[member], noted = data, len(problems)
    if parts and len(problems) == noted:  # else the tar ends inside this sample
        yield key, parts


def sha256_of(path: Path) -> str:
    """Digest a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(tar: Path, problems: list[str]) -> Iterator[tuple[str, Member, bytes]]:
    """Yield (key, member, bytes) of what can belong to a sample, in the order of the tar."""
    end, size = 0, tar.stat().st_size
    try:
        with tarfile.open(tar, "r:", tarinfo=_within(size)) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # it would keep every header
                _check_size(info, size)  # again: an extended header may have set another
                end = archive.offset  # where the next one begins
                folder, slash, name = info.name.encode(errors="backslashreplace").decode().rpartition("/")  # as the index spells it
                stem, dot, suffix = name.partition(".")
                if not info.isreg() or not dot or not stem:
                    continue
                if info.issparse():
                    problems.append(f"{tar}: {info.name} is a sparse member; pack the tar again without --sparse")
                    continue
                data = archive.extractfile(info).read()
                yield f"{folder}{slash}{stem}", Member(suffix, info.offset_data, len(data), zlib.crc32(data)), data
        problems += _problems_behind(tar, end)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # tarfile reads numbers of headers as they come
        problems.append(f"{tar}: ends early, is damaged or is no uncompressed tar ({error}); copy it again")


def _within(size: int) -> type[tarfile.TarInfo]:
    """Return what reads the headers of a tar of `size` bytes, so that no claim of one asks for more memory than the tar could fill."""

    class Bounded(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
            info = super().frombuf(buf, encoding, errors)
            _check_size(info, size)
            return info

    return Bounded


def _check_size(info: tarfile.TarInfo, size: int) -> None:
    """Refuse a member that cannot lie in a tar of `size` bytes; a negative one would be read for ever. Raises: tarfile.ReadError."""
    if info.size < 0 or (info.size > size and not info.issparse()):
        raise tarfile.ReadError(f"a member of {info.size} bytes in a tar of {size}")


def _problems_behind(tar: Path, end: int) -> list[str]:
    """Look at what follows the last member, where tarfile stops without a word: an end mark is expected, and no second tar behind it."""
    with tar.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            return [f"{tar}: ends early: no end mark after byte {end}; copy it again"]
        if any(block):
            return [f"{tar}: neither a member nor the end mark at byte {end}: the tar is damaged there, or something follows it"]
        while block and not any(block):
            block = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # nothing, or nothing that was meant to be read
        return []
    return [f"{tar}: a second tar follows the end mark at byte {end}; keep them apart, or pack their members into one"]


def _is_ours(key: str, parts: Parts) -> bool:
    """Say whether a sample is in our own layout."""
    try:
        sample_from_json(key, parts[_choose(key, parts, None)[0]])
    except DataFault:
        return False
    return True


def _choose(key: str, parts: Parts, layout: Layout | None) -> tuple[Member, ...]:
    """Return the members that count: the record, then the images in order."""
    named = {member.name.lower(): member for member in parts}
    if layout is None:
        images = [member for member in parts if IMAGE_NAME.fullmatch(member.name)]
        if "json" not in named or len(images) + 1 != len(parts):
            names = [member.name for member in parts]
            hint = "a tar of another make is read with --source or --licence"
            raise DataFault("schema", f"{key}: expected one .json and images named .0.jpg, .1.png, ...; found {names}; {hint}")
        return (named["json"], *sorted(images, key=_number))
    record = named.get("json")
    if record is None or not is_convertible(parse_json(key, parts[record])):
        record = named.get("txt", record)
    if record is None:
        raise DataFault("schema", f"{key}: neither a .json with a conversation nor a .txt caption among {[m.name for m in parts]}")
    images = [member for member in parts if member.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    return (record, *sorted(images, key=_number))


def _number(member: Member) -> int:
    """Return the number that an image's name begins with; those without one come first, as they lie."""
    found = _NUMBERED.match(member.name)
    return int(found[1]) if found else -1


def _read(key: str, members: tuple[Member, ...], parts: Parts, layout: Layout | None) -> Sample:
    names = tuple(member.name for member in members)
    return read_member(key, names[0], parts[members[0]], images=names[1:], layout=layout)


def _check_foreign(sample: Sample, images: list[bytes]) -> None:
    """Refuse what `write_shards` and its tool would refuse."""
    for image in images:
        check_deidentified(image)
    if problem := _mismatch(sample):
        raise DataFault("image_mismatch", problem)


def _mismatch(sample: Sample) -> str:
    placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in sample.messages)
    return "" if placeholders == len(sample.images) else f"{sample.key}: {placeholders} placeholders, {len(sample.images)} images"


def _other_index(tar: Path, shard: Shard, rows: list[Row]) -> list[str]:
    """Compare the folder's merged index with the one beside the tar, where there are both."""
    if os.path.basename(shard.header.path) != MERGED or not index_path(tar).exists():
        return []
    own = read_own_header(str(tar), Store())
    part = Columns(own).part(0)
    is_same = own.tars[0] == shard.tar and [part.row(number, str(tar)) for number in range(len(part))] == rows
    return [] if is_same else [f"{tar}: its own index and {MERGED} differ; {fix_of(shard.header.where, tar.name)}"]


def _sample_problems(row: Row, parts: Parts, layout: Layout | None) -> list[str]:
    """Compare what the index says of a sample with its members."""
    there = {member.name: member for member in parts}
    problems = []
    for member in row.members:
        found = there.get(member.name)
        if found is None or (found.offset, found.size) != (member.offset, member.size):
            return [
                f"{row.key}: the index lists other members than the tar holds; run `python tools/check_shards.py --reindex {row.shard}`"
            ]
        if found.crc32 != member.crc32:
            problems.append(f"checksum: {row.key}.{member.name}: CRC32 differs from the index")
    try:
        members = tuple(there[member.name] for member in row.members)
        sample, images = _read(row.key, members, parts, layout), [parts[member] for member in members[1:]]
        if problem := _mismatch(sample):
            problems.append(f"image_mismatch: {problem}")
        problems += [f"schema: {row.key}: {f} is not that of the index" for f in FACETS if getattr(sample, f) != getattr(row, f)]
        for image, size in zip(images, row.image_sizes, strict=True):
            read_image_file(image)
            if size_of(image) != size:
                problems.append(f"schema: {row.key}: a picture is not {size[0]} x {size[1]} pixels, as the index says")
    except DataFault as fault:
        problems.append(str(fault))
    return problems
