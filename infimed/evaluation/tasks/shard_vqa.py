"""Questions straight from shards: every sample's last answer is asked for again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from infimed.contracts import DataFault, EvalItem, Sample, Verdict
from infimed.data.shards import open_shards
from infimed.evaluation import scoring

_OPTION = re.compile(r"^[A-J]\. (.+)$", re.MULTILINE)
GROUPS = ("task", "modality", "organ", "domain", "source", "answer_type")


class ShardVQA:
    """The conversations of some shards as a benchmark (`contracts.Task`)."""

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        name: str = "shard_vqa",
        limit: int | None = None,
        cluster_by: Literal["image", "patient"] = "image",
    ) -> None:
        """Open the shards.

        Args:
            limit: ask at most this many questions, spread evenly over the rows; None means all.
            cluster_by: what the intervals resample: all questions on one image, or all images of one patient or volume (wider, and the
                honest choice for a statement about new patients; needs enough of them).
        """
        self.name = name
        self._shards, self._cluster_by = open_shards(shards), cluster_by
        rows = len(self._shards.rows)
        kept = rows if limit is None else min(limit, rows)
        self._chosen = [i * rows // kept for i in range(kept)]

    def __len__(self) -> int:
        """Count the questions."""
        return len(self._chosen)

    def items(self) -> Iterator[EvalItem]:
        """Yield the questions in shard order. Raises: DataFault for a sample without a final answer or with damaged bytes."""
        for i in self._chosen:
            sample, images = self._shards.read(i)
            yield to_item(sample, images, cluster_by=self._cluster_by)

    def score(self, item: EvalItem, response: str) -> Verdict:
        """Judge one response by the strict rules."""
        return scoring.score(item, response)


def to_item(sample: Sample, images: Sequence[bytes], *, cluster_by: Literal["image", "patient"] = "image") -> EvalItem:
    """Turn a conversation into a question: all turns before the last answer, which is the gold."""
    *prompt, last = sample.messages
    if last.role != "assistant":
        raise DataFault("no_gold", f"{sample.key}: the last turn is the {last.role}'s, expected the assistant's answer")
    return EvalItem(
        id=sample.key,
        prompt=tuple(prompt),
        images=tuple(images),
        gold=last.text,
        answer_type=sample.answer_type,
        choices=sample.choices,
        groups={group: getattr(sample, group) for group in GROUPS},
        cluster=_cluster(sample, images, cluster_by),
    )


def asked_in(shards: Sequence[str | Path]) -> Iterator[EvalItem]:
    """Yield every question of the conversations in some shards, without their images: what a blind predictor can learn from."""
    opened = open_shards(shards)
    for i in range(len(opened.rows)):
        sample, _ = opened.read(i)
        turns = sample.messages
        for number, (asked, answer) in enumerate(pairwise(turns)):
            if asked.role == "user" and answer.role == "assistant":
                choices = tuple(_OPTION.findall(asked.text))
                plain = "caption" if sample.answer_type == "caption" else "open"
                kind = "choice" if choices else "yes_no" if answer.text.lower() in ("yes", "no") else plain
                yield EvalItem(f"{sample.key}/{number}", (asked,), (), answer.text, kind, choices)


def _cluster(sample: Sample, images: Sequence[bytes], cluster_by: str) -> str:
    """Name the resampling unit: the patient, the patient's image (by its bytes), or the sample itself where it has neither."""
    if cluster_by == "patient" and sample.patient != "unknown":
        return sample.patient
    seen = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in images)).hexdigest()[:12] if images else sample.key
    return f"{sample.patient}/{seen}"
