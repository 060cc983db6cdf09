"""One HTML page that needs nothing but itself: the frame, and charts as inline SVG.

Text from data is shown as text, never as markup: whatever builds a page passes it through `shown`, and the page forbids scripts anyway.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),  # Okabe and Ito's, for every kind of eye
    *("#6a3d9a", "#7f6000", "#5f6b73", "#8f1d2c", "#4d7d1a", "#1d3557"),
)
"""Of sources, in their order, and again from the start after the last."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1f2328; background: #fff }
body { max-width: 1120px; margin: 0 auto; padding: 12px 14px 40px; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: .4em 0 } h2 { font-size: 1.1rem; margin: 1.6em 0 .5em } h3 { font-size: .95rem; margin: 1.1em 0 .3em }
p { margin: .4em 0 } .quiet { color: #59636e; font-size: .87rem } .wide { overflow-x: auto }
.figures { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: .7em 0; padding: 0 }
.figures div { min-width: 5.5em } .figures b { display: block; font-size: 1.15rem } .figures span { color: #59636e; font-size: .8rem }
table { border-spacing: 0; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap }
th { font-weight: 600; color: #59636e } th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: #fff }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; vertical-align: -.05em }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .87rem; margin: .5em 0 }
.charts { display: flex; flex-wrap: wrap; gap: 0 40px } .charts > div { width: 480px; max-width: 100% }
svg { display: block; max-width: 100% } svg text { font: 11.5px system-ui, sans-serif; fill: #59636e }
"""


def shown(text: str) -> str:
    """Escape text from data for a page, controls made visible."""
    return escape(printable(text))


def printable(text: str) -> str:
    r"""Spell out what would steer a terminal or reorder a line (escapes, bidirectional marks), such as `\x1b`; line ends stay."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else _spell(c) for c in text)


def _spell(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def colour(number: int) -> str:
    """Return the colour of a source by its number."""
    return COLOURS[number % len(COLOURS)]


def document(title: str, body: Sequence[str], *, style: str = "") -> str:
    """Frame a page. `body`: lines of markup; `title`: plain text; `style`: rules of this page alone."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{shown(title)}</title><style>{_STYLE}{style}</style></head><body>"
    )
    return "\n".join([head, f"<h1>{shown(title)}</h1>", *body, "</body></html>", ""])


def figures(values: Mapping[str, str]) -> str:
    """Set a row of numbers, each above its name."""
    return '<div class="figures">' + "".join(f"<div><b>{shown(v)}</b><span>{shown(k)}</span></div>" for k, v in values.items()) + "</div>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, colours: Sequence[str] | None = None) -> str:
    """Set a table of plain text; `colours`: of a square before each row's first cell."""
    dots = [f'<span class="dot" style="background:{c}"></span>' for c in colours] if colours else [""] * len(rows)
    head = "".join(f"<th>{shown(h)}</th>" for h in headings)
    lines = [f"<tr><td>{dot}" + "</td><td>".join(map(shown, row)) + "</td></tr>" for dot, row in zip(dots, rows, strict=True)]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def legend(entries: Mapping[str, str]) -> str:
    """Set names beside squares of their colours."""
    marks = "".join(f'<span><span class="dot" style="background:{c}"></span>{shown(name)}</span>' for name, c in entries.items())
    return f'<div class="legend">{marks}</div>'


def stacked(
    counts: Sequence[Sequence[int]], labels: Sequence[str], *, colours: Sequence[str], marks: Mapping[float, str] | None = None
) -> str:
    """Draw a histogram as SVG, parts of a bar one above the other.

    counts: [parts][bars]. labels: of the borders between bars, one more than bars; an empty one is left out.
    marks: place on the axis, in bars from the left -> name of a vertical line there.
    """
    bars, width, height, top = len(labels) - 1, 480, 150, 26
    tallest = max((sum(part[b] for part in counts) for b in range(bars)), default=0) or 1
    step = min(70.0, (width - 40) / bars)
    out = [f'<svg viewBox="0 0 {width} {top + height + 20}" width="{width}" role="img">']
    for b in range(bars):
        y = float(top + height)
        for part, paint in zip(counts, colours, strict=True):
            tall = part[b] / tallest * height
            if tall:
                y -= tall
                box = f'x="{20 + b * step:.2f}" y="{y:.2f}" width="{max(step - 1, 0.5):.2f}" height="{tall:.2f}"'
                out.append(f'<rect {box} fill="{paint}"><title>{shown(labels[b])}: {part[b]:,}</title></rect>')
    for b, label in enumerate(labels):
        if label:
            out.append(f'<text x="{20 + b * step:.1f}" y="{top + height + 15}" text-anchor="middle">{shown(label)}</text>')
    out.append(
        f'<path d="M20 {top + height}.5H{20 + bars * step:.1f}" stroke="#8c959f"/><text x="20" y="11">most in a bar: {tallest:,}</text>'
    )
    for place, name in (marks or {}).items():
        x = 20 + place * step
        side = "end" if x > width / 2 else "start"
        out.append(f'<path d="M{x:.1f} {top - 6}V{top + height}" stroke="#b42318" stroke-dasharray="4 3"/>')
        out.append(f'<text x="{x + (-4 if side == "end" else 4):.1f}" y="{top + 4}" text-anchor="{side}">{shown(name)}</text>')
    return "".join([*out, "</svg>"])
