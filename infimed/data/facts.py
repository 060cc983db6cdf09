"""What a data set amounts to under a run's settings, and which of its samples a run has to leave out; no pixel is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from infimed.contracts import UserError
from infimed.data.arrivals import pieces_of
from infimed.data.plan import Plan
from infimed.data.remote import parted
from infimed.data.shard_catalogue import ShardCatalogue
from infimed.data.shards import ShardSet
from infimed.processing.resolution import Resolution

_MOST_PACKS = 8192
"""Rows that are counted, over all ranks: the whole epoch of a small set, the beginning of a large one."""


@dataclass(frozen=True)
class DatasetFacts:
    """What the training data amounts to, on metadata alone."""

    samples: int  # shown
    tokens: int
    visual_tokens: int
    overlong: Mapping[str, int]  # source -> samples left out as longer than max_tokens
    steps: int  # micro-steps of all ranks together
    utilisation: float  # tokens / slots
    whole: bool  # the epoch is not longer than this

    def describe(self) -> str:
        """Say it in a line."""
        left_out = f", {sum(self.overlong.values()):,} too long" if self.overlong else ""
        epoch = "an epoch" if self.whole else f"in the first {self.steps:,} micro-steps"
        return (
            f"data: {self.samples:,} samples {epoch}{left_out}, {self.tokens:,} tokens ({self.visual_tokens:,} visual), "
            f"{self.steps:,} micro-steps, rows {self.utilisation:.1%} full"
        )


def count_facts(plan: Plan) -> DatasetFacts:
    """Run a plan of one epoch, as far as 8,192 rows, and count."""
    steps = list(islice(plan, max(1, _MOST_PACKS // (plan.packs_per_batch * plan.world_size))))
    packs = [pack for step in steps for hand in step.hands for pack in hand]
    rows = [row for pack in packs for row in pack.rows]
    tokens = sum(pack.tokens for pack in packs)
    return DatasetFacts(
        samples=len(rows),
        tokens=tokens,
        visual_tokens=int(plan.catalogue.measure(np.array(rows, dtype=np.int64)).visual.sum()),
        overlong=dict(plan.overlong),
        steps=len(steps),
        utilisation=tokens / max(1, len(packs) * plan.max_tokens),
        whole=next(plan, None) is None,
    )


def write_overlong(shards: ShardSet, resolution: Resolution, *, max_tokens: int, path: Path, split: bool = False) -> int:
    """List the samples that rows of `max_tokens` have no room for: a JSON line {shard, key, source, tokens} each; returns how many.

    split: those that can be split have been shown, and are not among them.
    """
    catalogue, count = ShardCatalogue(shards, resolution), 0
    with path.open("w", encoding="utf-8") as file:
        for source, held in enumerate(catalogue.counts()):
            for shard in held.nonzero()[0].tolist():
                rows = catalogue.rows(source, shard)
                tokens = catalogue.measure(rows).tokens
                for row, length in zip(rows[tokens > max_tokens].tolist(), tokens[tokens > max_tokens].tolist(), strict=True):
                    if split and pieces_of(0, length, max_tokens, catalogue.cuts(row)):
                        continue
                    facts = shards.rows[row]
                    record = {"shard": parted(facts.shard)[1], "key": facts.key, "source": facts.source, "tokens": length}
                    file.write(json.dumps(record, sort_keys=True) + "\n")
                    count += 1
    return count


def read_overlong(paths: Sequence[str | Path]) -> set[tuple[str, str]]:
    """Read the (shard file name, key) pairs of some lists. Raises: UserError."""
    found: set[tuple[str, str]] = set()
    for path in paths:
        try:
            records = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
            found |= {(record["shard"], record["key"]) for record in records}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"only={path}: expected JSON lines with shard and key, as overlong.jsonl of a run ({error})") from None
    return found
