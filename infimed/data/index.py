"""The index beside a shard: where each sample's bytes lie and the metadata that planning needs, so that no pixel is read to make a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

from infimed.contracts import AnswerType, DataFault, Message, Role, Sample, UserError
from infimed.processing.chat import count_tokens
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.image import image_size
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

FORMAT = 1
FACETS = ("source", "task", "answer_type", "modality", "organ", "patient", "domain")
"""The Sample fields that the index repeats and that rows can be selected by."""

_TEXT_FIELDS = tuple(f.name for f in fields(Sample) if f.name not in ("key", "messages", "images", "choices"))


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
    members: tuple[Member, ...]  # the JSON first, then the images in order
    text_tokens: int  # length with no visual token at all
    image_sizes: tuple[tuple[int, int], ...]  # (width, height); (0, 0) where the header could not be read
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
class Index:
    """What the index file of one tar says."""

    rows: tuple[Row, ...]
    tar_sha256: str
    tokenizer: str  # fingerprint of the tokenizer that counted the text; empty when it was not counted


def sample_to_json(sample: Sample) -> bytes:
    """Write a sample as the JSON member of a shard (sorted keys, so that equal samples are equal bytes)."""
    record = asdict(sample)
    del record["key"]
    return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()


def sample_from_json(key: str, data: bytes) -> Sample:
    """Read the JSON member of a shard. Raises: DataFault("schema") that lists everything wrong with it."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataFault("schema", f"{key}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataFault("schema", f"{key}: expected an object, got {type(record).__name__}")
    problems = _schema_problems(record)
    if problems:
        raise DataFault("schema", f"{key}: " + "; ".join(problems))
    messages = tuple(Message(role=m["role"], text=m["text"]) for m in record.pop("messages"))
    lists = {name: tuple(record.pop(name, ())) for name in ("images", "choices")}
    return Sample(key=key, messages=messages, **lists, **record)


def _schema_problems(record: dict[str, object]) -> list[str]:
    """Name every field that is not what a Sample holds."""
    problems = [f"unknown field {name!r}" for name in sorted(record.keys() - {"messages", "images", "choices", *_TEXT_FIELDS})]
    problems += [f"{name} is not text" for name in _TEXT_FIELDS if not isinstance(record.get(name, ""), str)]
    for name in ("images", "choices"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f"{name} is not a list of texts")
    if record.get("answer_type", "open") not in get_args(AnswerType):
        problems.append(f"answer_type {record['answer_type']!r} is none of {', '.join(get_args(AnswerType))}")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return [*problems, "messages is not a list with at least one turn"]
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.keys() != {"role", "text"} or not isinstance(turn["text"], str):
            problems.append(f"messages[{number}] is not {{role, text}}")
        elif turn["role"] not in get_args(Role):
            problems.append(f"messages[{number}].role {turn['role']!r} is none of {', '.join(get_args(Role))}")
    return problems


def index_path(tar: Path) -> Path:
    """Return where the index of a shard lies: `NAME.tar` -> `NAME.index.json`."""
    return tar.with_suffix(".index.json")


def describe(path: Path, sample: Sample, members: tuple[Member, ...], images: Sequence[bytes], tokenizer: Tokenizer | None) -> Row:
    """Describe a sample for the index; without a tokenizer the text is counted when the shard is opened."""
    tokens = count_tokens(sample.messages, tokenizer) if tokenizer is not None else 0
    facets = {name: getattr(sample, name) for name in FACETS}
    return Row(str(path), sample.key, members, tokens, tuple(_size(image) for image in images), **facets)


def _size(image: bytes) -> tuple[int, int]:
    """Return (width, height); (0, 0) for an image that will be quarantined when it is read."""
    try:
        if is_dicom(image):
            height, width = read_image_file(image).shape[-2:]
            return int(width), int(height)
        return image_size(image)
    except DataFault:
        return 0, 0


def sha256_of(path: Path) -> str:
    """Digest a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(tar: Path, rows: Sequence[Row], *, tar_bytes: int, sha256: str, tokenizer: Tokenizer | None) -> None:
    """Write the index, one sample a line."""
    header = {"format": FORMAT, "tar_bytes": tar_bytes, "tar_sha256": sha256, "tokenizer": tokenizer.fingerprint if tokenizer else ""}
    lines = []
    for row in rows:
        record = {name: getattr(row, name) for name in ("key", "text_tokens", "image_sizes", *FACETS)}
        record["members"] = [[m.name, m.offset, m.size, m.crc32] for m in row.members]
        lines.append(json.dumps(record, sort_keys=True, ensure_ascii=False))
    text = f'{{"header": {json.dumps(header, sort_keys=True)}, "samples": [\n' + ",\n".join(lines) + "\n]}\n"
    part = index_path(tar).with_suffix(".json.part")
    part.write_text(text, encoding="utf-8")
    part.replace(index_path(tar))


def read_index(tar: Path) -> Index:
    """Read the index of one tar. Raises: UserError when it is missing, not an index, or about other bytes."""
    path = index_path(tar)
    fix = f"run `python tools/check_shards.py --reindex {tar}`"
    if not path.is_file():
        raise UserError(f"{tar}: no index beside it ({path.name}); {fix}")
    try:
        content = json.loads(path.read_bytes())
        header = content["header"]
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}, expected {FORMAT}")
        index = Index(
            tuple(_row_from_record(tar, record) for record in content["samples"]), str(header["tar_sha256"]), str(header["tokenizer"])
        )
        expected = int(header["tar_bytes"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an index ({type(error).__name__}: {error}); {fix}") from None
    size = tar.stat().st_size
    if size != expected:
        what = "ends early" if size < expected else "is longer than its index says"
        raise UserError(f"{tar}: the tar {what}: {size} bytes, the index expects {expected}; copy it again, or {fix}")
    if any(m.offset < 0 or m.size < 0 or m.offset + m.size > size for row in index.rows for m in row.members):
        raise UserError(f"{path}: a member lies outside the tar; {fix}")
    return index


def _row_from_record(tar: Path, record: dict[str, object]) -> Row:
    members = tuple(Member(str(name), int(offset), int(size), int(crc)) for name, offset, size, crc in record["members"])
    sizes = tuple((int(width), int(height)) for width, height in record["image_sizes"])
    if len(sizes) != len(members) - 1:
        raise ValueError(f"{record['key']}: {len(sizes)} image sizes for {len(members) - 1} images")
    return Row(str(tar), str(record["key"]), members, int(record["text_tokens"]), sizes, **{name: str(record[name]) for name in FACETS})
