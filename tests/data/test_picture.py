from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infimed.contracts import Message, Pack, Sample
from infimed.data.batch_page import html
from infimed.data.collate import collate
from infimed.data.encode import Encoder
from infimed.data.picture import lay_out, terminal, totals
from infimed.processing.chat import render
from infimed.processing.image import unpatchify
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[2] / "samples" / "tokenizer")
RESOLUTION = Resolution(patch_size=4, image_size=16, visual_grid=2)
FORGED = "</span><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred\x1b[0m \u202eback"


@dataclass(frozen=True)
class Planned:
    """What the plan knows of a sample."""

    key: str
    source: str
    tokens: int
    image_sizes: tuple[tuple[int, int], ...]

    def length(self, resolution):
        return self.tokens


def picture(seed, size=(20, 12)):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(key, source, question, answer, images=0):
    sample = Sample(key, (Message("user", "<image>" * images + question), Message("assistant", answer)), source=source)
    files = [picture(number) for number in range(images)]
    length = len(render(sample.messages, TOKENIZER, visual_tokens=[4] * images).input_ids)
    part = Encoder(TOKENIZER, RESOLUTION)(sample, files, expected_tokens=length)
    return part, Planned(key, source, length, ((20, 12),) * images)


@pytest.fixture
def made():
    """Two packs: two samples and a hole, then one; a page of it."""
    parts = [
        encoded("a-1", "alpha", "Which plane is this?", "axial", images=1),
        encoded("b-1", "beta", FORGED, "Nothing to see.", images=2),
        encoded("a-2", "alpha", "What is this?", "An écho of 漢字 😀."),
    ]
    rows = [planned for _, planned in parts] + [Planned("b-2", "beta", 30, ())]
    hand = (Pack((0, 3, 1), rows[0].tokens + rows[1].tokens + 30), Pack((2,), rows[2].tokens))
    batch = row(parts, 400)
    return lay_out(batch, hand, rows, resolution=RESOLUTION, tokenizer=TOKENIZER, title="stage: <b>step</b>")


def row(parts, tokens, **changes):
    return collate(
        [sample for sample, _ in parts],
        row_tokens=tokens,
        pad_id=TOKENIZER.pad_id,
        resolution=RESOLUTION,
        sources=("alpha", "beta"),
        step=3,
        **changes,
    )


def test_every_sample_is_found_where_it_lies_and_a_hole_is_named(made):
    assert [(part.key, part.source, part.pack) for part in made.segments] == [("a-1", "alpha", 0), ("b-1", "beta", 0), ("a-2", "alpha", 1)]
    assert [part.start for part in made.segments] == [0, *np.cumsum(made.batch.lengths)[:-1]]
    assert made.segments[-1].stop == made.batch.tokens
    assert [list(part.images) for part in made.segments] == [[0], [1, 2], []]
    assert made.holes == ("b-2",)
    assert made.packs == ((0, made.segments[1].stop), (made.segments[1].stop, made.batch.tokens))


def test_a_row_that_is_not_the_planned_one_is_refused(made):
    with pytest.raises(AssertionError, match="not the one that was planned"):
        lay_out(made.batch, (Pack((0,), 1),), [Planned("a-1", "alpha", 9, ())], resolution=RESOLUTION, tokenizer=TOKENIZER, title="")


def test_a_piece_of_a_sample_says_which(made):
    part, planned = encoded("a-1", "alpha", "Which plane is this?", "axial")
    whole = Planned("a-1", "alpha", planned.tokens + 50, ((9, 9),))
    hand = (Pack((0,), planned.tokens, ((50, planned.tokens + 50),)),)
    view = lay_out(row([(part, whole)], 100), hand, [whole], resolution=RESOLUTION, tokenizer=TOKENIZER, title="")
    assert view.segments[0].span == (50, planned.tokens + 50)
    assert f"(50 to {planned.tokens + 50} of the sample)" in terminal(view, TOKENIZER)


def test_totals_are_those_of_the_batch(made):
    batch = made.batch
    learned, visual = int((batch.labels >= 0).sum()), int((batch.input_ids == TOKENIZER.image_id).sum())
    assert totals(made)["of 400 slots"] == f"{batch.tokens / 400:.2%}"
    assert totals(made)["supervised"] == f"{learned / batch.tokens:.1%}"
    assert totals(made)["visual"] == f"{visual / batch.tokens:.1%}"
    assert visual == 3 * 4


def test_the_terminal_colours_what_is_learned_given_and_seen(made):
    shown = terminal(made, TOKENIZER)
    assert "\x1b[32maxial<|im_end|>\x1b[0m" in shown
    assert "Which plane is this?<|im_end|>" in shown
    assert "\x1b[36m<image>x4\x1b[0m" in shown
    assert "left out by a fault: b-2" in shown
    bars = [line for line in shown.splitlines() if line.startswith("pack ")]
    assert len(bars) == 2
    assert [bar.count("|") for bar in bars] == [2, 1]
    assert all(len(re.sub(r"\x1b\[\d+m", "", bar)) == len("pack 1  ") + 100 for bar in bars)


def test_text_of_a_sample_steers_neither_terminal_nor_page(made):
    assert "\x1b[31m" not in terminal(made, TOKENIZER)
    assert "\\x1b[31mred" in terminal(made, TOKENIZER)
    page = html(made, TOKENIZER, RESOLUTION)
    assert "\u202e" not in page
    assert "\\u202e" in page
    ours = "html head meta title style body h1 h2 h3 div b span p svg rect a path section figure img figcaption"
    assert set(re.findall(r"<(\w+)", page)) == set(ours.split())
    assert page.count("<img") == page.count("<img alt=") == 3
    assert "&lt;script&gt;alert(1)" in re.sub(r"</?span[^>]*>", "", page)
    assert "<b>step" not in page


def test_the_page_needs_nothing_but_itself(made):
    page = html(made, TOKENIZER, RESOLUTION)
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,|#s\d)""", page)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_holds_each_picture_as_the_tower_reads_it(made):
    files = re.findall(r"data:image/png;base64,([\w+/=]+)", html(made, TOKENIZER, RESOLUTION))
    assert len(files) == 3
    for number, file in enumerate(files):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(file))))).permute(2, 0, 1)
        assert torch.equal(pixels, unpatchify(made.batch.images.patches[16 * number : 16 * (number + 1)], (4, 4)))


@pytest.mark.parametrize(
    ("resolution", "size", "patches", "tokens"),
    [
        (RESOLUTION, (20, 12), (4, 4), (2, 2)),
        (Resolution(patch_size=4, image_size=20, visual_grid=3), (20, 12), (5, 5), (3, 3)),
        (Resolution(patch_size=4, pool=2, min_visual_tokens=4, max_visual_tokens=16), (48, 24), (10, 4), (5, 2)),
    ],
)
def test_both_grids_lie_over_the_picture(resolution, size, patches, tokens):
    encoder = Encoder(TOKENIZER, resolution)
    sample = Sample("k", (Message("user", "<image>What?"), Message("assistant", "This.")), source="alpha")
    wide, tall = size
    text = encoded("k", "alpha", "What?", "This.")[1].tokens + 2
    length = text + resolution.tokens_of(wide, tall)
    part = encoder(sample, [picture(0, size)], expected_tokens=length)
    batch = collate([part], row_tokens=length, pad_id=0, resolution=resolution, sources=("alpha",), step=0)
    planned = [Planned("k", "alpha", length, (size,))]
    view = lay_out(batch, (Pack((0,), length),), planned, resolution=resolution, tokenizer=TOKENIZER, title="")
    figure = re.search(r"<figure .*</figure>", html(view, TOKENIZER, resolution))[0]
    lines = [
        (len(re.findall(r"M[\d.]+ 0V", d)) - 1, len(re.findall(r"M0 [\d.]+H", d)) - 1) for d in re.findall(r'path d="([^"]+)"', figure)
    ]
    assert lines == [patches, tokens]
    assert f"{patches[0]} × {patches[1]} patches, {tokens[0]} × {tokens[1]} = {resolution.tokens_of(*size)} tokens" in figure


def seen(page):
    """Return (first token seen, first reader, end) of every block of readers."""
    return [(int(first), int(a), int(b)) for first, a, b in re.findall(r"M(\d+) (\d+)V(\d+)H\3L\2 \2Z", page)]


def test_attention_is_drawn_from_the_borders_that_the_kernel_gets(made):
    page = html(made, TOKENIZER, RESOLUTION)
    ends = [int(end) for end in made.batch.cu_seqlens.unique()]
    assert seen(page) == [(a, a, b) for a, b in pairwise(ends)]
    assert [(int(a), int(b)) for a, b in re.findall(r'M(\d+) \1H(\d+)V\2H\1Z" fill="#', page)] == [(0, 16), (16, 32), (32, 48)]
    parts = [encoded("a-1", "alpha", "Which plane is this?", "axial"), encoded("a-2", "alpha", "What is this?", "a brain")]
    rows = [planned for _, planned in parts]
    batch = row(parts, 100, merged=[2])
    view = lay_out(batch, (Pack((0, 1), batch.tokens),), rows, resolution=RESOLUTION, tokenizer=TOKENIZER, title="")
    first, used = rows[0].tokens, batch.tokens
    assert seen(html(view, TOKENIZER, RESOLUTION)) == [(0, 0, first), (0, first, used), (used, used, 100)]


def test_tokens_carry_their_label_and_a_character_in_pieces_is_shown_whole(made):
    page = html(made, TOKENIZER, RESOLUTION)
    section = re.search(r'<section class="sample" id="s3".*?</section>', page, re.DOTALL)[0]
    learned = re.findall(r'<span class="l" title="token (\d+), position (\d+), id (\d+)">([^<]*)</span>', section)
    assert "".join(text for *_, text in learned) == "An écho of 漢字 😀.&lt;|im_end|&gt;"
    ids, part = made.batch.input_ids[0].tolist(), made.segments[2]
    assert all(ids[int(at)] == int(id) and int(at) - part.start == int(place) for at, place, id, _ in learned)
    assert '<span class="g"' in section
    assert "image × 4" in page
