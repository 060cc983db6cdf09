"""Requests for bytes of remote objects, laid out as the spans that are fetched at once: pure arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from infimed.data.remote import BLOCK, Stat

_GAP = 2**16  # bytes between two requests that are cheaper to read and drop than to ask around


@dataclass(frozen=True)
class Request:
    """Bytes [offset, offset + size) of a file or URL."""

    path: str
    offset: int
    size: int


@dataclass
class Span:
    """Bytes [start, stop) of one object that are fetched at once."""

    path: str
    start: int
    stop: int
    block: str = ""  # its name in the cache
    pieces: list[tuple[int, int, int]] = field(default_factory=list)  # (number of the request, start, stop) of what was asked for


def neighbours(requests: Sequence[Request], order: Sequence[int]) -> list[Span]:
    """Join requests that lie close together, and cut long ones, into spans of at most a block; `order`: their numbers by place."""
    spans: list[Span] = []
    for number in order:
        path, end = requests[number].path, requests[number].offset + requests[number].size
        for start in range(requests[number].offset, end, BLOCK):
            stop = min(start + BLOCK, end)
            last = spans[-1] if spans else None
            if last and last.path == path and last.start <= start <= last.stop + _GAP and stop - last.start <= BLOCK:
                last.stop = max(last.stop, stop)
            else:
                last = Span(path, start, stop)
                spans.append(last)
            last.pieces.append((number, start, stop))
    return spans


def blocks(requests: Sequence[Request], order: Sequence[int], *, stats: Mapping[str, Stat], whole: bool) -> list[Span]:
    """Return the blocks that hold what is asked for, up to the end of each object; `whole`: an object is one block."""
    spans: dict[tuple[str, int], Span] = {}
    for number in order:
        path, stat = requests[number].path, stats[requests[number].path]
        size = max(1, stat.size) if whole else BLOCK
        start, end = requests[number].offset, min(requests[number].offset + requests[number].size, stat.size)
        while start < end:
            low = start // size * size
            high, stop = min(low + size, stat.size), min(low + size, end)
            span = spans.setdefault((path, low), Span(path, low, high, block_name(path, stat, "all" if whole else str(low))))
            span.pieces.append((number, start, stop))
            start = stop
    return list(spans.values())


def block_name(path: str, stat: Stat, part: str) -> str:
    """Name a block after what it is part of: another version of an object has other blocks."""
    return hashlib.sha256("\n".join([path, stat.version, str(stat.size), part]).encode()).hexdigest()[:40]
