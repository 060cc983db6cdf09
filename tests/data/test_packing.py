"""Packing and dealing: what fits, what is best, and that nothing is lost."""

import random
from itertools import combinations

import numpy as np
import pytest

from infimed.contracts import Pack, UserError
from infimed.data.catalogue import Measure
from infimed.data.packing import Price, alone, chooser, deal, exact_fill, next_fit


def best_by_trying_all(lengths: list[int], capacity: int) -> int:
    rest = range(1, len(lengths))
    sums = (lengths[0] + sum(lengths[i] for i in chosen) for size in range(len(lengths)) for chosen in combinations(rest, size))
    return max(total for total in sums if total <= capacity)


def test_exact_fill_is_as_full_as_any_choice_with_the_oldest_sample():
    draw = random.Random(0)
    for _ in range(300):
        capacity = draw.randint(10, 60)
        lengths = [draw.randint(1, draw.choice([capacity, capacity // 4])) for _ in range(draw.randint(1, 9))]
        chosen = exact_fill(lengths, capacity)
        assert 0 in chosen
        assert len(chosen) == len(set(chosen))
        assert sum(lengths[i] for i in chosen) == best_by_trying_all(lengths, capacity)


def test_exact_fill_prefers_older_samples_that_fill_as_well():
    assert sorted(exact_fill([4, 6, 3, 3, 6], 10)) == [0, 1]
    assert sorted(exact_fill([4, 5, 3, 3], 10)) == [0, 2, 3]
    assert sorted(exact_fill([1, 1, 1, 1, 5, 6], 10)) == [0, 1, 2, 3, 5]


def test_exact_fill_of_a_started_row_leaves_out_an_oldest_that_is_too_long():
    assert sorted(exact_fill([7, 3, 4, 2], 6)) == [2, 3]
    assert exact_fill([7, 8], 6) == []


def test_next_fit_stops_at_the_first_that_does_not_fit():
    assert next_fit([4, 5, 3, 1], 10) == [0, 1]
    assert next_fit([4, 6], 10) == [0, 1]
    assert next_fit([11], 10) == []


def test_each_packing_has_its_way_and_an_unknown_one_is_named():
    ways = {name: chooser(name) for name in ("packed", "unisolated", "padded", "sequential")}
    assert ways == {"packed": exact_fill, "unisolated": exact_fill, "padded": alone, "sequential": next_fit}
    with pytest.raises(UserError, match="packing='tight': expected one of packed, padded, unisolated, sequential"):
        chooser("tight")


def test_a_price_counts_tokens_pairs_and_patches():
    sizes = Measure(np.array([3, 1]), patches=np.array([10, 0]), patch_pairs=np.array([52, 0]), visual=np.array([2, 0]))
    assert Price(token=1, pair=10, patch=100, patch_pair=1000).of(sizes).tolist() == [3 + 90 + 1000 + 52000, 11]


def loads_of(hands: list[tuple[Pack, ...]], costs: list[float]) -> list[float]:
    return [sum(costs[pack.rows[0]] for pack in hand) for hand in hands]


def numbered(count: int) -> list[Pack]:
    return [Pack((number,), 1) for number in range(count)]


def test_dealing_gives_equal_counts_loses_nothing_and_evens_the_cost():
    draw = random.Random(1)
    for ranks, each in [(2, 4), (8, 4), (64, 4), (64, 8), (3, 2)]:
        costs = [draw.lognormvariate(0, 0.3) for _ in range(ranks * each)]
        hands = deal(numbered(len(costs)), costs, ranks=ranks)
        assert sorted(pack.rows[0] for hand in hands for pack in hand) == list(range(len(costs)))
        assert {len(hand) for hand in hands} == {each}
        in_order = max(sum(costs[each * rank : each * rank + each]) for rank in range(ranks))
        assert max(loads_of(hands, costs)) < in_order
        if each >= 4 and ranks >= 8:
            assert max(loads_of(hands, costs)) < 1.01 * sum(costs) / ranks  # measured worst 1.0086, of 8 ranks


def test_swaps_mend_what_greedy_dealing_cannot():
    # Greedy: 9+3+1 against 8+5+4 (then the first is full), 13 to 17. Best: 15 to 15.
    costs = [9, 8, 5, 4, 3, 1]
    assert sorted(loads_of(deal(numbered(6), costs, ranks=2), costs)) == [15, 15]


def test_hands_follow_from_the_costs_alone_also_where_they_tie():
    costs = [1.0, 2.0] * 16
    hands = deal(numbered(32), costs, ranks=8)
    assert hands == deal(numbered(32), list(costs), ranks=8)
    assert loads_of(hands, costs) == [6.0] * 8
    assert all(list(hand) == sorted(hand, key=lambda pack: pack.rows) for hand in hands)


def test_one_pack_a_rank_stays_where_it_is():
    assert deal(numbered(3), [3.0, 1.0, 2.0], ranks=3) == [(pack,) for pack in numbered(3)]
