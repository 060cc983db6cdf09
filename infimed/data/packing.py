"""Which waiting samples share a row, and which rank gets which rows: pure functions of lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from infimed.contracts import Pack, UserError

Packing = Literal["packed", "first_fit", "unpacked"]
Choose = Callable[[Sequence[int], int], list[int]]


def exact_fill(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample and those that fill the rest of the row best, older ones first; return their indices, ascending.

    lengths: waiting samples, oldest first, each 0 <= length <= capacity. Bit s of `reach` says that some samples so far sum to s.
    """
    room = capacity - lengths[0]
    mask = (1 << (room + 1)) - 1
    reach = [1]
    for length in lengths[1:]:
        if reach[-1] >> room:  # full already: no younger sample is needed
            break
        reach.append((reach[-1] | (reach[-1] << length)) & mask)
    total = reach[-1].bit_length() - 1
    chosen = []
    for index in range(len(reach) - 1, 0, -1):
        if not reach[index - 1] >> total & 1:  # only sample `index` makes this sum reachable
            chosen.append(index)
            total -= lengths[index]
    return [0, *reversed(chosen)]


def first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample, then each next one that still fits; return their indices, ascending."""
    chosen, room = [], capacity
    for index, length in enumerate(lengths):
        if length <= room:
            chosen.append(index)
            room -= length
    return chosen


def alone(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample only: one sample a row, the baseline."""
    return [0]


def chooser(packing: str) -> Choose:
    """Return the function of a packing mode. Raises: UserError for an unknown one."""
    choices: dict[str, Choose] = {"packed": exact_fill, "first_fit": first_fit, "unpacked": alone}
    if packing not in choices:
        raise UserError(f"packing={packing!r}: expected one of {', '.join(get_args(Packing))}")
    return choices[packing]


def deal(packs: Sequence[Pack], costs: Sequence[float], *, ranks: int) -> list[tuple[Pack, ...]]:
    """Give every rank the same number of packs, dearest first to the rank with the least so far; len(packs) must divide by `ranks`."""
    each, rest = divmod(len(packs), ranks)
    assert not rest
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for number in sorted(range(len(packs)), key=lambda n: (-costs[n], n)):
        rank = min((r for r in range(ranks) if len(hands[r]) < each), key=lambda r: (loads[r], r))
        hands[rank].append(number)
        loads[rank] += costs[number]
    return [tuple(packs[number] for number in sorted(hand)) for hand in hands]
