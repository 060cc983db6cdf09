"""Records out of JSON, JSON lines, CSV and parquet files, one at a time, with the images they name or hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from infimed.contracts import DataFault, Sample, UserError
from infimed.data.records import Layout, check_deidentified, check_licence, convert, extension_of, images_of, key_of, sample_to_json
from infimed.processing.chat import render
from infimed.processing.dicom import read_image_file
from infimed.processing.tokenizer import Tokenizer

_CHUNK = 2**20  # characters of a JSON list that are looked at together
_FIELD_MAX = 2**28  # characters of a CSV field; Python's own limit is 2 ** 17, less than a long conversation
_ROWS = 64  # of a parquet file, in memory together


def read_records(path: Path) -> Iterator[object]:
    """Yield the records of one file: a JSON list, JSON lines, CSV or TSV with a header, or parquet. Raises: UserError."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from _csv(file, path) if kind in (".csv", ".tsv") else _json(file, path)
    except OSError as error:
        raise UserError(f"input={path}: cannot be read ({error.strerror}); name a file that can") from None
    except UnicodeDecodeError as error:
        raise UserError(f"input={path}: is not UTF-8 ({error.reason} at byte {error.start} of a piece); save it as UTF-8") from None


def load_sample(record: object, *, number: int, folder: Path | None, tokenizer: Tokenizer, layout: Layout) -> tuple[Sample, list[bytes]]:
    """Turn a record into a sample and the bytes of its images, and look whether training could use them.

    number: names a record without a key. folder: where the paths of images begin. Raises: DataFault.
    """
    key = key_of(record, otherwise=f"{number:08d}")
    images = [_load(image, folder) for image in images_of(record)]
    names = [f"{place}.{extension}" for place, (extension, _) in enumerate(images)]
    sample = convert(key, record, images=names, layout=layout)
    check_licence(sample)
    for _, data in images:
        read_image_file(data)
        check_deidentified(data)
    render(sample.messages, tokenizer, visual_tokens=[1] * len(images))
    sample_to_json(sample)
    return sample, [data for _, data in images]


def _load(image: object, folder: Path | None) -> tuple[str, bytes]:
    """Return the extension and the bytes of an image: a path, bytes, or the {bytes, path} of Hugging Face's tables."""
    name = image.get("path") if isinstance(image, Mapping) else image
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(data, bytes):
        return extension_of(data), data
    if folder is None:
        raise DataFault("missing_image", f"{name!r} is a path; say with --images in which folder it begins")
    root = folder.resolve()
    try:
        path = (root / name).resolve() if isinstance(name, str) else root
        data = path.read_bytes() if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError) as error:  # too long, with a zero or a lone surrogate in it, or not ours to read
        raise DataFault("missing_image", f"{name[:80]!r} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if data is None:
        raise DataFault("missing_image", f"{name!r} is no file inside {folder}, links followed")
    extension = path.suffix.lstrip(".").lower()
    return extension if extension.isalnum() and extension.isascii() else extension_of(data), data


def _json(file: TextIO, path: Path) -> Iterator[object]:
    """Yield from a list, or from lines."""
    while (first := file.read(1)).isspace():
        pass
    if first == "[":
        yield from _json_list(file, path)
        return
    for number, line in enumerate(_lines(first, file), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"input={path}: line {number} is not JSON ({error}); expected one record a line, or a list of records"
            ) from None


def _lines(first: str, file: TextIO) -> Iterator[str]:
    """Put back the character that was looked at."""
    yield first + file.readline()
    yield from file


def _json_list(file: TextIO, path: Path) -> Iterator[object]:
    """Yield the items of a list without holding it."""
    decoder, text, wanted, number = json.JSONDecoder(), "", _CHUNK, 0
    more = True
    while True:
        text = text.lstrip()
        try:
            if text[:1] == "]":
                break
            item, end = decoder.raw_decode(text)
            after = text[end:].lstrip()
            if after[:1] not in (",", "]"):
                raise ValueError(f"expected , or ] after record {number}")
            yield item
            text, wanted, number = after[1:] if after[0] == "," else after, _CHUNK, number + 1
        except (ValueError, RecursionError) as error:
            if not more:
                raise UserError(f"input={path}: record {number} is not JSON ({error}); expected a list of records") from None
            read = file.read(wanted)
            text, wanted, more = text + read, 2 * wanted, bool(read)
    if (text[1:] + file.read(_CHUNK)).strip():
        raise UserError(f"input={path}: something follows the list of {number} records; expected nothing")


def _csv(file: TextIO, path: Path) -> Iterator[object]:
    """Yield the rows of a table with a header."""
    csv.field_size_limit(_FIELD_MAX)
    rows = csv.DictReader(file, dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel", strict=True)
    try:
        header = rows.fieldnames or []
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"input={path}: columns that come twice: {', '.join(twice)}; rename one of each")
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"input={path}: line {rows.line_num} has not as many values as the header; quote values that hold commas")
            yield row
    except csv.Error as error:
        raise UserError(f"input={path}: line {rows.line_num} is not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[object]:
    """Yield the rows of a parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"input={path}: reading parquet needs pyarrow; run pip install 'infimed[tables]'") from None
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"input={path}: is not a sound parquet file ({error})") from None
