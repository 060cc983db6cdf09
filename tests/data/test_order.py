"""Order, mixture and selection: pure functions of seed, epoch and row."""

import numpy as np
import pytest

from infimed.contracts import UserError
from infimed.data.mixture import epoch_rows, keep_rows, row_weights
from infimed.data.order import permutation
from infimed.data.shards import open_shards


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_an_order_is_a_permutation_that_can_be_computed_again(size):
    order = permutation(size, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(size))
    assert (order == permutation(size, seed=3, epoch=5)).all()


def test_another_epoch_or_seed_is_another_order():
    orders = [permutation(100, seed=seed, epoch=epoch).tolist() for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_sample_goes_anywhere():
    places = [int(np.flatnonzero(permutation(64, seed=0, epoch=epoch) == 7)[0]) for epoch in range(2000)]
    assert abs(np.mean(places) - 31.5) < 2
    assert abs(np.std(places) - 18.5) < 1
    assert set(places) == set(range(64))


def test_whole_weights_repeat_and_fractions_are_met_on_average():
    weights = row_weights(["a"] * 1000 + ["b"] * 1000 + ["c"] * 1000, {"a": 2, "b": 0.25, "*": 0})
    counts = [np.bincount(epoch_rows(weights, seed=1, epoch=epoch), minlength=3000) for epoch in range(3)]
    for count in counts:
        assert (count[:1000] == 2).all()
        assert set(count[1000:2000]) == {0, 1}
        assert 200 < count[1000:2000].sum() < 300
        assert count[2000:].sum() == 0
    assert (counts[0] != counts[1]).any()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"alhpa": 1}, "did you mean alpha"),
        ({"alpha": -1}, "expected a number >= 0"),
        ({"*": float("nan")}, ">= 0"),
        ({"*": 0}, "weight 0"),
    ],
)
def test_a_wrong_mixture_is_named(weights, said):
    with pytest.raises(UserError, match=said):
        row_weights(["alpha", "beta"], weights)


def test_selection_keeps_the_rows_whose_facets_all_match(shards_path):
    rows = open_shards([shards_path]).rows
    kept = keep_rows(rows, {"source": ["alpha", "beta"], "task": ["level"]})
    assert kept == [i for i, row in enumerate(rows) if row.source != "gamma" and row.task == "level"]
    assert keep_rows(rows, {}) == list(range(60))


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"tusk": ["plane"]}, "select.tusk: no such field; did you mean task"),
        ({"task": ["plain", "level"]}, "select.task=plain: no sample has it; did you mean plane"),
        ({"task": []}, "none of 60 samples matches"),
    ],
)
def test_a_selection_of_nothing_is_refused_with_the_nearest_name(shards_path, select, said):
    with pytest.raises(UserError, match=said):
        keep_rows(open_shards([shards_path]).rows, select)
