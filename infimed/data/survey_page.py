"""The report of `survey`, as text for a terminal and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from infimed.data import page
from infimed.data.forecast import LIMIT, Filling, Setup
from infimed.data.survey import PERCENTILES, Histogram, Survey

_BAR = 50  # columns of a terminal
_SOURCES = (
    "source",
    "samples",
    "tokens",
    "visual",
    "learned text",
    "asked",
    "planned",
    "too long",
    *(f"p{p}" for p in PERCENTILES[:-1]),
    "longest",
)
_LADDER = ("max_tokens", "rows", "full", "padding", "samples a row", "too long")


def text(survey: Survey) -> str:
    """Write one stage for a terminal."""
    lines = [f"== {page.printable(survey.setup.name)}: {settings(survey.setup)}", "", *_pairs(facts(survey)), "", *_pairs(forecast(survey))]
    lines += [remark(survey), "", *_columns(_SOURCES, source_rows(survey)), "", "tokens of a sample", *_bars(survey.lengths)]
    if survey.images is not None:
        lines += ["", f"longer side of {survey.images.images:,} pictures, pixels", *_bars(survey.images.longer_side), image_words(survey)]
    return "\n".join([*lines, "", ladder_words(survey), *_columns(_LADDER, ladder_rows(survey)), ""])


def html(surveys: Sequence[Survey], title: str) -> str:
    """Write all stages on one page."""
    body: list[str] = []
    everywhere = sorted({source for survey in surveys for source in survey.sources})  # one colour a source, whatever the stage
    for survey in surveys:
        paints = {source: page.colour(everywhere.index(source)) for source in survey.sources}
        body += [f"<h2>{page.shown(survey.setup.name)}</h2>", f'<p class="quiet">{page.shown(settings(survey.setup))}</p>']
        body += [page.figures(forecast(survey)), page.figures(facts(survey)), f'<p class="quiet">{page.shown(remark(survey))}</p>']
        body += ["<h3>Sources</h3>", page.table(_SOURCES, source_rows(survey), colours=list(paints.values()))]
        limit = {_place(survey.lengths, survey.setup.max_tokens): f"max_tokens {survey.setup.max_tokens:,}"}
        body += ['<div class="charts"><div><h3>Tokens of a sample</h3>', _chart(survey.lengths, list(paints.values()), limit)]
        body += [page.legend(paints), "</div>"]
        if survey.images is not None:
            body += ["<div><h3>Longer side of the pictures, pixels</h3>", _chart(survey.images.longer_side, [page.COLOURS[0]], {})]
            body.append(f'<p class="quiet">{page.shown(image_words(survey))}</p></div>')
        body += [f"</div><h3>{ladder_words(survey)}</h3>", page.table(_LADDER, ladder_rows(survey))]
    return page.document(title, body)


def settings(setup: Setup) -> str:
    """Say what the numbers hold for."""
    limits = {"epochs": setup.epochs, "max_steps": setup.max_steps}
    ends = " or ".join(f"{name}={value:,}" for name, value in limits.items() if value is not None)
    place = f"rows an optimizer step {setup.global_batch:,}, a micro-step and rank {setup.packs_per_batch:,}, ranks {setup.world_size:,}"
    return f"rows of {setup.max_tokens:,} tokens, {setup.packing}; {place}; until {ends}"


def facts(survey: Survey) -> dict[str, str]:
    """Sum the data up."""
    tokens = sum(source.tokens for source in survey.sources.values())
    overlong = sum(source.samples * source.overlong_share for source in survey.sources.values())
    return {
        "samples there are": f"{survey.samples:,}",
        "shards": f"{survey.shards:,}",
        "their tokens": f"{tokens:,}",
        "visual": f"{sum(source.tokens * source.visual_share for source in survey.sources.values()) / max(1, tokens):.1%}",
        "too long": f"{overlong / max(1, survey.samples):.2%}",
    }


def forecast(survey: Survey) -> dict[str, str]:
    """Sum the stage up."""
    feed = survey.feed
    return {
        "optimizer steps": f"{feed.optimizer_steps:,}",
        "micro-steps": f"{feed.micro_steps:,}",
        "rows": f"{feed.packs:,}",
        "full": f"{feed.utilisation:.2%}",
        "samples": f"{feed.samples:,}",
        "passes": f"{feed.passes:.2f}",
        "tokens": f"{feed.tokens:,}",
        "cost": operations(feed.flops),
    }


def remark(survey: Survey) -> str:
    """Say how sure the numbers are."""
    measured = sum(source.measured for source in survey.sources.values())
    parts = [
        "planned to the end" if survey.feed.exact else f"planned for real over {survey.feed.planned:,} samples, the rest in proportion"
    ]
    if measured < survey.samples:
        parts.append(f"lengths of {measured:,} samples")
    if survey.feed.flops is None:
        parts.append("FLOP not counted: the configuration does not tell the model's sizes, or adds adapters")
    else:
        parts.append("FLOP forward and backward, supervised tokens estimated from a few rendered samples a source")
    if survey.setup.on_overflow == "error" and any(source.overlong_share for source in survey.sources.values()):
        parts.append("on_overflow=error: training will refuse the samples that are too long; here they are left out")
    return "; ".join(parts)


def source_rows(survey: Survey) -> list[list[str]]:
    """Lay out the sources."""
    return [
        [
            page.printable(name),
            f"{source.samples:,}",
            f"{source.tokens:,}",
            *(f"{share:.1%}" for share in (source.visual_share, source.learned_share, source.asked, source.planned)),
            f"{source.overlong_share:.2%}",
            *(f"{value:,}" for value in source.percentiles),
        ]
        for name, source in survey.sources.items()
    ]


def ladder_words(survey: Survey) -> str:
    """Head the table of sizes of rows."""
    limited = sum(source.samples for source in survey.sources.values()) > LIMIT
    span = f"The first {LIMIT:,} samples" if limited else "One epoch by itself, so that its last row is seldom full,"
    return f"{span} in rows of other sizes, {survey.setup.packing}"


def ladder_rows(survey: Survey) -> list[list[str]]:
    """Lay out the sizes of rows."""
    return [_ladder_row(step) for step in survey.ladder]


def _ladder_row(step: Filling) -> list[str]:
    if not step.packs:
        return [f"{step.max_tokens:,}", "0", "-", "-", "-", f"{step.overlong:.2%}"]
    each = f"{step.samples / step.packs:.1f}"
    return [f"{step.max_tokens:,}", f"{step.packs:,}", f"{step.utilisation:.2%}", f"{step.padding:,}", each, f"{step.overlong:.2%}"]


def image_words(survey: Survey) -> str:
    """Name the commonest sizes and the shapes."""
    images = survey.images
    sizes = ", ".join(f"{width} x {height} ({count:,})" for width, height, count in images.common)
    unknown = f"; {images.unreadable:,} unreadable" if images.unreadable else ""
    median, high, most = images.aspect
    return f"most frequent: {sizes}; longer to shorter side: median {median:.2f}, p95 {high:.2f}, most {most:.2f}{unknown}"


def operations(count: int | None) -> str:
    """Spell a number of operations."""
    if count is None:
        return "not counted"
    for size, name in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= size:
            return f"{count / size:.3g} {name}FLOP"
    return f"{count / 1e9:.3g} GFLOP"


# --- charts -----------------------------------------------------------------------------------------------------------


def _chart(histogram: Histogram, colours: Sequence[str], marks: Mapping[float, str]) -> str:
    """Draw a histogram, a part for each colour in turn."""
    bars = len(histogram.edges) - 1
    every = max(1, -(-bars // 9))
    labels = [f"{edge:,}" if place % every == 0 else "" for place, edge in enumerate(histogram.edges)]
    inside = {place: name for place, name in marks.items() if place <= bars}
    return page.stacked(list(histogram.counts.values()), labels, colours=list(colours), marks=inside)


def _place(histogram: Histogram, value: int) -> float:
    """Return where a value lies on the axis, in bars from the left; beyond the last bar when it is larger than everything."""
    edges = histogram.edges
    for bar, (low, high) in enumerate(pairwise(edges)):
        if value < high:
            return bar + max(0, value - low) / (high - low)
    return float(len(edges))


def _bars(histogram: Histogram) -> list[str]:
    """Draw a histogram of all parts together, a line a bin."""
    totals = [sum(column) for column in zip(*histogram.counts.values(), strict=True)]
    most, wide = max(totals) or 1, len(f"{histogram.edges[-1]:,}")
    lines = zip(histogram.edges, totals, strict=False)
    return [f"  {edge:>{wide},}  {'█' * round(_BAR * count / most)}{' ' * bool(count)}{count:,}" for edge, count in lines]


def _pairs(values: Mapping[str, str]) -> list[str]:
    return ["  ".join(f"{name} {value}" for name, value in values.items())]


def _columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Set a table, the first column to the left."""
    widths = [max(len(line[at]) for line in (headings, *rows)) for at in range(len(headings))]
    return [
        "  ".join(cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in (headings, *rows)
    ]
