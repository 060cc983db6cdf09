"""A batch as people look at it: which sample stands where and what is learned from; as coloured text. `batch_page` draws more of it.

Both show the samples themselves, because that is what was asked for; nothing here logs, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from infimed.contracts import IGNORE_INDEX, Batch, Pack
from infimed.data import page
from infimed.data.index import Row
from infimed.processing.chat import Rendered, visualise
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

_BAR = {"given": "\x1b[90m░", "learned": "\x1b[32m█", "image": "\x1b[36m▒", "padding": "\x1b[90m·"}
_END = "\x1b[0m"
_COLUMNS = 100


@dataclass(frozen=True)
class Segment:
    """One sample, or a piece of one, in the row."""

    key: str
    source: str
    pack: int  # of the batch, from 0
    start: int  # tokens of the row
    stop: int
    span: tuple[int, int] | None  # tokens of the sample that it shows; None: all
    images: range  # of `Batch.images`
    sizes: tuple[tuple[int, int], ...]  # (width, height) of its pictures before they were resized; empty for a piece


@dataclass(frozen=True)
class View:
    """A batch with the names of what is in it."""

    title: str
    batch: Batch
    segments: tuple[Segment, ...]
    packs: tuple[tuple[int, int], ...]  # tokens of the row, start and stop of each pack
    holes: tuple[str, ...]  # keys of samples that were planned and are quarantined
    kinds: tuple[str, ...]  # of each token: given, learned, image or padding

    @property
    def slots(self) -> int:
        """Tokens of the row with its padding."""
        return self.batch.input_ids.shape[1]


def lay_out(batch: Batch, hand: Sequence[Pack], rows: Sequence[Row], *, resolution: Resolution, tokenizer: Tokenizer, title: str) -> View:
    """Find every planned sample of `hand` in the row that was made of it.

    rows: the samples of the set, by the numbers that the packs hold.
    """
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    segments, packs, holes = list[Segment](), list[tuple[int, int]](), list[str]()
    at = pictures = 0
    for number, pack in enumerate(hand):
        begin = at
        for place, index in enumerate(pack.rows):
            row, span = rows[index], pack.spans[place] if pack.spans else None
            if len(segments) == len(batch.keys) or batch.keys[len(segments)] != row.key:
                holes.append(row.key)
                continue
            length = row.length(resolution) if span is None else span[1] - span[0]
            whole = span is None or span == (0, row.length(resolution))
            seen = range(pictures, pictures + ids[at : at + length].count(tokenizer.image_start_id))
            sizes = row.image_sizes if whole else ()
            segments.append(Segment(row.key, row.source, number, at, at + length, None if whole else span, seen, sizes))
            at, pictures = at + length, seen.stop
        packs.append((begin, at))
    assert (at, pictures, len(segments)) == (batch.tokens, len(batch.images), len(batch.keys)), "the row is not the one that was planned"
    kinds = ["image" if i == tokenizer.image_id else "given" if x == IGNORE_INDEX else "learned" for i, x in zip(ids, labels, strict=True)]
    kinds[at:] = ["padding"] * (len(ids) - at)
    return View(title, batch, tuple(segments), tuple(packs), tuple(holes), tuple(kinds))


def totals(view: View) -> dict[str, str]:
    """Sum the row up, as text."""
    batch, tokens = view.batch, max(view.batch.tokens, 1)
    return {
        "tokens": f"{batch.tokens:,}",
        f"of {view.slots:,} slots": f"{batch.tokens / view.slots:.2%}",
        "visual": f"{batch.visual_tokens / tokens:.1%}",
        "supervised": f"{batch.supervised_tokens / tokens:.1%}",
        "samples": f"{len(view.segments):,}",
        "images": f"{len(batch.images):,}",
        "packs": f"{len(view.packs):,}",
    }


class _Plain:
    """A tokenizer whose text cannot steer the terminal: a sample may spell escape codes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.image_id = tokenizer, tokenizer.image_id

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        return page.printable(self._tokenizer.decode(ids, skip_special=skip_special))


def terminal(view: View, tokenizer: Tokenizer) -> str:
    """Write the batch as coloured text: totals, a bar a pack, then every sample."""
    lines = [page.printable(view.title), "  ".join(f"{name} {value}" for name, value in totals(view).items())]
    lines.append("  ".join(f"{mark}{_END} {kind}" for kind, mark in _BAR.items()) + "  | a sample ends")
    lines += [_bar(view, number) for number in range(len(view.packs))]
    lines += [f"left out by a fault: {page.printable(key)}" for key in view.holes]
    ids, labels = view.batch.input_ids[0].tolist(), view.batch.labels[0].tolist()
    for number, part in enumerate(view.segments, 1):
        lines += [f"\x1b[1m{number}  {page.printable(part.key)}{_END}  {describe(view, part)}"]
        rendered = Rendered(ids[part.start : part.stop], labels[part.start : part.stop])
        lines.append(visualise(rendered, _Plain(tokenizer)).rstrip("\n"))
    return "\n".join(lines)


def describe(view: View, part: Segment) -> str:
    """Say where a sample lies and what its tokens are."""
    kinds = view.kinds[part.start : part.stop]
    span = f" ({part.span[0]:,} to {part.span[1]:,} of the sample)" if part.span else ""
    counts = f"{len(kinds):,} tokens{span}, {kinds.count('image'):,} visual, {kinds.count('learned'):,} learned"
    return f"{page.printable(part.source)}, pack {part.pack + 1}, from token {part.start:,}: {counts}"


def _bar(view: View, number: int) -> str:
    """Draw one pack, a column for each hundredth of its slots: what most of the column's tokens are."""
    start, stop = view.packs[number]
    share = view.slots // len(view.packs)
    columns = min(_COLUMNS, share)
    cuts = [start + round(c * share / columns) for c in range(columns + 1)]
    ends = {part.stop for part in view.segments if part.pack == number}
    cells = []
    for low, high in pairwise(cuts):
        inside = view.kinds[low : min(high, stop)]
        cells.append(_BAR[max(sorted(set(inside)), key=inside.count) if inside else "padding"])
        if any(low < end <= high for end in ends):
            cells[-1] = f"{_END}|"
    return f"pack {number + 1:<3}{''.join(cells)}{_END}"
