"""Which waiting samples share a row, and which rank gets which rows: pure functions of lengths."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np

from infimed.contracts import Pack, UserError
from infimed.data.catalogue import Measure

Packing = Literal["packed", "padded", "unisolated", "sequential"]
Choose = Callable[[Sequence[int], int], list[int]]

_EVEN = 1.003
"""Dearest rank over mean at which dealing is good enough: below what the cost of a row is known to."""


@dataclass(frozen=True)
class Price:
    """What a sample costs a rank, in any unit."""

    token: float
    pair: float  # a token that looks at a token: times len ** 2
    patch: float
    patch_pair: float

    def of(self, sizes: Measure) -> np.ndarray:
        """Return the cost of samples, float64[n]."""
        linear = self.token * sizes.tokens + self.pair * sizes.tokens.astype(np.float64) ** 2
        return linear + self.patch * sizes.patches + self.patch_pair * sizes.patch_pairs


PRICE = Price(token=7.2e9, pair=2.95e5, patch=8e8, patch_pair=1.24e5)
"""Forward FLOPs of a decoder of 3.6 billion weights (36 layers of width 4096, causal) and a tower of 0.4 billion (27 of 1152)."""


def exact_fill(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample and others that leave as little of the row free as possible, older ones first; return their indices.

    lengths: waiting samples, oldest first, each <= capacity but perhaps the oldest, which is then left out.
    """
    # The oldest in order, then the exact fill of the last quarter: mostly that is full, and the numbers below are short.
    ahead, taken = 0, 0
    for length in lengths:
        if taken + length > capacity - capacity // 4:
            break
        ahead, taken = ahead + 1, taken + length
    if ahead > 1:
        chosen, free = _fill(lengths, ahead, capacity - taken)
        if not free:
            return chosen
    first = int(lengths[0] <= capacity)
    return _fill(lengths, first, capacity - sum(lengths[:first]))[0]


def _fill(lengths: Sequence[int], ahead: int, room: int) -> tuple[list[int], int]:
    """Choose the samples before `ahead` and the best of the others for `room` tokens; return all of them and the tokens left free.

    Bit r of `left` says that some choice leaves r tokens free: one shift and one `or` a sample, and no list of sums.
    """
    left = 1 << room
    history, places = [left], list[int]()
    for place, length in enumerate(islice(lengths, ahead, None), ahead):
        if length <= room:
            left |= left >> length
            history.append(left)
            places.append(place)
            if left & 1:  # full: no younger sample is needed
                break
    chosen, fewest, index = list(range(ahead)), left & -left, len(places)
    free = fewest.bit_length() - 1
    while fewest >> room == 0:
        index -= 1
        if not history[index] & fewest:  # only this sample leaves as little
            chosen.append(places[index])
            fewest <<= lengths[places[index]]
    return chosen, free


def next_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose samples in the order of arrival until one does not fit; return their indices."""
    count = 0
    for length in lengths:
        capacity -= length
        if capacity < 0:
            break
        count += 1
    return list(range(count))


def alone(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample only: one sample a row, the baseline."""
    return [0]


def chooser(packing: str) -> Choose:
    """Return the function of a packing mode. Raises: UserError for an unknown one."""
    # What `unisolated` leaves out is the border between the samples of a row, which is not a matter of who shares one.
    choices: dict[str, Choose] = {"packed": exact_fill, "padded": alone, "unisolated": exact_fill, "sequential": next_fit}
    if packing not in choices:
        raise UserError(f"packing={packing!r}: expected one of {', '.join(get_args(Packing))}")
    return choices[packing]


def deal(packs: Sequence[Pack], costs: Sequence[float], *, ranks: int) -> list[tuple[Pack, ...]]:
    """Give every rank the same number of packs, at costs as even as may be; len(packs) must divide by `ranks`.

    The same input gives the same hands in every process: ties go by number.
    """
    each, rest = divmod(len(packs), ranks)
    assert not rest
    if ranks == 1:
        return [tuple(packs)]
    hands = _exchange(_greedy(costs, ranks=ranks, each=each), np.asarray(costs, np.float64)) if each > 1 else np.arange(ranks)[:, None]
    return [tuple(packs[number] for number in hand) for hand in np.sort(hands, axis=1).tolist()]


def _greedy(costs: Sequence[float], *, ranks: int, each: int) -> np.ndarray:
    """Give the dearest pack first to the rank with the least so far, int64[ranks, each]."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for number in np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist():
        load, rank = loads[0]
        hands[rank].append(number)
        if len(hands[rank]) < each:
            heapq.heapreplace(loads, (load + costs[number], rank))
        else:
            heapq.heappop(loads)
    return np.array(hands, np.int64)


def _exchange(hands: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Swap packs of the dearest rank with those of others as long as that helps and is worth it.

    Greedy dealing has few packs to even out with at the end, and they are not always small.
    """
    prices = costs[hands]
    loads = prices.sum(axis=1)
    enough = _EVEN * loads.mean()
    for _ in range(4 * len(hands)):
        rank = int(loads.argmax())
        if loads[rank] <= enough:
            break
        saved = prices[rank][:, None, None] - prices[None]  # [each of the dearest, ranks, each]: by how much a swap lightens the dearest
        after = np.maximum(loads[rank] - saved, loads[None, :, None] + saved)
        after[:, rank] = np.inf
        mine, other, theirs = np.unravel_index(int(after.argmin()), after.shape)
        if after[mine, other, theirs] >= loads[rank]:
            break
        hands[rank, mine], hands[other, theirs] = hands[other, theirs], hands[rank, mine]
        prices[rank, mine], prices[other, theirs] = prices[other, theirs], prices[rank, mine]
        loads[[rank, other]] = prices[[rank, other]].sum(axis=1)
    return hands
