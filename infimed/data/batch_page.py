"""A batch as one page: the row, who attends to whom, and every sample with its pictures, their patches and its tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from PIL import Image

from infimed.contracts import Batch
from infimed.data import page
from infimed.data.picture import Segment, View, describe, totals
from infimed.processing.image import unpatchify
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

KINDS = {"given": "#e8eaed", "learned": "#b7e4c0", "image": "#a5e3ea", "padding": "#ffffff"}
"""The colours of what a token is to training: the terminal's grey, green and cyan, pale."""

_MAX_PARTS = 8  # tokens that a character can be cut into; more means that the text itself holds the replacement character
_STYLE = (
    ".body { display: flex; flex-wrap: wrap; gap: 4px 22px }"
    ".sample { border-left: 5px solid var(--source); padding: 2px 0 2px 12px; margin: 16px 0 }"
    ".sample h3 { margin: 0 } .text { white-space: pre-wrap; font: 13px/1.75 ui-monospace, monospace; margin: 8px 0; flex: 1 1 290px }"
    ".text span { border-bottom: 2px solid var(--source); box-shadow: inset -1px 0 #fff; padding: 1px 0 } .i { font-weight: 600 }"
    + "".join(f".{kind[0]} {{ background: {paint} }}" for kind, paint in KINDS.items())
    + ".pictures { display: flex; flex-wrap: wrap; gap: 12px; max-width: 512px } figure { margin: 6px 0; max-width: 100% }"
    "figure div { position: relative } figure img { display: block; width: 100%; image-rendering: pixelated }"
    "figure svg { position: absolute; inset: 0; width: 100%; height: 100% } figure:hover svg { opacity: 0 }"
    "figcaption { font-size: .8rem; color: #59636e } .masks { display: flex; flex-wrap: wrap; gap: 10px 36px }"
    ".masks div { width: 300px; max-width: 100% } .pack, .frame { fill: none; stroke: #1f2328; vector-effect: non-scaling-stroke }"
    ".pack { stroke-dasharray: 4 3 } .frame { stroke: #8c959f } .strip { margin: 3px 0; width: 100%; height: 34px }"
)


def html(view: View, tokenizer: Tokenizer, resolution: Resolution) -> str:
    """Write the batch as one page: the row, who attends to whom, and every sample with its pictures and tokens."""
    numbers = {source: number for number, source in enumerate(view.batch.sources)}
    paints = {source: page.colour(numbers[source]) for source in sorted({part.source for part in view.segments}, key=numbers.get)}
    body = [page.figures(totals(view)), page.legend(paints)]
    body.append(page.legend({"given": KINDS["given"], "learned from": KINDS["learned"], "stands for an image": KINDS["image"]}))
    if view.holes:
        body.append(f"<p>Left out by a fault: {', '.join(map(page.shown, view.holes))}</p>")
    body += ["<h2>The row</h2>", '<p class="quiet">A strip is a pack: its samples by source above, what their tokens are below.</p>']
    body += [_strip(view, number, paints) for number in range(len(view.packs))]
    body += ["<h2>Who attends to whom</h2>", _masks(view, paints), "<h2>The samples</h2>"]
    if len(view.batch.images):
        body.append(f'<p class="quiet">{_grid_words(resolution)} Point at a picture, or hold it, to see it without.</p>')
    body += [_sample(view, number, tokenizer, resolution, paints) for number in range(len(view.segments))]
    return page.document(view.title, body, style=_STYLE)


def _strip(view: View, number: int, paints: dict[str, str]) -> str:
    """Draw one pack to the scale of its slots."""
    start, stop = view.packs[number]
    share = view.slots // len(view.packs)
    out = [f'<svg class="strip" viewBox="0 0 {share} 34" preserveAspectRatio="none">']
    out.append(f'<rect width="{share}" height="34" fill="#fff" stroke="#8c959f" vector-effect="non-scaling-stroke"/>')
    for place, part in enumerate(view.segments):
        if part.pack == number:
            box = f'x="{part.start - start}" width="{part.stop - part.start}" y="0" height="18" fill="{paints[part.source]}"'
            edge = 'stroke="#fff" stroke-width="1.5" vector-effect="non-scaling-stroke"'
            out.append(f'<a href="#s{place + 1}"><rect {box} {edge}><title>{place + 1}: {page.shown(part.key)}</title></rect></a>')
    at = 0
    for kind, run in groupby(view.kinds[start:stop]):
        length = len(list(run))
        out.append(f'<rect x="{at}" width="{length}" y="20" height="14" fill="{KINDS[kind]}"/>')
        at += length
    return "".join([*out, "</svg>"])


def _masks(view: View, paints: dict[str, str]) -> str:
    """Draw the blocks of both attentions: the decoder's from the borders that its kernel is given, the tower's likewise."""
    readers = [(part.start, part.stop, paints[part.source]) for part in view.segments]
    readers.append((view.batch.tokens, view.slots, "#d8dee4"))  # padding
    decoder = [
        f'<path d="M{first} {a}V{b}H{b}L{a} {a}Z" fill="{paint}"/>'  # what the tokens a to b see of a block that begins at `first`
        for first, last in _blocks(view.batch.cu_seqlens.tolist())
        for a, b, paint in ((max(a, first), min(b, last), paint) for a, b, paint in readers)
        if a < b
    ]
    decoder += [f'<path class="pack" d="M0 {stop}H{view.slots}M{stop} 0V{view.slots}"/>' for _, stop in view.packs[:-1]]
    owner = [paints[part.source] for part in view.segments for _ in part.images]
    blocks = _blocks(view.batch.images.cu_seqlens.tolist())
    tower = [f'<path d="M{a} {a}H{b}V{b}H{a}Z" fill="{paint}"/>' for (a, b), paint in zip(blocks, owner, strict=True)]
    patches = int(view.batch.images.cu_seqlens[-1])
    words = f"Decoder: {view.slots:,} tokens. A token (down) sees those before it (across) in its own block; grey is padding."
    figures = [_square(decoder, view.slots, words + (" Dashed: borders of packs." if len(view.packs) > 1 else ""))]
    if patches:
        figures.append(_square(tower, patches, f"Tower: {patches:,} patches of {len(view.batch.images):,} images, each for itself."))
    return f'<div class="masks">{"".join(figures)}</div>'


def _blocks(borders: Sequence[int]) -> list[tuple[int, int]]:
    """Pair the borders up, empty slots left out."""
    return [(a, b) for a, b in pairwise(borders) if b > a]


def _square(parts: Sequence[str], side: int, words: str) -> str:
    frame = f'<path class="frame" d="M0 0H{side}V{side}H0Z"/>'
    return f'<div><svg viewBox="0 0 {side} {side}" width="300">{"".join(parts)}{frame}</svg><p class="quiet">{words}</p></div>'


def _sample(view: View, number: int, tokenizer: Tokenizer, resolution: Resolution, paints: dict[str, str]) -> str:
    """Write one sample: its facts, its pictures, its tokens."""
    part = view.segments[number]
    sizes = part.sizes or ((0, 0),) * len(part.images)
    pictures = "".join(_figure(view.batch, image, size, resolution) for image, size in zip(part.images, sizes, strict=True))
    head = f'<h3>{number + 1}. {page.shown(part.key)}</h3><p class="quiet">{page.shown(describe(view, part))}</p>'
    text = f'<div class="text">{"".join(_tokens(view, part, tokenizer))}</div>'
    body = f'<div class="body">{f"<div class=pictures>{pictures}</div>" if pictures else ""}{text}</div>'
    style = f"--source:{paints[part.source]}"
    return f'<section class="sample" id="s{number + 1}" style="{style}">{head}{body}</section>'


def _tokens(view: View, part: Segment, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the tokens, each in the colour of its label; a picture's run is one."""
    ids = view.batch.input_ids[0].tolist()
    for kind, run in groupby(range(part.start, part.stop), key=lambda at: view.kinds[at]):
        places = list(run)
        if kind == "image":
            yield f'<span class="i" title="tokens {places[0]} to {places[-1]}">image × {len(places)}</span>'
            continue
        for first, text in _characters([ids[at] for at in places], tokenizer):
            at = places[first]
            visible = page.shown(text).replace("\n", "↵\n")
            yield f'<span class="{kind[0]}" title="token {at}, position {view.batch.position_ids[0, at]}, id {ids[at]}">{visible}</span>'


def _characters(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Yield (place, text) of each token; those that are parts of one character come together."""
    first = 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[first:stop], skip_special=False)
        if not text.endswith("\ufffd") or stop - first == _MAX_PARTS or stop == len(ids):
            yield first, text
            first = stop


def _grid_words(resolution: Resolution) -> str:
    pooled = f"{resolution.pool} x {resolution.pool} patches" if resolution.visual_grid is None else "the patches that it touches"
    return f"Thin lines: patches of {resolution.patch_size} pixels. Thick lines: visual tokens, each the mean of {pooled}."


def _figure(batch: Batch, number: int, size: tuple[int, int], resolution: Resolution) -> str:
    """Draw one picture as the tower reads it, with both grids over it."""
    rows, columns = batch.images.grids[number]
    start, stop = batch.images.cu_seqlens[number : number + 2].tolist()
    pixels = unpatchify(batch.images.patches[start:stop], (rows, columns))
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    tall, wide = pixels.shape[1:]
    grid = (resolution.visual_grid,) * 2 if resolution.visual_grid is not None else (rows // resolution.pool, columns // resolution.pool)
    broad = min(440, max(250, 14 * columns))  # of the page: about 14 pixels a patch, as far as that goes
    lines = _lines(columns, rows, wide, tall, "#00e5ff", 0.7) + _lines(
        grid[1], grid[0], wide, tall, "#ffb000", min(2, broad / grid[1] / 14)
    )
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    origin = f", from {size[0]:,} × {size[1]:,}" if any(size) else ""
    words = f"{wide} × {tall} px{origin}; {columns} × {rows} patches, {grid[1]} × {grid[0]} = {resolution.tokens((rows, columns))} tokens"
    overlay = f'<svg viewBox="0 0 {wide} {tall}" preserveAspectRatio="none">{lines}</svg>'
    return f'<figure style="width:{broad}px"><div><img alt="" src="{source}">{overlay}</div><figcaption>{words}</figcaption></figure>'


def _lines(columns: int, rows: int, wide: int, tall: int, paint: str, thick: float) -> str:
    """Draw a grid's inner lines and its frame."""
    across = "".join(f"M{wide * c / columns:.2f} 0V{tall}" for c in range(columns + 1))
    down = "".join(f"M0 {tall * r / rows:.2f}H{wide}" for r in range(rows + 1))
    stroke = f'stroke="{paint}" stroke-width="{thick:.2f}" stroke-opacity=".8" vector-effect="non-scaling-stroke"'
    return f'<path d="{across}{down}" fill="none" {stroke}/>'
