"""How long a stage lasts and what it costs, by carrying its plan out on metadata.

Plans are those of training, carried out over at most LIMIT samples; what lies beyond is extrapolated, and said to be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infimed.contracts import Pack, UserError
from infimed.data.catalogue import Catalogue
from infimed.data.mixture import Mixing
from infimed.data.packing import Packing
from infimed.data.plan import OnOverflow, Plan
from infimed.processing.flops import ModelShape, Work, flops

LIMIT = 200_000
"""Samples that are measured, and that each plan is carried out over."""

LADDER = tuple(1024 << n for n in range(6))
"""The `max_tokens` that are compared: 1k to 32k."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of a stage that decide what it is fed."""

    name: str
    max_tokens: int
    epochs: float | None
    max_steps: int | None  # optimizer steps
    global_batch: int  # packs an optimizer step
    packs_per_batch: int
    world_size: int
    mixing: Mixing
    seed: int
    buffer: int
    open_shards: int
    packing: Packing
    on_overflow: OnOverflow

    def plan(self, catalogue: Catalogue, *, max_tokens: int, epochs: float | None, packs: int | None) -> Plan:
        """Lay the plan of this stage as a stream of packs: dealing them to ranks changes none."""
        return Plan(
            catalogue,
            seed=self.seed,
            max_tokens=max_tokens,
            global_batch=self.global_batch,
            buffer=self.buffer,
            open_shards=self.open_shards,
            mixing=self.mixing,
            epochs=epochs,
            steps=packs,
            packing=self.packing,
            on_overflow="drop" if self.on_overflow == "error" else self.on_overflow,
        )


@dataclass(frozen=True)
class Filling:
    """How rows of one size fill."""

    max_tokens: int
    packs: int
    samples: int  # in those packs
    utilisation: float  # tokens to slots
    padding: int  # slots without a token
    overlong: float  # share of the samples measured


@dataclass(frozen=True)
class Feed:
    """What the stage lasts and costs."""

    packs: int
    micro_steps: int
    optimizer_steps: int
    samples: int
    tokens: int
    visual_tokens: int
    utilisation: float
    passes: float  # samples shown to samples there are
    flops: int | None  # None where the model's sizes are not known
    planned: int  # samples that were planned for real; the rest is extrapolated from them
    exact: bool  # there is no rest


@dataclass(frozen=True)
class Learning:
    """How much of what is shown is learned from, by source."""

    text: Mapping[str, float]  # text tokens that a sample brings on average
    share: Mapping[str, float]  # of the text

    def of(self, shown: Mapping[str, int]) -> float:
        """Return the share of the text tokens that is learned from, for samples mixed like this."""
        text = sum(count * self.text.get(source, 0.0) for source, count in shown.items())
        learned = sum(count * self.text.get(source, 0.0) * self.share.get(source, 0.0) for source, count in shown.items())
        return learned / text if text else 0.0


def _carry_out(plan: Plan, *, limit: int) -> tuple[list[Pack], bool]:
    """Take packs until `limit` samples are in them; and say whether that was the whole plan."""
    packs, samples = list[Pack](), 0
    for step in plan:
        for pack in (pack for hand in step.hands for pack in hand if pack.rows):
            packs.append(pack)
            samples += len(pack.rows)
        if samples >= limit:
            return packs, next(plan.copy(), None) is None
    return packs, True


def filling_of(setup: Setup, catalogue: Catalogue, max_tokens: int, lengths: np.ndarray) -> Filling:
    """Carry out one epoch at another size of the rows."""
    overlong = float((lengths > max_tokens).mean())
    try:
        packs, _ = _carry_out(setup.plan(catalogue, max_tokens=max_tokens, epochs=1, packs=None), limit=LIMIT)
    except UserError:  # no sample is short enough
        packs = []
    tokens, slots = sum(pack.tokens for pack in packs), max_tokens * len(packs)
    return Filling(max_tokens, len(packs), _samples(packs), tokens / slots if slots else 0.0, slots - tokens, overlong)


def feed_of(
    setup: Setup, catalogue: Catalogue, learning: Learning, *, shape: ModelShape | None, trained: Collection[str]
) -> tuple[Feed, dict[str, int], dict[str, float]]:
    """Carry out the stage's plan; return what it comes to, samples shown by source, and shares asked for by source."""
    given = setup.max_steps * setup.global_batch if setup.max_steps is not None else None
    plan = setup.plan(catalogue, max_tokens=setup.max_tokens, epochs=setup.epochs, packs=given)
    packs, exact = _carry_out(plan, limit=LIMIT)
    planned, shown = _samples(packs), dict(plan.shown())
    ends = [float(given)] if given is not None else []
    if setup.epochs is not None:
        ends.append(len(packs) * _samples_due(setup, catalogue) / max(1, planned + plan.overlong.total()))
    total = len(packs) if exact else max(len(packs), round(min(ends)))
    scale = total / max(1, len(packs))
    work = work_of(packs, catalogue, merged=setup.packing == "unisolated")
    work = work + Work(supervised=round((work.tokens - work.visual_tokens) * learning.of(shown)))
    feed = Feed(
        packs=total,
        micro_steps=-(-total // (setup.packs_per_batch * setup.world_size)),
        optimizer_steps=-(-total // setup.global_batch),
        samples=round(planned * scale),
        tokens=round(work.tokens * scale),
        visual_tokens=round(work.visual_tokens * scale),
        utilisation=work.tokens / max(1, len(packs) * setup.max_tokens),
        passes=planned * scale / max(1, int(catalogue.counts().sum())),
        flops=round(flops(shape, work, trained=trained).total * scale) if shape is not None else None,
        planned=planned,
        exact=exact,
    )
    return feed, shown, dict(plan.asked())


def _samples(packs: Sequence[Pack]) -> int:
    """Count the samples; one in pieces counts where it begins."""
    return sum(sum(start == 0 for start, _ in pack.spans) if pack.spans else len(pack.rows) for pack in packs)


def _samples_due(setup: Setup, catalogue: Catalogue) -> float:
    """Return how many samples all epochs show, those too long included."""
    counts = dict(zip(catalogue.sources, catalogue.counts().sum(1).tolist(), strict=True))
    if setup.mixing.by_shares:
        return setup.epochs * sum(counts.values())
    weights = setup.mixing.epochs_of
    return setup.epochs * sum(count * weights.get(source, weights.get("*", 1.0)) for source, count in counts.items())


def work_of(packs: Sequence[Pack], catalogue: Catalogue, *, merged: bool) -> Work:
    """Add up what packs ask for, but for what is supervised; a sample in pieces brings its pictures with the first of them."""
    rows = np.array([row for pack in packs for row in pack.rows], dtype=np.int64)
    spans = [span for pack in packs for span in (pack.spans or [(0, 0)] * len(pack.rows))]
    start, stop = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    sizes = catalogue.measure(rows)
    first, length = start == 0, np.where(stop > 0, stop - start, sizes.tokens)
    blocks = np.array([pack.tokens for pack in packs], dtype=np.int64) if merged else length
    return Work(
        tokens=int(length.sum()),
        pairs=int((blocks * (blocks + 1) // 2).sum()),
        patches=int(sizes.patches[first].sum()),
        patch_pairs=int(sizes.patch_pairs[first].sum()),
        visual_tokens=int(sizes.visual[first].sum()),
    )
