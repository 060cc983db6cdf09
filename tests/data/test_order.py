"""Order: each row once a pass, computed from its number alone, out of a bounded number of shards."""

import numpy as np
import pytest

from infimed.data.catalogue import Table
from infimed.data.order import Stream, by_hash, hash64


def make_stream(table: Table, source: int = 0, *, seed: int = 3, open_shards: int = 4, shuffle: bool = True) -> Stream:
    return Stream(table, source, table.counts()[source], seed=seed, open_shards=open_shards, shuffle=shuffle)


def sharded(count: int, per_shard: int) -> Table:
    return Table([1] * count, shards=[row // per_shard for row in range(count)])


@pytest.mark.parametrize(("count", "per_shard", "open_shards"), [(1, 1, 1), (7, 2, 3), (1000, 37, 4), (1000, 37, 100), (170, 10, 16)])
def test_each_pass_shows_each_row_once(count, per_shard, open_shards):
    rows = make_stream(sharded(count, per_shard), open_shards=open_shards).take(0, 3 * count).reshape(3, count)
    assert (np.sort(rows, axis=1) == np.arange(count)).all()


def test_any_stretch_can_be_computed_alone():
    table = sharded(500, 23)
    whole = make_stream(table).take(0, 1500)
    for start, count in [(0, 1), (499, 2), (777, 600), (1499, 1), (3, 0)]:
        assert (make_stream(table).take(start, count) == whole[start : start + count]).all()


@pytest.mark.parametrize("per_shard", [10, 100])
def test_another_pass_or_seed_is_another_order(per_shard):
    table = sharded(100, per_shard)
    orders = [make_stream(table, seed=seed).take(100 * number, 100).tolist() for seed in (0, 1, -1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_row_goes_anywhere():
    places = [int(np.flatnonzero(make_stream(sharded(64, 8), seed=seed, open_shards=3).take(0, 64) == 7)[0]) for seed in range(1500)]
    assert set(places) == set(range(64))
    assert abs(np.mean(places) - 31.5) < 2
    assert abs(np.std(places) - 18.5) < 1


def test_a_bounded_number_of_shards_is_open_and_blocks_are_even():
    rows = make_stream(sharded(1700, 100), open_shards=16).take(0, 1700)  # 17 shards: blocks of 8 and 9, not of 16 and a lonely 1
    first, second = set((rows[:800] // 100).tolist()), set((rows[800:] // 100).tolist())
    assert (len(first), len(second)) == (8, 9)
    assert not first & second


def test_sources_that_share_shards_walk_through_them_together():
    count = 4000
    table = Table([1] * count, sources=["ab"[row % 2] for row in range(count)], shards=[row // 100 for row in range(count)])
    a, b = (make_stream(table, source).take(0, count) // 100 for source in (0, 1))
    assert (np.unique(a[:200]) == np.unique(b[:200])).all()
    assert [set(part) for part in np.split(a, 20)] == [set(part) for part in np.split(b, 20)]


def test_unshuffled_rows_come_in_the_order_of_the_index():
    assert make_stream(sharded(50, 7), shuffle=False).take(0, 100).tolist() == [*range(50), *range(50)]


def test_hashes_of_other_streams_have_nothing_in_common():
    index = np.arange(1000)
    hashes = [hash64(index, seed=seed, epoch=epoch, stream=stream) for seed in (0, 1) for epoch in (0, 1) for stream in (0, 1)]
    assert len(np.unique(np.concatenate(hashes))) == 8000


def test_the_order_of_hashes_is_that_of_a_sort_and_ties_go_by_place():
    for size in (0, 1, 2, 1000, 4097):
        hashes = hash64(np.arange(size), seed=1, epoch=2, stream=3)
        assert (by_hash(hashes) == np.argsort(hashes, kind="stable")).all()
    assert by_hash(np.array([7, 2**40, 7, 5], np.uint64)).tolist() == [0, 2, 3, 1]  # what differs in the last bits alone is a tie
