"""What a row costs, measured: the fit finds the prices behind the times, and refuses to guess."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from infimed.contracts import Batch, Images, borders
from infimed.data.packing import Price
from infimed.training.callbacks.calibrate import Calibrate, features, fit


def measured(price: Price, *, count: int, noise: float = 0.0) -> list[list[float]]:
    draw = random.Random(0)
    rows = []
    for number in range(count):
        tokens, pairs, patches = draw.randint(500, 1000), draw.randint(10_000, 900_000), draw.randint(0, 4000)
        patch_pairs, stepped = patches * draw.randint(100, 700), number % 4 == 3
        seconds = 0.05 + price.token * tokens + price.pair * pairs + price.patch * patches + price.patch_pair * patch_pairs + 0.2 * stepped
        rows.append([tokens, pairs, patches, patch_pairs, float(stepped), seconds + draw.gauss(0, noise)])
    return rows


def test_the_fit_finds_the_prices_behind_the_times():
    true = Price(token=1e-4, pair=2e-7, patch=3e-5, patch_pair=1e-8)
    found = fit(measured(true, count=60, noise=0.002))
    for name in ("token", "pair", "patch", "patch_pair"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1)


def test_a_price_is_never_negative():
    found = fit(measured(Price(token=1e-4, pair=-1e-7, patch=3e-5, patch_pair=0.0), count=60))
    assert found.pair == 0
    assert min(found.token, found.patch, found.patch_pair) >= 0


def test_times_that_follow_nothing_give_no_price():
    assert fit(measured(Price(0.0, 0.0, 0.0, 0.0), count=60, noise=0.5)) is None


class World:
    """Two ranks of which this is the first; the other measures the same."""

    is_global_zero, world_size = True, 2

    def __init__(self) -> None:
        self.prices: list[Price] = []
        self.datamodule = SimpleNamespace(reprice=self.prices.append)
        self.fit_loop = SimpleNamespace(_should_accumulate=lambda: False)
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def test_every_rank_gets_the_price_once_and_a_single_rank_measures_nothing(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("infimed.training.callbacks.calibrate.time.perf_counter", lambda: next(clock) ** 2 / 100)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda ranks, mine: ranks.__setitem__(slice(None), [mine, mine]))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda price: None)
    world, callback = World(), Calibrate(steps=6)
    for tokens in range(100, 2000, 100):  # the clock above runs slower and slower, as do these rows
        callback.on_train_batch_start(world, None, None, 0)
        callback.on_train_batch_end(world, None, None, filled(tokens), 0)
    assert len(world.prices) == 1
    assert world.prices[0].token > 0
    alone = Calibrate()
    alone.on_train_start(SimpleNamespace(world_size=1), None)
    assert alone.state_dict() == {"done": True}


def filled(tokens: int) -> Batch:
    images, row = Images.of(torch.zeros(0, 12, dtype=torch.uint8), []), torch.zeros(1, 8, dtype=torch.int64)
    return Batch(row, row, row, row[0], borders([5, 3]), 8, images, row, ("a",), ("k",), (tokens,), 0, tokens, 0, 3)


def test_features_are_counted_on_the_host():
    images = Images.of(torch.zeros(10, 12, dtype=torch.uint8), [(2, 3), (2, 2)])
    row = torch.zeros(1, 8, dtype=torch.int64)
    batch = Batch(row, row, row, row[0], borders([5, 3]), 8, images, row, ("a",), ("k", "l"), (5, 2), 0, 7, 4, 3)
    assert features(batch) == [7.0, 29.0, 10.0, 52.0]
