"""Put a benchmark's questions to an answerer and keep every prediction, safe against a kill at any moment.

Predictions are appended a chunk at a time. A resumed run answers a chunk again where any of its predictions is missing, whole, so that
batches are composed as in a straight run and the file comes out the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from infimed.contracts import DataFault, EvalItem, Task
from infimed.evaluation.scoring import VERSION

Answerer = Callable[[Sequence[EvalItem]], Sequence[str]]


@dataclass(frozen=True)
class Prediction:
    """One judged response, as it stands in predictions.jsonl."""

    key: str  # hash of everything that decides this line; `name` stands for the answerer's weights and settings
    id: str
    groups: Mapping[str, str]
    gold: str
    response: str
    status: str
    extracted: str
    correct: bool
    rule: str
    cluster: str


def evaluate(task: Task, answer: Answerer, *, out: Path, name: str, progress: bool = True, chunk: int = 256) -> list[Prediction]:
    """Answer and judge all questions of `task`; returns the predictions in the task's order.

    Args:
        answer: maps questions to responses, in order.
        out: folder of `predictions.jsonl`. Predictions there that fit are kept; others move to `stale.jsonl` beside it.
        name: identifies the answerer (checkpoint, settings); another name, question, image or scoring version is asked anew.
        chunk: questions that `answer` gets at a time, and the most that a kill can lose.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, known = out / "predictions.jsonl", _load(out / "predictions.jsonl")
    done: dict[str, Prediction] = {}
    total = len(task) if hasattr(task, "__len__") else None
    with file.open("ab") as sink, tqdm(total=total, desc=f"{task.name}: {name}", unit="q", disable=not progress) as bar:
        for items in _chunks(task.items(), chunk):
            keys = [prediction_key(item, name) for item in items]
            for i, key in enumerate(keys):
                if key in done or key in keys[:i]:
                    raise DataFault("duplicate_item", f"{task.name}: {items[i].id} is asked twice")
            if any(key not in known for key in keys):
                judged = _judge(task, items, keys, answer(items))
                new = [p for p in judged if p.key not in known]
                _append(sink, new)
                known |= {p.key: p for p in new}
            done |= {key: known[key] for key in keys}
            bar.update(len(items))
    _settle(out, done, known)
    return list(done.values())


def prediction_key(item: EvalItem, name: str) -> str:
    """Hash the question, its images, how it is judged and who answers: 32 hex digits."""
    fields = [VERSION, name, item.id, [asdict(m) for m in item.prompt], item.gold, item.answer_type, item.choices]
    text = json.dumps([*fields, dict(item.groups), item.cluster], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for image in item.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file as it is; a line that is no prediction is left out."""
    return [p for line in path.read_bytes().split(b"\n") if (p := _from_line(line))]


def _chunks(items: Iterable[EvalItem], size: int) -> Iterator[list[EvalItem]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _judge(task: Task, items: Sequence[EvalItem], keys: Sequence[str], responses: Sequence[str]) -> list[Prediction]:
    """Score each response; what cannot be written as UTF-8 (half a surrogate pair) is replaced first."""
    judged = []
    for item, key, raw in zip(items, keys, responses, strict=True):
        response = raw.encode("utf-8", "replace").decode()
        v = task.score(item, response)
        judged.append(
            Prediction(key, item.id, dict(item.groups), item.gold, response, v.status, v.extracted, v.correct, v.rule, item.cluster)
        )
    return judged


def _append(sink: BinaryIO, predictions: Sequence[Prediction]) -> None:
    """Write whole lines in one go and wait for the disk."""
    sink.write(b"".join(map(_to_line, predictions)))
    sink.flush()
    os.fsync(sink.fileno())


def _to_line(prediction: Prediction) -> bytes:
    return json.dumps(asdict(prediction), ensure_ascii=False).encode() + b"\n"


def _from_line(line: bytes) -> Prediction | None:
    try:
        return Prediction(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None


def _load(file: Path) -> dict[str, Prediction]:
    """Read the predictions of an earlier run by key, after cutting off a last line that was not written to its end."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
    return {p.key: p for line in data[:whole].split(b"\n") if (p := _from_line(line))}


def _settle(out: Path, done: Mapping[str, Prediction], known: Mapping[str, Prediction]) -> None:
    """Leave exactly the task's predictions, in its order; those of other questions or answerers move to stale.jsonl."""
    file, wanted = out / "predictions.jsonl", b"".join(map(_to_line, done.values()))
    if file.read_bytes() == wanted:
        return
    if stale := [p for key, p in known.items() if key not in done]:
        with (out / "stale.jsonl").open("ab") as sink:
            _append(sink, stale)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(wanted)
    os.replace(temporary, file)
