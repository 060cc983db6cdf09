"""The record of a sample: ours, checked and written the same way everywhere, and the ones that others write, turned into ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import get_args

from infimed.contracts import IMAGE_PLACEHOLDER, AnswerType, DataFault, Message, Role, Sample
from infimed.processing.dicom import is_dicom, read_dicom

Layout = Mapping[str, str]
"""What records made elsewhere do not say themselves: `source`, `licence`, and the `prompt` of a caption."""

PROMPT = "Describe the image."
IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "jp2", "dcm", "dicom"])

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LISTS = ("messages", "images", "choices")
_TEXT_FIELDS = tuple(f.name for f in fields(Sample) if f.name not in ("key", *_LISTS))
_KNOWN = frozenset((*_TEXT_FIELDS, *_LISTS))
_TURN = frozenset(("role", "text"))
_READ = _KNOWN | {"key", "id", "conversations", "image", "question", "answer", "caption"}
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif", b"\0\0\0\x0cjP": "jp2"}


# --- ours ------------------------------------------------------------------------------------------------------------


def sample_to_json(sample: Sample) -> bytes:
    """Write a sample as the JSON member of a shard (sorted keys, so that equal samples are equal bytes).

    Raises: DataFault("invalid_text") for a lone surrogate, which JSON can carry and UTF-8 cannot.
    """
    record = asdict(sample)
    del record["key"]
    try:
        return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataFault("invalid_text", f"{sample.key}: a field is not valid Unicode: {error.reason}") from None


def sample_from_json(key: str, data: bytes) -> Sample:
    """Read the JSON member of a shard. Raises: DataFault("schema") that lists everything wrong with it."""
    return _checked(key, parse_json(key, data), images=None)


def parse_json(key: str, data: bytes) -> object:
    """Read JSON. Raises: DataFault("schema")."""
    try:
        return json.loads(data.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataFault("schema", f"{key}: not JSON ({error})") from None


def _checked(key: str, record: object, *, images: tuple[str, ...] | None) -> Sample:
    """Build a Sample of a record in our own words; `images`: the members that are there, if that is known."""
    if not _is_sound(record):
        raise DataFault("schema", f"{key}: " + "; ".join(_problems(record)))
    messages = tuple([Message(turn["role"], turn["text"]) for turn in record.pop("messages")])
    named = tuple(record.pop("images", ()))
    if images is not None and named and named != images:
        raise DataFault("schema", f"{key}: the JSON names {named}, the tar holds {images}")
    return Sample(key, messages, named if images is None else images, choices=tuple(record.pop("choices", ())), **record)


def _is_sound(record: object) -> bool:
    """Say quickly what `_problems` says in words; every sample that is read passes here."""
    if type(record) is not dict or not record.keys() <= _KNOWN or record.get("answer_type", "open") not in _ANSWER_TYPES:
        return False
    for name, value in record.items():
        if type(value) is not (list if name in _LISTS else str):
            return False
    turns, lists = record.get("messages"), (*record.get("images", ()), *record.get("choices", ()))
    if type(turns) is not list or not turns or any(type(item) is not str for item in lists):
        return False
    return all(type(t) is dict and t.keys() == _TURN and type(t["text"]) is str and t["role"] in _SPEAKERS for t in turns)


_ANSWER_TYPES, _SPEAKERS = get_args(AnswerType), get_args(Role)


def _problems(record: object) -> list[str]:
    """Name every field that is not what a Sample holds."""
    if not isinstance(record, dict):
        return [f"expected an object, got {type(record).__name__}"]
    problems = [f"unknown field {name!r}" for name in sorted(record.keys() - _KNOWN)]
    problems += [f"{name} is not text" for name in _TEXT_FIELDS if not isinstance(record.get(name, ""), str)]
    for name in ("images", "choices"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f"{name} is not a list of texts")
    if record.get("answer_type", "open") not in _ANSWER_TYPES:
        problems.append(f"answer_type {record['answer_type']!r} is none of {', '.join(_ANSWER_TYPES)}")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return [*problems, "messages is not a list with at least one turn"]
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.keys() != _TURN or not isinstance(turn["text"], str):
            problems.append(f"messages[{number}] is not {{role, text}}")
        elif turn["role"] not in _SPEAKERS:
            problems.append(f"messages[{number}].role {turn['role']!r} is none of {', '.join(_SPEAKERS)}")
    return problems


# --- a member of a shard, whoever made it ----------------------------------------------------------------------------


def read_member(key: str, name: str, data: bytes, *, images: tuple[str, ...], layout: Layout | None) -> Sample:
    """Read the record of a sample from its member `name`, which is `json` or, with a layout, the `txt` of a caption.

    images: names of the image members. Raises: DataFault("schema").
    """
    if layout is None:
        return _checked(key, parse_json(key, data), images=images)
    if name.lower() == "json":
        return convert(key, parse_json(key, data), images=images, layout=layout)
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataFault("schema", f"{key}: the caption is not UTF-8 ({error})") from None
    return convert(key, {"caption": caption}, images=images, layout=layout)


# --- records of others -----------------------------------------------------------------------------------------------


def convert(key: str, record: object, *, images: Sequence[str], layout: Layout) -> Sample:
    """Turn a record of any accepted kind into a Sample; fields that we have no place for are left out, see `ignored`.

    Accepted: `messages` or `conversations` (turns of role or from, and text, content or value), or `question` and `answer`, or a
    `caption`, with any field of a Sample beside them. A conversation without any placeholder shows its images first.
    Raises: DataFault("schema").
    """
    if not isinstance(record, dict):
        raise DataFault("schema", f"{key}: expected an object, got {type(record).__name__}")
    ours: dict[str, object] = {name: layout[name] for name in ("source", "licence") if name in layout}
    ours |= {name: _text(record[name]) for name in _TEXT_FIELDS if record.get(name) not in (None, "")}
    if record.get("choices"):
        ours["choices"] = _list_of(record["choices"])
    turns = _turns(record, layout)
    if turns is None:
        raise DataFault("schema", f"{key}: neither messages nor conversations is a list of turns, no question with its answer, no caption")
    if "caption" in record and not _given(record, "messages", "conversations", "question"):
        ours.setdefault("answer_type", "caption")
    asked = [turn for turn in turns if turn["role"] == "user" and isinstance(turn["text"], str)]
    if asked and images and not any(IMAGE_PLACEHOLDER in turn["text"] for turn in asked):
        asked[0]["text"] = IMAGE_PLACEHOLDER * len(images) + "\n" + asked[0]["text"]
    return _checked(key, {**ours, "messages": turns}, images=tuple(images))


def is_convertible(record: object) -> bool:
    """Say whether a record holds anything to talk about; many a tar has a JSON of technical facts beside a caption's text."""
    return isinstance(record, dict) and _turns(record, {}) is not None


def ignored(record: Mapping[str, object]) -> list[str]:
    """Name the fields of a record that `convert` does not look at."""
    return [name for name in record if name not in _READ]


def key_of(record: object, *, otherwise: str) -> str:
    """Return a record's key or id, spelled so that it can name members of a tar."""
    given = _given(record, "key", "id") if isinstance(record, dict) else None
    return re.sub(r"[^A-Za-z0-9_-]+", "_", str(given if given is not None else "")).strip("_")[:64] or otherwise


def images_of(record: object) -> list[object]:
    """Return what a record says of its images: paths, texts of paths set apart by `;`, bytes, or {bytes, path}; in order."""
    given = _given(record, "images", "image") if isinstance(record, dict) else None
    if isinstance(given, str):
        return _list_of(given)
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def extension_of(data: bytes) -> str:
    """Name the kind of an image file by its first bytes; `bin` for an unknown one."""
    if is_dicom(data):
        return "dcm"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for mark, name in _MAGIC.items() if data.startswith(mark)), "bin")


def check_licence(sample: Sample) -> None:
    """Refuse a sample that nobody may use. Raises: DataFault("no_licence")."""
    if sample.licence in ("", "unknown"):
        raise DataFault("no_licence", f"{sample.key}: no licence in the record and no --licence")


def check_deidentified(data: bytes) -> None:
    """Refuse a DICOM file that does not say that its patient's identity was removed. Raises: DataFault("not_deidentified")."""
    if is_dicom(data):
        removed = read_dicom(data).get("PatientIdentityRemoved", "")
        if str(removed).upper() != "YES":
            raise DataFault("not_deidentified", "a DICOM file without PatientIdentityRemoved=YES; de-identify it, or convert it to PNG")


def _given(record: Mapping[str, object], *names: str) -> object:
    """Return the first of some fields that says anything."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def _turns(record: Mapping[str, object], layout: Layout) -> list[dict[str, object]] | None:
    """Read the conversation, of whatever spelling."""
    if (turns := _given(record, "messages", "conversations")) is not None:
        turns = _loaded(turns)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return None
        return [{"role": _role(turn), "text": _text(_given(turn, "text", "content", "value"))} for turn in turns]
    question, answer, caption = (_given(record, name) for name in ("question", "answer", "caption"))
    if question is not None and answer is not None:
        return [{"role": "user", "text": question}, {"role": "assistant", "text": _text(answer)}]
    if caption is not None:
        return [{"role": "user", "text": layout.get("prompt", PROMPT)}, {"role": "assistant", "text": caption}]
    return None


def _role(turn: Mapping[str, object]) -> object:
    role = _given(turn, "role", "from")
    return _ROLES.get(role, role) if isinstance(role, str) else role


def _text(content: object) -> object:
    """Join the typed pieces that some records have in the place of a text; spell a number."""
    if type(content) in (int, float) and isfinite(content):
        return str(content)
    if not isinstance(content, list) or not all(isinstance(piece, dict) for piece in content):
        return content
    return "".join(
        IMAGE_PLACEHOLDER if str(piece.get("type", "")).startswith("image") else str(piece.get("text") or "") for piece in content
    )


def _loaded(value: object) -> object:
    """Read a list that a table holds as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    except (ValueError, RecursionError):
        return value


def _list_of(value: object) -> list[object]:
    """Read a list, its JSON text, or texts set apart by `;`."""
    value = _loaded(value)
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
