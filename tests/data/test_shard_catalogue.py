"""What the plan knows of shards: the same numbers as their rows say one by one."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from sample_factory import make_sample, mixed

from infimed.data.encode import Encoder
from infimed.data.shard_catalogue import ShardCatalogue
from infimed.data.shards import open_shards, write_shards
from infimed.processing.resolution import Resolution

SQUARE = Resolution(patch_size=4, image_size=16, visual_grid=3)
ANY = Resolution(patch_size=4, pool=2, min_visual_tokens=4, max_visual_tokens=16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tokenizer):
    """Thirty samples with pictures of many sizes, one of them no picture at all, over three shards."""

    def draw(number):
        file = io.BytesIO()
        Image.new("L", (8 + 5 * number % 60, 8 + 11 * number % 70)).save(file, "PNG")
        return file.getvalue() if number != 7 else b"no picture"

    samples = [(sample, [draw(n + i) for i in range(len(images))]) for n, (sample, images) in enumerate(mixed(30))]
    folder = tmp_path_factory.mktemp("pictures")
    write_shards(samples, folder, max_samples=10, tokenizer=tokenizer)
    return open_shards([folder])


@pytest.mark.parametrize("resolution", [SQUARE, ANY])
def test_measures_are_those_of_the_rows_in_the_order_asked_for(pictures, resolution):
    catalogue, order = ShardCatalogue(pictures, resolution), np.random.default_rng(0).permutation(30)
    rows = [pictures.rows[number] for number in order.tolist()]
    measure = catalogue.measure(order)
    assert measure.tokens.tolist() == [row.length(resolution) for row in rows]
    assert measure.visual.tolist() == [row.visual_tokens(resolution) for row in rows]
    patches = [[np.prod(resolution.grid(*size)) if resolution.fits(*size) else 0 for size in row.image_sizes] for row in rows]
    assert measure.patches.tolist() == [sum(of_row) for of_row in patches]
    assert measure.patch_pairs.tolist() == [sum(n**2 for n in of_row) for of_row in patches]
    assert measure.tokens.dtype == measure.patch_pairs.dtype == np.int64
    assert len(catalogue.measure(np.empty(0, dtype=np.int64)).tokens) == 0


@pytest.mark.parametrize("keep", [None, {"task": ["level"]}, {"source": ["alpha", "gamma"]}])
def test_every_row_is_found_once_under_its_source_and_shard(pictures, keep):
    shards = pictures.select(keep or {})
    catalogue = ShardCatalogue(shards, SQUARE)
    counts = catalogue.counts()
    assert counts.shape == (len(catalogue.sources), 3) and counts.dtype == np.int64
    cells = {(s, place): catalogue.rows(s, place).tolist() for s in range(counts.shape[0]) for place in range(3)}
    assert {cell: len(rows) for cell, rows in cells.items()} == {cell: counts[cell] for cell in cells}
    assert sorted(row for rows in cells.values() for row in rows) == list(range(len(shards)))
    for (source, place), rows in cells.items():
        assert rows == sorted(rows)
        assert {(shards.rows[row].source, shards.place(row)[0]) for row in rows} <= {(catalogue.sources[source], place)}


def test_a_subset_out_of_order_is_numbered_by_its_own_order(pictures):
    catalogue = ShardCatalogue(pictures.subset([25, 4, 1, 22]), SQUARE)
    assert catalogue.sources == ("beta",)
    assert [catalogue.rows(0, place).tolist() for place in range(3)] == [[1, 2], [], [0, 3]]


@pytest.mark.parametrize("resolution", [SQUARE, ANY])
def test_cuts_are_the_runs_of_the_rendered_sample(pictures, tokenizer, resolution):
    catalogue, encoder = ShardCatalogue(pictures, resolution), Encoder(tokenizer, resolution)
    for number in (2, 5, 4, 0):
        sample, images = pictures.read(number)
        ids = encoder(sample, images, expected_tokens=pictures.rows[number].length(resolution)).input_ids.tolist()
        starts = [place for place, token in enumerate(ids) if token == tokenizer.image_start_id]
        ends = [place + 1 for place, token in enumerate(ids) if token == tokenizer.image_end_id]
        assert catalogue.cuts(number) == tuple(zip(starts, ends, strict=True)) and len(starts) == number % 3


def test_the_formula_is_asked_once_for_each_size(shards_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Resolution, "tokens_of", lambda self, width, height: asked.append((width, height)) or 1)
    ShardCatalogue(open_shards([shards_path]), ANY).measure(np.arange(60))
    assert asked == [(8, 8)]  # sixty pictures in three shards


def test_a_pickled_catalogue_carries_no_columns_and_says_the_same(pictures):
    catalogue = ShardCatalogue(pictures, SQUARE)
    fresh = len(pickle.dumps(catalogue))
    measure = catalogue.measure(np.arange(30))
    assert len(pickle.dumps(catalogue)) < fresh + 500
    again = pickle.loads(pickle.dumps(catalogue))
    assert again.fingerprint == catalogue.fingerprint == pictures.fingerprint
    assert again.measure(np.arange(30)).tokens.tolist() == measure.tokens.tolist()


def test_few_shards_stay_in_memory(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr("infimed.data.shards._PARTS", 128)
    write_shards([make_sample(n, images=0) for n in range(400)], tmp_path, max_samples=2, tokenizer=tokenizer)
    shards = open_shards([tmp_path])
    for number in range(400):
        shards.read(number)
    assert len(shards._parts._kept) == 128 and len(shards._files._kept) == 64
