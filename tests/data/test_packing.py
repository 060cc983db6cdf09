"""Packing and dealing: what fits, what is best, and that nothing is lost."""

import random
from itertools import combinations

import pytest

from infimed.contracts import Pack, UserError
from infimed.data.packing import chooser, deal, exact_fill, first_fit


def best_by_trying_all(lengths: list[int], capacity: int) -> int:
    rest = range(1, len(lengths))
    sums = (lengths[0] + sum(lengths[i] for i in chosen) for size in range(len(lengths)) for chosen in combinations(rest, size))
    return max(total for total in sums if total <= capacity)


def test_exact_fill_is_as_full_as_any_choice_with_the_oldest_sample():
    draw = random.Random(0)
    for _ in range(150):
        capacity = draw.randint(10, 60)
        lengths = [draw.randint(0, capacity) for _ in range(draw.randint(1, 9))]
        chosen = exact_fill(lengths, capacity)
        assert chosen[0] == 0
        assert chosen == sorted(set(chosen))
        assert sum(lengths[i] for i in chosen) == best_by_trying_all(lengths, capacity)


def test_exact_fill_prefers_older_samples_that_fill_as_well():
    assert exact_fill([4, 6, 3, 3, 6], 10) == [0, 1]
    assert exact_fill([4, 5, 3, 3], 10) == [0, 2, 3]


def test_first_fit_takes_whatever_fits_next():
    assert first_fit([4, 5, 3, 1], 10) == [0, 1, 3]


def test_an_unknown_packing_is_named():
    with pytest.raises(UserError, match="packing='tight': expected one of packed, first_fit, unpacked"):
        chooser("tight")


def test_dealing_gives_equal_counts_and_evens_the_cost():
    draw = random.Random(1)
    costs = [draw.random() for _ in range(32)]
    packs = [Pack((n,), 1) for n in range(32)]
    hands = deal(packs, costs, ranks=8)
    assert sorted(pack.rows[0] for hand in hands for pack in hand) == list(range(32))
    assert {len(hand) for hand in hands} == {4}
    loads = [sum(costs[pack.rows[0]] for pack in hand) for hand in hands]
    in_order = [sum(costs[4 * rank : 4 * rank + 4]) for rank in range(8)]
    assert max(loads) < 1.1 * sum(costs) / 8 < max(in_order)
