"""Writing shards: plain ustar tars without owner or time, so that equal samples are equal bytes, and their indexes."""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from infimed.contracts import IMAGE_PLACEHOLDER, DataFault, Sample, UserError
from infimed.data.index import FACETS, Member, Row, index_path
from infimed.data.index_writer import write_index
from infimed.data.records import sample_from_json, sample_to_json
from infimed.processing.chat import TextSize, measure_text
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.image import image_size
from infimed.processing.tokenizer import Tokenizer

IMAGE_NAME = re.compile(r"[0-9]{1,9}\.[A-Za-z0-9]+")

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_KEY_MAX = 80  # a plain ustar name holds 100 bytes


def write_shards(
    samples: Iterable[tuple[Sample, Sequence[bytes]]],
    out: Path,
    *,
    prefix: str = "shard",
    max_samples: int = 1000,
    tokenizer: Tokenizer,
) -> list[Path]:
    """Write samples and their encoded images as `out/prefix-000000.tar`, ... with an index each; equal input gives equal bytes.

    One sample at a time is in memory, and after an error nothing stays.
    Raises: UserError when `out` already holds such shards, or for a key that is bad or comes twice; DataFault for a sample whose
    placeholders and images disagree or whose text cannot be rendered.
    """
    writer = ShardWriter(out, prefix=prefix, max_samples=max_samples, tokenizer=tokenizer.fingerprint)
    keys: set[str] = set()
    with writer:
        for sample, images in samples:
            _check_writable(sample, images, keys)
            members = writer.add(sample.key, zip(("json", *sample.images), (sample_to_json(sample), *images), strict=True), layout=None)
            writer.note(describe(sample, members, images, tokenizer))
    return writer.paths


class ShardWriter:
    """Writes members and rows into tar after tar; each appears under its name, with its index, when it is complete."""

    def __init__(self, out: Path, *, prefix: str, max_samples: int, tokenizer: str) -> None:
        """Make the folder. `tokenizer`: fingerprint of the one that counts the text. Raises: UserError when it holds such shards."""
        if max_samples < 1:
            raise UserError(f"max_samples={max_samples}: expected at least 1")
        if not _PREFIX.fullmatch(prefix):
            raise UserError(f"prefix={prefix!r}: expected letters, digits, '.', '_' and '-', as it begins the name of a file")
        self._out, self._prefix, self._max_samples, self._tokenizer = Path(out), prefix, max_samples, tokenizer
        self._out.mkdir(parents=True, exist_ok=True)
        if stale := sorted(self._out.glob(f"{prefix}-*.tar")):
            raise UserError(
                f"out={out} already holds {len(stale)} {prefix}-*.tar (first: {stale[0].name}); remove them or name another folder"
            )
        self.paths: list[Path] = []
        self._tar: _TarWriter | None = None
        self._rows: list[Row] = []
        self._layout: Mapping[str, str] | None = None

    def add(self, key: str, members: Iterable[tuple[str, bytes]], *, layout: Mapping[str, str] | None) -> tuple[Member, ...]:
        """Write the members of a sample; a tar holds one layout, see `index.Tar`."""
        if self._tar is not None and (len(self._rows) == self._max_samples or layout != self._layout):
            self._finish()
        if self._tar is None:
            self._tar, self._layout = _TarWriter(self._out / f"{self._prefix}-{len(self.paths):06d}.tar"), layout
        return tuple([self._tar.add(key, name, data) for name, data in members])

    def note(self, row: Row) -> None:
        """Take the row of the sample that was added last."""
        self._rows.append(row)

    def __enter__(self) -> ShardWriter:
        """Begin."""
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Complete the last tar, or leave nothing at all after an error."""
        if self._tar is not None and kind is None:
            self._finish()
        elif kind is not None:
            if self._tar is not None:
                self._tar.drop()
            while self.paths:
                path = self.paths.pop()
                path.unlink()
                index_path(path).unlink()

    def _finish(self) -> None:
        tar, self._tar = self._tar, None
        try:
            size, sha256 = tar.close()
            write_index(tar.path, self._rows, sha256=sha256, size=size, tokenizer=self._tokenizer, layout=self._layout)
            tar.part.replace(tar.path)
        finally:
            tar.drop()
        self.paths.append(tar.path)
        self._rows = []


class _TarWriter:
    """A tar under a temporary name, digested while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_suffix(".tar.part")
        self._file, self._digest, self._end = self.part.open("wb"), hashlib.sha256(), 0

    def add(self, key: str, name: str, data: bytes) -> Member:
        """Append one member and say where its bytes went."""
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(data)
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))  # plain ustar, unless a name is long or not ASCII
        member = Member(name, self._end, len(data), zlib.crc32(data))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return member

    def close(self) -> tuple[int, str]:
        """Write the end mark; return bytes and SHA-256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._end % tarfile.RECORDSIZE))
        self._file.close()
        return self._end, self._digest.hexdigest()

    def drop(self) -> None:
        """Leave nothing under the temporary name."""
        with suppress(OSError):  # a full disk says so again when what is left in memory is written
            self._file.close()
        self.part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)


def describe(sample: Sample, members: tuple[Member, ...], images: Sequence[bytes], tokenizer: Tokenizer | None) -> Row:
    """Describe a sample for the index; without a tokenizer the text is counted when the shard is opened."""
    text = measure_text(sample.messages, tokenizer) if tokenizer is not None else TextSize(0, (0,) * len(images))
    facets = {name: getattr(sample, name) for name in FACETS}
    try:
        "".join(facets.values()).encode()
    except UnicodeEncodeError as error:
        raise DataFault("invalid_text", f"{sample.key}: a facet is not valid Unicode: {error.reason}") from None
    return Row("", sample.key, members, text.tokens, tuple(map(size_of, images)), text.image_at, **facets)


def size_of(image: bytes) -> tuple[int, int]:
    """Return (width, height) of a picture; (0, 0) for one that will be quarantined when it is read."""
    try:
        if is_dicom(image):
            height, width = read_image_file(image).shape[-2:]
            return int(width), int(height)
        return image_size(image)
    except DataFault:
        return 0, 0


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
        if not IMAGE_NAME.fullmatch(name) or name.split(".")[0] != str(number):
            raise UserError(f"{sample.key}: image member {name!r}: expected {number}.EXTENSION, such as {number}.jpg")
    placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in sample.messages)
    if placeholders != len(images):
        raise DataFault("image_mismatch", f"{sample.key}: {placeholders} placeholders, {len(images)} images")
    sample_from_json(sample.key, sample_to_json(sample))
