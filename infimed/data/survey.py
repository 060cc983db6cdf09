"""What a stage would be fed, in numbers, before any training: lengths, picture sizes, how well rows fill, how long it lasts, what it costs.

No pixel is read and no weight is built. At most `forecast.LIMIT` samples are measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infimed.contracts import IGNORE_INDEX, DataFault, Sample
from infimed.data.catalogue import Catalogue
from infimed.data.forecast import LADDER, LIMIT, Feed, Filling, Learning, Setup, feed_of, filling_of
from infimed.processing.chat import render
from infimed.processing.flops import ModelShape
from infimed.processing.tokenizer import Tokenizer

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_SPREAD = 32  # shards that a source's rows are picked from at least, if it has as many
_BINS = 24  # of a histogram, about
_COMMON = 6


@dataclass(frozen=True)
class Histogram:
    """Counts between borders that grow by a fixed factor."""

    edges: tuple[int, ...]  # one more than bins; a bin holds its lower border, the last one its upper too
    counts: Mapping[str, tuple[int, ...]]  # by part


@dataclass(frozen=True)
class SourceFacts:
    """One source; shares lie in [0, 1]."""

    samples: int
    measured: int  # samples that the lines below are counted on
    tokens: int  # of all samples, from the mean of those measured
    visual_share: float  # of the tokens
    learned_share: float  # of the text tokens, from a few samples that were rendered
    overlong_share: float  # of the samples, longer than max_tokens
    percentiles: tuple[int, ...]  # tokens of a sample at PERCENTILES
    asked: float  # share of the samples, by the mixture
    planned: float  # share of the samples, in the plan


@dataclass(frozen=True)
class ImageFacts:
    """The pictures as they lie in the shards."""

    images: int  # of the samples measured
    unreadable: int  # whose size the index does not know
    longer_side: Histogram  # pixels
    common: tuple[tuple[int, int, int], ...]  # width, height, images: the most frequent sizes
    aspect: tuple[float, float, float]  # longer side to shorter: median, 95th percentile, most


@dataclass(frozen=True)
class Survey:
    """The report of one stage."""

    setup: Setup
    samples: int
    shards: int
    sources: Mapping[str, SourceFacts]
    lengths: Histogram  # tokens of a sample
    images: ImageFacts | None  # None where there is none
    ladder: tuple[Filling, ...]
    feed: Feed


@dataclass(frozen=True)
class Evidence:
    """What is known beside the catalogue."""

    rows: Mapping[str, np.ndarray]  # from `pick`
    sizes: np.ndarray  # int64[N, 2] width and height of the pictures of those rows
    learned: Mapping[str, float]  # share of the text tokens, by source


def pick(catalogue: Catalogue, *, limit: int = LIMIT) -> dict[str, np.ndarray]:
    """Choose the rows of each source that are measured, int64[n]: all, or every k-th of some shards that are spread evenly."""
    counts = catalogue.counts()
    keep = min(1.0, limit / max(1, int(counts.sum())))
    picked = {}
    for number, source in enumerate(catalogue.sources):
        places = np.flatnonzero(counts[number])
        if not len(places):
            continue
        wanted = min(len(places), max(_SPREAD, math.ceil(len(places) * keep)))
        spread = places[np.arange(wanted) * len(places) // wanted]
        rows = np.concatenate([catalogue.rows(number, int(shard)) for shard in spread])
        picked[source] = rows[:: max(1, int(len(rows) / max(1.0, counts[number].sum() * keep)))]
    return picked


def learned_share(samples: Sequence[tuple[Sample, tuple[bytes, ...]] | DataFault], tokenizer: Tokenizer) -> float:
    """Return which share of the text tokens of some samples is learned from; 0 where none can be rendered."""
    text = learned = 0
    for found in samples:
        if isinstance(found, DataFault):
            continue
        try:
            rendered = render(found[0].messages, tokenizer, visual_tokens=[0] * len(found[1]))
        except DataFault:
            continue
        text += len(rendered.labels)
        learned += sum(label != IGNORE_INDEX for label in rendered.labels)
    return learned / max(text, 1)


def survey(setup: Setup, catalogue: Catalogue, evidence: Evidence, *, shape: ModelShape | None, trained: Collection[str]) -> Survey:
    """Carry the plan out and count. Raises: UserError when nothing is left to plan."""
    measured = {source: catalogue.measure(rows) for source, rows in evidence.rows.items()}
    lengths = {source: measure.tokens for source, measure in measured.items()}
    text = {source: measure.tokens - measure.visual for source, measure in measured.items()}
    fits = {source: (tokens <= setup.max_tokens) | (setup.on_overflow == "split") for source, tokens in lengths.items()}
    weights = {source: float(text[source][fits[source]].sum()) / max(1, fits[source].sum()) for source in measured}
    feed, shown, asked = feed_of(setup, catalogue, Learning(weights, evidence.learned), shape=shape, trained=trained)
    counts = dict(zip(catalogue.sources, catalogue.counts().sum(1).tolist(), strict=True))
    sources = {
        source: SourceFacts(
            samples=counts[source],
            measured=len(rows),
            tokens=round(float(lengths[source].mean()) * counts[source]),
            visual_share=float(measured[source].visual.sum() / max(1, lengths[source].sum())),
            learned_share=evidence.learned.get(source, 0.0),
            overlong_share=float((lengths[source] > setup.max_tokens).mean()),
            percentiles=tuple(int(value) for value in np.percentile(lengths[source], PERCENTILES, method="higher")),
            asked=asked.get(source, 0.0),
            planned=shown.get(source, 0) / max(1, sum(shown.values())),
        )
        for source, rows in evidence.rows.items()
    }
    return Survey(
        setup=setup,
        samples=sum(counts.values()),
        shards=int((catalogue.counts().sum(0) > 0).sum()),
        sources=sources,
        lengths=histogram(lengths),
        images=image_facts(evidence.sizes) if len(evidence.sizes) else None,
        ladder=tuple(filling_of(setup, catalogue, size, np.concatenate(list(lengths.values()))) for size in LADDER),
        feed=feed,
    )


def histogram(parts: Mapping[str, np.ndarray]) -> Histogram:
    """Count the values of each part, int64[n] of at least 1, between common borders that reach from the least to the largest."""
    least, most = min(values.min() for values in parts.values()), max(values.max() for values in parts.values())
    doublings = math.log2(max(1, most) / max(1, least))
    fine = min(16, max(1, math.floor(_BINS / max(doublings, 1e-9))))  # bins to a doubling
    low, high = math.floor(fine * math.log2(max(1, least))), math.floor(fine * math.log2(max(1, most))) + 1
    edges = np.unique(np.floor(2.0 ** (np.arange(low, high + 1) / fine)).astype(np.int64))
    edges = edges[np.searchsorted(edges, max(1, least), "right") - 1 :]  # rounding down can leave the first bin empty
    edges = edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
    counts = {name: tuple(np.histogram(np.maximum(values, 1), edges)[0].tolist()) for name, values in parts.items()}
    return Histogram(tuple(edges.tolist()), counts)


def image_facts(sizes: np.ndarray) -> ImageFacts | None:
    """Count pictures of (width, height), int64[N, 2]; None where no size is known."""
    known = sizes[(sizes > 0).all(1)]
    if not len(known):
        return None
    aspect = known.max(1) / known.min(1)
    common = Counter(map(tuple, known.tolist())).most_common(_COMMON)
    return ImageFacts(
        images=len(sizes),
        unreadable=len(sizes) - len(known),
        longer_side=histogram({"images": known.max(1)}),
        common=tuple((*size, count) for size, count in common),
        aspect=tuple(round(float(value), 3) for value in (*np.percentile(aspect, (50, 95)), aspect.max())),
    )
