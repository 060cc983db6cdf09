"""Writing an index: rows, or parts of other indexes, to columns; equal input gives equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from infimed.data.index import FACETS, FORMAT, IMAGE_COLUMNS, MEMBER_COLUMNS, MERGED, TABLES, Part, Row, Tar, Texts, index_path

_NAMES = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}  # of dtypes, by bytes


def part_of(rows: Sequence[Row]) -> Part:
    """Turn the rows of one tar into columns."""
    members = [member for row in rows for member in row.members]
    texts = {name: [getattr(row, name) for row in rows] for name in FACETS} | {"name": [member.name for member in members]}
    tables = {name: sorted(set(values)) for name, values in texts.items()}
    codes = {name: _codes(values, tables[name]) for name, values in texts.items()}
    sizes = [size for row in rows for size in row.image_sizes]
    images = {"width": [w for w, _ in sizes], "height": [h for _, h in sizes], "image_at": [at for row in rows for at in row.image_at]}
    return Part(
        [row.key for row in rows],
        np.cumsum([0, *(len(row.members) for row in rows)]),
        np.array([row.text_tokens for row in rows], dtype=np.int64),
        {name: codes[name] for name in FACETS},
        {"name": codes["name"]} | {name: np.array([getattr(m, name) for m in members], np.int64) for name in ("offset", "size", "crc32")},
        {name: np.array(values, dtype=np.int64) for name, values in images.items()},
        tables,
    )


def write_index(tar: Path, rows: Sequence[Row], *, sha256: str, size: int, tokenizer: str, layout: Mapping[str, str] | None = None) -> None:
    """Write the index of one tar. A merged index of its folder is removed: it would hide this one.

    tokenizer: fingerprint of the one that counted the text, or empty. layout: as `index.Tar`.
    """
    save_index(index_path(tar), [(Tar(tar.name, len(rows), size, sha256, layout), part_of(rows))], tokenizer=tokenizer)
    (tar.parent / MERGED).unlink(missing_ok=True)


def save_index(path: Path, parts: Sequence[tuple[Tar, Part]], *, tokenizer: str) -> None:
    """Write one index of the given tars, in their order; it appears under its name when it is complete."""
    columns, counts, sources = _joined([part for _, part in parts])
    layouts: list[Mapping[str, str] | None] = []
    tars = []
    for (tar, _), count in zip(parts, counts, strict=True):
        if tar.layout not in layouts:
            layouts.append(tar.layout)
        tars.append([tar.name, tar.rows, tar.bytes, tar.sha256, layouts.index(tar.layout), count])
    header = {"format": FORMAT, "layouts": layouts, "sources": sources, "tars": tars, "tokenizer": tokenizer}
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(b"".join(_file(columns, _json(header))))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _file(columns: Mapping[str, np.ndarray], header: str) -> Iterable[bytes]:
    """Yield a safetensors file: the widest numbers first, so that all are aligned without a gap."""
    specs, end = dict[str, object](), 0
    ordered = sorted(columns.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, column in ordered:
        specs[name] = {"dtype": _NAMES[column.itemsize], "shape": [len(column)], "data_offsets": [end, end + column.nbytes]}
        end += column.nbytes
    text = _json({"__metadata__": {"infimed_index": header}, **specs}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, column in ordered:
        yield column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()


def _joined(parts: Sequence[Part]) -> tuple[dict[str, np.ndarray], list[list[int]], list[str]]:
    """Lay parts end to end: the columns, rows by part and source, and the sources."""
    tables, columns = dict[str, list[str]](), dict[str, np.ndarray]()
    for name in (*FACETS, "name"):
        tables[name], columns[name] = _joined_codes(parts, name)
    columns |= {name: _joined_numbers([part.members[name] for part in parts]) for name in MEMBER_COLUMNS if name != "name"}
    columns |= {name: _joined_numbers([part.images[name] for part in parts]) for name in IMAGE_COLUMNS}
    columns["text_tokens"] = _joined_numbers([part.text_tokens for part in parts])
    columns["member_bounds"] = _narrow(_bounds(np.concatenate([np.diff(part.bounds) for part in parts])))
    columns["key"], columns["key_bounds"] = _texts([part.keys for part in parts])
    for name in TABLES:
        columns[f"{name}_table"], columns[f"{name}_table_bounds"] = _texts([tables[name]])
    ends = np.cumsum([len(part) for part in parts])[:-1]
    counts = [np.bincount(codes, minlength=len(tables["source"])).tolist() for codes in np.split(columns["source"], ends)]
    return columns, counts, tables["source"]


def _joined_codes(parts: Sequence[Part], name: str) -> tuple[list[str], np.ndarray]:
    """Return the sorted texts that any part uses, and their codes in all of them."""
    used = []
    for part in parts:
        codes, back = np.unique(_codes_of(part, name), return_inverse=True)
        used.append(([part.tables[name][code] for code in codes.tolist()], back))
    table = sorted({text for texts, _ in used for text in texts})
    places = {text: place for place, text in enumerate(table)}
    new = [np.array([places[text] for text in texts], dtype=np.int64)[back] for texts, back in used]
    return table, _joined_numbers(new)


def _codes_of(part: Part, name: str) -> np.ndarray:
    return part.members["name"] if name == "name" else part.facets[name]


def _joined_numbers(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return _narrow(np.concatenate(arrays))


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Return the numbers, none negative, in the fewest bytes."""
    most = int(numbers.max(initial=0))
    return numbers.astype(next(dtype for dtype in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(dtype).max))


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _texts(lists: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of all texts of some lists, and the bounds of each."""
    encoded = [texts.encoded() if isinstance(texts, Texts) else _encoded(texts) for texts in lists]
    blob = np.frombuffer(b"".join(blob for blob, _ in encoded), dtype=np.uint8)
    return blob, _narrow(_bounds(np.concatenate([lengths for _, lengths in encoded])))


def _encoded(texts: Sequence[str]) -> tuple[bytes, np.ndarray]:
    blobs = [text.encode(errors="backslashreplace") for text in texts]
    return b"".join(blobs), np.array([len(blob) for blob in blobs], dtype=np.int64)


def _codes(values: Sequence[str], table: Sequence[str]) -> np.ndarray:
    places = {text: place for place, text in enumerate(table)}
    return np.array([places[value] for value in values], dtype=np.int64)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
